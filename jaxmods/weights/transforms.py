"""Invertible rearrangements between PyTorch tensors and one or more JAX arrays.

A transform is read in both directions and says from the JAX shape which PyTorch shape it expects,
so a map needs no shape tables. `a >> b` applies `a` first on the way from PyTorch to JAX. All are
bit-exact: they move elements, they never compute.

Shapes below are for one layer: stacking of `{i}` keys comes around the transform (`WeightMap`).
"""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import Literal

import numpy as np

from jaxmods.weights import lazy
from jaxmods.weights.errors import WeightError
from jaxmods.weights.lazy import Lazy, Shape

Shapes = tuple[Shape, ...]
Lazies = tuple[Lazy, ...]


@dataclasses.dataclass(frozen=True)
class Transform(abc.ABC):
    """PyTorch tensors ↔ JAX arrays, one to one unless a subclass says otherwise."""

    def outputs(self, torch_count: int, jax_count: int) -> int:
        """How many arrays come out (towards JAX) when `torch_count` go in. Raises ValueError."""
        del jax_count
        return torch_count

    @abc.abstractmethod
    def torch_shapes(self, jax_shapes: Shapes, count: int) -> Shapes:
        """Shapes on the PyTorch side (`count` of them). Raises ValueError when none can fit."""

    @abc.abstractmethod
    def to_jax(self, tensors: Lazies, jax_shapes: Shapes) -> Lazies:
        """Arrays of `jax_shapes` from tensors of `torch_shapes(jax_shapes, len(tensors))`."""

    @abc.abstractmethod
    def to_torch(self, arrays: Lazies, count: int) -> Lazies:
        """The inverse of `to_jax`: `count` tensors."""

    @property
    def any_of(self) -> bool:
        """Whether one of the PyTorch keys of an entry is enough (copies of one tensor)."""
        return False

    def __rshift__(self, other: Transform) -> Transform:
        """First this, then `other`, on the way from PyTorch to JAX."""
        return Chain((*_steps(self), *_steps(other)))


@dataclasses.dataclass(frozen=True)
class _PerTensor(Transform):
    """Base of the transforms that treat every tensor alone."""

    @abc.abstractmethod
    def torch_shape(self, shape: Shape) -> Shape:
        """PyTorch shape of one JAX shape."""

    @abc.abstractmethod
    def forward(self, tensor: Lazy, shape: Shape) -> Lazy:
        """One PyTorch tensor as a JAX array of `shape`."""

    @abc.abstractmethod
    def inverse(self, array: Lazy) -> Lazy:
        """One JAX array as a PyTorch tensor."""

    def torch_shapes(self, jax_shapes: Shapes, count: int) -> Shapes:
        del count
        return tuple(self.torch_shape(s) for s in jax_shapes)

    def to_jax(self, tensors: Lazies, jax_shapes: Shapes) -> Lazies:
        return tuple(self.forward(t, s) for t, s in zip(tensors, jax_shapes, strict=True))

    def to_torch(self, arrays: Lazies, count: int) -> Lazies:
        del count
        return tuple(self.inverse(a) for a in arrays)


@dataclasses.dataclass(frozen=True)
class Identity(_PerTensor):
    """The same layout on both sides: biases, norm scales, embedding tables, scalars."""

    def torch_shape(self, shape: Shape) -> Shape:
        return shape

    def forward(self, tensor: Lazy, shape: Shape) -> Lazy:
        del shape
        return tensor

    def inverse(self, array: Lazy) -> Lazy:
        return array


IDENTITY = Identity()


@dataclasses.dataclass(frozen=True)
class Permute(_PerTensor):
    """JAX dimension `d` is PyTorch dimension `axes[d]`: `jax = torch.permute(axes)`."""

    axes: tuple[int, ...]

    def __post_init__(self) -> None:
        if sorted(self.axes) != list(range(len(self.axes))):
            raise ValueError(f"Permute: expected a permutation of 0..n-1, found {self.axes}")

    def torch_shape(self, shape: Shape) -> Shape:
        if len(shape) != len(self.axes):
            raise ValueError(
                f"{self} needs an array of {len(self.axes)} dimensions, found shape {list(shape)}"
            )
        return tuple(shape[d] for d in self._inverse_axes())

    def forward(self, tensor: Lazy, shape: Shape) -> Lazy:
        del shape
        return tensor.permute(self.axes)

    def inverse(self, array: Lazy) -> Lazy:
        return array.permute(self._inverse_axes())

    def _inverse_axes(self) -> tuple[int, ...]:
        return tuple(int(i) for i in np.argsort(self.axes))


@dataclasses.dataclass(frozen=True)
class Linear(Permute):
    """`torch.nn.Linear` weight [out, in] ↔ kernel [in, out]."""

    axes: tuple[int, ...] = (1, 0)


@dataclasses.dataclass(frozen=True)
class Conv1d(Permute):
    """Weight [out, in, k] ↔ kernel [k, in, out]."""

    axes: tuple[int, ...] = (2, 1, 0)


@dataclasses.dataclass(frozen=True)
class Conv2d(Permute):
    """Weight [out, in, kh, kw] ↔ kernel [kh, kw, in, out]."""

    axes: tuple[int, ...] = (2, 3, 1, 0)


@dataclasses.dataclass(frozen=True)
class Conv3d(Permute):
    """Weight [out, in, kt, kh, kw] ↔ kernel [kt, kh, kw, in, out]."""

    axes: tuple[int, ...] = (2, 3, 4, 1, 0)


@dataclasses.dataclass(frozen=True)
class LinearHeads(_PerTensor):
    """A projection whose features are split into heads on the JAX side.

    side="out" (query, key, value): weight [heads*head_dim, in] ↔ kernel [in, heads, head_dim].
    side="in" (output projection):  weight [out, heads*head_dim] ↔ kernel [heads, head_dim, out].
    """

    side: Literal["out", "in"] = "out"

    def torch_shape(self, shape: Shape) -> Shape:
        if len(shape) != 3:
            raise ValueError(f"{self} needs a kernel of 3 dimensions, found shape {list(shape)}")
        a, b, c = shape
        return (b * c, a) if self.side == "out" else (c, a * b)

    def forward(self, tensor: Lazy, shape: Shape) -> Lazy:
        return tensor.permute((1, 0)).reshape(shape)

    def inverse(self, array: Lazy) -> Lazy:
        rows, columns = self.torch_shape(array.shape)
        return array.reshape((columns, rows)).permute((1, 0))


@dataclasses.dataclass(frozen=True)
class Reshape(_PerTensor):
    """`shape` (PyTorch side, one -1 allowed) ↔ the shape that the JAX array has. C order."""

    shape: tuple[int, ...]

    def torch_shape(self, shape: Shape) -> Shape:
        size = math.prod(shape)
        known = math.prod(n for n in self.shape if n != -1)
        free = self.shape.count(-1)
        if free > 1 or (free == 0 and known != size) or (free == 1 and (not known or size % known)):
            raise ValueError(f"{self} cannot hold the {size} elements of shape {list(shape)}")
        return tuple(size // known if n == -1 else n for n in self.shape)

    def forward(self, tensor: Lazy, shape: Shape) -> Lazy:
        return tensor.reshape(shape)

    def inverse(self, array: Lazy) -> Lazy:
        return array.reshape(self.torch_shape(array.shape))


@dataclasses.dataclass(frozen=True)
class BiasHeads(Reshape):
    """Bias [heads*head_dim] ↔ [heads, head_dim]."""

    shape: tuple[int, ...] = (-1,)


@dataclasses.dataclass(frozen=True)
class Squeeze(_PerTensor):
    """PyTorch has a dimension of size 1 at `axis` (of its own shape) that JAX does not have."""

    axis: int = 0

    def torch_shape(self, shape: Shape) -> Shape:
        axis = self.axis if self.axis >= 0 else self.axis + len(shape) + 1
        if not 0 <= axis <= len(shape):
            raise ValueError(f"{self}: no such axis beside shape {list(shape)}")
        return (*shape[:axis], 1, *shape[axis:])

    def forward(self, tensor: Lazy, shape: Shape) -> Lazy:
        return tensor.reshape(shape)

    def inverse(self, array: Lazy) -> Lazy:
        return array.reshape(self.torch_shape(array.shape))


@dataclasses.dataclass(frozen=True)
class Reorder(_PerTensor):
    """Equal parts along `axis` in another order: part `n` of JAX is part `order[n]` of PyTorch."""

    axis: int
    order: tuple[int, ...]

    def __post_init__(self) -> None:
        if sorted(self.order) != list(range(len(self.order))):
            raise ValueError(f"Reorder: expected an order of 0..n-1, found {self.order}")

    def torch_shape(self, shape: Shape) -> Shape:
        _part_shapes(self, shape, _axis(self, self.axis, len(shape)), None, len(self.order))
        return shape

    def forward(self, tensor: Lazy, shape: Shape) -> Lazy:
        del shape
        return self._moved(tensor, self.order)

    def inverse(self, array: Lazy) -> Lazy:
        return self._moved(array, tuple(int(i) for i in np.argsort(self.order)))

    def _moved(self, array: Lazy, order: tuple[int, ...]) -> Lazy:
        axis = _axis(self, self.axis, len(array.shape))
        parts = _cut(array, axis, _part_shapes(self, array.shape, axis, None, len(order)))
        return lazy.concatenate([parts[n] for n in order], axis)


@dataclasses.dataclass(frozen=True)
class Cast(_PerTensor):
    """Another dtype on each side, checked to be lossless (int64 tables held as int32)."""

    torch: str
    jax: str

    def torch_shape(self, shape: Shape) -> Shape:
        return shape

    def forward(self, tensor: Lazy, shape: Shape) -> Lazy:
        del shape
        return _checked_cast(tensor, np.dtype(self.jax))

    def inverse(self, array: Lazy) -> Lazy:
        return _checked_cast(array, np.dtype(self.torch))


@dataclasses.dataclass(frozen=True)
class Fuse(Transform):
    """Several PyTorch tensors concatenated along `axis` (of the shape at this step) into one array.

    `sizes` gives their lengths where these are not equal (grouped-query attention).
    """

    axis: int
    sizes: tuple[int, ...] | None = None

    def outputs(self, torch_count: int, jax_count: int) -> int:
        del jax_count
        if self.sizes is not None and len(self.sizes) != torch_count:
            raise ValueError(
                f"{self}: expected {len(self.sizes)} PyTorch keys, found {torch_count}"
            )
        return 1

    def torch_shapes(self, jax_shapes: Shapes, count: int) -> Shapes:
        (shape,) = jax_shapes
        axis = _axis(self, self.axis, len(shape))
        return _part_shapes(self, shape, axis, self.sizes, count)

    def to_jax(self, tensors: Lazies, jax_shapes: Shapes) -> Lazies:
        return (lazy.concatenate(tensors, _axis(self, self.axis, len(jax_shapes[0]))),)

    def to_torch(self, arrays: Lazies, count: int) -> Lazies:
        (array,) = arrays
        axis = _axis(self, self.axis, len(array.shape))
        return _cut(array, axis, self.torch_shapes((array.shape,), count))


@dataclasses.dataclass(frozen=True)
class Stack(Transform):
    """Several PyTorch tensors stacked on a new dimension `axis` of one array."""

    axis: int = 0

    def outputs(self, torch_count: int, jax_count: int) -> int:
        del torch_count, jax_count
        return 1

    def torch_shapes(self, jax_shapes: Shapes, count: int) -> Shapes:
        (shape,) = jax_shapes
        axis = _axis(self, self.axis, len(shape))
        if shape[axis] != count:
            raise ValueError(
                f"{self}: {count} PyTorch keys, but dimension {axis} of {list(shape)} is "
                f"{shape[axis]}"
            )
        return ((*shape[:axis], *shape[axis + 1 :]),) * count

    def to_jax(self, tensors: Lazies, jax_shapes: Shapes) -> Lazies:
        return (lazy.stack(tensors, _axis(self, self.axis, len(jax_shapes[0]))),)

    def to_torch(self, arrays: Lazies, count: int) -> Lazies:
        (array,) = arrays
        axis = _axis(self, self.axis, len(array.shape))
        shapes = self.torch_shapes((array.shape,), count)
        return tuple(array.cut(axis, i, i + 1).reshape(s) for i, s in enumerate(shapes))


@dataclasses.dataclass(frozen=True)
class Split(Transform):
    """One PyTorch tensor cut along `axis` (of its shape at this step) into several JAX arrays."""

    axis: int = 0

    def outputs(self, torch_count: int, jax_count: int) -> int:
        if torch_count != 1:
            raise ValueError(f"{self}: expected 1 PyTorch key, found {torch_count}")
        return jax_count

    def torch_shapes(self, jax_shapes: Shapes, count: int) -> Shapes:
        del count
        first = jax_shapes[0]
        axis = _axis(self, self.axis, len(first))
        for shape in jax_shapes:
            if _without(shape, axis) != _without(first, axis) or len(shape) != len(first):
                raise ValueError(f"{self}: shapes {jax_shapes} differ outside dimension {axis}")
        return ((*first[:axis], sum(s[axis] for s in jax_shapes), *first[axis + 1 :]),)

    def to_jax(self, tensors: Lazies, jax_shapes: Shapes) -> Lazies:
        (tensor,) = tensors
        return _cut(tensor, _axis(self, self.axis, len(tensor.shape)), jax_shapes)

    def to_torch(self, arrays: Lazies, count: int) -> Lazies:
        del count
        return (lazy.concatenate(arrays, _axis(self, self.axis, len(arrays[0].shape))),)


@dataclasses.dataclass(frozen=True)
class Tie(Transform):
    """One JAX array kept under several PyTorch keys; on import all copies must be equal.

    `require_all=False` accepts files that hold only some of the copies (safetensors drops tied
    ones). All keys are written on export.
    """

    require_all: bool = True

    @property
    def any_of(self) -> bool:
        return not self.require_all

    def outputs(self, torch_count: int, jax_count: int) -> int:
        del torch_count, jax_count
        return 1

    def torch_shapes(self, jax_shapes: Shapes, count: int) -> Shapes:
        return jax_shapes * count

    def to_jax(self, tensors: Lazies, jax_shapes: Shapes) -> Lazies:
        del jax_shapes
        return (lazy.equal(tensors),)

    def to_torch(self, arrays: Lazies, count: int) -> Lazies:
        return arrays * count


@dataclasses.dataclass(frozen=True)
class Chain(Transform):
    """Several transforms, the first nearest to PyTorch. Written `a >> b`."""

    steps: tuple[Transform, ...]

    @property
    def any_of(self) -> bool:
        return any(step.any_of for step in self.steps)

    def outputs(self, torch_count: int, jax_count: int) -> int:
        return self._counts(torch_count, jax_count)[-1]

    def torch_shapes(self, jax_shapes: Shapes, count: int) -> Shapes:
        return self._shapes(jax_shapes, count)[0]

    def to_jax(self, tensors: Lazies, jax_shapes: Shapes) -> Lazies:
        shapes = self._shapes(jax_shapes, len(tensors))
        for step, after in zip(self.steps, shapes[1:], strict=True):
            tensors = step.to_jax(tensors, after)
        return tensors

    def to_torch(self, arrays: Lazies, count: int) -> Lazies:
        counts = self._counts(count, len(arrays))
        for step, before in zip(reversed(self.steps), reversed(counts[:-1]), strict=True):
            arrays = step.to_torch(arrays, before)
        return arrays

    def _counts(self, torch_count: int, jax_count: int) -> list[int]:
        counts = [torch_count]
        for step in self.steps:
            counts.append(step.outputs(counts[-1], jax_count))
        return counts

    def _shapes(self, jax_shapes: Shapes, count: int) -> list[Shapes]:
        counts = self._counts(count, len(jax_shapes))
        shapes = [jax_shapes]
        for step, before in zip(reversed(self.steps), reversed(counts[:-1]), strict=True):
            shapes.append(step.torch_shapes(shapes[-1], before))
        return shapes[::-1]

    def __str__(self) -> str:
        return " >> ".join(str(step) for step in self.steps)


def _steps(transform: Transform) -> tuple[Transform, ...]:
    return transform.steps if isinstance(transform, Chain) else (transform,)


def _axis(transform: Transform, axis: int, ndim: int) -> int:
    result = axis + ndim if axis < 0 else axis
    if not 0 <= result < ndim:
        raise ValueError(f"{transform}: no axis {axis} in an array of {ndim} dimensions")
    return result


def _without(shape: Shape, axis: int) -> Shape:
    return (*shape[:axis], *shape[axis + 1 :])


def _part_shapes(
    transform: Transform, shape: Shape, axis: int, sizes: tuple[int, ...] | None, count: int
) -> Shapes:
    total = shape[axis]
    if sizes is None:
        if total % count:
            raise ValueError(
                f"{transform}: dimension {axis} of {list(shape)} cannot be divided into {count} "
                "equal parts; give sizes"
            )
        sizes = (total // count,) * count
    if sum(sizes) != total or len(sizes) != count:
        raise ValueError(
            f"{transform}: sizes {sizes} do not make {count} parts of dimension {axis} of "
            f"{list(shape)}"
        )
    return tuple((*shape[:axis], n, *shape[axis + 1 :]) for n in sizes)


def _cut(array: Lazy, axis: int, shapes: Shapes) -> Lazies:
    parts, start = [], 0
    for shape in shapes:
        parts.append(array.cut(axis, start, start + shape[axis]))
        start += shape[axis]
    return tuple(parts)


def _checked_cast(source: Lazy, dtype: np.dtype) -> Lazy:
    if dtype == source.dtype:
        return source

    def read(bounds: lazy.Bounds) -> np.ndarray:
        values = source.read(bounds)
        result = values.astype(dtype)
        if not np.array_equal(result.astype(values.dtype), values):
            raise WeightError(
                f"{source.name}: values do not fit {dtype} without loss (stored as {values.dtype})"
            )
        return result

    return dataclasses.replace(source, dtype=dtype, read=read)
