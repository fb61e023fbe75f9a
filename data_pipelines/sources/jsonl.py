"""Own data: one JSON-lines file and a folder of pictures.

The fields of a line are described in `data_pipelines.sources.fields`.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

from data_pipelines.batch import DataError
from data_pipelines.boxes import BoxConvention, ConventionCheck
from data_pipelines.records import BadRecordError, ImageTextRecord
from data_pipelines.sources.base import ListFile, Source, files_digest, spread
from data_pipelines.sources.fields import (
    check_field_names,
    declared_size,
    parse_json,
    record_from_fields,
)
from data_pipelines.sources.matching import check_match, relative_path
from data_pipelines.sources.streamed_json import Rows, open_lines


@dataclasses.dataclass(frozen=True)
class JsonLines(ListFile, Source):
    """Pictures with captions and boxes listed in a JSON-lines file.

    Attributes:
      path: the file, one JSON object per line:
        `{"image": "photos/0001.jpg", "captions": ["a red kettle on a stove"],
          "regions": [{"box": [0.21, 0.18, 0.63, 0.80], "phrase": "red kettle"}]}`
      root: folder that `image` is relative to; "" is the folder of `path`.
      boxes: convention of the box numbers; see `data_pipelines.boxes`.
      min_match: share of pictures that must exist (of `checked` lines); pictures missing beyond
        that are quarantined one by one.
      checked: lines, spread over the file, that are looked at when it is opened: do their pictures
        exist, do their boxes fit the convention, are their fields spelt right.
    """

    boxes: BoxConvention = "xyxy_norm"
    min_match: float = 0.5
    checked: int = 5000

    @functools.cached_property
    def _rows(self) -> Rows:
        rows = open_lines(self.path)
        self._check(rows)
        return rows

    def _check(self, rows: Rows) -> None:
        convention = ConventionCheck(self.boxes)
        picks = spread(len(rows), self.checked)
        matched, unmatched = 0, ""
        for i in picks:
            try:
                fields = parse_json(rows.read(i), f"line {i + 1}")
                path = self._picture(fields)
            except BadRecordError:
                continue
            check_field_names(fields, f"{self.path}: line {i + 1}")
            if path.is_file():
                matched += 1
            elif not unmatched:
                unmatched = str(fields["image"])
            regions = fields.get("regions")
            boxes = [r["box"] for r in regions or () if isinstance(r, dict) and "box" in r]
            try:
                convention.add(boxes, declared_size(fields))
            except (TypeError, ValueError):
                continue  # malformed boxes are reported when the record is read
        check_match(
            matched, len(picks), self.min_match, path=unmatched, root=self.folder, field="data.root"
        )
        problem = convention.problem()
        if problem:
            raise DataError(f"{self.path}: {problem}")

    def _picture(self, fields: dict[str, Any]) -> Path:
        image = fields.get("image")
        if not isinstance(image, str) or not image:
            raise BadRecordError(
                "malformed_record", f"expected a picture path in 'image', found {image!r:.40}"
            )
        return self.folder / relative_path(image)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> ImageTextRecord:
        fields = parse_json(self._rows.read(index), f"line {index + 1}")
        path = self._picture(fields)
        return record_from_fields(
            fields, record_id=str(fields["image"]), image=path, boxes=self.boxes
        )

    def record_id(self, index: int) -> str:
        return f"row {index + 1}"

    def fingerprint(self) -> str:
        return files_digest([Path(self.path).expanduser()], self.boxes)
