"""Phrases: attributes to words, in English and Chinese.

A `Wording` fixes the synonyms and the word order of one mention, so that a region's positive and
its negatives differ in nothing but the changed attribute.
"""

from __future__ import annotations

import dataclasses

from data_pipelines.scenes.draws import Draws
from data_pipelines.scenes.graph import Relation, Scene, SceneObject
from data_pipelines.scenes.vocabulary import COLOURS, OBJECTS, SIZES, TEXTURES, Language, Words

_RELATIONS: dict[Relation, Words] = {
    "left": Words(("to the left of",), ("左边", "左侧")),
    "right": Words(("to the right of",), ("右边", "右侧")),
    "above": Words(("above", "over"), ("上方", "上面")),
    "below": Words(("below", "under"), ("下方", "下面")),
    "front": Words(("in front of",), ("前面", "前方")),
    "behind": Words(("behind",), ("后面", "后方")),
}

_COLUMNS = "ABCDEFGH"
_SQUARES = len(_COLUMNS)


@dataclasses.dataclass(frozen=True, slots=True)
class Identity:
    """The attributes that a full phrase names."""

    kind: str
    colour: str
    texture: str
    size: str


def identity(thing: SceneObject) -> Identity:
    """Attributes of an object."""
    return Identity(thing.kind, thing.colour, thing.texture, thing.size)


@dataclasses.dataclass(frozen=True, slots=True)
class Wording:
    """Choices of one mention: which synonym of each attribute, and which word order (0 or 1)."""

    noun: int = 0
    texture: int = 0
    size: int = 0
    order: int = 0

    @staticmethod
    def draw(draws: Draws) -> Wording:
        """A random wording; canonical words are three times as likely as their synonyms."""
        bits = draws.below(256)
        return Wording(
            int(bits & 3 == 3), int(bits >> 2 & 3 == 3), int(bits >> 4 & 3 == 3), bits >> 6 & 1
        )


def _pick(words: tuple[str, ...], which: int) -> str:
    return words[which] if which < len(words) else words[0]


def describe(
    what: Identity | SceneObject,
    language: Language,
    wording: Wording = Wording(),
    *,
    size: bool = True,
    texture: bool = True,
) -> str:
    """Bare noun phrase, without article: "large red striped ball", "大的红色条纹球".

    `size` and `texture` leave that attribute out when False.
    """
    noun = _pick(OBJECTS[what.kind].of(language), wording.noun)
    colour = COLOURS[what.colour].of(language)[0]
    surface = _pick(TEXTURES[what.texture].of(language), wording.texture) if texture else ""
    if language == "en":
        # "plain red" in either order; the other textures go before or after the colour.
        colour_first = wording.order and what.texture != "plain"
        words = [_pick(SIZES[what.size].en, wording.size)] if size else []
        words += [colour, surface] if colour_first else [surface, colour]
        return " ".join(word for word in (*words, noun) if word)
    sizes = SIZES[what.size].zh
    if not size:
        return f"{colour}{surface}{noun}"
    if wording.order:
        return f"{colour}{surface}的{sizes[0]}{noun}"
    return f"{_pick(sizes, wording.size)}的{colour}{surface}{noun}"


def a(phrase: str, kind: str, language: Language) -> str:
    """Indefinite: "a large ...", "an orange ...", "一个...", with the class's measure word."""
    if language == "en":
        return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"
    return f"一{OBJECTS[kind].measure}{phrase}"


def refer(scene: Scene, thing: SceneObject, language: Language, wording: Wording) -> str:
    """The shortest definite phrase that fits this object and no other in the scene."""
    rivals = [o for o in scene.objects if o is not thing and o.kind == thing.kind]
    same_colour = [o for o in rivals if o.colour == thing.colour]
    same_texture = [o for o in same_colour if o.texture == thing.texture]
    phrase = describe(thing, language, wording, size=bool(same_texture), texture=bool(same_colour))
    return f"the {phrase}" if language == "en" else phrase


def relation_words(which: Relation, language: Language, draws: Draws) -> str:
    """Words for a relation: "to the left of", "左边"."""
    return draws.choice(_RELATIONS[which].of(language))


def square(thing: SceneObject) -> str:
    """Where the foot of an object is, as on a chessboard over the picture: "C2". A to H from left
    to right, 1 to 8 from the lower edge up."""
    column = _COLUMNS[int(_SQUARES * thing.x)]
    down = min(int(_SQUARES * (thing.ground - thing.lift)), _SQUARES - 1)
    return f"{column}{_SQUARES - down}"
