"""The map: transforms against explicit NumPy formulas, round trips of random maps, strictness."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxmods.weights import (
    BiasHeads,
    Cast,
    Conv1d,
    Conv2d,
    Conv3d,
    Drop,
    Entry,
    Fuse,
    Identity,
    Linear,
    LinearHeads,
    Permute,
    Reshape,
    Split,
    Squeeze,
    Stack,
    Tie,
    Transform,
    WeightMap,
    export_tensors,
    import_lazies,
    import_params,
    memory_reader,
)
from jaxmods.weights.lazy import Bounds, Lazy, from_numpy, same_bits
from jaxmods.weights.map import flatten, unflatten
from jaxmods.weights.reader import WeightReader

RANDOM = settings(max_examples=60, deadline=None, database=None)
Struct = jax.ShapeDtypeStruct


def struct(*shape: int, dtype: Any = np.float32) -> Struct:
    return Struct(shape, dtype)


def numbered(*shape: int) -> np.ndarray:
    return np.arange(math.prod(shape), dtype=np.float32).reshape(shape)


def convert(transform: Transform, tensors: list[np.ndarray], *shapes: tuple[int, ...]) -> Any:
    """`tensors` as arrays of `shapes`, by a map of one entry."""
    keys = tuple(f"t{n}" for n in range(len(tensors)))
    paths = tuple(f"j{n}" for n in range(len(shapes)))
    weight_map = WeightMap((Entry(keys, paths, transform),))
    abstract = {p: struct(*s, dtype=tensors[0].dtype) for p, s in zip(paths, shapes, strict=True)}
    params, _ = import_params(
        memory_reader(dict(zip(keys, tensors, strict=True))), weight_map, abstract
    )
    back = export_tensors(params, weight_map)
    for key, tensor in zip(keys, tensors, strict=True):
        assert same_bits(back[key].all(), tensor)
    return [np.asarray(params[p]) for p in paths]


w, k = numbered(6, 4), numbered(6, 4) + 100
CASES: dict[str, tuple[Transform, list[np.ndarray], list[np.ndarray]]] = {
    "identity": (Identity(), [w], [w]),
    "scalar": (Identity(), [np.float32(3).reshape(())], [np.float32(3).reshape(())]),
    "linear": (Linear(), [w], [w.T]),
    "heads_out": (LinearHeads(), [w], [w.T.reshape(4, 3, 2)]),
    "heads_in": (LinearHeads("in"), [w], [w.T.reshape(2, 2, 6)]),
    "bias_heads": (BiasHeads(), [numbered(6)], [numbered(6).reshape(2, 3)]),
    "conv1d": (Conv1d(), [numbered(5, 3, 2)], [numbered(5, 3, 2).transpose(2, 1, 0)]),
    "conv2d": (Conv2d(), [numbered(5, 3, 2, 4)], [np.einsum("oihw->hwio", numbered(5, 3, 2, 4))]),
    "conv3d": (
        Conv3d(),
        [numbered(5, 3, 2, 4, 1)],
        [np.einsum("oithw->thwio", numbered(5, 3, 2, 4, 1))],
    ),
    "permute": (Permute((1, 2, 0)), [numbered(2, 3, 4)], [numbered(2, 3, 4).transpose(1, 2, 0)]),
    "reshape": (Reshape((2, -1)), [numbered(2, 12)], [numbered(4, 6)]),
    "squeeze": (Squeeze(1), [numbered(3, 1, 4)], [numbered(3, 4)]),
    "patches": (
        Conv2d() >> Reshape((2, 2, 3, 5)),
        [numbered(5, 3, 2, 2)],
        [np.einsum("oihw->hwio", numbered(5, 3, 2, 2)).reshape(12, 5)],
    ),
    "fuse": (Linear() >> Fuse(1), [w, k], [np.concatenate([w.T, k.T], 1)]),
    "fuse_sizes": (
        Linear() >> Fuse(-1, sizes=(6, 2)),
        [w, k[:2]],
        [np.concatenate([w.T, k[:2].T], 1)],
    ),
    "fuse_heads": (
        LinearHeads() >> Fuse(1),
        [w, k],
        [np.concatenate([w.T.reshape(4, 3, 2), k.T.reshape(4, 3, 2)], 1)],
    ),
    "stack": (Linear() >> Stack(1), [w, k], [np.stack([w.T, k.T], 1)]),
    "split": (Split(0), [w], [w[:2], w[2:]]),
    "split_linear": (Split(0) >> Linear(), [w], [w[:2].T, w[2:].T]),
    "tie": (Tie(), [w, w], [w]),
    "tie_linear": (Tie() >> Linear(), [w, w], [w.T]),
    "cast": (Cast("int64", "int32"), [np.array([1, 2])], [np.array([1, 2], np.int32)]),
}


@pytest.mark.parametrize("name", CASES)
def test_transform_is_its_formula_and_inverts(name: str) -> None:
    transform, tensors, arrays = CASES[name]
    result = convert(transform, tensors, *(a.shape for a in arrays))
    assert len(result) == len(arrays)
    for found, expected in zip(result, arrays, strict=True):
        assert same_bits(found, expected)


def test_layers_stack_and_pair_in_numeric_order() -> None:
    tensors = {f"l.{i}.w": numbered(2, 3) + 10 * i for i in range(11)}
    tensors |= {f"d.{i}.{j}.b": numbered(2) + 10 * i + j for i in range(2) for j in range(3)}
    tensors |= {f"e.{n}.b": numbered(2) + n for n in range(1, 7)}
    weight_map = WeightMap(
        (
            Entry("l.{i}.w", "l_{i}/w", Linear()),
            Entry("d.{i}.{j}.b", "d_{i}/b"),
            Entry("e.{3*g+i+1}.b", "e/b"),
        )
    )
    abstract = {f"l_{i}": {"w": struct(3, 2)} for i in range(11)}
    abstract |= {f"d_{i}": {"b": struct(3, 2)} for i in range(2)}
    abstract |= {"e": {"b": struct(2, 3, 2)}}
    params, _ = import_params(memory_reader(tensors), weight_map, abstract)
    for i in range(11):
        assert same_bits(np.asarray(params[f"l_{i}"]["w"]), tensors[f"l.{i}.w"].T)
    for i in range(2):
        expected = np.stack([tensors[f"d.{i}.{j}.b"] for j in range(3)])
        assert same_bits(np.asarray(params[f"d_{i}"]["b"]), expected)
        expected = np.stack([tensors[f"e.{3 * i + j + 1}.b"] for j in range(3)])
        assert same_bits(np.asarray(params["e"]["b"][i]), expected)
    stacked = WeightMap((Entry("l.{i}.w", "l/w", Linear()),))
    only = {key: t for key, t in tensors.items() if key.startswith("l.")}
    params, _ = import_params(memory_reader(only), stacked, {"l": {"w": struct(11, 3, 2)}})
    assert same_bits(np.asarray(params["l"]["w"][10]), tensors["l.10.w"].T)


def test_maps_combine_under_prefixes() -> None:
    part = WeightMap((Entry("w.{i}", "w", Linear()), Drop("position_ids", "constant")), ("a/b",))
    whole = part.under("vae.", "vae/") + part.under("unet.", "unet/")
    abstract = {"vae": {"w": struct(1, 3, 2)}, "unet": {"w": struct(2, 3, 2)}}
    expected = {"vae.w.0": (2, 3), "unet.w.0": (2, 3), "unet.w.1": (2, 3)}
    assert whole.torch_shapes(abstract) == expected
    assert whole.dropped("vae.position_ids") is not None
    assert whole.dropped("position_ids") is None
    assert whole.hub_names == ("a/b", "a/b")


# --- random maps ---------------------------------------------------------------------------------

DTYPES = [np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
side = st.integers(1, 4)


@st.composite
def inner(draw: st.DrawFn) -> tuple[Transform, int, tuple[tuple[int, ...], ...]]:
    """A transform with its number of PyTorch keys and the shapes of its arrays."""

    def shape(ndim: int) -> tuple[int, ...]:
        return tuple(draw(side) for _ in range(ndim))

    kind = draw(st.sampled_from(sorted(KINDS)))
    return KINDS[kind](draw, shape)


def _fuse(draw: st.DrawFn, shape: Any) -> Any:
    sizes = tuple(draw(side) for _ in range(draw(st.integers(2, 3))))
    first, _ = shape(2)
    return Linear() >> Fuse(1, sizes), len(sizes), ((first, sum(sizes)),)


def _split(draw: st.DrawFn, shape: Any) -> Any:
    rest, _ = shape(2)
    parts = draw(st.integers(2, 3))
    return Split(0) >> Linear(), 1, tuple((rest, draw(side)) for _ in range(parts))


def _reshape(draw: st.DrawFn, shape: Any) -> Any:
    target = shape(draw(st.integers(1, 4)))
    factors = list(target)
    divided = draw(st.permutations(factors))
    return Reshape(tuple(divided)), 1, (target,)


KINDS: dict[str, Any] = {
    "identity": lambda d, s: (Identity(), 1, (s(d(st.integers(0, 3))),)),
    "linear": lambda d, s: (Linear(), 1, (s(2),)),
    "heads_out": lambda d, s: (LinearHeads(), 1, (s(3),)),
    "heads_in": lambda d, s: (LinearHeads("in"), 1, (s(3),)),
    "bias": lambda d, s: (BiasHeads(), 1, (s(2),)),
    "conv": lambda d, s: (Conv2d(), 1, (s(4),)),
    "patches": lambda d, s: (Conv2d() >> Reshape((1, 1, -1, 1)) >> Reshape((1, -1)), 1, ((6,),)),
    "squeeze": lambda d, s: (Squeeze(1) >> Linear(), 1, (s(2),)),
    "stack": lambda d, s: (LinearHeads() >> Stack(1), 3, ((2, 3, *s(2)),)),
    "tie": lambda d, s: (Tie() >> Linear(), 2, (s(2),)),
    "fuse": _fuse,
    "split": _split,
    "reshape": _reshape,
}


@dataclasses.dataclass(frozen=True)
class World:
    """A random map with parameters and a PyTorch state dict that fit it."""

    weight_map: WeightMap
    abstract: dict[str, Any]
    tensors: dict[str, np.ndarray]


@st.composite
def worlds(draw: st.DrawFn) -> World:
    entries: list[Entry] = []
    leaves: dict[str, Struct] = {}
    dtypes: dict[int, np.dtype] = {}
    for number in range(draw(st.integers(1, 4))):
        transform, keys, shapes = draw(inner())
        stack = tuple(draw(st.lists(side, max_size=2)))
        paired = draw(st.sampled_from([0, 0, 2]))
        stacked = "".join(f".{{s{n}}}" for n in range(len(stack)))
        torch = tuple(f"m{number}.k{n}{stacked}" + (".{p}" if paired else "") for n in range(keys))
        paths = tuple(
            f"m{number}/" + ("b_{p}/" if paired else "") + f"a{n}" for n in range(len(shapes))
        )
        entries.append(Entry(torch, paths, transform))
        dtypes[number] = draw(st.sampled_from(DTYPES))
        for path, shape in zip(paths, shapes, strict=True):
            for p in range(max(1, paired)):
                name = path.replace("{p}", str(p))
                leaves[name] = Struct((*stack, *shape), dtypes[number])
    weight_map = WeightMap(tuple(entries))
    abstract = unflatten(leaves)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    tensors: dict[str, np.ndarray] = {}
    for binding in weight_map.bind(abstract):
        dtype = dtypes[int(binding.paths[0].split("/")[0][1:])]
        for row in binding.keys:
            for key, shape in zip(row, binding.torch_shapes, strict=True):
                bits = rng.integers(0, 256, (math.prod(shape) * dtype.itemsize,), np.uint8)
                tensors[key] = bits.view(dtype).reshape(shape)  # any bits: NaNs, infinities
            if "tie" in str(binding.entry.transform).lower():
                tensors |= dict.fromkeys(row, tensors[row[0]])
    return World(weight_map, abstract, tensors)


@RANDOM
@given(worlds())
def test_torch_to_jax_to_torch_is_bit_equal(world: World) -> None:
    params, missing = import_params(memory_reader(world.tensors), world.weight_map, world.abstract)
    assert missing == frozenset()
    assert {p: a.shape for p, a in flatten(params).items()} == {
        p: a.shape for p, a in flatten(world.abstract).items()
    }
    back = export_tensors(params, world.weight_map)
    assert set(back) == set(world.tensors)
    for key, tensor in world.tensors.items():
        assert same_bits(back[key].all(), tensor), key


@RANDOM
@given(worlds(), st.integers(0, 2**32 - 1))
def test_jax_to_torch_to_jax_is_bit_equal(world: World, seed: int) -> None:
    rng = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda s: rng.standard_normal(s.shape).astype(s.dtype).reshape(s.shape), world.abstract
    )
    tensors = {k: t.all() for k, t in export_tensors(params, world.weight_map).items()}
    again, _ = import_params(memory_reader(tensors), world.weight_map, world.abstract)
    for path, leaf in flatten(params).items():
        assert same_bits(np.asarray(flatten(again)[path]), np.asarray(leaf)), path


@RANDOM
@given(worlds(), st.data())
def test_reading_a_box_equals_the_box_of_the_whole(world: World, data: st.DataObject) -> None:
    reader = memory_reader(world.tensors)
    arrays, _ = import_lazies(reader, world.weight_map, world.abstract)
    exported = export_tensors(
        import_params(reader, world.weight_map, world.abstract).params, world.weight_map
    )
    for name, array in {**arrays, **exported}.items():
        whole = array.all()
        box = tuple(
            tuple(sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)), label=name)))
            for n in array.shape
        )
        part = whole[(*(slice(*b) for b in box), ...)]
        assert same_bits(array.read(box), part), (name, box)


@settings(RANDOM, max_examples=6)
@given(worlds(), st.data())
def test_sharded_import_equals_whole_import(world: World, data: st.DataObject) -> None:
    count = 2 ** int(math.log2(len(jax.devices())))
    mesh = Mesh(np.array(jax.devices()[:count]).reshape(-1, min(2, count)), ("a", "b"))

    def place(leaf: Struct) -> NamedSharding:
        axes = data.draw(st.permutations(["a", "b", None, None, None, None, None]))
        spec = [
            axis if axis and n % mesh.shape[axis] == 0 else None
            for axis, n in zip(axes, leaf.shape, strict=False)
        ]
        return NamedSharding(mesh, PartitionSpec(*spec))

    shardings = jax.tree.map(place, world.abstract)
    reader = memory_reader(world.tensors)
    whole = flatten(import_params(reader, world.weight_map, world.abstract).params)
    for host_bytes in (1, 1 << 20):
        params, _ = import_params(
            reader, world.weight_map, world.abstract, shardings=shardings, host_bytes=host_bytes
        )
        for path, leaf in flatten(params).items():
            assert leaf.sharding == flatten(shardings)[path]
            assert same_bits(np.asarray(leaf), np.asarray(whole[path])), path
        for key, tensor in export_tensors(params, world.weight_map).items():
            assert same_bits(tensor.all(), world.tensors[key]), key


def test_a_shard_reads_only_its_own_bytes() -> None:
    counted = 0

    def counting(shape: tuple[int, ...], name: str) -> Lazy:
        source = from_numpy(np.zeros(shape, np.float32), name)

        def read(bounds: Bounds) -> np.ndarray:
            nonlocal counted
            value = source.read(bounds)
            counted += value.nbytes
            return value

        return dataclasses.replace(source, read=read)

    names = [f"l.{i}.{n}" for i in range(4) for n in "qkv"]
    reader = WeightReader("counting", {name: counting((64, 32), name) for name in names})
    weight_map = WeightMap(
        (Entry(tuple(f"l.{{i}}.{n}" for n in "qkv"), "w", LinearHeads() >> Stack(1)),)
    )
    arrays, _ = import_lazies(reader, weight_map, {"w": struct(4, 32, 3, 8, 8)})
    assert counted == 0
    boxes: list[Bounds] = [
        ((1, 2), (0, 32), (0, 3), (0, 8), (0, 8)),  # one layer
        ((0, 4), (8, 16), (0, 3), (0, 8), (0, 8)),  # a quarter of the inputs
        ((0, 4), (0, 32), (0, 3), (2, 4), (0, 8)),  # a quarter of the heads
        ((0, 4), (0, 32), (2, 3), (0, 8), (0, 8)),  # the values only
    ]
    for box in boxes:
        counted = 0
        part = arrays["w"].read(box)
        assert counted == part.nbytes
