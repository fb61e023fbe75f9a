"""Recipes of FG-CLIP (arXiv 2505.05071; official code 360CVGroup/FG-CLIP, branch v1.0).

`tiny` and `coco_mini` run on a laptop; the stages are as published, section numbers of the paper
and files of the official code beside the numbers. ASSUMPTION marks what neither states.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from data_pipelines.image_text import ImageTextPipeline, RandomCrop
from data_pipelines.protocols.base import Protocol
from data_pipelines.protocols.captions import SourceRetrieval
from data_pipelines.protocols.classes import SourceBoxClassification
from data_pipelines.protocols.negatives import SourceHardNegatives
from data_pipelines.protocols.published import PROTOCOLS, Model
from data_pipelines.protocols.regions import RegionRetrieval
from data_pipelines.scenes import HELD_OUT, Scenes
from data_pipelines.scenes.vocabulary import (
    COLOURS,
    SIZES,
    TEXTURES,
    class_names,
    coloured_class_names,
)
from data_pipelines.sources.base import Source
from data_pipelines.sources.coco import Coco
from data_pipelines.sources.finehard import FineHard
from data_pipelines.sources.jsonl import JsonLines
from data_pipelines.sources.webdataset import WebDataset
from jaxmods.backbones.clip import Execution, TextConfig, VisionConfig
from jaxmods.partitioning import MeshShape
from jaxmods.systems.fgclip.system import FgClip
from train.experiment import (
    Checkpointing,
    Evaluation,
    Experiment,
    Init,
    Logging,
    Optim,
    Precision,
)

# Published sizes (paper section 4.1; config.json of the hub's checkpoints).
BASE = FgClip()
LARGE = FgClip(
    vision=VisionConfig(width=1024, layers=24, heads=16, mlp=4096, image_size=336, patch_size=14),
    text=TextConfig(width=768, layers=12, heads=12, mlp=3072),
    projection_dim=768,
)

SCENE_VOCABULARY = 1024

# Sizes of the laptop recipes: pictures of 64 px, 8 x 8 patches, the scene world's own tokenizer.
TINY = FgClip(
    vision=VisionConfig(width=96, layers=3, heads=3, mlp=384, image_size=64, patch_size=8),
    text=TextConfig(
        width=64,
        layers=2,
        heads=2,
        mlp=256,
        vocab_size=SCENE_VOCABULARY,
        context_short=24,
        context_long=93,
        keep=1,
        bos_id=SCENE_VOCABULARY - 2,
        eos_id=SCENE_VOCABULARY - 1,
        pad_id=SCENE_VOCABULARY - 1,
    ),
    projection_dim=96,
    # From scratch everything is learned from regions first; the published 0.1 and 0.5 are for a
    # model that knows pictures and words already.
    weight_region=1.0,
    weight_hard=1.0,
    hard_pack_images=8,
    hard_pack_slots=2,
    context_region=12,
    # The scene world has a few thousand different phrases: equal ones meet in every batch.
    same_text="positive",
    # From scratch with a large learning rate the temperature would run away; CLIP's own bound.
    max_logit_scale=100.0,
    long_start="stretched",
)


# The scene world's phrases always say size, texture and colour, so a bare class name is a text that
# the model never met; the class vector is the mean over what may be said of the class.
SIZED = tuple(f"a {size} {texture} {{}}" for size in SIZES for texture in TEXTURES)
COLOURED = tuple(said.replace("{}", f"{colour} {{}}") for said in SIZED for colour in COLOURS)

# COCO's published layout, relative to the working directory.
COCO_ROOT = "data/coco"


def pipeline(system: FgClip, source: Source, **options: Any) -> ImageTextPipeline:
    """The pipeline whose batches are those of `system`."""
    return ImageTextPipeline(
        source=source,
        image_size=system.vision.image_size,
        context_short=system.text.context_short,
        context_long=system.text.context_long,
        context_region=system.context_region,
        max_boxes=system.max_boxes,
        negatives=system.negatives,
        hard_pack_images=system.hard_pack_images,
        hard_pack_slots=system.hard_pack_slots,
        **options,
    )


def scene_protocols(
    system: FgClip, source: Scenes, tokenizer: str = "scene"
) -> tuple[Protocol, ...]:
    """Retrieval by short and long captions, regions, box classes, hard negatives."""
    side = system.vision.image_size
    short, long = system.text.context_short, system.text.context_long
    label = "scenes"
    return (
        SourceRetrieval(source, tokenizer, side, short, label=label, text="short"),
        SourceRetrieval(source, tokenizer, side, long, label=label, text="long"),
        RegionRetrieval(source, tokenizer, side, short, label=label),
        SourceBoxClassification(
            source,
            tokenizer,
            side,
            short,
            label=label,
            classes=class_names(source.language),
            templates=COLOURED,
        ),
        SourceBoxClassification(
            dataclasses.replace(source, coloured_labels=True),
            tokenizer,
            side,
            short,
            label=f"{label}_coloured",
            classes=coloured_class_names(source.language),
            templates=SIZED,
        ),
        SourceHardNegatives(source, tokenizer, side, short, label=label),
    )


def tiny() -> Experiment:
    """Learns on a laptop in minutes from the scene world; evaluated on 512 unseen scenes."""
    side = TINY.vision.image_size
    train = Scenes(seed=0, count=1_000_000, image_size=side, short_captions=2)
    unseen = Scenes(seed=0, start=HELD_OUT, count=512, image_size=side)
    return Experiment(
        system=TINY,
        # No "a photo of ": a model of this size would have to be shown texts without it as well.
        data=pipeline(TINY, train, tokenizer="scene", short_prefix="", region_phrase="short"),
        steps=1500,
        batch_size=32,
        optim=Optim(lr=2e-3, warmup_steps=50, weight_decay=0.05, b2=0.98, clip_norm=1.0),
        checkpoint=Checkpointing(every=400, keep=2),
        evaluation=Evaluation(at_start=True, protocols=scene_protocols(TINY, unseen)),
        logging=Logging(every=20),
        notes="All four losses at once, from scratch.",
    )


# A tower for systems that have to say what is where (`iaa/tiny`): regions alone, half of them with
# their places. Without the other losses phrases find their regions sooner: after 1,500 steps 28 %
# of them do (R@1, no places, cosines), of `tiny` 9 %.
TINY_REGIONS = dataclasses.replace(
    TINY,
    weight_short=0.0,
    weight_long=0.0,
    weight_hard=0.0,
    position_start="sincos",
    patch_start="cosines",
)


def tiny_regions() -> Experiment:
    """`tiny` from regions and phrases alone, half of them with places: the start of `iaa/tiny`."""
    whole = tiny()
    assert isinstance(whole.data, ImageTextPipeline)
    assert isinstance(whole.data.source, Scenes)
    source = dataclasses.replace(whole.data.source, places=True)
    return dataclasses.replace(
        whole,
        system=TINY_REGIONS,
        data=dataclasses.replace(whole.data, source=source),
        steps=2500,
        notes="Text prompts of its evaluation that are not phrases of regions mean little to it.",
    )


def coco_mini() -> Experiment:
    """Real photographs with captions and boxes: any folder in COCO's layout (data.root=...).

    Meant for a few dozen to a few thousand pictures: proves that real data goes all the way
    through, and what the model makes of pictures that it has seen. It has no hard negatives, and
    80 photographs are far too few to learn anything that holds for others.
    """
    system = dataclasses.replace(
        TINY,
        text=dataclasses.replace(TINY.text, context_short=32, context_long=32, keep=32),
        long_start="drawn",
        weight_long=0.0,
        weight_hard=0.0,
        negatives=1,
        hard_pack_slots=0,
        context_region=None,
        max_boxes=8,
    )
    side, length = system.vision.image_size, system.text.context_short
    protocols: list[Protocol] = []
    for split in ("train2017", "val2017"):
        source = Coco(COCO_ROOT, split)
        protocols += [
            SourceRetrieval(source, "scene", side, length, label=f"coco_{split}"),
            RegionRetrieval(source, "scene", side, length, label=f"coco_{split}"),
            SourceBoxClassification(
                source, "scene", side, length, label=f"coco_{split}", templates=("{}",)
            ),
        ]
    places = ("data.source.root", *(f"evaluation.protocols.{i}.source.root" for i in range(6)))
    return Experiment(
        system=system,
        data=pipeline(
            system,
            Coco(COCO_ROOT, "train2017"),
            tokenizer="scene",
            short_prefix="",
            box_choice="random",
            augment=RandomCrop(min_area=0.6),
        ),
        steps=300,
        batch_size=16,
        optim=Optim(lr=1e-3, warmup_steps=30, weight_decay=0.1, b2=0.98, clip_norm=1.0),
        checkpoint=Checkpointing(every=150, keep=2),
        evaluation=Evaluation(at_start=True, protocols=tuple(protocols)),
        logging=Logging(every=10),
        shorthands=(("data.root", places),),
    )


def finetune() -> Experiment:
    """Fine-tune the published base model on your own JSONL (data.source.path, init.weights).

    Learning rate: users of CLIP report 1e-7 to 5e-6 with low weight decay on small sets
    (docs/data.md); equal captions, usual in class lists, are not each other's negatives.
    """
    system = dataclasses.replace(BASE, same_text="positive", hard_pack_slots=8)
    return Experiment(
        system=system,
        data=pipeline(system, JsonLines("data/mine.jsonl"), tokenizer="weights/fg-clip-base"),
        steps=1000,
        batch_size=64,
        optim=Optim(lr=1e-6, warmup_steps=100, weight_decay=0.001),
        checkpoint=Checkpointing(every=200, keep=3),
        init=Init(weights="weights/fg-clip-base"),
        logging=Logging(every=10),
        shorthands=(
            ("data.path", ("data.source.path",)),
            ("data.root", ("data.source.root",)),
            ("data.boxes", ("data.source.boxes",)),
            ("weights", ("init.weights", "data.tokenizer")),
        ),
    )


# Published stages -------------------------------------------------------------------------------


def _stage1(system: FgClip, start: str) -> Experiment:
    """Paper section 3.1 and its implementation details; no official code for this stage."""
    system = dataclasses.replace(system, weight_region=0.0, weight_hard=0.0, execution=PUBLISHED)
    return Experiment(
        system=system,
        data=pipeline(
            # 1.6 B images of LAION-2B with long captions (not published): img2dataset shards whose
            # json members carry `long_caption` (ASSUMPTION).
            system,
            WebDataset("data/laion/*.tar"),
            tokenizer=start,
        ),
        # 160 x 384 images; one epoch of 1.6 B.
        batch_size=61_440,
        steps=26_000,
        # lr from the paper; betas, decay and warm-up are ASSUMPTIONs.
        optim=Optim(lr=1e-4, warmup_steps=2000, weight_decay=0.05, b2=0.98),
        precision=Precision(compute="bfloat16"),
        init=Init(weights=start),
        notes="Starts from OpenAI's CLIP: long tables stretched, temperature 0.07.",
    )


def _stage2(system: FgClip, start: str) -> Experiment:
    """Paper section 3.2; official scripts/train.sh and fgclip/train/train_fgclip.py."""
    system = dataclasses.replace(
        system,
        # 8 devices of 512: region and hard losses see the boxes of one device.
        local_groups=8,
        # 1.5 hard boxes per picture on average; more are cut and counted.
        hard_pack_images=8,
        hard_pack_slots=12,
        execution=PUBLISHED,
    )
    return Experiment(
        system=system,
        data=pipeline(
            system, FineHard("data/FineHARD", index_dir="data/FineHARD/index"), tokenizer=start
        ),
        batch_size=4096,
        steps=2930,  # one epoch of 12 M
        # The script's values; it has no gradient clipping (ASSUMPTION: off).
        optim=Optim(lr=1e-6, warmup_steps=200, weight_decay=0.001),
        precision=Precision(compute="bfloat16"),
        init=Init(weights=start),
        notes="Starts from a stage-1 checkpoint (official from_openai=False).",
        shorthands=(("data.root", ("data.source.root",)),),
    )


PUBLISHED = Execution(remat="full")


def base_stage1() -> Experiment:
    """FG-CLIP base, stage 1: short and long captions, from OpenAI's CLIP B/16."""
    return _stage1(BASE, "weights/clip-vit-base-patch16")


def base_stage2() -> Experiment:
    """FG-CLIP base, stage 2: all four losses on FineHARD."""
    return _stage2(BASE, "weights/fg-clip-base-stage1")


def large_stage1() -> Experiment:
    """FG-CLIP large, stage 1: short and long captions, from OpenAI's CLIP L/14 at 336 px."""
    recipe = _stage1(LARGE, "weights/clip-vit-large-patch14-336")
    # 240 pictures on each chip of a v5e-256 leave no room for a whole optimiser state beside them:
    # it is split over one ring of 16 chips (the paper's runs split it, too: ZeRO-2).
    return dataclasses.replace(recipe, mesh=MeshShape(fsdp=16))


def large_stage2() -> Experiment:
    """FG-CLIP large, stage 2: all four losses on FineHARD."""
    return _stage2(LARGE, "weights/fg-clip-large-stage1")


# The published checkpoints ----------------------------------------------------------------------


def _published(system: FgClip, model: Model) -> Experiment:
    """To import, evaluate and export a published checkpoint; each set under `data/<protocol>`."""
    weights = f"weights/{model.replace('/', '-').replace('fgclip', 'fg-clip')}"
    protocols = tuple(
        protocol(root=f"data/{name}", tokenizer=weights, model=model)
        for name, protocol in PROTOCOLS.items()
    )
    stage2 = _stage2(system, weights)
    tokenizers = tuple(f"evaluation.protocols.{n}.tokenizer" for n in range(len(protocols)))
    return dataclasses.replace(
        stage2,
        evaluation=Evaluation(protocols=protocols),
        notes="For `jaxmods import`, `eval --protocol NAME` and `export`; sets under data/NAME.",
        shorthands=(
            *stage2.shorthands,
            ("weights", ("init.weights", "data.tokenizer", *tokenizers)),
        ),
    )


def base() -> Experiment:
    """The published fg-clip-base: import it, evaluate it by published protocol, export it."""
    return _published(BASE, "fgclip/base")


def large() -> Experiment:
    """The published fg-clip-large: import it, evaluate it by published protocol, export it."""
    return _published(LARGE, "fgclip/large")
