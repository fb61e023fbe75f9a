"""Checks at the edge: what a usable record is, and what happens to one that is not.

A record whose picture or captions cannot be used is refused as a whole (`BadRecordError` with its
reason). A defect that touches only a part (one box, one of several captions, one negative) removes
that part and is counted under `repaired`; nothing is changed silently.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from data_pipelines.boxes import Box
from data_pipelines.images import ImageLimits
from data_pipelines.records import BadRecordError, ImageTextRecord, Region

# A coordinate past the border by less than this is rounding, clipped without a count.
ROUNDING = 1e-4


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of a usable record.

    Attributes:
      image: limits of the picture.
      max_caption_chars: longest caption or phrase, in characters (caption_too_long).
      box_tolerance: how far a box may reach past the border, as a fraction of the image. Up to
        that it is clipped ("box_clipped"); beyond, or without any overlap, it is bad (box_outside).
      bad_box: "drop_box" leaves a bad box out and keeps the record; "drop_record" refuses the
        record.
    """

    image: ImageLimits = dataclasses.field(default_factory=ImageLimits)
    max_caption_chars: int = 5000
    box_tolerance: float = 0.05
    bad_box: Literal["drop_box", "drop_record"] = "drop_box"


@dataclasses.dataclass(frozen=True)
class CheckedRecord:
    """A record that passed, and how many of its parts were left out or mended, by reason."""

    record: ImageTextRecord
    repaired: dict[str, int]


def check_record(
    record: ImageTextRecord, limits: Limits = Limits(), *, need_caption: bool = True
) -> CheckedRecord:
    """Check texts and boxes (the picture is checked when it is decoded).

    Rules: a bad long caption refuses the record. Bad short captions are left out while one good
    one remains; when all are bad the record is refused with the reason of the first. A record
    without short captions uses its long one; one without any is refused (empty_caption), unless
    `need_caption` is False. A bad phrase drops its region, a bad negative drops that negative, a
    bad long phrase leaves the short one.

    Raises:
      BadRecordError: empty_caption, caption_too_long, invalid_utf8, malformed_record, and with
        `bad_box="drop_record"` also box_nan, box_inverted, box_empty, box_outside.
    """
    repaired: Counter[str] = Counter()
    if record.long_caption is not None:
        reason = text_problem(record.long_caption, limits.max_caption_chars)
        if reason:
            raise BadRecordError(reason, f"long caption {_excerpt(record.long_caption)}")
    shorts = _good_captions(record.short_captions, limits, repaired)
    if not shorts and record.long_caption is not None:
        shorts = (record.long_caption,)
    if not shorts and need_caption:
        raise BadRecordError("empty_caption", "the record has no caption")
    regions = tuple(
        kept for r in record.regions if (kept := _checked_region(r, limits, repaired)) is not None
    )
    if shorts != record.short_captions or regions != record.regions:
        record = dataclasses.replace(record, short_captions=shorts, regions=regions)
    return CheckedRecord(record, dict(repaired))


def text_problem(text: object, max_chars: int) -> str | None:
    """The reason why `text` cannot be used, or None."""
    if not isinstance(text, str):
        return "malformed_record"
    if not text.strip():
        return "empty_caption"
    if len(text) > max_chars:
        return "caption_too_long"
    try:
        text.encode()
    except UnicodeEncodeError:  # lone surrogates, as from broken JSON escapes
        return "invalid_utf8"
    return None


def decode_text(raw: bytes, what: str) -> str:
    """Strict UTF-8. Raises BadRecordError("invalid_utf8") naming `what` and the byte."""
    try:
        return raw.decode()
    except UnicodeDecodeError as e:
        raise BadRecordError(
            "invalid_utf8", f"{what}: byte 0x{raw[e.start]:02x} at offset {e.start}: {e.reason}"
        ) from e


def check_box(box: Sequence[float], tolerance: float = Limits.box_tolerance) -> tuple[Box, bool]:
    """A canonical box inside the image, and whether it had to be clipped by more than rounding.

    Raises:
      BadRecordError: box_nan (NaN, infinity), box_inverted (x2<x1 or y2<y1), box_empty (no area),
        box_outside (further out than `tolerance`, or no overlap with the image).
    """
    if len(box) != 4 or not all(math.isfinite(v) for v in box):
        raise BadRecordError("box_nan", f"expected four finite numbers, found {tuple(box)}")
    x1, y1, x2, y2 = (float(v) for v in box)
    if x2 < x1 or y2 < y1:
        raise BadRecordError("box_inverted", f"expected x1<=x2 and y1<=y2, found {tuple(box)}")
    excess = max(-x1, -y1, x2 - 1, y2 - 1, 0.0)
    if excess > tolerance or x1 >= 1 or y1 >= 1 or x2 <= 0 or y2 <= 0:
        raise BadRecordError(
            "box_outside",
            f"{tuple(box)} reaches {excess:.3f} past the image, the tolerance is {tolerance}",
        )
    clipped = (max(x1, 0.0), max(y1, 0.0), min(x2, 1.0), min(y2, 1.0))
    if clipped[2] <= clipped[0] or clipped[3] <= clipped[1]:
        raise BadRecordError("box_empty", f"{tuple(box)} has no area")
    return clipped, excess > ROUNDING


def _good_captions(
    captions: Sequence[str], limits: Limits, repaired: Counter[str]
) -> tuple[str, ...]:
    problems = [text_problem(c, limits.max_caption_chars) for c in captions]
    good = tuple(c for c, p in zip(captions, problems, strict=True) if p is None)
    bad = [p for p in problems if p is not None]
    if bad and not good:
        raise BadRecordError(bad[0], f"short caption {_excerpt(captions[0])}")
    repaired.update(bad)
    return good


def _checked_region(region: Region, limits: Limits, repaired: Counter[str]) -> Region | None:
    try:
        box, clipped = check_box(region.box, limits.box_tolerance)
    except BadRecordError as e:
        if limits.bad_box == "drop_record":
            raise
        repaired[e.reason] += 1
        return None
    if clipped:
        repaired["box_clipped"] += 1
    problem = text_problem(region.phrase, limits.max_caption_chars)
    if problem:
        repaired[f"region_{problem}"] += 1
        return None
    long_phrase = region.long_phrase
    if long_phrase is not None:
        problem = text_problem(long_phrase, limits.max_caption_chars)
        if problem:
            repaired[f"region_{problem}"] += 1
            long_phrase = None
    problems = [text_problem(n, limits.max_caption_chars) for n in region.negatives]
    repaired.update(f"negative_{p}" for p in problems if p is not None)
    negatives = tuple(n for n, p in zip(region.negatives, problems, strict=True) if p is None)
    if (box, long_phrase, negatives) == (region.box, region.long_phrase, region.negatives):
        return region
    return dataclasses.replace(region, box=box, long_phrase=long_phrase, negatives=negatives)


def _excerpt(text: object) -> str:
    shown = ascii(text)
    return shown if len(shown) <= 60 else f"{shown[:57]}... ({len(str(text)):,} characters)"
