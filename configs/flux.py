"""Recipes of FLUX.1 text to image.

Black Forest Labs have published no training recipe. ASSUMPTION marks what is ours; the rest is what
diffusers' `train_dreambooth_flux.py` does by default.
"""

from __future__ import annotations

from data_pipelines.encoded import Encoded, EncodedPipeline
from jaxmods.nn.stack import Execution
from jaxmods.partitioning import MeshShape
from jaxmods.systems.flux.base import FluxBase
from jaxmods.systems.flux.system import Flux
from train.experiment import Checkpointing, Experiment, Init, Logging, Optim, Precision


def finetune_1024() -> Experiment:
    """All weights of FLUX.1-dev trained at 1024 x 1024 in bf16, two pictures per chip of a v5p-8.

    The measure that others publish for TPUs: latents and text features come encoded, so that a step
    is the transformer alone.
    """
    system = Flux(
        base=FluxBase(encoders=None, execution=Execution(remat="full")),
        inputs="latents",
        guidance=3.5,  # ASSUMPTION: the published default in sampling
        weighting_scheme="none",
    )
    return Experiment(
        system=system,
        data=EncodedPipeline(Encoded("data/flux_1024_encoded")),
        batch_size=8,  # two pictures on each of four chips
        steps=10_000,  # ASSUMPTION
        # ASSUMPTION, all but clipping: a small constant rate, as for any finished model.
        optim=Optim(lr=1e-5, schedule="constant", warmup_steps=100, weight_decay=0.01, clip_norm=1),
        mesh=MeshShape(data=1, fsdp=-1),
        precision=Precision(params="bfloat16", frozen="bfloat16", compute="bfloat16"),
        checkpoint=Checkpointing(every=1000, keep=2),
        logging=Logging(every=10),
        init=Init(weights="weights/FLUX.1-dev"),
        notes="Encoded examples: image [128, 128, 16], states [512, 4096], pooled [768], bfloat16.",
        shorthands=(("data.root", ("data.source.path",)), ("weights", ("init.weights",))),
    )
