"""Negative-sampling losses over scores: one true answer against sampled wrong ones."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class NegativeSamplingLoss:
    """Scalars, fp32: `loss = (positive + negative) / 2`."""

    loss: jax.Array
    positive: jax.Array
    negative: jax.Array


def negative_sampling_loss(
    positive_B: jax.Array,
    negative_BN: jax.Array,
    weight_B: jax.Array,
    temperature: float | None,
    mask_BN: jax.Array | None = None,
    total: jax.Array | None = None,
) -> NegativeSamplingLoss:
    """Log-sigmoid loss with self-adversarial weights (RotatE, arXiv 1902.10197, equation 6).

        positive = - sum_b w_b log s(p_b) / sum_b w_b
        negative = - sum_b w_b sum_j a_bj log s(-n_bj) / sum_b w_b,  a_b = softmax(t n_b), constant

    The sums over the batch are global: under a sharded batch they are reduced before dividing.

    Args:
      positive_B, negative_BN: scores, larger is better.
      weight_B: importance of each example (sub-sampling weights, or ones; 0 leaves it out).
      temperature: t; None gives every negative the same weight (the mean).
      mask_BN: bool, which negatives count; None for all.
      total: sum of the weights of a larger batch of which this is a part, so that the losses of all
        parts add up to that of the batch; None for the sum of `weight_B`.
    """
    positive_B, negative_BN = positive_B.astype(jnp.float32), negative_BN.astype(jnp.float32)
    weight_B = weight_B.astype(jnp.float32)
    logits = jnp.zeros_like(negative_BN) if temperature is None else negative_BN * temperature
    if mask_BN is not None:
        logits = jnp.where(mask_BN, logits, -1e30)
    share_BN = jax.lax.stop_gradient(jax.nn.softmax(logits, axis=-1))
    negative = jnp.sum(share_BN * jax.nn.log_sigmoid(-negative_BN), axis=-1)
    positive = jax.nn.log_sigmoid(positive_B)
    total = jnp.sum(weight_B) if total is None else total
    positive_loss = -jnp.sum(weight_B * positive) / total
    negative_loss = -jnp.sum(weight_B * negative) / total
    return NegativeSamplingLoss((positive_loss + negative_loss) / 2, positive_loss, negative_loss)
