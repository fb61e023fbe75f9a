"""Logical axis names, the rules that map them to mesh axes, and mesh construction.

Model code names what a dimension *is*; a recipe chooses the mesh and, where it must, other rules.
Nothing else in the library names a mesh axis.

Mesh axes (all four always exist, size 1 where unused):
  data     copies of the parameters, batch split (over DCN between slices)
  fsdp     parameters and optimiser state split, batch split
  tensor   heads, MLP columns and vocabulary split
  context  sequence split (long sequences)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor", "context")

Rules = tuple[tuple[str, str | tuple[str, ...] | None], ...]

# One place for every logical name. Earlier rows win when two dimensions want one mesh axis.
DEFAULT_RULES: Rules = (
    ("batch", ("data", "fsdp")),
    ("group", ("data", "fsdp")),
    ("seq", "context"),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("vocab", "tensor"),
    ("entity", ("fsdp", "tensor")),
    ("embed", "fsdp"),
    ("rank", "fsdp"),  # of low-rank factors without an axis "embed"
    ("kv", None),
    ("head_dim", None),
    ("proj", None),
    ("layers", None),
    ("patch", None),
    ("channels", None),
    ("pos", None),
    ("norm", None),
)


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Sizes of the mesh axes. At most one may be -1: it takes the devices that remain."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1

    def resolve(self, device_count: int) -> tuple[int, int, int, int]:
        """Concrete sizes for `device_count` devices. Raises ValueError when they cannot fit."""
        sizes = [self.data, self.fsdp, self.tensor, self.context]
        free = [i for i, s in enumerate(sizes) if s == -1]
        known = math.prod(s for s in sizes if s != -1)
        if len(free) > 1 or any(s == 0 or s < -1 for s in sizes):
            raise ValueError(f"mesh: expected positive sizes and at most one -1, found {self}")
        if free:
            if device_count % known:
                raise ValueError(
                    f"mesh: {device_count} devices cannot be split by {known} ({self}); "
                    f"choose sizes whose product divides {device_count}"
                )
            sizes[free[0]] = device_count // known
        elif known != device_count:
            raise ValueError(
                f"mesh: expected {known} devices for {self}, found {device_count}; "
                f"set one axis to -1, or sizes whose product is {device_count}"
            )
        return sizes[0], sizes[1], sizes[2], sizes[3]


def make_mesh(shape: MeshShape, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with axes `MESH_AXES` over `devices` (default: all).

    Over several slices, "data" is the axis between them: only gradients cross the network.

    Raises:
      ValueError: sizes that do not fit the devices, or "data" not a multiple of the slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = shape.resolve(len(devices))
    slices = len({getattr(d, "slice_index", 0) or 0 for d in devices})
    if devices[0].platform == "cpu":
        grid = np.asarray(devices).reshape(sizes)
        return Mesh(grid, MESH_AXES)
    from jax.experimental import mesh_utils

    if slices > 1:
        if sizes[0] % slices:
            raise ValueError(
                f"mesh: expected data to be a multiple of the {slices} slices, found {sizes[0]}; "
                f"set mesh.data to {slices}, or to -1 with a smaller fsdp"
            )
        grid = mesh_utils.create_hybrid_device_mesh(
            (sizes[0] // slices, *sizes[1:]),
            (slices, 1, 1, 1),
            devices,
            allow_split_physical_axes=True,
        )
    else:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(grid, MESH_AXES)


def unbox(tree: Any) -> Any:
    """Parameters without their logical-axis boxes."""
    return nn.meta.unbox(tree)


def logical_axes(tree: Any) -> Any:
    """Tree like `unbox(tree)` of tuples of logical names (empty tuple for unboxed leaves)."""

    def axes(leaf: Any) -> tuple[str | None, ...]:
        if isinstance(leaf, nn.Partitioned):
            return tuple(leaf.names)
        return (None,) * np.ndim(leaf)

    return jax.tree.map(axes, tree, is_leaf=lambda x: isinstance(x, nn.Partitioned))


def spec_for(
    shape: Sequence[int], axes: Sequence[str | None], mesh: Mesh, rules: Rules = DEFAULT_RULES
) -> PartitionSpec:
    """Partition of one array: rules in order, a mesh axis used once, only where it divides.

    Raises:
      ValueError: a logical name that no rule knows.
    """
    table = dict(rules)
    order = {name: i for i, (name, _) in enumerate(rules)}
    for name in axes:
        if name is not None and name not in table:
            raise ValueError(
                f"partitioning: unknown logical axis {name!r} in {tuple(axes)}; "
                f"add a rule for it (known: {', '.join(table)})"
            )
    result: list[Any] = [None] * len(axes)
    used: set[str] = set()
    for dim in sorted(range(len(axes)), key=lambda d: order.get(axes[d] or "", len(order))):
        name = axes[dim]
        target = table[name] if name is not None else None
        if target is None:
            continue
        chosen: list[str] = []
        size = 1
        for mesh_axis in (target,) if isinstance(target, str) else target:
            step = mesh.shape[mesh_axis]
            if step == 1 or mesh_axis in used or shape[dim] % (size * step):
                continue
            chosen.append(mesh_axis)
            size *= step
        used.update(chosen)
        result[dim] = None if not chosen else chosen[0] if len(chosen) == 1 else tuple(chosen)
    return PartitionSpec(*result)


def sharding_for(
    shape: Sequence[int], axes: Sequence[str | None], mesh: Mesh, rules: Rules = DEFAULT_RULES
) -> NamedSharding:
    """`spec_for` on `mesh`, as a sharding."""
    return NamedSharding(mesh, spec_for(shape, axes, mesh, rules))


def tree_shardings(shapes: Any, axes: Any, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Any:
    """Shardings for a tree of arrays or ShapeDtypeStructs and its tree of logical axes."""
    return jax.tree.map(
        lambda leaf, names: sharding_for(leaf.shape, names, mesh, rules), shapes, axes
    )


def constrain(x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """Hint the sharding of an activation by logical names; the identity outside a mesh.

    The mesh and the rules are those of the enclosing `use_mesh`, so model code names neither.
    """
    if _ACTIVE is None:
        return x
    mesh, rules = _ACTIVE
    if mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, sharding_for(x.shape, axes, mesh, rules))


def keep_whole(x: jax.Array, axis: int = -1) -> jax.Array:
    """Hint that an axis (counted from the end, -1 the last) is not split, whatever happens to the
    others; the identity outside a mesh.

    `jaxmods.nn.layers.Linear` asks this of every activation along "embed", and `dense` of low-rank
    factors along their rank. For activations it is the usual layout, and it keeps XLA (seen on the
    CPU, jaxlib 0.10.2, with Shardy and with GSPMD; the program of libtpu 0.0.52 has no such
    exchange) from a product that it gets wrong: with x
    [("data", "fsdp"), "tensor"], a kernel ["tensor", "fsdp"] and a result
    [("data", "fsdp"), "tensor"] it exchanges the rows of "data" and "fsdp" and never puts them
    back. Left alone, it chooses that layout for a result that is multiplied by a gate which is
    itself split. `tests/test_flux.py` holds the case.
    """
    if _ACTIVE is None or _ACTIVE[0].size == 1:
        return x
    spec: list[Any] = [PartitionSpec.UNCONSTRAINED] * x.ndim
    spec[axis] = None
    return jax.lax.with_sharding_constraint(x, NamedSharding(_ACTIVE[0], PartitionSpec(*spec)))


def active() -> tuple[Mesh, Rules] | None:
    """Mesh and rules of the enclosing `use_mesh`; None outside one."""
    return _ACTIVE


class use_mesh:
    """Context in which a step is traced: `constrain` sees this mesh and these rules."""

    def __init__(self, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> None:
        self._value = (mesh, rules)
        self._saved: tuple[Mesh, Rules] | None = None

    def __enter__(self) -> Mesh:
        global _ACTIVE
        self._saved, _ACTIVE = _ACTIVE, self._value
        return self._value[0]

    def __exit__(self, *exc: object) -> None:
        global _ACTIVE
        _ACTIVE = self._saved


_ACTIVE: tuple[Mesh, Rules] | None = None
