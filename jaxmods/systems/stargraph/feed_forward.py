"""The MLP of a block with both of its dropouts, and its backward pass written out.

    dropout(dropout(gelu(y W1 + b1)) W2 + b2)

Left to automatic differentiation, XLA on a CPU hashes the dropout mask and evaluates the slope of
GELU once per use and in the wrong memory order. Here every array that enters two products is made
once, and every product sees its factors in the order in which it is fastest; the barriers keep it
so. Spec `stargraph`, section 2.2 (official `transfile.py`, `Mlp`).

Shape legend: T tokens (any leading axes), D width, F hidden width.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxmods.systems.stargraph.dropout import Seed, dropout

_Residuals = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, Seed, Seed]
_once = jax.lax.optimization_barrier


def gelu(x: jax.Array) -> jax.Array:
    """x times the normal distribution function, by erf as PyTorch does (not erfc)."""
    return x * _normal_cdf(x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def feed_forward(
    y_TD: jax.Array,
    kernel_DF: jax.Array,
    bias_F: jax.Array,
    kernel_FD: jax.Array,
    bias_D: jax.Array,
    hidden_seed: Seed,
    out_seed: Seed,
    rate: float,
) -> jax.Array:
    """[T, D] -> [T, D]; `hidden_seed` and `out_seed` are of the two dropouts at `rate`."""
    hidden = dropout(gelu(y_TD @ kernel_DF + bias_F), hidden_seed, rate)
    return dropout(hidden @ kernel_FD + bias_D, out_seed, rate)


def _forward(
    y: jax.Array,
    kernel_1: jax.Array,
    bias_1: jax.Array,
    kernel_2: jax.Array,
    bias_2: jax.Array,
    hidden_seed: Seed,
    out_seed: Seed,
    rate: float,
) -> tuple[jax.Array, _Residuals]:
    z = y @ kernel_1 + bias_1
    hidden = dropout(gelu(z), hidden_seed, rate)
    out = dropout(hidden @ kernel_2 + bias_2, out_seed, rate)
    return out, (y, z, hidden, kernel_1, kernel_2, hidden_seed, out_seed)


def _backward(
    rate: float, saved: _Residuals, grad: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, None, None]:
    y, z, hidden, kernel_1, kernel_2, hidden_seed, out_seed = saved
    grad = _once(dropout(grad, out_seed, rate))
    slope = _normal_cdf(z) + z * jnp.exp(-0.5 * z * z) * np.float32(1 / np.sqrt(2 * np.pi)).astype(
        z.dtype
    )
    dz = _once(dropout((grad @ kernel_2.T) * slope, hidden_seed, rate))
    return (
        dz @ kernel_1.T,
        _over_tokens(y, dz),
        _rows(dz).sum(0),
        _over_tokens(hidden, grad),
        _rows(grad).sum(0),
        None,
        None,
    )


feed_forward.defvjp(_forward, _backward)


def _normal_cdf(x: jax.Array) -> jax.Array:
    return 0.5 * (1 + jax.lax.erf(x * np.float32(np.sqrt(0.5)).astype(x.dtype)))


def _rows(x: jax.Array) -> jax.Array:
    return x.reshape(-1, x.shape[-1])


def _over_tokens(a: jax.Array, b: jax.Array) -> jax.Array:
    """a^T b over all tokens."""
    return jnp.einsum("td,tf->df", _rows(a), _rows(b))
