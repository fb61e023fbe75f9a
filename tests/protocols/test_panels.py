"""Pictures of the report: the right thing is where it should be."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from data_pipelines.protocols import drawing, panels
from data_pipelines.protocols.drawing import RIGHT, WRONG
from tests.protocols.toy import COLORS, NAMES, QUARTERS, Toy, Words, plain, quarters


def opened(png: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(png))
    assert image.format == "PNG"
    assert image.mode == "RGB"
    return np.asarray(image)


def pixels_of(image: np.ndarray, color: tuple[int, int, int]) -> int:
    return int((image == np.array(color)).all(axis=-1).sum())


def picture(name: str) -> Image.Image:
    return Image.fromarray(plain(name, (64, 48)))


def dense(center: tuple[int, int], grid: int = 8) -> np.ndarray:
    """Features that agree with the text only around one cell (row, column)."""
    rng = np.random.default_rng(0)
    cells = 0.3 * rng.normal(size=(grid, grid, 16))
    row, column = np.mgrid[:grid, :grid]
    near = np.exp(-2.0 * ((row - center[0]) ** 2 + (column - center[1]) ** 2))
    cells[..., 0] += 3.0 * near
    return 7.0 * cells


@pytest.mark.parametrize("center", [(1, 1), (1, 6), (6, 1), (5, 4)])
def test_heat_map_points_at_the_object(center: tuple[int, int]) -> None:
    text = np.zeros(16)
    text[0] = 2.0
    found = panels.similarity_map(dense(center), text)
    assert found.shape == (8, 8)
    assert np.unravel_index(found.argmax(), found.shape) == center
    assert np.abs(found).max() <= 1.0 + 1e-9
    # Drawn over a picture that is not square, the brightest place is the object's.
    shown = panels.heat_overlay(picture("blue"), found, (120, 80))
    light = np.asarray(shown.convert("L"), np.float64)
    y, x = np.unravel_index(light.argmax(), light.shape)
    assert abs(y / 80 - (center[0] + 0.5) / 8) < 1.5 / 8
    assert abs(x / 120 - (center[1] + 0.5) / 8) < 1.5 / 8


def test_heat_map_of_a_model_points_into_the_box() -> None:
    """Image row 0 is map row 0, column 0 is column 0: no transpose, no flip."""
    toy, words = Toy(), Words()
    pick = NAMES[:4]
    cells = toy.dense_features(quarters(pick)[None])[0]
    for color, (x1, y1, x2, y2) in zip(pick, QUARTERS, strict=True):
        ids = np.array([words.tokens(color)], np.int32)
        found = panels.similarity_map(cells, toy.text("text_features_short", ids)[0])
        row, column = np.unravel_index(found.argmax(), found.shape)
        assert y1 <= (row + 0.5) / 8 <= y2
        assert x1 <= (column + 0.5) / 8 <= x2


def test_constant_map_is_drawn() -> None:
    shown = panels.heat_overlay(picture("red"), np.ones((4, 4)), (40, 40))
    assert shown.size == (40, 40)


def retrieved(rank: int) -> panels.Retrieved:
    others = tuple(picture(n) for n in NAMES[:5])
    return panels.Retrieved("a red picture", others, (0.9, 0.5, 0.4, 0.3, 0.2), others[0], rank, 79)


def test_retrieval_grid_marks_the_right_picture() -> None:
    hit, miss = opened(panels.retrieval_grid([retrieved(0)])), retrieved(30)
    assert hit.shape[1] == drawing.px(panels.WIDTH)
    side = drawing.px(106)
    assert pixels_of(hit, RIGHT) > 4 * side
    lost = opened(panels.retrieval_grid([miss]))
    assert pixels_of(lost, RIGHT) < 50
    assert pixels_of(lost, WRONG) > 4 * side * 0.8
    # Every picture is there, its own one twice where it was missed.
    red = pixels_of(lost, COLORS["red"])
    assert red == pytest.approx(side**2 + drawing.px(98) ** 2, rel=0.05)


def test_region_sheet_shows_truth_where_it_differs() -> None:
    def sheet(predicted: str) -> np.ndarray:
        found = panels.FoundRegion(QUARTERS[0], "red part", predicted, 0.4)
        item = panels.RegionPicture(picture("cyan"), (found,))
        return opened(panels.region_sheet([item]))

    assert pixels_of(sheet("red part"), WRONG) == 0
    assert pixels_of(sheet("red part"), RIGHT) > 10
    assert pixels_of(sheet("blue part"), WRONG) > 100


def test_region_sheet_grows_with_its_regions() -> None:
    found = tuple(
        panels.FoundRegion(QUARTERS[k % 4], "a long phrase " * 6, "another one " * 8, 0.1)
        for k in range(9)
    )
    few = opened(panels.region_sheet([panels.RegionPicture(picture("red"), found[:1])]))
    many = opened(panels.region_sheet([panels.RegionPicture(picture("red"), found)]))
    assert many.shape[0] > 1.5 * few.shape[0]


def test_boxes_at_the_border_and_without_area_are_drawn() -> None:
    for box in ((0.9, 0.9, 1.4, 1.4), (-0.2, 0.0, 0.1, 0.1), (0.5, 0.5, 0.5, 0.5)):
        item = panels.RegionPicture(
            picture("red"), (panels.FoundRegion(box, "thing", "thing", 0.4),)
        )
        opened(panels.region_sheet([item]))
        row = panels.HardRow(picture("red"), box, ("a", "b"), (0.2, 0.1))
        opened(panels.hard_negative_table([row]))


def test_hard_negative_table_always_shows_the_true_phrase() -> None:
    texts = tuple(f"text {n}" for n in range(11))
    worst = tuple(float(n) for n in range(11))
    row = panels.HardRow(picture("red"), QUARTERS[1], texts, worst)
    shown = opened(panels.hard_negative_table([row], most=4))
    assert pixels_of(shown, RIGHT) > 50
    assert pixels_of(shown, WRONG) > 1000
    best = panels.HardRow(picture("red"), QUARTERS[1], texts, worst[::-1])
    shown = opened(panels.hard_negative_table([best], most=4))
    assert pixels_of(shown, WRONG) == 0


def test_heat_sheet_with_uneven_rows() -> None:
    maps = tuple(panels.similarity_map(dense((2, 2)), np.eye(16)[0]) for _ in range(3))
    items = [
        panels.HeatPicture(picture("red"), ("one",), maps[:1], QUARTERS[:1]),
        panels.HeatPicture(picture("blue"), ("one", "two", "three"), maps, QUARTERS[:3]),
    ]
    shown = opened(panels.heat_sheet(items))
    assert shown.shape[1] == drawing.px(panels.WIDTH)


def test_wrap_keeps_to_width_and_lines() -> None:
    face = drawing.font(12)
    text = "a very long description of something " * 10
    lines = drawing.wrap(text, 12, 100, 3)
    assert len(lines) == 3
    assert lines[-1].endswith("...")
    assert all(face.getlength(line) <= drawing.px(100) for line in lines)
    assert drawing.wrap("short", 12, 100, 3) == ["short"]
    (word,) = drawing.wrap("w" * 200, 12, 60, 1)
    assert face.getlength(word) <= drawing.px(60)
    assert drawing.wrap("", 12, 60, 2) == []
