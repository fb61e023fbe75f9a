"""Resizing of learned position tables."""

from __future__ import annotations

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
