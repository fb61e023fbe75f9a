"""The order of base layers and inserted layers, scanned.

Inserted layer k runs after base layer I[k]; both kinds are decoder layers with parameters stacked
over layers. The sequence is cut into *segments* (some base layers, then one inserted layer), and
neighbouring segments that repeat are one scan: for IAA-14, [1]x2 [4 1]x6 compiles three segments,
and no more for a deeper model; several base layers of a segment are a scan of their own.

The base is frozen, so its parameters are read from the whole stack by index (no copies, and under
rematerialisation none are kept); inserted layers are scanned over, so that their gradients come out
stacked.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxmods.nn.stack import Remat, remat

# (parameters and whatever else belongs to one layer, activations) -> (activations, output or None)
Layer = Callable[[Any, jax.Array], tuple[jax.Array, Any]]


@dataclasses.dataclass(frozen=True)
class Group:
    """`repeats` times the segments `counts`: so many base layers, each time then one inserted."""

    repeats: int
    counts: tuple[int, ...]


@functools.lru_cache(maxsize=64)
def plan(insert_after: tuple[int, ...], layers: int) -> tuple[tuple[Group, ...], int]:
    """Groups of segments, the fewest to compile, and the number of base layers after the last.

    Entries of `insert_after` that the base does not reach are left out: their layers never run
    (as in the official code).

    Raises:
      ValueError: `insert_after` does not rise, or is negative.
    """
    if list(insert_after) != sorted(set(insert_after)) or (insert_after and insert_after[0] < 0):
        raise ValueError(
            f"insert_after: expected rising layer numbers from 0 on, found {insert_after}"
        )
    used = [i for i in insert_after if i < layers]
    edges = [-1, *used]
    segments = tuple(b - a for a, b in zip(edges, used, strict=False))
    return _groups(segments), layers - 1 - edges[-1]


@functools.lru_cache(maxsize=256)
def _groups(segments: tuple[int, ...]) -> tuple[Group, ...]:
    """The split with the fewest compiled segments; of equal ones that with the fewest groups."""
    # best[n]: cost and groups of the first n segments
    best: list[tuple[int, int, tuple[Group, ...]]] = [(0, 0, ())]
    for end in range(1, len(segments) + 1):
        found = []
        for width in range(1, end + 1):
            block = segments[end - width : end]
            repeats, start = 1, end - width
            while True:
                cost, number, groups = best[start]
                found.append((cost + width, number + 1, (*groups, Group(repeats, block))))
                if start < width or segments[start - width : start] != block:
                    break
                start, repeats = start - width, repeats + 1
        best.append(min(found, key=lambda entry: entry[:2]))
    return best[-1][2]


def interleave(
    base: Any,
    inserted: Any,
    x_BTD: jax.Array,
    insert_after: tuple[int, ...],
    base_layer: Layer,
    inserted_layer: Layer,
    *,
    policy: Remat = "none",
    by_index: bool = False,
) -> tuple[jax.Array, Any, Any]:
    """x after all base layers with the inserted ones between them.

    Args:
      base, inserted: trees of arrays with a leading layer axis (parameters; kept keys and values).
      x_BTD: activations. insert_after: I.
      base_layer, inserted_layer: what one layer does with its part of the tree.
      policy: what the backward pass recomputes, layer by layer.
      by_index: read the inserted layers from their stack by index, too: no copies where nothing is
        differentiated, as in decoding.

    Returns:
      (x, outputs of the base layers, outputs of the inserted layers that ran), stacked; None where
      layers put nothing out.
    """
    layers = jax.tree.leaves(base)[0].shape[0]
    groups, rest = plan(insert_after, layers)

    @functools.partial(remat, policy=policy)
    def one_base(whole: Any, index: jax.Array, x: jax.Array) -> tuple[jax.Array, Any]:
        return base_layer(_at(whole, index), x)

    @functools.partial(remat, policy=policy)
    def one_inserted(part: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        return inserted_layer(_at(inserted, part) if by_index else part, x)

    def some_base(x: jax.Array, first: Any, count: int) -> tuple[jax.Array, Any]:
        if count == 1:
            x, out = one_base(base, first, x)
            return x, jax.tree.map(lambda leaf: leaf[None], out)
        indices = first + jnp.arange(count)
        return jax.lax.scan(lambda x, index: one_base(base, index, x), x, indices)

    of_base, of_inserted = [], []
    at_base = at_inserted = 0
    for group in groups:
        width = len(group.counts)
        taken = group.repeats * width
        numbers = jnp.arange(jax.tree.leaves(inserted)[0].shape[0])
        parts = jax.tree.map(
            lambda leaf, start=at_inserted, taken=taken, group=group: leaf[
                start : start + taken
            ].reshape(group.repeats, -1, *leaf.shape[1:]),
            numbers if by_index else inserted,
        )
        stride = sum(group.counts)
        starts = at_base + stride * jnp.arange(group.repeats)

        def repeat(x: jax.Array, xs: Any, group: Group = group) -> tuple[jax.Array, Any]:
            start, layers = xs
            outs: tuple[list[Any], list[Any]] = ([], [])
            for number, count in enumerate(group.counts):
                x, out = some_base(x, start, count)
                outs[0].append(out)
                start = start + count
                layer = jax.tree.map(lambda leaf, n=number: leaf[n], layers)
                x, out = one_inserted(layer, x)
                outs[1].append(jax.tree.map(lambda leaf: leaf[None], out))
            return x, tuple(_joined(each) for each in outs)

        x_BTD, (out_base, out_inserted) = jax.lax.scan(repeat, x_BTD, (starts, parts))
        of_base.append(_flat(out_base))
        of_inserted.append(_flat(out_inserted))
        at_base += group.repeats * stride
        at_inserted += taken
    if rest:
        x_BTD, out = some_base(x_BTD, at_base, rest)
        of_base.append(out)
    return x_BTD, _joined(of_base), _joined(of_inserted)


def _at(stack: Any, index: jax.Array) -> Any:
    """One layer of a stack."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, 0, False), stack)


def _joined(trees: list[Any]) -> Any:
    """Outputs one after the other along the layer axis; None for none."""
    if not trees or not jax.tree.leaves(trees[0]):
        return None
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *trees)


def _flat(tree: Any) -> Any:
    """[repeats, layers, ...] -> [repeats * layers, ...]."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), tree)
