"""Views: pixels, boxes, segmentation, depth, edges and layers agree with graph and each other."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from data_pipelines.scenes import Scene, Views, composite, render, sample_scene
from data_pipelines.scenes.backgrounds import panorama
from data_pipelines.scenes.graph import FAR, GEOMETRY, HORIZONS, SceneObject, ground_depth
from data_pipelines.scenes.vocabulary import COLOURS, OBJECTS, RGB, SETTINGS, TEXTURES

# Mean brightness of 4 by 4 cells of scenes (0, 0), (0, 1), (0, 2) at 64 pixels.
KNOWN_PIXELS = (
    (
        200.3, 199.9, 202.5, 195.8, 134.0, 136.6, 166.5, 150.3,
        108.6, 129.3, 137.8, 87.5, 99.7, 96.5, 98.2, 105.5,
    ),
    (
        141.5, 141.5, 141.5, 141.5, 166.1, 152.5, 155.2, 163.4,
        98.0, 104.0, 110.2, 139.2, 138.9, 117.2, 97.7, 118.1,
    ),
    (
        143.5, 143.8, 146.7, 146.7, 155.8, 135.1, 145.7, 147.2,
        133.1, 110.7, 136.1, 146.8, 123.4, 107.3, 115.2, 123.7,
    ),
)  # fmt: skip

SIZE = 64
VIEWS = [render(sample_scene(11, i), SIZE) for i in range(60)]


def one_object(kind: str, colour: str = "red", texture: str = "plain", turn: float = 0.6) -> Scene:
    """A scene with one large upright object in the middle."""
    thing = SceneObject(
        kind, colour, texture, "large", 0.5, 0.85, 0.0, 0.2, (1.0, 0.0), turn, 1.4, 0.2
    )
    return Scene(0, 0, "tiles", 0.4, -0.8, 0.3, 0.5, (thing,))


def thumbnail(image: np.ndarray) -> np.ndarray:
    """Mean of each cell of a 4 by 4 grid, over channels."""
    cell = image.shape[0] // 4
    return image.reshape(4, cell, 4, cell, 3).astype(np.float64).mean((1, 3, 4))


@pytest.mark.parametrize("index", range(len(KNOWN_PIXELS)))
def test_pixels_of_known_scenes(index: int) -> None:
    # Cell means leave room for a last-bit difference of sin or sqrt between machines, not more.
    # Another result is another world: raise `source.VERSION` with it.
    image = render(sample_scene(0, index), SIZE).image
    np.testing.assert_allclose(thumbnail(image).ravel(), KNOWN_PIXELS[index], atol=0.25)


def test_image_is_reproducible_to_the_byte_and_has_its_type() -> None:
    again = render(sample_scene(11, 5), SIZE).image
    assert again.dtype == np.uint8
    assert again.shape == (SIZE, SIZE, 3)
    assert again.flags.c_contiguous
    np.testing.assert_array_equal(again, VIEWS[5].image)


def test_sizes_show_the_same_scene() -> None:
    for index in range(8):
        scene = sample_scene(11, index)
        small, large = render(scene, 64), render(scene, 192)
        shrunk = large.image.reshape(64, 3, 64, 3, 3).astype(float).mean((1, 3))
        assert np.abs(shrunk - small.image).mean() < 6.0
        for a, b in zip(small.full_boxes, large.full_boxes, strict=True):
            assert a is not None
            assert b is not None
            assert np.abs(np.subtract(a, b)).max() <= 2 / 64


def test_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="expected size >= 16, found 8"):
        render(sample_scene(0, 0), 8)


def test_boxes_are_tight_around_what_the_segmentation_shows() -> None:
    for views in VIEWS:
        for i, box in enumerate(views.boxes):
            rows, columns = np.nonzero(views.segmentation == i + 1)
            expected = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert box == tuple(int(v) / SIZE for v in expected)


def test_every_object_shows_enough() -> None:
    shares = [share for views in VIEWS for share in views.visible]
    assert min(shares) > 0.35
    assert np.mean(np.array(shares) < 0.95) > 0.15  # and some are really occluded


def test_whole_boxes_contain_visible_boxes_and_lie_in_the_nominal_box() -> None:
    for views in VIEWS:
        for thing, whole, part in zip(
            views.scene.objects, views.full_boxes, views.boxes, strict=True
        ):
            assert whole is not None
            assert part is not None
            assert np.all(np.subtract(part, whole) * (1, 1, -1, -1) >= 0)
            # Tilted shapes may lean out of the nominal box a little.
            slack = 2.0 / SIZE + thing.radius * 0.25 * (thing.tilt[1] != 0)
            assert np.all(np.subtract(whole, thing.box) * (1, 1, -1, -1) >= -slack)


@pytest.mark.parametrize("kind", OBJECTS)
def test_shape_fills_its_declared_extent(kind: str) -> None:
    scene = one_object(kind)
    g = GEOMETRY[kind]
    (box,) = render(scene, 256).full_boxes
    assert box is not None
    x1, y1, x2, y2 = box
    filled = np.array([x2 - x1, y2 - y1]) / (2 * g.half_width * 0.2, (g.below + g.above) * 0.2)
    assert np.all(filled > 0.84), filled
    assert np.all(filled < 1.04), filled


def test_segmentation_follows_painters_order() -> None:
    for views in VIEWS:
        expected = np.zeros((SIZE, SIZE), np.uint8)
        for i, f in enumerate(views.fragments):
            whole = np.zeros((SIZE, SIZE), bool)
            whole[f.rows, f.columns] = f.alpha >= 0.5
            expected[whole] = i + 1
        np.testing.assert_array_equal(views.segmentation, expected)


def test_visible_object_is_the_nearest_one_in_depth() -> None:
    for views in VIEWS:
        nearest = np.full((SIZE, SIZE), np.inf)
        owner = np.zeros((SIZE, SIZE), np.uint8)
        for i, (thing, f) in enumerate(zip(views.scene.objects, views.fragments, strict=True)):
            mine = np.full((SIZE, SIZE), np.inf)
            mine[f.rows, f.columns] = np.where(
                f.alpha >= 0.5, thing.depth - thing.relief * f.bulge, np.inf
            )
            owner[mine < nearest] = i + 1
            nearest = np.minimum(nearest, mine)
        np.testing.assert_array_equal(owner, views.segmentation)
        seen = np.isfinite(nearest)
        np.testing.assert_allclose(views.depth[seen], nearest[seen], rtol=1e-6)


def test_depth_of_ground_and_sky() -> None:
    views = VIEWS[0]
    assert views.depth.dtype == np.float32
    empty = views.segmentation == 0
    y = (np.arange(SIZE) + 0.5) / SIZE
    for row in range(SIZE):
        found = views.depth[row][empty[row]]
        horizon = views.scene.horizon
        expected = FAR if y[row] <= horizon else ground_depth(y[row], horizon)
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_objects_stand_before_the_ground_they_hide() -> None:
    for views in VIEWS:
        empty = Views(dataclasses.replace(views.scene, objects=()), SIZE)
        inside = views.segmentation > 0
        # One row of slack: the foot of a shape may end within the pixel below its contact.
        reach = np.roll(empty.depth, 2, axis=0)
        reach[:2] = FAR
        assert np.all(views.depth[inside] <= reach[inside] + 1e-3)


def test_layers_composite_to_the_image() -> None:
    for views in VIEWS:
        layers = views.layers
        assert layers.dtype == np.uint8
        assert layers.shape == (1 + len(views.scene.objects), SIZE, SIZE, 4)
        assert np.all(layers[0, ..., 3] == 255)
        error = np.abs(composite(layers).astype(int) - views.image)
        assert error.max() <= 2


def test_layers_hold_the_hidden_parts() -> None:
    checked = 0
    for views in VIEWS:
        for i, f in enumerate(views.fragments):
            hidden = np.zeros((SIZE, SIZE), bool)
            hidden[f.rows, f.columns] = f.alpha > 0.99
            hidden &= views.segmentation != i + 1
            assert np.all(views.layers[1 + i, ..., 3][hidden] >= 252)
            checked += int(hidden.sum())
    assert checked > 500
    # The object alone looks the same whatever stands before it.
    scene = VIEWS[3].scene
    alone = render(dataclasses.replace(scene, objects=scene.objects[:1]), SIZE)
    np.testing.assert_array_equal(alone.layers[1], VIEWS[3].layers[1])


def test_edges_lie_on_changes_of_brightness() -> None:
    for views in VIEWS[:10]:
        edges = views.edges
        assert edges.dtype == np.uint8
        assert set(np.unique(edges)) == {0, 255}
        assert 0.005 < (edges > 0).mean() < 0.35
        grey = views.image.astype(float).mean(-1)
        change = np.hypot(*np.gradient(grey))
        assert change[edges > 0].mean() > 2 * change[edges == 0].mean()


def test_edges_follow_a_clear_outline() -> None:
    views = render(one_object("ball", "black"), 128)
    inside = views.segmentation > 0
    outline = inside & ~(
        np.roll(inside, 1, 0) & np.roll(inside, -1, 0) & np.roll(inside, 1, 1)
        & np.roll(inside, -1, 1)
    )  # fmt: skip
    near = np.zeros_like(inside)
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            near |= np.roll(views.edges > 0, (dy, dx), (0, 1))
    assert near[outline].mean() > 0.8


@pytest.mark.parametrize("colour", COLOURS)
def test_plain_objects_show_their_colour(colour: str) -> None:
    views = render(one_object("ball", colour), 128)
    mean = views.image[views.segmentation == 1].mean(0) / 255
    # Light scales a colour; the best match over plausible scales is the colour itself.
    scales = np.linspace(0.7, 1.15, 10)[:, None]
    distance = {name: np.abs(mean - scales * rgb).sum(1).min() for name, rgb in RGB.items()}
    assert min(distance, key=distance.__getitem__) == colour


def test_textures_change_pixels_and_nothing_else() -> None:
    plain = render(one_object("cylinder", "blue"), 96)
    images = [plain.image]
    for texture in tuple(TEXTURES)[1:]:
        views = render(one_object("cylinder", "blue", texture), 96)
        np.testing.assert_array_equal(views.segmentation, plain.segmentation)
        np.testing.assert_array_equal(views.depth, plain.depth)
        images.append(views.image)
    inside = plain.segmentation > 0
    for i, a in enumerate(images):
        for b in images[:i]:
            assert np.abs(a[inside].astype(int) - b[inside]).mean() > 10


@pytest.mark.parametrize("setting", SETTINGS)
def test_backgrounds_differ_and_pan(setting: str) -> None:
    wide = panorama(setting, HORIZONS[1], 48)
    assert wide.shape == (3, 48, 96)
    assert wide.std() > 5
    scene = dataclasses.replace(one_object("ball"), setting=setting, objects=())
    a, b = (render(dataclasses.replace(scene, pan=pan), 48).image for pan in (0.0, 0.7))
    assert np.abs(a.astype(int) - b).mean() > 0.5
    others = [panorama(name, HORIZONS[1], 48) for name in SETTINGS if name != setting]
    assert min(np.abs(wide.astype(int) - other).mean() for other in others) > 12
