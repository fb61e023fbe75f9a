"""Templates, tokens, label masks and splicing."""

from __future__ import annotations

import dataclasses
import functools
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipelines.conversation import (
    IGNORE,
    IMAGE,
    ChatTokenizer,
    Llama3,
    Plain,
    Template,
    Turn,
    Vicuna,
    bucket,
    load_chat_tokenizer,
    splice,
)
from data_pipelines.conversation.llava_json import _turn

GOLDEN = Path(__file__).parents[1] / "goldens" / "lmmdet" / "text"


@pytest.fixture(scope="module")
def vicuna() -> ChatTokenizer:
    return ChatTokenizer.from_folder(GOLDEN)


@pytest.fixture(scope="module")
def scene() -> ChatTokenizer:
    return load_chat_tokenizer("scene")


@functools.cache
def golden() -> dict[str, Any]:
    return json.loads((GOLDEN / "text.json").read_text("utf-8"))


def test_vicuna_prompts_are_the_official_ones(vicuna: ChatTokenizer) -> None:
    for row in golden()["prompts"]:
        question = row["prompt"].split("USER: ")[1].removesuffix(" ASSISTANT:")
        turns = (Turn("user", question),)
        assert Vicuna().text(turns, prompt=True) == row["prompt"]
        assert list(Vicuna().encode(turns, vicuna, prompt=True).ids) == row["input_ids"]


def test_vicuna_learns_what_the_official_mask_keeps(vicuna: ChatTokenizer) -> None:
    for row in golden()["sft"]:
        turns = tuple(_turn(t) for t in row["conversations"])
        encoded = Vicuna().encode(turns, vicuna)
        assert list(encoded.ids) == row["input_ids"]
        assert list(encoded.labels) == row["labels"]


def test_plain_learns_the_caption(vicuna: ChatTokenizer) -> None:
    for row in golden()["plain"]:
        turns = (Turn("user", "<image>"), Turn("assistant", row["caption"]))
        encoded = Plain().encode(turns, vicuna)
        assert list(encoded.ids) == row["input_ids"]
        assert list(encoded.labels) == row["labels"]


def test_llama3_learns_answers_and_their_ends(scene: ChatTokenizer) -> None:
    turns = (
        Turn("user", "What is it? <image>"),
        Turn("assistant", " a ball "),
        Turn("user", "Red?"),
        Turn("assistant", "yes"),
    )
    encoded = Llama3().encode(turns, scene)
    assert encoded.images == 1
    learnt = [label for label in encoded.labels if label != IGNORE]
    assert scene.decode(learnt, skip_special=False) == "a ball<|eot_id|>yes<|eot_id|>"
    shown = [
        i if i != IMAGE else scene.token_id("<|reserved_special_token_44|>") for i in encoded.ids
    ]
    assert scene.decode(shown, skip_special=False) == Llama3().text(turns)
    assert "<|reserved_special_token_44|>\nWhat is it?<|eot_id|>" in Llama3().text(turns)
    # A prompt and the training text share their beginning, token for token.
    prompt = Llama3().encode(turns[:3], scene, prompt=True)
    assert prompt.ids == encoded.ids[: len(prompt.ids)]


@pytest.mark.parametrize("template", [Llama3(system=""), Vicuna(), Plain()])
def test_what_is_given_of_an_answer_is_read_but_not_learnt(
    template: Template, scene: ChatTokenizer, vicuna: ChatTokenizer
) -> None:
    tokenizer = scene if isinstance(template, Llama3) else vicuna
    whole = (Turn("user", "<image>\nWhich?"), Turn("assistant", "red C2, blue F4: red"))
    given = (whole[0], dataclasses.replace(whole[1], given=len("red C2, blue F4:")))
    all_of_it, rest = template.encode(whole, tokenizer), template.encode(given, tokenizer)
    assert rest.ids == all_of_it.ids
    learnt = [label for label in rest.labels if label != IGNORE]
    assert [label for label in all_of_it.labels if label != IGNORE][-len(learnt) :] == learnt
    assert tokenizer.decode(learnt).strip() == "red"
    # Asked with what is given, a model goes on where the training text does.
    prompt = template.encode(whole[:1], tokenizer, prompt=True, begun="red C2, blue F4:")
    assert prompt.ids == rest.ids[: rest.labels.index(learnt[0])]
    with pytest.raises(ValueError, match="begun='red'; set prompt=True"):
        template.encode(whole[:1], tokenizer, begun="red")


@pytest.mark.parametrize(("text", "given"), [("red", 4), ("red", -1), (" red", 2)])
def test_what_cannot_be_given(text: str, given: int) -> None:
    with pytest.raises(ValueError, match=rf"Turn\.given: expected 0 to {len(text)} .* {given} of"):
        Turn("assistant", text, given)


def test_only_the_placeholder_is_a_picture(scene: ChatTokenizer) -> None:
    """The reserved token typed by a user stays a token, as officially after the first."""
    turns = (Turn("user", "<image>\nWhat does <|reserved_special_token_44|> mean?"),)
    encoded = Llama3().encode(turns, scene, prompt=True)
    assert encoded.images == 1
    assert encoded.ids.count(scene.token_id("<|reserved_special_token_44|>")) == 1


@pytest.mark.parametrize(("template", "token"), [(Vicuna(), "<s>, </s>"), (Plain(), "<s>")])
def test_a_tokenizer_without_the_special_tokens(
    scene: ChatTokenizer, template: Template, token: str
) -> None:
    with pytest.raises(ValueError, match=rf"tokenizer.json: .* lacks {token}"):
        template.encode((Turn("user", "hello"),), scene)


def test_tokenizer_folders(tmp_path: Path, scene: ChatTokenizer) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected tokenizer\.json"):
        ChatTokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        ChatTokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(scene.files()["tokenizer.json"])
    again = pickle.loads(pickle.dumps(ChatTokenizer.from_folder(tmp_path)))
    text = "a red ball at [0.12, 0.98] ümlaut 球"
    assert again.tokens(text) == scene.tokens(text)
    assert again.decode(again.tokens(text)) == text


def test_splice_expands_pictures() -> None:
    row = splice([5, IMAGE, 6, IMAGE, 7], [IGNORE, IGNORE, 6, IGNORE, 7], 3, 10, pad_id=9)
    np.testing.assert_array_equal(row.ids, [5, 9, 9, 9, 6, 9, 9, 9, 7, 9])
    np.testing.assert_array_equal(row.slot, [-1, 0, 1, 2, -1, 3, 4, 5, -1, -1])
    np.testing.assert_array_equal(
        row.labels, [-100, -100, -100, -100, 6, -100, -100, -100, 7, -100]
    )
    np.testing.assert_array_equal(row.valid, [True] * 9 + [False])
    assert row.length == 9
    with pytest.raises(ValueError, match="row 3: expected at most 8 positions, found 9"):
        splice([5, IMAGE, 6, IMAGE, 7], None, 3, 8, what="row 3")


def test_text_alone_has_no_slots() -> None:
    row = splice([1, 2], None, 576, 4)
    assert row.length == 2
    assert (row.slot == -1).all()
    assert (row.labels == IGNORE).all()


def test_buckets() -> None:
    assert [bucket(n, 8) for n in (0, 1, 8, 9)] == [8, 8, 8, 16]
