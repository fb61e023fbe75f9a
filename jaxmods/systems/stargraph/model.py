"""StarGraph's entity encoder (arXiv 2205.14209, section 3; spec `stargraph`, section 2.2).

An entity is a short, fixed set of tokens: anchors one or two hops away, transformed along their
path, and optionally the entity and its neighbours. Published sizes: width 256 or 512, 20 anchors,
one block, 8 heads of width 8 (or width / 8).

Shape legend: E entities asked for, N entities, A anchors per entity, K centre + neighbours,
L = K + A tokens, D width, H = 8 heads, M anchors in all, P path labels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmods.partitioning import constrain
from jaxmods.systems.stargraph.attention import attend
from jaxmods.systems.stargraph.dropout import Seed, dropout, fold
from jaxmods.systems.stargraph.feed_forward import feed_forward, gelu

HEADS = 8
EPSILON = 2.0  # embedding range is (gamma + EPSILON) / width

Initializer = Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Sizes and options of the encoder, by the names of the official command line where it has one.

    Attributes:
      width: D (`hidden_dim`), divisible by 8.
      anchors: M, anchors of the whole graph; 0 where they share the node table.
      anchors_per_entity: A (`sample_anchors`).
      paths: P, path labels; 0 for no path transform (`use_anchor_path` off).
      center: the entity itself is a token (`sample_center`).
      neighbours: neighbour tokens (`sample_neighbors`).
      node_width: width of the node table, 0 for D (`node_dim`).
      share_anchors: anchors come from the node table (`anchor_share_embedding`).
      type_embedding: add an embedding of centre/neighbour/anchor (needs layers > 0).
      layers, mlp_ratio: blocks (`attn_layers_num`), hidden width of the MLP over D.
      head_width: query and key width, 0 for D / 8 (`head_dim`).
      merge: "mean_pooling" or "linear_proj" (`merge_strategy`).
      dropout: rate at all of the official places.
    """

    width: int = 512
    anchors: int = 2304
    anchors_per_entity: int = 20
    paths: int = 474
    center: bool = False
    neighbours: int = 0
    node_width: int = 0
    share_anchors: bool = False
    type_embedding: bool = False
    layers: int = 1
    mlp_ratio: int = 2
    head_width: int = 8
    merge: Literal["mean_pooling", "linear_proj"] = "mean_pooling"
    dropout: float = 0.05

    def __post_init__(self) -> None:
        if self.width <= 0 or self.width % HEADS:
            raise ValueError(f"encoder.width: expected a multiple of {HEADS}, found {self.width}")
        if self.tokens == 0:
            raise ValueError(
                "encoder: expected at least one token; set anchors_per_entity, center or neighbours"
            )
        if self.anchors_per_entity and not self.share_anchors and self.anchors < 1:
            raise ValueError(f"encoder.anchors: expected 1 or more, found {self.anchors}")
        if self.share_anchors and (not self.nodes or self.node_width not in (0, self.width)):
            raise ValueError(
                "encoder.share_anchors: needs center or neighbours, and node_width 0 or "
                f"{self.width}; found center={self.center}, neighbours={self.neighbours}, "
                f"node_width={self.node_width}"
            )
        if self.paths and not self.anchors_per_entity:
            raise ValueError("encoder.paths: expected 0 without anchors_per_entity")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"encoder.dropout: expected 0 <= rate < 1, found {self.dropout}")

    @property
    def nodes(self) -> int:
        """K, tokens from the node table."""
        return int(self.center) + self.neighbours

    @property
    def tokens(self) -> int:
        """L."""
        return self.nodes + self.anchors_per_entity

    @property
    def token_kinds(self) -> tuple[int, ...]:
        """Kind of each token: 0 centre, 1 neighbour, 2 anchor (official buffer `type_ids`)."""
        return (0,) * int(self.center) + (1,) * self.neighbours + (2,) * self.anchors_per_entity

    @property
    def query_width(self) -> int:
        """C, query and key width of a head."""
        return self.head_width or self.width // HEADS

    @property
    def node_table_width(self) -> int:
        """Width of the node table."""
        return self.node_width or self.width

    @property
    def projects_nodes(self) -> bool:
        """Whether nodes go through a linear layer to reach width D."""
        return self.nodes > 0 and self.node_table_width != self.width

    @property
    def has_types(self) -> bool:
        """Whether the type embedding exists (official: only with attention layers)."""
        return self.type_embedding and self.layers > 0


def rows(count: int, multiple: int) -> int:
    """`count` rounded up to a multiple: rows of a table that can be split."""
    return -(-count // multiple) * multiple


class Encoder(nn.Module):
    """Entity ids to vectors.

    Attributes:
      config: sizes.
      entities: N.
      embedding_range: half-width of the uniform initialisation of the tables.
      row_multiple: rows of the large tables are rounded up to this.
    """

    config: EncoderConfig
    entities: int
    embedding_range: float
    row_multiple: int = 1

    def setup(self) -> None:
        c, d = self.config, self.config.width
        table = _uniform(self.embedding_range)
        entity = ("entity", "embed")
        graph_rows = rows(self.entities, self.row_multiple)
        if c.anchors_per_entity:
            self.hashes = self._buffer("hashes", (graph_rows, c.anchors_per_entity))
            if not c.share_anchors:
                shape = (rows(c.anchors + 1, self.row_multiple), d)
                self.anchor_embedding = self._weight("anchor_embedding", table, entity, shape)
        if c.paths:
            self.path_ids = self._buffer("path_ids", (graph_rows, c.anchors_per_entity, 2))
            self.path_embedding = self._weight(
                "path_embedding", _identity_last(table), (None, "embed"), (c.paths + 1, 2 * d)
            )
        if c.nodes:
            self.node_ids = self._buffer("nodes", (graph_rows, c.nodes))
            shape = (rows(self.entities + 1, self.row_multiple), c.node_table_width)
            self.node_embedding = self._weight("node_embedding", table, entity, shape)
        if c.projects_nodes:
            self.node_kernel, self.node_bias = self._linear(
                "node_projection", c.node_table_width, d, "proj", "embed"
            )
        if c.has_types:
            self.type_table = self._weight("type_embedding", table, (None, "embed"), (3, d))
        if c.layers:
            self.type_ids = self._constant("type_ids", c.token_kinds)
            self._setup_blocks()
        if c.merge == "linear_proj":
            self.merge_1 = self._linear("merge_1", c.tokens * d, c.mlp_ratio * d, "embed", "mlp")
            self.merge_2 = self._linear("merge_2", c.mlp_ratio * d, d, "mlp", "embed")

    def _setup_blocks(self) -> None:
        c, d, n = self.config, self.config.width, self.config.layers
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        self.norms = [
            (
                self._weight(f"norm{i}_scale", ones, ("layers", "norm"), (n, d)),
                self._weight(f"norm{i}_bias", zeros, ("layers", "norm"), (n, d)),
            )
            for i in (1, 2)
        ]
        self.qk_kernel = self._weight(
            "qk_kernel",
            _uniform(d**-0.5),
            ("layers", "embed", "heads"),
            (n, d, 2 * HEADS * c.query_width),
        )
        self.mlp_1 = self._linear("mlp_1", d, c.mlp_ratio * d, "embed", "mlp", n)
        self.mlp_2 = self._linear("mlp_2", c.mlp_ratio * d, d, "mlp", "embed", n)

    def __call__(
        self, ids: jax.Array, seed: Seed | None = None, capture: dict[str, jax.Array] | None = None
    ) -> jax.Array:
        """Vectors [E, D], not normalised, in the dtype of the parameters.

        Args:
          ids: int32 [E] entity ids.
          seed: dropout seed; None for inference.
          capture: receives intermediate activations by name ("tokens_in", "block0.attn_out",
            "block0.out"), for comparison with the official code.
        """
        c = self.config
        x_ELD = self.tokens(ids)
        if capture is not None:
            capture["tokens_in"] = x_ELD
        rate = c.dropout if seed is not None else 0.0
        for layer in range(c.layers):
            site = None if seed is None else fold(seed, layer)
            last = layer == c.layers - 1 and c.merge == "mean_pooling"
            x_ELD = self._attention(layer, x_ELD, site, rate, capture)
            if last and rate == 0.0 and capture is None:
                # Mean pooling commutes with the last linear layer: pool first, L times less work.
                hidden = self._mlp_hidden(layer, x_ELD).mean(1)
                return x_ELD.mean(1) + self._mlp_out(layer, hidden)
            if site is not None and rate > 0.0:
                x_ELD = x_ELD + self._mlp(layer, x_ELD, site, rate)
            else:
                x_ELD = x_ELD + self._mlp_out(layer, self._mlp_hidden(layer, x_ELD))
            if capture is not None:
                capture[f"block{layer}.out"] = x_ELD
        if c.merge == "mean_pooling":
            return x_ELD.mean(1)
        flat = x_ELD.reshape(x_ELD.shape[0], -1)
        hidden = flat @ self.merge_1[0] + self.merge_1[1]
        hidden = dropout(hidden, None if seed is None else fold(seed, c.layers), rate)
        return jax.nn.relu(hidden) @ self.merge_2[0] + self.merge_2[1]

    def tokens(self, ids: jax.Array) -> jax.Array:
        """Token sequences [E, L, D] of entities `ids`: nodes first, then anchors."""
        c, parts = self.config, []
        if c.nodes:
            nodes = self.node_embedding[self.node_ids[ids]]
            if c.projects_nodes:
                nodes = nodes @ self.node_kernel + self.node_bias
            parts.append(nodes)
        if c.anchors_per_entity:
            table = self.node_embedding if c.share_anchors else self.anchor_embedding
            anchors = table[self.hashes[ids]]
            if c.paths:
                path = self.path_embedding[self.path_ids[ids]]
                for hop in range(2):
                    scale, shift = jnp.split(path[:, :, hop], 2, axis=-1)
                    anchors = anchors * (scale + 1) + shift
            parts.append(anchors)
        x_ELD = parts[0] if len(parts) == 1 else jnp.concatenate(parts, 1)
        if c.has_types:
            x_ELD = x_ELD + self.type_table[self.type_ids]
        return constrain(x_ELD, ("batch", None, None))

    def _attention(
        self,
        layer: int,
        x_ELD: jax.Array,
        site: Seed | None,
        rate: float,
        capture: dict[str, jax.Array] | None,
    ) -> jax.Array:
        y_ELD = self._norm(0, layer, x_ELD)
        e, length, width = y_ELD.shape
        qk = y_ELD @ self.qk_kernel[layer]
        q, k = qk.reshape(e, length, 2, HEADS, -1).transpose(2, 0, 3, 1, 4)
        v = y_ELD.reshape(e, length, HEADS, -1).transpose(0, 2, 1, 3)
        out = attend(q, k, v, None if site is None else fold(site, 1), rate)
        out = out.transpose(0, 2, 1, 3).reshape(e, length, width)
        if capture is not None:
            capture[f"block{layer}.attn_out"] = out
        return x_ELD + out

    def _mlp(self, layer: int, x_ELD: jax.Array, site: Seed, rate: float) -> jax.Array:
        weights = (w[layer] for pair in (self.mlp_1, self.mlp_2) for w in pair)
        return feed_forward(
            self._norm(1, layer, x_ELD), *weights, fold(site, 2), fold(site, 3), rate
        )

    def _mlp_hidden(self, layer: int, x_ELD: jax.Array) -> jax.Array:
        kernel, bias = self.mlp_1
        return gelu(self._norm(1, layer, x_ELD) @ kernel[layer] + bias[layer])

    def _mlp_out(self, layer: int, hidden: jax.Array) -> jax.Array:
        kernel, bias = self.mlp_2
        return hidden @ kernel[layer] + bias[layer]

    def _norm(self, which: int, layer: int, x: jax.Array) -> jax.Array:
        """LayerNorm over the last axis, eps 1e-5, statistics in fp32."""
        scale, bias = self.norms[which]
        wide = x.astype(jnp.float32)
        mean = wide.mean(-1, keepdims=True)
        centred = wide - mean
        variance = jnp.square(centred).mean(-1, keepdims=True)
        return (centred * jax.lax.rsqrt(variance + 1e-5)).astype(x.dtype) * scale[layer] + bias[
            layer
        ]

    def _weight(
        self, name: str, init: Initializer, axes: tuple[str | None, ...], shape: tuple[int, ...]
    ) -> jax.Array:
        return self._param(name, init, axes, shape, jnp.float32)

    def _buffer(self, name: str, shape: tuple[int, ...]) -> jax.Array:
        """A table of the graph; zeros until the data (or a checkpoint) fills it."""
        axes = ("entity", *(None,) * (len(shape) - 1))
        return self._param(f"graph_{name}", nn.initializers.zeros, axes, shape, jnp.int32)

    def _constant(self, name: str, values: tuple[int, ...]) -> jax.Array:
        def init(rng: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
            del rng, shape
            return jnp.asarray(values, dtype)

        return self._param(f"graph_{name}", init, (None,), (len(values),), jnp.int32)

    def _param(
        self,
        name: str,
        init: Initializer,
        axes: tuple[str | None, ...],
        shape: tuple[int, ...],
        dtype: Any,
    ) -> Any:
        """Flax unboxes a parameter inside a module, so this is an array."""
        return self.param(name, nn.with_logical_partitioning(init, axes), shape, dtype)

    def _linear(
        self,
        name: str,
        fan_in: int,
        fan_out: int,
        rows_axis: str,
        columns_axis: str,
        layers: int = 0,
    ) -> tuple[jax.Array, jax.Array]:
        """Kernel and bias with PyTorch's default initialisation, stacked where `layers` > 0."""
        init = _uniform(fan_in**-0.5)
        stack, axis = ((layers,), ("layers",)) if layers else ((), ())
        kernel = self._weight(
            f"{name}_kernel", init, (*axis, rows_axis, columns_axis), (*stack, fan_in, fan_out)
        )
        bias = self._weight(f"{name}_bias", init, (*axis, columns_axis), (*stack, fan_out))
        return kernel, bias


def _uniform(limit: float) -> Initializer:
    """U(-limit, limit)."""

    def init(rng: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        return jax.random.uniform(rng, shape, dtype, -limit, limit)

    return init


def _identity_last(table: Initializer) -> Initializer:
    """`table` with the last row zero: the padding path is the identity at first."""

    def init(rng: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        return table(rng, shape, dtype).at[-1].set(0.0)

    return init
