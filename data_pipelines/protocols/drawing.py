"""Drawing primitives of the report's pictures: text that wraps, marks, boxes, colour maps.

Everything is drawn at twice the size it is shown at, so that it stays sharp on dense screens.
"""

from __future__ import annotations

import functools
import io

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

Color = tuple[int, int, int]

SCALE = 2
PAPER: Color = (253, 252, 250)
INK: Color = (28, 32, 38)
MUTED: Color = (112, 119, 130)
LINE: Color = (226, 224, 218)
RIGHT: Color = (20, 128, 74)
WRONG: Color = (200, 62, 30)
BAR: Color = (168, 178, 192)

# Distinguishable on photographs and by colour-blind readers (Okabe-Ito without black and yellow).
BOX_COLORS: tuple[Color, ...] = (
    (0, 114, 178),
    (213, 94, 0),
    (0, 158, 115),
    (204, 121, 167),
    (86, 180, 233),
    (230, 159, 0),
)

# Dark blue - teal - yellow - white: brightness rises steadily, so it reads in grey as well.
_HEAT = np.array(
    [(13, 8, 60), (40, 60, 140), (22, 130, 142), (92, 190, 96), (236, 214, 70), (255, 250, 225)],
    np.float64,
)


@functools.cache
def font(size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's built-in font at `size` shown pixels."""
    return ImageFont.load_default(size * SCALE)


def px(value: float) -> int:
    """Shown pixels to drawn pixels."""
    return round(value * SCALE)


def wrap(text: str, size: float, width: float, max_lines: int) -> list[str]:
    """`text` in at most `max_lines` lines of `width` shown pixels; "..." where it is cut."""
    lines: list[str] = []
    words = text.split()
    limit = px(width)
    face = font(size)
    while words and len(lines) < max_lines:
        line = words.pop(0)
        while words and face.getlength(f"{line} {words[0]}") <= limit:
            line = f"{line} {words.pop(0)}"
        lines.append(line)
    if lines:
        cut = bool(words)
        while len(lines[-1]) > 1 and face.getlength(lines[-1] + ("..." if cut else "")) > limit:
            lines[-1], cut = lines[-1][:-1], True
        lines[-1] = lines[-1].rstrip() + ("..." if cut else "")
    return lines


class Sheet:
    """A canvas addressed in shown pixels."""

    def __init__(self, width: float, height: float, color: Color = PAPER) -> None:
        self.image = Image.new("RGB", (px(width), px(height)), color)
        self.draw = ImageDraw.Draw(self.image)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: float = 13,
        color: Color = INK,
        width: float | None = None,
        max_lines: int = 1,
        anchor: str = "la",
    ) -> float:
        """Draw `text`, wrapped when `width` is given; returns the height used."""
        lines = wrap(text, size, width, max_lines) if width is not None else [text]
        step = size * 1.32
        for n, line in enumerate(lines):
            self.draw.text((px(x), px(y + n * step)), line, color, font(size), anchor=anchor)
        return step * len(lines)

    def picture(self, x: float, y: float, width: float, height: float, pixels: Image.Image) -> None:
        """Draw `pixels` resized to exactly `width` x `height`."""
        grow = pixels.width < px(width) // 2
        how = Image.Resampling.NEAREST if grow and pixels.width <= 32 else Image.Resampling.LANCZOS
        self.image.paste(pixels.resize((px(width), px(height)), how), (px(x), px(y)))

    def frame(
        self, x: float, y: float, width: float, height: float, color: Color, thickness: float = 2
    ) -> None:
        """Outline just outside the given rectangle."""
        t = px(thickness)
        edge = (px(x) - t, px(y) - t, px(x + width) + t - 1, px(y + height) + t - 1)
        self.draw.rectangle(edge, outline=color, width=t)

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        box: tuple[float, ...],
        color: Color,
        label: str = "",
    ) -> None:
        """A box given in fractions of the picture at (x, y, width, height), with a chip."""
        x1, y1, x2, y2 = (min(max(v, 0.0), 1.0) for v in box)
        a, b = px(x + x1 * width), px(y + y1 * height)
        c, d = px(x + x2 * width) - 1, px(y + y2 * height) - 1
        c, d = max(c, a + 1), max(d, b + 1)
        self.draw.rectangle((a, b, c, d), outline=(255, 255, 255), width=px(2.5))
        self.draw.rectangle((a, b, c, d), outline=color, width=px(1.5))
        if label:
            self.box_label(x, y, width, height, box, color, label)

    def box_label(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        box: tuple[float, ...],
        color: Color,
        label: str,
        size: float = 11,
    ) -> None:
        """The chip of a box (see `box`): on its top edge, outside where there is room, always
        within the picture."""
        tall, wide = size + 5, font(size).getlength(label) / SCALE + 8
        left = x + min(max(box[0], 0.0) * width, width - wide)
        top = y + max(box[1], 0.0) * height
        above = top - tall >= y
        self.chip(left, top - tall if above else min(top, y + height - tall), label, color, size)

    def chip(self, x: float, y: float, label: str, color: Color, size: float = 11) -> float:
        """A filled tag with its top left at (x, y); returns its width."""
        width = font(size).getlength(label) / SCALE + 8
        self.draw.rounded_rectangle(
            (px(x), px(y), px(x + width), px(y + size + 5)), px(3), fill=color
        )
        self.draw.text(
            (px(x + 4), px(y + (size + 5) / 2)), label, (255, 255, 255), font(size), anchor="lm"
        )
        return width

    def tick(self, x: float, y: float, size: float, right: bool) -> None:
        """A tick or a cross in a square of `size` at (x, y)."""

        def at(u: float, v: float) -> tuple[int, int]:
            return px(x + u * size), px(y + v * size)

        if right:
            path = [at(0.1, 0.55), at(0.4, 0.85), at(0.9, 0.15)]
            self.draw.line(path, RIGHT, px(2), "curve")
        else:
            self.draw.line([at(0.15, 0.15), at(0.85, 0.85)], WRONG, px(2))
            self.draw.line([at(0.85, 0.15), at(0.15, 0.85)], WRONG, px(2))

    def rule(self, x1: float, x2: float, y: float) -> None:
        """A thin horizontal line."""
        self.draw.line((px(x1), px(y), px(x2), px(y)), LINE, px(1))

    def png(self) -> bytes:
        """The sheet as PNG bytes."""
        out = io.BytesIO()
        self.image.save(out, "PNG", compress_level=3)
        return out.getvalue()


def fit(pixels: Image.Image, width: float, height: float) -> tuple[float, float]:
    """Largest shown size within `width` x `height` that keeps the aspect."""
    ratio = min(width / pixels.width, height / pixels.height)
    return max(1.0, pixels.width * ratio), max(1.0, pixels.height * ratio)


def square(pixels: Image.Image) -> Image.Image:
    """Centre crop to a square, for thumbnails."""
    side = min(pixels.size)
    left, top = (pixels.width - side) // 2, (pixels.height - side) // 2
    return pixels.crop((left, top, left + side, top + side))


@functools.cache
def _heat_table() -> npt.NDArray[np.uint8]:
    at = np.linspace(0.0, len(_HEAT) - 1.0, 256)
    low = np.minimum(at.astype(int), len(_HEAT) - 2)
    part = (at - low)[:, None]
    return np.rint(_HEAT[low] * (1 - part) + _HEAT[low + 1] * part).astype(np.uint8)


def heat_colors(values: npt.NDArray[np.floating]) -> npt.NDArray[np.uint8]:
    """Colours uint8 [..., 3] of values 0..1."""
    return _heat_table()[np.rint(np.clip(values, 0.0, 1.0) * 255).astype(np.uint8)]
