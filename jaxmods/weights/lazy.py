"""Arrays that are described now and read later, slice by slice.

Everything the map does to a tensor (transpose, reshape, fuse, stack) is a rearrangement. A `Lazy`
carries a shape, a dtype and a function that reads any box of it; rearranging a `Lazy` gives another
whose reads are translated into reads of its sources. So a host that holds one shard of a stacked,
transposed kernel reads the bytes of that shard, and an export reads one tensor at a time. The same
algebra serves both directions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxmods.weights.errors import WeightError

Shape = tuple[int, ...]
Bounds = tuple[tuple[int, int], ...]  # start and stop of every dimension, within the shape


def extents(bounds: Bounds) -> Shape:
    """The shape of a box."""
    return tuple(stop - start for start, stop in bounds)


def cut_box(array: np.ndarray, bounds: Bounds) -> np.ndarray:
    """The box of an array in memory, as a view (also of a scalar)."""
    index: tuple[Any, ...] = (*(slice(start, stop) for start, stop in bounds), ...)
    return array[index]


@dataclasses.dataclass(frozen=True)
class Lazy:
    """An array of `shape` and `dtype` that `read(bounds)` yields a box of.

    `read` may return a view of memory that must not be written to. `name` says in errors where
    the data comes from.
    """

    shape: Shape
    dtype: np.dtype
    read: Callable[[Bounds], np.ndarray]
    name: str

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array."""
        return math.prod(self.shape) * self.dtype.itemsize

    def all(self) -> np.ndarray:
        """The whole array."""
        return self.read(tuple((0, n) for n in self.shape))

    def permute(self, axes: Sequence[int]) -> Lazy:
        """`numpy.transpose(self, axes)`."""
        axes = tuple(axes)
        inverse = tuple(int(i) for i in np.argsort(axes))

        def read(bounds: Bounds) -> np.ndarray:
            return self.read(tuple(bounds[i] for i in inverse)).transpose(axes)

        return dataclasses.replace(self, shape=tuple(self.shape[a] for a in axes), read=read)

    def reshape(self, shape: Shape) -> Lazy:
        """`numpy.reshape(self, shape)` in C order; reads are cut along the leading dimensions."""
        if math.prod(shape) != math.prod(self.shape):
            raise WeightError(
                f"{self.name}: cannot view shape {list(self.shape)} as {list(shape)}, the number "
                "of elements differs"
            )
        if shape == self.shape:
            return self
        return dataclasses.replace(self, shape=shape, read=_reshaped(self, shape))

    def cut(self, axis: int, start: int, stop: int) -> Lazy:
        """`self[..., start:stop, ...]` along `axis`."""

        def read(bounds: Bounds) -> np.ndarray:
            low, high = bounds[axis]
            moved = (*bounds[:axis], (low + start, high + start), *bounds[axis + 1 :])
            return self.read(moved)

        shape = (*self.shape[:axis], stop - start, *self.shape[axis + 1 :])
        return dataclasses.replace(self, shape=shape, read=read)

    def cast(self, dtype: np.dtype) -> Lazy:
        """Values converted to `dtype` as they are read."""
        if dtype == self.dtype:
            return self
        return dataclasses.replace(
            self, dtype=dtype, read=lambda bounds: self.read(bounds).astype(dtype)
        )


def from_numpy(array: np.ndarray, name: str) -> Lazy:
    """A `Lazy` over an array in memory (or in a memory map)."""

    def read(bounds: Bounds) -> np.ndarray:
        return cut_box(array, bounds)

    return Lazy(tuple(array.shape), array.dtype, read, name)


def zeros(shape: Shape, dtype: np.dtype, name: str) -> Lazy:
    """A `Lazy` of zeros."""
    return Lazy(shape, dtype, lambda bounds: np.zeros(extents(bounds), dtype), name)


def concatenate(parts: Sequence[Lazy], axis: int) -> Lazy:
    """`numpy.concatenate(parts, axis)`; only the parts that a read touches are read."""
    dtype = _common_dtype(parts)
    if len(parts) == 1:
        return parts[0]
    starts = np.cumsum([0, *(p.shape[axis] for p in parts)]).tolist()

    def read(bounds: Bounds) -> np.ndarray:
        low, high = bounds[axis]
        out = np.empty(extents(bounds), dtype)
        for part, start in zip(parts, starts[:-1], strict=True):
            first, last = max(low, start), min(high, start + part.shape[axis])
            if first < last:
                box = (*bounds[:axis], (first - start, last - start), *bounds[axis + 1 :])
                out[(slice(None),) * axis + (slice(first - low, last - low),)] = part.read(box)
        return out

    first = parts[0]
    shape = (*first.shape[:axis], starts[-1], *first.shape[axis + 1 :])
    return Lazy(shape, dtype, read, _joint_name(parts))


def stack(parts: Sequence[Lazy], axis: int = 0) -> Lazy:
    """`numpy.stack(parts, axis)`; only the parts that a read touches are read."""
    dtype = _common_dtype(parts)

    def read(bounds: Bounds) -> np.ndarray:
        low, high = bounds[axis]
        out = np.empty(extents(bounds), dtype)
        for i in range(low, high):
            box = (*bounds[:axis], *bounds[axis + 1 :])
            out[(slice(None),) * axis + (i - low,)] = parts[i].read(box)
        return out

    shape = (*parts[0].shape[:axis], len(parts), *parts[0].shape[axis:])
    return Lazy(shape, dtype, read, _joint_name(parts))


def equal(copies: Sequence[Lazy]) -> Lazy:
    """The first of `copies`; every read checks that all hold the same bits.

    Raises:
      WeightError: (on reading) two copies differ.
    """
    first = copies[0]
    for other in copies[1:]:
        if (other.shape, other.dtype) != (first.shape, first.dtype):
            raise WeightError(
                f"tied tensors differ: {first.name} is {first.dtype}{list(first.shape)}, "
                f"{other.name} is {other.dtype}{list(other.shape)}; the model holds one array for "
                "both, so they must be equal"
            )

    def read(bounds: Bounds) -> np.ndarray:
        value = first.read(bounds)
        for other in copies[1:]:
            if not same_bits(value, other.read(bounds)):
                raise WeightError(
                    f"tied tensors differ: {first.name} and {other.name} hold different values; "
                    "the model holds one array for both, so they must be equal bit for bit"
                )
        return value

    return dataclasses.replace(first, read=read)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays are equal in shape, dtype and every bit (NaNs and signed zeros too)."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(
        np.array_equal(
            np.ascontiguousarray(a).reshape(-1).view(np.uint8),
            np.ascontiguousarray(b).reshape(-1).view(np.uint8),
        )
    )


def same_values(a: Lazy, b: Lazy, block_bytes: int = 16 << 20) -> bool:
    """`same_bits` of two lazy arrays, read in blocks of rows."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.shape or a.nbytes == 0:
        return same_bits(a.all(), b.all())
    step = max(1, block_bytes * a.shape[0] // a.nbytes)
    rest = tuple((0, n) for n in a.shape[1:])
    return all(
        same_bits(a.read(box), b.read(box))
        for start in range(0, a.shape[0], step)
        for box in [((start, min(start + step, a.shape[0])), *rest)]
    )


def _common_dtype(parts: Sequence[Lazy]) -> np.dtype:
    found: dict[np.dtype, str] = {}
    for part in parts:
        found.setdefault(part.dtype, part.name)
    if len(found) > 1:
        listed = ", ".join(f"{name}: {dtype}" for dtype, name in found.items())
        raise WeightError(
            f"tensors that become one array have different dtypes ({listed}); choose one with the "
            "dtype option of the import"
        )
    return parts[0].dtype


def _joint_name(parts: Sequence[Lazy]) -> str:
    return parts[0].name if len(parts) == 1 else f"{parts[0].name} .. {parts[-1].name}"


def _groups(before: Shape, after: Shape) -> list[tuple[int, int, int, int]]:
    """Smallest runs of dimensions with equal products: (before start, stop, after start, stop)."""
    groups = []
    i = j = 0
    while i < len(before):
        i0, j0 = i, j
        a, b = before[i], after[j]
        i, j = i + 1, j + 1
        while a != b:
            if a < b:
                a *= before[i]
                i += 1
            else:
                b *= after[j]
                j += 1
        groups.append((i0, i, j0, j))
    return groups


def _reshaped(source: Lazy, shape: Shape) -> Callable[[Bounds], np.ndarray]:
    """The reader of `source.reshape(shape)`.

    Dimensions are grouped so that each group of the result is a reshape of one group of the
    source. Within a group the result's leading dimension bounds a run of flat positions, the run
    bounds the source's leading dimension, and what was read too much is cut away.
    """
    kept_before = [d for d, n in enumerate(source.shape) if n != 1]
    kept_after = [d for d, n in enumerate(shape) if n != 1]
    before = tuple(source.shape[d] for d in kept_before)
    after = tuple(shape[d] for d in kept_after)
    groups = [] if 0 in before else _groups(before, after)

    def read(bounds: Bounds) -> np.ndarray:
        lengths = extents(bounds)
        if 0 in lengths:
            return np.empty(lengths, source.dtype)
        box = [(0, n) for n in source.shape]
        flat_lengths, flat_cuts, dims, rest_cuts = [], [], [], []
        for i0, i1, j0, j1 in groups:
            low, high = bounds[kept_after[j0]]
            row = math.prod(after[j0 + 1 : j1])
            inner = math.prod(before[i0 + 1 : i1])
            first, last = low * row // inner, -(-high * row // inner)
            box[kept_before[i0]] = (first, last)
            flat_lengths.append((last - first) * inner)
            offset = low * row - first * inner
            flat_cuts.append(slice(offset, offset + (high - low) * row))
            dims += [high - low, *after[j0 + 1 : j1]]
            rest_cuts += [slice(None)]
            rest_cuts += [slice(*bounds[kept_after[j]]) for j in range(j0 + 1, j1)]
        data = source.read(tuple(box)).reshape(flat_lengths)[tuple(flat_cuts)]
        return data.reshape(dims)[tuple(rest_cuts)].reshape(lengths)

    return read
