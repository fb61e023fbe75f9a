"""Conversation records, their readers, and the batches made of them."""

from __future__ import annotations

import collections
import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines.batch import DataError
from data_pipelines.conversation import (
    ConversationPipeline,
    ConversationRecord,
    Framing,
    Llama3,
    Turn,
)
from data_pipelines.conversation.llava_json import LlavaJson
from data_pipelines.conversation.pictures import frame_box, prepare, unframe_box
from data_pipelines.conversation.pipeline import shares
from data_pipelines.conversation.scenes import (
    KINDS,
    SceneDialogues,
    SceneTexts,
)
from data_pipelines.conversation.splice import IGNORE, IMAGE
from data_pipelines.records import BadRecordError
from data_pipelines.sampling import Tolerance
from data_pipelines.scenes import sample_scene
from data_pipelines.scenes.graph import SceneObject
from data_pipelines.sources.base import InMemory, Mixture

PICTURE = np.full((20, 30, 3), 200, np.uint8)
SMALL = Framing(size=16)
BARE = Llama3(system="")


def record(name: str = "a", **changes: object) -> ConversationRecord:
    plain = ConversationRecord(
        name, (Turn("user", "<image>\nWhat colour?"), Turn("assistant", "red")), (PICTURE,)
    )
    return dataclasses.replace(plain, **changes)


def pipeline(source: object, **options: object) -> ConversationPipeline:
    settings = {"framing": SMALL, "template": BARE, "image_tokens": 4, "max_tokens": 64}
    return ConversationPipeline(source, **{**settings, **options})


def test_batches_have_the_stated_layout() -> None:
    text = ConversationRecord("t", (Turn("user", "Hello?"), Turn("assistant", "yes")))
    made = pipeline(InMemory((record(), text)), max_images=2)
    batch = next(iter(made.batches(global_batch=4, seed=0))).arrays
    shapes = {k: (v.shape, v.dtype.name) for k, v in batch.items()}
    assert made.length == 64 + 2 * 3
    assert shapes == {
        "image": ((4, 2, 16, 16, 3), "uint8"),
        "ids": ((4, 70), "int32"),
        "slot": ((4, 70), "int32"),
        "labels": ((4, 70), "int32"),
        "valid": ((4, 70), "bool"),
    }
    pictured = (batch["slot"] >= 0).any(axis=1)
    assert set(pictured) == {True, False}
    assert (batch["image"][pictured][:, 0] > 0).all()
    assert (batch["image"][~pictured] == 0).all()
    assert (batch["slot"].max(axis=1)[pictured] == 3).all()
    again = next(iter(made.batches(global_batch=4, seed=0))).arrays
    assert all((batch[k] == again[k]).all() for k in batch)
    assert made.fingerprint() != dataclasses.replace(made, max_tokens=65).fingerprint()


def test_blind_batches_show_nothing() -> None:
    batch = next(iter(pipeline(InMemory((record(),)), blind=True).batches(global_batch=1, seed=0)))
    assert (batch.arrays["image"] == 127).all()


def test_cutting_is_counted_and_a_cut_answer_is_refused() -> None:
    turns = (Turn("user", "<image>\nWhat?"), Turn("assistant", "red and blue and green and pink"))
    whole = pipeline(InMemory((record(turns=turns),))).make(
        record(turns=turns), np.random.default_rng()
    )
    used = len(whole.example.ids)
    short = pipeline(InMemory((record(turns=turns),)), max_tokens=used - 2)
    info = next(iter(short.batches(global_batch=2, seed=0))).info
    assert info.cut == {"tokens": 4}
    asked = next(n for n, label in enumerate(whole.example.labels) if label != IGNORE)
    cut = pipeline(InMemory((record(turns=turns),)), max_tokens=asked)
    with pytest.raises(BadRecordError, match="nothing_to_learn"):
        cut.make(record(turns=turns), np.random.default_rng())


def test_everything_is_learnt_but_pictures() -> None:
    """As in pre-training: `learn="all"`."""
    example = pipeline(InMemory((record(),)), learn="all").make(record(), np.random.default_rng())
    ids, labels = np.array(example.example.ids), np.array(example.example.labels)
    assert (ids == IMAGE).sum() == 1
    np.testing.assert_array_equal(labels, np.where(ids == IMAGE, IGNORE, ids))


@pytest.mark.parametrize(
    ("lengths", "total", "expected"),
    [
        ((5, 1, 9), 20, (5, 1, 9)),
        ((5, 1, 9), 12, (5, 1, 6)),
        ((30, 2, 40), 12, (5, 2, 5)),
        ((7, 7), 9, (4, 5)),
        ((), 9, ()),
    ],
)
def test_shares_of_a_row(lengths: tuple[int, ...], total: int, expected: tuple[int, ...]) -> None:
    assert shares(lengths, total) == expected


def spoken(number: int) -> ConversationRecord:
    """Of length that differs, with a picture every other time; record 5 is bad."""
    asked = " ".join(["well"] * (number % 4) + ["what", "is", "it?"])
    turns = (Turn("user", asked), Turn("assistant", " ".join(["so"] * (1 + number % 3))))
    if number % 2:
        return ConversationRecord(str(number), turns if number != 5 else turns[:1])
    first = Turn("user", f"<image>\n{asked}")
    return ConversationRecord(str(number), (first, *turns[1:]), (PICTURE,))


def packed(**options: object) -> ConversationPipeline:
    source = InMemory(tuple(spoken(n) for n in range(24)))
    tolerance = Tolerance(max_bad_fraction=0.5)
    return pipeline(source, **{"pack": 3, "max_tokens": 100, "tolerance": tolerance, **options})


def test_packed_rows_are_their_records_one_after_the_other() -> None:
    """Tokens, labels, places of pictures and segments, against the records one by one."""
    many, one = packed(max_tokens=140), packed(pack=1)
    assert many.length == 140 + 3 * 3
    rows = next(iter(many.batches(global_batch=4, seed=0)))
    alone = next(iter(one.batches(global_batch=12, seed=0)))
    assert rows.info.record_ids == alone.info.record_ids
    assert rows.info.quarantined == alone.info.quarantined
    for r in range(4):
        row = {k: v[r] for k, v in rows.arrays.items()}
        at = shown = 0
        for number in range(3):
            single = {k: v[3 * r + number] for k, v in alone.arrays.items()}
            length, pictures = int(single["valid"].sum()), int((single["slot"] >= 0).sum()) // 4
            here = slice(at, at + length)
            np.testing.assert_array_equal(row["ids"][here], single["ids"][:length])
            np.testing.assert_array_equal(row["labels"][here], single["labels"][:length])
            moved = np.where(single["slot"] >= 0, single["slot"] + 4 * shown, -1)
            np.testing.assert_array_equal(row["slot"][here], moved[:length])
            assert set(row["segments"][here]) == {number + 1}
            assert row["labels"][at] == -100
            np.testing.assert_array_equal(
                row["image"][shown : shown + pictures], single["image"][:pictures]
            )
            at, shown = at + length, shown + pictures
        assert row["valid"].sum() == at
        assert not row["segments"][at:].any()


def test_packing_reads_every_record_once_and_goes_on_where_it_stopped() -> None:
    made = packed()
    stream = made.batches(global_batch=4, seed=7)
    first, second, third = (next(stream) for _ in range(3))
    usable = {f"memory:{n}" for n in range(24)} - {"memory:5"}
    seen = [*first.info.record_ids, *second.info.record_ids]  # 24 slots: an epoch
    assert set(seen) == usable
    assert len(seen) == 24  # the slot of the bad record was refilled
    for count in (1, 2, 4):
        parts = [
            next(
                iter(
                    made.batches(
                        global_batch=4, seed=7, process_index=p, process_count=count, start_step=2
                    )
                )
            )
            for p in range(count)
        ]
        for name, whole in third.arrays.items():
            np.testing.assert_array_equal(
                np.concatenate([part.arrays[name] for part in parts]), whole, err_msg=name
            )
        assert sum((part.info.record_ids for part in parts), ()) == third.info.record_ids
    with pytest.raises(ValueError, match="batch of 4 rows over 3 processes"):
        next(iter(made.batches(global_batch=4, seed=7, process_count=3)))
    assert made.fingerprint() != dataclasses.replace(made, pack=2).fingerprint()


def test_long_records_share_a_row() -> None:
    """Each keeps its part; what is cut is counted; an answer beyond that part is refused."""
    made = packed(max_tokens=75, max_images=0, image_tokens=0, pack=3)
    texts = [(Turn("user", "a?"), Turn("assistant", "yes " * n)) for n in (30, 1, 30)]
    examples = [
        made.make(ConversationRecord(str(n), turns), np.random.default_rng()).example
        for n, turns in enumerate(texts)
    ]
    lengths = [len(e.ids) for e in examples]
    row = made.row(examples)
    assert row.spliced.length == 75
    assert row.cut == sum(lengths) - 75
    counts = [int((row.segments == n).sum()) for n in (1, 2, 3)]
    assert counts == list(shares(lengths, 75))
    assert min(counts) == lengths[1]
    late = (Turn("user", "why " * 30), Turn("assistant", "so"))
    with pytest.raises(BadRecordError, match="nothing_to_learn: no answer within the first 25"):
        made.make(ConversationRecord("late", late), np.random.default_rng())
    with pytest.raises(ValueError, match="pack: expected 1 to max_tokens=75, found 0"):
        dataclasses.replace(made, pack=0)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"images": ()}, "image_count: .* 0 picture.s. and 1 placeholder"),
        ({"images": (PICTURE, PICTURE)}, "image_count: .* 2 picture.s. and 1 placeholder"),
        ({"images": (b"no picture",)}, "undecodable_image"),
        ({"images": (Path("nowhere.jpg"),)}, "missing_file"),
        ({"turns": ()}, "malformed_record"),
        ({"turns": (Turn("user", "<image>"),)}, "no answer"),
        ({"turns": (Turn("assistant", "a"), Turn("user", "b"))}, "expected user, found assistant"),
        ({"turns": (Turn("user", "<image> a"), Turn("assistant", " "))}, "empty_text"),
        ({"turns": (Turn("user", "<image> a"), Turn("assistant", "x" * 99))}, "text_too_long"),
        ({"turns": (Turn("user", "<image> a"), Turn("assistant", "\ud800"))}, "invalid_utf8"),
    ],
)
def test_bad_records_say_why(changes: dict, reason: str) -> None:
    made = pipeline(InMemory((record(),)), max_chars=50)
    with pytest.raises(BadRecordError, match=reason):
        made.make(record(**changes), np.random.default_rng())


def test_more_pictures_than_places_in_a_batch() -> None:
    turns = (Turn("user", "<image> and <image>?"), Turn("assistant", "no"))
    made = pipeline(InMemory((record(),)))
    with pytest.raises(BadRecordError, match=r"too_many_images: 2 pictures, max_images=1"):
        made.make(record(turns=turns, images=(PICTURE, PICTURE)), np.random.default_rng())


def write_llava(folder: Path, lines: bool) -> LlavaJson:
    Image.fromarray(PICTURE).save(folder / "a.png")
    rows = [
        {
            "id": "1",
            "image": "a.png",
            "conversations": [
                {"from": "human", "value": "What?\n<image>"},
                {"from": "gpt", "value": "grey"},
            ],
        },
        {"id": 2, "conversations": [{"from": "gpt", "value": "left out"},
                                    {"from": "human", "value": "Hi"},
                                    {"from": "gpt", "value": "Hello"}]},
        {"id": "3", "image": "a.png", "conversations": [{"from": "nobody", "value": "?"}]},
        {"id": "4", "image": "../a.png", "conversations": []},
    ]  # fmt: skip
    path = folder / ("data.jsonl" if lines else "data.json")
    text = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows, indent=1)
    path.write_text(text, "utf-8")
    return LlavaJson(str(path))


@pytest.mark.parametrize("lines", [False, True])
def test_llava_files(tmp_path: Path, lines: bool) -> None:
    source = write_llava(tmp_path, lines)
    assert len(source) == 4
    assert source[0].images == (tmp_path / "a.png",)
    assert source[0].turns == (Turn("user", "What?\n<image>"), Turn("assistant", "grey"))
    assert source[1].turns == (Turn("user", "Hi"), Turn("assistant", "Hello"))
    with pytest.raises(BadRecordError, match="found from='nobody'"):
        source[2]
    with pytest.raises(BadRecordError, match="leaves its folder"):
        source[3]
    made = pipeline(source, tolerance=Tolerance(max_bad_fraction=0.9))
    info = next(iter(made.batches(global_batch=8, seed=1))).info
    assert {bad.reason for bad in info.quarantined} == {"malformed_record"}


def test_a_wrong_folder_of_pictures_is_said_at_once(tmp_path: Path) -> None:
    source = write_llava(tmp_path, lines=False)
    with pytest.raises(DataError, match=r"matched 0 of \d; first annotation path a.png"):
        len(dataclasses.replace(source, root=str(tmp_path / "elsewhere")))
    (tmp_path / "empty.json").write_text("{}")
    with pytest.raises(DataError, match="expected one array of conversations"):
        len(LlavaJson(str(tmp_path / "empty.json")))


def test_boxes_follow_the_padding() -> None:
    for size in ((30, 20), (20, 31), (8, 8)):
        box = (3.0, 4.0, 17.0, 8.0)
        # Python floats: a few roundings of numbers up to 31, each 2^-48 at most.
        np.testing.assert_allclose(unframe_box(frame_box(box, *size), *size), box, atol=1e-12)
    marked = np.zeros((20, 40, 3), np.uint8)
    marked[10:15, 20:40] = 255
    seen = prepare(marked, Framing(size=40))
    x1, y1, x2, y2 = (round(40 * v) for v in frame_box((20, 10, 40, 15), 40, 20))
    assert (seen[y1:y2, x1:x2] == 255).all()
    assert tuple(seen[0, 0]) == (122, 116, 104)


def test_scene_questions_are_true_of_the_scene() -> None:
    kinds = {r.extra["kind"] for r in SceneDialogues(count=60, kinds=KINDS)}
    assert kinds == set(KINDS)
    told = SceneDialogues(count=200, told=True)
    counts = [r for r in told if r.extra["kind"] == "count"]
    words = ("none", "one", "two", "three", "four", "five", "six")
    assert {words.index(r.turns[1].text) for r in counts} == {3, 4, 5, 6}
    assert all(words[r.turns[0].text.count("; ") + 1] == r.turns[1].text for r in counts)
    colours = [r for r in told if r.extra["kind"] == "colour"]
    assert all(r.turns[1].text in r.turns[0].text for r in colours)
    few = SceneDialogues(count=60, kinds=("count",), objects=(1, 2))
    assert {r.turns[1].text for r in few} == {"one", "two"}
    several = SceneDialogues(count=60, kinds=KINDS, questions=4)
    lists = [
        [n for n, t in enumerate(r.turns) if t.text.startswith(("What is there", "What is each"))]
        for r in several
    ]
    assert any(lists)
    assert all(
        found == list(range(len(r.turns) - 2 * len(found), len(r.turns), 2))
        for r, found in zip(several, lists, strict=True)
    )
    ground = SceneDialogues(count=3, kinds=("ground",))[1]
    numbers = np.array(json.loads(ground.turns[1].text))
    np.testing.assert_allclose(64 * numbers, ground.extra["box"], atol=0.33)


def test_relations_and_places_are_those_of_the_scene_graph() -> None:
    # What the answer has less of than the other: x to the left, and so on.
    less = {
        "further to the left": lambda o: o.x,
        "lower down": lambda o: -o.y,
        "closer to the viewer": lambda o: -o.ground,
    }
    asked, first = set(), []
    for told in (False, True):
        source = SceneDialogues(
            count=400, kinds=("relation",), told=told, places=told, objects=(2, 3)
        )
        for index in range(len(source)):
            try:
                turns = source[index].turns
            except BadRecordError:  # two of a colour, or nothing clear to say of them
                continue
            by_colour = {o.colour: o for o in sample_scene(0, index, objects=(2, 3)).objects}
            said = re.search(r"Which is (.*), the (.*) or the (.*) one\?", turns[0].text)
            assert said is not None
            words, a, b = said.groups()
            answer = turns[1].text
            if told:
                places = [f"{c} {square_of(by_colour[c])}" for c in (a, b)]
                lead, answer = answer.split(": ")
                assert lead == ", ".join(places)
                assert all(place in turns[0].text for place in places)
            other = b if answer == a else a
            measure = less[words]
            assert measure(by_colour[answer]) < measure(by_colour[other]), (index, turns)
            assert source[index].extra["seen"] == tuple(sorted((a, b)))
            asked.add((told, words))
            first.append(answer == a)
    assert {words for _, words in asked} == set(less)
    assert 0.4 < np.mean(first) < 0.6  # the word named first is no hint


def square_of(thing: SceneObject) -> str:
    """The square of an object's foot, counted from the corners of 8 x 8 fields."""
    column = sum(thing.x >= edge / 8 for edge in range(1, 8))
    row = sum(thing.ground - thing.lift < edge / 8 for edge in range(1, 9))
    return "ABCDEFGH"[column] + str(max(row, 1))


def test_each_says_all_of_all_objects_and_places_lead_answers() -> None:
    orders = set()
    for told in (False, True):
        each = SceneDialogues(count=20, kinds=("each",), told=told, objects=(1, 3))
        for index in range(len(each)):
            turns = each[index].turns
            objects = sample_scene(0, index, objects=(1, 3)).objects
            expected = sorted(
                f"{o.colour} {square_of(o)}: {o.texture} {o.size} {o.kind}" for o in objects
            )
            assert sorted(turns[1].text.split("; ")) == expected
            if told:
                listed = turns[0].text.split("\n")[0].split("; ")
                assert sorted(listed) == expected
                orders.add(listed == turns[1].text.split("; "))
    assert orders == {True, False}  # of its own, so that it has to be looked up
    for kind in ("texture", "size"):
        bare = SceneDialogues(count=40, kinds=(kind,), objects=(1, 3))
        placed = dataclasses.replace(bare, places=True)
        for index in range(len(bare)):
            colours = {o.colour: o for o in sample_scene(0, index, objects=(1, 3)).objects}
            try:
                answer = placed[index].turns[1].text
            except BadRecordError:
                continue
            where, said = answer.split(": ")
            assert said == bare[index].turns[1].text
            colour, place = where.split()
            assert len(colours) < 3 or place == square_of(colours[colour])


def test_is_there_points_at_one_of_that_kind_and_tells_whether_its_colour_is_the_one() -> None:
    said = collections.Counter()
    bare = SceneDialogues(count=400, kinds=("exists",), objects=(1, 3))
    placed = dataclasses.replace(bare, places=True)
    for index in range(len(bare)):
        objects = sample_scene(0, index, objects=(1, 3)).objects
        turns = placed[index].turns
        asked = re.search(r"Is there an? (\w+) (.*)\?", turns[0].text)
        assert asked is not None
        where, answer = turns[1].text.split(": ")
        assert answer == bare[index].turns[1].text
        same = {f"{o.colour} {square_of(o)}" for o in objects if o.kind == asked[2]}
        assert where in same
        there = {
            f"{o.colour} {square_of(o)}" for o in objects if (o.colour, o.kind) == asked.groups()
        }
        assert (where in there) == bool(there) == (answer == "yes")
        said[answer] += 1
    assert 0.4 < said["yes"] / said.total() < 0.6


def test_scene_sources_mix_and_refuse_what_they_cannot_ask() -> None:
    mixed = Mixture((SceneTexts(count=50), SceneDialogues(count=50, told=True)), (1, 1))
    made = pipeline(mixed, max_images=0, image_tokens=0, max_tokens=160)
    batch = next(iter(made.batches(global_batch=8, seed=0))).arrays
    assert set(batch) == {"ids", "labels", "valid"}
    given = SceneDialogues(count=40, kinds=("size", "count"), places=True, given=True)
    answers = [item.turns[-1] for item in given]
    assert {a.text[a.given :].strip() for a in answers if a.given} == {"small", "large"}
    assert {a.text for a in answers if not a.given} == {"three", "four", "five", "six"}
    with pytest.raises(ValueError, match="given=True needs answers that begin with one place"):
        SceneDialogues(given=True)
    with pytest.raises(ValueError, match="leave out the kinds list and each"):
        SceneDialogues(kinds=("each",), places=True, given=True)
    with pytest.raises(ValueError, match="no boxes"):
        SceneDialogues(told=True, kinds=("ground",))
    with pytest.raises(ValueError, match="expected some of"):
        SceneDialogues(kinds=("taste",))
    with pytest.raises(ValueError, match=r"fewest <= most <= 6, found \(3, 7\)"):
        SceneDialogues(objects=(3, 7))
