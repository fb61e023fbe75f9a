"""The choice of the next token from its logits.

Shape legend:  B rows   V vocabulary
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn. The steps apply in this order.

    Attributes:
      temperature: divides the logits; 0 takes the greatest (the first of equals), and the rest
        must then be None.
      top_k: keep the k greatest, and those equal to the least of them.
      top_p: of what is left keep the most probable until their probabilities add up to at least p,
        in (0, 1].
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"Sampling.temperature: expected 0 or more, found {self.temperature}")
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            raise ValueError(
                f"Sampling: temperature 0 takes the greatest logit; found top_k={self.top_k} and "
                f"top_p={self.top_p} beside it; give a temperature above 0"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"Sampling.top_k: expected at least 1, found {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"Sampling.top_p: expected in (0, 1], found {self.top_p}")


GREEDY = Sampling()


def filtered(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """float32 logits of the distribution to draw from, -inf for what is cut off.

    Args:
      logits_BV: [B, V]. sampling: with a temperature above 0.
    """
    logits = logits_BV.astype(jnp.float32) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.top_p is not None and sampling.top_p < 1:
        order = jnp.argsort(logits, axis=-1, descending=True, stable=True)
        probabilities = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        rank = jnp.argsort(order, axis=-1)
        kept = jnp.take_along_axis(before < sampling.top_p, rank, axis=-1)
        logits = jnp.where(kept, logits, -jnp.inf)
    return logits


def choose(logits_BV: jax.Array, keys: jax.Array | None, sampling: Sampling) -> jax.Array:
    """One token per row: int32 [B].

    Args:
      keys: one random key per row, [B]; a row's token depends on its own logits and key only.
        None only for temperature 0.

    Raises:
      ValueError: no keys where there is something to draw.
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    if keys is None:
        raise ValueError(f"choose: expected keys [B] for {sampling}, found None")
    drawn = jax.vmap(jax.random.categorical)(keys, filtered(logits_BV, sampling))
    return drawn.astype(jnp.int32)
