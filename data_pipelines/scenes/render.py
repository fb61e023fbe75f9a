"""Views of a scene: image, visible boxes, segmentation, depth, edges, RGBA layers.

`render(scene, size)` computes nothing yet; each view is made when first asked for and kept. All
views come from the same `Fragment`s, one per object: its pixels inside its own window, hidden
parts included. To add a view elsewhere, write a function of `Views`.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from data_pipelines.scenes.backgrounds import background
from data_pipelines.scenes.graph import FAR, GEOMETRY, Box, Scene, SceneObject, ground_depth
from data_pipelines.scenes.materials import colours
from data_pipelines.scenes.shapes import SHAPES
from data_pipelines.scenes.surfaces import Array

_SHADOW = 0.50  # darkness in the middle of a shadow on which an object stands


@dataclasses.dataclass(frozen=True, slots=True)
class Fragment:
    """One object, alone, in its window.

    Attributes:
      rows, columns: window in the image.
      alpha: float32 `[h, w]` coverage by the object. colour: float32 `[3, h, w]`, 0..1.
      bulge: float32 `[h, w]` 0..1, how far it comes forward within its relief.
      shadow_rows, shadow_columns: window of its shadow, and shadow: float32 `[h', w']`, darkness.
    """

    rows: slice
    columns: slice
    alpha: Array
    colour: Array
    bulge: Array
    shadow_rows: slice
    shadow_columns: slice
    shadow: Array


class Views:
    """Lazily computed views of one scene at one size. Arrays are shared: do not write to them."""

    def __init__(self, scene: Scene, size: int) -> None:
        self.scene = scene
        self.size = size

    @functools.cached_property
    def fragments(self) -> tuple[Fragment, ...]:
        """One per object, in the order of `scene.objects` (far to near)."""
        return tuple(_fragment(o, self.scene.light, self.size) for o in self.scene.objects)

    @functools.cached_property
    def background(self) -> Array:
        """The background without objects and shadows, float32 `[3, S, S]`, 0..1."""
        return background(self.scene, self.size)

    @functools.cached_property
    def image(self) -> Array:
        """uint8 `[S, S, 3]`."""
        canvas = self.background.copy()
        for f in self.fragments:
            canvas[:, f.shadow_rows, f.shadow_columns] *= 1.0 - f.shadow
            window = canvas[:, f.rows, f.columns]
            window += (f.colour - window) * f.alpha
        return _to_bytes(canvas)

    @functools.cached_property
    def segmentation(self) -> Array:
        """uint8 `[S, S]`: 0 background, i + 1 where object i is what one sees."""
        out = np.zeros((self.size, self.size), np.uint8)
        for i, f in enumerate(self.fragments):
            out[f.rows, f.columns][f.alpha >= 0.5] = i + 1
        return out

    @functools.cached_property
    def boxes(self) -> tuple[Box | None, ...]:
        """Tight box of the visible part of each object; None where nothing of it shows."""
        return tuple(
            _tight(np.equal(self.segmentation[f.rows, f.columns], i + 1), f, self.size)
            for i, f in enumerate(self.fragments)
        )

    @functools.cached_property
    def full_boxes(self) -> tuple[Box | None, ...]:
        """Tight box of each object as if nothing stood before it."""
        return tuple(_tight(f.alpha >= 0.5, f, self.size) for f in self.fragments)

    @functools.cached_property
    def visible(self) -> tuple[float, ...]:
        """Share of each object's pixels that is not hidden by nearer objects."""
        return tuple(
            int((self.segmentation == i + 1).sum()) / max(int((f.alpha >= 0.5).sum()), 1)
            for i, f in enumerate(self.fragments)
        )

    @functools.cached_property
    def depth(self) -> Array:
        """float32 `[S, S]`: distance from the viewer, 1 on the ground at the lower edge, 10 at the
        horizon and in the background above it."""
        y = (np.arange(self.size) + 0.5) / self.size
        column = [
            ground_depth(float(v), self.scene.horizon) if v > self.scene.horizon else FAR for v in y
        ]
        out = np.repeat(np.array(column, np.float32)[:, None], self.size, axis=1)
        for thing, f in zip(self.scene.objects, self.fragments, strict=True):
            inside = f.alpha >= 0.5
            out[f.rows, f.columns][inside] = thing.depth - thing.relief * f.bulge[inside]
        return out

    @functools.cached_property
    def edges(self) -> Array:
        """uint8 `[S, S]`, 255 on edges: ridges of the brightness gradient, one pixel wide."""
        return _edges(self.image)

    @functools.cached_property
    def layers(self) -> Array:
        """uint8 `[1 + objects, S, S, 4]`, RGBA, not premultiplied: the background (opaque), then
        each object with its shadow, hidden parts included. Composited in order they give `image`
        up to rounding."""
        size = self.size
        out = np.zeros((1 + len(self.fragments), size, size, 4), np.uint8)
        out[0, ..., :3] = _to_bytes(self.background)
        out[0, ..., 3] = 255
        for layer, f in zip(out[1:], self.fragments, strict=True):
            alpha = np.zeros((size, size), np.float32)
            colour = np.zeros((3, size, size), np.float32)
            alpha[f.shadow_rows, f.shadow_columns] = f.shadow
            window = alpha[f.rows, f.columns]
            window += (1.0 - window) * f.alpha
            share = f.alpha / np.maximum(window, 1e-6)
            colour[:, f.rows, f.columns] = f.colour * share
            layer[..., :3] = _to_bytes(colour)
            layer[..., 3] = (alpha * 255 + 0.5).astype(np.uint8)
        return out


def render(scene: Scene, size: int) -> Views:
    """Views of `scene` at `size` by `size` pixels.

    Raises:
      ValueError: size below 16, where objects would have no pixels.
    """
    if size < 16:
        raise ValueError(f"scene image: expected size >= 16, found {size}; ask for 32 or more")
    return Views(scene, size)


def composite(layers: Array) -> Array:
    """Layers `[n, S, S, 4]` (uint8, first one opaque) over each other: uint8 `[S, S, 3]`."""
    canvas = layers[0, ..., :3].astype(np.float32)
    for layer in layers[1:]:
        alpha = layer[..., 3:].astype(np.float32) / 255
        canvas += (layer[..., :3] - canvas) * alpha
    return (canvas + 0.5).astype(np.uint8)


def _to_bytes(planes: Array) -> Array:
    """float32 `[3, S, S]` 0..1 to uint8 `[S, S, 3]`."""
    return np.ascontiguousarray((planes * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0))


def _tight(mask: Array, fragment: Fragment, size: int) -> Box | None:
    """Tight box, as fractions of the image, around a mask in the fragment's window."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return None
    top, left = fragment.rows.start, fragment.columns.start
    return (
        (left + int(columns[0])) / size,
        (top + int(rows[0])) / size,
        (left + int(columns[-1]) + 1) / size,
        (top + int(rows[-1]) + 1) / size,
    )


def _span(low: float, high: float, size: int) -> slice:
    """Pixels from `low` to `high` (fractions of the image), with a margin, inside the image."""
    return slice(max(int(low * size) - 1, 0), min(int(high * size) + 2, size))


def _fragment(thing: SceneObject, light: float, size: int) -> Fragment:
    g = GEOMETRY[thing.kind]
    radius, x, y = thing.radius, thing.x, thing.y
    cos, sin = thing.tilt
    # A tilted shape reaches further; the corners of its box bound it.
    lean = abs(sin)
    wide = radius * (g.half_width * cos + max(g.above, g.below) * lean)
    rows = _span(
        y - radius * (g.above * cos + g.half_width * lean),
        y + radius * (g.below * cos + g.half_width * lean),
        size,
    )
    columns = _span(x - wide, x + wide, size)
    px = 1.0 / (radius * size)
    u = ((np.arange(columns.start, columns.stop) + (0.5 - x * size)) * px).astype(np.float32)
    v = ((np.arange(rows.start, rows.stop) + (0.5 - y * size)) * -px).astype(np.float32)
    u, v = u[None, :], v[:, None]
    if sin:
        u, v = u * cos + v * sin, v * cos - u * sin
    surface = SHAPES[thing.kind](u, v, px, thing.turn)
    colour = colours(surface, thing.colour, thing.texture, light, px)
    bulge = np.broadcast_to(surface.bulge, surface.alpha.shape)
    return Fragment(rows, columns, surface.alpha, colour, bulge, *_shadow(thing, light, size))


def _shadow(thing: SceneObject, light: float, size: int) -> tuple[slice, slice, Array]:
    """A soft ellipse on the ground, away from the light; fainter and wider under what floats."""
    g = GEOMETRY[thing.kind]
    spread = 1.0 + 0.8 * thing.lift
    a = thing.radius * g.half_width * 1.02 * spread
    b = thing.radius * 0.30 * spread
    x = thing.x - 0.28 * light * thing.radius
    y = thing.ground - 0.30 * b
    rows, columns = _span(y - 1.5 * b, y + 1.5 * b, size), _span(x - 1.5 * a, x + 1.5 * a, size)
    u = ((np.arange(columns.start, columns.stop) + 0.5) / size - x) * (1.0 / a)
    v = ((np.arange(rows.start, rows.stop) + 0.5) / size - y) * (1.0 / b)
    square = (u * u).astype(np.float32)[None, :] + (v * v).astype(np.float32)[:, None]
    fall = np.maximum(1.0 - square * (1.0 / 2.25), 0.0)
    dark = _SHADOW / (1.0 + 2.5 * thing.lift)
    return rows, columns, fall * fall * dark


def _edges(image: Array) -> Array:
    """Thin ridges of the Sobel magnitude above a share of its range, uint8 `[S, S]`."""
    grey = image.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    p = np.pad(grey, 1, mode="edge")
    gx = p[:-2, 2:] + 2 * p[1:-1, 2:] + p[2:, 2:] - p[:-2, :-2] - 2 * p[1:-1, :-2] - p[2:, :-2]
    gy = p[2:, :-2] + 2 * p[2:, 1:-1] + p[2:, 2:] - p[:-2, :-2] - 2 * p[:-2, 1:-1] - p[:-2, 2:]
    strength = np.hypot(gx, gy)
    q = np.pad(strength, 1, mode="edge")
    steep = np.abs(gy) > np.abs(gx)
    before = np.where(steep, q[:-2, 1:-1], q[1:-1, :-2])
    after = np.where(steep, q[2:, 1:-1], q[1:-1, 2:])
    ridge = (strength > before) & (strength >= after)
    return np.where(ridge & (strength > 90.0), np.uint8(255), np.uint8(0))
