"""The map at work: PyTorch weights into sharded parameters, parameters into a PyTorch folder.

Memory on the host is bounded in both directions. An import stages at most `host_bytes` (or one
tensor, when that is larger) per array and reads only the shards of this process; an export holds
one tensor.
"""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.typing import DTypeLike

from jaxmods.weights import lazy
from jaxmods.weights.errors import WeightError
from jaxmods.weights.lazy import Bounds, Lazy
from jaxmods.weights.map import Binding, WeightMap, flatten, unflatten
from jaxmods.weights.reader import WeightReader
from jaxmods.weights.report import Report, compare
from jaxmods.weights.writer import (
    Progress,
    check_target,
    file_order,
    new_folder,
    plan_shards,
    write_json,
    write_sharded,
)

HOST_BYTES = 64 << 20
SHARD_BYTES = 5_000_000_000


class Imported(NamedTuple):
    """Parameters (nested dict of `jax.Array`), and the optional keys that the file lacked."""

    params: dict[str, Any]
    missing: frozenset[str]


class Exported(NamedTuple):
    """Keys by weight file, and the bytes of all tensors."""

    files: dict[str, list[str]]
    nbytes: int


def report(reader: WeightReader, weight_map: WeightMap, abstract_params: Any) -> Report:
    """Key by key, what `reader` holds against what the parameters need. Reads no tensor."""
    found = {key: tensor.shape for key, tensor in reader.tensors.items()}
    return compare(weight_map, weight_map.bind(abstract_params), found, reader.source)


def import_params(
    reader: WeightReader,
    weight_map: WeightMap,
    abstract_params: Any,
    *,
    shardings: Any = None,
    dtype: DTypeLike | None = None,
    host_bytes: int = HOST_BYTES,
    progress: Progress | None = None,
) -> Imported:
    """PyTorch weights as parameters.

    Args:
      reader: from `open_weights` or `memory_reader`.
      weight_map: the map of the system.
      abstract_params: tree of arrays or `ShapeDtypeStruct`s (boxed or not) that gives the shapes.
      shardings: tree of `jax.sharding.Sharding` like the parameters; None takes those of
        `abstract_params`, and one local device where it has none.
      dtype: None keeps every tensor's stored dtype; "abstract" takes that of `abstract_params`;
        otherwise the dtype of all floating parameters.
      host_bytes: how much of one array is staged on the host at a time (at least one row of its
        leading axis, for stacked layers one layer).
      progress: called with (bytes read, bytes in all) of the parameters of this process.

    Returns:
      `Imported(params, missing)`; missing optional parameters are zeros.

    Raises:
      WeightError: keys are missing, extra or misshaped; tied tensors differ; dtypes are mixed
        within one array or need 64-bit mode.
    """
    arrays, missing = import_lazies(reader, weight_map, abstract_params, dtype=dtype)
    placed = _placements(abstract_params, shardings)
    shards = {p: _shards(a, placed[p]) for p, a in arrays.items()}
    total = sum(_box_bytes(a, box) for p, a in arrays.items() for box in shards[p])
    done = 0
    leaves = {}
    for path, array in arrays.items():
        buffers: dict[Any, jax.Array] = {}
        for box, devices in shards[path].items():
            for device, buffer in _place(array, box, devices, host_bytes).items():
                buffers[device] = buffer
            done += _box_bytes(array, box)
            if progress is not None:
                progress(done, total)
        leaves[path] = jax.make_array_from_single_device_arrays(
            array.shape, placed[path], list(buffers.values()), dtype=array.dtype
        )
    return Imported(unflatten(leaves), missing)


def import_lazies(
    reader: WeightReader,
    weight_map: WeightMap,
    abstract_params: Any,
    *,
    dtype: DTypeLike | None = None,
) -> tuple[dict[str, Lazy], frozenset[str]]:
    """The parameters by path, unread, and the missing optional keys; see `import_params`."""
    bindings = weight_map.bind(abstract_params)
    found = {key: tensor.shape for key, tensor in reader.tensors.items()}
    standing = compare(weight_map, bindings, found, reader.source)
    standing.check()
    abstract = flatten(abstract_params)
    arrays: dict[str, Lazy] = {}
    for binding in bindings:
        lazies = _jax_lazies(binding, reader, abstract, dtype)
        arrays.update(zip(binding.paths, lazies, strict=True))
    return {path: arrays[path] for path in abstract}, standing.missing_optional


def export_tensors(
    params: Any, weight_map: WeightMap, *, dtype: DTypeLike | None = None
) -> dict[str, Lazy]:
    """Every PyTorch tensor of `params` as a `Lazy` (`.all()` reads it), in the order of the map.

    `dtype` converts floating tensors; None keeps the parameters' dtypes.
    """
    leaves = flatten(params)
    tensors: dict[str, Lazy] = {}
    for binding in weight_map.bind(params):
        arrays = tuple(from_array(leaves[p], p) for p in binding.paths)
        if dtype is not None:
            arrays = tuple(cast_floating(a, jnp.dtype(dtype)) for a in arrays)
        for number, keys in enumerate(binding.keys):
            layer = tuple(
                _layer(a, np.unravel_index(number, binding.stack), s) if binding.stack else a
                for a, s in zip(arrays, binding.inner_shapes, strict=True)
            )
            for key, tensor in zip(
                keys, binding.entry.transform.to_torch(layer, len(keys)), strict=True
            ):
                tensors[key] = tensor
    return tensors


def export_params(
    params: Any,
    weight_map: WeightMap,
    folder: str | Path,
    config: Mapping[str, Any] | None = None,
    *,
    max_shard_bytes: int = SHARD_BYTES,
    assets: Mapping[str, Path | bytes] | None = None,
    dtype: DTypeLike | None = None,
    stem: str = "model",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Parameters as a PyTorch folder that appears whole or not at all.

    Writes `{stem}.safetensors` (or shards and an index), `config.json` when `config` is not empty,
    and the `assets` (tokenizer and processor files) by name. In a run of several processes all must
    call it; the first one writes.

    Args:
      params: nested dict of arrays; may be sharded over devices and processes.
      weight_map: the map of the system.
      folder: target; must not exist, or be empty, unless `overwrite`.
      config: content of `config.json`.
      max_shard_bytes: size of a weight file at which the next is begun.
      assets: file name (may hold "/") to a source path or to content.
      dtype: conversion of floating tensors; None keeps the parameters' dtypes.
      stem: name of the weight files ("diffusion_pytorch_model" for diffusers folders).
      overwrite: replace what is at `folder`, after the new one is complete.
      progress: called with (bytes written, bytes in all).

    Raises:
      WeightError: the folder is taken, the disk too small, the map does not fit, a bad asset name.
    """
    folder = Path(folder)
    tensors = export_tensors(params, weight_map, dtype=dtype)
    nbytes = sum(t.nbytes for t in tensors.values())
    if jax.process_index() != 0:
        for keys in plan_shards(tensors, max_shard_bytes, stem).values():
            for key in file_order({key: tensors[key] for key in keys}):
                tensors[key].all()  # takes part in the gathers of the writing process
        multihost_utils.sync_global_devices("export_params")
        return Exported({}, nbytes)
    check_target(folder, overwrite)
    with new_folder(folder, overwrite, nbytes) as work:
        files = write_sharded(
            work, tensors, max_shard_bytes=max_shard_bytes, stem=stem, progress=progress
        )
        if config:
            write_json(work / "config.json", dict(config))
        for name, source in (assets or {}).items():
            write_asset(work, name, source)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("export_params")
    return Exported(files, nbytes)


def _jax_lazies(
    binding: Binding, reader: WeightReader, abstract: Mapping[str, Any], dtype: DTypeLike | None
) -> tuple[Lazy, ...]:
    """The arrays of a binding, stacked layers included."""
    wanted = None
    if isinstance(dtype, str) and dtype == "abstract":
        wanted = jnp.dtype(abstract[binding.paths[0]].dtype)
    elif dtype is not None:
        wanted = jnp.dtype(dtype)
    absent_dtype = wanted or _dtype_of_others(binding, reader, abstract)
    rows = []
    for keys in binding.keys:
        sources = []
        for key, shape in zip(keys, binding.torch_shapes, strict=True):
            if key in reader.tensors:
                source = reader.tensors[key]
                sources.append(source if wanted is None else cast_floating(source, wanted))
            elif not (binding.entry.transform.any_of and any(k in reader.tensors for k in keys)):
                sources.append(lazy.zeros(shape, absent_dtype, key))
        rows.append(binding.entry.transform.to_jax(tuple(sources), binding.inner_shapes))
    result = []
    for position, (path, shape) in enumerate(zip(binding.paths, binding.jax_shapes, strict=True)):
        parts = [row[position] for row in rows]
        if not binding.stack:
            array = parts[0]
        elif parts:
            array = lazy.stack(parts).reshape(shape)
        else:  # a stack of no layers
            array = lazy.zeros(shape, absent_dtype, path)
        if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
            raise WeightError(
                f"{array.name}: {array.dtype} needs 64-bit mode of JAX, which is off; choose a "
                f"dtype for the import, or give {path} a Cast in the map"
            )
        result.append(array)
    return tuple(result)


def _dtype_of_others(
    binding: Binding, reader: WeightReader, abstract: Mapping[str, Any]
) -> np.dtype:
    """Dtype of zeros for absent keys: that of the keys that are there, else of the parameter."""
    for keys in binding.keys:
        for key in keys:
            if key in reader.tensors:
                return reader.tensors[key].dtype
    return jnp.dtype(abstract[binding.paths[0]].dtype)


def cast_floating(source: Lazy, dtype: np.dtype) -> Lazy:
    """Floating values in another dtype, others as they are."""
    return source.cast(dtype) if jnp.issubdtype(source.dtype, jnp.floating) else source


def _placements(abstract_params: Any, shardings: Any) -> dict[str, jax.sharding.Sharding]:
    """The sharding of every parameter by path."""
    if shardings is not None:
        return flatten(shardings)
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    leaves = flatten(abstract_params)
    return {path: getattr(leaf, "sharding", None) or default for path, leaf in leaves.items()}


def _shards(array: Lazy, sharding: jax.sharding.Sharding) -> dict[Bounds, list[Any]]:
    """The boxes of `array` that this process holds, each with its devices."""
    boxes: dict[Bounds, list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(array.shape).items():
        boxes.setdefault(_box(index, array.shape), []).append(device)
    return boxes


def _box_bytes(array: Lazy, box: Bounds) -> int:
    return math.prod(lazy.extents(box)) * array.dtype.itemsize


def _place(array: Lazy, box: Bounds, devices: list[Any], host_bytes: int) -> dict[Any, jax.Array]:
    """One box of `array` on each of `devices`, read once, in pieces when it is large."""
    if not box or _box_bytes(array, box) <= host_bytes or box[0][1] - box[0][0] <= 1:
        block = _owned(array.read(box))
        return {device: jax.device_put(block, device) for device in devices}
    shape = lazy.extents(box)
    row_bytes = _box_bytes(array, box) // shape[0]
    step = min(shape[0], max(1, host_bytes // row_bytes))
    buffers = {d: jnp.zeros(shape, array.dtype, device=d) for d in devices}
    for start in range(0, shape[0], step):
        # The last piece reaches back, so that all pieces have one shape and compile once.
        start = min(start, shape[0] - step)
        low = box[0][0] + start
        block = _owned(array.read(((low, low + step), *box[1:])))
        for device in devices:
            buffers[device] = _update(buffers[device], jax.device_put(block, device), start)
        jax.block_until_ready(list(buffers.values()))
    return buffers


@functools.partial(jax.jit, donate_argnums=0)
def _update(buffer: jax.Array, block: jax.Array, start: int) -> jax.Array:
    result = jax.lax.dynamic_update_slice_in_dim(_bits(buffer), _bits(block), start, 0)
    return jax.lax.bitcast_convert_type(result, buffer.dtype)


def _bits(array: jax.Array) -> jax.Array:
    """Floats as whole numbers: where a device has no such float type, XLA moves them by way of
    another, and the bits of a NaN are lost."""
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return array
    return jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{array.dtype.itemsize * 8}"))


def _owned(value: np.ndarray) -> np.ndarray:
    """A C-ordered copy, unless `value` is a fresh one: devices may alias host memory."""
    if value.flags.owndata and value.flags.c_contiguous and value.flags.writeable:
        return value
    return np.array(value, order="C")


def from_array(array: Any, name: str) -> Lazy:
    """A parameter (NumPy or JAX, sharded or not) as a `Lazy` that moves only what is read.

    An array that spans several processes is gathered as it is read: all must read the same boxes.
    """
    if not isinstance(array, jax.Array):
        return lazy.from_numpy(np.asarray(array), name)
    shape, dtype = tuple(array.shape), np.dtype(array.dtype)
    if not (array.is_fully_addressable or array.is_fully_replicated):
        return Lazy(shape, dtype, functools.partial(_read_gathered, array), name)
    shards = {_box(s.index, shape): s.data for s in array.addressable_shards}
    if len(shards) == 1:
        data = next(iter(shards.values()))
        return Lazy(shape, dtype, functools.partial(_read_local, data), name)

    def read(bounds: Bounds) -> np.ndarray:
        out = np.empty(lazy.extents(bounds), dtype)
        for box, data in shards.items():
            common = tuple(
                (max(a, c), min(b, d)) for (a, b), (c, d) in zip(bounds, box, strict=True)
            )
            if all(low < high for low, high in common):
                target = _moved(common, bounds)
                lazy.cut_box(out, target)[...] = _read_local(data, _moved(common, box))
        return out

    return Lazy(shape, dtype, read, name)


def _read_local(data: jax.Array, bounds: Bounds) -> np.ndarray:
    """A box of an array on one device: of one that is not the host, only its rows are moved."""
    if not bounds or next(iter(data.devices())).platform == "cpu":
        return lazy.cut_box(np.asarray(data), bounds)
    low, high = bounds[0]
    rows = np.asarray(_rows(data, low, high - low)).view(data.dtype)
    return lazy.cut_box(rows, ((0, high - low), *bounds[1:]))


def _read_gathered(array: jax.Array, bounds: Bounds) -> np.ndarray:
    """A box of an array on several processes; its rows are gathered on every one of them."""
    low, high = bounds[0]
    gathered = multihost_utils.process_allgather(_rows(array, low, high - low), tiled=True)
    rows = np.asarray(gathered).view(array.dtype)
    return lazy.cut_box(rows, ((0, high - low), *bounds[1:]))


@functools.partial(jax.jit, static_argnums=2)
def _rows(array: jax.Array, start: int, count: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(_bits(array), start, count, 0)


def _moved(bounds: Bounds, origin: Bounds) -> Bounds:
    """A box relative to the start of another."""
    return tuple((low - o, high - o) for (low, high), (o, _) in zip(bounds, origin, strict=True))


def _box(index: tuple[slice, ...] | None, shape: lazy.Shape) -> Bounds:
    slices = index or ()
    return tuple(s.indices(n)[:2] for s, n in zip(slices, shape, strict=True))


def _layer(array: Lazy, index: tuple[Any, ...], shape: lazy.Shape) -> Lazy:
    """One layer of a stacked array."""
    for axis, position in enumerate(index):
        array = array.cut(axis, int(position), int(position) + 1)
    return array.reshape(shape)


def write_asset(folder: Path, name: str, source: Path | bytes) -> None:
    """A further file of an exported folder, copied or from its content.

    Raises:
      WeightError: a name that is taken or leads out of the folder.
    """
    target = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts or target.exists():
        raise WeightError(f"asset {name!r}: expected a new relative file name")
    target.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(source, bytes):
        target.write_bytes(source)
    else:
        shutil.copyfile(source, target)
