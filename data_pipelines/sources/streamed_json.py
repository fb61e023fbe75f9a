"""JSON of any size without holding it: elements of large arrays one by one, with byte offsets.

Published annotation files are single JSON documents of up to several GB. `iter_elements` walks the
elements of the top-level array, or of the arrays that are values of the top-level object, and gives
each with its place in the file, so that a reader keeps offsets instead of parsed objects.
"""

from __future__ import annotations

import array
import dataclasses
import json
import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.batch import DataError

_WINDOW = 1 << 22
_SPACE = " \t\r\n"


@dataclasses.dataclass(frozen=True)
class Element:
    """One element: the key of the array it is in ("" for a top-level array), value and place."""

    key: str
    value: Any
    offset: int
    length: int


def iter_elements(path: Path, keys: Sequence[str] | None = None) -> Iterator[Element]:
    """Elements of the array(s) of a JSON file, in file order.

    Args:
      path: a file holding a top-level array, or a top-level object whose array values are walked.
      keys: of a top-level object, only these arrays (others are skipped); None for all. Members
        that are not arrays are skipped.

    Values are parsed from bytes read as Latin-1 so that positions are byte offsets: strings that
    are not ASCII come out wrong. Read `[offset, offset + length)` again where they matter (see
    `exact`).

    Raises:
      DataError: not JSON of that shape, with the byte offset.
    """
    with path.open("rb") as file:
        size = path.stat().st_size
        if size == 0:
            raise DataError(f"{path}: expected JSON, found an empty file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            reader = _Reader(path, data)
            first = reader.peek()
            if first == "[":
                yield from reader.array("")
            elif first == "{":
                yield from reader.members(keys)
            else:
                raise reader.error(f"expected '[' or '{{', found {first!r}")


def exact(path: Path, element: Element) -> Any:
    """The element's value read as UTF-8."""
    return json.loads(read_bytes(path, element.offset, element.length))


def read_bytes(path: Path, offset: int, length: int) -> bytes:
    """`length` bytes of a file at `offset`."""
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(length)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Places of rows in files: parallel arrays, 16 bytes per row."""

    files: tuple[Path, ...]
    file: np.ndarray  # int32 [n]
    offset: np.ndarray  # int64 [n]
    length: np.ndarray  # int32 [n]

    def __len__(self) -> int:
        return len(self.offset)

    def read(self, index: int) -> bytes:
        """The bytes of one row."""
        path = self.files[int(self.file[index])]
        return read_bytes(path, int(self.offset[index]), int(self.length[index]))

    @staticmethod
    def build(files: Sequence[Path], places: array.array[int]) -> Rows:
        """From a flat "q" array of file number, offset, length, file number, ..."""
        table = np.array(places, np.int64).reshape(-1, 3)
        return Rows(
            tuple(files),
            table[:, 0].astype(np.int32),
            table[:, 1].copy(),
            table[:, 2].astype(np.int32),
        )


def open_lines(path: str) -> Rows:
    """Rows of the JSON-lines file of a source's `path`.

    Raises:
      DataError: no such file, or no line in it.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise DataError(f"{file}: no such file; expected JSON lines (set data.source.path)")
    rows = line_rows([file])
    if not len(rows):
        raise DataError(f"{file}: expected JSON lines, found none")
    return rows


def line_rows(files: Sequence[Path]) -> Rows:
    """Rows of JSON-lines files; blank lines are left out."""
    places = array.array("q")
    for number, path in enumerate(files):
        with path.open("rb") as file:
            offset = 0
            for line in file:
                if line.strip():
                    places.extend((number, offset, len(line)))
                offset += len(line)
    return Rows.build(files, places)


class _Reader:
    """Cursor over a mapped file that decodes a window at a time."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._decoder = json.JSONDecoder()
        self._start = 0
        self._text = ""
        self._at = 0
        self._load(0, _WINDOW)

    def _load(self, start: int, window: int) -> None:
        self._start, self._at = start, 0
        self._text = self._data[start : start + window].decode("latin-1")

    @property
    def _whole(self) -> bool:
        return self._start + len(self._text) >= len(self._data)

    def error(self, what: str) -> DataError:
        return DataError(f"{self._path}: byte {self._start + self._at:,}: {what}")

    def peek(self) -> str:
        """The next character that is not white space; "" at the end of the file."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _SPACE:
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if self._whole:
                return ""
            self._load(self._start + self._at, _WINDOW)

    def take(self, expected: str) -> None:
        found = self.peek()
        if found != expected:
            raise self.error(f"expected {expected!r}, found {found!r}")
        self._at += 1

    def value(self) -> tuple[Any, int, int]:
        """The next value, with its offset and length in bytes."""
        self.peek()
        window = _WINDOW
        while True:
            start = self._start + self._at
            problem = "a value that does not end"
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as e:
                problem = str(e)
            else:
                # A number at the end of the window may go on in the next one.
                if end < len(self._text) or self._whole:
                    length = end - self._at
                    self._at = end
                    return value, start, length
            if self._whole:
                raise self.error(f"not JSON: {problem}")
            if self._at == 0:
                window *= 2
            self._load(start, window)

    def array(self, key: str) -> Iterator[Element]:
        self.take("[")
        if self.peek() == "]":
            self._at += 1
            return
        while True:
            value, offset, length = self.value()
            yield Element(key, value, offset, length)
            if self.peek() == "]":
                self._at += 1
                return
            self.take(",")

    def members(self, keys: Sequence[str] | None) -> Iterator[Element]:
        self.take("{")
        while self.peek() != "}":
            key, _, _ = self.value()
            self.take(":")
            if self.peek() == "[":
                wanted = keys is None or key in keys
                for element in self.array(key):
                    if wanted:
                        yield element
            else:
                self.value()
            if self.peek() != "}":
                self.take(",")
