"""Pictures a person would look at after an evaluation, as PNG bytes.

* `retrieval_grid`: a caption and the five pictures nearest to it;
* `region_sheet`: boxes with the phrase the model finds best and the true one;
* `heat_sheet`: where in the picture a phrase is (cosine of dense features and phrase);
* `hard_negative_table`: a box with its phrase among altered ones;
* `try_on_sheet`: a person, a garment, and the person in it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

from data_pipelines.protocols import drawing
from data_pipelines.protocols.drawing import BOX_COLORS, INK, MUTED, RIGHT, WRONG, Color, Sheet
from jaxmods.metrics import normalise

Box = tuple[float, float, float, float]

WIDTH = 980.0
_PAD = 16.0


@dataclasses.dataclass(frozen=True)
class Retrieved:
    """One caption and what it found.

    Attributes:
      caption: the query.
      pictures: the nearest pictures, best first.
      scores: their cosine similarities.
      own: the picture that the caption belongs to.
      rank: 0-based rank of that picture among all.
      total: number of pictures searched.
    """

    caption: str
    pictures: tuple[Image.Image, ...]
    scores: tuple[float, ...]
    own: Image.Image
    rank: int
    total: int


def retrieval_grid(rows: Sequence[Retrieved]) -> bytes:
    """Caption, its five nearest pictures (the right one framed), and its own picture where it is
    not among them."""
    side, gap, text = 106.0, 10.0, 218.0
    row_height = side + 30
    sheet = Sheet(WIDTH, _PAD + 26 + row_height * len(rows))
    first = _PAD + text + 18
    sheet.text(_PAD, _PAD, "caption", size=11, color=MUTED)
    sheet.text(first, _PAD, "nearest pictures, best first", size=11, color=MUTED)
    last = first + 5 * (side + gap) + 8
    if any(row.rank >= len(row.pictures) for row in rows):
        sheet.text(last, _PAD, "its own", size=11, color=MUTED)
    for n, row in enumerate(rows):
        y = _PAD + 26 + n * row_height
        if n:
            sheet.rule(_PAD, WIDTH - _PAD, y - 9)
        sheet.tick(_PAD, y + 3, 11, row.rank == 0)
        sheet.text(
            _PAD + 17,
            y,
            f"rank {row.rank + 1} of {row.total}",
            size=11,
            color=RIGHT if row.rank == 0 else MUTED,
        )
        sheet.text(_PAD, y + 19, row.caption, size=13, width=text, max_lines=5)
        for k, (picture, score) in enumerate(zip(row.pictures, row.scores, strict=True)):
            x = first + k * (side + gap)
            sheet.picture(x, y, side, side, drawing.square(picture))
            right = k == row.rank
            if right:
                sheet.frame(x, y, side, side, RIGHT, 3)
            sheet.text(
                x + side / 2,
                y + side + 6,
                f"{score:.2f}",
                size=10,
                color=RIGHT if right else MUTED,
                anchor="ma",
            )
        if row.rank >= len(row.pictures):
            sheet.picture(last, y, side - 8, side - 8, drawing.square(row.own))
            sheet.frame(last, y, side - 8, side - 8, WRONG, 1.5)
    return sheet.png()


@dataclasses.dataclass(frozen=True)
class FoundRegion:
    """A box, what it is and what the model takes it for."""

    box: Box
    truth: str
    predicted: str
    score: float


@dataclasses.dataclass(frozen=True)
class RegionPicture:
    """One picture with its boxes."""

    picture: Image.Image
    regions: tuple[FoundRegion, ...]


def region_sheet(items: Sequence[RegionPicture]) -> bytes:
    """Two pictures a row, boxes numbered; beside each the best phrase, and the true one under it
    where they differ."""
    cell, side, indent, gap = (WIDTH - 3 * _PAD) / 2, 220.0, 40.0, 7.0
    space = cell - side - 14 - indent

    def lines(region: FoundRegion) -> list[tuple[str, float, Color]]:
        said = [(t, 12.5, INK) for t in drawing.wrap(region.predicted, 12.5, space, 2)]
        if region.predicted == region.truth:
            return said
        return said + [
            (t, 10.5, WRONG) for t in drawing.wrap(f"is: {region.truth}", 10.5, space, 2)
        ]

    texts = [[lines(r) for r in item.regions] for item in items]
    tall = [sum(gap + sum(1.32 * s for _, s, _ in t) for t in texts[n]) for n in range(len(items))]
    heights = [max(side, t) + _PAD for t in tall]
    pairs = [max(heights[n : n + 2]) for n in range(0, len(items), 2)]
    sheet = Sheet(WIDTH, _PAD + sum(pairs))
    for n, item in enumerate(items):
        x = _PAD + (n % 2) * (cell + _PAD)
        y = _PAD + sum(pairs[: n // 2])
        width, height = drawing.fit(item.picture, side, side)
        sheet.picture(x, y, width, height, item.picture)
        left, top = x + side + 14, y
        for k, region in enumerate(item.regions):
            sheet.box(x, y, width, height, region.box, BOX_COLORS[k % len(BOX_COLORS)])
        for k, region in enumerate(item.regions):
            color = BOX_COLORS[k % len(BOX_COLORS)]
            sheet.box_label(x, y, width, height, region.box, color, str(k + 1))
            chip = sheet.chip(left, top, str(k + 1), color)
            sheet.tick(left + chip + 6, top + 3, 10, region.predicted == region.truth)
            for text, size, ink in texts[n][k]:
                top += sheet.text(left + indent, top, text, size=size, color=ink)
            top += gap
    return sheet.png()


def similarity_map(dense: npt.ArrayLike, text: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Cosine of every cell with one phrase.

    Args:
      dense: [G, G, P] dense features of one picture, any length, row 0 at the top.
      text: [P] feature of the phrase, any length.

    Returns:
      float64 [G, G], -1..1.
    """
    return normalise(dense) @ normalise(text)


def heat_overlay(
    picture: Image.Image, similarity: npt.ArrayLike, size: tuple[int, int]
) -> Image.Image:
    """`picture` resized to `size` under the map (its own minimum to maximum), bright where the
    phrase is."""
    values = np.asarray(similarity, np.float64)
    low, high = float(values.min()), float(values.max())
    scaled = (values - low) / max(high - low, 1e-12)
    smooth = Image.fromarray(scaled.astype(np.float32)).resize(size, Image.Resampling.BICUBIC)
    heat = np.clip(np.asarray(smooth), 0.0, 1.0)
    base = np.asarray(
        picture.convert("L").resize(size, Image.Resampling.LANCZOS).convert("RGB"), np.float64
    )
    weight = 0.45 + 0.25 * heat[..., None]
    mixed = base * (1 - weight) + drawing.heat_colors(heat) * weight
    return Image.fromarray(np.rint(mixed).astype(np.uint8))


@dataclasses.dataclass(frozen=True)
class HeatPicture:
    """One picture with phrases, each with the map [G, G] and the box it belongs to."""

    picture: Image.Image
    phrases: tuple[str, ...]
    maps: tuple[npt.NDArray[np.floating], ...]
    boxes: tuple[Box, ...]


def heat_sheet(items: Sequence[HeatPicture]) -> bytes:
    """A picture a row: itself, then the map of each of its phrases with the true box."""
    columns = max(len(i.phrases) for i in items) + 1
    side = min(225.0, (WIDTH - _PAD * (columns + 1)) / columns)
    sizes = [drawing.fit(i.picture, side, side) for i in items]
    sheet = Sheet(WIDTH, _PAD + sum(height + 46 for _, height in sizes))
    y = _PAD
    for item, (width, height) in zip(items, sizes, strict=True):
        sheet.picture(_PAD, y, width, height, item.picture)
        for k, (phrase, values, box) in enumerate(
            zip(item.phrases, item.maps, item.boxes, strict=True), start=1
        ):
            x = _PAD + k * (side + _PAD)
            pixels = (drawing.px(width), drawing.px(height))
            sheet.picture(x, y, width, height, heat_overlay(item.picture, values, pixels))
            sheet.box(x, y, width, height, box, (255, 255, 255))
            sheet.text(x, y + height + 5, phrase, size=12, width=side, max_lines=2)
        y += height + 46
    return sheet.png()


@dataclasses.dataclass(frozen=True)
class HardRow:
    """A box and its candidate phrases: entry 0 is true, `scores` are the model's."""

    picture: Image.Image
    box: Box
    texts: tuple[str, ...]
    scores: tuple[float, ...]


def _crop(picture: Image.Image, box: Box, margin: float = 0.25) -> tuple[Image.Image, Box]:
    """Square surroundings of `box`, and the box in their fractions."""
    w, h = picture.size
    x1, y1, x2, y2 = box[0] * w, box[1] * h, box[2] * w, box[3] * h
    side = min(max(max(x2 - x1, y2 - y1) * (1 + 2 * margin), 16.0), float(min(w, h)))
    left = min(max((x1 + x2 - side) / 2, 0.0), w - side)
    top = min(max((y1 + y2 - side) / 2, 0.0), h - side)
    part = picture.crop((round(left), round(top), round(left + side), round(top + side)))
    local = ((x1 - left) / side, (y1 - top) / side, (x2 - left) / side, (y2 - top) / side)
    return part, local


def hard_negative_table(rows: Sequence[HardRow], most: int = 6) -> bytes:
    """Box, then its phrases in the order of their scores; the true one is green, a wrong winner
    red. At most `most` phrases are shown, the true one always."""
    side, line = 132.0, 21.0
    row_height = max(side, 20 + line * most) + _PAD
    sheet = Sheet(WIDTH, _PAD + row_height * len(rows))
    left = _PAD + side + 20
    widest = max(drawing.font(12.5).getlength(t) for row in rows for t in row.texts)
    bar_at = min(left + widest / drawing.SCALE + 24, WIDTH - _PAD - 250)
    bar_width = 190.0
    for n, row in enumerate(rows):
        y = _PAD + n * row_height
        if n:
            sheet.rule(_PAD, WIDTH - _PAD, y - _PAD / 2)
        part, local = _crop(row.picture, row.box)
        sheet.picture(_PAD, y, side, side, part)
        sheet.box(_PAD, y, side, side, local, BOX_COLORS[0])
        order = sorted(range(len(row.texts)), key=lambda i: (-row.scores[i], i))
        place = order.index(0)
        shown = order[:most]
        if 0 not in shown:
            shown = [*shown[:-1], 0]
        low, high = min(row.scores), max(row.scores)
        right = row.scores[0] >= high
        sheet.tick(left, y + 2, 11, right)
        head = "the true phrase is best" if right else f"the true phrase is number {place + 1}"
        sheet.text(
            left + 18,
            y,
            f"{head} of {len(row.texts)}",
            size=11,
            color=RIGHT if right else WRONG,
        )
        for k, i in enumerate(shown):
            top = y + 20 + k * line
            color = RIGHT if i == 0 else WRONG if k == 0 and not right else INK
            sheet.text(left, top, row.texts[i], size=12.5, width=bar_at - left - 12, color=color)
            length = bar_width * (0.04 + 0.96 * (row.scores[i] - low) / max(high - low, 1e-12))
            fill = color if color != INK else drawing.BAR
            edge = (bar_at, top + 4, bar_at + length, top + 13)
            sheet.draw.rounded_rectangle([drawing.px(v) for v in edge], drawing.px(2), fill=fill)
            sheet.text(
                bar_at + bar_width + 10, top + 1, f"{row.scores[i]:.3g}", size=10.5, color=MUTED
            )
    return sheet.png()


def try_on_sheet(rows: Sequence[Mapping[str, np.ndarray | None]]) -> bytes:
    """One record a row, one kind of picture a column: uint8 [H, W, 3] by title. Columns come in the
    order of the first row; a picture that is None leaves its place empty, and a column without any
    picture is left out."""
    titles = [t for t in rows[0] if any(row.get(t) is not None for row in rows)]
    gap, head = 10.0, 24.0
    width = min(170.0, (WIDTH - 2 * _PAD + gap) / len(titles) - gap)
    ratio = max(p.shape[0] / p.shape[1] for row in rows for p in row.values() if p is not None)
    height = width * ratio
    sheet = Sheet(
        2 * _PAD + len(titles) * (width + gap) - gap, _PAD + head + len(rows) * (height + gap)
    )
    for column, title in enumerate(titles):
        x = _PAD + column * (width + gap)
        sheet.text(x, _PAD - 4, title, size=11, color=MUTED)
        for n, row in enumerate(rows):
            pixels = row.get(title)
            if pixels is None:
                continue
            picture = Image.fromarray(pixels)
            w, h = drawing.fit(picture, width, height)
            sheet.picture(x, _PAD + head + n * (height + gap) - 6, w, h, picture)
    return sheet.png()
