"""Several conversations in a row, and rows over a mesh: the same step as one by one on one device.

The three steps that are compared are compiled once each.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.iaa import pipeline
from data_pipelines.conversation import ConversationPipeline, ConversationRecord, Llama3, Turn
from data_pipelines.sources.base import InMemory
from jaxmods.backbones.clip import VisionConfig
from jaxmods.backbones.llama import LlamaConfig
from jaxmods.partitioning import (
    MeshShape,
    logical_axes,
    make_mesh,
    sharding_for,
    tree_shardings,
    unbox,
    use_mesh,
)
from jaxmods.systems.iaa import Iaa
from train.recipes import resolve

LLAMA = LlamaConfig(
    vocab_size=768, width=16, layers=2, heads=4, kv_heads=2, head_dim=4, mlp=24, bos_id=0,
    eos_ids=(1,),
)  # fmt: skip
ALONE = Iaa(
    llama=LLAMA,
    vision=VisionConfig(width=12, layers=1, heads=2, mlp=16, image_size=16, patch_size=8),
    select_layer=-1,
    insert_after=(0, 1),
    branches=("MM",),
    max_tokens=56,
)
PACKED = dataclasses.replace(ALONE, pack=3, max_tokens=140)


def records() -> tuple[ConversationRecord, ...]:
    """With and without a picture, of one and of two rounds."""
    rng = np.random.default_rng(0)
    found = []
    for number, (asked, said) in enumerate(
        (("What colour is the ball?", "red"), ("How many objects are there?", "three of them"),
         ("Is there a blue cube?", "no"), ("Hello", "Hi"))
    ):  # fmt: skip
        mark, images = "", ()
        if number % 2 == 0:
            mark, images = "<image>\n", (rng.integers(0, 255, (16, 16, 3)).astype(np.uint8),)
        turns = (Turn("user", mark + asked), Turn("assistant", said))
        if number == 1:
            turns = (*turns, Turn("user", "Sure?"), Turn("assistant", "yes"))
        found.append(ConversationRecord(str(number), turns, images))
    return tuple(found)


def batch_of(system: Iaa, rows: int) -> dict[str, np.ndarray]:
    data = pipeline(system, InMemory(records()), tokenizer="scene", template=Llama3(system=""))
    batch = next(iter(data.batches(global_batch=rows, seed=3)))
    assert batch.info.cut == {}
    spec = system.batch_spec(rows)
    assert {k: (v.shape, str(v.dtype)) for k, v in batch.arrays.items()} == {
        k: (s.shape, s.dtype) for k, s in spec.items()
    }
    return batch.arrays


@functools.cache
def params_of(system: Iaa) -> Any:
    tree = unbox(jax.jit(system.init)(jax.random.key(0)))
    # Large enough that every part matters; with 5 the last bit of the parameters, up or down, moves
    # gradients by up to 8e-5 of the largest, and rounding could not be told from a leak.
    return jax.tree.map(lambda x: 3 * x if x.ndim > 1 else x, tree)


def step(system: Iaa, batch: dict[str, np.ndarray], mesh_shape: MeshShape | None = None) -> Any:
    """(loss, learnt tokens), and gradients of everything, laid out by their logical axes."""
    params, layout = params_of(ALONE), {}
    mesh = None
    if mesh_shape is not None:
        mesh = make_mesh(mesh_shape)
        abstract = jax.eval_shape(system.init, jax.random.key(0))
        placed = tree_shardings(unbox(abstract), logical_axes(abstract), mesh)
        spec = system.batch_spec(len(batch["ids"]))
        of_batch = {k: sharding_for(s.shape, s.axes, mesh) for k, s in spec.items()}
        params, batch = jax.device_put(params, placed), jax.device_put(batch, of_batch)
        layout = {"in_shardings": (placed, of_batch), "out_shardings": (None, placed)}

    def loss(params: Any, batch: Any) -> Any:
        def run() -> Any:
            return system.loss(params, {}, batch, jax.random.key(0), jnp.int32(0))

        if mesh is None:
            out = run()
        else:
            with use_mesh(mesh):
                out = run()
        return out.loss, out.metrics["tokens"]

    return jax.jit(jax.value_and_grad(loss, has_aux=True), **layout)(params, batch)


@functools.cache
def one_by_one() -> Any:
    return step(ALONE, batch_of(ALONE, 12))


def assert_same(found: Any, expected: Any) -> None:
    """float32: sums over other lengths and devices, relative to the largest of each gradient, or
    to the largest of all where it is zero by theory (biases of CLIP's keys)."""
    (loss, tokens), grads = found
    (wanted, count), wanted_grads = expected
    assert float(tokens) == float(count)
    np.testing.assert_allclose(loss, wanted, rtol=2e-6)
    largest = max(float(np.abs(b).max()) for b in jax.tree.leaves(wanted_grads))
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(wanted_grads), strict=True
    ):
        scale = np.abs(b).max()
        # float32 sums in another order; the second term is for gradients that are zero by theory.
        np.testing.assert_allclose(
            a, b, atol=2e-5 * scale + 1e-7 * largest, rtol=0, err_msg=jax.tree_util.keystr(path)
        )
    assert all(float(np.abs(b).max()) > 0 for b in jax.tree.leaves(wanted_grads["MM"]))


def test_packed_rows_have_the_loss_and_gradients_of_their_conversations() -> None:
    batch = batch_of(PACKED, 4)
    assert batch["segments"].max() == 3
    assert (batch["slot"] >= 0).sum() == (batch_of(ALONE, 12)["slot"] >= 0).sum()
    assert_same(step(PACKED, batch), one_by_one())


def test_packed_rows_over_a_mesh() -> None:
    assert jax.device_count() == 8
    found = step(PACKED, batch_of(PACKED, 4), MeshShape(data=2, fsdp=2, tensor=2))
    assert_same(found, one_by_one())


def test_texts_alone_are_packed_too() -> None:
    """The language model itself, without pictures: states of every token."""
    text = dataclasses.replace(
        ALONE, vision=None, insert_after=(), branches=(), branch="Text", trains=("base",)
    )
    packed = dataclasses.replace(text, pack=2, max_tokens=112)
    source = InMemory(records()[1::2])

    def batch(system: Iaa, rows: int) -> dict[str, np.ndarray]:
        data = pipeline(system, source, tokenizer="scene", template=Llama3(system=""))
        return next(iter(data.batches(global_batch=rows, seed=3))).arrays

    params = {"base": params_of(ALONE)["base"]}
    losses = [
        jax.jit(lambda p, b, s=s: s.loss(p, {}, b, jax.random.key(0), jnp.int32(0)).loss)(
            params, batch(s, rows)
        )
        for s, rows in ((text, 4), (packed, 2))
    ]
    np.testing.assert_allclose(losses[1], losses[0], rtol=2e-6)  # float32 sums, other lengths


def test_one_setting_packs_a_published_stage() -> None:
    experiment = resolve("iaa/instruct", ["pack=4", "batch_size=32"]).experiment
    spec = experiment.system.batch_spec(32)
    data = experiment.data
    assert isinstance(data, ConversationPipeline)
    assert spec["segments"].shape == (32, data.length) == (32, 2048 + 4 * 575)
    assert spec["image"].shape == (32, data.row_images, 336, 336, 3)
    prompt = experiment.system.function_inputs(2)["sample_mm"]
    assert prompt["image"].shape[1] == 1  # prompts are never packed


@pytest.mark.parametrize("pack", [0, 57])
def test_a_pack_that_cannot_be(pack: int) -> None:
    with pytest.raises(ValueError, match=r"pack: expected 1 to max_tokens=56"):
        dataclasses.replace(ALONE, pack=pack)
