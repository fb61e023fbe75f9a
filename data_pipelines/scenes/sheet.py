"""Contact sheet: a gallery of scenes, and some of them with their views and long captions."""

from __future__ import annotations

import itertools
import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_pipelines.scenes.captions import long_caption
from data_pipelines.scenes.graph import FAR, Scene, sample_scene
from data_pipelines.scenes.render import Views, render
from data_pipelines.scenes.surfaces import Array
from data_pipelines.scenes.vocabulary import RGB, SETTINGS

_LARGE, _SMALL = 248, 122  # pixels of a gallery picture and of a view
_GAP, _LINE = 4, 13
_PAPER, _INK = (252, 252, 252), (40, 42, 48)
_VIEWED_OBJECTS = 3
_CAPTION_LINES = 3
_STEP = 6  # of colour levels in the file
_TITLES = ("boxes", "segmentation", "depth", "edges", "background layer", *(["object layer"] * 3))

# Dark blue, teal, green, yellow: near is bright.
_DEPTH_STOPS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))


def contact_sheet(seed: int = 0, start: int = 0) -> Image.Image:
    """Sheet of scenes `(seed, start)` and up: one per setting, then two with all their views."""
    gallery = [_find(seed, start, setting, 5, large=2) for setting in SETTINGS]
    viewed = [_find(seed, start, s, _VIEWED_OBJECTS, large=3) for s in ("meadow", "beach")]
    columns = len(gallery) // 2
    width = columns * _LARGE + (columns + 1) * _GAP
    block = _LINE + _SMALL + _CAPTION_LINES * _LINE + 4 * _GAP
    height = 2 * (_LARGE + _GAP) + _GAP + len(viewed) * block
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(10.5)
    for i, scene in enumerate(gallery):
        row, column = divmod(i, columns)
        place = (_GAP + column * (_LARGE + _GAP), _GAP + row * (_LARGE + _GAP))
        sheet.paste(Image.fromarray(render(scene, _LARGE).image), place)
    top = 2 * (_LARGE + _GAP) + _GAP
    for scene in viewed:
        for column, (title, tile) in enumerate(zip(_TITLES, _view_tiles(scene), strict=True)):
            left = _GAP + column * (_SMALL + _GAP)
            draw.text((left + 1, top), title, _INK, font)
            sheet.paste(tile, (left, top + _LINE + 2))
        lines = textwrap.wrap(long_caption(scene), 195)[:_CAPTION_LINES]
        draw.text((_GAP + 1, top + _LINE + _SMALL + 5), "\n".join(lines), _INK, font, spacing=2)
        top += block
    return sheet


def save_sheet(path: str, seed: int = 0, start: int = 0) -> None:
    """Write the contact sheet as a PNG; colours are rounded a little, which halves the file."""
    pixels = np.asarray(contact_sheet(seed, start)).astype(np.int32)
    rounded = np.minimum((pixels + _STEP // 2) // _STEP * _STEP, 255).astype(np.uint8)
    Image.fromarray(rounded).save(path, optimize=True)


def _find(seed: int, start: int, setting: str, objects: int, large: int) -> Scene:
    """The first scene from `start` on with this setting and number of objects, at least `large` of
    them large ones, in which one object stands well before another."""
    for index in itertools.count(start):
        scene = sample_scene(seed, index)
        if scene.setting != setting or len(scene.objects) != objects:
            continue
        if sum(thing.size == "large" for thing in scene.objects) < large:
            continue
        if min(render(scene, _SMALL).visible) < 0.75:
            return scene
    raise AssertionError("unreachable: the count is endless")


def _view_tiles(scene: Scene) -> list[Image.Image]:
    views = render(scene, _SMALL)
    flat = [
        _boxes(views),
        _segmentation(views),
        _depth(views.depth),
        np.repeat(views.edges[..., None], 3, 2),
    ]
    return [Image.fromarray(tile) for tile in (*flat, *map(_on_chequers, views.layers))]


def _boxes(views: Views) -> Array:
    picture = Image.fromarray(views.image)
    draw = ImageDraw.Draw(picture)
    for box in views.boxes:
        if box is not None:
            x1, y1, x2, y2 = (round(v * views.size) for v in box)
            draw.rectangle((x1, y1, x2 - 1, y2 - 1), outline=(255, 255, 255))
            draw.rectangle((x1 - 1, y1 - 1, x2, y2), outline=(220, 30, 60))
    return np.asarray(picture)


def _segmentation(views: Views) -> Array:
    names = ("red", "yellow", "green", "blue", "purple", "orange")
    table = np.array([(0.2, 0.21, 0.24), *(RGB[name] for name in names)])
    return (table[views.segmentation] * 255).astype(np.uint8)


def _depth(depth: Array) -> Array:
    nearness = (1 / depth - 1 / FAR) / (1.2 - 1 / FAR) * (len(_DEPTH_STOPS) - 1)
    places = np.arange(len(_DEPTH_STOPS))
    channels = [np.interp(nearness, places, [c[i] for c in _DEPTH_STOPS]) for i in range(3)]
    return np.stack(channels, -1).astype(np.uint8)


def _on_chequers(layer: Array) -> Array:
    size = len(layer)
    squares = np.add.outer(np.arange(size) // 8, np.arange(size) // 8) % 2
    below = np.where(squares[..., None] == 0, 255.0, 226.0)
    alpha = layer[..., 3:] / 255
    return (layer[..., :3] * alpha + below * (1 - alpha)).astype(np.uint8)
