"""Webdataset shards (tar files as img2dataset writes them), read at random by offset.

  00017.tar: 000170042.jpg 000170042.txt 000170042.json 000170044.jpg ...

Members with the same name up to the first dot are one sample. A sample needs a picture; its short
caption is the `.txt`, or `caption`/`captions` of the `.json`; a `.json` may hold any field of
`data_pipelines.sources.fields`, such as `long_caption` and `regions`. Nothing is unpacked; member
names are keys only, and absolute ones or ones with ".." are refused all the same.
"""

from __future__ import annotations

import dataclasses
import functools
import glob
import tarfile
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from data_pipelines.batch import DataError
from data_pipelines.boxes import BoxConvention
from data_pipelines.records import BadRecordError, ImageTextRecord
from data_pipelines.sources.base import Source, as_paths, digest, files_digest
from data_pipelines.sources.fields import parse_json, record_from_fields
from data_pipelines.sources.index_cache import cached_index
from data_pipelines.sources.matching import PICTURES
from data_pipelines.sources.streamed_json import read_bytes
from data_pipelines.validation import decode_text

_KINDS = ("image", "txt", "json")


@dataclasses.dataclass(frozen=True)
class WebDataset(Source):
    """Samples of one or more tar files.

    Attributes:
      paths: tar files or glob patterns; shards are read in sorted order.
      boxes: convention of `regions` in the `.json` members.
      index_dir: folder where member offsets are kept between runs; "" for memory only.
    """

    paths: str | tuple[str, ...]
    boxes: BoxConvention = "xyxy_norm"
    index_dir: str = ""

    @property
    def name(self) -> str:
        return f"webdataset/{Path(as_paths(self.paths)[0]).parent.name}"

    @functools.cached_property
    def files(self) -> tuple[Path, ...]:
        """Shards, sorted. Raises DataError when a path or pattern gives none."""
        return expand_files(self.paths, "tar")

    @functools.cached_property
    def _index(self) -> dict[str, np.ndarray]:
        return cached_index(self.index_dir, f"webdataset-{self.fingerprint()}", self._build)

    def _build(self) -> dict[str, np.ndarray]:
        shard, keys, places = [], [], []
        skipped = duplicate = 0
        for number, path in enumerate(self.files):
            samples: dict[str, dict[str, tuple[int, int]]] = {}
            for name, offset, size in tar_members(path):
                key, kind = _split_name(name)
                if kind is None:
                    skipped += 1
                    continue
                members = samples.setdefault(key, {})
                duplicate += kind in members
                members.setdefault(kind, (offset, size))
            for key, members in samples.items():
                shard.append(number)
                keys.append(key.encode())
                places.append([members.get(kind, (-1, 0)) for kind in _KINDS])
        return {
            "shard": np.array(shard, np.int32),
            "key": np.array(keys, np.bytes_),
            "place": np.array(places, np.int64).reshape(-1, len(_KINDS), 2),
            "counts": np.array([skipped, duplicate], np.int64),
        }

    def report(self) -> dict[str, int]:
        index = self._index
        without = int((index["place"][:, 0, 0] < 0).sum())
        skipped, duplicate = (int(v) for v in index["counts"])
        return {
            "records": len(self),
            "missing": without,
            "other_members": skipped,
            "duplicate": duplicate,
        }

    def __len__(self) -> int:
        return len(self._index["shard"])

    def __getitem__(self, index: int) -> ImageTextRecord:
        record_id = self.record_id(index)
        image = self._member(index, 0)
        if image is None:
            raise BadRecordError("missing_file", f"sample {record_id} has no picture")
        text, sidecar = self._member(index, 1), self._member(index, 2)
        fields: dict[str, Any] = {}
        if sidecar is not None:
            fields = parse_json(sidecar, f"{record_id}.json")
        if text is not None:
            fields.pop("caption", None)
            fields["captions"] = decode_text(text, f"{record_id}.txt")
        return record_from_fields(
            {k: v for k, v in fields.items() if k != "id"},
            record_id=record_id,
            image=image,
            boxes=self.boxes,
        )

    def _member(self, index: int, kind: int) -> bytes | None:
        offset, size = (int(v) for v in self._index["place"][index, kind])
        if offset < 0:
            return None
        return read_bytes(self.files[int(self._index["shard"][index])], offset, size)

    def record_id(self, index: int) -> str:
        shard = self.files[int(self._index["shard"][index])].stem
        return f"{shard}/{self._index['key'][index].decode()}"

    def fingerprint(self) -> str:
        return digest(files_digest(self.files), self.boxes)


def tar_members(path: Path) -> list[tuple[str, int, int]]:
    """`(name, offset, size)` of the plain files in an uncompressed tar.

    Raises:
      DataError: not such a tar, or a member's name leaves the archive.
    """
    found = []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                _check_name(path, member.name)
                if member.isreg() and not member.issparse():
                    found.append((member.name, member.offset_data, member.size))
                elif not member.isdir():
                    raise DataError(
                        f"{path}: member {member.name!r} is no plain file (links are refused)"
                    )
                tar.members.clear()  # type: ignore[attr-defined]  # only offsets are kept
    except tarfile.TarError as e:
        raise DataError(
            f"{path}: not an uncompressed tar ({e}); unpack .tar.gz shards first, compressed ones "
            "cannot be read at random"
        ) from e
    return found


def expand_files(paths: str | tuple[str, ...], what: str) -> tuple[Path, ...]:
    """Files named by paths and glob patterns, sorted, each once.

    Raises DataError naming a path or pattern that gives none.
    """
    found: set[Path] = set()
    for given in as_paths(paths):
        pattern = str(Path(given).expanduser())
        here = [Path(p) for p in glob.glob(pattern) if Path(p).is_file()]
        if not here:
            raise DataError(f"no {what} file at {given!r}; expected a path or a pattern")
        found.update(here)
    return tuple(sorted(found))


def _check_name(path: Path, name: str) -> None:
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or "\\" in name:
        raise DataError(
            f"{path}: member name {name!r} is absolute or leaves the archive; refused. "
            "Repack the shard with plain relative names"
        )


def _split_name(name: str) -> tuple[str, str | None]:
    """Sample key (up to the first dot of the base name) and the kind of member, None if unknown."""
    folder, _, base = name.removeprefix("./").rpartition("/")
    stem, _, extension = base.partition(".")
    key = f"{folder}/{stem}" if folder else stem
    extension = extension.lower()
    if f".{extension}" in PICTURES:
        return key, "image"
    return key, extension if extension in ("txt", "json") else None
