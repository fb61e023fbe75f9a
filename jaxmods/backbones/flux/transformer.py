"""The FLUX.1 transformer (Black Forest Labs 2024, no paper; Kontext: arXiv 2506.15742; rectified
flow and joint attention: Esser et al. 2024, arXiv 2403.03206), as diffusers'
FluxTransformer2DModel.

Published sizes, parameters:
  dev, Kontext-dev   19 double and 38 single blocks of width 3072   11,901,408,320
  schnell            the same without guidance embedding            11,891,178,560

Shape legend:
  B batch   S_t text tokens   S_i image tokens   T = S_t + S_i   D width   H heads   K head width
  C channels of a packed image token (64)   L blocks of one kind

Conditions are lists of tokens with positions. All image lists (noise first, then condition
pictures) go through one embedding and make one sequence; so do all text lists, which come before
the image. The velocity comes back for all image tokens, and the caller keeps those of the noise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmods.backbones.flux.blocks import (
    EPSILON,
    DoubleBlock,
    KeyValue,
    Shared,
    SingleBlock,
    TimeText,
)
from jaxmods.backbones.flux.config import FluxConfig
from jaxmods.backbones.flux.rope import Rope, rope_table
from jaxmods.backbones.flux.tokens import Tokens
from jaxmods.nn.layers import Linear, modulated_norm
from jaxmods.nn.stack import Execution, run, stacked_param
from jaxmods.partitioning import constrain

_xavier = nn.initializers.xavier_uniform()
_zeros = nn.initializers.zeros


@dataclasses.dataclass(frozen=True)
class ExtraKeys:
    """Keys and values that every block attends to besides its tokens (adapters by attention).

    Attributes:
      of_block: `(parameters of one block) -> (keys, values)`, each [B, H, R, K], keys turned by
        their positions if they have any.
      double, single: parameters of all blocks of a kind, with a leading axis of blocks; None for
        no extra keys in these blocks.
    """

    of_block: Callable[[Any], KeyValue]
    double: Any = None
    single: Any = None


@dataclasses.dataclass(frozen=True)
class Residuals:
    """What a ControlNet adds to the image tokens behind the blocks.

    Attributes:
      double, single: [n, B, S_i, D] for n <= L blocks; None for nothing. Entry i // ceil(L / n) is
        added behind block i.
      repeat: entry i % n behind double block i instead.
    """

    double: jax.Array | None = None
    single: jax.Array | None = None
    repeat: bool = False


NOTHING = Residuals()


class FluxTransformer(nn.Module):
    """The whole model. `__call__` is all of it; its steps are methods, for systems that do
    something between them.

    Attributes:
      config: sizes.
      execution: how the blocks run.
      round_time: see `TimeText`.
    """

    config: FluxConfig
    execution: Execution = Execution()
    round_time: bool = False

    def setup(self) -> None:
        c = self.config
        self.x_embedder = Linear(c.width, ("channels", "embed"), kernel_init=_xavier)
        self.context_embedder = Linear(c.width, ("channels", "embed"), kernel_init=_xavier)
        self.time_text = TimeText(c, self.round_time)
        token = jnp.zeros((1, 1, c.width))
        shared = Shared(jnp.zeros((1, c.width)), Rope(*np.zeros((2, 1, c.head_dim), np.float32)))
        double, single = self._double_block(("text", "image")), self._single_block()
        self.double_blocks = stacked_param(
            self,
            "double_blocks",
            lambda rng: double.init(rng, {"text": token, "image": token}, shared)["params"],
            c.double_layers,
        )
        self.single_blocks = stacked_param(
            self,
            "single_blocks",
            lambda rng: single.init(rng, token, shared)["params"],
            c.single_layers,
        )
        self.norm_out = Linear(2 * c.width, ("embed", "mlp"), kernel_init=_zeros)
        self.proj_out = Linear(c.out_channels, ("embed", "channels"), kernel_init=_zeros)

    def __call__(
        self,
        image: Tokens | Sequence[Tokens],
        text: Tokens | Sequence[Tokens],
        pooled: jax.Array,
        timestep: jax.Array,
        guidance: jax.Array | None = None,
        *,
        rope: Rope | None = None,
        mask: jax.Array | None = None,
        residuals: Residuals = NOTHING,
        extra: ExtraKeys | None = None,
    ) -> jax.Array:
        """Velocity (noise - data) of every image token.

        Args:
          image: packed latents [B, *, C], noise first.
          text: states of the text encoder [B, *, text_width]; pads are attended to.
          pooled: [B, pooled_width] pooled text features.
          timestep: float [B], noise level sigma from 0 (data) to 1 (noise).
          guidance: float [B], the guidance scale (3.5), if the model embeds one.
          rope: tables of all T tokens, text first, instead of those of the lists' positions: for
            positions that come with the data.
          mask: see `Shared`.
          residuals: of a ControlNet.
          extra: further keys and values per block.

        Returns:
          [B, S_i, out_channels] in the compute dtype, that of the parameters.
        """
        images = [image] if isinstance(image, Tokens) else list(image)
        texts = [text] if isinstance(text, Tokens) else list(text)
        if rope is None:
            rope = self.rope(*texts, *images)
        shared = Shared(self.time(timestep, guidance, pooled), rope, mask)
        streams = {"text": self.embed_text(*texts), "image": self.embed_image(*images)}
        streams = self.double(streams, shared, residuals=residuals, extra=extra)
        length = streams["image"].shape[1]
        joint = self.single(
            jnp.concatenate([streams["text"], streams["image"]], axis=1),
            shared,
            image_tokens=length,
            residuals=residuals,
            extra=extra,
        )
        return self.head(joint[:, -length:], shared.time)

    def rope(self, *lists: Tokens) -> Rope:
        """Tables of the lists one behind the other."""
        ids = np.concatenate([tokens.ids for tokens in lists])
        return rope_table(ids, self.config.rope_axes, self.config.rope_theta)

    def time(self, timestep: jax.Array, guidance: jax.Array | None, pooled: jax.Array) -> jax.Array:
        """SiLU of the embedding of time, guidance and pooled text, [B, D]; see `TimeText`."""
        return jax.nn.silu(self.time_text(timestep, guidance, pooled))

    def embed_image(self, *lists: Tokens) -> jax.Array:
        """Packed latents as one stream, [B, S_i, D].

        Raises:
          ValueError: another number of channels than the model's.
        """
        return _embedded(self.x_embedder, lists, self.config.in_channels, "image tokens")

    def embed_text(self, *lists: Tokens) -> jax.Array:
        """Text states as one stream, [B, S_t, D].

        Raises:
          ValueError: another width than the model's.
        """
        return _embedded(self.context_embedder, lists, self.config.text_width, "text tokens")

    def double(
        self,
        streams: dict[str, jax.Array],
        shared: Shared,
        *,
        residuals: Residuals = NOTHING,
        extra: ExtraKeys | None = None,
        added: Mapping[str, Any] | None = None,
    ) -> dict[str, jax.Array]:
        """Tokens after all double blocks.

        Args:
          streams: [B, S, D] by name, in the order of the joint sequence: "text", "image", and
            further ones whose weights are in `added`.
          shared: with tables for the joint sequence.
          residuals, extra: as in `__call__`.
          added: by name of a further stream, its weights as in `double_blocks/text`, with a
            leading axis of blocks.
        """
        block = self._double_block(tuple(streams))

        def step(layer: dict[str, Any], x: dict[str, jax.Array]) -> dict[str, jax.Array]:
            keys = extra.of_block(layer["extra"]) if extra and "extra" in layer else None
            out: Any = block.apply({"params": layer["block"]}, x, shared, keys)
            if residuals.double is not None:
                out = out | {"image": out["image"] + _entry(residuals.double, layer["residual"])}
            return cast(dict[str, jax.Array], out)

        layers: dict[str, Any] = {"block": {**self.double_blocks, **(added or {})}}
        count = self.config.double_layers
        if extra is not None and extra.double is not None:
            layers["extra"] = extra.double
        if residuals.double is not None:
            layers["residual"] = _places(count, residuals.double, residuals.repeat)
        streams = {name: constrain(x, ("batch", "seq", None)) for name, x in streams.items()}
        return run(step, layers, streams, policy=self.execution.remat, unroll=self.execution.unroll)

    def single(
        self,
        joint_BTD: jax.Array,
        shared: Shared,
        *,
        image_tokens: int,
        residuals: Residuals = NOTHING,
        extra: ExtraKeys | None = None,
    ) -> jax.Array:
        """The joint sequence after all single blocks.

        Args:
          joint_BTD: [B, T, D]; the last `image_tokens` are the image's.
          shared, residuals, extra: as in `double`.
        """
        block = self._single_block()
        text_tokens = joint_BTD.shape[1] - image_tokens

        def step(layer: dict[str, Any], x: jax.Array) -> jax.Array:
            keys = extra.of_block(layer["extra"]) if extra and "extra" in layer else None
            out: Any = block.apply({"params": layer["block"]}, x, shared, keys)
            if residuals.single is not None:
                here = _entry(residuals.single, layer["residual"])
                out = out + jnp.pad(here, ((0, 0), (text_tokens, 0), (0, 0)))
            return cast(jax.Array, out)

        layers = {"block": self.single_blocks}
        if extra is not None and extra.single is not None:
            layers["extra"] = extra.single
        if residuals.single is not None:
            layers["residual"] = _places(self.config.single_layers, residuals.single, False)
        joint_BTD = constrain(joint_BTD, ("batch", "seq", None))
        return run(
            step, layers, joint_BTD, policy=self.execution.remat, unroll=self.execution.unroll
        )

    def head(self, image_BSD: jax.Array, time_BD: jax.Array) -> jax.Array:
        """Velocity [B, S, out_channels] from image tokens; `time_BD` as from `time`."""
        scale, shift = jnp.split(self.norm_out(time_BD)[:, None], 2, axis=-1)
        return self.proj_out(modulated_norm(image_BSD, shift, scale, EPSILON))

    def _double_block(self, streams: tuple[str, ...]) -> DoubleBlock:
        return DoubleBlock(self.config, streams, self.execution.attention, parent=None)

    def _single_block(self) -> SingleBlock:
        return SingleBlock(self.config, self.execution.attention, parent=None)


def _embedded(embedder: Linear, lists: Sequence[Tokens], channels: int, what: str) -> jax.Array:
    for tokens in lists:
        if tokens.values.shape[-1] != channels:
            raise ValueError(
                f"flux {what}: expected [B, S, {channels}], found {list(tokens.values.shape)}"
            )
    return jnp.concatenate([embedder(tokens.values) for tokens in lists], axis=1)


def _places(layers: int, residuals: jax.Array, repeat: bool) -> jax.Array:
    """int32 [L]: which residual comes behind each block."""
    count = residuals.shape[0]
    block = np.arange(layers)
    return jnp.asarray(block % count if repeat else block // -(-layers // count), jnp.int32)


def _entry(residuals: jax.Array, place: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(residuals, place, keepdims=False)
