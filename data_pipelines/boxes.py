"""Box conventions of published datasets, to and from the one used inside the library.

Inside: `(x1, y1, x2, y2)` as fractions 0..1 of the image, origin top left. A reader names the
convention of its files; nothing is guessed, but `convention_problem` says when a declared
convention cannot be right.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Literal, get_args

BoxConvention = Literal[
    "xyxy_norm",  # x1 y1 x2 y2, fractions: FineHARD, GRIT, HiCo, PlanGen edit set
    "xyxy",  # x1 y1 x2 y2, pixels: RefCOCO, LayoutSAM, RevealLayer, PrismLayers, DCI corners
    "xywh",  # left top width height, pixels: COCO, LVIS, Objects365, FG-OVD
    "xywh_norm",  # left top width height, fractions: NSR-1K
    "cxcywh_norm",  # centre, width, height, fractions: SubjectSpatial200K
    "yxyx_norm",  # ymin xmin ymax xmax, fractions: TFDS builders
    "xxyy_norm",  # xmin xmax ymin ymax, fractions: OpenImages columns
]
CONVENTIONS: tuple[str, ...] = get_args(BoxConvention)
PIXELS = ("xyxy", "xywh")

Box = tuple[float, float, float, float]


def to_canonical(
    box: Iterable[float], convention: BoxConvention, width: int = 1, height: int = 1
) -> Box:
    """Four numbers in `convention` as fractions `(x1, y1, x2, y2)`; further numbers are ignored.

    Args:
      box: at least four numbers (a fifth, the score of some datasets, is left to the reader).
      convention: see `BoxConvention`.
      width, height: image size in pixels; used by the pixel conventions only.

    Raises:
      ValueError: fewer than four numbers, an unknown convention, or a size below 1 pixel.
    """
    a, b, c, d = _four(box)
    if convention in PIXELS and (width < 1 or height < 1):
        raise ValueError(
            f"boxes={convention}: expected the image size in pixels, found {width}x{height}"
        )
    match convention:
        case "xyxy_norm":
            return (a, b, c, d)
        case "xyxy":
            return (a / width, b / height, c / width, d / height)
        case "xywh":
            return (a / width, b / height, (a + c) / width, (b + d) / height)
        case "xywh_norm":
            return (a, b, a + c, b + d)
        case "cxcywh_norm":
            return (a - c / 2, b - d / 2, a + c / 2, b + d / 2)
        case "yxyx_norm":
            return (b, a, d, c)
        case "xxyy_norm":
            return (a, c, b, d)
    raise ValueError(f"boxes: expected one of {', '.join(CONVENTIONS)}, found {convention!r}")


def from_canonical(box: Box, convention: BoxConvention, width: int = 1, height: int = 1) -> Box:
    """The inverse of `to_canonical`: fractions `(x1, y1, x2, y2)` written in `convention`."""
    x1, y1, x2, y2 = box
    match convention:
        case "xyxy_norm":
            return box
        case "xyxy":
            return (x1 * width, y1 * height, x2 * width, y2 * height)
        case "xywh":
            return (x1 * width, y1 * height, (x2 - x1) * width, (y2 - y1) * height)
        case "xywh_norm":
            return (x1, y1, x2 - x1, y2 - y1)
        case "cxcywh_norm":
            return ((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1)
        case "yxyx_norm":
            return (y1, x1, y2, x2)
        case "xxyy_norm":
            return (x1, x2, y1, y2)
    raise ValueError(f"boxes: expected one of {', '.join(CONVENTIONS)}, found {convention!r}")


@dataclasses.dataclass
class ConventionCheck:
    """Collects boxes as they stand in the files and judges whether the declared convention fits.

    Usage: `add` the boxes of each sampled record (with the image size where known), then
    `problem()`.
    """

    convention: BoxConvention
    records: int = 0
    reversed_corners: int = 0
    above_one: int = 0
    all_fractions: int = 0
    past_border: int = 0
    sized: int = 0

    def add(self, boxes: Iterable[Iterable[float]], size: tuple[int, int] | None = None) -> None:
        """Boxes of one record, in file numbers; records without boxes are not counted."""
        rows = [_four(box) for box in boxes]
        if not rows:
            return
        self.records += 1
        self.reversed_corners += any(c <= a or d <= b for a, b, c, d in rows)
        self.above_one += any(max(row) > 1.5 for row in rows)
        self.all_fractions += all(max(row) <= 1.0 for row in rows)
        if size is not None:
            self.sized += 1
            w, h = size
            self.past_border += any(a + c > 1.02 * w or b + d > 1.02 * h for a, b, c, d in rows)

    def problem(self, threshold: float = 0.05) -> str | None:
        """One sentence on what is wrong and what to set, or None.

        `threshold` is the share of records above which a symptom counts; a single bad box in a
        large file is a bad box, not another convention.
        """
        if not self.records:
            return None

        def share(count: int, of: int) -> float:
            return count / of if of else 0.0

        n = f"{self.records:,} records"
        if self.convention.endswith("_norm"):
            if share(self.above_one, self.records) > threshold:
                pixels = "xywh" if share(self.reversed_corners, self.records) > threshold else ""
                return (
                    f"boxes: values above 1 in {share(self.above_one, self.records):.0%} of {n}; "
                    f"this looks like pixels: set data.source.boxes={pixels or 'xyxy'}"
                )
            if (
                self.convention == "xyxy_norm"
                and share(self.reversed_corners, self.records) > threshold
            ):
                return self._reversed("xywh_norm")
            return None
        if share(self.all_fractions, self.records) > 1 - threshold:
            return (
                f"boxes: no value above 1 in {share(self.all_fractions, self.records):.0%} of {n}; "
                "this looks like fractions: set data.source.boxes=xyxy_norm"
            )
        if self.convention == "xyxy" and share(self.reversed_corners, self.records) > threshold:
            return self._reversed("xywh")
        if self.convention == "xywh" and share(self.past_border, self.sized) > max(threshold, 0.2):
            return (
                f"boxes: x+w or y+h beyond the image in {share(self.past_border, self.sized):.0%} "
                f"of {self.sized:,} records; this looks like xyxy: set data.source.boxes=xyxy"
            )
        return None

    def _reversed(self, guess: str) -> str:
        return (
            f"boxes: x2<=x1 in {self.reversed_corners / self.records:.0%} of {self.records:,} "
            f"records; this looks like {guess}: set data.source.boxes={guess}"
        )


def _four(box: Iterable[float]) -> Box:
    values = tuple(float(v) for v in box)
    if len(values) < 4:
        raise ValueError(f"box: expected four numbers, found {len(values)}: {values}")
    return values[0], values[1], values[2], values[3]
