"""The smallest RefTON there is, with every component: pictures of 32 x 24 px, 48 tokens each."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmods.backbones.autoencoder_kl import AutoencoderConfig
from jaxmods.backbones.clip import TextConfig
from jaxmods.backbones.flux import FluxConfig
from jaxmods.backbones.t5.model import T5Config
from jaxmods.partitioning import unbox
from jaxmods.system import ArraySpec, Params
from jaxmods.systems.flux.base import FluxBase, TextEncoders
from jaxmods.systems.flux.sample import Sampling
from jaxmods.systems.refton.system import Adapters, RefTon

BASE = FluxBase(
    transformer=FluxConfig(
        in_channels=16,
        out_channels=16,
        double_layers=1,
        single_layers=2,
        heads=2,
        head_dim=16,
        text_width=24,
        pooled_width=16,
        rope_axes=(4, 6, 6),
    ),
    vae=AutoencoderConfig(channels=(4, 8), resnets=1, latent_channels=4, groups=4, sample_size=32),
    encoders=TextEncoders(
        TextConfig(
            width=16,
            layers=1,
            heads=2,
            mlp=32,
            vocab_size=50,
            context_short=7,
            bos_id=48,
            eos_id=49,
            pad_id=49,
            pool="highest",
        ),
        T5Config(vocab_size=40, width=24, layers=1, heads=2, head_dim=8, mlp=32),
    ),
    text_length=5,
)
SYSTEM = RefTon(
    base=BASE,
    height=32,
    width=24,
    cond_scale=2,
    adapters=Adapters(rank=2, alpha=4.0),
    sampling=Sampling(steps=3, guidance=2.5),
)
PLAIN = dataclasses.replace(SYSTEM, base=dataclasses.replace(BASE, encoders=None))


def random_params(system: RefTon, seed: int = 0) -> Params:
    """Parameters of which none is zero, so that every path matters."""
    shapes = unbox(jax.eval_shape(system.init, jax.random.key(0)))
    rng = np.random.default_rng(seed)

    def draw(path: tuple[Any, ...], leaf: Any) -> jax.Array:
        values = 0.1 * rng.standard_normal(leaf.shape)
        return jnp.asarray(values + (path[-1].key == "scale"), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def random_arrays(spec: dict[str, ArraySpec], seed: int = 0) -> dict[str, jax.Array]:
    """Arrays of these shapes; flags are True and False in turn."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for name, array in spec.items():
        if array.dtype == "bool":
            value = np.arange(array.shape[0]) % 2 == 0
        elif array.dtype == "bfloat16":
            value = rng.standard_normal(array.shape)
        else:
            value = rng.integers(0, 256, array.shape)
        arrays[name] = jnp.asarray(value, array.dtype)
    return arrays
