"""Convolution, group norm and resizing of pictures, channels last.

Shape legend: B batch   H, W rows and columns   C, D channels in and out.
"""

from __future__ import annotations

import functools
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmods.nn.layers import Initializer, boxed

# What PyTorch starts a convolution with: U(+-1 / sqrt(fan in)).
_default = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class Conv2d(nn.Module):
    """2-D convolution (cross-correlation) with bias, computed in the dtype of the kernel.

    Attributes:
      features: output channels.
      size: side of the kernel.
      stride: step in both directions.
      padding: zeros (before, after) in both directions; None keeps the size at stride 1.
      kernel_init: initialiser of the kernel [size, size, in, out].
    """

    features: int
    size: int = 3
    stride: int = 1
    padding: tuple[int, int] | None = None
    kernel_init: Initializer = _default

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, H', W', features]."""
        kernel = self.param(
            "kernel",
            boxed(self.kernel_init, ("patch", "patch", "channels", "embed")),
            (self.size, self.size, x_BHWC.shape[-1], self.features),
        )
        bias = self.param("bias", boxed(nn.initializers.zeros, ("embed",)), (self.features,))
        padding = ((self.size - 1) // 2, self.size // 2) if self.padding is None else self.padding
        y = jax.lax.conv_general_dilated(
            x_BHWC.astype(kernel.dtype),
            kernel,
            (self.stride, self.stride),
            (padding, padding),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y + bias


class GroupNorm(nn.Module):
    """Group norm over space and the channels of a group; float32 inside, result in the dtype of
    the scale.

    Attributes:
      groups: number of groups; divides the channels.
      epsilon: added to the variance.
      activation: applied in float32 before the result is rounded.
    """

    groups: int
    epsilon: float = 1e-6
    activation: Literal["none", "silu"] = "none"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, ..., C] -> [B, ..., C]."""
        channels = x.shape[-1]
        if channels % self.groups:
            raise ValueError(
                f"GroupNorm: expected channels that {self.groups} groups divide, found {channels}"
            )
        scale = self.param("scale", boxed(nn.initializers.ones, ("norm",)), (channels,))
        bias = self.param("bias", boxed(nn.initializers.zeros, ("norm",)), (channels,))
        return group_norm(x, scale, bias, self.groups, self.epsilon, self.activation)


# As the norms of `layers`: the backward pass keeps the input and computes the rest again.
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(3, 4, 5))
def group_norm(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    groups: int,
    epsilon: float,
    activation: Literal["none", "silu"],
) -> jax.Array:
    """activation((x - mean) / sqrt(var + epsilon) * scale + bias), moments per row and group.

    Moments are taken per channel first: a reshape of the channels into groups of the whole picture
    would not keep them on the lanes of a TPU.

    Args:
      x: [B, ..., C]. scale, bias: [C].

    Returns:
      [B, ..., C] in the dtype of `scale`.
    """
    space = tuple(range(1, x.ndim - 1))

    def over_group(per_channel: jax.Array) -> jax.Array:
        """Means over space [B, 1, ..., C] -> means over the group of each channel."""
        shape = per_channel.shape
        split = per_channel.reshape(*shape[:-1], groups, shape[-1] // groups)
        mean = jnp.mean(split, axis=-1, keepdims=True)
        return jnp.broadcast_to(mean, split.shape).reshape(shape)

    wide = x.astype(jnp.float32)
    centred = wide - over_group(jnp.mean(wide, axis=space, keepdims=True))
    variance = over_group(jnp.mean(jnp.square(centred), axis=space, keepdims=True))
    factor = jax.lax.rsqrt(variance + epsilon) * scale.astype(jnp.float32)
    y = centred * factor + bias.astype(jnp.float32)
    if activation == "silu":
        y = y * jax.nn.sigmoid(y)
    return y.astype(scale.dtype)


def double_nearest(x_BHWC: jax.Array) -> jax.Array:
    """Every pixel four times: [B, H, W, C] -> [B, 2 H, 2 W, C]."""
    batch, rows, columns, channels = x_BHWC.shape
    wide = jnp.broadcast_to(x_BHWC[:, :, None, :, None], (batch, rows, 2, columns, 2, channels))
    return wide.reshape(batch, 2 * rows, 2 * columns, channels)
