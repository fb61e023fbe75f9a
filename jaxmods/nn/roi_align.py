"""RoIAlign to one vector per box, as two small matrix products.

The semantics are those of torchvision's `roi_align(output 1x1, sampling_ratio=-1, aligned=True)`.
Samples form a grid, and the bilinear weight of a sample is a product of one factor per axis, so
the mean over the grid is `a_y^T F a_x` with one averaged hat function per axis: no gathers, and
every shape static although the number of samples depends on the box.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def roi_weights(boxes: jax.Array, size: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    """Weights of rows and columns of a feature map for boxes.

    Args:
      boxes: float32 [..., 4], (x1, y1, x2, y2) in feature-map cells (cell i spans i..i+1).
      size: (rows, columns) of the map. Boxes may be up to twice as long as the map.

    Returns:
      (a_y [..., rows], a_x [..., columns]) in float32. A box without height or width gives zeros
      in that axis, hence a zero feature. No gradient flows to the boxes.
    """
    x1, y1, x2, y2 = (boxes.astype(jnp.float32)[..., i] - 0.5 for i in range(4))
    a_y = _axis_weights(y1, y2 - y1, size[0])
    a_x = _axis_weights(x1, x2 - x1, size[1])
    return jax.lax.stop_gradient(a_y), jax.lax.stop_gradient(a_x)


def _axis_weights(start: jax.Array, length: jax.Array, cells: int) -> jax.Array:
    """[...] -> [..., cells]: mean over the box's samples of the hat functions of the cells."""
    count = jnp.ceil(length)
    grid = jnp.maximum(count, 1.0)[..., None]
    i = jnp.arange(2 * cells, dtype=jnp.float32)
    at = start[..., None] + (i + 0.5) * length[..., None] / grid
    used = (i < count[..., None]) & (at >= -1.0) & (at <= cells)
    at = jnp.clip(at, 0.0, cells - 1.0)
    hat = jnp.maximum(1.0 - jnp.abs(at[..., None] - jnp.arange(cells, dtype=jnp.float32)), 0.0)
    total = jnp.sum(jnp.where(used[..., None], hat, 0.0), axis=-2)
    return total / grid


def roi_align(features: jax.Array, boxes: jax.Array) -> jax.Array:
    """Mean bilinear sample of each box.

    Args:
      features: [B, rows, columns, C], any float dtype.
      boxes: [B, N, 4], (x1, y1, x2, y2) in feature-map cells.

    Returns:
      float32 [B, N, C].
    """
    batch, rows, columns, channels = features.shape
    a_y, a_x = roi_weights(boxes, (rows, columns))
    weights = (a_y[..., :, None] * a_x[..., None, :]).reshape(batch, -1, rows * columns)
    return pool(features.reshape(batch, rows * columns, channels), weights)


def pool(tokens: jax.Array, weights: jax.Array) -> jax.Array:
    """Weighted sums of tokens in float32: [B, T, C] and [B, N, T] -> [B, N, C]."""
    return jnp.einsum(
        "bnt,btc->bnc",
        weights,
        tokens.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
