"""What the RefTON kinds share: the system and the parameters of a case."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmods.backbones.autoencoder_kl import AutoencoderConfig
from jaxmods.backbones.flux import FluxConfig
from jaxmods.diffusion import FlowSchedule
from jaxmods.partitioning import unbox
from jaxmods.systems.flux.base import FluxBase
from jaxmods.systems.refton.system import Adapters, RefTon
from jaxmods.systems.refton.weights import load_adapters
from jaxmods.weights import import_params, memory_reader
from tests.parity.registry import Case, Tolerance

# Arrays of the official collator, and what they are here; person and agnostic are both subjects.
NAMES = {
    "cond_pixel_values_person": "subject",
    "cond_pixel_values_agnostic": "subject",
    "cond_pixel_values_cloth": "garment",
    "cond_pixel_values_agnostic_mask": "mask",
    "cond_pixel_values_dense": "dense",
    "pixel_values_ref": "reference",
}


def system(case: Case, **options: Any) -> RefTon:
    """The system with the sizes of a case; `options` are further fields."""
    meta = case.meta
    transformer = FluxConfig.from_hub_config(meta["transformer_config"])
    adapters = meta["lora"]
    return RefTon(
        base=FluxBase(
            transformer=transformer,
            vae=AutoencoderConfig.from_hub_config({"sample_size": 32, **meta["vae_config"]}),
            encoders=None,
            text_length=case.shapes["in.prompt_embeds"][1],
            schedule=FlowSchedule.from_hub_config(meta["scheduler_config"]),
        ),
        height=meta["height"],
        width=meta["width"],
        cond_scale=meta["cond_scale"],
        adapters=Adapters(adapters["r"], adapters["alpha"], 0.0, tuple(adapters["target_modules"])),
        **options,
    )


@functools.lru_cache(maxsize=8)
def params(case: Case, model: RefTon) -> dict[str, Any]:
    """The base's weights, the adapters of the official file, and the prompt's features."""
    features = {
        "prompt.states": case.io["in.prompt_embeds"][0],
        "prompt.pooled": case.io["in.pooled"][0],
    }
    reader = memory_reader({**case.weights, **features})
    abstract = unbox(jax.eval_shape(model.init, jax.random.key(0)))
    found, missing = import_params(reader, model.weights(), abstract)
    found = model.complete_import(found, missing)
    path = Path(case.weights_path).parent / case.meta["lora"]["file"]
    loaded = load_adapters(model, found, path)
    return jax.tree.map(jnp.asarray, loaded)


def channels_last(array: np.ndarray) -> jnp.ndarray:
    """[B, C, H, W] -> [B, H, W, C]."""
    return jnp.asarray(array.transpose(0, 2, 3, 1))


def channels_first(array: Any) -> np.ndarray:
    """[..., H, W, C] -> [..., C, H, W]."""
    return np.moveaxis(np.asarray(array), -1, -3)


def tight(case: Case, name: str) -> Tolerance:
    """The tight half of "tight ...; loose ...": our table of frequencies is the reference's."""
    clauses = dict(re.findall(r"(tight|loose) ([^;]+)", str(case.meta["tolerance"][name])))
    return Tolerance.parse(clauses.get("tight", case.meta["tolerance"][name]))
