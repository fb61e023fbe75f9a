"""ArrayRecord files: records of any source, built once and read at random quickly."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import grain

from data_pipelines.batch import DataError, Quarantined
from data_pipelines.images import decode_rgb
from data_pipelines.records import BadRecordError, ImageTextRecord
from data_pipelines.sources.base import Source, as_paths, digest, files_digest
from data_pipelines.sources.record_codec import decode_record, embed_image, encode_record
from data_pipelines.sources.webdataset import expand_files
from data_pipelines.validation import Limits, check_record

SUFFIX = ".array_record"
ABOUT = "about.json"
DEFAULT_CHECK = Limits()


@dataclasses.dataclass(frozen=True)
class ArrayRecords(Source):
    """Records written by `write_array_record`.

    Attributes:
      paths: a folder with `*.array_record` files, or files and patterns.
      label: name in logs; "" takes that of the folder.
    """

    paths: str | tuple[str, ...]
    label: str = ""

    @property
    def name(self) -> str:
        first = Path(as_paths(self.paths)[0])
        return self.label or (first.parent.name if first.suffix == SUFFIX else first.name)

    @functools.cached_property
    def files(self) -> tuple[Path, ...]:
        """Files in order. Raises DataError when there are none."""
        patterns = []
        for given in as_paths(self.paths):
            folder = Path(given).expanduser()
            patterns.append(str(folder / f"*{SUFFIX}") if folder.is_dir() else given)
        return expand_files(tuple(patterns), "ArrayRecord")

    @functools.cached_property
    def _records(self) -> grain.sources.ArrayRecordDataSource:
        try:
            return grain.sources.ArrayRecordDataSource([str(p) for p in self.files])
        except (RuntimeError, ValueError) as e:
            raise DataError(f"{self.files[0].parent}: cannot open as ArrayRecord: {e}") from e

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> ImageTextRecord:
        return decode_record(self._records[index])

    def fingerprint(self) -> str:
        return digest(files_digest(self.files))


@dataclasses.dataclass(frozen=True)
class BuildReport:
    """What `write_array_record` did: records written, files, and what was left out by reason."""

    written: int
    files: tuple[Path, ...]
    left_out: dict[str, int]
    examples: tuple[Quarantined, ...]


def write_array_record(
    source: Source,
    folder: str | Path,
    *,
    shards: int = 1,
    check: Limits | None = DEFAULT_CHECK,
    progress: Callable[[int, int], None] | None = None,
) -> BuildReport:
    """Write every usable record of `source`, in order, into ArrayRecord files under `folder`.

    Args:
      source: read once, from first to last.
      folder: made if absent; gets `records-00000-of-0000N.array_record` and `about.json` (counts,
        origin, what was left out and why). Files appear under their names only when complete.
      shards: number of files.
      check: limits that captions and pictures are checked against (each picture is decoded); None
        writes whatever can be read. Boxes are kept as they are: they are checked when training
        reads them.
      progress: called with (records done, records in all).

    Raises:
      DataError: the folder already holds such files, or no record can be used.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob(f"*{SUFFIX}")):
        raise DataError(f"{folder}: already holds {SUFFIX} files; give another folder")
    total = len(source)
    names = [folder / f"records-{k:05d}-of-{shards:05d}{SUFFIX}" for k in range(shards)]
    bad: list[Quarantined] = []
    written = 0
    for shard, name in enumerate(names):
        partial = name.with_name(f".{name.name}.partial")
        writer = _writer(partial)
        for index in range(total * shard // shards, total * (shard + 1) // shards):
            try:
                writer.write(_checked_bytes(source[index], check))
                written += 1
            except BadRecordError as e:
                bad.append(Quarantined(source.name, source.record_id(index), e.reason, e.detail))
            if progress is not None:
                progress(index + 1, total)
        writer.close()
        os.replace(partial, name)
    reasons = Counter(q.reason for q in bad)
    if not written:
        for name in names:
            name.unlink()
        raise DataError(f"{source.name}: none of {total:,} records can be used: {dict(reasons)}")
    about = {
        "source": source.name,
        "fingerprint": source.fingerprint(),
        "records": written,
        "left_out": dict(reasons),
        "examples": [dataclasses.asdict(q) for q in bad[:100]],
    }
    (folder / ABOUT).write_text(json.dumps(about, indent=1, ensure_ascii=False), "utf-8")
    return BuildReport(written, tuple(names), dict(reasons), tuple(bad[:100]))


def _checked_bytes(record: ImageTextRecord, check: Limits | None) -> bytes:
    record = embed_image(record)
    if check is not None:
        check_record(record, check)
        decode_rgb(record.image, check.image)
    return encode_record(record)


def _writer(path: Path):  # type: ignore[no-untyped-def]  # the class has no stubs
    from array_record.python.array_record_module import ArrayRecordWriter

    return ArrayRecordWriter(str(path), "group_size:1")
