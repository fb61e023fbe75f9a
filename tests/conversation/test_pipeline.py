"""Conversation records, their readers, and the batches made of them."""

from __future__ import annotations

import dataclasses
import json
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
from data_pipelines.conversation.scenes import (
    CHANCE,
    KINDS,
    QUESTIONS,
    SceneDialogues,
    SceneTexts,
)
from data_pipelines.records import BadRecordError
from data_pipelines.sampling import Tolerance
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
    used = int(whole.example.row.length) - 3
    short = pipeline(InMemory((record(turns=turns),)), max_tokens=used - 2)
    info = next(iter(short.batches(global_batch=2, seed=0))).info
    assert info.cut == {"tokens": 4}
    with pytest.raises(BadRecordError, match="nothing_to_learn"):
        pipeline(InMemory((record(),)), max_tokens=20).make(record(), np.random.default_rng())


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
    sayings = [r for r in counts if "objects in all" in r.turns[0].text]
    assert sayings
    assert all(f"There are {r.turns[1].text} objects" in r.turns[0].text for r in sayings)
    colours = [r for r in told if r.extra["kind"] == "colour"]
    assert all(r.turns[1].text in r.turns[0].text for r in colours)
    assert set(CHANCE) == set(QUESTIONS)
    ground = SceneDialogues(count=3, kinds=("ground",))[1]
    numbers = np.array(json.loads(ground.turns[1].text))
    np.testing.assert_allclose(64 * numbers, ground.extra["box"], atol=0.33)


def test_scene_sources_mix_and_refuse_what_they_cannot_ask() -> None:
    mixed = Mixture((SceneTexts(count=50), SceneDialogues(count=50, told=True)), (1, 1))
    made = pipeline(mixed, max_images=0, image_tokens=0, max_tokens=160)
    batch = next(iter(made.batches(global_batch=8, seed=0))).arrays
    assert set(batch) == {"ids", "labels", "valid"}
    with pytest.raises(ValueError, match="no boxes"):
        SceneDialogues(told=True, kinds=("ground",))
    with pytest.raises(ValueError, match="expected some of"):
        SceneDialogues(kinds=("taste",))
