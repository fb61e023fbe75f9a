"""The encoder of T5 version 1.1 (Raffel et al. 2020, arXiv 1910.10683; v1.1: gated GELU, Shazeer
2020, arXiv 2002.05202), as transformers' T5EncoderModel; UMT5's by `bias_per_layer`.

Published size, T5-v1.1-XXL (the text encoder of FLUX.1, CogVideoX, PixArt): the defaults of
`T5Config`, 4,762,310,656 parameters.

Shape legend:
  B batch   T query tokens   S key tokens   D width   H heads   K head width

What is unusual: scores are not scaled by the head width, positions come in only as a bias on the
scores that depends on the distance, and there is no bias in any projection.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmods.nn.attention import Implementation, attention
from jaxmods.nn.layers import Initializer, Linear, RMSNorm, boxed
from jaxmods.nn.stack import Execution, run, stacked_param
from jaxmods.partitioning import constrain

_normal = nn.initializers.normal


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes; the defaults are T5-v1.1-XXL's.

    Attributes:
      heads, head_dim: of attention; their product need not be `width`.
      mlp: width of each of the two branches of the gated MLP.
      buckets: rows of the table of position biases. max_distance: from here on all in one bucket.
      bias_per_layer: every layer has its own table (UMT5) instead of sharing the first one's.
      pad_id, eos_id: special tokens.
    """

    vocab_size: int = 32128
    width: int = 4096
    layers: int = 24
    heads: int = 64
    head_dim: int = 64
    mlp: int = 10240
    buckets: int = 32
    max_distance: int = 128
    epsilon: float = 1e-6
    bias_per_layer: bool = False
    pad_id: int = 0
    eos_id: int = 1

    @classmethod
    def from_hub_config(cls, config: Mapping[str, Any]) -> T5Config:
        """Sizes from the `config.json` of a T5 v1.1 or UMT5 encoder.

        Raises:
          ValueError: an option that this encoder does not have (T5 1.0's plain ReLU).
        """
        kind = config.get("model_type", "t5")
        if kind not in ("t5", "umt5"):
            raise ValueError(f"T5 config.json: expected model_type t5 or umt5, found {kind!r}")
        mlp = config.get("feed_forward_proj", "relu" if kind == "t5" else "gated-gelu")
        if mlp != "gated-gelu":
            raise ValueError(
                f"T5 config.json: feed_forward_proj: expected 'gated-gelu', found {mlp!r}; this is "
                "the encoder of T5 v1.1 (google/t5-v1_1-*), not of the first T5"
            )
        return cls(
            vocab_size=config["vocab_size"],
            width=config["d_model"],
            layers=config["num_layers"],
            heads=config["num_heads"],
            head_dim=config["d_kv"],
            mlp=config["d_ff"],
            buckets=config.get("relative_attention_num_buckets", 32),
            max_distance=config.get("relative_attention_max_distance", 128),
            epsilon=config.get("layer_norm_epsilon", 1e-6),
            bias_per_layer=kind == "umt5",
            pad_id=config.get("pad_token_id", 0),
            eos_id=config.get("eos_token_id", 1),
        )

    def hub_config(self) -> dict[str, Any]:
        """The `config.json` of an encoder of these sizes."""
        kind = "UMT5" if self.bias_per_layer else "T5"
        return {
            "architectures": [f"{kind}EncoderModel"],
            "model_type": kind.lower(),
            "d_ff": self.mlp,
            "d_kv": self.head_dim,
            "d_model": self.width,
            "dense_act_fn": "gelu_new",
            "dropout_rate": 0.1,
            "eos_token_id": self.eos_id,
            "feed_forward_proj": "gated-gelu",
            "is_encoder_decoder": False,
            "is_gated_act": True,
            "layer_norm_epsilon": self.epsilon,
            "num_heads": self.heads,
            "num_layers": self.layers,
            "pad_token_id": self.pad_id,
            "relative_attention_max_distance": self.max_distance,
            "relative_attention_num_buckets": self.buckets,
            "tie_word_embeddings": False,
            "use_cache": False,
            "vocab_size": self.vocab_size,
        }


def distance_buckets(queries: int, keys: int, buckets: int, max_distance: int) -> np.ndarray:
    """Bucket of every pair of positions: int32 [queries, keys], in [0, buckets).

    One half of the buckets is for keys after the query, one for the others. In each half the first
    half holds one distance each, the rest grows logarithmically up to `max_distance`. The
    logarithm is taken in float32, as the reference does: where it falls just short of a whole
    number, so does ours.
    """
    offset = np.arange(keys)[None, :] - np.arange(queries)[:, None]
    half = buckets // 2
    exact = half // 2
    distance = np.abs(offset)
    ratio = np.maximum(distance, 1).astype(np.float32) / np.float32(exact)
    growth = np.log(ratio) / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
    far = np.minimum(exact + growth.astype(np.int64), half - 1)
    return (np.where(distance < exact, distance, far) + half * (offset > 0)).astype(np.int32)


def distance_bias(table: jax.Array, length: int, max_distance: int) -> jax.Array:
    """Bias of the scores: table [buckets, H] -> [1, H, length, length] in the table's dtype."""
    index = distance_buckets(length, length, table.shape[0], max_distance)
    return jnp.take(table, index, axis=0).transpose(2, 0, 1)[None]


class Block(nn.Module):
    """x += o(attention(norm1 x)); x += wo(gelu(wi_0 norm2 x) * (wi_1 norm2 x))."""

    config: T5Config
    implementation: Implementation = "auto"

    def setup(self) -> None:
        c = self.config
        inner = c.heads * c.head_dim

        def linear(features: int, axes: tuple[str, str], std: float) -> Linear:
            return Linear(features, axes, use_bias=False, kernel_init=_normal(std))

        self.norm1 = RMSNorm(c.epsilon)
        # The query's initialisation makes up for the missing scale of the scores.
        self.q = linear(inner, ("embed", "heads"), (c.width * c.head_dim) ** -0.5)
        self.k = linear(inner, ("embed", "heads"), c.width**-0.5)
        self.v = linear(inner, ("embed", "heads"), c.width**-0.5)
        self.o = linear(c.width, ("heads", "embed"), inner**-0.5)
        self.norm2 = RMSNorm(c.epsilon)
        self.wi_0 = linear(c.mlp, ("embed", "mlp"), c.width**-0.5)
        self.wi_1 = linear(c.mlp, ("embed", "mlp"), c.width**-0.5)
        self.wo = linear(c.width, ("mlp", "embed"), c.mlp**-0.5)
        if c.bias_per_layer:
            self.bias = self.param("bias", _table(c), (c.buckets, c.heads))

    def __call__(
        self, x_BTD: jax.Array, bias: jax.Array | None, mask: jax.Array | None
    ) -> jax.Array:
        """[B, T, D] -> [B, T, D] in the dtype of x.

        Args:
          x_BTD: activations.
          bias: [1, H, T, T]; None where the layer has its own table.
          mask: bool [B, 1, 1, T], False hides a key.
        """
        c = self.config
        if c.bias_per_layer:
            bias = distance_bias(self.bias, x_BTD.shape[1], c.max_distance)

        def heads_first(x: jax.Array) -> jax.Array:
            split = x.reshape(*x.shape[:2], c.heads, c.head_dim)
            return constrain(split.transpose(0, 2, 1, 3), ("batch", "heads", None, None))

        y = self.norm1(x_BTD)
        mixed = attention(
            heads_first(self.q(y)),
            heads_first(self.k(y)),
            heads_first(self.v(y)),
            mask=mask,
            bias=bias,
            scale=1.0,
            implementation=self.implementation,
        )
        x_BTD = x_BTD + self.o(mixed.transpose(0, 2, 1, 3).reshape(*x_BTD.shape[:2], -1))
        y = self.norm2(x_BTD)
        hidden = jax.nn.gelu(self.wi_0(y), approximate=True) * self.wi_1(y)
        return constrain((x_BTD + self.wo(hidden)).astype(x_BTD.dtype), ("batch", "seq", None))


class T5Encoder(nn.Module):
    """Token ids to states.

    The residual stream has the wider dtype of the embedding and of `wo`: with bf16 parameters but
    float32 `wo` (what transformers loads) it is float32.
    """

    config: T5Config
    execution: Execution = Execution()

    def setup(self) -> None:
        c = self.config
        self.embedding = self.param(
            "embedding", boxed(_normal(1.0), ("vocab", "embed")), (c.vocab_size, c.width)
        )
        if not c.bias_per_layer:
            self.bias = self.param("bias", _table(c), (c.buckets, c.heads))
        template = self._template()
        sample = jnp.zeros((1, 1, c.width))
        sample_bias = None if c.bias_per_layer else jnp.zeros((1, c.heads, 1, 1))
        self.blocks: Any = stacked_param(
            self,
            "blocks",
            lambda rng: template.init(rng, sample, sample_bias, None)["params"],
            c.layers,
        )
        self.final_norm = RMSNorm(c.epsilon)

    def __call__(self, ids: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """States after the final norm.

        Args:
          ids: int [B, T]. mask: bool [B, T], False for tokens that no token attends to (padding);
            None attends to all, padding included: what FLUX and CogVideoX do.

        Returns:
          [B, T, D] in the dtype of the final norm's scale. States of hidden tokens are computed
          too, and mean nothing.

        Raises:
          ValueError: ids or mask of another shape.
        """
        c = self.config
        if ids.ndim != 2 or (mask is not None and mask.shape != ids.shape):
            raise ValueError(
                f"T5: expected ids [B, T] and a mask of the same shape or None, found {ids.shape} "
                f"and {None if mask is None else mask.shape}"
            )
        x = jnp.take(self.embedding, ids, axis=0)
        x = x.astype(jnp.promote_types(x.dtype, self.blocks["wo"]["kernel"].dtype))
        bias = None
        if not c.bias_per_layer:
            bias = distance_bias(self.bias, ids.shape[1], c.max_distance)
            bias = constrain(bias, (None, "heads", None, None))
        seen = None if mask is None else mask.astype(bool)[:, None, None, :]
        template = self._template()

        def block(params: Any, x: jax.Array) -> Any:
            return template.apply({"params": params}, x, bias, seen)

        x = run(
            block,
            self.blocks,
            constrain(x, ("batch", "seq", None)),
            policy=self.execution.remat,
            unroll=self.execution.unroll,
        )
        return self.final_norm(x)

    def _template(self) -> Block:
        return Block(self.config, self.execution.attention, parent=None)


def _table(c: T5Config) -> Initializer:
    """Initialiser of a table of position biases [buckets, H]."""
    return boxed(_normal(c.width**-0.5), ("pos", "heads"))
