"""The scene graph: reproducible, well-formed, in any order."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter

import pytest

from data_pipelines.scenes.draws import Draws
from data_pipelines.scenes.graph import (
    FAR,
    GEOMETRY,
    MAX_OBJECTS,
    MIN_OBJECTS,
    ground_depth,
    relation,
    sample_scene,
)
from data_pipelines.scenes.shapes import SHAPES
from data_pipelines.scenes.vocabulary import COLOURS, OBJECTS, RGB, SETTINGS, SIZES, TEXTURES

KNOWN_SETTING = ("table", 0.34, -0.4224)
KNOWN_OBJECTS = [
    ("large", "pink", "checked", "ring", 0.8139, 0.4795, 3.4456),
    ("large", "pink", "plain", "bell", 0.6163, 0.6044, 2.1713),
    ("large", "blue", "checked", "flower", 0.2839, 0.701, 1.6884),
    ("small", "black", "wooden", "star", 0.8192, 0.7389, 1.5529),
    ("large", "yellow", "plain", "mug", 0.6491, 0.7979, 1.3804),
    ("large", "yellow", "plain", "umbrella", 0.34, 0.8925, 1.1718),
]

SCENES = [sample_scene(7, i) for i in range(300)]


def philox(key: tuple[int, int], counter: tuple[int, int, int, int]) -> list[int]:
    """Four words of Philox4x64-10 (Salmon et al. 2011), in plain integers."""
    word = 2**64 - 1
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(10):
        p0, p1 = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
        c0, c1, c2, c3 = (p1 >> 64) ^ c1 ^ k0, p1 & word, (p0 >> 64) ^ c3 ^ k1, p0 & word
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & word, (k1 + 0xBB67AE8584CAA73B) & word
    return [c0, c1, c2, c3]


def test_draws_are_those_of_the_philox_algorithm() -> None:
    draws = Draws(7, 2**40 + 1, stream=3)
    words = [w for block in range(1, 80) for w in philox((7, 2**40 + 1), (block, 0, 0, 3))]
    assert [draws.uniform() for _ in words] == [(w >> 11) * 2.0**-53 for w in words]


def test_graph_of_a_known_scene() -> None:
    scene = sample_scene(0, 0)
    found = [(o.size, o.colour, o.texture, o.kind, o.x, o.ground, o.depth) for o in scene.objects]
    assert (scene.setting, scene.horizon, scene.light) == KNOWN_SETTING
    assert found == KNOWN_OBJECTS


def test_any_order_gives_the_same_scenes() -> None:
    assert [sample_scene(7, i) for i in (250, 3, 119, 3)] == [SCENES[i] for i in (250, 3, 119, 3)]


def test_seed_and_index_both_matter() -> None:
    scenes = {dataclasses.replace(sample_scene(s, i), seed=0, index=0)
              for s in range(3) for i in range(20)}  # fmt: skip
    assert len(scenes) == 60
    assert sample_scene(2**63, 2**62).objects


@pytest.mark.parametrize(("seed", "index"), [(-1, 0), (0, -1)])
def test_negative_numbers_are_refused(seed: int, index: int) -> None:
    with pytest.raises(ValueError, match=f"seed={seed}, index={index}"):
        sample_scene(seed, index)


def test_objects_are_distinct_inside_the_image_and_ordered_by_depth() -> None:
    for scene in SCENES:
        objects = scene.objects
        assert MIN_OBJECTS <= len(objects) <= MAX_OBJECTS
        assert len({(o.kind, o.colour, o.texture, o.size) for o in objects}) == len(objects)
        for thing in objects:
            x1, y1, x2, y2 = thing.box
            assert x1 >= 0
            assert y1 >= 0
            assert x2 <= 1
            assert y2 <= 1
            assert thing.depth == round(ground_depth(thing.ground, scene.horizon), 4)
        for far, near in itertools.pairwise(objects):
            assert far.ground < near.ground
            assert far.depth - far.relief > near.depth


def test_all_words_occur_about_equally_often() -> None:
    things = [o for scene in SCENES for o in scene.objects]
    for attribute, table in (("kind", OBJECTS), ("colour", COLOURS), ("size", SIZES)):
        counts = Counter(getattr(o, attribute) for o in things)
        expected = len(things) / len(table)
        assert set(counts) == set(table)
        assert min(counts.values()) > 0.5 * expected
    assert set(Counter(o.texture for o in things)) == set(TEXTURES)
    assert {scene.setting for scene in SCENES} == set(SETTINGS)
    assert {len(scene.objects) for scene in SCENES} == {3, 4, 5, 6}


def test_tables_name_the_same_things() -> None:
    assert list(OBJECTS) == list(GEOMETRY) == list(SHAPES)
    assert list(COLOURS) == list(RGB)


def test_relations_are_antisymmetric() -> None:
    opposite = {"left": "right", "right": "left", "above": "below", "below": "above",
                "front": "behind", "behind": "front", None: None}  # fmt: skip
    seen = set()
    for scene in SCENES:
        for a in scene.objects:
            for b in scene.objects:
                if a is not b:
                    assert relation(b, a) == opposite[relation(a, b)]
                    seen.add(relation(a, b))
    assert seen == set(opposite)


def test_ground_depth_runs_from_one_to_far() -> None:
    assert ground_depth(1.0, 0.4) == pytest.approx(1.0)
    assert ground_depth(0.4, 0.4) == pytest.approx(FAR)
