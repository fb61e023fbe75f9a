"""FineHARD (hub `qihoo360/FineHARD`) in its published layout.

  <root>/jsonfiles/*.json                      annotation arrays
  <root>/coyo_image_<k>/<NNNNN>/<key>.jpg      pictures after download and renaming

A picture path in the annotations starts with the authors' `grit-20m/data-12m/`, or with another
stale folder in files downloaded early; whatever stands before `coyo_image_<k>/` is dropped and the
rest is looked up under the image root. Records whose picture is gone (expect a substantial share:
the pictures are links) are left out when the source is opened and counted in `report()`.
"""

from __future__ import annotations

import array
import dataclasses
import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.batch import DataError
from data_pipelines.records import BadRecordError, ImageLike, ImageTextRecord, Region
from data_pipelines.sources.base import Source, digest, files_digest
from data_pipelines.sources.fields import canonical_box, parse_json, sequence, strings
from data_pipelines.sources.index_cache import cached_index
from data_pipelines.sources.matching import Listing, check_match, relative_path
from data_pipelines.sources.streamed_json import Element, Rows, exact, iter_elements

PREFIXES = ("grit-20m/data-12m/", "grit-12m/")


@dataclasses.dataclass(frozen=True)
class FineHard(Source):
    """FineHARD annotations with their pictures.

    Attributes:
      root: the data set's folder.
      annotations: folder of `.json` arrays, one such file, or a `.txt` file that lists them (one
        per line, relative to the list); relative to `root`.
      images: image root, relative to `root`.
      strip: prefixes removed from picture paths that do not contain `coyo_image_`.
      min_match: share of annotations whose picture must be there.
      index_dir: folder where the index (offsets of the matched records) is kept between runs; ""
        keeps it in memory only. Twelve million records take a while to walk through.
    """

    root: str
    annotations: str = "jsonfiles"
    images: str = "."
    strip: tuple[str, ...] = PREFIXES
    min_match: float = 0.5
    index_dir: str = ""

    @property
    def name(self) -> str:
        return "finehard"

    @property
    def image_root(self) -> Path:
        """Where pictures are looked up."""
        return Path(self.root).expanduser() / self.images

    @functools.cached_property
    def files(self) -> tuple[Path, ...]:
        """Annotation files, sorted by name. Raises DataError when there are none."""
        return annotation_files(Path(self.root).expanduser() / self.annotations)

    @functools.cached_property
    def _index(self) -> dict[str, np.ndarray]:
        key = digest(self._content(), str(self.image_root))
        return cached_index(self.index_dir, f"finehard-{key}", self._build)

    def _build(self) -> dict[str, np.ndarray]:
        listing = Listing()
        places, seen = array.array("q"), array.array("q")
        total, unmatched = 0, ""
        for number, path in enumerate(self.files):
            for element in iter_elements(path):
                total += 1
                picture = self._picture_of(path, element)
                if picture is not None and not listing.has(self.image_root / picture):
                    unmatched = unmatched or picture
                    continue
                places.extend((number, element.offset, element.length))
                if picture is not None:
                    seen.append(hash(picture))
        matched = len(places) // 3
        check_match(
            matched,
            total,
            self.min_match,
            path=unmatched,
            root=self.image_root,
            field="data.source.images",
        )
        rows = Rows.build(self.files, places)
        duplicate = len(seen) - len(np.unique(np.frombuffer(seen, np.int64)))
        return {
            "part": rows.file,
            "offset": rows.offset,
            "length": rows.length,
            "counts": np.array([total, matched, duplicate], np.int64),
        }

    def _picture_of(self, path: Path, element: Element) -> str | None:
        """Relative picture path; None for a malformed record, which is kept: reading it tells."""
        f_path = element.value.get("f_path") if isinstance(element.value, dict) else None
        if isinstance(f_path, str) and not f_path.isascii():
            f_path = exact(path, element)["f_path"]
        if not isinstance(f_path, str):
            return None
        try:
            return picture_path(f_path, self.strip)
        except BadRecordError:
            return None

    @functools.cached_property
    def _rows(self) -> Rows:
        index = self._index
        return Rows(self.files, index["part"], index["offset"], index["length"])

    def report(self) -> dict[str, int]:
        total, matched, duplicate = (int(v) for v in self._index["counts"])
        return {
            "records": matched,
            "annotations": total,
            "matched": matched,
            "missing": total - matched,
            "duplicate": duplicate,
        }

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> ImageTextRecord:
        fields = parse_json(self._rows.read(index), self.record_id(index))
        f_path = fields.get("f_path")
        if not isinstance(f_path, str):
            raise BadRecordError(
                "malformed_record", f"expected a picture path in 'f_path', found {f_path!r:.40}"
            )
        relative = picture_path(f_path, self.strip)
        return finehard_record(fields, relative, self.image_root / relative)

    def record_id(self, index: int) -> str:
        rows = self._rows
        return f"{self.files[int(rows.file[index])].name}@{int(rows.offset[index])}"

    def fingerprint(self) -> str:
        return digest(self._content())

    def _content(self) -> str:
        return files_digest(self.files, self.strip)


def finehard_record(fields: Mapping[str, Any], record_id: str, image: ImageLike) -> ImageTextRecord:
    """One FineHARD annotation as a record.

    A fifth box number is the detector's score. Negatives are taken where `flag_short_neg` is 1, in
    file order. Raises BadRecordError("malformed_record").
    """
    regions = []
    for entry in sequence(fields.get("bbox_info"), "bbox_info"):
        if not isinstance(entry, Mapping):
            raise BadRecordError("malformed_record", f"bbox_info: found {entry!r:.40}")
        numbers = sequence(entry.get("bbox"), "bbox")
        box = canonical_box(numbers, "xyxy_norm", (1, 1))
        negatives: tuple[str, ...] = ()
        if entry.get("flag_short_neg") == 1:
            given = entry.get("short_expr_negs") or {}
            values = list(given.values()) if isinstance(given, Mapping) else given
            negatives = strings(values, "short_expr_negs")
        long = entry.get("long_expr")
        regions.append(
            Region(
                box=(box[0], box[1], box[2], box[3]),
                phrase="".join(strings(entry.get("short_expr", ""), "short_expr")),
                long_phrase=None if long is None else "".join(strings(long, "long_expr")),
                negatives=negatives,
                score=float(numbers[4]) if len(numbers) > 4 else None,
            )
        )
    long_caption = fields.get("caption")
    return ImageTextRecord(
        id=record_id,
        image=image,
        short_captions=strings(fields.get("short_caption"), "short_caption"),
        long_caption=None if long_caption is None else "".join(strings(long_caption, "caption")),
        regions=tuple(regions),
    )


def picture_path(f_path: str, strip: tuple[str, ...] = PREFIXES) -> str:
    """`coyo_image_<k>/<NNNNN>/<key>.jpg` of a published path, whatever stands before it."""
    found = re.search(r"(?:^|[/\\])(coyo_image_\d+[/\\].*)$", f_path)
    return relative_path(found.group(1) if found else f_path, strip)


def annotation_files(where: Path) -> tuple[Path, ...]:
    """JSON files named by a folder, a `.txt` list or a single path, sorted.

    Raises DataError naming what was expected.
    """
    if where.is_dir():
        files = sorted(p for p in where.iterdir() if p.suffix in (".json", ".jsonl"))
    elif where.suffix == ".txt" and where.is_file():
        lines = where.read_text("utf-8").splitlines()
        files = [where.parent / line.strip() for line in lines if line.strip()]
    else:
        files = [where]
    absent = [str(p) for p in files if not p.is_file()]
    if absent or not files:
        raise DataError(
            f"{where}: expected a folder of .json files, a .txt list of them or one such file; "
            + (f"missing {', '.join(absent[:3])}" if absent else "found none")
        )
    return tuple(files)
