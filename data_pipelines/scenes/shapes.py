"""The object classes: each a function from local coordinates to a `Surface`.

`turn` (-1..1) varies the view: it turns solids about the vertical and mirrors flat shapes.
Coordinates and the extents they must keep to: see `surfaces` and `graph.GEOMETRY`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from data_pipelines.scenes.surfaces import (
    Array,
    Surface,
    box,
    cover,
    ellipse,
    heart,
    lathe,
    length,
    mix,
    over,
    painted,
    polygon,
    puffy,
    star,
    unit,
)

Shape: TypeAlias = Callable[[Array, Array, float, float], Surface]

_TRUNK = (0.40, 0.25, 0.14)
_STEM = (0.24, 0.52, 0.20)
_CREAM = (0.95, 0.90, 0.78)
_INK = (0.10, 0.09, 0.10)
_PAPER = (0.97, 0.96, 0.93)
_GOLD = (0.93, 0.70, 0.15)
_STEEL = (0.62, 0.65, 0.70)


@functools.cache
def _profile(knots: tuple[tuple[float, float], ...]) -> tuple[Array, Array, Array]:
    """Heights, half widths and slopes of a smooth curve through (height, half width) knots."""
    y, w = np.array(knots).T
    tangent = np.gradient(w, y)
    fine = np.linspace(y[0], y[-1], 97)
    i = np.clip(np.searchsorted(y, fine, side="right") - 1, 0, len(y) - 2)
    span = y[i + 1] - y[i]
    x = (fine - y[i]) / span
    # Cubic Hermite interpolation.
    smooth = x * x * (3 - 2 * x)
    width = (
        w[i] * (1 - smooth)
        + w[i + 1] * smooth
        + span * (tangent[i] * x * (1 - x) ** 2 - tangent[i + 1] * x * x * (1 - x))
    )
    slope = np.clip(np.gradient(width, fine), -4, 4)
    return fine, np.maximum(width, 0.0), slope


def _turned(u: Array, v: Array, px: float, bend: float, *knots: tuple[float, float]) -> Surface:
    """A lathe solid with a smooth profile, knots from low to high."""
    fine, width, slope = _profile(knots)
    w = np.interp(v[:, 0], fine, width).astype(np.float32)[:, None]
    dw = np.interp(v[:, 0], fine, slope).astype(np.float32)[:, None]
    return lathe(u, v, px, w, dw, knots[0][0] + bend, knots[-1][0], bend)


def _thin(half: float, px: float) -> float:
    """Half width of a thin line: never so thin that it vanishes between pixels, so that boxes do
    not depend on the size of the image."""
    return max(half, 0.6 * px)


def ball(u: Array, v: Array, px: float, turn: float) -> Surface:
    """Sphere."""
    x, y = u * (1 / 0.9), v * (1 / 0.9)
    rr = x * x + y * y
    nz = np.sqrt(np.maximum(1.0 - rr, 0.0))
    stretch = 0.9 * (1.0 + 0.35 * np.minimum(rr, 1.0))
    return Surface(cover((np.sqrt(rr) - 1.0) * 0.9, px), x, y, nz, x * stretch, y * stretch, nz)


def _corner(turn: float) -> tuple[tuple[float, float], tuple[float, float], float, float]:
    """Left and right base edge of a square block seen cornerwise, cosine and sine of its yaw."""
    # Yaw between 30 and 60 degrees, by the rational parametrisation of the circle.
    k = 0.4226 + 0.1547 * turn
    norm = 1.0 / (1.0 + k * k)
    cos, sin = (1.0 - k * k) * norm, 2.0 * k * norm
    return (-cos, 0.42 * sin), (sin, 0.42 * cos), cos, sin


def _block(
    u: Array, v: Array, px: float, turn: float, side: float, height: float
) -> tuple[Surface, Array, Array, Array, Array]:
    """A box with three visible faces; also the coverage of its right and top face, and the
    coordinates (0..1 along, in units up) of the two side faces."""
    (lx, ly), (rx, ry), cos, sin = _corner(turn)
    lx, ly, rx, ry = lx * side, ly * side, rx * side, ry * side
    fx, fy = -0.5 * (lx + rx), -0.5 * (ly + ry + height)
    x, y = u - fx, v - fy
    outline = polygon(
        x,
        y,
        (
            (0.0, 0.0),
            (rx, ry),
            (rx, ry + height),
            (lx + rx, ly + ry + height),
            (lx, ly + height),
            (lx, ly),
        ),
    )
    right = cover(-x, px)
    left_height, right_height = y - x * (ly / lx), y - x * (ry / rx)
    top = cover(height - np.minimum(left_height, right_height), px)
    # Normals of the faces, seen from 25 degrees above.
    nx = mix(mix(-sin, cos, right), 0.0, top)
    ny = mix(mix(-0.42 * cos, -0.42 * sin, right), 0.907, top)
    nz = mix(mix(0.907 * cos, 0.907 * sin, right), 0.42, top)
    on_right = x > 0
    s = np.where(on_right, x * (side / rx), x * (side / -lx))
    t = np.where(on_right, right_height, left_height)
    # On the top face: solve for the two base directions.
    det = 1.0 / (lx * ry - ly * rx)
    y_top = y - height
    s = np.where(top > 0.5, (x * ry - y_top * rx) * (det * side), s)
    t = np.where(top > 0.5, (y_top * lx - x * ly) * (det * side), t)
    bulge = unit(1.0 - np.maximum(np.abs(x), y_top))
    surface = Surface(cover(outline, px), nx, ny, nz, s, t, bulge)
    return surface, right, top, left_height, right_height


def cube(u: Array, v: Array, px: float, turn: float) -> Surface:
    """Cube, cornerwise from above."""
    return _block(u, v, px, turn, 1.12, 1.0)[0]


def house(u: Array, v: Array, px: float, turn: float) -> Surface:
    """House with a gabled front, a door, a window and a darker roof."""
    side, height, rise = 1.26, 0.66, 0.56
    (lx, ly), (rx, ry), cos, sin = _corner(turn)
    lx, ly, rx, ry = lx * side, ly * side, rx * side, ry * side
    fx, fy = -0.5 * (lx + rx), -0.88
    x, y = u - fx, v - fy
    gable = (0.5 * lx, 0.5 * ly + height + rise)
    ridge = (gable[0] + rx, gable[1] + ry)
    front = cover(
        polygon(x, y, ((0.0, 0.0), (0.0, height), gable, (lx, ly + height), (lx, ly))), px
    )
    wall = cover(polygon(x, y, ((0.0, 0.0), (rx, ry), (rx, ry + height), (0.0, height))), px)
    roof = cover(
        polygon(x, y, ((0.05, height - 0.06), (rx + 0.04, ry + height - 0.06), ridge, gable)), px
    )
    alpha = np.minimum(front + wall + roof, 1.0)
    on_right = cover(-x, px)
    nx = mix(mix(-sin, cos, on_right), 0.7 * cos, roof)
    ny = mix(mix(-0.42 * cos, -0.42 * sin, on_right), 0.75, roof)
    nz = mix(mix(0.907 * cos, 0.907 * sin, on_right), 0.35, roof)
    along_left, along_right = x * (1 / lx), x * (1 / rx)
    up_left, up_right = y - x * (ly / lx), y - x * (ry / rx)
    door = cover(box((along_left - 0.5) * -lx, up_left - 0.2, 0.13 * cos, 0.25), px) * front
    attic = cover(ellipse((along_left - 0.5) * -lx, up_left - 0.72, 0.12 * cos, 0.12), px) * front
    window = cover(box((along_right - 0.5) * rx, up_right - 0.36, 0.22 * sin, 0.16), px) * wall
    pane = cover(box((along_right - 0.5) * rx, up_right - 0.36, 0.17 * sin, 0.115), px) * wall
    s = np.where(on_right > 0.5, along_right, along_left) * side
    t = np.where(on_right > 0.5, up_right, up_left)
    bulge = unit(1.0 - np.abs(x))
    paints: list = [(roof, 0.55), (door, _TRUNK), (attic, (0.55, 0.75, 0.9)), (window, _PAPER),
                    (pane, (0.45, 0.68, 0.88))]  # fmt: skip
    return Surface(alpha, nx, ny, nz, s, t, bulge, paints)


def pyramid(u: Array, v: Array, px: float, turn: float) -> Surface:
    """Square pyramid, cornerwise."""
    side = 1.28
    (lx, ly), (rx, ry), cos, sin = _corner(turn)
    lx, ly, rx, ry = lx * side, ly * side, rx * side, ry * side
    x, y = u + 0.5 * (lx + rx), v + 0.8
    ax, ay = 0.5 * (lx + rx), 0.5 * (ly + ry) + 1.28
    outline = polygon(x, y, ((0.0, 0.0), (rx, ry), (ax, ay), (lx, ly)))
    edge = (ay * x - ax * y) * (1.0 / (ax * ax + ay * ay) ** 0.5)
    right = cover(-edge, px)
    nx = mix(-0.85 * sin, 0.85 * cos, right)
    ny = mix(0.52 - 0.38 * cos, 0.52 - 0.38 * sin, right)
    nz = np.sqrt(np.maximum(1.0 - nx * nx - ny * ny, 0.02))
    t = np.where(right > 0.5, y - x * (ry / rx), y - x * (ly / lx))
    bulge = unit(1.0 - np.abs(edge) - 0.4 * y)
    return Surface(cover(outline, px), nx, ny, nz, edge * 1.3, t, bulge)


def cone(u: Array, v: Array, px: float, turn: float) -> Surface:
    """Cone."""
    width = np.maximum((0.98 - v) * (0.8 / 1.72), 0.0)
    return lathe(u, v, px, width, -0.465, -0.74, 0.98, 0.18)


def cylinder(u: Array, v: Array, px: float, turn: float) -> Surface:
    """Upright cylinder with its lid."""
    body = lathe(u, v, px, np.full_like(v, 0.64), 0.0, -0.74, 0.74, 0.18)
    return _lidded(u, v, px, body, 0.74, 0.64, 0.18)


def _lidded(
    u: Array, v: Array, px: float, body: Surface, top: float, a: float, b: float
) -> Surface:
    """`body` closed by an elliptical lid that faces up."""
    y = v - top
    lid = cover(ellipse(u, y, a, b), px)
    return Surface(
        np.maximum(body.alpha, lid),
        mix(body.nx, 0.0, lid),
        mix(body.ny, 0.88, lid),
        mix(body.nz, 0.47, lid),
        np.where(lid > 0.5, u, body.s),
        np.where(lid > 0.5, y * (a / b), body.t),
        mix(body.bulge, 0.5 - y * 2.0, lid),
        [(coverage * (1.0 - lid), colour) for coverage, colour in body.paints],
    )


def mug(u: Array, v: Array, px: float, turn: float) -> Surface:
    """Mug with a handle and a dark inside."""
    hand = 1.0 if turn > 0 else -1.0
    x = u + 0.22 * hand
    body = lathe(x, v, px, np.full_like(v, 0.60), 0.0, -0.62, 0.60, 0.16)
    body = _lidded(x, v, px, body, 0.60, 0.60, 0.17)
    hx, hy = (x - 0.60 * hand) * (1 / 0.36), (v + 0.02) * (1 / 0.42)
    reach = length(hx, hy)
    across = unit(np.abs(reach - 0.78) * (1 / 0.24))
    handle_d = (np.abs(reach - 0.78) - 0.24) * 0.38
    sign = np.where(reach > 0.78, across, -across)
    toward = 1.0 / np.maximum(reach, 1e-3)
    nz = np.sqrt(1.0 - across * across)
    handle = Surface(
        cover(handle_d, px), hx * toward * sign, hy * toward * sign, nz, x, v, 0.3 * nz
    )
    out = over(handle, body)
    inside = cover(ellipse(x, v - 0.60, 0.51, 0.125), px)
    out.paints.append((inside, 0.32))
    return out


def ring(u: Array, v: Array, px: float, turn: float) -> Surface:
    """Torus, face on."""
    radius = length(u, v)
    across = (radius - 0.66) * (1 / 0.30)
    toward = 1.0 / np.maximum(radius, 1e-3)
    inside = np.minimum(np.maximum(across, -1.0), 1.0)
    nz = np.sqrt(1.0 - inside * inside)
    # Five units around: whole numbers of periods of all patterns, so that no seam shows.
    angle = np.arctan2(v, u) * (2.5 / np.pi)
    return Surface(
        cover(np.abs(radius - 0.66) - 0.30, px),
        u * toward * inside,
        v * toward * inside,
        nz,
        across * 0.3,
        angle,
        nz,
    )


def star_shape(u: Array, v: Array, px: float, turn: float) -> Surface:
    """Five-pointed star."""
    return puffy(u, v, star(u * 1.06, v * 1.06, 0.46) * (1 / 1.06) - 0.04, px, 0.34)


def heart_shape(u: Array, v: Array, px: float, turn: float) -> Surface:
    """Heart."""
    scale = 1.56
    return puffy(u, v, heart(u * (1 / scale), (v + 0.86) * (1 / scale)) * scale, px, 0.5)


def cross(u: Array, v: Array, px: float, turn: float) -> Surface:
    """Upright cross with equal arms."""
    distance = np.minimum(box(u, v, 0.80, 0.25), box(u, v, 0.25, 0.80)) - 0.05
    return puffy(u, v, distance, px, 0.22)


def moon(u: Array, v: Array, px: float, turn: float) -> Surface:
    """Crescent."""
    hand = 1.0 if turn > 0 else -1.0
    x = u * hand - 0.18
    distance = np.maximum(length(x, v) - 0.95, 0.78 - length(x - 0.46, v - 0.10))
    return puffy(u, v, distance, px, 0.34)


def kite(u: Array, v: Array, px: float, turn: float) -> Surface:
    """Diamond kite with spars and a tail."""
    middle = 0.28
    sail = cover(polygon(u, v, ((0.0, -0.55), (0.72, middle), (0.0, 0.98), (-0.72, middle))), px)
    wave = u - 0.10 * np.sin((v + 0.55) * 11.0)
    tail = np.minimum(
        cover(np.abs(wave) - _thin(0.035, px), px), cover(np.abs(v + 0.75) - 0.22, px)
    )
    right, upper = cover(-u, px), cover(middle - v, px)
    nx, ny = mix(-0.38, 0.38, right), mix(-0.34, 0.34, upper)
    nz = np.sqrt(1.0 - nx * nx - ny * ny)
    spars = sail * np.maximum(cover(np.abs(u) - 0.025, px), cover(np.abs(v - middle) - 0.025, px))
    paints: list = [(tail * (1.0 - sail), _INK), (0.6 * spars, 0.3)]
    return Surface(np.maximum(sail, tail), nx, ny, nz, u, v, nz, paints)


def tree(u: Array, v: Array, px: float, turn: float) -> Surface:
    """Fir tree: a trunk and three tiers."""
    trunk = painted(_turned(u, v, px, 0.05, (-0.98, 0.17), (-0.5, 0.13)), _TRUNK)
    # Tiers hang like cones; bending the height makes their rims curve.
    dip = np.sqrt(np.maximum(1.0 - (u * (1 / 0.8)) ** 2, 0.0)) * 0.12
    height = v + dip
    tiers = ((-0.58, 0.76, 0.30), (-0.08, 0.60, 0.22), (0.38, 0.44, 0.0))
    tops = (-0.08, 0.38, 1.04)
    width = np.zeros_like(height)
    slope = np.zeros_like(height)
    for (low, base, end), high in zip(tiers, tops, strict=True):
        here = (height >= low) & (height < high)
        fall = (end - base) / (high - low)
        width = np.where(here, base + fall * (height - low), width)
        slope = np.where(here, fall, slope)
    leaves = lathe(u, v, px, width, slope, -0.70, 1.04, 0.12)
    return over(trunk, leaves)


def mushroom(u: Array, v: Array, px: float, turn: float) -> Surface:
    """Mushroom: a pale stem under a domed cap."""
    stem = painted(
        _turned(u, v, px, 0.08, (-0.92, 0.34), (-0.6, 0.26), (-0.2, 0.22), (0.1, 0.24)), _CREAM
    )
    y = unit(v * (1 / 0.86))
    width = 0.86 * np.sqrt(1.0 - y * y)
    slope = np.maximum(-y / np.sqrt(np.maximum(1.0 - y * y, 0.02)), -4.0)
    cap = lathe(u, v, px, width, slope, 0.0, 0.86, 0.20)
    return over(stem, cap)


def fish(u: Array, v: Array, px: float, turn: float) -> Surface:
    """Fish with a forked tail, a fin and an eye."""
    x = u if turn > 0 else -u
    body = ellipse(x - 0.16, v, 0.84, 0.50)
    tail = np.minimum(
        polygon(x, v, ((-0.45, 0.0), (-0.86, 0.0), (-1.0, 0.55))[::-1]),
        polygon(x, v, ((-0.45, 0.0), (-1.0, -0.55), (-0.86, 0.0))[::-1]),
    )
    fin = polygon(x, v, ((-0.15, 0.35), (0.35, 0.35), (-0.05, 0.62)))
    out = puffy(u, v, np.minimum(np.minimum(body, tail), fin), px, 0.42)
    gill = np.abs(length(x - 0.78, v) - 0.42) - 0.025
    gill = cover(np.maximum(gill, np.maximum(x - 0.5, np.abs(v) - 0.28)), px)
    eye, pupil = length(x - 0.66, v - 0.12), length(x - 0.68, v - 0.12)
    out.paints += [
        (0.6 * gill, 0.4),
        (cover(eye - 0.13, px), _PAPER),
        (cover(pupil - 0.07, px), _INK),
    ]
    return out


def bottle(u: Array, v: Array, px: float, turn: float) -> Surface:
    """Bottle with a cap."""
    body = _turned(
        u, v, px, 0.10,
        (-1.0, 0.42), (-0.6, 0.43), (0.0, 0.42), (0.25, 0.36), (0.45, 0.19), (0.65, 0.15),
        (0.95, 0.15),
    )  # fmt: skip
    cap = lathe(u, v, px, np.full_like(v, 0.19), 0.0, 0.76, 0.98, 0.04)
    return over(body, painted(cap, _STEEL))


def balloon(u: Array, v: Array, px: float, turn: float) -> Surface:
    """Balloon with a knot and a string."""
    skin = _turned(
        u, v, px, 0.0,
        (-0.52, 0.02), (-0.42, 0.18), (-0.15, 0.49), (0.15, 0.69), (0.4, 0.735), (0.65, 0.65),
        (0.85, 0.43), (0.94, 0.24), (0.98, 0.0),
    )  # fmt: skip
    knot = cover(polygon(u, v, ((0.0, -0.45), (-0.09, -0.60), (0.09, -0.60))), px)
    wave = u - 0.06 * turn * np.sin((v + 0.6) * 9.0)
    string = np.minimum(
        cover(np.abs(wave) - _thin(0.025, px), px), cover(np.abs(v + 0.78) - 0.22, px)
    )
    skin.paints += [(string * (1.0 - skin.alpha), _INK), (knot, 0.6)]
    skin.alpha = np.maximum(np.maximum(skin.alpha, knot), string)
    return skin


def boat(u: Array, v: Array, px: float, turn: float) -> Surface:
    """Sailing boat: hull and mainsail in its colour, a white jib."""
    x = u if turn > 0 else -u
    hull = polygon(x, v, ((-0.66, -0.84), (0.60, -0.84), (0.94, -0.30), (-0.86, -0.30)))
    main = polygon(x, v, ((0.02, -0.20), (0.02, 0.98), (-0.68, -0.20)))
    out = puffy(u, v, np.minimum(hull, main), px, 0.30)
    jib = cover(polygon(x, v, ((0.12, -0.18), (0.70, -0.18), (0.12, 0.74))), px)
    mast = cover(box(x - 0.07, v - 0.30, _thin(0.035, px), 0.64), px)
    rail = cover(box(x - 0.03, v + 0.37, 0.9, 0.03), px) * cover(hull, px)
    out.alpha = np.maximum(np.maximum(out.alpha, jib), mast)
    out.paints += [(jib, _PAPER), (mast, _TRUNK), (0.7 * rail, _PAPER)]
    return out


def bell(u: Array, v: Array, px: float, turn: float) -> Surface:
    """Bell with a clapper."""
    clapper = painted(puffy(u, v, length(u, v + 0.74) - 0.17, px, 0.17), _INK)
    body = _turned(
        u, v, px, 0.16,
        (-0.80, 0.80), (-0.62, 0.70), (-0.3, 0.56), (0.2, 0.50), (0.55, 0.40), (0.72, 0.24),
        (0.80, 0.0),
    )  # fmt: skip
    loop = painted(puffy(u, v, np.abs(length(u, v - 0.82) - 0.10) - 0.045, px, 0.05), 0.6)
    return over(over(loop, clapper), body)


def flower(u: Array, v: Array, px: float, turn: float) -> Surface:
    """Flower: five petals on a stem with a leaf."""
    x, y = u, v - 0.34
    radius = length(x, y)
    wave = np.cos(np.arctan2(y, x) * 5.0 - 1.57)
    stem = np.minimum(
        box(u, v + 0.45, _thin(0.05, px), 0.53),
        ellipse(
            0.8 * (u - 0.26) - 0.6 * (v + 0.55), 0.6 * (u - 0.26) + 0.8 * (v + 0.55), 0.30, 0.12
        ),
    )
    green = painted(puffy(u, v, stem, px, 0.08), _STEM)
    head = puffy(u, v, (radius - 0.51 - 0.13 * wave) * 0.8, px, 0.28)
    head.paints += [
        (0.5 * cover(radius - 0.25, px), 0.45),
        (cover(radius - 0.20, px), _GOLD),
        (cover(radius - 0.09, px), _TRUNK),
    ]
    return over(green, head)


def umbrella(u: Array, v: Array, px: float, turn: float) -> Surface:
    """Open umbrella with a hooked handle."""
    hand = 1.0 if turn > 0 else -1.0
    hook = np.maximum(np.abs(length(u - 0.15 * hand, v + 0.78) - 0.15) - _thin(0.045, px), v + 0.78)
    shaft = np.minimum(box(u, v + 0.35, _thin(0.035, px), 0.43), hook)
    pole = painted(puffy(u, v, shaft, px, 0.06), _TRUNK)
    y = unit((v + 0.12) * (1 / 0.96))
    width = 0.94 * np.sqrt(1.0 - y * y)
    slope = np.maximum(-y / np.sqrt(np.maximum(1.0 - y * y, 0.02)), -4.0)
    canopy = lathe(u, v, px, width, slope, -0.12, 0.84, 0.0)
    # Four scallops along the rim, and ribs that meet at the top.
    across = u / np.maximum(width, 0.05)
    scallop = np.abs(np.sin(u * (2 * np.pi / 0.94)))
    canopy.alpha = np.minimum(canopy.alpha, cover(-0.12 + 0.13 * scallop - v, px))
    ribs = np.maximum(cover(np.abs(np.abs(across) - 0.5) * width - 0.02, px),
                      cover(np.abs(u) - 0.02, px))  # fmt: skip
    canopy.paints.append((0.35 * ribs * canopy.alpha, 0.35))
    tip = painted(puffy(u, v, box(u, v - 0.86, 0.03, 0.06), px, 0.05), _TRUNK)
    return over(over(pole, tip), canopy)


SHAPES: dict[str, Shape] = {
    "ball": ball,
    "cube": cube,
    "cone": cone,
    "pyramid": pyramid,
    "cylinder": cylinder,
    "ring": ring,
    "star": star_shape,
    "heart": heart_shape,
    "cross": cross,
    "moon": moon,
    "kite": kite,
    "tree": tree,
    "house": house,
    "mushroom": mushroom,
    "fish": fish,
    "bottle": bottle,
    "mug": mug,
    "balloon": balloon,
    "boat": boat,
    "bell": bell,
    "flower": flower,
    "umbrella": umbrella,
}
