"""Rotary positions of FLUX: every token has a few positions, each turns its part of a head.

Angles are position * theta^(-2 j / n) for the j-th pair of an axis with n channels. They are taken
in float64 on the host and rounded once, as in the official code: in float32 the angle of position
100 is off by 1e-5, which shows in the output. So positions are NumPy arrays, known when a program
is traced; for positions that come with the data, make the tables on the host and pass them in.

Shape legend: B batch   H heads   S tokens   D head width   A axes
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Rope(NamedTuple):
    """Tables for `apply_rope`: float32 [S, D], or [B, 1, S, D] for one per example.

    Attributes:
      cos: of the angle, the same for both channels of a pair.
      sin: of the angle, negative for the first channel of a pair.
    """

    cos: np.ndarray | jax.Array
    sin: np.ndarray | jax.Array


def rope_table(ids: np.ndarray, axes: tuple[int, ...], theta: float = 10000.0) -> Rope:
    """Tables for tokens at `ids`.

    Args:
      ids: [..., S, A] positions, any real numbers; read as float32, as the official code does.
      axes: channels of each axis, even.
      theta: longest wavelength.

    Returns:
      NumPy float32 tables [..., S, sum of axes].

    Raises:
      ValueError: positions that are not known when the program is traced, or another number of
        them than axes.
    """
    if isinstance(ids, jax.core.Tracer):
        raise ValueError(
            "rope: expected position ids as a NumPy array, found a traced value; positions that "
            "change from call to call need tables made on the host (rope_table) and given as `rope`"
        )
    ids = np.asarray(ids, np.float32)
    if ids.ndim < 2 or ids.shape[-1] != len(axes):
        raise ValueError(f"rope: expected ids [S, {len(axes)}], found {list(ids.shape)}")
    cos, sin = [], []
    for axis, channels in enumerate(axes):
        frequencies = 1.0 / theta ** (np.arange(0, channels, 2, dtype=np.float64) / channels)
        angles = ids[..., axis, None].astype(np.float64) * frequencies
        cos.append(np.repeat(np.cos(angles), 2, axis=-1))
        turned = np.sin(angles)
        sin.append(np.stack([-turned, turned], axis=-1).reshape(*turned.shape[:-1], channels))
    return Rope(
        np.concatenate(cos, axis=-1).astype(np.float32),
        np.concatenate(sin, axis=-1).astype(np.float32),
    )


def apply_rope(x_BHSD: jax.Array, rope: Rope) -> jax.Array:
    """Turn each pair of adjacent channels by its angle, in float32: (a, b) ->
    (a cos - b sin, b cos + a sin).

    Args:
      x_BHSD: queries or keys, any float dtype.

    Returns:
      The same shape and dtype.
    """
    wide = x_BHSD.astype(jnp.float32)
    first = np.arange(x_BHSD.shape[-1]) % 2 == 0
    other = jnp.where(first, jnp.roll(wide, -1, axis=-1), jnp.roll(wide, 1, axis=-1))
    return (wide * rope.cos + other * rope.sin).astype(x_BHSD.dtype)
