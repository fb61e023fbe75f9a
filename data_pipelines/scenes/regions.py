"""Regions of a scene: visible boxes with phrases that fit one object only, and hard negatives."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from data_pipelines.records import Region
from data_pipelines.scenes.captions import related
from data_pipelines.scenes.draws import Draws
from data_pipelines.scenes.graph import Box, Scene, SceneObject
from data_pipelines.scenes.vocabulary import (
    COLOURS,
    LANGUAGES,
    OBJECTS,
    SIZES,
    TEXTURES,
    Language,
    coloured_name,
)
from data_pipelines.scenes.wording import (
    Identity,
    Wording,
    a,
    describe,
    identity,
    refer,
    relation_words,
    square,
)

NEGATIVES = 10
_TEXTURE_CHANGES = 3  # of the ten; one changes the size, the others the colour
_STREAM = 4
_PLACES = 6  # a stream of its own: the other texts do not depend on whether places are said


def negative_identities(thing: SceneObject, draws: Draws) -> list[Identity]:
    """Ten attribute sets of the same class, each with exactly one attribute changed.

    Attributes exclude each other and all are named in the phrase, so none is true of the object.
    """
    own = identity(thing)
    colours = draws.shuffled([c for c in COLOURS if c != own.colour])
    textures = draws.shuffled([t for t in TEXTURES if t != own.texture])
    (size,) = (s for s in SIZES if s != own.size)
    changed = [dataclasses.replace(own, size=size)]
    changed += [dataclasses.replace(own, texture=t) for t in textures[:_TEXTURE_CHANGES]]
    changed += [dataclasses.replace(own, colour=c) for c in colours[: NEGATIVES - len(changed)]]
    return draws.shuffled(changed)


def regions(
    scene: Scene,
    boxes: Sequence[Box | None],
    language: Language = "en",
    coloured_labels: bool = False,
    places: bool = False,
) -> tuple[Region, ...]:
    """One region per object that can be seen, in an order drawn at random (so that a limit on the
    number of boxes leaves out any of them).

    Args:
      scene: the graph.
      boxes: visible box of each object in the order of `scene.objects`; None where hidden.
      language: of phrases and labels.
      coloured_labels: label with colour and class ("red ball"), see `coloured_class_names`.
      places: every other phrase, drawn at random, and its negatives end with the object's place,
        "at C2" (see `square`).
    """
    placed = Draws(scene.seed, scene.index, _PLACES) if places else None
    draws = Draws(scene.seed, scene.index, _STREAM + LANGUAGES.index(language))
    out = []
    for thing, box in zip(scene.objects, boxes, strict=True):
        # Draw before looking at the box: texts do not depend on the size that was rendered.
        wording = Wording.draw(draws)
        phrase = a(describe(thing, language, wording), thing.kind, language)
        long_phrase = _long_phrase(scene, thing, phrase, language, draws)
        negatives = tuple(
            a(describe(other, language, wording), thing.kind, language)
            for other in negative_identities(thing, draws)
        )
        if placed is not None and placed.chance(0.5):
            end = f" at {square(thing)}"
            phrase, negatives = phrase + end, tuple(text + end for text in negatives)
        if box is not None:
            label = OBJECTS[thing.kind].of(language)[0]
            if coloured_labels:
                label = coloured_name(thing.colour, thing.kind, language)
            out.append(Region(box, phrase, long_phrase, negatives, label))
    return tuple(draws.shuffled(out))


def _long_phrase(
    scene: Scene, thing: SceneObject, phrase: str, language: Language, draws: Draws
) -> str:
    found = related(scene, thing, draws)
    if found is None:
        return phrase
    other, which = found
    anchor = refer(scene, other, language, Wording.draw(draws))
    words = relation_words(which, language, draws)
    return f"{phrase} {words} {anchor}" if language == "en" else f"{anchor}{words}的{phrase}"


@dataclasses.dataclass(frozen=True, slots=True)
class LayoutItem:
    """One entry of a layout: class name, full phrase, and the box of the visible part."""

    label: str
    phrase: str
    box: Box


def layout(
    scene: Scene, boxes: Sequence[Box | None], language: Language = "en"
) -> tuple[LayoutItem, ...]:
    """Labels and boxes from far to near, which is the order to paint them in; canonical words.

    Args:
      scene: the graph. boxes: as for `regions` (visible boxes, or whole ones).
      language: of labels and phrases.
    """
    return tuple(
        LayoutItem(OBJECTS[thing.kind].of(language)[0], describe(thing, language), box)
        for thing, box in zip(scene.objects, boxes, strict=True)
        if box is not None
    )
