"""Recipes of RefTON (arXiv 2511.00956; official code 360CVGroup/RefTon).

`tiny` runs on a laptop. The others are the published settings: the README's command where it says
something, the paper where only it does; the two differ in places, which is said beside the value.
ASSUMPTION marks what neither states.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from data_pipelines.protocols.base import Protocol
from data_pipelines.protocols.try_on import Subject, TryOn
from data_pipelines.protocols.try_on_published import Dataset, published
from data_pipelines.samplers.try_on import TryOnSampler
from data_pipelines.scenes.source import HELD_OUT
from data_pipelines.scenes.try_on import TryOnScenes
from data_pipelines.sources.base import Mixture
from data_pipelines.tryon import Combined, DressCode, TryOnPipeline, TryOnSource, VitonHd
from jaxmods.backbones.flux import FluxConfig
from jaxmods.nn.stack import Execution
from jaxmods.partitioning import MeshShape
from jaxmods.systems.flux.base import FluxBase
from jaxmods.systems.flux.sample import Sampling
from jaxmods.systems.flux.squares import Squares
from jaxmods.systems.refton.system import RefTon
from train.experiment import (
    Checkpointing,
    Evaluation,
    Experiment,
    Init,
    Logging,
    Optim,
    Precision,
)

SUBJECTS: tuple[Subject, ...] = ("person", "agnostic")


def pipeline(
    system: RefTon,
    source: TryOnSource | Mixture,
    *,
    person_prob: float = 0.5,
    reference_prob: float = 0.5,
    draws: Literal["step", "record"] = "step",
) -> TryOnPipeline:
    """The pipeline whose batches are those of `system`."""
    return TryOnPipeline(
        source,
        height=system.height,
        width=system.width,
        cond_scale=system.cond_scale,
        person_prob=person_prob,
        reference_prob=reference_prob,
        draws=draws,
        multiple=system.base.multiple,
    )


# The laptop recipe ------------------------------------------------------------------------------

# Pictures of 32 x 24 px, squares of 2 px as latents (no autoencoder: nothing is lost or learned
# there), so 48 tokens of 48 numbers a picture. The transformer is wider than a token: narrower, it
# could not carry the noise that it has to predict. No text encoders, the prompt is four random
# vectors.
TINY = RefTon(
    base=FluxBase(
        transformer=FluxConfig(
            in_channels=48,
            out_channels=48,
            double_layers=1,
            single_layers=3,
            heads=4,
            head_dim=32,
            text_width=32,
            pooled_width=32,
            rope_axes=(8, 12, 12),
        ),
        vae=Squares(2, scaling_factor=2.0),
        encoders=None,
        text_length=4,
    ),
    height=32,
    width=24,
    cond_scale=2.0,
    # There is no pretrained base to adapt: the whole transformer trains.
    adapters=None,
    sampling=Sampling(steps=8, guidance=1.0),
)


def tiny() -> Experiment:
    """Figures of the scene world in other garments, from scratch, in minutes on a laptop."""
    held_out = TryOnScenes(start=HELD_OUT, count=128, height=TINY.height, width=TINY.width)
    frame = pipeline(TINY, held_out).frame
    protocols = tuple(
        TryOn(
            held_out,
            frame,
            subject=subject,
            reference=reference,
            scores=("ssim",),
            encoding="png",
            label="scenes",
            batch_size=64,
            multiple=TINY.base.multiple,
        )
        for subject in SUBJECTS
        for reference in (False, True)
    )
    return Experiment(
        system=TINY,
        data=pipeline(
            TINY,
            TryOnScenes(count=100_000, height=TINY.height, width=TINY.width),
            draws="record",
        ),
        batch_size=8,
        steps=2000,
        optim=Optim(lr=2e-3, warmup_steps=50, b2=0.99, clip_norm=1.0),
        checkpoint=Checkpointing(every=500, keep=1),
        evaluation=Evaluation(batch_size=64, protocols=protocols),
        sampler=TryOnSampler(held_out, frame, reference=True, multiple=TINY.base.multiple),
        logging=Logging(every=50),
        notes="40 classes of garments (colour and pattern); latents are the pixels themselves.",
    )


# Published settings -----------------------------------------------------------------------------

KONTEXT = FluxBase(execution=Execution(remat="full"))
SMALL = RefTon(base=KONTEXT, height=512, width=384, cond_scale=2.0, sampling=Sampling(28, 2.5))
LARGE = dataclasses.replace(SMALL, height=1024, width=768)


def _published(
    system: RefTon,
    source: TryOnSource,
    tests: tuple[tuple[Dataset, TryOnSource, bool], ...],
    *,
    steps: int,
    notes: str,
) -> Experiment:
    """The common part.

    Args:
      tests: the set that figures are published for, its source, and whether it is paired.
    """
    data = pipeline(system, source)  # person 0.5, reference 0.5 (README; the paper has 0.25)
    protocols: tuple[Protocol, ...] = tuple(
        TryOn(
            test,
            data.frame,
            subject=subject,
            reference=reference,
            person_from_target=paired,  # official: no person photos in paired test sets
            label=f"{dataset}_{'paired' if paired else 'unpaired'}",
            batch_size=64,
            published=published(dataset, subject, reference, paired),
        )
        for dataset, test, paired in tests
        for subject in SUBJECTS
        for reference in (False, True)
    )
    numbers = range(len(protocols))
    sizes = tuple(
        (
            field,
            (
                f"system.{field}",
                f"data.{field}",
                f"sampler.frame.{field}",
                *(f"evaluation.protocols.{n}.frame.{field}" for n in numbers),
            ),
        )
        for field in ("height", "width", "cond_scale")
    )
    roots = (
        "data.source.root",
        *(("sampler.source.root",) if tests else ()),
        *(f"evaluation.protocols.{n}.source.root" for n in numbers),
    )
    return Experiment(
        system=system,
        data=data,
        batch_size=128,  # paper; the README's command has 8 GPUs of 8
        steps=steps,
        # README: AdamW (8-bit moments there, fp32 here), constant 1e-4, decay 1e-4, clipping 1.
        optim=Optim(lr=1e-4, schedule="constant", weight_decay=1e-4, clip_norm=1.0),
        mesh=MeshShape(data=1, fsdp=-1),
        # The base as published; adapters are fp32 masters (the official code trains them in bf16).
        precision=Precision(params="float32", frozen="bfloat16", compute="bfloat16"),
        checkpoint=Checkpointing(every=1000, keep=3),
        evaluation=Evaluation(batch_size=64, protocols=protocols),
        sampler=TryOnSampler(tests[0][1] if tests else None, data.frame),
        logging=Logging(every=20),
        init=Init(weights="weights/FLUX.1-Kontext-dev"),
        notes=notes,
        shorthands=(*sizes, ("data.root", roots), ("weights", ("init.weights",))),
    )


def _viton(system: RefTon, root: str = "data/viton") -> Experiment:
    tests: tuple[tuple[Dataset, TryOnSource, bool], ...] = (
        ("viton-hd", VitonHd(root, split="test"), True),
        ("viton-hd", VitonHd(root, split="test", pairs="unpaired"), False),
    )
    return _published(
        system,
        VitonHd(root),
        tests,
        steps=20_000,  # paper
        notes="Stage 2: targets are the set's photos, inputs generated persons or agnostic photos.",
    )


def _dresscode(system: RefTon, root: str = "data/DressCode") -> Experiment:
    tests: tuple[tuple[Dataset, TryOnSource, bool], ...] = (
        ("dresscode", DressCode(root, split="test"), True),
        ("dresscode", DressCode(root, split="test", pairs="unpaired"), False),
    )
    return _published(
        system,
        DressCode(root),
        tests,
        steps=48_000,  # paper
        notes="Stage 2: targets are the set's photos, inputs generated persons or agnostic photos.",
    )


def viton_hd() -> Experiment:
    """RefTON on VITON-HD at 512 x 384: adapters of rank 64 on FLUX.1-Kontext-dev."""
    return _viton(SMALL)


def viton_hd_1024() -> Experiment:
    """RefTON on VITON-HD at 1024 x 768."""
    return _viton(LARGE)


def dresscode() -> Experiment:
    """RefTON on DressCode at 512 x 384."""
    return _dresscode(SMALL)


def dresscode_1024() -> Experiment:
    """RefTON on DressCode at 1024 x 768."""
    return _dresscode(LARGE)


def combined() -> Experiment:
    """RefTON on its mixed set (VITON-HD, DressCode, FashionTryOn, ViViD, IGPair) at 1024 x 768."""
    return _published(
        LARGE,
        Combined("data/tryon"),
        (),
        steps=48_000,  # ASSUMPTION: that of DressCode
        notes="Evaluate with the sets' recipes: jaxmods eval refton/viton_hd_1024 --workdir RUN.",
    )
