"""A sum over parts of a batch whose gradient is taken part by part, while the part is in the cache.

Differentiating a scan over parts keeps what every part needs for its backward pass until all parts
have gone forward, or computes it again. Where each part contributes a scalar of its own (triples of
a batch do), its gradient can be taken at once: nothing is kept, nothing is computed twice, and
memory is that of one part.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# (parameters, constants, part) -> (what is differentiated, sums that are not)
Contribution = Callable[[Any, Any, Any], tuple[jax.Array, dict[str, jax.Array]]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def sum_of_parts(
    contribution: Contribution, params: Any, constants: Any, parts: Any
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The sums over all parts of what `contribution` returns.

    The first sum is differentiable in `params` and in nothing else.

    Args:
      contribution: of one part; fp32 scalars.
      params: a tree of floating arrays.
      constants: a tree of arrays, the same for all parts.
      parts: a tree of arrays with a leading axis over parts.
    """

    def add(sums: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, contribution(params, constants, part)), None

    return jax.lax.scan(add, _zeros(contribution, params, constants, parts), parts)[0]


def _forward(contribution: Contribution, params: Any, constants: Any, parts: Any) -> Any:
    differentiate = jax.value_and_grad(contribution, has_aux=True)

    def add(carry: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, carry, differentiate(params, constants, part)), None

    start = _zeros(contribution, params, constants, parts), jax.tree.map(jnp.zeros_like, params)
    return jax.lax.scan(add, start, parts)[0]


def _backward(
    contribution: Contribution, grads: Any, cotangent: tuple[jax.Array, Any]
) -> tuple[Any, None, None]:
    del contribution
    scale = cotangent[0]
    return jax.tree.map(lambda g: (g * scale).astype(g.dtype), grads), None, None


sum_of_parts.defvjp(_forward, _backward)


def _zeros(contribution: Contribution, params: Any, constants: Any, parts: Any) -> Any:
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), parts)
    shapes = jax.eval_shape(contribution, params, constants, one)
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
