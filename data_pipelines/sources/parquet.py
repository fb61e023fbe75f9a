"""Parquet files with the pictures inside (extra `data`)."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

from data_pipelines.batch import DataError
from data_pipelines.boxes import BoxConvention
from data_pipelines.records import BadRecordError, ImageTextRecord
from data_pipelines.sources.base import Source, as_paths, digest, files_digest
from data_pipelines.sources.fields import RECORD_FIELDS, record_from_fields
from data_pipelines.sources.webdataset import expand_files


@dataclasses.dataclass(frozen=True)
class Parquet(Source):
    """Rows of parquet files as records.

    The picture column holds encoded bytes, or a struct with `bytes` (Hugging Face's image layout).
    Other columns are the fields of `data_pipelines.sources.fields`; `regions` is a list of structs.

    Parquet is read a row group at a time. With large groups and a global shuffle every record costs
    a group: build ArrayRecord files first (`write_array_record`), unless groups are small.

    Attributes:
      paths: files or patterns, read in sorted order.
      columns: pairs (field, column) where a column has another name, as `(("captions", "TEXT"),)`.
      boxes: convention of the boxes in `regions`.
      cached_groups: row groups kept decoded.
    """

    paths: str | tuple[str, ...]
    columns: tuple[tuple[str, str], ...] = ()
    boxes: BoxConvention = "xyxy_norm"
    cached_groups: int = 4

    @property
    def name(self) -> str:
        return f"parquet/{Path(as_paths(self.paths)[0]).parent.name}"

    @functools.cached_property
    def files(self) -> tuple[Path, ...]:
        """Files, sorted. Raises DataError when there are none."""
        return expand_files(self.paths, "parquet")

    @functools.cached_property
    def _groups(self) -> _RowGroups:
        names = {field: field for field in RECORD_FIELDS}
        names.update(dict(self.columns))
        return _RowGroups(self.files, names, self.cached_groups)

    def __len__(self) -> int:
        return self._groups.total

    def __getitem__(self, index: int) -> ImageTextRecord:
        try:
            fields = self._groups.row(index)
        except UnicodeDecodeError as e:
            raise BadRecordError("invalid_utf8", f"row {index}: {e}") from e
        image = fields.pop("image", None)
        if isinstance(image, dict):
            image = image.get("bytes")
        if not isinstance(image, bytes):
            raise BadRecordError(
                "missing_file", f"row {index}: expected picture bytes, found {type(image).__name__}"
            )
        fields = {k: v for k, v in fields.items() if v is not None}
        return record_from_fields(fields, record_id=str(index), image=image, boxes=self.boxes)

    def fingerprint(self) -> str:
        return digest(files_digest(self.files), self.columns, self.boxes)


class _RowGroups:
    """Random access to rows through a small cache of decoded row groups; thread-safe."""

    def __init__(self, files: tuple[Path, ...], names: dict[str, str], keep: int) -> None:
        try:
            import pyarrow.parquet as pq
        except ImportError as e:
            raise DataError('reading parquet needs pyarrow: pip install "jaxmods[data]"') from e
        self._lock = threading.Lock()
        self._keep = keep
        self._files = [pq.ParquetFile(path) for path in files]
        self._places = []
        sizes = []
        for number, file in enumerate(self._files):
            for group in range(file.num_row_groups):
                self._places.append((number, group))
                sizes.append(file.metadata.row_group(group).num_rows)
        self._ends = list(itertools.accumulate(sizes))
        self.total = self._ends[-1] if self._ends else 0
        present = set(self._files[0].schema_arrow.names)
        self._fields = {column: field for field, column in names.items() if column in present}
        if names["image"] not in present:
            raise DataError(
                f"{files[0]}: expected a picture column {names['image']!r}, found "
                f'{", ".join(sorted(present))}; set data.source.columns=(("image", COLUMN),)'
            )
        self._cache: OrderedDict[int, Any] = OrderedDict()

    def row(self, index: int) -> dict[str, Any]:
        """Fields of one row. Raises UnicodeDecodeError for text that is not UTF-8."""
        group = bisect.bisect_right(self._ends, index)
        start = self._ends[group - 1] if group else 0
        with self._lock:
            table = self._cache.get(group)
            if table is None:
                number, inside = self._places[group]
                table = self._files[number].read_row_group(inside, columns=list(self._fields))
                self._cache[group] = table
                while len(self._cache) > self._keep:
                    self._cache.popitem(last=False)
            else:
                self._cache.move_to_end(group)
        row = table.slice(index - start, 1).to_pylist()[0]
        return {self._fields[column]: value for column, value in row.items()}
