"""Linear, layer norm and activation, with logical axes on every parameter."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp

Initializer = Callable[..., jax.Array]


def boxed(init: Initializer, axes: tuple[str, ...]) -> Initializer:
    """`init` whose result carries logical axis names (one per dimension)."""
    return cast(Initializer, nn.with_logical_partitioning(init, axes))


# The backward pass keeps the input and computes the rest again: cheaper than to store it, and in a
# scan over blocks every stored array is written to and read back from memory once per block.
_from_input = functools.partial(jax.checkpoint, prevent_cse=False)


@_from_input
def quick_gelu(x: jax.Array) -> jax.Array:
    """x * sigmoid(1.702 x), the activation of OpenAI's CLIP."""
    return x * jax.nn.sigmoid(1.702 * x)


class Linear(nn.Module):
    """y = x kernel (+ bias), computed in the dtype of the kernel.

    Attributes:
      features: output width.
      axes: logical names of the kernel's two dimensions; the bias takes the second.
      use_bias: whether there is a bias (initialised to zero).
      kernel_init: initialiser of the kernel [in, out].
    """

    features: int
    axes: tuple[str, str]
    use_bias: bool = True
    kernel_init: Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., in] -> [..., features]."""
        kernel = self.param(
            "kernel",
            boxed(self.kernel_init, self.axes),
            (x.shape[-1], self.features),
        )
        y = x.astype(kernel.dtype) @ kernel
        if self.use_bias:
            y = y + self.param(
                "bias",
                boxed(nn.initializers.zeros, (self.axes[1],)),
                (self.features,),
            )
        return y


class LayerNorm(nn.Module):
    """Layer norm over the last axis; statistics in float32, result in the dtype of the scale."""

    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D]."""
        width = x.shape[-1]
        scale = self.param("scale", boxed(nn.initializers.ones, ("norm",)), (width,))
        bias = self.param("bias", boxed(nn.initializers.zeros, ("norm",)), (width,))
        return layer_norm(x, scale, bias, self.epsilon)


@functools.partial(_from_input, static_argnums=3)
def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    """(x - mean) / sqrt(var + epsilon) * scale + bias over the last axis, in float32.

    Args:
      x: [..., D]. scale, bias: [D].

    Returns:
      [..., D] in the dtype of `scale`.
    """
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide, axis=-1, keepdims=True)
    centred = wide - mean
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    y = centred * jax.lax.rsqrt(variance + epsilon)
    return (y * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(scale.dtype)
