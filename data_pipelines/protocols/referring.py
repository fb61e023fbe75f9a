"""Referring expressions (RefCOCO, RefCOCO+, RefCOCOg as IAA reads them; scene world): precision at
an IoU of 0.5.

Records of the official files `REC_refcoco_unc_{val,testA,testB}.jsonl` (and `refcoco+`,
`refcocog`), one JSON object per line:

    {"img_path": "COCO_train2014_000000581857.jpg", "expression": "the lady with the blue shirt",
     "sent_id": 0, "bbox": [x1, y1, x2, y2], "height": 640, "width": 427}
"""

from __future__ import annotations

import dataclasses
import functools
import time
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.batch import DataError
from data_pipelines.boxes import Box
from data_pipelines.conversation.records import PLACEHOLDER, ConversationRecord, Turn
from data_pipelines.conversation.workflows import GROUNDING, grounding_query
from data_pipelines.protocols.answers import Answered, ChatReading, answers, question
from data_pipelines.protocols.base import EvalResult, Functions, Metric, Panel, Protocol
from data_pipelines.protocols.chat_sheet import Asked, chat_sheet
from data_pipelines.protocols.features import Census, need
from data_pipelines.protocols.questions import settings
from data_pipelines.protocols.referring_boxes import THRESHOLD, hits, iou, read_numbers
from data_pipelines.records import BadRecordError
from data_pipelines.sources.base import Source, files_digest
from data_pipelines.sources.fields import parse_json
from data_pipelines.sources.matching import relative_path
from data_pipelines.sources.streamed_json import Rows, open_lines

# Paper table 4, IAA-14: split -> precision at 0.5.
PUBLISHED: dict[str, float] = {
    "refcoco_val": 0.902,
    "refcoco_testA": 0.929,
    "refcoco_testB": 0.854,
    "refcoco+_val": 0.834,
    "refcoco+_testA": 0.890,
    "refcoco+_testB": 0.767,
    "refcocog_val": 0.850,
    "refcocog_test": 0.851,
}


@dataclasses.dataclass(frozen=True)
class RefCoco(Source[ConversationRecord]):
    """Referring expressions in IAA's JSON lines.

    Attributes:
      path: the file. images: folder of COCO's train2014 pictures.
    """

    path: str
    images: str

    @property
    def name(self) -> str:
        return Path(self.path).stem

    @functools.cached_property
    def _rows(self) -> Rows:
        if not Path(self.path).expanduser().is_file():
            raise DataError(f"{self.path}: no such file; set source.path to a REC_*.jsonl file")
        return open_lines(self.path)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> ConversationRecord:
        fields = parse_json(self._rows.read(index), f"line {index + 1}")
        try:
            box = tuple(float(v) for v in fields["bbox"])
            size = int(fields["width"]), int(fields["height"])
            path, expression = relative_path(fields["img_path"]), str(fields["expression"])
            number = fields["sent_id"]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BadRecordError(
                "malformed_record",
                f"line {index + 1}: expected img_path, expression, sent_id, bbox of four numbers, "
                f"width and height; {type(error).__name__}: {error}",
            ) from error
        if len(box) != 4:
            raise BadRecordError(
                "malformed_record", f"line {index + 1}: bbox has {len(box)} numbers, expected 4"
            )
        return ConversationRecord(
            str(number),
            (Turn("user", f"{PLACEHOLDER}\n{grounding_query(expression)}"),),
            (Path(self.images).expanduser() / path,),
            {"task": "G", "kind": "ground", "box": box, "width": size[0], "height": size[1]},
        )

    def record_id(self, index: int) -> str:
        return f"line {index + 1}"

    def fingerprint(self) -> str:
        return files_digest([Path(self.path).expanduser()])


@dataclasses.dataclass(frozen=True)
class Referring(Protocol):
    """Precision at an IoU of 0.5, counted as `referring_boxes` says.

    Attributes:
      source: records with `extra` "box" (x1, y1, x2, y2 in pixels), "width" and "height".
      reading: how they are asked. function: the model's function that answers.
      label: name of the split ("refcoco_val"), which gives the published figure; or of own data.
      limit: ask the first `limit` records. examples: pictures of the panel.
    """

    source: Source[ConversationRecord]
    reading: ChatReading
    function: str = "sample_g"
    label: str = "scenes"
    limit: int | None = None
    examples: int = 12

    @property
    def name(self) -> str:
        return f"{self.label}_referring" + ("_blind" if self.reading.blind else "")

    def requires(self) -> tuple[str, ...]:
        return (self.function,)

    def run(self, functions: Functions, *, panels: bool = False) -> EvalResult:
        start, census = time.perf_counter(), Census()
        need(functions, self.requires(), self.name)
        right: list[bool] = []
        boxes: list[Box] = []
        shown: list[Answered] = []
        readable = 0
        for found in answers(
            functions, self.function, self.source, self.reading, census, self.name, self.limit
        ):
            extra = found.record.extra
            right.append(hits(found.answer, extra["box"], extra["width"], extra["height"]))
            readable += bool(pieces(found.answer))
            w, h = extra["width"], extra["height"]
            x1, y1, x2, y2 = extra["box"]
            boxes.append((x1 / w, y1 / h, x2 / w, y2 / h))
            if panels and len(shown) < self.examples:
                shown.append(found)
        census.require("expressions", len(right), self.source)
        metrics = {
            "precision_50": Metric(
                float(np.mean(right)), best_constant(boxes), PUBLISHED.get(self.label)
            ),
            "readable": Metric(readable / len(right)),
        }
        return EvalResult(
            self.name,
            metrics,
            {
                **settings(self.source, self.reading, self.limit),
                "iou": THRESHOLD,
                "chance": "the best single box of the set for every expression",
                "rule": "official compute_precision.py",
            },
            len(right),
            time.perf_counter() - start,
            (self._panel(shown),) if shown else (),
            dict(census.counts),
            tuple(f"{name}, first: {e}" for name, e in census.examples.items()),
        )

    def _panel(self, shown: list[Answered]) -> Panel:
        def item(found: Answered) -> Asked:
            extra = found.record.extra
            w, h = extra["width"], extra["height"]
            side = max(w, h)
            left, top = (side - w) // 2 / side, (side - h) // 2 / side

            def of_picture(box: Box) -> Box:
                x1, y1, x2, y2 = box
                fx, fy = side / w, side / h
                return ((x1 - left) * fx, (y1 - top) * fy, (x2 - left) * fx, (y2 - top) * fy)

            x1, y1, x2, y2 = extra["box"]
            text = question(found.record)[-1].text.replace(PLACEHOLDER, "").strip()
            return Asked(
                found.record.images[0],
                text.removeprefix(GROUNDING),
                found.answer,
                f"[{x1:.0f}, {y1:.0f}, {x2:.0f}, {y2:.0f}] px",
                hits(found.answer, extra["box"], w, h),
                tuple(of_picture(box) for box in pieces(found.answer)),
                (x1 / w, y1 / h, x2 / w, y2 / h),
            )

        return Panel(
            "Expressions and boxes",
            "The true box is white, the answer's green where it counts and red where not. The "
            "first of the set, not picked.",
            chat_sheet([item(found) for found in shown]),
        )


def pieces(answer: str) -> tuple[Box, ...]:
    """Boxes of an answer (fractions of the padded square) up to the first that cannot be read."""
    found: list[Box] = []
    for piece in answer.split("; "):
        try:
            found.append(read_numbers(piece))
        except Exception:  # the rule of the official script: whatever goes wrong is a miss
            break
    return tuple(found)


def best_constant(boxes: list[Box], candidates: int = 400) -> float:
    """Share of boxes hit by the one box of the set that hits most: what a blind guess can reach."""
    some = boxes[:: max(1, len(boxes) // candidates)]
    return max(sum(_hit(guess, box) for box in boxes) for guess in some) / len(boxes)


def _hit(a: Any, b: Any) -> bool:
    try:
        return iou(a, b) >= THRESHOLD
    except ZeroDivisionError:
        return False
