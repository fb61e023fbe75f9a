"""Questions about the scene world with their answers, read off the scene graph.

| kind | question | answer |
|---|---|---|
| colour | what colour is the *striped ball*? | one of ten colours |
| texture | what is the surface of the *red ball* like? | one of six surfaces |
| size | is the *red ball* small or large? | small, large |
| count | how many objects are there? | one to six |
| exists | is there a *red ball*? | yes, no (even) |
| relation | is the *red ball* to the left of the *blue cube*? | yes, no (even) |
| ground | IAA's grounding query with a phrase that fits one object | its box, two decimals |
| list | what is there, from left to right? | all objects by their full names |

Every question about an object names it so that it fits no other in the scene: with its colour, and
with further attributes where needed, but without the one that is asked for.
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
from data_pipelines.sources.base import Source, digest

Kind = Literal["colour", "texture", "size", "count", "exists", "relation", "ground", "list"]
QUESTIONS: tuple[Kind, ...] = ("colour", "texture", "size", "count", "exists", "relation")
KINDS: tuple[Kind, ...] = get_args(Kind)

# Raised whenever the same (seed, index) would give another question or answer.
VERSION = 2

# What guessing gives at best: the most frequent answer, where answers are drawn evenly.
CHANCE: dict[str, float] = {
    "colour": 0.1,
    "texture": 1 / 6,
    "size": 0.5,
    "count": 0.25,
    "exists": 0.5,
    "relation": 0.5,
}

_DRAWS = 200  # for the questions of one record

_STREAM = 300
_NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}
_RELATIONS: dict[Relation, str] = {
    "left": "to the left of", "right": "to the right of", "above": "above", "below": "below",
    "front": "in front of", "behind": "behind",
}  # fmt: skip
_OPPOSITE: dict[Relation, Relation] = {
    "left": "right", "right": "left", "above": "below", "below": "above", "front": "behind",
    "behind": "front",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class SceneDialogues(Source[ConversationRecord]):
    """Questions with their answers for each of `count` scenes from index `start` on.

    Attributes:
      seed: of the world. start: first index (hold out from `HELD_OUT`). count: number of records.
      image_size: pixels per side.
      kinds: kinds of question, drawn evenly (one that a scene cannot ask is drawn again).
      told: instead of the picture, the answer to "list" stands before the question: reading
        exercises for a language model without eyes. Not for "ground" and "list".
      questions: different questions of one record, fewer where a scene has no more; "list", whose
        answer would give away the others, is the last. `extra` speaks of the last.
      objects: fewest and most objects of a scene, of 1 to 6.
    """

    seed: int = 0
    start: int = 0
    count: int = 100_000
    image_size: int = 64
    kinds: tuple[Kind, ...] = QUESTIONS
    told: bool = False
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
                "SceneDialogues: told=True has no boxes, and the list is told; leave out the "
                "kinds ground and list"
            )
        low, high = self.objects
        if not 1 <= low <= high <= MAX_OBJECTS:
            raise ValueError(
                f"SceneDialogues.objects: expected 1 <= fewest <= most <= {MAX_OBJECTS}, found "
                f"{self.objects}"
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
        "width" and "height", and for "colour", "texture" and "size" also "seen": the answers that
        are true of one object or another.

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
                made = _question(scene, kind, draws)
            if made is None or made[0] in found:
                continue
            task = "Text" if self.told else "G" if kind == "ground" else "MM"
            found[made[0]] = (made[1], {"task": task, "kind": kind, **made[2]})
        asked = sorted(found.items(), key=lambda item: item[1][1]["kind"] == "list")
        turns: list[Turn] = []
        lead = f"{_listing(scene) if self.told else PLACEHOLDER}\n"
        for question, (answer, _) in asked:
            turns += [Turn("user", lead + question), Turn("assistant", answer)]
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


def _word(attribute: str, value: str) -> str:
    table = {"colour": COLOURS, "texture": TEXTURES, "size": SIZES}[attribute]
    return table[value].en[0]


def _question(scene: Scene, kind: Kind, draws: Draws) -> _Found | None:
    thing = draws.choice(scene.objects)
    if kind == "count":
        return "How many objects are there?", _NUMBERS[len(scene.objects)], {}
    if kind == "exists":
        return _exists(scene, thing, draws)
    if kind == "relation":
        return _relation(scene, thing, draws)
    if kind == "list":
        return "What is there, from left to right?", _listing(scene), {}
    if kind not in ("colour", "texture", "size"):
        return None
    name = _named(scene, thing, kind)
    if name is None:
        return None
    seen = {"seen": tuple(sorted({_word(kind, getattr(o, kind)) for o in scene.objects}))}
    if kind == "colour":
        return f"What colour is the {name}?", _word("colour", thing.colour), seen
    if kind == "texture":
        # Every third surface is plain: the others are as frequent only if some of these are left.
        if thing.texture == "plain" and not draws.chance(0.14 / 0.3):
            return None
        return f"What is the surface of the {name} like?", _word("texture", thing.texture), seen
    return f"Is the {name} small or large?", _word("size", thing.size), seen


def _exists(scene: Scene, thing: SceneObject, draws: Draws) -> _Found | None:
    kind, colour = thing.kind, thing.colour
    answer = draws.chance(0.5)
    if not answer:
        colour = draws.choice([c for c in COLOURS if c != colour])
        if any(o.kind == kind and o.colour == colour for o in scene.objects):
            return None
    name = f"{_word('colour', colour)} {OBJECTS[kind].en[0]}"
    article = "an" if name[0] in "aeiou" else "a"
    return f"Is there {article} {name}?", "yes" if answer else "no", {}


def _relation(scene: Scene, thing: SceneObject, draws: Draws) -> _Found | None:
    others = [o for o in scene.objects if o is not thing]
    if not others:
        return None
    other = draws.choice(others)
    which = relation(thing, other)
    names = _named(scene, thing), _named(scene, other)
    if which is None or None in names:
        return None
    answer = draws.chance(0.5)
    asked = which if answer else _OPPOSITE[which]
    question = f"Is the {names[0]} {_RELATIONS[asked]} the {names[1]}?"
    return question, "yes" if answer else "no", {}


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
