"""Dropout whose mask is computed where it is used, never stored.

The mask of element `i` is a hash of `i` and of a 64-bit seed: a few integer operations that fuse
into the surrounding arithmetic, forwards and backwards, where drawing from the default generator
would cost more than the network around it. It depends on the element's place in the global array
only, so it is the same on any mesh.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

Seed = jax.Array


def make_seed(rng: jax.Array) -> Seed:
    """uint32 [2] from a typed key."""
    return jax.random.bits(rng, (2,), jnp.uint32)


def fold(seed: Seed, number: int | jax.Array) -> Seed:
    """An independent seed for site `number` (of a layer, of a chunk of the batch)."""
    number = jnp.asarray(number, jnp.uint32)
    return jnp.stack([_mix(seed[0] ^ _mix(number + np.uint32(1))), _mix(seed[1] + number)])


def keep_mask(seed: Seed, shape: tuple[int, ...], rate: float) -> jax.Array:
    """bool array of `shape`, each element True with probability `1 - rate`, independently."""
    index = jnp.zeros(shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(len(shape))):
        index = index + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * np.uint32(
            stride & 0xFFFFFFFF
        )
        stride *= shape[axis]
    x = _mix(index * np.uint32(0x9E3779B1) + seed[0])
    x = (x ^ seed[1]) * np.uint32(0x2C1B3C6D)
    x = (x ^ (x >> 15)) * np.uint32(0x297A2D39)
    return (x >> 8) < np.uint32(round((1.0 - rate) * 2**24))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def dropout(x: jax.Array, seed: Seed | None, rate: float) -> jax.Array:
    """`x` with elements zeroed with probability `rate` and the rest divided by `1 - rate`.

    Args:
      x: any shape and floating dtype.
      seed: uint32 [2]; None or `rate` 0 leaves `x` as it is.
    """
    if seed is None or rate == 0.0:
        return x
    keep = keep_mask(seed, x.shape, rate)
    return jnp.where(keep, x * np.float32(1.0 / (1.0 - rate)).astype(x.dtype), 0)


def _dropout_forward(x: jax.Array, seed: Seed | None, rate: float) -> tuple[jax.Array, Seed | None]:
    return dropout(x, seed, rate), seed


def _dropout_backward(rate: float, seed: Seed | None, grad: jax.Array) -> tuple[jax.Array, None]:
    return dropout(grad, seed, rate), None


dropout.defvjp(_dropout_forward, _dropout_backward)


def _mix(x: jax.Array) -> jax.Array:
    """A 32-bit integer hash that is a bijection with good avalanche."""
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)
