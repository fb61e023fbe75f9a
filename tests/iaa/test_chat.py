"""Talking to a model: single questions, boxes, conversations of several workflows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from configs import iaa as recipes
from data_pipelines.conversation.records import ConversationRecord, Turn
from data_pipelines.conversation.scenes import SceneDialogues
from data_pipelines.samplers.base import Request
from data_pipelines.samplers.chat import ChatSampler, draw_boxes
from jaxmods.partitioning import unbox
from jaxmods.systems.iaa import Iaa

SYSTEM = dataclasses.replace(
    recipes.TINY,
    llama=dataclasses.replace(recipes.TINY_LLAMA, layers=1, width=32, heads=1, kv_heads=1, mlp=32),
    vision=dataclasses.replace(recipes.TINY.vision, width=16, layers=2, heads=1, mlp=16),
    insert_after=(0,),
    prompt_tokens=128,
    new_tokens=6,
)
READING = recipes.reading(SYSTEM, tokenizer="scene", template=recipes.SHORT)
SAMPLER = ChatSampler(
    READING,
    SceneDialogues(count=4, kinds=("colour", "ground")),
    workflows=(("MM", "mm"), ("G", "mm"), ("Text", "text")),
    new_tokens=SYSTEM.new_tokens,
)

Functions = dict[str, Callable[..., Any]]


@pytest.fixture(scope="module")
def functions() -> Functions:
    params = unbox(jax.jit(SYSTEM.init)(jax.random.key(3)))
    params = jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, params)

    def bound(function: Callable[..., Any]) -> Callable[..., Any]:
        jitted = jax.jit(function)
        return lambda *arrays: jitted(params, *arrays)

    return {name: bound(function) for name, function in SYSTEM.functions().items()}


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "a.png"
    noise = np.random.default_rng(0).integers(0, 255, (40, 64, 3)).astype(np.uint8)
    Image.fromarray(noise).save(path)
    return path


def request(**inputs: Any) -> Request:
    return Request("a", 0, 0, {name: (value,) for name, value in inputs.items()})


def made(functions: Functions, asked: Request) -> dict[str, Any]:
    call = SAMPLER.call(asked)
    shapes = [(a.shape, a.dtype.name) for a in call.arrays]
    specs = SYSTEM.function_inputs(1)[call.function].values()
    assert shapes == [(s.shape[1:], s.dtype) for s in specs]
    row = np.asarray(functions[call.function](*(a[None] for a in call.arrays)))[0]
    return dict(SAMPLER.finish(asked, call, row).facts)


def test_streamed_answers_are_the_generated_ones(functions: Functions, photo: Path) -> None:
    """Whatever workflow a turn goes to, and after other turns as well."""
    chat = SAMPLER.conversation(functions)
    assert chat is not None
    first = "".join(chat.say("What is it?", {"image": (photo,)}))
    assert first.strip() == made(functions, request(image=photo, prompt="What is it?"))["answer"]
    said = "".join(chat.say("/text And why?", {}))
    history = (
        Turn("user", "What is it?"),
        Turn("assistant", first.strip()),
        Turn("user", "And why?"),
    )
    alone = ConversationRecord("t", history, extra={"task": "Text"})
    assert said.strip() == made(functions, dataclasses.replace(request(), record=alone))["answer"]
    assert isinstance("".join(chat.say("/ground it", {})), str)
    with pytest.raises(ValueError, match="one picture in a conversation"):
        list(chat.say("And this?", {"image": (photo,)}))
    with pytest.raises(ValueError, match="expected at most 191 positions"):
        list(chat.say("word " * 200, {}))
    with pytest.raises(ValueError, match="empty message"):
        list(chat.say("  ", {}))


def test_a_conversation_without_a_picture_is_text(functions: Functions) -> None:
    chat = SAMPLER.conversation(functions)
    assert chat is not None
    answer = "".join(chat.say("Hello?", {})).strip()
    assert answer == made(functions, request(prompt="Hello?"))["answer"]
    with pytest.raises(ValueError, match="/ground: expected a picture"):
        list(chat.say("/ground the ball", {}))


def test_boxes_are_given_in_pixels_and_drawn(photo: Path) -> None:
    asked = request(image=photo, expression="the ball")
    call = SAMPLER.call(asked)
    assert call.function == "sample_mm"
    tokens = READING.text_tokenizer.tokens("[0.25, 0.50, 0.50, 0.75]<|eot_id|>")
    result = SAMPLER.finish(asked, call, np.asarray(tokens))
    assert result.facts["boxes"] == [[16.0, 20.0, 32.0, 36.0]]  # 64 x 40, 12 px of border above
    assert result.picture is not None
    assert result.picture.shape == (40, 64, 3)
    assert (result.picture[20, 16:32] == (230, 30, 30)).all()
    assert SAMPLER.sheet([result])
    np.testing.assert_array_equal(draw_boxes(photo, []), np.asarray(Image.open(photo)))


def test_records_of_the_evaluation_data(functions: Functions) -> None:
    assert SAMPLER.count() == 4
    facts = [made(functions, SAMPLER.example(i, 0)) for i in range(4)]
    assert all(f["question"] and "<image>" not in f["question"] for f in facts)
    assert set(SAMPLER.requires()) <= set(functions)
    SAMPLER.check()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "either prompt or expression"),
        ({"prompt": "a", "expression": "b"}, "either prompt or expression"),
        ({"expression": "b"}, "expected a picture"),
    ],
)
def test_inputs_that_do_not_go_together(inputs: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SAMPLER.call(request(**inputs))


def test_a_workflow_that_the_model_lacks() -> None:
    with pytest.raises(ValueError, match="workflow Text: expected one of MM"):
        dataclasses.replace(SAMPLER, workflows=(("MM", "mm"),)).suffix("Text")


def test_published_recipe_offers_what_its_sampler_needs() -> None:
    recipe = recipes.iaa_14()
    assert recipe.sampler is not None
    assert isinstance(recipe.system, Iaa)
    assert set(recipe.sampler.requires()) <= set(recipe.system.functions())
