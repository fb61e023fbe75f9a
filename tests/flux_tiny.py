"""A tiny FLUX transformer, its inputs and random parameters, for the tests of it."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmods import partitioning
from jaxmods.backbones.flux import (
    FluxConfig,
    FluxTransformer,
    Rope,
    Tokens,
    grid_ids,
    text_ids,
)

TINY = FluxConfig(
    in_channels=8,
    out_channels=8,
    double_layers=2,
    single_layers=3,
    heads=4,
    head_dim=8,
    text_width=16,
    pooled_width=8,
    rope_axes=(4, 2, 2),
)
GRID, TEXT, BATCH = (2, 4), 6, 8
MODEL = FluxTransformer(TINY)


def apply(
    params: Any, batch: Any, model: FluxTransformer = MODEL, rope: Rope | None = None
) -> jax.Array:
    """The whole model on a batch of `batch_of`."""
    return model.apply(
        {"params": params},
        [
            Tokens(batch["noise"], grid_ids(*GRID)),
            Tokens(batch["condition"], grid_ids(*GRID, label=1)),
        ],
        Tokens(batch["text"], text_ids(TEXT)),
        batch["pooled"],
        batch["time"],
        batch["guidance"],
        rope=rope,
    )


def batch_of(config: FluxConfig = TINY, size: int = BATCH) -> dict[str, np.ndarray]:
    """Random inputs: tokens of noise, condition and text, and what modulates."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=(size, *shape)).astype(np.float32)

    return {
        "noise": normal(math.prod(GRID), config.in_channels),
        "condition": normal(math.prod(GRID), config.in_channels),
        "text": normal(TEXT, config.text_width),
        "pooled": normal(config.pooled_width),
        "time": rng.random(size).astype(np.float32),
        "guidance": (1 + 3 * rng.random(size)).astype(np.float32),
    }


def boxed(config: FluxConfig) -> Any:
    """Abstract parameters with logical axes."""
    model = FluxTransformer(config)
    batch = batch_of(config, 1)

    def init(rng: jax.Array) -> Any:
        return model.init(rng, batch, method=call)["params"]

    return jax.eval_shape(init, jax.random.key(0))


def call(model: FluxTransformer, batch: Any) -> jax.Array:
    """The noise's tokens alone, as a method of the module."""
    return model(
        Tokens(batch["noise"], grid_ids(*GRID)),
        Tokens(batch["text"], text_ids(TEXT)),
        batch["pooled"],
        batch["time"],
        batch["guidance"] if model.config.guidance else None,
    )


@functools.cache
def params_of(config: FluxConfig = TINY) -> Any:
    """Random everywhere: freshly initialised, every block is the identity."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32),
        partitioning.unbox(boxed(config)),
    )
