"""Examples that were encoded once (latents, text features): named arrays in ArrayRecord files.

A batch is those arrays, stacked. Whatever made them is said in `about.json` beside the files, and
is part of the fingerprint that runs compare: other weights, another size or dtype is other data.

    write_encoded(examples, "data/encoded", {"encoder": "FLUX.1-dev", "sha256": ..., "size": 1024})
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import ml_dtypes
import msgpack
import numpy as np

from data_pipelines.batch import DataError
from data_pipelines.records import BadRecordError
from data_pipelines.sampling import Made, Recipe, RecordPipeline
from data_pipelines.sources.array_record import ABOUT, SUFFIX
from data_pipelines.sources.base import (
    Mixture,
    Source,
    describe_sources,
    digest,
    files_digest,
    settings_of,
    sources_of,
    weights_of,
)

BEGUN = "begun.json"  # beside files of a folder that is not complete

_DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16)}

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class EncodedRecord:
    """One example: its id, and arrays by name without a batch dimension."""

    id: str
    arrays: Arrays


@dataclasses.dataclass(frozen=True)
class Encoded(Source[EncodedRecord]):
    """Examples written by `write_encoded`; `path` is their folder."""

    path: str

    @property
    def name(self) -> str:
        return Path(self.path).name

    @property
    def folder(self) -> Path:
        """Where the files are."""
        return Path(self.path).expanduser()

    @functools.cached_property
    def about(self) -> dict[str, Any]:
        """What is written beside the files. Raises DataError when it is not there."""
        path = self.folder / ABOUT
        if not path.is_file():
            raise DataError(
                f"{self.folder}: expected encoded examples ({ABOUT} and *{SUFFIX}), found none; "
                "encode the data first, or set data.source.path"
            )
        try:
            about = json.loads(path.read_text("utf-8"))
            return {"records": int(about["records"]), "arrays": dict(about["arrays"]), **about}
        except (ValueError, KeyError, TypeError) as e:
            raise DataError(
                f"{path}: expected what write_encoded writes, found something else: {e!r}"
            ) from e

    @functools.cached_property
    def _records(self) -> grain.sources.ArrayRecordDataSource:
        expected = self.about["records"]
        try:
            records = grain.sources.ArrayRecordDataSource([str(p) for p in self._files])
        except (RuntimeError, ValueError) as e:
            raise DataError(f"{self.folder}: cannot open as ArrayRecord: {e}") from e
        if len(records) != expected:
            raise DataError(
                f"{self.folder}: expected {expected:,} examples as {ABOUT} says, found "
                f"{len(records):,}; are all files there?"
            )
        return records

    @property
    def _files(self) -> list[Path]:
        return sorted(self.folder.glob(f"*{SUFFIX}"))

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> EncodedRecord:
        try:
            fields = msgpack.unpackb(self._records[index], raw=False)
            return EncodedRecord(fields["id"], {k: _unpack(v) for k, v in fields["arrays"].items()})
        except (ValueError, KeyError, TypeError, msgpack.UnpackException) as e:
            raise BadRecordError("malformed_record", f"record {index} of {self.folder}: {e}") from e

    def report(self) -> dict[str, Any]:
        """What made the examples, and how many there are."""
        return {**self.about, "records": len(self)}

    def fingerprint(self) -> str:
        return digest(self.about, files_digest(self._files))


@dataclasses.dataclass(frozen=True)
class EncodedPipeline(RecordPipeline):
    """Batches of encoded examples, shuffled.

    Attributes:
      source: the examples, or several sources with weights.
      tolerance, reading: see `RecordPipeline`.
    """

    source: Encoded | Mixture

    def recipe(self) -> Recipe[Any]:
        """See `RecordPipeline.recipe`."""
        return Recipe(sources_of(self.source), weights_of(self.source), _make, _collate)

    def fingerprint(self) -> str:
        sources = [source.fingerprint() for source in sources_of(self.source)]
        settings = settings_of(self, "source", "tolerance", "reading")
        return digest(sources, weights_of(self.source), settings)

    def describe(self) -> dict[str, Any]:
        """What made the examples, and how many there are."""
        return describe_sources(sources_of(self.source))


def write_encoded(
    examples: Iterable[EncodedRecord],
    folder: str | Path,
    facts: Mapping[str, Any],
    *,
    per_file: int = 1000,
) -> int:
    """Writes examples into a new folder.

    Args:
      examples: all with arrays of the same names, shapes and dtypes.
      folder: must not hold such files.
      facts: what made them: weights and their digest, sizes, dtype. Part of the fingerprint.
      per_file: examples in a file.

    Returns:
      How many were written.

    Raises:
      DataError: the folder is taken, there are no examples, or one differs from the first.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob(f"*{SUFFIX}")):
        raise DataError(f"{folder}: already holds {SUFFIX} files; give another folder")
    form = _Form(folder)
    writer, partial, written, number = None, folder, 0, 0
    for example in examples:
        packed = form.pack(example)
        if writer is None:
            partial = folder / f".examples-{number:05d}.partial"
            writer = _writer(partial)
        writer.write(packed)
        written += 1
        if written % per_file == 0:
            number, writer = _finish(writer, partial, folder, number), None
    if writer is not None:
        _finish(writer, partial, folder, number)
    if not written:
        raise DataError(f"{folder}: expected at least one example, found none")
    about = {**facts, "records": written, "arrays": form.shapes}
    (folder / ABOUT).write_text(json.dumps(about, indent=1, ensure_ascii=False), "utf-8")
    return written


def write_parts(
    parts: Sequence[Callable[[], Iterable[EncodedRecord]]],
    folder: str | Path,
    facts: Mapping[str, Any],
    *,
    lists: Collection[str] = (),
) -> int:
    """Writes examples a file a part; called again after it was cut off, it goes on with the first
    part that is not there.

    Args:
      parts: each gives its examples when called, the same ones every time.
      folder: new, or of a call with the same facts that did not end.
      facts: see `write_encoded`; JSON values.
      lists: names of arrays whose first dimension differs from example to example.

    Returns:
      How many examples are in the folder.

    Raises:
      DataError: the folder is complete, or was begun with other facts; see also `write_encoded`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / ABOUT).exists():
        raise DataError(f"{folder}: already holds encoded examples; give another folder")
    begun = folder / BEGUN
    wanted = json.loads(json.dumps({**facts, "parts": len(parts)}))
    form = _Form(folder, frozenset(lists))
    if begun.exists():
        found = json.loads(begun.read_text("utf-8"))
        form.shapes = found.pop("arrays")
        other = [k for k in {**found, **wanted} if found.get(k) != wanted.get(k)]
        if other:
            listing = "; ".join(f"{k}: {found.get(k)} → {wanted.get(k)}" for k in other)
            raise DataError(
                f"{folder}: was begun with other settings ({listing}); take them back to go on, or "
                "give another folder"
            )
    elif any(folder.glob(f"*{SUFFIX}")):
        raise DataError(f"{folder}: already holds {SUFFIX} files; give another folder")
    for number, part in enumerate(parts):
        if (folder / f"examples-{number:05d}{SUFFIX}").exists():
            continue
        partial = folder / f".examples-{number:05d}.partial"
        writer, empty = _writer(partial), True
        for example in part():
            writer.write(form.pack(example))
            empty = False
        if empty:
            writer.close()
            partial.unlink()
            continue
        _write_whole(begun, {**wanted, "arrays": form.shapes})
        _finish(writer, partial, folder, number)
    files = sorted(folder.glob(f"*{SUFFIX}"))
    if not files:
        raise DataError(f"{folder}: expected at least one example, found none")
    records = len(grain.sources.ArrayRecordDataSource([str(p) for p in files]))
    _write_whole(folder / ABOUT, {**facts, "records": records, "arrays": form.shapes})
    begun.unlink(missing_ok=True)
    return records


class _Form:
    """What all examples of a folder have in common: names, dtypes and shapes of their arrays (None
    for a first dimension that differs)."""

    def __init__(self, folder: Path, lists: frozenset[str] = frozenset()) -> None:
        self._folder, self._lists = folder, lists
        self.shapes: dict[str, list[Any]] = {}

    def pack(self, example: EncodedRecord) -> bytes:
        """The example as it is stored. Raises DataError when it differs from the first."""
        found = {k: [v.dtype.name, self._shape(k, v)] for k, v in example.arrays.items()}
        self.shapes = self.shapes or found
        if found != self.shapes:
            raise DataError(
                f"{self._folder}: {example.id}: expected arrays {self.shapes}, found {found}"
            )
        packed = {k: _pack(v) for k, v in example.arrays.items()}
        data: bytes = msgpack.packb({"id": example.id, "arrays": packed}, use_bin_type=True)
        return data

    def _shape(self, name: str, array: np.ndarray) -> list[int | None]:
        return [None, *array.shape[1:]] if name in self._lists else list(array.shape)


def _write_whole(path: Path, value: Mapping[str, Any]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=1, ensure_ascii=False), "utf-8")
    os.replace(partial, path)


def _finish(writer: Any, partial: Path, folder: Path, number: int) -> int:
    """Gives a complete file its name; the number of the next one."""
    writer.close()
    os.replace(partial, folder / f"examples-{number:05d}{SUFFIX}")
    return number + 1


def _writer(path: Path) -> Any:
    from array_record.python.array_record_module import ArrayRecordWriter

    return ArrayRecordWriter(str(path), "group_size:1")


def _pack(array: np.ndarray) -> list[Any]:
    return [array.dtype.name, list(array.shape), np.ascontiguousarray(array).tobytes()]


def _unpack(fields: Sequence[Any]) -> np.ndarray:
    name, shape, data = fields
    return np.frombuffer(data, _DTYPES.get(name) or np.dtype(name)).reshape(shape)


def _make(record: EncodedRecord, rng: np.random.Generator) -> Made[Arrays]:
    del rng
    return Made(record.arrays)


def _collate(examples: Sequence[Arrays]) -> tuple[Arrays, dict[str, int]]:
    return {name: np.stack([e[name] for e in examples]) for name in examples[0]}, {}
