"""Rotary positions of the Llama family (Su et al. 2021, arXiv 2104.09864), half-split layout.

Channel j of a head and channel j + D/2 are a pair, turned by position * theta^(-2 j / D). With
positions of three numbers (M-RoPE, Qwen2-VL, arXiv 2409.12191, section 2.1) each pair takes one of
the three.

Shape legend: B batch   H heads   T tokens   D head width
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmods.backbones.llama.config import LlamaConfig


class Rope(NamedTuple):
    """Cosines and sines of a batch of tokens: float32 [B or 1, T, D/2] each."""

    cos: jax.Array
    sin: jax.Array


def frequencies(config: LlamaConfig) -> np.ndarray:
    """Angle per position of every pair of channels: float32 [D/2]."""
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    plain = config.rope_theta**-exponent
    scaling = config.rope_scaling
    if scaling is None:
        scaled = plain
    elif scaling.kind == "linear":
        scaled = plain / scaling.factor
    else:
        turns = scaling.original_length * plain / (2 * math.pi)  # within the original length
        kept = np.clip((turns - scaling.low) / (scaling.high - scaling.low), 0.0, 1.0)
        scaled = kept * plain + (1.0 - kept) * plain / scaling.factor
    return scaled.astype(np.float32)


def rope_of(positions: jax.Array, config: LlamaConfig) -> Rope:
    """Tables for tokens at `positions`.

    Args:
      positions: int [B or 1, T]; or [3, B or 1, T] where the config has `rope_sections` (without
        the leading axis, all three are the same).

    Raises:
      ValueError: positions of another rank, or of three numbers without `rope_sections`.
    """
    sections = config.rope_sections
    if positions.ndim not in (2, 3) or (positions.ndim == 3 and positions.shape[0] != 3):
        raise ValueError(f"rope: expected positions [B, T] or [3, B, T], found {positions.shape}")
    if positions.ndim == 3:
        if sections is None:
            raise ValueError(
                "rope: positions of three numbers need LlamaConfig.rope_sections, found None"
            )
        of_pair = np.repeat(np.arange(3), sections)
        values = jnp.moveaxis(positions.astype(jnp.float32)[of_pair], 0, -1)
    else:
        values = positions.astype(jnp.float32)[..., None]
    angles = values * frequencies(config)
    return Rope(jnp.cos(angles), jnp.sin(angles))


def turn(x_BHTD: jax.Array, rope: Rope) -> jax.Array:
    """The heads turned to their positions, in float32: [B, H, T, D] -> the same, dtype of x."""
    cos, sin = (table[:, None] for table in rope)
    first, second = jnp.split(x_BHTD.astype(jnp.float32), 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x_BHTD.dtype)
