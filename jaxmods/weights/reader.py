"""Opening PyTorch weights without reading them: safetensors, its sharded form, `pytorch_model.bin`.

A file is checked whole before a tensor is used: header, dtypes, offsets, length, index. Tensors are
memory-mapped, so only the bytes that are asked for are read. Pickled objects are never executed:
`.bin`, `.pt` and `.pth` go through `torch.load(weights_only=True)` and need PyTorch.

Format: https://huggingface.co/docs/safetensors (8 bytes header length, JSON header, data).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from jaxmods.weights.errors import WeightError
from jaxmods.weights.lazy import Bounds, Lazy, cut_box, extents, from_numpy

if TYPE_CHECKING:
    import torch

DTYPES: Mapping[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
MAX_HEADER_BYTES = 100_000_000  # the limit of the format's own reader

# Names that a folder is searched for, in this order.
INDEX_SUFFIX = ".index.json"
STEMS = ("model.safetensors", "diffusion_pytorch_model.safetensors", "weights.safetensors")
TORCH_STEMS = ("pytorch_model.bin", "diffusion_pytorch_model.bin")
TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_WRAPPERS = ("state_dict", "model_state_dict", "model")

# What says that a folder holds several models, one per sub-folder (a diffusers pipeline).
PIPELINE = "model_index.json"
# Classes that are written without a prefix which published files have, and that prefix.
_PREFIXES = {"CLIPTextModel": "text_model."}


@dataclasses.dataclass(frozen=True)
class WeightReader:
    """Named tensors that are read on demand. A context manager, though nothing stays open.

    Attributes:
      source: the file or folder, for messages.
      tensors: a `Lazy` (shape, dtype, `read`) by PyTorch key.
      metadata: texts of the header of a single safetensors file, empty for other sources.
    """

    source: str
    tensors: Mapping[str, Lazy]
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __enter__(self) -> WeightReader:
        return self

    def __exit__(self, *exc: object) -> None:
        return None

    @property
    def largest_bytes(self) -> int:
        """Size of the largest tensor."""
        return max((t.nbytes for t in self.tensors.values()), default=0)


def memory_reader(arrays: Mapping[str, np.ndarray], source: str = "memory") -> WeightReader:
    """A reader over arrays that are in memory already (tests, converted state dicts)."""
    return WeightReader(source, {k: from_numpy(np.asarray(a), k) for k, a in arrays.items()})


def open_weights(path: str | Path) -> WeightReader:
    """Opens a weight file, an index, or a folder that holds one of them.

    A folder with `model_index.json` is a pipeline of several models, one per sub-folder: its keys
    are `<sub-folder>.<key>`.

    Raises:
      WeightError: nothing found, several candidates, or a damaged file or index.
      ImportError: a `.bin`/`.pt` file without PyTorch installed.
    """
    path = Path(path)
    if (path / PIPELINE).is_file():
        return _open_pipeline(path)
    if path.is_dir():
        path = _find(path)
    if not path.exists():
        raise WeightError(f"{path}: no such file or folder; give the folder that holds the weights")
    if path.name.endswith(INDEX_SUFFIX):
        return _open_index(path)
    if path.suffix == ".safetensors":
        return WeightReader(str(path), _open_safetensors(path), safetensors_metadata(path))
    if path.suffix in TORCH_SUFFIXES:
        return WeightReader(str(path), _open_torch(path))
    raise WeightError(
        f"{path}: expected a name that ends in .safetensors, {INDEX_SUFFIX} or "
        f"{', '.join(TORCH_SUFFIXES)}, found {path.suffix or 'no suffix'}"
    )


def _open_pipeline(folder: Path) -> WeightReader:
    """All sub-folders that hold weights, as one set of tensors."""
    classes = _json((folder / PIPELINE).read_bytes(), str(folder / PIPELINE))
    tensors: dict[str, Lazy] = {}
    for part in sorted(p for p in folder.iterdir() if p.is_dir() and _holds_weights(p)):
        found = open_weights(part).tensors
        kind = classes.get(part.name) if isinstance(classes, dict) else None
        published = _PREFIXES.get(kind[1], "") if isinstance(kind, list) and len(kind) == 2 else ""
        if any(key.startswith(published) for key in found):
            published = ""
        tensors.update({f"{part.name}.{published}{key}": value for key, value in found.items()})
    if not tensors:
        raise WeightError(
            f"{folder}: expected sub-folders with weights beside {PIPELINE}, found none; fetch the "
            "whole pipeline"
        )
    return WeightReader(str(folder), tensors)


def _holds_weights(folder: Path) -> bool:
    suffixes = (INDEX_SUFFIX, ".safetensors", *TORCH_SUFFIXES)
    return any(file.name.endswith(suffixes) for file in folder.iterdir())


def _find(folder: Path) -> Path:
    for stem in (*STEMS, *TORCH_STEMS):
        for name in (stem + INDEX_SUFFIX, stem):
            if (folder / name).exists():
                return folder / name
    found = sorted(
        p
        for p in folder.iterdir()
        if p.name.endswith(INDEX_SUFFIX) or p.suffix == ".safetensors" or p.suffix in TORCH_SUFFIXES
    )
    indices = [p for p in found if p.name.endswith(INDEX_SUFFIX)]
    if len(indices) == 1:
        return indices[0]
    if len(found) == 1:
        return found[0]
    listed = ", ".join(p.name for p in found) or "none"
    raise WeightError(
        f"{folder}: expected {STEMS[0]}, {STEMS[0]}{INDEX_SUFFIX}, {TORCH_STEMS[0]} or exactly one "
        f"weight file, found {listed}; give the file itself"
    )


def _open_index(path: Path) -> WeightReader:
    index = _json(path.read_bytes(), str(path))
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict) or not all(isinstance(f, str) for f in files.values()):
        raise WeightError(f"{path}: expected an object with a `weight_map` of key to file name")
    opened: dict[str, Mapping[str, Lazy]] = {}
    for name in sorted(set(files.values())):
        if Path(name).name != name:
            raise WeightError(f"{path}: expected plain file names, found {name!r}")
        part = path.parent / name
        if not part.exists():
            keys = [k for k, f in files.items() if f == name]
            raise WeightError(
                f"{path}: it names {name}, which is not in the folder ({len(keys)} tensors, as "
                f"{keys[0]}); fetch the missing file"
            )
        opened[name] = (
            _open_safetensors(part) if part.suffix == ".safetensors" else _open_torch(part)
        )
    if lost := [f"{key} (in {name})" for key, name in files.items() if key not in opened[name]]:
        raise WeightError(
            f"{path}: wrong index, the files do not hold {_some(lost)}; the index and the files "
            "come from different versions, fetch both again"
        )
    if unlisted := [f"{k} (in {n})" for n, ts in opened.items() for k in ts if files.get(k) != n]:
        raise WeightError(
            f"{path}: wrong index, it does not list {_some(unlisted)}; the index and the files "
            "come from different versions, fetch both again"
        )
    return WeightReader(str(path), {key: opened[name][key] for key, name in files.items()})


def _open_safetensors(path: Path) -> dict[str, Lazy]:
    header, length = _header(path)
    header.pop("__metadata__", None)
    layout = {key: _entry(path, key, value) for key, value in header.items()}
    _check_layout(path, layout, path.stat().st_size - 8 - length)
    mapping = _Mapping(path, 8 + length)
    return {
        key: Lazy(shape, dtype, mapping.reader(begin, end, dtype, shape), key)
        for key, (shape, dtype, begin, end) in layout.items()
    }


def safetensors_metadata(path: Path) -> dict[str, str]:
    """The texts that a safetensors file carries in its header besides the tensors.

    Raises:
      WeightError: the header is damaged, or holds something else than texts there.
    """
    found = _header(path)[0].get("__metadata__", {})
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise WeightError(f"{path}: bad header, expected texts by name under __metadata__")
    return found


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The JSON header of a safetensors file and its length in bytes."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(64)
        if start.startswith(b"version https://git-lfs"):
            raise WeightError(
                f"{path}: this is a Git LFS pointer, not the weights; fetch the file (git lfs pull)"
            )
        length = int.from_bytes(start[:8], "little")
        if size < 8 or length > MAX_HEADER_BYTES or start[8:9] not in (b"{", b""):
            raise WeightError(
                f"{path}: not a safetensors file (header length {length}, file of {size} bytes); "
                "fetch it again"
            )
        if 8 + length > size:
            raise WeightError(
                f"{path}: truncated within its header, expected at least {8 + length} bytes, found "
                f"{size}; fetch it again"
            )
        file.seek(8)
        header = _json(file.read(length), str(path))
    if not isinstance(header, dict):
        raise WeightError(f"{path}: bad header, expected a JSON object; fetch the file again")
    return header, length


_Layout = tuple[tuple[int, ...], np.dtype, int, int]


def _entry(path: Path, key: str, value: Any) -> _Layout:
    """Shape, dtype and offsets of one header entry."""
    try:
        name, shape = value["dtype"], tuple(value["shape"])
        begin, end = value["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise WeightError(
            f"{path}: bad header, {key} has no valid dtype, shape and data_offsets; fetch the file "
            "again"
        ) from None
    if name not in DTYPES:
        raise WeightError(
            f"{path}: {key} has dtype {name}; expected one of {', '.join(DTYPES)}; convert the "
            "file to one of them"
        )
    numbers = (*shape, begin, end)
    if not all(type(n) is int and n >= 0 for n in numbers):
        raise WeightError(f"{path}: bad header, {key} has a negative or non-integer size")
    expected = math.prod(shape) * DTYPES[name].itemsize
    if end - begin != expected:
        raise WeightError(
            f"{path}: bad header, {key} {name}{list(shape)} needs {expected} bytes, its offsets "
            f"[{begin}, {end}] hold {end - begin}; fetch the file again"
        )
    return shape, DTYPES[name], begin, end


def _check_layout(path: Path, layout: Mapping[str, _Layout], available: int) -> None:
    """Offsets must tile the data part exactly."""
    position = 0
    for key, (_, _, begin, end) in sorted(layout.items(), key=lambda item: item[1][2:]):
        if begin != position:
            kind = "overlap" if begin < position else "leave a gap"
            raise WeightError(
                f"{path}: bad header, the offsets {kind} before {key} (expected {position}, found "
                f"{begin}); fetch the file again"
            )
        position = end
    if position > available:
        cut = [key for key, (_, _, _, end) in layout.items() if end > available]
        raise WeightError(
            f"{path}: truncated, expected {position} bytes of tensors, found {available}; cut off: "
            f"{_some(cut)}; fetch the file again"
        )
    if position < available:
        raise WeightError(
            f"{path}: {available - position} bytes after the last tensor, expected none; fetch the "
            "file again"
        )


class _Mapping:
    """The data part of a file, mapped when a tensor is first read."""

    def __init__(self, path: Path, offset: int) -> None:
        self._path, self._offset = path, offset
        self._bytes: np.ndarray | None = None

    def reader(
        self, begin: int, end: int, dtype: np.dtype, shape: tuple[int, ...]
    ) -> Callable[[Bounds], np.ndarray]:
        """Reads boxes of the tensor at bytes `begin` to `end`."""

        def read(bounds: Bounds) -> np.ndarray:
            if begin == end:
                return np.empty(extents(bounds), dtype)
            if self._bytes is None:
                self._bytes = np.asarray(np.memmap(self._path, np.uint8, "r", self._offset))
            whole = self._bytes[begin:end].view(dtype).reshape(shape)
            return cut_box(whole, bounds)

        return read


def _open_torch(path: Path) -> dict[str, Lazy]:
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"{path}: reading {path.suffix} files needs PyTorch; pip install 'jaxmods[verify]', or "
            "convert the file to safetensors"
        ) from error
    try:
        loaded = _torch_load(path)
    except (RuntimeError, EOFError, OSError) as error:
        raise WeightError(
            f"{path}: PyTorch cannot read it, it is damaged or truncated ({error}); fetch the file "
            "again"
        ) from error
    except Exception as error:  # weights_only refuses with UnpicklingError and its relatives
        raise WeightError(
            f"{path}: it holds more than tensors, and pickled objects are not executed "
            f"({str(error).splitlines()[0]}); convert it to safetensors where you trust it"
        ) from error
    state = _state_dict(loaded, torch.Tensor)
    if state is None:
        raise WeightError(
            f"{path}: expected a state dict (or one under {', '.join(_WRAPPERS)}), found "
            f"{type(loaded).__name__}"
            + (f" with keys {_some([str(k) for k in loaded])}" if isinstance(loaded, dict) else "")
        )
    return {key: from_numpy(_torch_array(tensor), key) for key, tensor in state.items()}


def _torch_load(path: Path) -> Any:
    import zipfile

    import torch

    # Only the zip format can be mapped; older files are read whole.
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def _state_dict(loaded: Any, tensor: type) -> dict[str, Any] | None:
    if not isinstance(loaded, dict):
        return None
    if loaded and all(isinstance(v, tensor) for v in loaded.values()):
        return loaded
    inner = [loaded[name] for name in _WRAPPERS if isinstance(loaded.get(name), dict)]
    return _state_dict(inner[0], tensor) if len(inner) == 1 else None


def _torch_array(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's memory as NumPy, without a copy; bfloat16 and float8 by their bits."""
    import torch

    bits = {
        torch.bfloat16: (torch.int16, ml_dtypes.bfloat16),
        torch.float8_e4m3fn: (torch.uint8, ml_dtypes.float8_e4m3fn),
        torch.float8_e5m2: (torch.uint8, ml_dtypes.float8_e5m2),
    }
    tensor = tensor.detach()
    if tensor.dtype in bits:
        carrier, dtype = bits[tensor.dtype]
        return tensor.view(carrier).numpy().view(dtype)
    return tensor.numpy()


def _json(data: bytes, source: str) -> Any:
    def unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise WeightError(f"{source}: {key} is there twice")
            result[key] = value
        return result

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise WeightError(
            f"{source}: bad header, not valid JSON ({error}); fetch it again"
        ) from None


def _some(names: list[str], limit: int = 6) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
