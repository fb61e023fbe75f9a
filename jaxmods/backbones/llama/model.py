"""The decoder of the Llama family: Llama 2 (Touvron et al. 2023, arXiv 2307.09288), Llama 3
(arXiv 2407.21783), Vicuna, Qwen2 (arXiv 2407.10671), as transformers' LlamaForCausalLM and
Qwen2ForCausalLM. Published sizes: `jaxmods.backbones.llama.config`.

Shape legend:
  B batch   T tokens   D width   H query heads   K key/value heads   V vocabulary   L layers

The pieces, from small to large, each usable alone:

  DecoderLayer      one layer: `__call__` on whole texts, `cached` after kept tokens
  run_layers        a group of layers on whole texts
  run_cached        a group of layers after kept tokens
  Llama             embedding, layers, final norm, head; prefill and continuation

A model that puts layers of its own between these (IAA) calls the two functions for its groups, in
its order, with one `Context`; its caches are then one tree in one `Decoding`.

The parameters of a group of layers are either one tree with a leading layer axis (then the group is
scanned) or a tuple of trees (then it is written out). `jaxmods.nn.stack.unstack` makes the second
of the first; where a program reads its parameters over and over, as in decoding on a CPU, it saves
a copy per layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from jaxmods.backbones.llama.config import LlamaConfig
from jaxmods.backbones.llama.rope import Rope, rope_of, turn
from jaxmods.nn.attention import Implementation, attention
from jaxmods.nn.kv_cache import KV, Decoding, Past, Prefix, attend, start
from jaxmods.nn.layers import Linear, RMSNorm, boxed
from jaxmods.nn.stack import Execution, run, stacked_param
from jaxmods.partitioning import constrain

_PLAIN = Execution()


@flax.struct.dataclass
class Context:
    """What all layers of one pass share, whoever owns them.

    Attributes:
      rope: tables of the tokens' positions.
      segments: int [B, T], a token sees only earlier ones of its own segment; None: all earlier
        ones. Only for whole texts.
    """

    rope: Rope
    segments: jax.Array | None = None


class DecoderLayer(nn.Module):
    """h = x + o(attention(q, k, v of norm1 x)); h + down(silu(gate norm2 h) * up norm2 h)."""

    config: LlamaConfig
    implementation: Implementation = "auto"

    def setup(self) -> None:
        c = self.config
        normal = nn.initializers.normal(c.initializer_range)

        def linear(features: int, axes: tuple[str, str], bias: bool = False) -> Linear:
            return Linear(features, axes, use_bias=bias, kernel_init=normal)

        self.norm1 = RMSNorm(c.epsilon)
        self.q = linear(c.heads * c.head_dim, ("embed", "heads"), c.qkv_bias)
        self.k = linear(c.kv_heads * c.head_dim, ("embed", "heads"), c.qkv_bias)
        self.v = linear(c.kv_heads * c.head_dim, ("embed", "heads"), c.qkv_bias)
        self.o = linear(c.width, ("heads", "embed"))
        self.norm2 = RMSNorm(c.epsilon)
        self.gate = linear(c.mlp, ("embed", "mlp"))
        self.up = linear(c.mlp, ("embed", "mlp"))
        self.down = linear(c.width, ("mlp", "embed"))

    def __call__(self, x_BTD: jax.Array, context: Context) -> jax.Array:
        """Whole texts: [B, T, D] -> [B, T, D]."""
        q, fresh = self._heads(x_BTD, context)
        segments = context.segments
        mixed = attention(
            q,
            *fresh,
            causal=True,
            q_segments=segments,
            kv_segments=segments,
            implementation=self.implementation,
        )
        return self._rest(x_BTD, mixed)

    def cached(
        self, x_BTD: jax.Array, context: Context, past: Sequence[Past] = ()
    ) -> tuple[jax.Array, KV]:
        """Tokens that follow what is kept.

        Args:
          x_BTD: their activations, padded on the right. context: their positions; no segments.
          past: what this layer kept of earlier tokens; empty for the first pass.

        Returns:
          ([B, T, D], keys and values [B, K, T, D] of these tokens).
        """
        q, fresh = self._heads(x_BTD, context)
        mixed = attend(q, fresh, past, implementation=self.implementation)
        return self._rest(x_BTD, mixed), fresh

    def _heads(self, x_BTD: jax.Array, context: Context) -> tuple[jax.Array, KV]:
        """Queries, keys (both turned) and values, heads first."""
        c = self.config

        def heads_first(x: jax.Array, heads: int) -> jax.Array:
            split = x.reshape(*x.shape[:2], heads, c.head_dim).transpose(0, 2, 1, 3)
            return constrain(split, ("batch", "heads", None, None))

        y = self.norm1(x_BTD)
        q = turn(heads_first(self.q(y), c.heads), context.rope)
        k = turn(heads_first(self.k(y), c.kv_heads), context.rope)
        return q, KV(k, heads_first(self.v(y), c.kv_heads))

    def _rest(self, x_BTD: jax.Array, mixed_BHTD: jax.Array) -> jax.Array:
        mixed = mixed_BHTD.transpose(0, 2, 1, 3).reshape(*x_BTD.shape[:2], -1)
        x_BTD = x_BTD + self.o(mixed)
        y = self.norm2(x_BTD)
        hidden = jax.nn.silu(self.gate(y)) * self.up(y)
        return constrain(x_BTD + self.down(hidden), ("batch", "seq", None))


def layers_param(module: nn.Module, name: str, config: LlamaConfig, layers: int) -> Any:
    """Parameters of `layers` decoder layers, held by `module` under `name`; to be called in its
    `setup`. What is found there may be stacked or a tuple of trees (see the module docstring)."""
    template = DecoderLayer(config, parent=None)
    sample = jnp.zeros((1, 1, config.width))
    context = Context(rope_of(jnp.zeros((1, 1), jnp.int32), config))
    return stacked_param(
        module, name, lambda rng: template.init(rng, sample, context)["params"], layers
    )


def run_layers(
    layers: Any,
    x_BTD: jax.Array,
    context: Context,
    config: LlamaConfig,
    execution: Execution = _PLAIN,
) -> jax.Array:
    """A group of layers on whole texts.

    Args:
      layers: parameters, stacked or a tuple of trees.
      x_BTD: activations. context: shared by all layers.

    Returns:
      [B, T, D].
    """
    template = DecoderLayer(config, execution.attention, parent=None)

    def layer(params: Any, x: jax.Array) -> Any:
        return template.apply({"params": params}, x, context)

    return run(layer, layers, x_BTD, policy=execution.remat, unroll=execution.unroll)


def run_cached(
    layers: Any,
    x_BTD: jax.Array,
    context: Context,
    past: Sequence[Past],
    config: LlamaConfig,
    execution: Execution = _PLAIN,
) -> tuple[jax.Array, Any]:
    """A group of layers on tokens that follow what is kept.

    Args:
      layers: parameters, stacked or a tuple of trees.
      past: parts of what is kept (own cache, shared prefix; empty for a first pass), each with the
        keys and values of the whole group in the form of `layers`: a `KV` stacked over layers, or
        a tuple of one `KV` per layer.

    Returns:
      ([B, T, D], keys and values of these tokens in the same form).
    """
    template = DecoderLayer(config, execution.attention, parent=None)

    def layer(x: jax.Array, params: Any, kept: Sequence[KV]) -> Any:
        parts = [Past(KV(*kv), p.lengths) for kv, p in zip(kept, past, strict=True)]
        return template.apply({"params": params}, x, context, parts, method="cached")

    kept = [part.kv for part in past]
    if not isinstance(layers, tuple):
        return jax.lax.scan(lambda x, each: layer(x, *each), x_BTD, (layers, kept))
    fresh = []
    for params, *kvs in zip(layers, *kept, strict=True):
        x_BTD, new = layer(x_BTD, params, kvs)
        fresh.append(new)
    return x_BTD, tuple(fresh)


class Llama(nn.Module):
    """Embedding, layers, final norm and head.

    `__call__` gives states, not logits: `head` is the matrix from one to the other, for
    `jaxmods.objectives.cross_entropy`, and `logits` applies it.

    Activations have the dtype of the parameters; norms, rotary tables, softmax and logits are
    float32 inside.
    """

    config: LlamaConfig
    execution: Execution = Execution()

    def setup(self) -> None:
        c = self.config
        normal = nn.initializers.normal(c.initializer_range)
        self.embedding = self.param(
            "embedding", boxed(normal, ("vocab", "embed")), (c.vocab_size, c.width)
        )
        self.layers = layers_param(self, "layers", c, c.layers)
        self.final_norm = RMSNorm(c.epsilon)
        if not c.tied:
            self.unembedding = self.param(
                "unembedding", boxed(normal, ("embed", "vocab")), (c.width, c.vocab_size)
            )

    def __call__(
        self,
        ids: jax.Array | None = None,
        *,
        embeddings: jax.Array | None = None,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
    ) -> jax.Array:
        """States after the final norm of whole texts.

        Args:
          ids: int [B, T]. embeddings: [B, T, D] in their place (images spliced in, say).
          positions: int [B or 1, T], or [3, B or 1, T] (`rope_sections`); None: 0..T-1.
          segments: int [B, T], numbers of the texts packed into a row: no token sees another
            text's. Give `positions` that restart with each (`packed_positions`). None: one text
            per row; padding on the right needs no mask.

        Returns:
          [B, T, D].

        Raises:
          ValueError: both or neither of ids and embeddings, or shapes that do not fit.
        """
        x = self._inputs(ids, embeddings)
        if segments is not None and segments.shape != x.shape[:2]:
            raise ValueError(
                f"Llama: expected segments [B, T] = {x.shape[:2]}, found {segments.shape}"
            )
        if positions is None:
            positions = jnp.arange(x.shape[1])[None]
        context = Context(rope_of(positions, self.config), segments)
        x = run_layers(self.layers, x, context, self.config, self.execution)
        return self.final_norm(x)

    def embed(self, ids: jax.Array) -> jax.Array:
        """Rows of the table: int [...] -> [..., D]. Ids outside of the vocabulary (placeholders)
        give the nearest row; whoever has such replaces them."""
        return jnp.take(self.embedding, ids, axis=0, mode="clip")

    def head(self) -> jax.Array:
        """The matrix [D, V] from states to logits."""
        return self.embedding.T if self.config.tied else self.unembedding

    def logits(self, states: jax.Array) -> jax.Array:
        """float32 logits: [..., D] -> [..., V]."""
        return unembed(states, self.head())

    def prefill(
        self,
        ids: jax.Array | None,
        lengths: jax.Array,
        *,
        capacity: int,
        embeddings: jax.Array | None = None,
        positions: jax.Array | None = None,
        cache_dtype: Any = None,
        prefix: Prefix | None = None,
    ) -> tuple[jax.Array, Decoding]:
        """Reads prompts, padded on the right.

        Args:
          ids: int [B, T]; or None with embeddings [B, T, D].
          lengths: int [B], true lengths, at least 1 (`jaxmods.nn.kv_cache.require_room` checks on
            the host).
          capacity: slots per row for prompt and continuation, without the prefix.
          positions: as in `__call__`; None: they go on from the prefix, or start from 0.
          cache_dtype: of the cache; None: that of the activations.
          prefix: what all rows have read before (`Decoding.as_prefix` of a batch of one).

        Returns:
          (float32 logits [B, V] after the last token of each row, state).

        Raises:
          ValueError: prompts longer than the capacity, and as in `__call__`.
        """
        x = self._inputs(ids, embeddings)
        if positions is None:
            first = jnp.zeros((1,), jnp.int32) if prefix is None else prefix.positions
            positions = first[:, None] + jnp.arange(x.shape[1])
        lengths = lengths.astype(jnp.int32)
        past = () if prefix is None else (Past(prefix.cache, prefix.lengths),)
        logits, fresh = self._continue(x, positions, past, lengths)
        real = jnp.arange(x.shape[1]) < lengths[:, None]
        following = jnp.max(jnp.where(real, positions, -1), axis=-1) + 1
        if following.ndim == 2:  # three numbers per token
            following = jnp.max(following, axis=0)
        return logits, start(
            fresh, lengths, following.astype(jnp.int32), capacity, cache_dtype, prefix
        )

    def extend(
        self,
        ids: jax.Array | None,
        lengths: jax.Array,
        state: Decoding,
        *,
        embeddings: jax.Array | None = None,
    ) -> tuple[jax.Array, Decoding]:
        """Reads further tokens (the next turn of a chat), padded on the right.

        Args:
          ids: int [B, T]; or None with embeddings [B, T, D]. lengths: int [B], at least 1.

        Returns:
          (float32 logits [B, V] after the last token of each row, state).
        """
        x = self._inputs(ids, embeddings)
        positions = state.positions[:, None] + jnp.arange(x.shape[1])
        past = [Past(state.cache, state.lengths)]
        if state.prefix is not None:
            past.append(Past(state.prefix.cache, state.prefix.lengths))
        lengths = lengths.astype(jnp.int32)
        logits, fresh = self._continue(x, positions, past, lengths)
        return logits, state.write(fresh, lengths)

    def decode_step(self, tokens: jax.Array, state: Decoding) -> tuple[jax.Array, Decoding]:
        """Reads one token per row: int [B] -> (float32 logits [B, V], state)."""
        return self.extend(tokens[:, None], jnp.ones_like(tokens), state)

    def _continue(
        self, x: jax.Array, positions: jax.Array, past: Sequence[Past], lengths: jax.Array
    ) -> tuple[jax.Array, Any]:
        context = Context(rope_of(positions, self.config))
        x, fresh = run_cached(self.layers, x, context, past, self.config, self.execution)
        last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
        return self.logits(self.final_norm(last)), fresh

    def _inputs(self, ids: jax.Array | None, embeddings: jax.Array | None) -> jax.Array:
        if (ids is None) == (embeddings is None):
            raise ValueError("Llama: give ids or embeddings, and not both")
        if ids is not None:
            if ids.ndim != 2:
                raise ValueError(f"Llama: expected ids [B, T], found {ids.shape}")
            x = self.embed(ids)
        else:
            assert embeddings is not None
            if embeddings.ndim != 3 or embeddings.shape[-1] != self.config.width:
                raise ValueError(
                    f"Llama: expected embeddings [B, T, {self.config.width}], "
                    f"found {embeddings.shape}"
                )
            x = embeddings.astype(self.embedding.dtype)
        return constrain(x, ("batch", "seq", None))


def unembed(states: jax.Array, head_DV: jax.Array) -> jax.Array:
    """float32 logits of states [..., D]: [..., V]."""
    return jnp.einsum("...D,DV->...V", states, head_DV, preferred_element_type=jnp.float32)


def packed_positions(segments: jax.Array) -> jax.Array:
    """Positions that restart with every text of a packed row: int [B, T] -> int32 [B, T].

    Args:
      segments: number of each token's text; the tokens of a text are neighbours.
    """
    at = jnp.arange(segments.shape[1])
    begins = segments[:, 1:] != segments[:, :-1]
    begins = jnp.pad(begins, ((0, 0), (1, 0)), constant_values=True)
    first = jax.lax.cummax(jnp.where(begins, at, 0), axis=1)
    return (at - first).astype(jnp.int32)
