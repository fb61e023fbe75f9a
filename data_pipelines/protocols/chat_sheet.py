"""Pictures with a question, the model's answer and the right one; boxes where there are some."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from data_pipelines.boxes import Box
from data_pipelines.images import decode_rgb
from data_pipelines.protocols.drawing import INK, MUTED, RIGHT, WRONG, Sheet, fit
from data_pipelines.records import ImageLike

_CELL, _SIDE, _TEXT, _COLUMNS = 190, 176, 92, 4


@dataclasses.dataclass(frozen=True)
class Asked:
    """One cell of the sheet.

    Attributes:
      image: the picture; None for text alone.
      question, answer, truth: texts.
      right: whether the answer counts; None compares the texts.
      found, true: boxes in fractions of the picture, drawn in red or green, and in white.
    """

    image: ImageLike | None
    question: str
    answer: str
    truth: str
    right: bool | None = None
    found: tuple[Box, ...] = ()
    true: Box | None = None


def chat_sheet(items: Sequence[Asked]) -> bytes:
    """PNG bytes of all items, row by row."""
    rows = -(-len(items) // _COLUMNS)
    sheet = Sheet(_COLUMNS * _CELL, rows * (_SIDE + _TEXT))
    for number, item in enumerate(items):
        left = (number % _COLUMNS) * _CELL + (_CELL - _SIDE) / 2
        top = (number // _COLUMNS) * (_SIDE + _TEXT) + 6.0
        right = item.right
        if right is None:
            right = item.answer.strip().lower() == item.truth.strip().lower()
        color = RIGHT if right else WRONG
        if item.image is not None:
            picture = decode_rgb(item.image)
            width, height = fit(picture, _SIDE, _SIDE)
            sheet.picture(left, top, width, height, picture)
            if item.true is not None:
                sheet.box(left, top, width, height, item.true, (255, 255, 255))
            for box in item.found:
                sheet.box(left, top, width, height, box, color)
        y = top + _SIDE + 4
        y += sheet.text(left, y, item.question, size=11, color=MUTED, width=_SIDE, max_lines=3)
        y += sheet.text(left, y, item.answer or "(nothing)", size=12, color=color, width=_SIDE)
        if not right:
            sheet.text(left, y, item.truth, size=11, color=INK, width=_SIDE)
    return sheet.png()
