"""Own try-on data: one JSON-lines file and a folder of pictures.

  {"garment": "shirts/red.png", "target": "photos/anna.jpg", "person": "photos/anna_other.jpg",
   "agnostic": ["masked/anna.png"], "references": ["photos/bea.jpg", "photos/cleo.jpg"],
   "mask": "masks/anna.png", "dense": "dense/anna.png", "category": "upper", "paired": true,
   "prompt": "a red shirt"}

Only `garment` and one of `target`, `person` and `agnostic` are needed (training needs `target`).
Paths are relative to the file's folder or `root`. `agnostic` and `references` may be one path.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipelines.records import BadRecordError, TryOnRecord
from data_pipelines.sources.base import ListFile, files_digest, spread
from data_pipelines.sources.fields import check_names, optional_string, parse_json, strings
from data_pipelines.sources.matching import check_match, relative_path
from data_pipelines.sources.streamed_json import Rows, open_lines
from data_pipelines.tryon.source import CATEGORIES, PARTS, Part, TryOnSource, has

FIELDS = (
    "id", "garment", "target", "person", "agnostic", "references", "mask", "dense", "category",
    "paired", "prompt",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TryOnLines(ListFile, TryOnSource):
    """Try-on records listed in a JSON-lines file (fields: the module's description).

    Attributes:
      path: the file, one JSON object per line.
      root: folder that the paths are relative to; "" is the folder of `path`.
      min_match: share of records, of those looked at, whose garment must exist.
      checked: lines, spread over the file, that are looked at when it is opened.
    """

    min_match: float = 0.5
    checked: int = 5000

    @functools.cached_property
    def _opened(self) -> tuple[Rows, frozenset[Part]]:
        path = Path(self.path).expanduser()
        rows = open_lines(self.path)
        picks = spread(len(rows), self.checked)
        matched, missing = 0, ""
        offered: set[Part] = set()
        for i in picks:
            try:
                fields = parse_json(rows.read(i), f"line {i + 1}")
                check_names(fields, FIELDS, f"{path}:{i + 1}", cutoff=0.7)
                record = self._record(fields, i)
            except BadRecordError:
                continue  # reported when the record is read
            assert isinstance(record.garment, Path)
            if record.garment.is_file():
                matched += 1
            elif not missing:
                missing = str(fields["garment"])
            offered.update(part for part in PARTS if has(record, part))
        check_match(
            matched,
            len(picks),
            self.min_match,
            path=missing,
            root=self.folder,
            field="data.source.root",
        )
        return rows, frozenset(offered)

    def _record(self, fields: Mapping[str, Any], index: int) -> TryOnRecord:
        def path(name: str) -> Path | None:
            value = optional_string(fields.get(name), name)
            return None if not value else self.folder / relative_path(value)

        garment = path("garment")
        if garment is None:
            raise BadRecordError("malformed_record", "expected a picture path in 'garment'")
        category, paired = fields.get("category"), fields.get("paired", True)
        if category is not None and category not in CATEGORIES:
            raise BadRecordError(
                "malformed_record",
                f"category: expected one of {', '.join(CATEGORIES)}, found {category!r:.40}",
            )
        if not isinstance(paired, bool):
            raise BadRecordError(
                "malformed_record", f"paired: expected true or false, found {paired!r:.40}"
            )
        several = {
            name: tuple(self.folder / relative_path(v) for v in strings(fields.get(name), name))
            for name in ("agnostic", "references")
        }
        return TryOnRecord(
            id=str(fields.get("id", index + 1)),
            garment=garment,
            target=path("target"),
            person=path("person"),
            agnostic=several["agnostic"],
            references=several["references"],
            mask=path("mask"),
            dense=path("dense"),
            category=category,
            paired=paired,
            prompt=optional_string(fields.get("prompt"), "prompt") or "",
            extra={k: v for k, v in fields.items() if k not in FIELDS},
        )

    def __len__(self) -> int:
        return len(self._opened[0])

    def __getitem__(self, index: int) -> TryOnRecord:
        fields = parse_json(self._opened[0].read(index), f"line {index + 1}")
        return self._record(fields, index)

    def record_id(self, index: int) -> str:
        return f"row {index + 1}"

    def offers(self) -> frozenset[Part]:
        return self._opened[1]

    def looked_for(self, part: Part) -> str:
        field = "references" if part == "reference" else part
        return f"field {field!r} of {self.path}"

    def fingerprint(self) -> str:
        return files_digest([Path(self.path).expanduser()])
