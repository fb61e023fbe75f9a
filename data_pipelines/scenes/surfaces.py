"""Building blocks of shapes: signed distances, coverage, and surfaces with normals.

Legend: `u` is a row `[1, w]` and `v` a column `[h, 1]` (or both `[h, w]` when rotated): position in
the object's own frame, u to the right, v up, in units of its radius. `px` is one pixel in that
unit. Distances are negative inside. All arrays are float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray
Rgb: TypeAlias = tuple[float, float, float]


@dataclasses.dataclass(slots=True)
class Surface:
    """What is seen of one object, each field `[h, w]` or broadcastable to it.

    Attributes:
      alpha: coverage 0..1.
      nx, ny, nz: unit normal, z towards the viewer.
      s, t: coordinates for the texture, along and up the surface.
      bulge: 0..1, how far the surface comes forward (for the depth map).
      paints: parts with a colour of their own: (coverage, colour), painted in order; a colour is
        RGB 0..1 or a factor on the object's own colour.
    """

    alpha: Array
    nx: Array
    ny: Array
    nz: Array
    s: Array
    t: Array
    bulge: Array
    paints: list[tuple[Array, Rgb | float]] = dataclasses.field(default_factory=list)


def unit(x: Array) -> Array:
    """Clamp to 0..1 (faster than np.clip on small arrays)."""
    return np.minimum(np.maximum(x, 0.0), 1.0)


def cover(distance: Array, px: float) -> Array:
    """Coverage of a pixel by the shape with this signed distance: a ramp one pixel wide."""
    return unit(0.5 - distance * (1.0 / px))


def mix(x: Array | float, y: Array | float, weight: Array) -> Array:
    """x where weight is 0, y where it is 1."""
    return x + (y - x) * weight


def length(x: Array, y: Array) -> Array:
    """Euclidean norm of (x, y)."""
    return np.sqrt(x * x + y * y)


def polygon(u: Array, v: Array, corners: Sequence[tuple[float, float]]) -> Array:
    """Distance to a convex polygon; corners counter-clockwise (exact inside)."""
    out: Array | None = None
    for (x1, y1), (x2, y2) in zip(corners, (*corners[1:], corners[0]), strict=True):
        dx, dy = x2 - x1, y2 - y1
        scale = 1.0 / (dx * dx + dy * dy) ** 0.5
        nx, ny = dy * scale, -dx * scale
        side = (u - x1) * nx + (v - y1) * ny
        out = side if out is None else np.maximum(out, side)
    assert out is not None
    return out


def ellipse(u: Array, v: Array, a: float, b: float) -> Array:
    """Approximate distance to an axis-parallel ellipse around the origin."""
    return (length(u * (1.0 / a), v * (1.0 / b)) - 1.0) * (a * b) ** 0.5


def box(u: Array, v: Array, a: float, b: float) -> Array:
    """Distance to a rectangle of half sizes (a, b) around the origin (exact inside)."""
    return np.maximum(np.abs(u) - a, np.abs(v) - b)


def star(u: Array, v: Array, inner: float) -> Array:
    """Distance to a five-pointed star of outer radius 1, one point up; `inner` 0..1 is how full.

    The plane is folded onto one half of one point by reflections.
    """
    cx, cy = 0.80901699, -0.58778525
    x, y = np.abs(u), v
    for kx in (cx, -cx):
        fold = 2.0 * np.maximum(x * kx + y * cy, 0.0)
        x, y = x - fold * kx, y - fold * cy
    x, y = np.abs(x), y - 1.0
    ex, ey = -cy * inner, cx * inner - 1.0
    along = unit((x * ex + y * ey) * (1.0 / (ex * ex + ey * ey)))
    outside = np.where(y * ex - x * ey > 0.0, np.float32(1.0), np.float32(-1.0))
    return length(x - ex * along, y - ey * along) * outside


def heart(u: Array, v: Array) -> Array:
    """Distance to a heart that spans about 1.2 by 1.1, its tip at the origin."""
    x, y = np.abs(u), v
    lobe = length(x - 0.25, y - 0.75) - 0.35355339
    diagonal = 0.5 * np.maximum(x + y, 0.0)
    edge = np.minimum(length(x, y - 1.0), length(x - diagonal, y - diagonal))
    edge = np.where(x > y, edge, -edge)
    return np.where(x + y > 1.0, lobe, edge)


def puffy(u: Array, v: Array, distance: Array, px: float, width: float) -> Surface:
    """A flat shape inflated like a cushion: it rises over `width` from the edge inwards."""
    edge = unit(1.0 + distance * (1.0 / width))
    half = 0.5 / px
    gx, gy = np.zeros_like(distance), np.zeros_like(distance)
    gx[:, 1:-1] = (distance[:, 2:] - distance[:, :-2]) * half
    gy[1:-1] = (distance[:-2] - distance[2:]) * half
    nx, ny = gx * edge, gy * edge
    nz = np.sqrt(np.maximum(1.0 - nx * nx - ny * ny, 0.04))
    return Surface(cover(distance, px), nx, ny, nz, u, v, nz)


def lathe(
    u: Array,
    v: Array,
    px: float,
    width: Array,
    slope: Array | float,
    low: float,
    high: float,
    bend: float,
) -> Surface:
    """A solid of revolution about the vertical axis, seen from slightly above.

    Args:
      width, slope: half width at each height `v`, and its derivative by v.
      low, high: lower and upper end. bend: depth of the curve of horizontal lines (0: seen level).
    """
    norm = 1.0 / (1.0 + slope * slope) ** 0.5
    across = np.minimum(np.maximum(u / np.maximum(width, 1e-3), -1.0), 1.0)
    front = np.sqrt(1.0 - across * across)
    alpha = cover((np.abs(u) - width) * norm, px)
    height = v + bend * front
    alpha = np.minimum(alpha, cover(low - height, px))
    alpha = np.minimum(alpha, cover(v - high, px))
    s = u * (1.0 + 0.3 * across * across)
    nz = front * norm
    return Surface(alpha, across * norm, -slope * norm, nz, s, height, nz)


def over(below: Surface, above: Surface) -> Surface:
    """Two parts of one object, `above` painted last; the paints of both are kept."""
    weight = above.alpha
    hidden = 1.0 - weight
    paints = [(coverage * hidden, colour) for coverage, colour in below.paints]
    return Surface(
        np.maximum(below.alpha, weight),
        mix(below.nx, above.nx, weight),
        mix(below.ny, above.ny, weight),
        mix(below.nz, above.nz, weight),
        mix(below.s, above.s, weight),
        mix(below.t, above.t, weight),
        mix(below.bulge, above.bulge, weight),
        paints + above.paints,
    )


def painted(surface: Surface, colour: Rgb | float) -> Surface:
    """The whole surface in a colour of its own."""
    surface.paints.append((surface.alpha, colour))
    return surface
