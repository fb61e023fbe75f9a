"""Keys and values kept from earlier tokens, and attention over them.

A layer of a decoder never writes a cache. It attends to the tokens at hand and to what is kept
(`Past`), and returns the keys and values of the tokens at hand (`KV`); when all layers have run,
`Decoding.write` puts them into the slots of every row at once. So a stack of layers can be scanned
with its cache as an input, several stacks can share one state (their caches are one tree), and the
buffers are updated in place.

Rows are ragged: row b holds `lengths[b]` tokens in slots 0..lengths[b]-1, without gaps, and every
later slot is hidden, whatever it holds (keys of padding, mostly).

Shape legend:
  B batch   H query heads   K key/value heads (K divides H)   G = H / K   D head width
  T tokens at hand   C slots of a cache   L layers
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxmods.nn.attention import Implementation, attention
from jaxmods.partitioning import constrain

_ROWS, _SLOTS = -4, -2  # axes of keys and values, with or without a leading axis of layers


class KV(NamedTuple):
    """Keys and values [(L,) B, K, C, D]: of one layer, or stacked over layers."""

    k: jax.Array
    v: jax.Array


class Past(NamedTuple):
    """Earlier tokens that one layer attends to.

    Attributes:
      kv: [B, K, C, D]; or [1, K, C, D], the same for all rows and held once.
      lengths: int32 [B] or [1], how many slots of each row are visible.
    """

    kv: KV
    lengths: jax.Array


def attend(
    q_BHTD: jax.Array,
    fresh: KV,
    past: Sequence[Past] = (),
    *,
    implementation: Implementation = "auto",
) -> jax.Array:
    """Causal attention of the tokens at hand over `past` and over each other.

    Scores and softmax are in float32 and scaled by D^-0.5. Without `past` this is
    `jaxmods.nn.attention.attention` with causal=True; with it, plain products: every part of the
    keys is read where it lies, nothing is put together or repeated.

    Args:
      q_BHTD: queries. fresh: keys and values [B, K, T, D] of the same tokens. Tokens after the end
        of a row (on the right) are seen by none before them.
      past: the parts, in any order.

    Returns:
      [B, H, T, D] in the dtype of `fresh.v`.
    """
    if not past:
        return attention(q_BHTD, *fresh, causal=True, implementation=implementation)
    batch, heads, tokens, width = q_BHTD.shape
    kv_heads = fresh.k.shape[1]
    grouped = q_BHTD * jnp.asarray(width**-0.5, q_BHTD.dtype)
    grouped = grouped.reshape(batch, kv_heads, heads // kv_heads, tokens, width)
    parts = [part.kv for part in past] + [fresh]
    seen = [_filled(part) for part in past] + [_lower_triangle(tokens)]
    with jax.named_scope("attention"):
        scores = [
            jnp.where(visible, _scores(grouped, kv.k), jnp.finfo(jnp.float32).min)
            for kv, visible in zip(parts, seen, strict=True)
        ]
        weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1)
        ends = np.cumsum([s.shape[-1] for s in scores])[:-1]
        split = jnp.split(weights, ends, axis=-1)
        mixed = sum(_mixed(w, kv.v) for w, kv in zip(split, parts, strict=True))
    return jnp.asarray(mixed).astype(fresh.v.dtype).reshape(q_BHTD.shape)


def _filled(part: Past) -> jax.Array:
    """[B or 1, 1, 1, 1, C], True in the slots that hold a token."""
    slots = jnp.arange(part.kv.k.shape[_SLOTS])
    return (slots < part.lengths[:, None])[:, None, None, None]


def _lower_triangle(tokens: int) -> jax.Array:
    return jnp.tril(jnp.ones((tokens, tokens), bool))


def _scores(q_BKGTD: jax.Array, k: jax.Array) -> jax.Array:
    """float32 [B, K, G, T, C]; the keys of a part that all rows share are read once."""
    dtype = jnp.promote_types(q_BKGTD.dtype, k.dtype)
    q, k = q_BKGTD.astype(dtype), k.astype(dtype)
    if k.shape[0] == 1:
        return jnp.einsum("BKGTD,KCD->BKGTC", q, k[0], preferred_element_type=jnp.float32)
    return jnp.einsum("BKGTD,BKCD->BKGTC", q, k, preferred_element_type=jnp.float32)


def _mixed(weights: jax.Array, v: jax.Array) -> jax.Array:
    """float32 [B, K, G, T, D]: weights (float32, rounded to the dtype of v) times values."""
    weights = weights.astype(v.dtype)
    if v.shape[0] == 1:
        return jnp.einsum("BKGTC,KCD->BKGTD", weights, v[0], preferred_element_type=jnp.float32)
    return jnp.einsum("BKGTC,BKCD->BKGTD", weights, v, preferred_element_type=jnp.float32)


@flax.struct.dataclass
class Prefix:
    """What all rows have read already, held once (see `Decoding.as_prefix`).

    Attributes:
      cache: tree of `KV` with batch 1.
      lengths: int32 [1], filled slots. positions: int32 [1], rotary position of the next token.
    """

    cache: Any
    lengths: jax.Array
    positions: jax.Array


@flax.struct.dataclass
class Decoding:
    """State of a batch that is being continued token by token.

    Attributes:
      cache: tree whose leaves are keys or values [(L,) B, K, C, D]: one `KV` stacked over layers, a
        tuple of `KV` (one per layer), or any tree of these (a model with several stacks of layers).
      lengths: int32 [B], filled slots of each row.
      positions: int32 [B], rotary position of each row's next token.
      prefix: what all rows have read before, or None; its cache is a tree of the same form.
    """

    cache: Any
    lengths: jax.Array
    positions: jax.Array
    prefix: Prefix | None = None

    @property
    def capacity(self) -> int:
        """Slots of a row."""
        return int(jax.tree.leaves(self.cache)[0].shape[_SLOTS])

    def write(self, fresh: Any, counts: jax.Array) -> Decoding:
        """The state after tokens have been read.

        Args:
          fresh: tree like `cache` of the keys and values [(L,) B, K, T, D] of T tokens.
          counts: int32 [B], how many of the T tokens each row has; the first ones. What lies
            beyond the capacity is not kept (see `require_room`).
        """

        def put(kept: jax.Array, new: jax.Array) -> jax.Array:
            def row(kept: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
                at = start + jnp.arange(new.shape[_SLOTS])
                return kept.at[..., at, :].set(new.astype(kept.dtype), mode="drop")

            axis = kept.ndim + _ROWS
            return _pinned(jax.vmap(row, (axis, axis, 0), axis)(kept, new, self.lengths))

        return dataclasses.replace(
            self,
            cache=jax.tree.map(put, self.cache, fresh),
            lengths=self.lengths + counts,
            positions=self.positions + counts,
        )

    def take_rows(self, rows: jax.Array) -> Decoding:
        """Rows `rows` (int [N]) in that order; a row may be taken several times, or not at all."""
        return dataclasses.replace(
            self,
            cache=jax.tree.map(lambda x: _pinned(jnp.take(x, rows, axis=_ROWS)), self.cache),
            lengths=self.lengths[rows],
            positions=self.positions[rows],
        )

    def as_prefix(self) -> Prefix:
        """What was read so far, to be continued in many ways.

        Raises:
          ValueError: a batch of more than one row, or one that has a prefix itself.
        """
        if self.lengths.shape != (1,) or self.prefix is not None:
            raise ValueError(
                f"as_prefix: expected one row without a prefix, found {self.lengths.shape[0]} "
                f"row(s) {'with' if self.prefix is not None else 'without'} one"
            )
        return Prefix(self.cache, self.lengths, self.positions)


def start(
    fresh: Any,
    counts: jax.Array,
    positions: jax.Array,
    capacity: int,
    dtype: Any = None,
    prefix: Prefix | None = None,
) -> Decoding:
    """The state after a first pass over the prompts.

    Args:
      fresh: tree of the keys and values [(L,) B, K, T, D] of the prompts, padded on the right.
      counts: int32 [B], length of each prompt.
      positions: int32 [B], rotary position of the token after each prompt.
      capacity: slots per row, for prompts and what follows. dtype: of the cache; None keeps it.

    Raises:
      ValueError: prompts that are longer than the capacity.
    """
    tokens = jax.tree.leaves(fresh)[0].shape[_SLOTS]
    if tokens > capacity:
        raise ValueError(
            f"cache: expected prompts of at most {capacity} tokens, found {tokens}; cut the "
            "prompts or give a larger capacity"
        )

    def kept(x: jax.Array) -> jax.Array:
        pad = [(0, 0)] * x.ndim
        pad[_SLOTS] = (0, capacity - tokens)
        return _pinned(jnp.pad(x if dtype is None else x.astype(dtype), pad))

    return Decoding(jax.tree.map(kept, fresh), counts, positions, prefix)


def require_room(lengths: Any, new_tokens: int, capacity: int) -> None:
    """Checks on the host that every prompt and what is generated after it fit.

    Args:
      lengths: int [B], the true lengths of the prompts (without a shared prefix).
      new_tokens: at most so many follow. capacity: slots per row.

    Raises:
      ValueError: an empty prompt, or one that leaves too few slots; names the rows.
    """
    lengths = np.asarray(lengths)
    if empty := np.flatnonzero(lengths < 1).tolist():
        raise ValueError(f"prompts: expected at least one token each, found none in row(s) {empty}")
    if long := np.flatnonzero(lengths + new_tokens > capacity).tolist():
        raise ValueError(
            f"prompts: expected at most {capacity - new_tokens} tokens (capacity {capacity} less "
            f"{new_tokens} new ones), found {lengths[long].tolist()} in row(s) {long}; cut the "
            "prompts, allow fewer new tokens, or give a larger capacity"
        )


def _pinned(x: jax.Array) -> jax.Array:
    layers: tuple[None, ...] = (None,) * (x.ndim + _ROWS)
    return constrain(x, (*layers, "batch", "heads", None, None))
