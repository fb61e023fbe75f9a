"""Backgrounds: a ground in perspective up to the horizon, and a wall or sky above it.

A panorama twice as wide as the image is painted once per (setting, horizon, size) and kept in a
small cache; a scene takes a window of it (`pan`) and varies its colours (`tint`). Panoramas are
pure functions of their arguments: the noise comes from fixed Philox keys.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from data_pipelines.scenes.graph import FAR, Scene
from data_pipelines.scenes.surfaces import Array, Rgb

_OVERSAMPLING = 3  # per axis, averaged


@functools.lru_cache(maxsize=64)
def _lattice(key: int, cells: int) -> Array:
    words = np.random.Philox(key=np.array([key, cells], np.uint64)).random_raw(cells * cells)
    values = (words >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
    return values.reshape(cells, cells)


def noise(x: Array, y: Array, key: int, octaves: int = 3) -> Array:
    """Value noise 0..1 of period 64, smooth at the scale of 1 and with finer octaves on top."""
    total, weight = np.zeros(np.broadcast_shapes(x.shape, y.shape), np.float32), 0.0
    for octave in range(octaves):
        table = _lattice(key + octave, 64)
        gain, scale = 0.5**octave, 2.0**octave
        fx, fy = x * scale, y * scale
        ix, iy = np.floor(fx), np.floor(fy)
        dx, dy = fx - ix, fy - iy
        dx, dy = dx * dx * (3 - 2 * dx), dy * dy * (3 - 2 * dy)
        x0, y0 = ix.astype(np.int64) & 63, iy.astype(np.int64) & 63
        x1, y1 = (x0 + 1) & 63, (y0 + 1) & 63
        top = table[y0, x0] * (1 - dx) + table[y0, x1] * dx
        bottom = table[y1, x0] * (1 - dx) + table[y1, x1] * dx
        total += gain * (top * (1 - dy) + bottom * dy)
        weight += gain
    return (total / weight).astype(np.float32)


def _ramp(x: Array, *stops: tuple[float, Rgb]) -> Array:
    """Colours `[3, ...]` by linear interpolation between (position, colour) stops."""
    places = [place for place, _ in stops]
    return np.stack([np.interp(x, places, [c[i] for _, c in stops]) for i in range(3)])


def _lines(x: Array, half: float, soft: Array | float) -> Array:
    """1 on lines at whole numbers, of half width `half`, edges softened."""
    distance = np.abs(x - np.round(x))
    return np.clip((half + soft - distance) / soft, 0.0, 1.0)


# Ground painters: (x, z, far) -> colours [3, h, w]. x is metres to the side, z metres away, far is
# 0 near and 1 at the horizon. Sky painters: (x, up) with up 0 at the horizon and 1 at the top.
_Ground: TypeAlias = Callable[[Array, Array, Array], Array]
_Sky: TypeAlias = Callable[[Array, Array], Array]


def _table(x: Array, z: Array, far: Array) -> Array:
    plank = np.floor(x * 2.2)
    grain = noise(x * 9.0 + 17 * plank, z * 1.1 + 7 * plank, 11)
    rings = 0.5 + 0.5 * np.sin(22 * grain + 3 * plank)
    tone = 0.55 * rings + 0.25 * grain + 0.2 * ((plank * 0.37) % 1.0)
    wood = _ramp(tone, (0.0, (0.50, 0.32, 0.18)), (1.0, (0.74, 0.54, 0.34)))
    return wood * (1.0 - 0.45 * _lines(x * 2.2, 0.012, 0.02 + 0.03 * far)) * (1.02 - 0.2 * far)


def _grass(x: Array, z: Array, far: Array) -> Array:
    blades = noise(x * 16, z * 5, 21)
    patches = noise(x * 1.1, z * 0.8, 25, 2)
    tone = (0.65 * blades + 0.35 * patches) * (1 - 0.4 * far) + 0.28 * far
    return _ramp(
        tone, (0.2, (0.22, 0.42, 0.14)), (0.55, (0.40, 0.62, 0.22)), (0.9, (0.62, 0.76, 0.34))
    )


def _sand(x: Array, z: Array, far: Array) -> Array:
    ripples = 0.5 + 0.5 * np.sin(z * 9 + 5 * noise(x * 1.3, z * 1.2, 31, 2))
    grains = noise(x * 24, z * 12, 33, 2)
    tone = (0.35 * ripples + 0.65 * grains) * (1 - far) + 0.5 * far
    return _ramp(tone, (0.1, (0.76, 0.64, 0.44)), (0.9, (0.95, 0.87, 0.68)))


def _snow(x: Array, z: Array, far: Array) -> Array:
    drifts = noise(x * 1.4, z * 1.3, 41)
    return _ramp(drifts, (0.2, (0.74, 0.81, 0.92)), (0.7, (0.95, 0.97, 1.0)))


def _tiles(x: Array, z: Array, far: Array) -> Array:
    cx, cz = np.floor(x * 2.4), np.floor(z * 2.4)
    odd = (cx + cz) % 2
    shade = noise(x * 3, z * 3, 51, 2) * 0.10
    # The pattern averages out where tiles become smaller than pixels.
    odd = odd * (1 - far) + 0.5 * far
    colour = _ramp(odd + shade, (0.0, (0.50, 0.55, 0.58)), (1.0, (0.84, 0.85, 0.82)))
    grout = np.maximum(_lines(x * 2.4, 0.012, 0.02), _lines(z * 2.4, 0.012, 0.03)) * (1 - far)
    return colour * (1 - 0.35 * grout)


def _field(x: Array, z: Array, far: Array) -> Array:
    tufts = noise(x * 7, z * 3, 61)
    return _ramp(tufts, (0.2, (0.10, 0.15, 0.20)), (0.8, (0.24, 0.32, 0.35)))


def _dunes(x: Array, z: Array, far: Array) -> Array:
    crest = 0.5 + 0.5 * np.sin(z * 5.5 + x * 1.3 + 5 * noise(x * 0.7, z * 0.7, 71, 2))
    tone = 0.7 * crest + 0.3 * noise(x * 20, z * 10, 73, 2)
    return _ramp(
        tone * (1 - 0.6 * far) + 0.35 * far,
        (0.0, (0.66, 0.36, 0.20)), (0.6, (0.88, 0.58, 0.33)), (1.0, (0.97, 0.75, 0.48)),
    )  # fmt: skip


def _carpet(x: Array, z: Array, far: Array) -> Array:
    pile = noise(x * 26, z * 14, 81, 2)
    band = np.abs(((x * 1.3) % 1.0) - 0.5) + np.abs(((z * 1.1) % 1.0) - 0.5)
    pattern = np.clip((0.11 - np.abs(band - 0.42)) * 12, 0, 1) * (1 - far)
    ground = _ramp(pile, (0.1, (0.50, 0.42, 0.48)), (0.9, (0.66, 0.57, 0.61)))
    return ground + (np.array([0.82, 0.76, 0.68])[:, None, None] - ground) * (0.6 * pattern)


def _wall(x: Array, up: Array) -> Array:
    plaster = noise(x * 20, up * 9, 12, 2)
    paint = _ramp(plaster, (0.0, (0.76, 0.83, 0.82)), (1.0, (0.84, 0.90, 0.88)))
    skirting = np.clip((0.085 - up) * 60, 0, 1)
    edge = np.clip(1 - np.abs(up - 0.085) * 70, 0, 1)
    paint = paint * (0.88 + 0.14 * up)
    return (paint + (0.93 - paint) * skirting) * (1 - 0.25 * edge)


def _clouds(x: Array, up: Array) -> Array:
    sky = _ramp(up, (0.0, (0.80, 0.90, 0.97)), (1.0, (0.36, 0.62, 0.92)))
    cloud = noise(x * 3.0, up * 3.4, 22, 4)
    cover = np.clip((cloud - 0.52) * 5, 0, 1) * np.clip(up * 3, 0, 1)
    sky = sky + (0.99 - sky) * (0.9 * cover)
    hills = 0.10 + 0.10 * noise(x * 2.2, np.zeros_like(x), 27, 2)
    green = np.array([0.42, 0.60, 0.42])[:, None, None]
    return np.where(up < hills, green + 0.25 * up, sky)


def _sea(x: Array, up: Array) -> Array:
    sky = _ramp(up, (0.3, (0.86, 0.93, 0.97)), (1.0, (0.50, 0.76, 0.95)))
    glint = noise(x * 7, up * 60, 32, 2)
    water = _ramp(up + 0.10 * (glint - 0.5), (0.0, (0.36, 0.72, 0.76)), (0.3, (0.10, 0.42, 0.66)))
    foam = np.clip((0.035 + 0.02 * noise(x * 4, np.zeros_like(x), 35, 2) - up) * 60, 0, 1)
    water = water + (0.97 - water) * foam
    return np.where(up < 0.32, water, sky)


def _mountains(x: Array, up: Array) -> Array:
    sky = _ramp(up, (0.0, (0.88, 0.92, 0.97)), (1.0, (0.60, 0.74, 0.92)))
    out = sky
    for height, rough, colour, key in (
        (0.62, 2.0, (0.66, 0.74, 0.86), 42), (0.42, 3.1, (0.50, 0.59, 0.72), 45),
    ):  # fmt: skip
        ridge = height * (0.35 + 0.65 * noise(x * rough, np.zeros_like(x), key, 4))
        rock = np.array(colour)[:, None, None] * (0.92 + 0.16 * noise(x * 12, up * 9, 48, 2))
        cap = np.clip((up - 0.66 * ridge - 0.10 * noise(x * 9, up * 6, 49, 2)) * 18, 0, 1)
        out = np.where(up < ridge, rock + (0.97 - rock) * (0.75 * cap), out)
    return out


def _bricks(x: Array, up: Array) -> Array:
    row = np.floor(up * 9)
    along = x * 6 + 0.5 * (row % 2)
    tone = (np.sin(np.floor(along) * 12.9898 + row * 78.233) * 0.5 + 0.5) * 0.7
    tone = tone + 0.3 * noise(x * 22, up * 22, 52, 2)
    brick = _ramp(tone, (0.0, (0.62, 0.40, 0.33)), (1.0, (0.78, 0.57, 0.47)))
    mortar = np.maximum(_lines(along, 0.025, 0.03), _lines(up * 9, 0.05, 0.05))
    return brick + (np.array([0.80, 0.77, 0.72])[:, None, None] - brick) * mortar


def _stars(x: Array, up: Array) -> Array:
    sky = _ramp(up, (0.0, (0.23, 0.27, 0.46)), (1.0, (0.05, 0.07, 0.20)))
    sky = sky * (0.85 + 0.3 * noise(x * 2, up * 2, 62, 3))
    gx, gy = x * 11, up * 4.6
    cx, cy = np.floor(gx), np.floor(gy)
    pick = _lattice(65, 64)[cy.astype(int) & 63, cx.astype(int) & 63]
    jitter = _lattice(66, 64)[cy.astype(int) & 63, cx.astype(int) & 63]
    distance = np.hypot(gx - cx - 0.2 - 0.6 * jitter, (gy - cy - 0.2 - 0.6 * ((jitter * 7) % 1)))
    glow = np.clip((pick - 0.5) * 2, 0, 1) * np.clip(1 - distance / 0.13, 0, 1)
    return sky + (1.0 - sky) * np.minimum(1.6 * glow, 1.0)


def _sunset(x: Array, up: Array) -> Array:
    sky = _ramp(
        up, (0.0, (0.99, 0.80, 0.52)), (0.45, (0.95, 0.58, 0.45)), (1.0, (0.50, 0.42, 0.62))
    )
    sun = np.hypot(x - 0.95, (up - 0.30) * 0.45)
    sky = sky + (np.array([1.0, 0.94, 0.75])[:, None, None] - sky) * np.clip(
        (0.085 - sun) * 60, 0, 1
    )
    ridge = 0.07 + 0.16 * noise(x * 1.6, np.zeros_like(x), 75, 2)
    dune = np.array([0.80, 0.50, 0.33])[:, None, None] * (0.9 + 0.5 * up)
    return np.where(up < ridge, dune, sky)


def _wallpaper(x: Array, up: Array) -> Array:
    base = np.array([0.88, 0.84, 0.74])[:, None, None]
    stripe = np.clip((np.abs(((x * 5) % 1.0) - 0.5) - 0.22) * 30, 0, 1)
    out = base * (1 - 0.09 * stripe)
    dx, dy = (x * 5) % 1.0 - 0.5, (up * 5 + 0.5 * (np.floor(x * 5) % 2)) % 1.0 - 0.5
    motif = np.clip((0.13 - np.hypot(dx, dy)) * 18, 0, 1)
    out = out + (np.array([0.62, 0.70, 0.66])[:, None, None] - out) * (0.65 * motif)
    skirting = np.clip((0.10 - up) * 60, 0, 1)
    return out + (0.95 - out) * skirting


_PAINTERS: dict[str, tuple[_Ground, _Sky]] = {
    "table": (_table, _wall),
    "meadow": (_grass, _clouds),
    "beach": (_sand, _sea),
    "snow": (_snow, _mountains),
    "tiles": (_tiles, _bricks),
    "night": (_field, _stars),
    "desert": (_dunes, _sunset),
    "carpet": (_carpet, _wallpaper),
}


@functools.lru_cache(maxsize=128)
def panorama(setting: str, horizon: float, size: int) -> Array:
    """uint8 `[3, size, 2*size]`: all that `pan` can show of this background."""
    n = size * _OVERSAMPLING
    y = ((np.arange(n) + 0.5) / n).astype(np.float32)[:, None]
    x = ((np.arange(2 * n) + 0.5) / n).astype(np.float32)[None, :]
    ground, sky = _PAINTERS[setting]
    split = int((y < horizon).sum())
    up = np.broadcast_to((horizon - y[:split]) / horizon, (split, 2 * n))
    above = sky(np.broadcast_to(x, up.shape), up)
    below = y[split:]
    z = 1.0 / (1.0 / FAR + (1.0 - 1.0 / FAR) * (below - horizon) / (1.0 - horizon))
    far = np.broadcast_to(np.clip((z - 1.5) / (0.7 * FAR - 1.5), 0, 1), (n - split, 2 * n))
    wide = (x - 1.0) * z
    under = ground(wide, np.broadcast_to(z, wide.shape), far)
    # A soft line where ground and wall meet.
    under = under * (0.82 + 0.18 * np.clip((below - horizon) * 25, 0, 1))
    fine = np.concatenate([above, under], axis=1)
    fine = fine.reshape(3, size, _OVERSAMPLING, 2 * size, _OVERSAMPLING).mean((2, 4))
    out = (np.clip(fine, 0, 1) * 255 + 0.5).astype(np.uint8)
    out.setflags(write=False)
    return out


def background(scene: Scene, size: int) -> Array:
    """float32 `[3, size, size]`, display RGB 0..1."""
    wide = panorama(scene.setting, scene.horizon, size)
    start = int(scene.pan * size)
    warm = 0.04 * (2.0 * scene.tint - 1.0)
    # At most 1: nothing may overflow when colours become bytes.
    gain = np.array([0.96 + warm, 0.97, 0.96 - warm], np.float32)[:, None, None] / 255
    return np.multiply(wide[:, :, start : start + size], gain, dtype=np.float32)
