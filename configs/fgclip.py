"""Recipes of FG-CLIP (arXiv 2505.05071; official code 360CVGroup/FG-CLIP, branch v1.0).

`tiny` and `coco_mini` run on a laptop; the stages are as published, section numbers of the paper
and files of the official code beside the numbers. ASSUMPTION marks what neither states.
"""

from __future__ import annotations

import dataclasses

from data_pipelines.image_text import ImageTextPipeline, RandomCrop
from data_pipelines.protocols.base import Protocol
from data_pipelines.protocols.captions import SourceRetrieval
from data_pipelines.protocols.classes import SourceBoxClassification
from data_pipelines.protocols.negatives import SourceHardNegatives
from data_pipelines.protocols.regions import RegionRetrieval
from data_pipelines.scenes import HELD_OUT, Scenes
from data_pipelines.sources.base import Source
from data_pipelines.sources.coco import Coco
from data_pipelines.sources.finehard import FineHard
from data_pipelines.sources.jsonl import JsonLines
from data_pipelines.sources.webdataset import WebDataset
from jaxmods.backbones.clip import TextConfig, VisionConfig
from jaxmods.systems.fgclip.system import FgClip
from train.experiment import (
    Checkpointing,
    Evaluation,
    Experiment,
    GroupOptim,
    Init,
    Logging,
    Optim,
    Precision,
)

# Published sizes (paper section 4.1; config.json of the hub's checkpoints).
BASE = FgClip()
LARGE = FgClip(
    vision=VisionConfig(
        width=1024, layers=24, heads=16, mlp=4096, image_size=336, patch_size=14
    ),
    text=TextConfig(width=768, layers=12, heads=12, mlp=3072),
    projection_dim=768,
)

SCENE_VOCABULARY = 1024

# Sizes of the laptop recipes: pictures of 64 px, 8 x 8 patches, the scene world's own tokenizer.
TINY = FgClip(
    vision=VisionConfig(width=128, layers=4, heads=4, mlp=512, image_size=64, patch_size=8),
    text=TextConfig(
        width=128,
        layers=3,
        heads=4,
        mlp=512,
        vocab_size=SCENE_VOCABULARY,
        context_short=24,
        context_long=93,
        keep=1,
        bos_id=SCENE_VOCABULARY - 2,
        eos_id=SCENE_VOCABULARY - 1,
        pad_id=SCENE_VOCABULARY - 1,
    ),
    projection_dim=128,
    hard_pack_images=8,
    hard_pack_slots=4,
    # The scene world has a few thousand different phrases: equal ones meet in every batch.
    same_text="positive",
    # From scratch with a large learning rate the temperature would run away; CLIP's own bound.
    max_logit_scale=100.0,
    long_start="stretched",
)


def pipeline(
    system: FgClip, source: Source, *, tokenizer: str, augment: RandomCrop | None = None
) -> ImageTextPipeline:
    """The pipeline whose batches are those of `system`."""
    return ImageTextPipeline(
        source=source,
        tokenizer=tokenizer,
        image_size=system.vision.image_size,
        context_short=system.text.context_short,
        context_long=system.text.context_long,
        max_boxes=system.max_boxes,
        negatives=system.negatives,
        hard_pack_images=system.hard_pack_images,
        hard_pack_slots=system.hard_pack_slots,
        augment=augment,
    )


def source_protocols(
    system: FgClip, source: Source, *, tokenizer: str, label: str, hard_negatives: bool = True
) -> tuple[Protocol, ...]:
    """Retrieval by short and long captions, regions, box classes, hard negatives over `source`."""
    side = system.vision.image_size
    short, long = system.text.context_short, system.text.context_long
    found: tuple[Protocol, ...] = (
        SourceRetrieval(source, tokenizer, side, short, label=label, text="short"),
        SourceRetrieval(source, tokenizer, side, long, label=label, text="long"),
        RegionRetrieval(source, tokenizer, side, short, label=label),
        SourceBoxClassification(source, tokenizer, side, short, label=label),
    )
    if hard_negatives:
        found += (SourceHardNegatives(source, tokenizer, side, short, label=label),)
    return found


def tiny() -> Experiment:
    """Learns on a laptop in minutes from the scene world; evaluated on 512 unseen scenes."""
    side = TINY.vision.image_size
    train = Scenes(seed=0, count=1_000_000, image_size=side, short_captions=2)
    unseen = Scenes(seed=0, start=HELD_OUT, count=512, image_size=side)
    return Experiment(
        system=TINY,
        data=pipeline(TINY, train, tokenizer="scene"),
        steps=800,
        batch_size=64,
        optim=Optim(lr=1e-3, warmup_steps=50, weight_decay=0.05, b2=0.98, clip_norm=1.0),
        checkpoint=Checkpointing(every=200, keep=2),
        evaluation=Evaluation(
            every=400,
            at_start=True,
            protocols=source_protocols(TINY, unseen, tokenizer="scene", label="scenes"),
        ),
        logging=Logging(every=20),
        notes="All four losses from scratch.",
    )
