"""Features of scalars, and resizing of learned position tables."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

_A = -0.75  # the cubic kernel of PyTorch and OpenCV; jax.image uses -0.5


def cubic_matrix(source: int, target: int) -> np.ndarray:
    """Matrix [target, source] of a bicubic resize of one axis.

    Kernel a = -0.75, half-pixel centres, edge values repeated, no antialiasing: what
    `torch.nn.functional.interpolate(mode="bicubic", align_corners=False)` does.
    """
    centre = (np.arange(target, dtype=np.float64) + 0.5) * (source / target) - 0.5
    low = np.floor(centre).astype(np.int64)
    matrix = np.zeros((target, source))
    for tap in range(-1, 3):
        distance = np.abs(centre - (low + tap))
        inner = ((_A + 2) * distance - (_A + 3)) * distance**2 + 1
        outer = ((_A * distance - 5 * _A) * distance + 8 * _A) * distance - 4 * _A
        weight = np.where(distance <= 1, inner, np.where(distance < 2, outer, 0.0))
        np.add.at(matrix, (np.arange(target), np.clip(low + tap, 0, source - 1)), weight)
    return matrix


def resize_grid(grid: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Bicubic resize of a grid of vectors (see `cubic_matrix`).

    Args:
      grid: [rows, columns, D]. size: wanted (rows, columns).

    Returns:
      float32 [size[0], size[1], D].
    """
    rows = jnp.asarray(cubic_matrix(grid.shape[0], size[0]), jnp.float32)
    columns = jnp.asarray(cubic_matrix(grid.shape[1], size[1]), jnp.float32)
    return jnp.einsum(
        "rR,cC,RCD->rcD",
        rows,
        columns,
        grid.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )


def sincos_grid(side: int, width: int, max_period: float = 100.0) -> np.ndarray:
    """Sines and cosines of row and column of each place of a square, a table that a transformer
    can tell places apart by from its first step (He et al. 2022, arXiv 2111.06377, appendix A.1).

    The first half of a vector tells the row, the second the column, each as sines and then cosines
    at K = width / 4 frequencies max_period^(-k / K). The mean over the places is taken out: what a
    table adds to every place alike tells nothing.

    Args:
      side: places per side. width: a multiple of 4.

    Returns:
      float32 [side * side, width], row by row.

    Raises:
      ValueError: another width.
    """
    if width % 4:
        raise ValueError(f"sincos_grid: expected a width that is a multiple of 4, found {width}")
    count = width // 4
    angles = np.arange(side)[:, None] / max_period ** (np.arange(count) / count)
    axis = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    shape = (side, side, width // 2)
    table = np.concatenate(
        [np.broadcast_to(axis[:, None], shape), np.broadcast_to(axis[None], shape)], axis=-1
    ).reshape(side * side, width)
    return (table - table.mean(axis=0)).astype(np.float32)


def sinusoid(values: jax.Array, width: int, max_period: float = 10000.0) -> jax.Array:
    """Cosines and sines of `values` at falling frequencies, cosines first (Ho et al. 2020, arXiv
    2006.11239; diffusers' `Timesteps(flip_sin_to_cos=True, downscale_freq_shift=0)`).

    Frequency k of K = width / 2 is exp(-ln(max_period) k / K). Values reach 1000 and more, so that
    one unit in the last place of a frequency shows in the fourth digit of the result: frequencies
    are a constant of the program, with the exponent rounded to float32 as in the reference.

    Args:
      values: [B], taken as float32.
      width: even.

    Returns:
      float32 [B, width].
    """
    half = width // 2
    exponent = np.float32(-math.log(max_period)) * np.arange(half, dtype=np.float32)
    frequencies = np.exp((exponent / np.float32(half)).astype(np.float64)).astype(np.float32)
    angles = values.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
