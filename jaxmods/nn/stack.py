"""Running one block many times over stacked parameters.

The parameters of N equal blocks are one tree with a leading "layers" axis. `run` applies them
either as a scan (one compiled body, whatever N) or unrolled (a larger program in which the
compiler sees every layer). Modules hold the stacked tree with `stacked_init` in `Module.param`
rather than through `nn.scan`, because a block of the same kind is also used alone, in parts, by
the models here (the last block of CLIP's towers).
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmods.nn.attention import Implementation

Remat = Literal["none", "full", "dots"]
Carry = TypeVar("Carry")

_POLICIES: dict[str, Any] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a stack of blocks runs; none of it changes a result beyond rounding.

    Attributes:
      remat: what the backward pass recomputes ("none", "full", "dots").
      unroll: write every block out instead of scanning over them.
      attention: implementation, see `jaxmods.nn.attention`.
    """

    remat: Remat = "none"
    unroll: bool = False
    attention: Implementation = "auto"


def stacked_init(init: Callable[[jax.Array], Any], rng: jax.Array, layers: int) -> Any:
    """`layers` initialisations of `init(rng)` (a tree of boxed parameters), stacked.

    Returns:
      The tree with a leading axis of size `layers`, named "layers" in the boxes.
    """
    tree = jax.vmap(init)(jax.random.split(rng, layers))
    return jax.tree.map(
        lambda leaf: leaf.add_axis(0, {nn.PARTITION_NAME: "layers"}),
        tree,
        is_leaf=lambda leaf: isinstance(leaf, nn.meta.AxisMetadata),
    )


def stacked_param(
    module: nn.Module, name: str, init: Callable[[jax.Array], Any], layers: int
) -> Any:
    """The stacked parameters of `layers` blocks, held by `module` under `name`.

    Unlike `Module.param`, which compares the leaves of a given tree with those of a fresh one, this
    takes what is there, so that adapters may sit beside kernels (`jaxmods.nn.lora`).

    Args:
      module: the owner, within its `setup` or a compact method.
      init: `(rng) -> tree of boxed parameters` of one block.

    Returns:
      Tree of arrays with a leading layer axis.
    """
    if module.has_variable("params", name) and not module.is_initializing():
        return nn.meta.unbox(module.get_variable("params", name))
    return module.param(name, lambda rng: stacked_init(init, rng, layers))


def remat(fn: Callable[..., Any], policy: Remat) -> Callable[..., Any]:
    """`fn` with its activations recomputed in the backward pass: "none", "full", or "dots"
    (products with weights are kept, the rest is recomputed)."""
    if policy == "none":
        return fn
    return jax.checkpoint(fn, policy=_POLICIES[policy], prevent_cse=False)


def run(
    block: Callable[[Any, Carry], Carry],
    params: Any,
    x: Carry,
    *,
    policy: Remat = "none",
    unroll: bool = False,
) -> Carry:
    """x after all blocks.

    Args:
      block: `(parameters of one block, x) -> x`.
      params: tree of arrays with a leading layer axis, or a tuple of trees (`unstack`).
      x: activations, one array or a tree of them.
      policy: what the backward pass recomputes.
      unroll: write every layer out instead of scanning; a tuple always is.
    """
    step = remat(block, policy)
    if unroll or isinstance(params, tuple):
        for layer in params if isinstance(params, tuple) else unstack(params):
            x = step(layer, x)
        return x
    return jax.lax.scan(lambda carry, layer: (step(layer, carry), None), x, params)[0]


def unstack(params: Any) -> tuple[Any, ...]:
    """One tree of parameters per layer, of a tree of arrays with a leading layer axis."""
    return _unstack(jax.tree.leaves(params)[0].shape[0], params)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _unstack(layers: int, params: Any) -> tuple[Any, ...]:
    """One tree per layer. Its transpose stacks, where slicing's would add padded copies up."""
    return tuple(jax.tree.map(operator.itemgetter(i), params) for i in range(layers))


def _unstack_forward(layers: int, params: Any) -> tuple[tuple[Any, ...], None]:
    return _unstack(layers, params), None


def _unstack_backward(layers: int, residual: None, grads: tuple[Any, ...]) -> tuple[Any]:
    del residual

    def joined(*leaves: Any) -> Any:
        if leaves[0].dtype == jax.dtypes.float0:  # whole numbers have no gradient
            return np.zeros((layers, *leaves[0].shape), jax.dtypes.float0)
        return jnp.stack(leaves)

    return (jax.tree.map(joined, *grads),)


_unstack.defvjp(_unstack_forward, _unstack_backward)
