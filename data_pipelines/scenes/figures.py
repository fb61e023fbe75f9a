"""Figures of the try-on world: people in a pose, and garments on them.

Lengths are in picture heights of a figure of size 1, in the figure's own frame: x to its left as
we see it, y down from the top of its head, before leaning. A figure is made of tapered limbs and
a torso; garments follow the same skeleton. Everything is a function of `Figure` and `Garment`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np

from data_pipelines.records import GarmentCategory
from data_pipelines.scenes.draws import Draws
from data_pipelines.scenes.garments import Garment
from data_pipelines.scenes.surfaces import Array, Rgb, cover, polygon, unit

Point: TypeAlias = tuple[float, float]
Body: TypeAlias = Literal[
    "legs", "feet", "torso", "arms", "hands", "basic_legs", "basic_torso", "basic_sleeves"
]

SKINS: tuple[Rgb, ...] = (
    (0.98, 0.84, 0.74), (0.91, 0.72, 0.58), (0.80, 0.60, 0.45), (0.62, 0.44, 0.32),
    (0.46, 0.31, 0.23), (0.34, 0.23, 0.18),
)  # fmt: skip
HAIRS: tuple[Rgb, ...] = (
    (0.12, 0.10, 0.10), (0.30, 0.19, 0.12), (0.52, 0.36, 0.20), (0.78, 0.64, 0.38),
    (0.62, 0.62, 0.64),
)  # fmt: skip
# What is worn besides the garments of interest: greys, so that nobody takes them for one.
NEUTRALS: tuple[Rgb, ...] = (
    (0.20, 0.21, 0.24), (0.34, 0.35, 0.38), (0.52, 0.52, 0.54), (0.70, 0.70, 0.71),
)  # fmt: skip

_NECK, _SHOULDER, _CHEST, _WAIST, _HIP, _CROTCH = 0.215, 0.245, 0.34, 0.43, 0.52, 0.555
_KNEE, _ANKLE, _SOLE = 0.745, 0.930, 0.965
CHEST: Point = (0.0, _CHEST)  # origin of a garment's pattern
_UPPER_ARM, _FOREARM = 0.145, 0.135


@dataclasses.dataclass(frozen=True, slots=True)
class Figure:
    """A person and their pose.

    Attributes:
      skin, hair, shoes, basics: colours; basics are worn where no garment of interest is.
      long_hair: hair down to the shoulders.
      x: middle, as a fraction of the picture's width. size: of the figure, 1 fills the height.
      lean: angle in the picture plane, radians.
      width: 0.9..1.1 of torso and limbs.
      arms: for the left and the right arm of the picture, angles of upper arm and forearm, radians
        from hanging down, outwards.
      stride: angle of each leg outwards, radians.
    """

    skin: Rgb
    hair: Rgb
    shoes: Rgb
    basics: Rgb
    long_hair: bool
    x: float
    size: float
    lean: float
    width: float
    arms: tuple[tuple[float, float], tuple[float, float]]
    stride: float


def draw_figure(draws: Draws) -> Figure:
    """A person in a random pose."""

    def angle(low: float, high: float) -> float:
        return round(draws.uniform(low, high), 4)

    arms = []
    for _ in range(2):
        upper = angle(0.12, 0.95)
        arms.append((upper, round(upper + draws.uniform(-0.75, 0.55), 4)))
    return Figure(
        draws.choice(SKINS),
        draws.choice(HAIRS),
        draws.choice(NEUTRALS),
        draws.choice(NEUTRALS),
        draws.chance(0.5),
        round(draws.uniform(0.44, 0.56), 4),
        round(draws.uniform(0.92, 0.99), 4),
        angle(-0.07, 0.07),
        round(draws.uniform(0.90, 1.10), 4),
        (arms[0], arms[1]),
        angle(0.03, 0.12),
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Limb:
    """A tapered capsule from `a` to `b`."""

    a: Point
    b: Point
    ra: float
    rb: float

    def grown(self, margin: float) -> Limb:
        """Thicker by `margin`."""
        return Limb(self.a, self.b, self.ra + margin, self.rb + margin)

    def part(self, end: float) -> Limb:
        """From `a` up to the share `end` of its length."""
        b = (self.a[0] + (self.b[0] - self.a[0]) * end, self.a[1] + (self.b[1] - self.a[1]) * end)
        return Limb(self.a, b, self.ra, self.ra + (self.rb - self.ra) * end)


@dataclasses.dataclass(frozen=True, slots=True)
class Panel:
    """A convex polygon, corners clockwise as seen, edges rounded by `radius`."""

    corners: tuple[Point, ...]
    radius: float = 0.0


Shape: TypeAlias = Limb | Panel


@dataclasses.dataclass(frozen=True, slots=True)
class Covered:
    """A shape on the pixels: window and coverage float32 [h, w]."""

    rows: slice
    columns: slice
    alpha: Array


class Posed:
    """A figure on a picture of H x W pixels: its skeleton, its coordinates, coverage of shapes.

    `sole` is the row (a fraction of the height) of the soles; leaning turns about them.
    """

    def __init__(self, figure: Figure, height: int, width: int, sole: float) -> None:
        self.figure, self.height, self.width = figure, height, width
        self.px = 1.0 / (height * figure.size)  # a pixel in the figure's units
        self._cos, self._sin = math.cos(figure.lean), math.sin(figure.lean)
        self._foot = (figure.x * width, sole * height)
        self._body: dict[Body, tuple[Covered, ...]] = {}

    @functools.cached_property
    def grid(self) -> tuple[Array, Array]:
        """Figure coordinates (x, y) of every pixel, float32 [H, W] each."""
        foot_x, foot_y = self._foot
        dx = ((np.arange(self.width) + 0.5 - foot_x) * self.px).astype(np.float32)[None, :]
        dy = ((np.arange(self.height) + 0.5 - foot_y) * self.px).astype(np.float32)[:, None]
        x = dx * self._cos + dy * self._sin
        y = dy * self._cos - dx * self._sin + np.float32(_SOLE)
        return x, y

    def _window(self, points: Sequence[Point], margin: float) -> tuple[slice, slice]:
        """Pixels within `margin` of the hull of `points`, and one more, inside the picture."""
        (left, top), cos, sin = self._foot, self._cos / self.px, self._sin / self.px
        xs = [left + x * cos - (y - _SOLE) * sin for x, y in points]
        ys = [top + x * sin + (y - _SOLE) * cos for x, y in points]
        reach = margin / self.px + 1.0
        return (
            slice(max(int(min(ys) - reach), 0), max(min(int(max(ys) + reach) + 1, self.height), 0)),
            slice(max(int(min(xs) - reach), 0), max(min(int(max(xs) + reach) + 1, self.width), 0)),
        )

    def cover(self, shape: Shape) -> Covered:
        """Coverage of a shape."""
        if isinstance(shape, Panel):
            rows, columns = self._window(shape.corners, shape.radius)
            x, y = self.grid[0][rows, columns], self.grid[1][rows, columns]
            distance = polygon(x, -y, [(a, -b) for a, b in reversed(shape.corners)])
            return Covered(rows, columns, cover(distance - shape.radius, self.px))
        rows, columns = self._window((shape.a, shape.b), max(shape.ra, shape.rb))
        dx = self.grid[0][rows, columns] - shape.a[0]
        dy = self.grid[1][rows, columns] - shape.a[1]
        bx, by = shape.b[0] - shape.a[0], shape.b[1] - shape.a[1]
        scale = 1.0 / max(bx * bx + by * by, 1e-9)
        t = unit(dx * (bx * scale) + dy * (by * scale))
        dx -= t * bx
        dy -= t * by
        distance = np.sqrt(dx * dx + dy * dy)
        distance -= shape.ra + t * (shape.rb - shape.ra)
        return Covered(rows, columns, cover(distance, self.px))

    # The skeleton ------------------------------------------------------------------------------

    @functools.cached_property
    def arms(self) -> tuple[tuple[Limb, Limb], tuple[Limb, Limb]]:
        """Upper arm and forearm, left and right in the picture."""
        w = self.figure.width
        found = []
        for side, (upper, lower) in zip((-1.0, 1.0), self.figure.arms, strict=True):
            shoulder = (side * 0.088 * w, _SHOULDER + 0.012)
            elbow = _step(shoulder, side, upper, _UPPER_ARM)
            wrist = _step(elbow, side, lower, _FOREARM)
            found.append(
                (Limb(shoulder, elbow, 0.030 * w, 0.026 * w), Limb(elbow, wrist, 0.025 * w, 0.019))
            )
        return found[0], found[1]

    @functools.cached_property
    def hands(self) -> tuple[Limb, Limb]:
        """Hands."""
        found = []
        for side, (_, lower), (_, angle) in zip(
            (-1.0, 1.0), self.arms, self.figure.arms, strict=True
        ):
            found.append(Limb(lower.b, _step(lower.b, side, angle, 0.030), 0.020, 0.022))
        return found[0], found[1]

    @functools.cached_property
    def legs(self) -> tuple[tuple[Limb, Limb], tuple[Limb, Limb]]:
        """Thigh and shin."""
        w = self.figure.width
        found = []
        for side in (-1.0, 1.0):
            hip = (side * 0.040 * w, _CROTCH - 0.02)
            knee = _step(hip, side, self.figure.stride, _KNEE - hip[1])
            ankle = _step(knee, side, 0.6 * self.figure.stride, _ANKLE - _KNEE)
            found.append(
                (Limb(hip, knee, 0.045 * w, 0.035 * w), Limb(knee, ankle, 0.034 * w, 0.023 * w))
            )
        return found[0], found[1]

    @functools.cached_property
    def feet(self) -> tuple[Limb, Limb]:
        """Shoes."""
        found = []
        for side, (_, shin) in zip((-1.0, 1.0), self.legs, strict=True):
            x, y = shin.b
            found.append(Limb((x, y + 0.005), (x + side * 0.028, y + 0.018), 0.022, 0.016))
        return found[0], found[1]

    def torso(self, margin: float, hem: float = _CROTCH, flare: float = 0.0) -> Panel:
        """From the shoulders down to `hem`, wider by `margin`, by `flare` more at the hem."""
        w = self.figure.width
        s, h = 0.092 * w + margin, 0.078 * w + margin + flare
        corners = ((-s, _SHOULDER), (s, _SHOULDER), (h, hem), (-h, hem))
        return Panel(corners, 0.012)

    def hips(self, hem: float, margin: float, flare: float) -> Panel:
        """From the waist down to `hem`, wider by `flare` there: seats of trousers, skirts."""
        w = self.figure.width
        s = 0.076 * w + margin
        h = 0.082 * w + margin + flare
        return Panel(((-s, _WAIST + 0.045), (s, _WAIST + 0.045), (h, hem), (-h, hem)), 0.010)

    # What is worn ------------------------------------------------------------------------------

    def worn(self, garment: Garment) -> tuple[Array, Array]:
        """Coverage float32 [H, W] of a garment below the arms, and of its sleeves above them."""
        below, sleeves = (self._union(shapes) for shapes in self._shapes(garment))
        if garment.category != "lower":
            hole = self.cover(self._neckline(garment.vee))
            below[hole.rows, hole.columns] *= 1.0 - hole.alpha
        return below, sleeves

    def _union(self, shapes: Sequence[Shape]) -> Array:
        out = np.zeros((self.height, self.width), np.float32)
        for shape in shapes:
            c = self.cover(shape)
            window = out[c.rows, c.columns]
            np.maximum(window, c.alpha, out=window)
        return out

    def _shapes(self, garment: Garment) -> tuple[list[Shape], list[Shape]]:
        """Shapes of a garment below the arms, and of its sleeves above them."""
        below: list[Shape] = []
        sleeves: list[Shape] = []
        if garment.category == "lower":
            below.append(self.hips(_CROTCH + 0.015, 0.010, 0.004))
            if garment.length == "none":
                below.append(self.hips(_KNEE - 0.03, 0.012, 0.055))
            for thigh, shin in self.legs if garment.length != "none" else ():
                if garment.length == "long":
                    below += [thigh.grown(0.010), shin.part(0.96).grown(0.012)]
                else:
                    below.append(thigh.part(0.75).grown(0.014))
            return below, sleeves
        if garment.category == "upper":
            below.append(self.torso(0.012, _HIP + 0.02, 0.006))
        else:
            hem = _KNEE - 0.04 if garment.length == "short" else _KNEE + 0.10
            below.append(self.torso(0.012, _WAIST + 0.06))
            below.append(self.hips(hem, 0.014, 0.075))
        for upper, lower in self.arms if garment.sleeve != "none" else ():
            if garment.sleeve == "long":
                sleeves += [upper.grown(0.010), lower.part(0.93).grown(0.010)]
            else:
                sleeves.append(upper.part(0.62).grown(0.013))
        return below, sleeves

    def hiding_shapes(self, category: GarmentCategory) -> list[Shape]:
        """Shapes that hide any garment of a category whatever its cut: the agnostic region."""
        limbs: list[Shape] = []
        if category in ("upper", "dresses"):
            limbs.append(self.torso(0.030, _CROTCH + 0.01, 0.012))
            for upper, lower in self.arms:
                limbs += [upper.grown(0.026), lower.grown(0.026)]
        if category == "lower":
            limbs.append(self.hips(_CROTCH + 0.03, 0.030, 0.02))
            limbs.append(self.hips(_KNEE, 0.030, 0.075))
            for thigh, shin in self.legs:
                limbs += [thigh.grown(0.028), shin.part(0.98).grown(0.028)]
        if category == "dresses":
            limbs.append(self.hips(_KNEE + 0.13, 0.030, 0.150))
        return limbs

    def _neckline(self, vee: bool) -> Shape:
        """The opening at the neck, cut out of the garment."""
        w = self.figure.width
        if vee:
            half = 0.034 * w
            return Panel(
                ((-half, _SHOULDER - 0.02), (half, _SHOULDER - 0.02), (0.0, _CHEST - 0.02))
            )
        return Limb((0.0, _SHOULDER - 0.018), (0.0, _SHOULDER - 0.010), 0.034 * w, 0.034 * w)

    @functools.cached_property
    def head(self) -> tuple[tuple[Covered, ...], ...]:
        """Neck, hair, face, fringe, eyes."""
        top = 0.115
        hair = [Limb((0.0, top - 0.018), (0.0, top + 0.01), 0.066, 0.058)]
        if self.figure.long_hair:
            hair += [
                Limb((x, top), (1.1 * x, _SHOULDER + 0.01), 0.022, 0.016) for x in (-0.045, 0.045)
            ]
        fringe = ((-0.050, 0.052), (0.050, 0.052), (0.046, 0.080), (-0.046, 0.080))
        groups: tuple[Sequence[Shape], ...] = (
            (Limb((0.0, 0.17), (0.0, _NECK + 0.02), 0.026, 0.030),),
            hair,
            (Limb((0.0, top), (0.0, top + 0.030), 0.053, 0.042),),
            (Panel(fringe, 0.006),),
            [Limb((x, top + 0.012), (x, top + 0.014), 0.0075, 0.0075) for x in (-0.02, 0.02)],
        )
        return tuple(tuple(self.cover(shape) for shape in shapes) for shapes in groups)

    def body(self, group: Body) -> tuple[Covered, ...]:
        """Coverage of bare legs, shoes, torso, arms and hands, or of basic clothes."""
        if group not in self._body:
            self._body[group] = tuple(map(self.cover, self._body_shapes(group)))
        return self._body[group]

    def _body_shapes(self, group: Body) -> Sequence[Shape]:
        legs = [limb for leg in self.legs for limb in leg]
        match group:
            case "legs":
                return legs
            case "feet":
                return self.feet
            case "torso":
                return [self.torso(0.0)]
            case "arms":
                return [limb for arm in self.arms for limb in arm]
            case "hands":
                return self.hands
            case "basic_legs":
                return [self.hips(_CROTCH + 0.015, 0.006, 0.0), *(x.grown(0.006) for x in legs)]
            case "basic_torso":
                return [self.torso(0.008, _WAIST + 0.07)]
            case "basic_sleeves":
                return [upper.part(0.5).grown(0.010) for upper, _ in self.arms]


def laid_flat(garment: Garment, height: int, width: int) -> Posed:
    """A frame in which `garment_shapes` are the garment laid out, filling a picture of H x W."""
    middle, extent = {"upper": (0.395, 0.66), "lower": (0.68, 0.60), "dresses": (0.54, 0.74)}[
        garment.category
    ]
    size = min(1.0 / extent, width / height / 0.52)
    black = (0.0, 0.0, 0.0)
    stance = ((0.55, 0.45), (0.55, 0.45))
    figure = Figure(black, black, black, black, False, 0.5, size, 0.0, 1.0, stance, 0.07)
    return Posed(figure, height, width, 0.5 + (_SOLE - middle) * size)


def _step(start: Point, side: float, angle: float, length: float) -> Point:
    """From `start` by `length`, `angle` outwards from straight down."""
    return (
        start[0] + side * math.sin(angle) * length,
        start[1] + math.cos(angle) * length,
    )
