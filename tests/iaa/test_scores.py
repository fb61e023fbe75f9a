"""Counting rules and readers of REC and MME, and protocols run on a made-up model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipelines.batch import DataError
from data_pipelines.conversation import ConversationRecord, Framing, Llama3, Turn
from data_pipelines.conversation.scenes import SceneDialogues
from data_pipelines.protocols.answers import ChatReading, read_answer, row_of
from data_pipelines.protocols.mme import Mme, MmeQuestions
from data_pipelines.protocols.mme_scores import ground_truth_key, score_task
from data_pipelines.protocols.questions import Questions
from data_pipelines.protocols.referring import RefCoco, Referring
from data_pipelines.protocols.referring_boxes import hits, read_numbers
from data_pipelines.records import BadRecordError

READING = ChatReading(
    template=Llama3(system=""),
    framing=Framing(64),
    image_tokens=4,
    prompt_tokens=96,
    batch_size=8,
)
BOX = (10.0, 20.0, 30.0, 60.0)  # of a picture of 100 x 100


@pytest.mark.parametrize(
    ("answer", "hit"),
    [
        ("[0.1, 0.2, 0.3, 0.6]", True),
        ("0.1, 0.2, 0.3, 0.6", True),  # a tuple
        ("  (0.1, .2, 3e-1, 0.6, 7)", True),  # blanks before it, a number too many
        ("[0.1, 1/5, 0.3, 0.5 + 0.1]", True),
        ("{0: 0.1, 1: 0.2, 2: 0.3, 3: 0.6}", True),
        ("[0, 0, 0.01, 0.01]; [0.1, 0.2, 0.3, 0.6]", True),
        ("[0.1, 0.2, 0.3, 0.6]; what", True),  # after a hit nothing is read
        ("what; [0.1, 0.2, 0.3, 0.6]", False),
        ("[0, 0, 0.01, 0.01];[0.1, 0.2, 0.3, 0.6]", False),
        ("[0.1, 0.2, 0.3, 0.6]\n", True),
        ("\n[0.1, 0.2, 0.3, 0.6]", True),
        ("[0.1, 0.2, 0.3]", False),
        ("[0.1, 0.2, 0.3, 0.6", False),
        ("['0.1', 0.2, 0.3, 0.6]", False),
        ("[0.1, 0.2, 0.3, 0.6j]", False),
        ("[[0.1], 0.2, 0.3, 0.6]", False),
        ("[nan, 0.2, 0.3, 0.6]", False),
        ("[1/0, 0.2, 0.3, 0.6]", False),
        ("0.5", False),
        ("", False),
        ("The box is [0.1, 0.2, 0.3, 0.6]", False),
        ("[" * 5000, False),
        ("__import__('os').getcwd()", False),
    ],
)
def test_which_answers_count(answer: str, hit: bool) -> None:
    assert hits(answer, BOX, 100, 100) is hit


@pytest.mark.parametrize(
    "text",
    ["[1, 2, 3, 4]", "1, 2, 3, -4", "[0x10, 1_0, True, +2]", "(7 // 2, 7 % 4, 1 - 3, 2 * 3)"],
)
def test_numbers_are_those_of_python(text: str) -> None:
    assert read_numbers(text) == tuple(eval(text))  # what the official script does


def test_boxes_are_mapped_back_from_the_padded_square() -> None:
    assert hits("[0.25, 0.5, 0.75, 1.0]", (0, 50, 50, 100), 50, 100)
    assert not hits("[0.25, 0.5, 0.75, 1.0]", (25, 50, 75, 100), 100, 160)


def test_mme_scores_pairs() -> None:
    rows = [("Yes", "Yes"), ("No", "No"), ("Yes", "no"), ("No", "No."), ("Yes", "?"), ("No", "no")]
    score = score_task(rows)
    assert (score.accuracy, score.both, score.other) == (4 / 6, 1 / 3, 1 / 6)
    assert score.score == pytest.approx(100)
    with pytest.raises(ValueError, match="two questions for each picture"):
        score_task(rows[:3])
    with pytest.raises(ValueError, match="found 'maybe'"):
        score_task([("maybe", "no"), ("no", "no")])


def test_mme_questions_find_their_ground_truth() -> None:
    ask = "\nAnswer the question using a single word or phrase."
    one, two = "Is it? Please answer yes or no.", "Was it?  Please answer yes or no."
    known = {one: "Yes", two: "No"}
    assert ground_truth_key("Is it?" + ask, known) == one
    assert ground_truth_key("Was it?" + ask, known) == two
    assert ground_truth_key(one + ask, known) == one
    assert ground_truth_key("Will it?" + ask, known) is None


def oracle(records: dict[bytes, str]) -> Callable[..., np.ndarray]:
    """A model that knows the answers by heart: ids of a prompt to ids of an answer."""
    tokenizer = READING.text_tokenizer

    def sample(
        image: np.ndarray, ids: np.ndarray, slot: np.ndarray, length: np.ndarray
    ) -> np.ndarray:
        out = np.full((len(ids), 40), tokenizer.token_id("<|end_of_text|>"), np.int32)
        for row, *prompt in zip(out, image, ids, strict=True):
            answer = tokenizer.tokens(records.get(key(prompt), "") + "<|eot_id|> more")
            row[: len(answer)] = answer
        assert image.shape[1:] == (1, 64, 64, 3)
        assert (slot >= 0).sum(axis=1).tolist() == [4] * len(ids)
        assert length.max() <= ids.shape[1]
        return out

    return sample


def key(row: Sequence[np.ndarray]) -> bytes:
    """Picture and ids of a prompt."""
    return row[0].tobytes() + row[1].tobytes()


def known(source: Any, count: int) -> dict[bytes, str]:
    """The recorded answers of the first records."""
    records = [source[i] for i in range(count)]
    return {key(row_of(r, READING)): r.turns[-1].text for r in records}


def test_questions_protocol() -> None:
    source = SceneDialogues(count=20, kinds=("colour", "count"))
    protocol = Questions(source, READING, limit=19)
    result = protocol.run({"sample_mm": oracle(known(source, 20))}, panels=True)
    assert result.metrics["accuracy"].value == 1
    assert 0 < result.metrics["accuracy/colour"].chance < 1
    assert result.records == 19
    assert result.panels[0].png
    assert protocol.run({"sample_mm": oracle({})}).metrics["accuracy"].value == 0
    blind = Questions(source, dataclasses.replace(READING, blind=True))
    assert blind.name == "scenes_questions_blind"
    assert (row_of(source[0], blind.reading)[0] == 127).all()
    with pytest.raises(ValueError, match="missing sample_mm"):
        protocol.run({})


def test_questions_tell_seeing_from_binding() -> None:
    """Answers that always name a colour of the picture, and only sometimes the right one."""
    source = SceneDialogues(count=60, kinds=("colour",), objects=(2, 3))
    others = {}
    for record in (source[i] for i in range(60)):
        truth, seen = record.turns[-1].text, record.extra["seen"]
        assert truth in seen
        # The truth for every second record, and the first colour of the picture for the rest.
        answer = truth if len(others) % 2 else seen[0]
        others[key(row_of(record, READING))] = f"{answer.capitalize()}."
    result = Questions(source, READING).run({"sample_mm": oracle(others)})
    assert result.metrics["seen/colour"].value == 1
    assert 0.5 <= result.metrics["accuracy"].value < 1
    sizes = [len(source[i].extra["seen"]) for i in range(60)]
    assert set(sizes) <= {1, 2, 3}
    guessed = result.settings["guessing among what is seen"]
    # Means of 60 float64 numbers up to one: each addition rounds by 1e-16 of the sum.
    np.testing.assert_allclose(guessed["colour"], np.mean([1 / n for n in sizes]), rtol=1e-12)
    nothing = Questions(source, READING).run({"sample_mm": oracle({})})
    assert nothing.metrics["seen/colour"].value == 0


def test_what_is_given_of_an_answer_is_asked_with_the_question() -> None:
    source = SceneDialogues(count=8, kinds=("size",), places=True, given=True, objects=(1, 1))
    for record in (source[i] for i in range(8)):
        row = row_of(record, READING)
        written = READING.text_tokenizer.decode(row[1][: int(row[3])])
        assert written.endswith(record.turns[-1].text.rpartition(" ")[0])


def test_what_follows_the_colon_is_the_answer() -> None:
    source = SceneDialogues(count=8, kinds=("size",), places=True, objects=(1, 1))
    prompts = [key(row_of(source[i], READING)) for i in range(8)]
    truths = [source[i].turns[-1].text for i in range(8)]
    assert all(": " in truth for truth in truths)
    said = {p: f"pink A1: {t.rpartition(' ')[2]}" for p, t in zip(prompts, truths, strict=True)}
    assert (
        Questions(source, READING).run({"sample_mm": oracle(said)}).metrics["accuracy"].value == 1
    )
    places = {p: t.partition(":")[0] for p, t in zip(prompts, truths, strict=True)}
    assert (
        Questions(source, READING).run({"sample_mm": oracle(places)}).metrics["accuracy"].value == 0
    )


def test_questions_of_a_model_without_eyes() -> None:
    source = SceneDialogues(count=6, told=True)
    reading = dataclasses.replace(READING, image_tokens=0, max_images=0, prompt_tokens=200)
    tokenizer = reading.text_tokenizer
    asked = []

    def sample_text(ids: np.ndarray, length: np.ndarray) -> np.ndarray:
        asked.append(
            [tokenizer.decode(row[:n].tolist()) for row, n in zip(ids, length, strict=True)]
        )
        right = [tokenizer.tokens(source[i].turns[-1].text + "<|eot_id|>") for i in range(len(ids))]
        return np.array([(*answer, *[0] * (20 - len(answer))) for answer in right])

    protocol = Questions(source, reading, function="sample_text", label="told")
    assert protocol.run({"sample_text": sample_text}).metrics["accuracy"].value == 1
    for record, text in zip(source, asked[0], strict=False):
        assert record.turns[0].text in text


def write_rec(folder: Path) -> RefCoco:
    Image.fromarray(np.zeros((60, 40, 3), np.uint8)).save(folder / "a.png")
    row = {"img_path": "a.png", "expression": "the lady", "sent_id": 5, "bbox": [10, 10, 30, 30],
           "height": 60, "width": 40}  # fmt: skip
    rows = [row, {**row, "sent_id": 6, "img_path": "b.png"}, {**row, "bbox": [1, 2]}]
    (folder / "REC.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return RefCoco(str(folder / "REC.jsonl"), str(folder))


def test_referring_protocol(tmp_path: Path) -> None:
    source = write_rec(tmp_path)
    assert source[0].turns[0].text.endswith("this sentence describes: the lady")
    prompt = key(row_of(source[0], READING))
    right = oracle({prompt: "[0.33, 0.17, 0.67, 0.5]"})
    result = Referring(source, READING, label="refcoco_val").run({"sample_g": right}, panels=True)
    assert result.metrics["precision_50"].value == 1
    assert result.metrics["precision_50"].published == 0.902
    assert result.counts["records_dropped_missing_file"] == 1
    assert result.counts["records_dropped_malformed_record"] == 1
    assert result.panels[0].png
    with pytest.raises(DataError, match="no such file"):
        len(RefCoco(str(tmp_path / "none.jsonl"), ""))


def test_mme_protocol(tmp_path: Path) -> None:
    questions = []
    for task, folder in (("count", "count/questions_answers_YN"), ("OCR", "OCR")):
        (tmp_path / folder).mkdir(parents=True)
        for file in ("1", "2"):
            lines = [
                f"Is it {file}{n}? Please answer yes or no.\t{a}"
                for n, a in ((0, "Yes"), (1, "No"))
            ]
            (tmp_path / folder / f"{file}.txt").write_text("\n".join(lines) + "\n")
            Image.fromarray(np.zeros((8, 9, 3), np.uint8)).save(tmp_path / task / f"{file}.png")
            questions += [
                {"question_id": f"{task}/{file}.png", "image": f"{task}/{file}.png",
                 "text": f"Is it {file}{n}?\nAnswer the question using a single word or phrase."}
                for n in (0, 1)
            ]  # fmt: skip
    questions += [{"question_id": "OCR/2.png", "image": "OCR/2.png", "text": "What?"}]
    questions += [{"question_id": "OCR/9.png", "image": "OCR/9.png", "text": "What?"}]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, questions)))
    source = MmeQuestions(str(tmp_path), str(tmp_path / "q.jsonl"))
    answers = known(source, 8)
    result = Mme(source, READING).run({"sample_mm": oracle(answers)})
    assert result.metrics["score/count"].value == 200
    assert result.metrics["score/OCR"].value == 200
    assert "perception" not in result.metrics  # tasks are missing
    assert result.counts["records_dropped_unknown_question"] == 1
    assert result.counts["records_dropped_missing_file"] == 1


def test_prompts_that_cannot_be_asked() -> None:
    picture = np.zeros((8, 8, 3), np.uint8)
    record = ConversationRecord("a", (Turn("user", "<image>\nWhat?"),), (picture,))
    assert len(row_of(record, READING)) == 4
    for changes, reason in (
        ({"images": ()}, "image_count"),
        ({"images": (picture, picture)}, "image_count"),
        ({"turns": (Turn("user", "<image>\n" + "word " * 200),)}, "prompt_too_long.*at most 99"),
    ):
        with pytest.raises(BadRecordError, match=reason):
            row_of(dataclasses.replace(record, **changes), READING)


def test_answers_end_at_the_stop_token() -> None:
    tokenizer, template = READING.text_tokenizer, READING.template
    ids = tokenizer.tokens(" yes <|eot_id|> no")
    assert read_answer(ids, tokenizer, template) == "yes"
    assert read_answer(tokenizer.tokens("yes no"), tokenizer, template) == "yes no"
