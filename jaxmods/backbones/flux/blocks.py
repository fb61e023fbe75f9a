"""The two kinds of blocks of FLUX.1, and the embedding of time, guidance and pooled text.

Shape legend:
  B batch   S tokens of one stream   T tokens of all streams   D width   H heads   K head width

All initialisation is DiT's adaLN-Zero (modulation and output start at zero, so that every block
starts as the identity); Black Forest Labs have published none.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmods.backbones.flux.config import TIME_FEATURES, FluxConfig
from jaxmods.backbones.flux.rope import Rope, apply_rope
from jaxmods.nn.attention import Implementation, attention
from jaxmods.nn.layers import Linear, RMSNorm, gelu_tanh, modulated_norm
from jaxmods.nn.positions import sinusoid
from jaxmods.partitioning import constrain

EPSILON = 1e-6

_xavier = nn.initializers.xavier_uniform()
_zeros = nn.initializers.zeros
_narrow = nn.initializers.normal(0.02)

KeyValue = tuple[jax.Array, jax.Array]


class Shared(NamedTuple):
    """What all blocks see.

    Attributes:
      time: [B, D], SiLU of the embedding of time, guidance and pooled text.
      rope: tables of all T tokens, in the order of the joint sequence.
      mask: bool, broadcastable to [B, H, T, keys]; False hides a key. None hides nothing, as
        published: pads of the text are attended to.
    """

    time: jax.Array
    rope: Rope
    mask: jax.Array | None = None


class Mlp(nn.Module):
    """fc2(silu(fc1 x)): [B, in] -> [B, D]."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, in] -> [B, D]."""
        hidden = Linear(self.width, ("channels", "embed"), kernel_init=_narrow, name="fc1")(x)
        hidden = jax.nn.silu(hidden.astype(jnp.float32))
        return Linear(self.width, ("embed", "mlp"), kernel_init=_narrow, name="fc2")(hidden)


class TimeText(nn.Module):
    """The vector that modulates every block: time, guidance and pooled text, embedded and added.

    Attributes:
      config: sizes.
      round_time: round time and guidance to the compute dtype before and after the factor 1000,
        as diffusers does in half precision (0.98 is 980 there, not 980.0000).
    """

    config: FluxConfig
    round_time: bool = False

    @nn.compact
    def __call__(
        self, timestep: jax.Array, guidance: jax.Array | None, pooled: jax.Array
    ) -> jax.Array:
        """Embeds.

        Args:
          timestep: float [B], noise level sigma, 0 (data) to 1 (noise).
          guidance: float [B], the guidance scale itself (3.5), if the model embeds one.
          pooled: [B, pooled_width].

        Returns:
          [B, D].

        Raises:
          ValueError: guidance given to a model without, or the reverse.
        """
        if (guidance is not None) != self.config.guidance:
            raise ValueError(
                "flux guidance: expected a scale per example for a model with guidance embedding "
                f"and none otherwise, found {'none' if guidance is None else 'one'} with "
                f"config.guidance={self.config.guidance}"
            )
        width = self.config.width
        pooled_embedding = Mlp(width, name="pooled_embedder")(pooled)
        total = Mlp(width, name="time_embedder")(self._features(timestep, pooled_embedding.dtype))
        if guidance is not None:
            features = self._features(guidance, pooled_embedding.dtype)
            total = total + Mlp(width, name="guidance_embedder")(features)
        return total + pooled_embedding

    def _features(self, value: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """float [B] -> float32 [B, TIME_FEATURES]."""
        if self.round_time:
            thousandths = (value.astype(dtype) * jnp.asarray(1000, dtype)).astype(dtype)
        else:
            thousandths = value.astype(jnp.float32) * 1000.0
        return sinusoid(thousandths, TIME_FEATURES)


class Projections(nn.Module):
    """Queries, keys and values of a stream, each query and key RMS-normed, and the way back.

    `to_out` exists only where it is used (single blocks put theirs into their own output product).
    """

    config: FluxConfig

    def setup(self) -> None:
        width = self.config.width
        self.to_q = Linear(width, ("embed", "heads"), kernel_init=_xavier)
        self.to_k = Linear(width, ("embed", "heads"), kernel_init=_xavier)
        self.to_v = Linear(width, ("embed", "heads"), kernel_init=_xavier)
        self.norm_q = RMSNorm(EPSILON)
        self.norm_k = RMSNorm(EPSILON)
        self.to_out = Linear(width, ("heads", "embed"), kernel_init=_xavier)

    def split(self, x_BSD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """[B, S, D] -> query, key and value [B, H, S, K]."""
        q, k, v = (self._heads(linear(x_BSD)) for linear in (self.to_q, self.to_k, self.to_v))
        return self.norm_q(q), self.norm_k(k), v

    def join(self, mixed_BSD: jax.Array) -> jax.Array:
        """Output projection, [B, S, D] -> [B, S, D]."""
        return self.to_out(mixed_BSD)

    def _heads(self, x_BSD: jax.Array) -> jax.Array:
        batch, length, _ = x_BSD.shape
        split = x_BSD.reshape(batch, length, self.config.heads, self.config.head_dim)
        return split.transpose(0, 2, 1, 3)


class FeedForward(nn.Module):
    """fc2(gelu(fc1 x)), GELU by tanh: [B, S, D] -> [B, S, D]."""

    config: FluxConfig

    @nn.compact
    def __call__(self, x_BSD: jax.Array) -> jax.Array:
        """[B, S, D] -> [B, S, D]."""
        c = self.config
        hidden = Linear(c.mlp, ("embed", "mlp"), kernel_init=_xavier, name="fc1")(x_BSD)
        return Linear(c.width, ("mlp", "embed"), kernel_init=_xavier, name="fc2")(gelu_tanh(hidden))


class Stream(nn.Module):
    """The weights of one stream in a double block: modulation, projections, MLP."""

    config: FluxConfig

    def setup(self) -> None:
        self.modulation = Linear(6 * self.config.width, ("embed", "mlp"), kernel_init=_zeros)
        self.attn = Projections(self.config)
        self.ff = FeedForward(self.config)

    def modulate(self, time_BD: jax.Array) -> list[jax.Array]:
        """Shift, scale, gate of the attention, then of the MLP: six [B, 1, D]."""
        return jnp.split(self.modulation(time_BD)[:, None], 6, axis=-1)

    def project(
        self, x_BSD: jax.Array, modulation: list[jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Query, key and value [B, H, S, K] of the modulated tokens."""
        shift, scale = modulation[:2]
        return self.attn.split(modulated_norm(x_BSD, shift, scale, EPSILON))

    def update(
        self, x_BSD: jax.Array, mixed_BSD: jax.Array, modulation: list[jax.Array]
    ) -> jax.Array:
        """Tokens after attention (whose result is `mixed_BSD`) and MLP."""
        _, _, gate, mlp_shift, mlp_scale, mlp_gate = modulation
        x_BSD = x_BSD + gate * self.attn.join(mixed_BSD)
        y = modulated_norm(x_BSD, mlp_shift, mlp_scale, EPSILON)
        return constrain(x_BSD + mlp_gate * self.ff(y), ("batch", "seq", None))


class DoubleBlock(nn.Module):
    """Streams with weights of their own and one attention over all their tokens.

    Attributes:
      config: sizes.
      streams: their names, in the order of the joint sequence; FLUX has text and image.
      implementation: of attention.
    """

    config: FluxConfig
    streams: tuple[str, ...] = ("text", "image")
    implementation: Implementation = "auto"

    @nn.compact
    def __call__(
        self, tokens: dict[str, jax.Array], shared: Shared, extra: KeyValue | None = None
    ) -> dict[str, jax.Array]:
        """One block.

        Args:
          tokens: [B, S, D] by stream.
          shared: see `Shared`.
          extra: further keys and values [B, H, R, K], put behind those of the tokens as they are.

        Returns:
          The same tree.
        """
        parts = [Stream(self.config, name=name) for name in self.streams]
        values = [tokens[name] for name in self.streams]
        modulations = [part.modulate(shared.time) for part in parts]
        qkv = [part.project(x, m) for part, x, m in zip(parts, values, modulations, strict=True)]
        q, k, v = (jnp.concatenate(arrays, axis=2) for arrays in zip(*qkv, strict=True))
        mixed = attend(q, k, v, shared, extra, self.implementation)
        result, start = {}, 0
        for name, part, x, m in zip(self.streams, parts, values, modulations, strict=True):
            result[name] = part.update(x, mixed[:, start : start + x.shape[1]], m)
            start += x.shape[1]
        return result


class SingleBlock(nn.Module):
    """Attention and MLP side by side on the joint sequence, with one product for both outputs."""

    config: FluxConfig
    implementation: Implementation = "auto"

    def setup(self) -> None:
        c = self.config
        self.modulation = Linear(3 * c.width, ("embed", "mlp"), kernel_init=_zeros)
        self.attn = Projections(c)
        self.proj_mlp = Linear(c.mlp, ("embed", "mlp"), kernel_init=_xavier)
        # Its rows belong to two inputs that are each split over devices, so the rows are not.
        self.proj_out = Linear(c.width, ("proj", "embed"), kernel_init=_xavier)

    def __call__(
        self, x_BTD: jax.Array, shared: Shared, extra: KeyValue | None = None
    ) -> jax.Array:
        """[B, T, D] -> [B, T, D]; arguments as `DoubleBlock`."""
        shift, scale, gate = jnp.split(self.modulation(shared.time)[:, None], 3, axis=-1)
        y = modulated_norm(x_BTD, shift, scale, EPSILON)
        mixed = attend(*self.attn.split(y), shared, extra, self.implementation)
        update = self.proj_out(mixed, gelu_tanh(self.proj_mlp(y)))
        return constrain(x_BTD + gate * update, ("batch", "seq", None))


def attend(
    q_BHTK: jax.Array,
    k_BHTK: jax.Array,
    v_BHTK: jax.Array,
    shared: Shared,
    extra: KeyValue | None = None,
    implementation: Implementation = "auto",
) -> jax.Array:
    """Attention of all tokens to all tokens, and to `extra` keys, heads joined again.

    Args:
      q_BHTK, k_BHTK: normed, not turned. v_BHTK: values.
      extra: keys, turned where they have positions, and values [B, H, R, K].

    Returns:
      [B, T, D].
    """
    q, k, v = apply_rope(q_BHTK, shared.rope), apply_rope(k_BHTK, shared.rope), v_BHTK
    if extra is not None:
        k = jnp.concatenate([k, extra[0].astype(k.dtype)], axis=2)
        v = jnp.concatenate([v, extra[1].astype(v.dtype)], axis=2)
    q = constrain(q, ("batch", "heads", "seq", None))
    k, v = (constrain(x, ("batch", "heads", None, None)) for x in (k, v))
    mixed = attention(q, k, v, mask=shared.mask, implementation=implementation)
    batch, heads, length, width = mixed.shape
    return mixed.transpose(0, 2, 1, 3).reshape(batch, length, heads * width)
