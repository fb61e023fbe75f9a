"""Which published linear modules sit on which kernels: read off a weight map.

Adapter files name PyTorch modules; adapters here sit on kernels. The weight map of a model already
says which element of a kernel comes from which element of a published weight. Every transform only
moves elements, so the correspondence is found by sending numbered elements through it and looking
at where the first row and the first column of each kernel come from. That covers whatever a map
does with a linear layer: transposed, stacked over layers, several modules fused into one kernel,
one module split over several.

Shape legend:
  r rank   a published pair is A [r, in], B [out, r] with delta W = scale B A;
  ours is a [in, r], b [r, out]
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from jaxmods.nn.lora.adapters import KERNEL, Factors
from jaxmods.system import Params
from jaxmods.weights.errors import WeightError
from jaxmods.weights.lazy import Bounds, Lazy, Shape, extents
from jaxmods.weights.map import Binding, WeightMap, flatten


@dataclasses.dataclass(frozen=True)
class Published:
    """The names by which files speak of the modules of one model.

    Attributes:
      weight_map: of the model (or of a part of it, see `path`), whose keys give the modules' names.
        A model that is published in two layouts has two of these.
      component: what diffusers calls the model within a pipeline.
      kohya: prefix of kohya files ("lora_te1" and "lora_te2" for SDXL's text encoders).
      path: of the part of the parameters that the map is for; "" for all of them.
    """

    weight_map: WeightMap
    component: str = "transformer"
    kohya: str = "lora_unet"
    path: str = ""

    def part(self, base: Params) -> Params:
        """What the map is for. Raises WeightError when `base` has no such part."""
        for name in filter(None, self.path.split("/")):
            if name not in base:
                raise WeightError(f"lora: expected a part {self.path!r}, found {sorted(base)}")
            base = base[name]
        return base


@dataclasses.dataclass(frozen=True)
class Block:
    """Part of a kernel that one module fills.

    Attributes:
      columns: columns of the kernel. outputs: the module's outputs that stand there, in order.
      inputs: the module's input of each row of the kernel.
    """

    columns: np.ndarray
    outputs: np.ndarray
    inputs: np.ndarray


@dataclasses.dataclass(frozen=True)
class Piece:
    """A block of the kernel at `path`, in one layer (its number in C order; 0 without a stack)."""

    path: str
    layer: int
    block: Block


@dataclasses.dataclass(frozen=True)
class Module:
    """A published linear module, and the pieces of kernels that hold its weight.

    Attributes:
      name: as in the state dict, without ".weight".
      shape: of the weight, [out, in], or that of a convolution that is a kernel [in, out] here.
    """

    name: str
    shape: Shape
    pieces: tuple[Piece, ...]

    @property
    def out_size(self) -> int:
        """Outputs."""
        return self.shape[0]

    @property
    def in_size(self) -> int:
        """Inputs."""
        return math.prod(self.shape[1:])


def modules(published: Published, base: Params) -> dict[str, Module]:
    """Every linear module of a model, by its published name.

    Args:
      published: the map must cover exactly the part of `base` that it is for.
      base: parameters or their abstract form.

    Raises:
      WeightError: the map does not fit `base`.
    """
    prefix = f"{published.path}/" if published.path else ""
    pieces: dict[str, list[Piece]] = {}
    shapes: dict[str, Shape] = {}
    for binding in published.weight_map.bind(published.part(base)):
        layout = _layout(binding)
        for layer, keys in enumerate(binding.keys):
            for position, (key, shape) in enumerate(zip(keys, binding.torch_shapes, strict=True)):
                here = [
                    Piece(prefix + path, layer, block)
                    for path, blocks in layout.items()
                    if (block := blocks.get(position)) is not None
                ]
                if here and key.endswith(".weight"):
                    name = key.removesuffix(".weight")
                    pieces.setdefault(name, []).extend(here)
                    shapes[name] = shape
    return {name: Module(name, shapes[name], tuple(found)) for name, found in pieces.items()}


def _layout(binding: Binding) -> dict[str, dict[int, Block]]:
    """Blocks by kernel path and by the number of the PyTorch tensor, for each layer alike.

    Kernels that are no linear layers, or whose elements are laid out otherwise, are left out.
    """
    adaptable = {
        number: path
        for number, (path, shape) in enumerate(
            zip(binding.paths, binding.inner_shapes, strict=True)
        )
        if path.rsplit("/", 1)[-1] == KERNEL and len(shape) >= 2 and math.prod(shape[:-2]) == 1
    }
    if not adaptable or any(len(shape) < 2 for shape in binding.torch_shapes):
        return {}
    starts = np.cumsum([0, *(math.prod(shape) for shape in binding.torch_shapes)])
    numbered = tuple(
        _numbers(shape, int(start))
        for shape, start in zip(binding.torch_shapes, starts[:-1], strict=True)
    )
    widths = np.asarray([math.prod(shape[1:]) for shape in binding.torch_shapes])
    try:
        arrays = binding.entry.transform.to_jax(numbered, binding.inner_shapes)
        found = {path: _blocks(arrays[n], starts, widths) for n, path in adaptable.items()}
    except WeightError:  # tied weights and checked casts cannot hold numbers
        return {}
    return {path: blocks for path, blocks in found.items() if blocks}


def _numbers(shape: Shape, start: int) -> Lazy:
    """The array of `shape` that counts its elements from `start`."""
    strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]

    def read(bounds: Bounds) -> np.ndarray:
        total = np.full(extents(bounds), start, np.int64)
        for d, (low, high) in enumerate(bounds):
            steps = np.arange(low, high, dtype=np.int64) * strides[d]
            total += steps.reshape(-1, *(1,) * (len(shape) - d - 1))
        return total

    return Lazy(shape, np.dtype(np.int64), read, "element numbers")


def _blocks(kernel: Lazy, starts: np.ndarray, widths: np.ndarray) -> dict[int, Block]:
    """Blocks by tensor number of one kernel of element numbers; empty when it has another form."""
    *ones, rows, columns = kernel.shape
    lead = tuple((0, 1) for _ in ones)

    def read(row: tuple[int, int], column: tuple[int, int]) -> tuple[np.ndarray, ...]:
        """(tensor, output, input) of a row or a column."""
        element = kernel.read((*lead, row, column)).reshape(-1)
        tensor = np.searchsorted(starts, element, side="right") - 1
        return tensor, *np.divmod(element - starts[tensor], widths[tensor])

    tensor_of, output_of, first_input = read((0, 1), (0, columns))
    tensor_at_end, output_at_end, _ = read((rows - 1, rows), (0, columns))
    if not (np.array_equal(tensor_of, tensor_at_end) and np.array_equal(output_of, output_at_end)):
        return {}
    found = {}
    for tensor in np.unique(tensor_of):
        at = np.flatnonzero(tensor_of == tensor)
        column = int(at[0])
        down, output_down, inputs = read((0, rows), (column, column + 1))
        if np.any(down != tensor) or np.any(output_down != output_of[column]):
            return {}
        if np.any(first_input[at] != inputs[0]):
            return {}
        found[int(tensor)] = Block(at, output_of[at], inputs)
    return found


def targets_of(
    published: Published, base: Params, target_modules: str | Sequence[str]
) -> tuple[str, ...]:
    """Paths of the kernels that a published recipe adapts, for `LoraConfig.targets`.

    Args:
      target_modules: as PEFT takes them: names, each of which stands for every module that it ends
        ("attn.to_q"); or one regular expression for the whole name.

    Raises:
      ValueError: a name that no linear module has, or stacked layers (or fused modules) of which
        only some are meant: their kernel is one array.
    """
    known = modules(published, base)
    if isinstance(target_modules, str):
        pattern = re.compile(target_modules)
        wanted = {name for name in known if pattern.fullmatch(name)}
        missing = [] if wanted else [target_modules]
    else:
        wanted, missing = set(), []
        for suffix in target_modules:
            hits = {n for n in known if n == suffix or n.endswith(f".{suffix}")}
            wanted |= hits
            missing += [] if hits else [suffix]
    if missing:
        raise ValueError(
            f"lora target modules: expected names of linear modules of the {published.component}, "
            f"found no match for {', '.join(missing)}; its modules are named like "
            f"{', '.join(list(known)[:4])}"
        )
    paths = dict.fromkeys(
        piece.path for name in known if name in wanted for piece in known[name].pieces
    )
    for name, module in known.items():
        if name not in wanted and any(piece.path in paths for piece in module.pieces):
            raise ValueError(
                f"lora target modules: {name} shares a kernel with a module that is targeted, but "
                "is not targeted itself; name both, or neither"
            )
    return tuple(paths)


Pair = tuple[np.ndarray, np.ndarray]  # A [r, in], B [out, r]


def to_factors(pairs: Iterable[tuple[Module, Pair]], base: Params) -> dict[str, Factors]:
    """Published pairs (float32, of equal scale) as factors by kernel path.

    Layers of a stack that have no pair, and ranks that a layer lacks, are zeros; such zeros get no
    gradient, so they stay. Modules that share a kernel stand beside each other in its rank.
    """
    shapes = {path: tuple(leaf.shape) for path, leaf in flatten(base).items()}
    parts: dict[str, dict[int, list[tuple[Block, Pair]]]] = {}
    for module, pair in pairs:
        for piece in module.pieces:
            layers = parts.setdefault(piece.path, {})
            layers.setdefault(piece.layer, []).append((piece.block, pair))
    result = {}
    for path in (path for path in shapes if path in parts):
        layers = parts[path]
        *stack, rows, columns = shapes[path]
        rank = max(sum(A.shape[0] for _, (A, _) in found) for found in layers.values())
        a = np.zeros((math.prod(stack), rows, rank), np.float32)
        b = np.zeros((math.prod(stack), rank, columns), np.float32)
        for layer, found in layers.items():
            start = 0
            for block, (A, B) in found:
                stop = start + A.shape[0]
                a[layer, :, start:stop] = A[:, block.inputs].T
                b[layer, start:stop, block.columns] = B[block.outputs]
                start = stop
        result[path] = Factors(a.reshape(*stack, rows, rank), b.reshape(*stack, rank, columns))
    return result


def to_pairs(
    factors: Mapping[str, Factors], known: Iterable[Module]
) -> Iterator[tuple[Module, Pair]]:
    """Factors by kernel path as published pairs; modules that are all zeros are left out.

    Where one module lies in several kernels, what their factors have in common is written once; a
    rank grows only when they differ.
    """
    flat = {
        path: (
            np.asarray(f.a).reshape(-1, *f.a.shape[-2:]),
            np.asarray(f.b).reshape(-1, *f.b.shape[-2:]),
        )
        for path, f in factors.items()
    }
    for module in known:
        parts = []
        for piece in module.pieces:
            if piece.path in flat:
                a, b = (stacked[piece.layer] for stacked in flat[piece.path])
                parts.append((piece.block, *_own(a, b, piece.block)))
        parts = [part for part in parts if part[1].shape[1]]
        if parts:
            yield module, _joined(module, parts)


_Part = tuple[Block, np.ndarray, np.ndarray]  # block, a [in', r], b [r, columns of the block]


def _own(a: np.ndarray, b: np.ndarray, block: Block) -> Pair:
    """The ranks that concern a block: not padding, and not those of its neighbours alone."""
    mine = b[:, block.columns]
    used = np.any(mine != 0, axis=1)
    elsewhere = np.any(b != 0, axis=1) & ~used
    padding = ~np.any(a != 0, axis=0) & ~np.any(b != 0, axis=1)
    keep = ~(elsewhere | padding)
    return a[:, keep], mine[keep]


def _joined(module: Module, parts: Sequence[_Part]) -> Pair:
    """One pair for the pieces of a module."""
    (first, a0, b0), *others = parts
    same_a = all(np.array_equal(p.inputs, first.inputs) and _equal(a, a0) for p, a, _ in others)
    same_b = all(np.array_equal(p.outputs, first.outputs) and _equal(b, b0) for p, _, b in others)
    groups = [list(parts)] if same_a or same_b else [[part] for part in parts]
    rank = sum(group[0][1].shape[1] for group in groups)
    A = np.zeros((rank, module.in_size), a0.dtype)
    B = np.zeros((module.out_size, rank), b0.dtype)
    start = 0
    for group in groups:
        stop = start + group[0][1].shape[1]
        for block, a, b in group:
            A[start:stop, block.inputs] = a.T
            B[block.outputs, start:stop] = b.T
        start = stop
    return A, B


def _equal(x: np.ndarray, y: np.ndarray) -> bool:
    return x.shape == y.shape and bool(np.array_equal(x, y))
