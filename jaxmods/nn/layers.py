"""Linear, norms and activation, with logical axes on every parameter."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmods.partitioning import keep_whole

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


@_from_input
def gelu_tanh(x: jax.Array) -> jax.Array:
    """GELU by its approximation with tanh, computed in float32; dtype of x."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


def dense(params: Mapping[str, Any], *parts: jax.Array) -> jax.Array:
    """y = x kernel (+ bias) (+ low-rank adapters), in the dtype of the kernel.

    Args:
      params: "kernel" [in, out]; "bias" [out] where there is one; "lora" where
        `jaxmods.nn.lora.attach` put it: by name a dict of "a" [in, r], "b" [r, out], "scale"
        float32 (a scalar, or weights that broadcast with the leading axes of x), and for dropout
        "key" and "rate".
      parts: x [..., in], or several arrays that make x side by side. These are not put together:
        each takes its rows of the kernel, so that a split of their last axes over devices stays.

    Returns:
      [..., out].
    """
    y = _product(parts, params["kernel"])
    if "bias" in params:
        y = y + params["bias"]
    for adapter in params.get("lora", {}).values():
        y = y + _low_rank(parts, adapter).astype(y.dtype)
    return y


def _product(parts: Sequence[jax.Array], kernel: jax.Array) -> jax.Array:
    """[x1, x2, ...] kernel without putting the parts together, in the dtype of the kernel."""
    if len(parts) == 1:
        return parts[0].astype(kernel.dtype) @ kernel
    return _split_product(tuple(parts), kernel)


@_from_input  # else the rows of the kernel are stored for the backward pass, once per block
def _split_product(parts: tuple[jax.Array, ...], kernel: jax.Array) -> jax.Array:
    """`_product` of two parts or more."""
    rows = jnp.split(kernel, np.cumsum([part.shape[-1] for part in parts])[:-1])
    y, *more = (x.astype(kernel.dtype) @ w for x, w in zip(parts, rows, strict=True))
    for term in more:
        y = y + term
    return y


def _low_rank(parts: Sequence[jax.Array], adapter: Mapping[str, jax.Array]) -> jax.Array:
    """scale * dropout(x) a b, in the dtype of a and b: [..., in] -> [..., out]."""
    a, b, scale = adapter["a"], adapter["b"], adapter["scale"]
    if "key" in adapter:
        kept = 1.0 - adapter["rate"]
        keys = jax.random.split(adapter["key"], len(parts))
        parts = [
            jnp.where(jax.random.bernoulli(key, kept, x.shape), x / kept.astype(x.dtype), 0)
            for x, key in zip(parts, keys, strict=True)
        ]
    # Stored in parts, gathered here: otherwise the TPU compiler may multiply by the ranks of one
    # device at a time (libtpu 0.0.52, fsdp 16 of a v5p-32: a third more time in products).
    a, b = keep_whole(a), keep_whole(b, axis=-2)
    narrow = _product(parts, a) * (scale[..., None] if scale.ndim else scale)
    return narrow.astype(a.dtype) @ b


class Linear(nn.Module):
    """y = x kernel (+ bias), computed in the dtype of the kernel; see `dense`.

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
    def __call__(self, *parts: jax.Array) -> jax.Array:
        """[..., in], or parts of it side by side, -> [..., features]."""
        kernel = self.param(
            "kernel",
            boxed(self.kernel_init, self.axes),
            (sum(part.shape[-1] for part in parts), self.features),
        )
        params = {"kernel": kernel}
        if self.use_bias:
            params["bias"] = self.param(
                "bias",
                boxed(nn.initializers.zeros, (self.axes[1],)),
                (self.features,),
            )
        if self.has_variable("params", "lora"):
            params["lora"] = self.get_variable("params", "lora")
        inside, outside = (name == "embed" for name in self.axes)
        y = dense(params, *(keep_whole(part) if inside else part for part in parts))
        return keep_whole(y) if outside else y


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


class RMSNorm(nn.Module):
    """RMS norm over the last axis; statistics in float32, result in the dtype of the scale."""

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D]."""
        scale = self.param("scale", boxed(nn.initializers.ones, ("norm",)), (x.shape[-1],))
        return rms_norm(x, scale, self.epsilon)


@functools.partial(_from_input, static_argnums=2)
def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """x / sqrt(mean(x^2) + epsilon) * scale over the last axis, in float32.

    Args:
      x: [..., D]. scale: [D].

    Returns:
      [..., D] in the dtype of `scale`.
    """
    wide = x.astype(jnp.float32)
    square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    y = wide * jax.lax.rsqrt(square + epsilon)
    return (y * scale.astype(jnp.float32)).astype(scale.dtype)


@functools.partial(_from_input, static_argnums=3)
def modulated_norm(x: jax.Array, shift: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """Layer norm without parameters of its own, then y * (1 + scale) + shift, in float32 (adaLN,
    Peebles and Xie 2022, arXiv 2212.09748).

    Args:
      x: [..., D]. shift, scale: broadcast with it, as [B, 1, D].

    Returns:
      [..., D] in the dtype of `shift`.
    """
    wide = x.astype(jnp.float32)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    y = centred * jax.lax.rsqrt(variance + epsilon)
    return (y * (1.0 + scale.astype(jnp.float32)) + shift.astype(jnp.float32)).astype(shift.dtype)
