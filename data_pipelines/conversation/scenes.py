"""Questions about the scene world with their answers, read off the scene graph.

| kind | question | answer |
|---|---|---|
| colour | what colour is the *striped ball*? | one of ten colours |
| texture | what is the surface of the *red ball* like? | one of six surfaces |
| size | is the *red ball* small or large? | small, large |
| count | how many objects are there? | one to six |
| exists | is there a *red ball*? | yes, no (even) |
| relation | which is further to the left, the *red* or the *blue* one? | one of the two (even) |
| ground | IAA's grounding query with a phrase that fits one object | its box, two decimals |
| list | what is there, from left to right? | all objects by their full names |
| each | what is each like? | all objects in any order: "red C2: striped small ball; blue ..." |

With `places`, answers that take the right object to be found say first where it is, as people do
who point: "red C2: striped", and of two that are compared "red C2, blue F4: red". Of "is there a
red ball?" it is a ball of whatever colour: "red C2: yes", "blue C2: no". A place is the square of
the object's foot on a chessboard over the picture (`scenes.wording.square`). What counts as the
answer is what follows the colon.

Every question about an object names it so that it fits no other in the scene: with its colour, and
with further attributes where needed, but without the one that is asked for. Relations are asked so
that parts of an answer can be learnt (a colour that is there, one of the two, the left one): yes or
no, or asking for the right one as well, would make the answer an exclusive or of where the objects
are and how it is asked, of which no part alone says anything. For the same reason the lower of two
is asked for, not the higher: it is mostly also the one closer to the viewer.

"each" is an exercise, many answers at the price of one question. Each object begins with its
colour, which tells which one the words that follow are about.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal, get_args

from data_pipelines.conversation.pictures import frame_box
from data_pipelines.conversation.records import PLACEHOLDER, ConversationRecord, Turn
from data_pipelines.conversation.workflows import grounding_query
from data_pipelines.records import BadRecordError
from data_pipelines.scenes.captions import long_caption, short_caption
from data_pipelines.scenes.draws import Draws
from data_pipelines.scenes.graph import (
    MAX_OBJECTS,
    MIN_OBJECTS,
    Relation,
    Scene,
    SceneObject,
    relation,
    sample_scene,
)
from data_pipelines.scenes.render import render
from data_pipelines.scenes.vocabulary import COLOURS, OBJECTS, SIZES, TEXTURES
from data_pipelines.scenes.wording import square
from data_pipelines.sources.base import Source, digest

Kind = Literal["colour", "texture", "size", "count", "exists", "relation", "ground", "list", "each"]
QUESTIONS: tuple[Kind, ...] = ("colour", "texture", "size", "count", "exists", "relation")
KINDS: tuple[Kind, ...] = get_args(Kind)

# Raised whenever the same (seed, index) would give another question or answer.
VERSION = 5

_DRAWS = 200  # for the questions of one record

_STREAM = 300
_NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}
_COMPARED: dict[Relation, str] = {
    "left": "further to the left", "below": "lower down", "front": "closer to the viewer",
}  # fmt: skip
_OPPOSITE: dict[Relation, Relation] = {"right": "left", "above": "below", "behind": "front"}
_LAST: tuple[Kind, ...] = ("list", "each")  # their answers would give away the others


@dataclasses.dataclass(frozen=True)
class SceneDialogues(Source[ConversationRecord]):
    """Questions with their answers for each of `count` scenes from index `start` on.

    Attributes:
      seed: of the world. start: first index (hold out from `HELD_OUT`). count: number of records.
      image_size: pixels per side.
      kinds: kinds of question, drawn evenly (one that a scene cannot ask is drawn again).
      told: instead of the picture, an answer to "each" stands before the question: reading
        exercises for a language model without eyes. Not for "ground" and "list".
      places: answers about one object, or two that are compared, say first where they are.
      given: such places are given, only what follows them is learnt (an exercise in concluding).
      questions: different questions of one record, fewer where a scene has no more; "list" and
        "each", whose answers would give away the others, are the last. `extra` speaks of the last.
      objects: fewest and most objects of a scene, of 1 to 6.
    """

    seed: int = 0
    start: int = 0
    count: int = 100_000
    image_size: int = 64
    kinds: tuple[Kind, ...] = QUESTIONS
    told: bool = False
    places: bool = False
    given: bool = False
    questions: int = 1
    objects: tuple[int, int] = (MIN_OBJECTS, MAX_OBJECTS)

    def __post_init__(self) -> None:
        unknown = [k for k in self.kinds if k not in KINDS]
        if unknown or not self.kinds:
            raise ValueError(
                f"SceneDialogues.kinds: expected some of {', '.join(KINDS)}, found {self.kinds}"
            )
        if self.told and {"ground", "list"} & set(self.kinds):
            raise ValueError(
                "SceneDialogues: told=True has no boxes and no list from left to right; leave out "
                "the kinds ground and list"
            )
        low, high = self.objects
        if not 1 <= low <= high <= MAX_OBJECTS:
            raise ValueError(
                f"SceneDialogues.objects: expected 1 <= fewest <= most <= {MAX_OBJECTS}, found "
                f"{self.objects}"
            )
        if self.given and (not self.places or set(_LAST) & set(self.kinds)):
            raise ValueError(
                "SceneDialogues: given=True needs answers that begin with one place or two; set "
                "places=True, and leave out the kinds list and each"
            )
        if self.questions < 1:
            raise ValueError(
                f"SceneDialogues.questions: expected 1 or more, found {self.questions}"
            )

    @property
    def name(self) -> str:
        return f"scene_dialogues/{self.seed}"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> ConversationRecord:
        """Record `index`; its `extra` holds "task", "kind", for "ground" also "box" (pixels),
        "width" and "height", for "colour", "texture" and "size" also "seen": the answers that are
        true of one object or another, and for "relation" the two colours.

        Raises:
          BadRecordError: no_question, a scene about which nothing of these kinds can be asked.
        """
        if not 0 <= index < self.count:
            raise IndexError(f"SceneDialogues: expected 0 <= index < {self.count}, found {index}")
        scene = sample_scene(self.seed, self.start + index, objects=self.objects)
        draws = Draws(self.seed, self.start + index, _STREAM)
        views = None if self.told else render(scene, self.image_size)
        found: dict[str, tuple[str, dict[str, Any]]] = {}  # by question
        for _ in range(_DRAWS):
            if len(found) == self.questions:
                break
            kind = draws.choice(self.kinds)
            if kind == "ground" and views is not None:
                made = _ground(scene, views.boxes, self.image_size, draws)
            else:
                made = _question(scene, kind, draws, places=self.places)
            if made is None or made[0] in found:
                continue
            task = "Text" if self.told else "G" if kind == "ground" else "MM"
            found[made[0]] = (made[1], {"task": task, "kind": kind, **made[2]})
        asked = sorted(found.items(), key=lambda item: item[1][1]["kind"] in _LAST)
        turns: list[Turn] = []
        lead = f"{_each(scene, draws) if self.told else PLACEHOLDER}\n"
        for question, (answer, _) in asked:
            given = answer.find(":") + 1 if self.given else 0
            turns += [Turn("user", lead + question), Turn("assistant", answer, given)]
            lead = ""
        if not turns:
            raise BadRecordError("no_question", f"nothing of kinds {self.kinds} to ask")
        return ConversationRecord(
            id=self.record_id(index),
            turns=tuple(turns),
            images=() if views is None else (views.image,),
            extra=asked[-1][1][1],
        )

    def record_id(self, index: int) -> str:
        return str(self.start + index)

    def fingerprint(self) -> str:
        return digest("scene_dialogues", VERSION, dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class SceneTexts(Source[ConversationRecord]):
    """Captions of scenes as answers to nothing: plain texts for a language model.

    Attributes:
      seed, start, count: as for `SceneDialogues`.
    """

    seed: int = 0
    start: int = 0
    count: int = 100_000

    @property
    def name(self) -> str:
        return f"scene_texts/{self.seed}"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> ConversationRecord:
        if not 0 <= index < self.count:
            raise IndexError(f"SceneTexts: expected 0 <= index < {self.count}, found {index}")
        scene = sample_scene(self.seed, self.start + index)
        long = Draws(self.seed, self.start + index, _STREAM + 1).chance(0.5)
        text = long_caption(scene) if long else short_caption(scene)
        asked = "Describe a scene in detail." if long else "Describe a scene briefly."
        return ConversationRecord(
            self.record_id(index),
            (Turn("user", asked), Turn("assistant", text)),
            extra={"task": "Text", "kind": "text"},
        )

    def record_id(self, index: int) -> str:
        return str(self.start + index)

    def fingerprint(self) -> str:
        return digest("scene_texts", VERSION, dataclasses.asdict(self))


def tokenizer_texts(scenes: int) -> Iterator[str]:
    """Texts that the packaged tokenizer is learnt from."""
    sources: tuple[Source[ConversationRecord], ...] = (
        SceneDialogues(count=scenes, told=True),
        SceneDialogues(count=scenes, kinds=("ground",)),
        SceneDialogues(count=scenes, kinds=("list",)),
        SceneDialogues(count=scenes, kinds=("relation", "texture"), places=True, questions=2),
        SceneTexts(count=scenes),
    )
    for source in sources:
        for index in range(scenes):
            yield from (turn.text.replace(PLACEHOLDER, "") for turn in source[index].turns)
    yield from (f"{n:02d}" for n in range(100) for _ in range(scenes))
    yield from (role for role in ("system", "user", "assistant") for _ in range(scenes))


_Found = tuple[str, str, dict[str, Any]]


def _named(
    scene: Scene, thing: SceneObject, *without: Literal["colour", "texture", "size"]
) -> str | None:
    """The shortest phrase with its colour, but without some attributes, that fits `thing` alone;
    None when none does."""
    rivals = [o for o in scene.objects if o is not thing]
    usable = [a for a in ("colour", "texture", "size") if a not in without]
    for count in range("colour" in usable, len(usable) + 1):
        used = usable[:count]
        if all(
            o.kind != thing.kind or any(getattr(o, a) != getattr(thing, a) for a in used)
            for o in rivals
        ):
            words = [
                _word(a, getattr(thing, a)) for a in ("size", "texture", "colour") if a in used
            ]
            return " ".join([*words, OBJECTS[thing.kind].en[0]])
    return None


def _listing(scene: Scene) -> str:
    """All objects from left to right: "large plain yellow umbrella, small checked pink ring"."""
    return ", ".join(
        " ".join(
            [
                *(_word(a, getattr(o, a)) for a in ("size", "texture", "colour")),
                OBJECTS[o.kind].en[0],
            ]
        )
        for o in sorted(scene.objects, key=lambda o: o.x)
    )


def _each(scene: Scene, draws: Draws) -> str:
    """All objects in any order: "yellow C2: plain large umbrella; pink ..." """

    def words(thing: SceneObject) -> str:
        surface, size = _word("texture", thing.texture), _word("size", thing.size)
        return f"{_place(thing)}: {surface} {size} {OBJECTS[thing.kind].en[0]}"

    return "; ".join(words(thing) for thing in draws.shuffled(scene.objects))


def _place(thing: SceneObject) -> str:
    """ "yellow C2" """
    return f"{_word('colour', thing.colour)} {square(thing)}"


def _word(attribute: str, value: str) -> str:
    table = {"colour": COLOURS, "texture": TEXTURES, "size": SIZES}[attribute]
    return table[value].en[0]


def _question(scene: Scene, kind: Kind, draws: Draws, *, places: bool) -> _Found | None:
    thing = draws.choice(scene.objects)
    if kind == "count":
        return "How many objects are there?", _NUMBERS[len(scene.objects)], {}
    if kind == "exists":
        return _exists(scene, thing, draws, places=places)
    if kind == "relation":
        return _relation(scene, draws, places=places)
    if kind == "list":
        return "What is there, from left to right?", _listing(scene), {}
    if kind == "each":
        return "What is each like?", _each(scene, draws), {}
    if kind not in ("colour", "texture", "size"):
        return None
    name = _named(scene, thing, kind)
    if name is None:
        return None
    seen = {"seen": tuple(sorted({_word(kind, getattr(o, kind)) for o in scene.objects}))}
    if kind == "colour":
        return f"What colour is the {name}?", _word("colour", thing.colour), seen
    lead = f"{_place(thing)}: " if places else ""
    if kind == "texture":
        # Every third surface is plain: the others are as frequent only if some of these are left.
        if thing.texture == "plain" and not draws.chance(0.14 / 0.3):
            return None
        return (
            f"What is the surface of the {name} like?",
            lead + _word("texture", thing.texture),
            seen,
        )
    return f"Is the {name} small or large?", lead + _word("size", thing.size), seen


def _exists(scene: Scene, thing: SceneObject, draws: Draws, *, places: bool) -> _Found | None:
    kind, colour = thing.kind, thing.colour
    answer = draws.chance(0.5)
    if not answer:
        colour = draws.choice([c for c in COLOURS if c != colour])
        if any(o.kind == kind and o.colour == colour for o in scene.objects):
            return None
    name = f"{_word('colour', colour)} {OBJECTS[kind].en[0]}"
    article = "an" if name[0] in "aeiou" else "a"
    lead = f"{_place(thing)}: " if places else ""
    return f"Is there {article} {name}?", lead + ("yes" if answer else "no"), {}


def _relation(scene: Scene, draws: Draws, *, places: bool) -> _Found | None:
    colours = [o.colour for o in scene.objects]
    alone = [o for o in scene.objects if colours.count(o.colour) == 1]
    if len(alone) < 2:
        return None
    one, other = draws.shuffled(alone)[:2]
    which = relation(one, other)
    if which is None:
        return None
    if which not in _COMPARED:
        one, other, which = other, one, _OPPOSITE[which]
    # Whether the answer is named first.
    pair = (one, other) if draws.chance(0.5) else (other, one)
    a, b = (_word("colour", thing.colour) for thing in pair)
    question = f"Which is {_COMPARED[which]}, the {a} or the {b} one?"
    lead = f"{', '.join(map(_place, pair))}: " if places else ""
    return question, lead + _word("colour", one.colour), {"seen": tuple(sorted((a, b)))}


def _ground(scene: Scene, boxes: Any, size: int, draws: Draws) -> _Found | None:
    number = draws.below(len(scene.objects))
    box, name = boxes[number], _named(scene, scene.objects[number])
    if box is None or name is None:
        return None
    x1, y1, x2, y2 = box
    pixels = (x1 * size, y1 * size, x2 * size, y2 * size)
    extra = {"box": pixels, "width": size, "height": size}
    return grounding_query(f"the {name}"), write_box(frame_box(pixels, size, size)), extra


def write_box(box: tuple[float, float, float, float]) -> str:
    """`[x1, y1, x2, y2]` with two decimals (ASSUMPTION: the number is unpublished)."""
    return "[" + ", ".join(f"{v:.2f}" for v in box) + "]"
