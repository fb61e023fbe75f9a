"""Captions of a scene: short ones that name a part of it, a long one that goes through all of it.

Texts are a pure function of (scene, language, variant); every statement is read off the graph.
"""

from __future__ import annotations

from data_pipelines.scenes.draws import Draws
from data_pipelines.scenes.graph import GEOMETRY, Relation, Scene, SceneObject, relation
from data_pipelines.scenes.vocabulary import LANGUAGES, SETTINGS, Language
from data_pipelines.scenes.wording import Wording, a, describe, refer, relation_words

_SHORT_WORDS = 15  # most words of a short caption
_LONG_WORDS = (52, 80)  # a long caption grows until it passes a number drawn from this range
_MOST_WORDS = 100

_COUNTS_EN = {3: "three", 4: "four", 5: "five", 6: "six"}
_COUNTS_ZH = {3: "三", 4: "四", 5: "五", 6: "六"}


def word_count(text: str, language: Language) -> int:
    """Words of an English text; for Chinese, characters divided by 1.7 (its usual word length)."""
    return len(text.split()) if language == "en" else round(len(text) / 1.7)


def short_caption(scene: Scene, language: Language = "en", variant: int = 0) -> str:
    """A caption of about 5 to 15 words that names two or three of the objects.

    `variant` gives further captions of the same scene (other objects, other words).
    """
    draws = Draws(scene.seed, scene.index, _stream("short", language, variant))
    things = draws.shuffled(scene.objects)
    place = draws.choice(SETTINGS[scene.setting].of(language))
    form = draws.below(4)
    first, second, third = things[:3]
    if form == 0 and (which := relation(first, second)) is not None:
        text = _related(scene, first, second, which, language, draws)
    elif form == 1:
        text = _listed(
            [
                a(
                    describe(o, language, Wording.draw(draws), size=False, texture=i == 0),
                    o.kind,
                    language,
                )
                for i, o in enumerate((first, second, third))
            ],
            language,
        )
    else:
        text = _listed(
            [
                a(describe(o, language, Wording.draw(draws), size=i == 0 or form == 2), o.kind,
                  language)
                for i, o in enumerate((first, second))
            ],
            language,
        )  # fmt: skip
    return _placed(text, place, language, SETTINGS[scene.setting].of(language))


def long_caption(scene: Scene, language: Language = "en") -> str:
    """A paragraph of 40 to 100 words: background, then every object with its attributes, place
    and, as space allows, relations; then the light and the number of objects."""
    draws = Draws(scene.seed, scene.index, _stream("long", language, 0))
    opening = draws.choice(SETTINGS[scene.setting].opening(language))
    things = draws.shuffled(scene.objects)
    heads = [_sentence(thing, language, draws) for thing in things]
    clauses = [_clause(scene, thing, language, draws) for thing in things]
    closings = draws.shuffled([_light(scene, language), _nearest(scene, language, draws)])
    closings.append(_count(scene, language))
    target = draws.uniform(*_LONG_WORDS)
    total = word_count(opening + " " + " ".join(heads), language)
    chosen: set[int] = set()
    for i, clause in enumerate(clauses):
        words = word_count(clause, language)
        if clause and total < target and total + words <= _MOST_WORDS:
            chosen.add(i)
            total += words
    tail: list[str] = []
    for closing in closings:
        words = word_count(closing, language)
        if total < target and total + words <= _MOST_WORDS:
            tail.append(closing)
            total += words
    stop = "." if language == "en" else "。"
    body = [head + (clauses[i] if i in chosen else "") + stop for i, head in enumerate(heads)]
    return (" " if language == "en" else "").join([opening, *body, *tail])


def _stream(use: str, language: Language, variant: int) -> int:
    """Stream number of a text, apart from those of the layout (0) and the regions."""
    base = {"short": 100, "long": 10}[use]
    return base + LANGUAGES.index(language) + len(LANGUAGES) * variant


def _listed(phrases: list[str], language: Language) -> str:
    if language == "en":
        return ", ".join(phrases[:-1]) + " and " + phrases[-1]
    return "、".join(phrases[:-1]) + "和" + phrases[-1]


def _related(
    scene: Scene, first: SceneObject, second: SceneObject, which: Relation, language: Language,
    draws: Draws,
) -> str:  # fmt: skip
    subject = describe(first, language, Wording.draw(draws))
    anchor = refer(scene, second, language, Wording.draw(draws))
    words = relation_words(which, language, draws)
    if language == "en":
        return f"{a(subject, first.kind, language)} {words} {anchor}"
    return f"{anchor}{words}有{a(subject, first.kind, language)}"


def _placed(text: str, place: str, language: Language, places: tuple[str, ...]) -> str:
    """Text with the setting, where there is room for it."""
    if language == "zh":
        return f"{place}，{text}" if "有" in text else f"{place}有{text}"
    for phrase in (place, min(places, key=lambda p: len(p.split()))):
        if word_count(f"{text} {phrase}", language) <= _SHORT_WORDS:
            return f"{text} {phrase}"
    return text


def _side(x: float) -> int:
    return 0 if x < 0.36 else 2 if x > 0.64 else 1


# Kinds that nobody would say stand.
_LYING = frozenset({"fish", "ball", "boat", "ring"})

_SIDES_EN = ("on the left", "in the middle", "on the right")
_SIDES_ZH = ("左边", "中间", "右边")


def _sentence(thing: SceneObject, language: Language, draws: Draws) -> str:
    """One object with all attributes and its side of the picture, without the full stop."""
    phrase = a(describe(thing, language, Wording.draw(draws)), thing.kind, language)
    floating = GEOMETRY[thing.kind].floats
    side = _side(thing.x)
    form = draws.below(3)
    if language == "en":
        place = _SIDES_EN[side]
        verb = "floats" if floating else "lies" if thing.kind in _LYING else "stands"
        if form == 0:
            return f"{place.capitalize()} there is {phrase}"
        if form == 1:
            return f"{place.capitalize()} {verb} {phrase}"
        return f"{phrase.capitalize()} {verb} {place}"
    place = _SIDES_ZH[side]
    verb = "漂浮着" if floating else "放着"
    if form == 0:
        return f"{place}有{phrase}"
    if form == 1:
        return f"画面{place}{verb}{phrase}"
    return f"{phrase}在{place}"


def _clause(scene: Scene, thing: SceneObject, language: Language, draws: Draws) -> str:
    """A relation of `thing` to another object, to hang on its sentence; "" when none is clear."""
    found = related(scene, thing, draws)
    if found is None:
        return ""
    other, which = found
    anchor = refer(scene, other, language, Wording.draw(draws))
    words = relation_words(which, language, draws)
    return f", {words} {anchor}" if language == "en" else f"，在{anchor}的{words}"


def related(scene: Scene, thing: SceneObject, draws: Draws) -> tuple[SceneObject, Relation] | None:
    """Another object that `thing` has a clear relation to, and the relation."""
    for other in draws.shuffled([o for o in scene.objects if o is not thing]):
        which = relation(thing, other)
        if which is not None:
            return other, which
    return None


def _light(scene: Scene, language: Language) -> str:
    left = scene.light < 0
    if language == "en":
        return f"The light comes from the {'left' if left else 'right'}."
    return f"光从{'左' if left else '右'}侧照来。"


def _nearest(scene: Scene, language: Language, draws: Draws) -> str:
    anchor = refer(scene, scene.objects[-1], language, Wording.draw(draws))
    if language == "en":
        return f"{anchor.capitalize()} is closest to the viewer."
    return f"{anchor}离观察者最近。"


def _count(scene: Scene, language: Language) -> str:
    number = len(scene.objects)
    if language == "en":
        return f"There are {_COUNTS_EN[number]} objects in all."
    return f"一共有{_COUNTS_ZH[number]}个物体。"
