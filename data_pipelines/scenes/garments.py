"""Garments of the try-on world: classes, cuts, patterns, and the flat picture of one.

A class is a colour with a pattern; cut, neck, scale of the pattern and brightness vary within it.
Lengths are in picture heights of a figure of size 1; x to the right, y down, the origin of the
pattern is the middle of the chest. A worn garment has the same print as the flat one.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, TypeAlias

import numpy as np

from data_pipelines.records import GarmentCategory
from data_pipelines.scenes.draws import Draws
from data_pipelines.scenes.surfaces import Array, Rgb, unit

Pattern: TypeAlias = Literal["plain", "striped", "pinstriped", "checked", "dotted"]
Length: TypeAlias = Literal["none", "short", "long"]

# Eight saturated colours, well apart in hue (radians on the wheel of `hue_vector`).
FABRICS: dict[str, Rgb] = {
    "red": (0.86, 0.10, 0.12),
    "orange": (0.96, 0.50, 0.08),
    "yellow": (0.93, 0.84, 0.10),
    "green": (0.16, 0.64, 0.20),
    "teal": (0.06, 0.64, 0.64),
    "blue": (0.12, 0.32, 0.88),
    "purple": (0.50, 0.16, 0.84),
    "pink": (0.92, 0.20, 0.62),
}
SECOND: Rgb = (0.95, 0.95, 0.94)  # of every pattern
PATTERNS: tuple[Pattern, ...] = ("plain", "striped", "pinstriped", "checked", "dotted")
CATEGORIES: tuple[GarmentCategory, ...] = ("upper", "lower", "dresses")

CLASSES: tuple[tuple[str, Pattern], ...] = tuple((c, p) for c in FABRICS for p in PATTERNS)

_PERIOD = (0.088, 0.104)  # of patterns
_DOT = 0.29  # radius of a dot, in periods


@dataclasses.dataclass(frozen=True, slots=True)
class Garment:
    """One garment.

    Attributes:
      category: where it is worn.
      colour: key of `FABRICS`. pattern: one of `PATTERNS`.
      sleeve, length: of arms and legs; "none" is sleeveless, or no legs (a skirt).
      vee: a V-neck, else a round one.
      period: of the pattern. tone: 0.9..1.05, brightness of the cloth.
    """

    category: GarmentCategory
    colour: str
    pattern: Pattern
    sleeve: Length
    length: Length
    vee: bool
    period: float
    tone: float

    @property
    def label(self) -> int:
        """Index into `CLASSES`."""
        return CLASSES.index((self.colour, self.pattern))

    @property
    def phrase(self) -> str:
        """As "a striped red dress"."""
        kind = {
            "upper": "shirt",
            "dresses": "dress",
            "lower": "skirt" if self.length == "none" else "trousers",
        }[self.category]
        article = "" if kind == "trousers" else "a "
        return f"{article}{self.pattern} {self.colour} {kind}"


def class_names() -> tuple[str, ...]:
    """Names of the classes, as "striped red"."""
    return tuple(f"{pattern} {colour}" for colour, pattern in CLASSES)


def draw_garment(draws: Draws, category: GarmentCategory, label: int) -> Garment:
    """A garment of class `label` (index into `CLASSES`), everything else at random."""
    colour, pattern = CLASSES[label]
    lengths: tuple[Length, ...] = ("none", "short", "long")
    sleeve = draws.choice(lengths)
    length = draws.choice(lengths)
    return Garment(
        category,
        colour,
        pattern,
        sleeve,
        "short" if category == "dresses" and length == "none" else length,
        draws.chance(0.5),
        round(draws.uniform(*_PERIOD), 4),
        round(draws.uniform(0.90, 1.05), 4),
    )


def _bands(x: Array, sharp: float) -> Array:
    """0..1 square wave of period 1, edges softened over 1 / sharp."""
    return unit(0.5 + (np.abs(x - np.floor(x) - 0.5) - 0.25) * sharp)


def second_share(garment: Garment, x: Array, y: Array, px: float) -> Array | float:
    """Share 0..1 of the second colour at (x, y); `px` is the size of a pixel there."""
    scale = 1.0 / garment.period
    sharp = 1.0 / (px * scale)
    u, v = x * scale, y * scale
    if garment.pattern == "plain":
        return 0.0
    if garment.pattern == "striped":
        return _bands(v, sharp)
    if garment.pattern == "pinstriped":
        return _bands(u, sharp)
    if garment.pattern == "checked":
        # Squares of half a period: as wide as a stripe.
        a, b = _bands(u, sharp), _bands(v, sharp)
        return a + b - 2.0 * a * b
    dx, dy = u - np.floor(u) - 0.5, v - np.floor(v) - 0.5
    return unit(0.5 + (_DOT - np.sqrt(dx * dx + dy * dy)) * sharp)


def cloth(garment: Garment, x: Array, y: Array, px: float) -> Array:
    """Colours of the cloth without light, float32 [3, ...], 0..1."""
    base = np.array(FABRICS[garment.colour], np.float32)[:, None, None] * garment.tone
    share = second_share(garment, x, y, px)
    if isinstance(share, float):
        return base
    second = np.array(SECOND, np.float32)[:, None, None]
    return base + (second - base) * share


def hue_vector(rgb: Array) -> Array:
    """Chroma [..., 2] of colours [..., 3]: linear, grey is 0, white mixed in only shortens it."""
    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    return np.stack([red - 0.5 * (green + blue), (green - blue) * math.sqrt(0.75)], -1)
