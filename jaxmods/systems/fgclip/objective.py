"""FG-CLIP's four losses (section 3 of the paper; `FGCLIPModel.forward` of the official code).

    L = w_long L_long + w_short L_short + w_region L_region + w_hard L_hard

long, short: InfoNCE of images and texts over the global batch, both with exp(logit_scale).
region: InfoNCE of boxes and phrases within each of W slices of the batch.
hard: cross-entropy of a box against its phrase and the phrase's hard negatives.

Shape legend:
  B images   N boxes per image   g images per pack group   K hard boxes per pack group
  M negatives per hard box   P embedding width   W slices of the "local" losses
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


def normalise(features: jax.Array, valid: jax.Array | None = None) -> jax.Array:
    """Unit vectors along the last axis, in float32.

    Rows that are zero, or not `valid`, become zero vectors with zero gradient (the official code
    divides 0 by 0 and drops the rows later; a NaN would leak into gradients here).

    Args:
      features: [..., P]. valid: bool [...], None for all.
    """
    x = features.astype(jnp.float32)
    if valid is not None:
        x = jnp.where(valid[..., None], x, 0.0)
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return jnp.where(square > 0, x / jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)


class HardLoss(NamedTuple):
    """Loss and accuracy (scalars, float32)."""

    loss: jax.Array
    accuracy: jax.Array


def hard_negative_loss(
    boxes: jax.Array,
    texts: jax.Array,
    scale: jax.Array,
    text_exists: jax.Array,
    valid: jax.Array,
) -> HardLoss:
    """-log softmax_j(scale <v, t_j>)[0], a mean over each slice's boxes, then over slices.

    Args:
      boxes: unit vectors [W, n, P]. texts: unit vectors [W, n, 1 + M, P], entry 0 is positive.
      scale: scalar. text_exists: bool [W, n, 1 + M]. valid: bool [W, n]; a slice without valid
        boxes counts as 0.
    """
    logits = scale * jnp.einsum("wnp,wnmp->wnm", boxes, texts, precision=jax.lax.Precision.HIGHEST)
    exists = text_exists | (jnp.arange(logits.shape[-1]) == 0)
    logits = jnp.where(exists, logits, jnp.finfo(jnp.float32).min)
    each = jax.nn.logsumexp(logits, axis=-1) - logits[..., 0]
    hit = logits[..., 0] >= jnp.max(logits, axis=-1)
    count = jnp.maximum(jnp.sum(valid, axis=1), 1)
    loss = jnp.sum(jnp.where(valid, each, 0.0), axis=1) / count
    total = jnp.maximum(jnp.sum(valid), 1)
    return HardLoss(jnp.mean(loss), jnp.sum(valid & hit) / total)
