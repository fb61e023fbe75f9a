"""Weight files: safetensors and `.bin`, damage of every kind, bounded memory."""

from __future__ import annotations

import json
import math
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch

from jaxmods.weights import (
    Entry,
    Fuse,
    Linear,
    WeightError,
    WeightMap,
    export_params,
    import_params,
    memory_reader,
    open_weights,
)
from jaxmods.weights.lazy import Bounds, Lazy, from_numpy, same_bits
from jaxmods.weights.reader import DTYPES, WeightReader
from jaxmods.weights.writer import new_folder, plan_shards, write_safetensors, write_sharded


def tensors(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "a.weight": rng.standard_normal((5, 3)).astype(np.float32),
        "b.weight": rng.standard_normal((4, 2, 3)).astype(ml_dtypes.bfloat16),
        "scale": np.array(2.5, np.float32),
        "half": rng.standard_normal(7).astype(np.float16),
        "table": rng.integers(0, 9, (3, 3)),
        "flags": np.array([True, False]),
        "empty": np.zeros((0, 4), np.float32),
    }


def lazies(arrays: dict[str, np.ndarray]) -> dict[str, Lazy]:
    return {key: from_numpy(array, key) for key, array in arrays.items()}


def assert_holds(reader: WeightReader, arrays: dict[str, np.ndarray]) -> None:
    assert set(reader.tensors) == set(arrays)
    for key, array in arrays.items():
        assert same_bits(reader.tensors[key].all(), array), key


# --- reading -------------------------------------------------------------------------------------


def test_reads_what_the_library_wrote(tmp_path: Path) -> None:
    arrays = {k: v for k, v in tensors().items() if v.dtype != ml_dtypes.bfloat16}
    save_file(arrays, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_holds(open_weights(tmp_path), arrays)
    assert_holds(open_weights(tmp_path / "model.safetensors"), arrays)
    part = open_weights(tmp_path).tensors["a.weight"].read(((1, 4), (0, 2)))
    assert same_bits(part, arrays["a.weight"][1:4, 0:2])


def test_the_libraries_read_what_is_written(tmp_path: Path) -> None:
    arrays = tensors()
    write_safetensors(tmp_path / "model.safetensors", lazies(arrays))
    found = load_file(tmp_path / "model.safetensors")
    assert set(found) == set(arrays)
    for key, array in arrays.items():
        assert same_bits(np.asarray(found[key]), array), key
    assert load_torch(tmp_path / "model.safetensors")["b.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=list(DTYPES))
def test_every_dtype_survives(tmp_path: Path, dtype: np.dtype) -> None:
    bits = np.random.default_rng(0).integers(0, 2, 6 * dtype.itemsize, np.uint8)
    arrays = {"w": bits.view(dtype).reshape(2, 3)}
    write_safetensors(tmp_path / "w.safetensors", lazies(arrays))
    assert_holds(open_weights(tmp_path), arrays)


def test_shards_with_an_index(tmp_path: Path) -> None:
    arrays = tensors()
    plan = write_sharded(tmp_path, lazies(arrays), max_shard_bytes=64)
    assert len(plan) > 2
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in arrays.values())
    assert set(index["weight_map"]) == set(arrays)
    assert_holds(open_weights(tmp_path), arrays)
    for name, keys in plan.items():
        assert set(load_file(tmp_path / name)) == set(keys)


def test_shard_sizes_are_kept() -> None:
    arrays = {f"t{n}": np.zeros(n, np.uint8) for n in (3, 4, 5, 20, 1)}
    plan = plan_shards(lazies(arrays), 10)
    assert list(plan.values()) == [["t3", "t4"], ["t5"], ["t20"], ["t1"]]
    assert next(iter(plan)) == "model-00001-of-00004.safetensors"
    assert list(plan_shards(lazies(arrays), 33)) == ["model.safetensors"]
    with pytest.raises(ValueError, match="positive"):
        plan_shards(lazies(arrays), 0)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrapped", [None, "state_dict"])
def test_reads_torch_files(tmp_path: Path, zipped: bool, wrapped: str | None) -> None:
    state = {
        "w": torch.arange(6, dtype=torch.float32).reshape(2, 3).T,  # not contiguous
        "b": torch.tensor([1.5, -2.0], dtype=torch.bfloat16, requires_grad=True),
        "s": torch.tensor(3.0),
    }
    saved = {wrapped: state, "epoch": 3} if wrapped else state
    torch.save(saved, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    expected = {
        "w": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "b": np.array([1.5, -2.0], ml_dtypes.bfloat16),
        "s": np.float32(3).reshape(()),
    }
    assert_holds(open_weights(tmp_path), expected)


class Planted:
    """Unpickling it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


def test_pickles_are_never_executed(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1), "x": Planted(tmp_path / "owned")}, tmp_path / "m.pt")
    with pytest.raises(WeightError, match="pickled objects are not executed"):
        open_weights(tmp_path / "m.pt")
    assert not (tmp_path / "owned").exists()


def test_torch_files_that_are_no_state_dict(tmp_path: Path) -> None:
    torch.save({"step": 3, "lr": torch.zeros(1)}, tmp_path / "m.pt")
    with pytest.raises(WeightError, match=r"expected a state dict .* found dict with keys step"):
        open_weights(tmp_path)


def test_truncated_torch_file(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1000)}, tmp_path / "m.pt")
    whole = (tmp_path / "m.pt").read_bytes()
    (tmp_path / "m.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightError, match=r"m\.pt: .*(damaged|pickled)"):
        open_weights(tmp_path)


# --- damage --------------------------------------------------------------------------------------


def raw(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(begin: int, end: int, shape: Any = (2,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a safetensors file"),
    "page": (b"<!DOCTYPE html><html>" * 10, "not a safetensors file"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
    "header_cut": (raw({"w": entry(0, 8)}, b"")[:-3], "truncated within its header"),
    "header_text": (raw(b"{not json", b""), "bad header, not valid JSON"),
    "header_list": (raw(b"{}", b"")[:8] + b"[]", "not a safetensors file"),
    "header_bytes": (raw(b'{"\xff": 1}', b""), "bad header, not valid JSON"),
    "data_cut": (
        raw({"w": entry(0, 8), "x": entry(8, 16)}, bytes(12)),
        r"truncated, expected 16 bytes of tensors, found 12; cut off: x;",
    ),
    "data_more": (raw({"w": entry(0, 8)}, bytes(9)), "1 bytes after the last tensor"),
    "wrong_size": (raw({"w": entry(0, 4)}, bytes(4)), r"w F32\[2\] needs 8 bytes"),
    "overlap": (raw({"w": entry(0, 8), "x": entry(4, 12)}, bytes(12)), "overlap before x"),
    "gap": (raw({"w": entry(0, 8), "x": entry(9, 17)}, bytes(17)), "leave a gap before x"),
    "dtype": (raw({"w": entry(0, 8, dtype="F4")}, bytes(8)), "w has dtype F4"),
    "negative": (raw({"w": entry(0, 8, shape=(-2,))}, bytes(8)), "negative or non-integer"),
    "float": (raw({"w": entry(0, 8, shape=(2.0,))}, bytes(8)), "negative or non-integer"),
    "no_shape": (raw({"w": {"dtype": "F32"}}, b""), "w has no valid dtype, shape"),
    "no_object": (raw({"w": 3}, b""), "w has no valid dtype, shape"),
    "twice": (
        raw(b'{"w":' + json.dumps(entry(0, 8)).encode() + b',"w":{}}', bytes(8)),
        "w is there twice",
    ),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_file_is_one_clear_error(tmp_path: Path, kind: str) -> None:
    content, message = DAMAGED[kind]
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(WeightError, match=message) as caught:
        open_weights(tmp_path)
    assert "model.safetensors" in str(caught.value)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, lazies(tensors()))
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(WeightError, match=r"model\.safetensors"):
            open_weights(path)


def test_wrong_index(tmp_path: Path) -> None:
    write_sharded(tmp_path, lazies(tensors()), max_shard_bytes=64)
    path = tmp_path / "model.safetensors.index.json"
    good = json.loads(path.read_text())
    files = good["weight_map"]
    first, last = sorted(set(files.values()))[0], sorted(set(files.values()))[-1]

    def check(content: Any, message: str) -> None:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.raises(WeightError, match=message):
            open_weights(tmp_path)

    check("{", "not valid JSON")
    check([], "`weight_map`")
    check({"weight_map": {"w": 3}}, "`weight_map`")
    check({"weight_map": {**files, "ghost": first}}, rf"do not hold ghost \(in {first}\)")
    check({"weight_map": {k: f for k, f in files.items() if k != "scale"}}, "not list scale")
    check({"weight_map": {**files, "w": "../x.safetensors"}}, "plain file names")
    check({"weight_map": {**files, "w": "y.safetensors"}}, r"y\.safetensors, which is not in.*as w")
    path.write_text(json.dumps(good))
    (tmp_path / last).write_bytes((tmp_path / last).read_bytes()[:-1])
    with pytest.raises(WeightError, match=rf"{last}: truncated"):
        open_weights(tmp_path)
    (tmp_path / first).unlink()
    with pytest.raises(WeightError, match=rf"names {first}, which is not in the folder"):
        open_weights(tmp_path)


def test_nothing_and_too_much_to_open(tmp_path: Path) -> None:
    with pytest.raises(WeightError, match="no such file"):
        open_weights(tmp_path / "absent")
    with pytest.raises(WeightError, match="found none"):
        open_weights(tmp_path)
    for name in ("x.safetensors", "y.safetensors"):
        write_safetensors(tmp_path / name, lazies(tensors()))
    with pytest.raises(WeightError, match=r"x\.safetensors, y\.safetensors; give the file"):
        open_weights(tmp_path)
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(WeightError, match=r"ends in \.safetensors"):
        open_weights(tmp_path / "x.txt")


# --- the exported folder -------------------------------------------------------------------------

MAP = WeightMap((Entry("w.{i}", "w", Linear()),))


def params(count: int = 3) -> dict[str, Any]:
    return {"w": jnp.arange(count * 6, dtype=jnp.float32).reshape(count, 2, 3)}


def test_export_writes_a_whole_folder(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("{}")
    seen: list[tuple[int, int]] = []
    exported = export_params(
        params(),
        MAP,
        tmp_path / "deep" / "out",
        {"size": 3},
        assets={"vocab.json": tmp_path / "vocab.json", "tok/merges.txt": b"#version"},
        progress=lambda done, total: seen.append((done, total)),
    )
    out = tmp_path / "deep" / "out"
    assert sorted(p.relative_to(out).as_posix() for p in out.rglob("*.*")) == [
        "config.json",
        "model.safetensors",
        "tok/merges.txt",
        "vocab.json",
    ]
    assert json.loads((out / "config.json").read_text()) == {"size": 3}
    assert exported.files == {"model.safetensors": ["w.0", "w.1", "w.2"]}
    assert seen[-1] == (72, 72)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["out"]


def test_export_refuses_and_overwrites(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    export_params(params(), MAP, out)  # an empty folder is fine
    with pytest.raises(WeightError, match=r"out: exists already and is not an empty folder"):
        export_params(params(2), MAP, out)
    assert set(open_weights(out).tensors) == {"w.0", "w.1", "w.2"}
    export_params(params(2), MAP, out, overwrite=True)
    assert set(open_weights(out).tensors) == {"w.0", "w.1"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_failed_export_leaves_nothing_and_keeps_the_old(tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_params(params(), MAP, out)
    with pytest.raises(WeightError, match=r"asset '\.\./x'"):
        export_params(params(), MAP, out, overwrite=True, assets={"../x": b""})
    with pytest.raises(FileNotFoundError):
        export_params(params(), MAP, out, overwrite=True, assets={"x": tmp_path / "absent"})
    assert set(open_weights(out).tensors) == {"w.0", "w.1", "w.2"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_said_before_writing(tmp_path: Path) -> None:
    with (
        pytest.raises(WeightError, match=r"GB free on its disk"),
        new_folder(tmp_path / "out", overwrite=False, needed_bytes=1 << 60),
    ):
        pytest.fail("the block must not be entered")
    assert list(tmp_path.iterdir()) == []


# --- bounded memory ------------------------------------------------------------------------------

LAYERS, SIDE = 48, 256  # 48 layers of 256 KiB: 12 MiB
LAYER_BYTES = SIDE * SIDE * 4
STACKED = WeightMap((Entry(("q.{i}", "k.{i}"), "w", Linear() >> Fuse(1)),))


def generated(key: str, shape: tuple[int, ...]) -> Lazy:
    """A tensor that exists only while it is read."""

    def read(bounds: Bounds) -> np.ndarray:
        value = np.float32(sum(map(ord, key)))
        return np.full([high - low for low, high in bounds], value, np.float32)

    return Lazy(shape, np.dtype(np.float32), read, key)


def peak_of(action: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        result = action()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    del result
    return peak


def test_import_stages_one_layer_at_a_time() -> None:
    shape = (SIDE, SIDE // 2)
    names = {f"{n}.{i}": (SIDE // 2, SIDE) for n in "qk" for i in range(LAYERS)}
    reader = WeightReader("generated", {k: generated(k, s) for k, s in names.items()})
    abstract = {"w": jax.ShapeDtypeStruct((LAYERS, SIDE, 2 * shape[1]), np.float32)}

    def load() -> Any:
        result = import_params(reader, STACKED, abstract, host_bytes=LAYER_BYTES)
        jax.block_until_ready(result.params)
        return result

    load()  # compile outside the measurement
    assert peak_of(load) < 6 * LAYER_BYTES


def test_export_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    whole = {"w": jnp.ones((LAYERS, SIDE, SIDE), jnp.float32)}
    peak = peak_of(lambda: export_params(whole, STACKED, tmp_path / "out"))
    assert peak < 6 * LAYER_BYTES
    written = sum(t.nbytes for t in open_weights(tmp_path / "out").tensors.values())
    assert written == LAYERS * LAYER_BYTES


def test_reading_a_file_maps_it(tmp_path: Path) -> None:
    shape = (LAYERS * SIDE, SIDE)
    write_safetensors(tmp_path / "m.safetensors", {"w": from_numpy(np.zeros(shape, "f4"), "w")})

    def read_a_row() -> float:
        return float(open_weights(tmp_path).tensors["w"].read(((7, 8), (0, SIDE))).sum())

    assert peak_of(read_a_row) < math.prod(shape) * 4 // 10


def test_import_does_not_alias_the_file(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    write_safetensors(path, {"w.0": from_numpy(np.ones((64, 64), np.float32), "w.0")})
    abstract = {"w": jax.ShapeDtypeStruct((1, 64, 64), np.float32)}
    loaded, _ = import_params(open_weights(path), MAP, abstract)
    with path.open("r+b") as file:
        file.seek(-64 * 64 * 4, os.SEEK_END)
        file.write(bytes(64 * 64 * 4))
    assert np.asarray(loaded["w"]).sum() == 64 * 64
    source = {"w.0": np.ones((64, 64), np.float32)}
    loaded, _ = import_params(memory_reader(source), MAP, abstract)
    source["w.0"][:] = 0
    assert np.asarray(loaded["w"]).sum() == 64 * 64
