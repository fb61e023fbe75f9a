"""Textures and light: from a `Surface` to colours.

One directional light from above and one side, a little from below as bounce, a highlight. The
powers of the highlight are repeated squares: exact everywhere and fast.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from data_pipelines.scenes.surfaces import Array, Rgb, Surface, unit
from data_pipelines.scenes.vocabulary import RGB

# The second colour of patterns: white, or a darker tone of its own where white would not show.
_SECOND: dict[str, Rgb] = {
    "white": (0.42, 0.46, 0.55),
    "yellow": (0.66, 0.45, 0.03),
}
_TAN: Rgb = (0.80, 0.58, 0.34)


def _wave(x: Array, frequency: float) -> Array:
    """Triangle wave 0..0.5, `frequency` periods per unit, 0.5 at whole periods."""
    x = x * frequency
    return np.abs(x - np.floor(x) - 0.5)


def striped(s: Array, t: Array, px: float) -> Array:
    """Share of the second colour: bands across."""
    f = 2.4
    return unit(0.5 + (_wave(t, f) - 0.29) * (1.0 / (px * f)))


def checked(s: Array, t: Array, px: float) -> Array:
    """Share of the second colour: squares."""
    f = 1.6
    sharp = 1.0 / (px * f)
    a = unit(0.5 + (_wave(s + 0.165, f) - 0.25) * sharp)
    b = unit(0.5 + (_wave(t + 0.165, f) - 0.25) * sharp)
    return a + b - 2.0 * a * b


def dotted(s: Array, t: Array, px: float) -> Array:
    """Share of the second colour: round dots in staggered rows."""
    f = 2.0
    y = t * f + 0.5
    row = np.floor(y)
    x = s * f + 0.5 * row
    dx, dy = x - np.floor(x) - 0.5, y - row - 0.5
    return unit(0.5 + (0.32 - np.sqrt(dx * dx + dy * dy)) * (1.0 / (px * f)))


def wooden(s: Array, t: Array, px: float) -> Array:
    """Darkness of the grain: growth rings that ramp up and break off."""
    x = 2.6 * s + 0.32 * np.sin(2.1 * t + 0.8) + 0.14 * np.sin(5.1 * t + 2.0 * s)
    x = x - np.floor(x)
    return x * x


_PATTERNS: dict[str, Callable[[Array, Array, float], Array]] = {
    "striped": striped,
    "checked": checked,
    "dotted": dotted,
}


def colours(surface: Surface, colour: str, texture: str, light: float, px: float) -> Array:
    """Lit colours of a surface.

    Args:
      surface: fields `[h, w]`.
      colour, texture: keys of `vocabulary.COLOURS` and `TEXTURES`.
      light: -1..1, side the light comes from.
      px: size of a pixel in the surface's units.

    Returns:
      float32 `[3, h, w]`, display RGB 0..1, not multiplied by coverage.
    """
    shape = surface.alpha.shape
    base = _column(RGB[colour])
    lx, ly, lz = 0.62 * light, 0.58, 0.55
    facing = surface.nx * lx + surface.ny * ly + surface.nz * lz
    # Highlight where the normal halves the angle between light and viewer.
    scale = 1.0 / (lx * lx + ly * ly + (lz + 1.0) ** 2) ** 0.5
    shine = np.maximum((facing + surface.nz) * scale, 0.0)
    shine = shine * shine
    shine = shine * shine
    shine = shine * shine
    shade = 0.46 + 0.60 * np.maximum(facing, 0.0) + 0.07 * surface.nz
    if texture in _PATTERNS:
        mask = np.broadcast_to(_PATTERNS[texture](surface.s, surface.t, px), shape)
        second = _column(_SECOND.get(colour, (0.97, 0.97, 0.96)))
        albedo = base + (second - base) * mask
        gloss = 0.16 * shine * shine
    elif texture == "wooden":
        grain = np.broadcast_to(wooden(surface.s, surface.t, px), shape)
        board = base + (_column(_TAN) - base) * 0.22
        albedo = board * (1.06 - 0.58 * grain)
        gloss = 0.05 * shine
    elif texture == "metal":
        # A bright sky above a dark horizon, reflected.
        slope = 0.8 * surface.ny + 0.6 * light * surface.nx + 0.4 * surface.t + 0.2 * surface.s
        band = unit(0.5 + 2.4 * slope) - 0.85 * unit(1.0 - np.abs(slope + 0.05) * 4.5)
        shade = 0.42 + 0.55 * band + 0.35 * np.maximum(facing, 0.0)
        albedo = np.broadcast_to(base * 0.88, (3, *shape))
        shine = shine * shine
        gloss = 0.16 * unit(band) + 0.75 * shine * shine
    else:
        albedo = np.broadcast_to(base, (3, *shape))
        gloss = 0.24 * shine * shine
    for coverage, paint in surface.paints:
        target = base * paint if isinstance(paint, float) else _column(paint)
        albedo = albedo + (target - albedo) * coverage
    return unit(albedo * shade + gloss)


def _column(rgb: Rgb) -> Array:
    return np.array(rgb, np.float32)[:, None, None]
