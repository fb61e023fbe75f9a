"""CLIP's two towers (Radford et al. 2021, arXiv 2103.00020), as in transformers' CLIPModel.

Published sizes (vision width/layers/heads, text width/layers/heads, projection):
  B/32, B/16        768/12/12   512/12/8   512
  L/14, L/14@336   1024/24/16   768/12/12  768

Shape legend:
  B batch   T tokens   D width   H heads   K head width   S image side   G patches per side

In both towers the last block is held apart from the others ("blocks" and "last"), because what
most callers want needs only a part of it: one query for a pooled output, no query at all for the
dense features of FG-CLIP. The parts give the same numbers as the whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmods.nn.attention import Implementation, attention
from jaxmods.nn.layers import LayerNorm, Linear, boxed, quick_gelu
from jaxmods.nn.positions import resize_grid
from jaxmods.nn.stack import Execution, run, stacked_param
from jaxmods.partitioning import constrain

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
LOGIT_SCALE_INIT = 2.6592  # ln(1 / 0.07)

_normal = nn.initializers.normal


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Vision tower: widths, depth, picture and patch side in pixels."""

    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp: int = 3072
    image_size: int = 224
    patch_size: int = 16

    @property
    def grid(self) -> int:
        """Patches per side at the native size."""
        return self.image_size // self.patch_size


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Text tower. `context_short` is CLIP's own table; the long one and `keep` are FG-CLIP's.

    Attributes:
      context_short: rows of the position table (CLIP: 77).
      context_long: rows of each long table. keep: leading rows of a long text that come from the
        first of the two tables.
      bos_id, eos_id, pad_id: special tokens.
      pool: the token whose state is the pooled output: the first "eos", or the first one with the
        "highest" id. transformers takes the latter where the `config.json` still says eos 2, as
        that of FLUX's text encoder does. Equal as long as eos is the last id of the vocabulary.
    """

    width: int = 512
    layers: int = 12
    heads: int = 8
    mlp: int = 2048
    vocab_size: int = 49408
    context_short: int = 77
    context_long: int = 248
    keep: int = 20
    bos_id: int = 49406
    eos_id: int = 49407
    pad_id: int = 49407
    pool: Literal["eos", "highest"] = "eos"

    @classmethod
    def from_hub_config(cls, config: Mapping[str, Any]) -> TextConfig:
        """Sizes from the `config.json` of a transformers CLIPTextModel.

        Raises:
          ValueError: an option that this tower does not have.
        """
        for key, expected in (("hidden_act", "quick_gelu"), ("layer_norm_eps", 1e-5)):
            if config.get(key, expected) != expected:
                raise ValueError(
                    f"CLIP text config.json: {key}: expected {expected!r}, found {config[key]!r}; "
                    "this tower has no other"
                )
        vocabulary = config.get("vocab_size", 49408)
        old = config.get("eos_token_id", 49407) == _OLD_EOS
        return cls(
            width=config.get("hidden_size", 512),
            layers=config.get("num_hidden_layers", 12),
            heads=config.get("num_attention_heads", 8),
            mlp=config.get("intermediate_size", 2048),
            vocab_size=vocabulary,
            context_short=config.get("max_position_embeddings", 77),
            bos_id=vocabulary - 2 if old else config.get("bos_token_id", 49406),
            eos_id=vocabulary - 1 if old else config.get("eos_token_id", 49407),
            pad_id=vocabulary - 1 if old else config.get("pad_token_id", 49407),
            pool="highest" if old else "eos",
        )

    def hub_config(self) -> dict[str, Any]:
        """The `config.json` of a transformers CLIPTextModel of these sizes."""
        old = self.pool == "highest"
        return {
            "architectures": ["CLIPTextModel"],
            "model_type": "clip_text_model",
            "attention_dropout": 0.0,
            "bos_token_id": 0 if old else self.bos_id,
            "eos_token_id": _OLD_EOS if old else self.eos_id,
            "hidden_act": "quick_gelu",
            "hidden_size": self.width,
            "intermediate_size": self.mlp,
            "layer_norm_eps": 1e-5,
            "max_position_embeddings": self.context_short,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "pad_token_id": 1 if old else self.pad_id,
            "vocab_size": self.vocab_size,
        }


# The text encoder of FLUX.1 and of Stable Diffusion 1: that of CLIP L/14.
TEXT_L = TextConfig(width=768, heads=12, mlp=3072, pool="highest")
_OLD_EOS = 2  # what OpenAI's files say, whatever the vocabulary


class Block(nn.Module):
    """Pre-norm transformer block: x += out(attention(norm1 x)); x += fc2(quick_gelu(fc1(norm2 x))).

    Attributes:
      width, heads, mlp: sizes. depth: number of blocks of the tower (scales the initialisation).
      causal: whether a token sees only itself and earlier ones.
      implementation: of attention.
    """

    width: int
    heads: int
    mlp: int
    depth: int
    causal: bool
    implementation: Implementation = "auto"

    def setup(self) -> None:
        width, shrink = self.width, (2 * self.depth) ** -0.5
        narrow, square = _normal(width**-0.5 * shrink), _normal(width**-0.5)
        self.norm1 = LayerNorm()
        self.q = Linear(width, ("embed", "heads"), kernel_init=narrow)
        self.k = Linear(width, ("embed", "heads"), kernel_init=narrow)
        self.v = Linear(width, ("embed", "heads"), kernel_init=narrow)
        self.out = Linear(width, ("heads", "embed"), kernel_init=square)
        self.norm2 = LayerNorm()
        self.fc1 = Linear(self.mlp, ("embed", "mlp"), kernel_init=_normal((2 * width) ** -0.5))
        self.fc2 = Linear(width, ("mlp", "embed"), kernel_init=narrow)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        y = self.norm1(x_BTD)
        mixed = self._attend(self.q(y), self.k(y), self.v(y), None)
        return self._feed(x_BTD + self.out(mixed))

    def one(self, x_BTD: jax.Array, at_BT: jax.Array) -> jax.Array:
        """The block's output at one token per row, without computing it elsewhere.

        Args:
          x_BTD: input of the block. at_BT: bool, one True per row.

        Returns:
          [B, D].
        """
        y = self.norm1(x_BTD)
        seen = None
        if self.causal:  # keys up to the chosen token
            later = jnp.cumsum(at_BT, axis=1) - at_BT
            seen = (later == 0)[:, None, None, :]
        mixed = self._attend(self.q(select(y, at_BT)), self.k(y), self.v(y), seen)
        return self._feed(select(x_BTD, at_BT) + self.out(mixed))[:, 0]

    def values_only(self, x_BTD: jax.Array) -> jax.Array:
        """The block with each token attending to itself alone: no queries, no keys, no softmax."""
        return self._feed(x_BTD + self.out(self.v(self.norm1(x_BTD))))

    def _attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array | None
    ) -> jax.Array:
        def heads_first(x: jax.Array) -> jax.Array:
            split = x.reshape(*x.shape[:2], self.heads, self.width // self.heads)
            return constrain(split.transpose(0, 2, 1, 3), ("batch", "heads", None, None))

        mixed = attention(
            heads_first(q),
            heads_first(k),
            heads_first(v),
            causal=self.causal and seen is None,
            mask=seen,
            # One query per row is no work for a tiled kernel, and it comes with a mask.
            implementation="xla" if seen is not None or q.shape != k.shape else self.implementation,
        )
        return mixed.transpose(0, 2, 1, 3).reshape(q.shape)

    def _feed(self, x: jax.Array) -> jax.Array:
        hidden = quick_gelu(self.fc1(self.norm2(x)))
        return constrain(x + self.fc2(hidden), ("batch", "seq", None))


def select(x_BTD: jax.Array, at_BT: jax.Array) -> jax.Array:
    """The chosen token of every row, [B, 1, D] (a masked sum: exact, and it shards)."""
    return jnp.sum(jnp.where(at_BT[..., None], x_BTD, 0), axis=1, keepdims=True)


class _Blocks(nn.Module):
    """The blocks of a tower: all but the last stacked, the last apart."""

    block: Block  # unbound template
    layers: int
    execution: Execution

    def setup(self) -> None:
        self.last = self.block.clone(parent=None)
        self.rest: Any = None
        if self.layers > 1:
            template = self.block.clone(parent=None)
            sample = jnp.zeros((1, 1, template.width))
            self.rest = stacked_param(
                self, "blocks", lambda rng: template.init(rng, sample)["params"], self.layers - 1
            )

    def before_last(self, x_BTD: jax.Array, blocks: int | None = None) -> jax.Array:
        """Input of the last block; or of block number `blocks` (0 is the first), which must not be
        a later one."""
        x_BTD = constrain(x_BTD, ("batch", "seq", None))
        if self.rest is None or blocks == 0:
            return x_BTD
        params = self.rest
        if blocks is not None and blocks < self.layers - 1:
            params = jax.tree.map(lambda leaf: leaf[:blocks], params)
        template = self.block.clone(parent=None)

        def block(params: Any, x: jax.Array) -> Any:
            return template.apply({"params": params}, x)

        return run(
            block,
            params,
            x_BTD,
            policy=self.execution.remat,
            unroll=self.execution.unroll,
        )


class VisionTower(nn.Module):
    """Patch embedding, class token, blocks. Methods take and return activations in one dtype.

    `trunk` is the input of the last block; `pooled`, `dense` and `last_hidden` continue from it.
    """

    config: VisionConfig
    execution: Execution = Execution()

    def setup(self) -> None:
        c = self.config
        self.class_embedding = self.param(
            "class_embedding", boxed(_normal(c.width**-0.5), ("embed",)), (c.width,)
        )
        self.patch_embedding = self.param(
            "patch_embedding",
            boxed(_normal(0.02), ("patch", "patch", "channels", "embed")),
            (c.patch_size, c.patch_size, 3, c.width),
        )
        self.position_embedding = self.param(
            "position_embedding",
            boxed(_normal(0.02), ("pos", "embed")),
            (1 + c.grid * c.grid, c.width),
        )
        self.pre_norm = LayerNorm()
        self.encoder = _Blocks(
            Block(c.width, c.heads, c.mlp, c.layers, False, self.execution.attention, parent=None),
            c.layers,
            self.execution,
        )
        self.post_norm = LayerNorm()

    def trunk(self, image: jax.Array) -> jax.Array:
        """Input of the last block, class token first.

        Args:
          image: [B, height, width, 3], uint8, or float already normalised. Sizes other than the
            native one get a bicubically resized position table, through which (as in the official
            code, which reads `.data`) no gradient flows. Sides are cut to whole patches.

        Returns:
          [B, 1 + rows * columns, D].
        """
        return self.encoder.before_last(self._embedded(image))

    def hidden(self, image: jax.Array, layer: int) -> jax.Array:
        """transformers' `hidden_states[layer]`: -1 after the last block (not normed), -2 before it.

        Args:
          image: as for `trunk`. layer: -(layers + 1) to layers; 0 is the input of the first block.

        Returns:
          [B, 1 + rows * columns, D].

        Raises:
          ValueError: there is no such layer.
        """
        blocks = layer if layer >= 0 else self.config.layers + 1 + layer
        if not 0 <= blocks <= self.config.layers:
            raise ValueError(
                f"vision tower: expected layer {-self.config.layers - 1} to {self.config.layers}, "
                f"found {layer}"
            )
        if blocks == self.config.layers:
            return self.last_hidden(self.trunk(image))
        return self.encoder.before_last(self._embedded(image), blocks)

    def _embedded(self, image: jax.Array) -> jax.Array:
        """Input of the first block."""
        side = self.config.patch_size
        dtype = self.patch_embedding.dtype
        batch, rows, columns = image.shape[0], image.shape[1] // side, image.shape[2] // side
        pixels = normalise(image)[:, : rows * side, : columns * side].astype(dtype)
        patches = pixels.reshape(batch, rows, side, columns, side, 3).transpose(0, 1, 3, 2, 4, 5)
        tokens = patches.reshape(batch, rows * columns, -1) @ self.patch_embedding.reshape(
            -1, self.config.width
        )
        first = jnp.broadcast_to(self.class_embedding, (batch, 1, self.config.width))
        x = jnp.concatenate([first, tokens], axis=1) + self._positions(rows, columns)
        return self.pre_norm(x)

    def pooled(self, trunk: jax.Array) -> jax.Array:
        """Normed class token after the last block: [B, T, D] -> [B, D]."""
        at = jnp.broadcast_to(jnp.arange(trunk.shape[1]) == 0, trunk.shape[:2])
        return self.post_norm(self.encoder.last.one(trunk, at))

    def dense(self, trunk: jax.Array) -> jax.Array:
        """Normed patch tokens of the attention-free last block: [B, T, D] -> [B, T - 1, D]."""
        return self.post_norm(self.encoder.last.values_only(trunk)[:, 1:])

    def last_hidden(self, trunk: jax.Array) -> jax.Array:
        """All tokens after the last block, not normed: [B, T, D] -> [B, T, D]."""
        return self.encoder.last(trunk)

    def _positions(self, rows: int, columns: int) -> jax.Array:
        table, grid = self.position_embedding, self.config.grid
        if (rows, columns) == (grid, grid):
            return table
        table = jax.lax.stop_gradient(table)
        resized = resize_grid(table[1:].reshape(grid, grid, -1), (rows, columns))
        return jnp.concatenate(
            [table[:1], resized.reshape(rows * columns, -1).astype(table.dtype)], axis=0
        )


def normalise(image: jax.Array) -> jax.Array:
    """uint8 pixels to float32 (x / 255 - mean) / std; float images are taken as normalised."""
    if image.dtype != jnp.uint8:
        return image
    mean, std = jnp.asarray(IMAGE_MEAN, jnp.float32), jnp.asarray(IMAGE_STD, jnp.float32)
    return (image.astype(jnp.float32) / 255.0 - mean) / std


class TextTower(nn.Module):
    """Token embedding, causal blocks, final norm. `positions` default to CLIP's own table."""

    config: TextConfig
    execution: Execution = Execution()

    def setup(self) -> None:
        c = self.config
        self.token_embedding = self.param(
            "token_embedding", boxed(_normal(0.02), ("vocab", "embed")), (c.vocab_size, c.width)
        )
        self.position_embedding = self.param(
            "position_embedding", boxed(_normal(0.02), ("pos", "embed")), (c.context_short, c.width)
        )
        self.encoder = _Blocks(
            Block(c.width, c.heads, c.mlp, c.layers, True, self.execution.attention, parent=None),
            c.layers,
            self.execution,
        )
        self.final_norm = LayerNorm()

    def trunk(self, ids: jax.Array, positions: jax.Array | None = None) -> jax.Array:
        """Input of the last block: int [B, L] (and position rows [>= L, D]) -> [B, L, D].

        Raises:
          ValueError: more tokens than positions.
        """
        table = self.position_embedding if positions is None else positions
        length = ids.shape[1]
        if length > table.shape[0]:
            raise ValueError(
                f"text: expected at most {table.shape[0]} tokens, found ids {ids.shape}; "
                "shorten the texts or use the long position table"
            )
        x = jnp.take(self.token_embedding, ids, axis=0) + table[:length]
        return self.encoder.before_last(x)

    def pooled(self, trunk: jax.Array, ids: jax.Array) -> jax.Array:
        """Normed token at the first eos (or the first token, if there is none): -> [B, D].

        With `pool="highest"`, at the first token of the highest id instead.
        """
        highest = self.config.pool == "highest"
        end = jnp.argmax(ids if highest else ids == self.config.eos_id, axis=1)
        at = jnp.arange(ids.shape[1])[None, :] == end[:, None]
        return self.final_norm(self.encoder.last.one(trunk, at))

    def last_hidden(self, trunk: jax.Array) -> jax.Array:
        """All tokens after the last block and the final norm: [B, L, D] -> [B, L, D]."""
        return self.final_norm(self.encoder.last(trunk))
