"""AutoencoderKL, the picture autoencoder of latent diffusion (Rombach et al. 2022, arXiv
2112.10752, section 3.1 and appendix G), as diffusers' class of this name.

Published sizes:
  FLUX.1   16 latent channels, no quantisation convolutions, 83,819,683 parameters
  SD, SDXL  4 latent channels, 1x1 convolutions around the latents, 83,653,863 parameters

Shape legend:
  B batch   H, W rows and columns of the picture   h, w of the latents (a `factor`-th)
  C channels   Z latent channels   T = h w tokens of the attention

Pictures are channels last and in [-1, 1]; so are latents, [B, h, w, Z].
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmods.backbones.autoencoder_kl.config import AutoencoderConfig
from jaxmods.nn.attention import Implementation, attention
from jaxmods.nn.conv import Conv2d, GroupNorm, double_nearest
from jaxmods.nn.layers import Linear
from jaxmods.partitioning import constrain

_SPACE = ("batch", "seq", None, None)  # rows may be split where the rules split sequences


@dataclasses.dataclass(frozen=True)
class Posterior:
    """A diagonal Gaussian over latents, float32 whatever the network computes in.

    Attributes:
      mean: [B, h, w, Z].
      logvar: [B, h, w, Z], clamped to [-30, 20].
    """

    mean: jax.Array
    logvar: jax.Array

    def mode(self) -> jax.Array:
        """The mean."""
        return self.mean

    def at(self, noise: jax.Array) -> jax.Array:
        """mean + exp(logvar / 2) * noise, for given standard normal noise [B, h, w, Z]."""
        return self.mean + jnp.exp(0.5 * self.logvar) * noise

    def sample(self, rng: jax.Array) -> jax.Array:
        """One draw, [B, h, w, Z]."""
        return self.at(jax.random.normal(rng, self.mean.shape, self.mean.dtype))

    def kl(self) -> jax.Array:
        """KL divergence from the standard normal per row, summed over its latents: [B]."""
        terms = jnp.square(self.mean) + jnp.exp(self.logvar) - 1.0 - self.logvar
        return 0.5 * jnp.sum(terms, axis=(1, 2, 3))


jax.tree_util.register_dataclass(Posterior, data_fields=["mean", "logvar"], meta_fields=[])


class ResNet(nn.Module):
    """x (or its 1x1 convolution) + conv(silu(norm(conv(silu(norm x)))))."""

    features: int
    groups: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, H, W, features]."""
        y = GroupNorm(self.groups, activation="silu", name="norm1")(x)
        y = Conv2d(self.features, name="conv1")(y)
        y = GroupNorm(self.groups, activation="silu", name="norm2")(y)
        y = Conv2d(self.features, name="conv2")(y)
        if x.shape[-1] != self.features:
            x = Conv2d(self.features, size=1, name="shortcut")(x)
        return constrain(x + y, _SPACE)


class MidAttention(nn.Module):
    """x + out(attention(norm x)): one head as wide as the channels, over all positions."""

    groups: int
    implementation: Implementation = "auto"

    @nn.compact
    def __call__(self, x_BhwC: jax.Array) -> jax.Array:
        """[B, h, w, C] -> [B, h, w, C]."""
        batch, rows, columns, channels = x_BhwC.shape
        y = GroupNorm(self.groups, name="norm")(x_BhwC).reshape(batch, 1, rows * columns, channels)

        def linear(name: str) -> Linear:
            return Linear(channels, ("channels", "embed"), name=name)

        mixed = attention(
            linear("q")(y), linear("k")(y), linear("v")(y), implementation=self.implementation
        )
        return constrain(x_BhwC + linear("out")(mixed).reshape(x_BhwC.shape), _SPACE)


class Middle(nn.Module):
    """ResNet, attention (where the config has it), ResNet, at the lowest resolution."""

    config: AutoencoderConfig
    implementation: Implementation = "auto"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, h, w, C] -> [B, h, w, C]."""
        c = self.config
        x = ResNet(c.channels[-1], c.groups, name="resnet_0")(x)
        if c.mid_attention:
            x = MidAttention(c.groups, self.implementation, name="attention")(x)
        return ResNet(c.channels[-1], c.groups, name="resnet_1")(x)


class Encoder(nn.Module):
    """Pictures to the parameters of a Gaussian, before the quantisation convolution."""

    config: AutoencoderConfig
    implementation: Implementation = "auto"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, picture channels] -> [B, h, w, 2 Z]."""
        c = self.config
        x = Conv2d(c.channels[0], name="conv_in")(x)
        for level, features in enumerate(c.channels):
            for n in range(c.resnets):
                x = ResNet(features, c.groups, name=f"down_{level}_resnet_{n}")(x)
            if level + 1 < len(c.channels):
                # One row and one column of zeros, below and right only.
                x = Conv2d(features, stride=2, padding=(0, 1), name=f"down_{level}_sample")(x)
        x = Middle(c, self.implementation, name="middle")(x)
        x = GroupNorm(c.groups, activation="silu", name="norm_out")(x)
        return Conv2d(2 * c.latent_channels, name="conv_out")(x)


class Decoder(nn.Module):
    """Latents to pictures, after the quantisation convolution."""

    config: AutoencoderConfig
    implementation: Implementation = "auto"

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        """[B, h, w, Z] -> [B, H, W, picture channels]."""
        c = self.config
        x = Conv2d(c.channels[-1], name="conv_in")(z)
        x = Middle(c, self.implementation, name="middle")(x)
        for level, features in enumerate(reversed(c.channels)):
            for n in range(c.resnets + 1):
                x = ResNet(features, c.groups, name=f"up_{level}_resnet_{n}")(x)
            if level + 1 < len(c.channels):
                x = Conv2d(features, name=f"up_{level}_sample")(double_nearest(x))
                # Where the pictures are wanted whole everywhere, that must not reach up to here.
                x = constrain(x, _SPACE)
        x = GroupNorm(c.groups, activation="silu", name="norm_out")(x)
        return Conv2d(c.picture_channels, name="conv_out")(x)


class AutoencoderKL(nn.Module):
    """Encoder and decoder. Latents here are not scaled; see `AutoencoderConfig.scale`.

    Attributes:
      config: sizes.
      implementation: of the attention in the middle, see `jaxmods.nn.attention`.
    """

    config: AutoencoderConfig
    implementation: Implementation = "auto"

    def setup(self) -> None:
        c = self.config
        self.encoder = Encoder(c, self.implementation)
        self.decoder = Decoder(c, self.implementation)
        if c.quant_conv:
            self.quant = Conv2d(2 * c.latent_channels, size=1)
        if c.post_quant_conv:
            self.post_quant = Conv2d(c.latent_channels, size=1)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """The picture decoded from the mean of its latents: [B, H, W, C] -> [B, H, W, C]."""
        return self.decode(self.encode(pixels).mode())

    def encode(self, pixels: jax.Array) -> Posterior:
        """The latents' distribution.

        Args:
          pixels: float [B, H, W, picture channels] in [-1, 1]; H and W multiples of the factor.

        Raises:
          ValueError: other channels, or sides that are no multiples of the factor.
        """
        c = self.config
        if pixels.ndim != 4 or pixels.shape[-1] != c.picture_channels:
            raise ValueError(
                f"autoencoder: expected pictures [B, H, W, {c.picture_channels}], found "
                f"{pixels.shape}; channels come last"
            )
        if pixels.shape[1] % c.factor or pixels.shape[2] % c.factor:
            raise ValueError(
                f"autoencoder: expected height and width to be multiples of {c.factor}, found "
                f"{pixels.shape[1]} x {pixels.shape[2]}; resize, crop or pad the pictures"
            )
        moments = self.encoder(constrain(pixels, _SPACE))
        if c.quant_conv:
            moments = self.quant(moments)
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return Posterior(mean, jnp.clip(logvar, -30.0, 20.0))

    def decode(self, latents: jax.Array) -> jax.Array:
        """Pictures, about [-1, 1] and not clamped: [B, h, w, Z] -> [B, H, W, picture channels].

        Raises:
          ValueError: other channels.
        """
        c = self.config
        if latents.ndim != 4 or latents.shape[-1] != c.latent_channels:
            raise ValueError(
                f"autoencoder: expected latents [B, h, w, {c.latent_channels}], found "
                f"{latents.shape}; channels come last"
            )
        latents = constrain(latents, _SPACE)
        if c.post_quant_conv:
            latents = self.post_quant(latents)
        return constrain(self.decoder(latents), _SPACE)
