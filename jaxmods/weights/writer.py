"""Writing safetensors one tensor at a time, into a folder that appears whole or not at all.

The header is computed from shapes and dtypes, so a tensor is produced only when its bytes are due,
and let go at once.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from jaxmods.weights.errors import WeightError
from jaxmods.weights.lazy import Lazy
from jaxmods.weights.reader import DTYPES, INDEX_SUFFIX

Progress = Callable[[int, int], None]  # bytes done, bytes in all

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_BLOCK_BYTES = 16 << 20


def plan_shards(
    tensors: Mapping[str, Lazy], max_shard_bytes: int, stem: str = "model"
) -> dict[str, list[str]]:
    """Keys by file name: one `stem.safetensors`, or numbered files in the order of `tensors`.

    A tensor larger than `max_shard_bytes` has a file of its own.
    """
    if max_shard_bytes <= 0:
        raise ValueError(f"max_shard_bytes: expected a positive size, found {max_shard_bytes}")
    shards: list[list[str]] = [[]]
    filled = 0
    for key, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(key)
        filled += tensor.nbytes
    if len(shards) == 1:
        return {f"{stem}.safetensors": shards[0]}
    return {
        f"{stem}-{n:05d}-of-{len(shards):05d}.safetensors": keys for n, keys in enumerate(shards, 1)
    }


def write_sharded(
    folder: Path,
    tensors: Mapping[str, Lazy],
    *,
    max_shard_bytes: int,
    stem: str = "model",
    progress: Progress | None = None,
) -> dict[str, list[str]]:
    """Writes `tensors` into `folder` (which exists), with an index when there are several files.

    Returns:
      Keys by file name.
    """
    plan = plan_shards(tensors, max_shard_bytes, stem)
    total = sum(t.nbytes for t in tensors.values())
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    for name, keys in plan.items():
        write_safetensors(folder / name, {key: tensors[key] for key in keys}, advance)
    if len(plan) > 1:
        index = {
            "metadata": {"total_size": total},
            "weight_map": {key: name for name, keys in plan.items() for key in keys},
        }
        write_json(folder / f"{stem}.safetensors{INDEX_SUFFIX}", index)
    return plan


def file_order(tensors: Mapping[str, Lazy]) -> list[str]:
    """Keys in the order in which a file holds them, and in which they are read to write it."""
    return sorted(tensors, key=lambda key: -tensors[key].dtype.itemsize)


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Lazy],
    advance: Callable[[int], None] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """One safetensors file. Wide dtypes come first, so that every tensor is aligned.

    `metadata` are further texts for the header.

    Raises:
      WeightError: a dtype that the format does not know.
    """
    order = file_order(tensors)
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    position = 0
    for key in order:
        tensor = tensors[key]
        if tensor.dtype not in _NAMES:
            raise WeightError(
                f"{key}: safetensors has no dtype {tensor.dtype}; export with the dtype option"
            )
        end = position + tensor.nbytes
        header[key] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key in order:
            for block in _blocks(tensors[key]):
                file.write(block)
            if advance is not None:
                advance(tensors[key].nbytes)
        _sync(file)


def _blocks(tensor: Lazy) -> Iterator[bytes | memoryview]:
    """The bytes of a tensor in C order, in blocks: a transposed view is not copied whole."""
    value = tensor.all()
    if value.shape != tensor.shape or value.dtype != tensor.dtype:
        raise WeightError(
            f"{tensor.name}: expected {tensor.dtype}{list(tensor.shape)}, read "
            f"{value.dtype}{list(value.shape)}"
        )
    if value.size == 0:
        return
    rows = value.reshape(1) if value.ndim == 0 else value
    step = max(1, _BLOCK_BYTES // max(1, math.prod(rows.shape[1:]) * rows.dtype.itemsize))
    for start in range(0, len(rows), step):
        block = np.ascontiguousarray(rows[start : start + step])
        yield block.reshape(-1).view(np.uint8).data


def write_json(path: Path, value: Any) -> None:
    """Indented JSON with a final newline, flushed to disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
        _sync(file)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def check_target(folder: Path, overwrite: bool) -> None:
    """Refuses a target that exists and is not an empty folder, unless `overwrite`."""
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists() and not overwrite:
        raise WeightError(
            f"{folder}: exists already and is not an empty folder; choose another, or remove it "
            "first"
        )


@contextmanager
def new_folder(folder: Path, overwrite: bool, needed_bytes: int = 0) -> Iterator[Path]:
    """A temporary sibling that becomes `folder` when the block ends well, and vanishes otherwise.

    Raises:
      WeightError: `folder` is taken (see `check_target`) or the disk has not `needed_bytes` free.
    """
    folder = folder.absolute()
    check_target(folder, overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < needed_bytes:
        raise WeightError(
            f"{folder}: expected {needed_bytes / 1e9:.2f} GB free on its disk, found "
            f"{free / 1e9:.2f} GB; free some or choose another disk"
        )
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        work.chmod(0o777 & ~_umask())
        yield work
        check_target(folder, overwrite)  # somebody may have filled it meanwhile
        old = None
        if folder.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
            folder.rename(old / folder.name)
        work.rename(folder)
        if old is not None:
            shutil.rmtree(old)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value
