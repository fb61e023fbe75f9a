"""Captions, phrases and negatives, parsed back and held against the graph."""

from __future__ import annotations

import itertools
import re

import pytest

from data_pipelines.records import Region
from data_pipelines.scenes import Scenes, layout, long_caption, regions, sample_scene, short_caption
from data_pipelines.scenes.captions import word_count
from data_pipelines.scenes.graph import Scene, SceneObject
from data_pipelines.scenes.vocabulary import (
    COLOURS,
    LANGUAGES,
    OBJECTS,
    SETTINGS,
    SIZES,
    TEXTURES,
    Language,
    class_names,
    coloured_class_names,
    templates,
)

SCENES = [sample_scene(5, i) for i in range(200)]
FULL = tuple[str, str, str, str]  # size, texture, colour, kind


def _table(table: dict, language: Language) -> dict[str, str]:
    """Word to key."""
    return {word: key for key, words in table.items() for word in words.of(language)}


def _alternatives(table: dict, language: Language) -> str:
    return "|".join(sorted(map(re.escape, _table(table, language)), key=len, reverse=True))


_EN = re.compile(
    rf"\b(?P<article>[Aa]n?|[Tt]he) (?:(?P<size>{_alternatives(SIZES, 'en')}) )?"
    rf"(?:(?P<t1>{_alternatives(TEXTURES, 'en')}) )?(?P<colour>{_alternatives(COLOURS, 'en')}) "
    rf"(?:(?P<t2>{_alternatives(TEXTURES, 'en')}) )?(?P<kind>{_alternatives(OBJECTS, 'en')})\b"
)
_ZH = re.compile(
    rf"(?P<article>一[{''.join(sorted({n.measure for n in OBJECTS.values()}))}])?"
    rf"(?:(?P<size>{_alternatives(SIZES, 'zh')})的)?(?P<colour>{_alternatives(COLOURS, 'zh')})"
    rf"(?P<t1>{_alternatives(TEXTURES, 'zh')})?(?:的(?P<size2>[大小]))?"
    rf"(?P<kind>{_alternatives(OBJECTS, 'zh')})"
)


def mentions(text: str, language: Language) -> list[tuple[bool, dict[str, str]]]:
    """(introduced by "a", attributes named) of each object phrase in the text, in order."""
    out = []
    for match in (_EN if language == "en" else _ZH).finditer(text):
        got = match.groupdict()
        words = {
            "size": (SIZES, got["size"] or got.get("size2")),
            "texture": (TEXTURES, got["t1"] or got.get("t2")),
            "colour": (COLOURS, got["colour"]),
            "kind": (OBJECTS, got["kind"]),
        }
        named = {k: _table(table, language)[w] for k, (table, w) in words.items() if w}
        article = got["article"] or ""
        out.append((article.lower() in ("a", "an") or article.startswith("一"), named))
    return out


def fitting(scene: Scene, named: dict[str, str]) -> list[SceneObject]:
    """Objects of the scene that the named attributes are true of."""
    return [o for o in scene.objects if all(getattr(o, k) == v for k, v in named.items())]


def full(thing: SceneObject) -> FULL:
    return (thing.size, thing.texture, thing.colour, thing.kind)


def parse(phrase: str, language: Language) -> FULL:
    """Attributes of a phrase that must name all of them."""
    ((_, named),) = mentions(phrase, language)
    return (named["size"], named["texture"], named["colour"], named["kind"])


def scene_regions(scene: Scene, language: Language) -> tuple[Region, ...]:
    return regions(scene, [o.box for o in scene.objects], language)


def owner(scene: Scene, region: Region) -> SceneObject:
    (thing,) = (o for o in scene.objects if o.box == region.box)
    return thing


# What a viewer takes each relation to mean, from the boxes and ground contacts alone.
HOLDS = {
    "left": lambda a, b: (a.box[0] + a.box[2]) < (b.box[0] + b.box[2]) - 0.2,
    "right": lambda a, b: (a.box[0] + a.box[2]) > (b.box[0] + b.box[2]) + 0.2,
    "above": lambda a, b: a.box[3] <= b.box[1] + 0.02,
    "below": lambda a, b: a.box[1] >= b.box[3] - 0.02,
    "front": lambda a, b: a.depth < b.depth,
    "behind": lambda a, b: a.depth > b.depth,
}
_RELATION_EN = {"to the left of": "left", "to the right of": "right", "above": "above",
                "over": "above", "below": "below", "under": "below", "in front of": "front",
                "behind": "behind"}  # fmt: skip
_RELATION_ZH = {"左边": "left", "左侧": "left", "右边": "right", "右侧": "right", "上方": "above",
                "上面": "above", "下方": "below", "下面": "below", "前面": "front",
                "前方": "front", "后面": "behind", "后方": "behind"}  # fmt: skip


@pytest.mark.parametrize("language", LANGUAGES)
def test_long_captions_introduce_every_object_once_with_all_attributes(language: Language) -> None:
    for scene in SCENES:
        introduced = [named for new, named in mentions(long_caption(scene, language), language)
                      if new]  # fmt: skip
        found = sorted((m["size"], m["texture"], m["colour"], m["kind"]) for m in introduced)
        assert found == sorted(map(full, scene.objects))


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_reference_fits_exactly_one_object(language: Language) -> None:
    for scene in SCENES:
        texts = [long_caption(scene, language)]
        texts += [r.long_phrase or "" for r in scene_regions(scene, language)]
        for text in texts:
            for new, named in mentions(text, language):
                assert len(fitting(scene, named)) == 1, (text, new, named)


@pytest.mark.parametrize("language", LANGUAGES)
def test_short_captions_are_true(language: Language) -> None:
    for scene, variant in itertools.product(SCENES, range(3)):
        text = short_caption(scene, language, variant)
        named = mentions(text, language)
        assert len(named) in (2, 3)
        assert all(fitting(scene, attributes) for _, attributes in named)
        assert short_caption(scene, language, variant) == text


def test_relations_in_english_captions_hold() -> None:
    seen = set()
    words = "|".join(_RELATION_EN)
    for scene in SCENES:
        for sentence in re.split(r"(?<=\.) ", long_caption(scene)):
            link = re.search(rf", ({words}) the ", sentence)
            if link is None:
                continue
            (_, first), (_, second) = mentions(sentence, "en")
            (a,), (b,) = fitting(scene, first), fitting(scene, second)
            which = _RELATION_EN[link[1]]
            assert HOLDS[which](a, b), (sentence, a.box, b.box)
            seen.add(which)
    assert seen == set(HOLDS)


def test_relations_in_chinese_captions_hold() -> None:
    seen = set()
    words = "|".join(_RELATION_ZH)
    for scene in SCENES:
        for sentence in long_caption(scene, "zh").split("。"):
            link = re.search(rf"，在[^，]*的({words})$", sentence)
            if link is None:
                continue
            (_, first), (_, second) = mentions(sentence, "zh")
            (a,), (b,) = fitting(scene, first), fitting(scene, second)
            assert HOLDS[_RELATION_ZH[link[1]]](a, b), sentence
            seen.add(_RELATION_ZH[link[1]])
    assert seen == set(HOLDS)


def test_long_region_phrases_hold() -> None:
    words = "|".join(_RELATION_EN)
    related = 0
    for scene in SCENES:
        for region in scene_regions(scene, "en"):
            assert region.long_phrase is not None
            assert region.long_phrase.startswith(region.phrase)
            link = re.search(rf" ({words}) the ", region.long_phrase)
            if link is not None:
                (_, second) = mentions(region.long_phrase, "en")[1]
                (b,) = fitting(scene, second)
                assert HOLDS[_RELATION_EN[link[1]]](owner(scene, region), b)
                related += 1
        for region in scene_regions(scene, "zh"):
            assert region.long_phrase is not None
            assert region.long_phrase.endswith(region.phrase)
    assert related > 0.8 * sum(len(scene.objects) for scene in SCENES)


def test_sides_light_number_and_nearest_hold() -> None:
    for scene in SCENES:
        for sentence in re.split(r"(?<=\.) ", long_caption(scene)):
            side = re.search(r"[Oo]n the (left|right)|[Ii]n the (middle)", sentence)
            told = mentions(sentence, "en")
            if told and side is not None:
                (thing, *_) = fitting(scene, told[0][1])
                name = side[1] or side[2]
                low, high = {"left": (0, 0.36), "middle": (0.36, 0.64), "right": (0.64, 1)}[name]
                assert low <= thing.x <= high
            if "closest to the viewer" in sentence:
                (thing,) = fitting(scene, told[0][1])
                assert thing.depth == min(o.depth for o in scene.objects)
            if light := re.search(r"light comes from the (left|right)\.", sentence):
                assert (light[1] == "left") == (scene.light < 0)
            if number := re.search(r"There are (\w+) objects", sentence):
                assert {"three": 3, "four": 4, "five": 5, "six": 6}[number[1]] == len(scene.objects)


@pytest.mark.parametrize("language", LANGUAGES)
def test_captions_name_the_setting(language: Language) -> None:
    for scene in SCENES:
        assert any(long_caption(scene, language).startswith(opening)
                   for opening in SETTINGS[scene.setting].opening(language))  # fmt: skip
    named = [
        any(
            place in short_caption(scene, language)
            for place in SETTINGS[scene.setting].of(language)
        )
        for scene in SCENES
    ]
    assert sum(named) > 0.5 * len(SCENES)


def test_lengths() -> None:
    for scene in (*SCENES, *(sample_scene(6, i) for i in range(400))):
        assert 5 <= len(short_caption(scene).split()) <= 15
        assert 40 <= len(long_caption(scene).split()) <= 100
        assert 10 <= len(short_caption(scene, "zh")) <= 45
        assert 40 <= word_count(long_caption(scene, "zh"), "zh") <= 100
        assert long_caption(scene, "zh").isascii() is False
        assert not re.search("[A-Za-z ]", long_caption(scene, "zh") + short_caption(scene, "zh"))
        assert long_caption(scene).isascii()


@pytest.mark.parametrize("language", LANGUAGES)
def test_captions_are_mostly_distinct(language: Language) -> None:
    scenes = [sample_scene(8, i) for i in range(1000)]
    assert len({short_caption(s, language) for s in scenes}) >= 995
    assert len({long_caption(s, language) for s in scenes}) == 1000
    assert len({short_caption(SCENES[0], language, v) for v in range(10)}) > 5


@pytest.mark.parametrize("language", LANGUAGES)
def test_region_phrases_are_true_and_unique_in_the_scene(language: Language) -> None:
    for scene in SCENES:
        found = scene_regions(scene, language)
        assert len(found) == len(scene.objects)
        for region in found:
            thing = owner(scene, region)
            assert parse(region.phrase, language) == full(thing)
            assert region.label == OBJECTS[thing.kind].of(language)[0]
        assert len({region.phrase for region in found}) == len(found)


@pytest.mark.parametrize("language", LANGUAGES)
def test_negatives_change_one_attribute_and_are_false(language: Language) -> None:
    for scene in SCENES:
        for region in scene_regions(scene, language):
            own = full(owner(scene, region))
            assert len(region.negatives) == 10
            assert len(set(region.negatives)) == 10
            parsed = [parse(text, language) for text in region.negatives]
            assert len(set(parsed)) == 10
            changed = [[i for i in range(4) if got[i] != own[i]] for got in parsed]
            assert sorted(i for (i,) in changed) == [0, 1, 1, 1, 2, 2, 2, 2, 2, 2]


def test_every_other_phrase_says_the_place_and_nothing_else_changes() -> None:
    placed = 0
    for scene in SCENES:
        boxes = [o.box for o in scene.objects]
        for bare, found in zip(
            regions(scene, boxes), regions(scene, boxes, places=True), strict=True
        ):
            phrase, _, place = found.phrase.partition(" at ")
            assert phrase == bare.phrase
            assert (found.box, found.long_phrase) == (bare.box, bare.long_phrase)
            end = f" at {place}" if place else ""
            assert found.negatives == tuple(text + end for text in bare.negatives)
            if place:
                placed += 1
                thing = owner(scene, bare)
                left, above = "ABCDEFGH".index(place[0]) / 8, (8 - int(place[1])) / 8
                assert left <= thing.x < left + 1 / 8
                assert above <= thing.ground - thing.lift < above + 1 / 8
    assert 0.45 < placed / sum(len(s.objects) for s in SCENES) < 0.55


def test_hidden_objects_have_no_region_and_leave_the_others_unchanged() -> None:
    scene = SCENES[0]
    boxes = [o.box for o in scene.objects]
    kept = regions(scene, [None, *boxes[1:]])
    assert {r.phrase for r in kept} == {
        r.phrase for r in regions(scene, boxes) if r.box != boxes[0]
    }


def test_region_order_is_mixed() -> None:
    # A limit on the number of boxes must not always drop the same (far or near) objects.
    first = [owner(s, scene_regions(s, "en")[0]) is s.objects[-1] for s in SCENES]
    assert 0.1 < sum(first) / len(first) < 0.4


@pytest.mark.parametrize("language", LANGUAGES)
def test_layout_lists_objects_from_far_to_near(language: Language) -> None:
    for scene in SCENES[:30]:
        items = layout(scene, [o.box for o in scene.objects], language)
        assert [item.box for item in items] == [o.box for o in scene.objects]
        for item, thing in zip(items, scene.objects, strict=True):
            assert item.label == OBJECTS[thing.kind].of(language)[0]
            assert COLOURS[thing.colour].of(language)[0] in item.phrase


@pytest.mark.parametrize("language", LANGUAGES)
def test_names_for_evaluation(language: Language) -> None:
    names = class_names(language)
    assert len(set(names)) == len(names) == len(OBJECTS) >= 16
    coloured = coloured_class_names(language)
    assert len(set(coloured)) == len(names) * len(COLOURS)
    assert all(text.count("{}") == 1 for text in templates(language))


def test_chinese_nouns_take_their_measure_words() -> None:
    text = " ".join(long_caption(scene, "zh") for scene in SCENES)
    for phrase in ("一棵", "一条", "一把", "一艘", "一座", "一颗"):
        assert phrase in text
    for scene in SCENES:
        for region in scene_regions(scene, "zh"):
            kind = owner(scene, region).kind
            assert region.phrase.startswith("一" + OBJECTS[kind].measure)


def test_coloured_labels_are_those_of_the_list_and_true() -> None:
    names = set(coloured_class_names())
    plain, coloured = (
        Scenes(count=20, image_size=16),
        Scenes(count=20, image_size=16, coloured_labels=True),
    )
    for before, after in zip(plain, coloured, strict=True):
        for one, two in zip(before.regions, after.regions, strict=True):
            colour, label = two.label.split(" ", 1)
            assert two.label in names
            assert label == one.label
            assert colour in two.phrase
            assert (one.box, one.phrase, one.negatives) == (two.box, two.phrase, two.negatives)
