"""Saving and restoring: other device counts, damaged files, other models, parameters alone."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxmods.partitioning import MeshShape, make_mesh
from tests.train.toy import Regression, regression
from train import checkpoint
from train.checkpoint import (
    Checkpoints,
    digests,
    is_params_folder,
    load_params,
    load_run_params,
    read_facts,
    save_params,
)
from train.exits import UserError
from train.experiment import Checkpointing, Experiment
from train.metrics import Window
from train.state import Plan, TrainState, init_state, make_plan

POLICY = Checkpointing(keep=3)


def plan_on(count: int, experiment: Experiment | None = None, **axes: int) -> Plan:
    mesh = make_mesh(MeshShape(**axes), jax.devices()[:count])
    return make_plan(experiment or regression(), mesh)


def at_step(state: TrainState, step: int) -> TrainState:
    """The state with another number and other values."""
    moved = jax.tree.map(lambda x: x + step if x.dtype == jnp.float32 else x, state)
    return dataclasses.replace(
        moved, step=jax.device_put(jnp.int32(step), state.step.sharding), frozen=state.frozen
    )


def same(a: TrainState, b: TrainState) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
        assert x.dtype == y.dtype


def test_eight_devices_to_one_to_four(tmp_path: Path) -> None:
    eight = plan_on(8, data=2, fsdp=2, tensor=2)
    saved = at_step(init_state(eight), 7)
    first = Checkpoints(tmp_path, POLICY)
    first.begin(saved)
    first.save(saved, {"note": [1, 2.5, "x"]})
    first.close()
    for count, axes in ((1, {}), (4, {"fsdp": 4})):
        plan = plan_on(count, **axes)
        folder = Checkpoints(tmp_path, POLICY)
        restored = folder.restore(plan)
        folder.close()
        assert restored is not None
        assert (restored.step, restored.info, restored.skipped) == (7, {"note": [1, 2.5, "x"]}, ())
        same(saved, restored.state)
        for leaf, sharding in zip(
            jax.tree.leaves(restored.state), jax.tree.leaves(plan.shardings), strict=True
        ):
            assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    params, step = load_run_params(tmp_path, plan_on(1))
    assert step == 7
    for x, y in zip(jax.tree.leaves(saved.averaged), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    plan = plan_on(1, dataclasses.replace(regression(), system=Regression(width=3000)))
    start = init_state(plan)
    checkpoints = Checkpoints(tmp_path, POLICY)
    checkpoints.begin(start)
    for step in (3, 6):
        checkpoints.save(at_step(start, step), {"at": step})
    checkpoints.close()
    data = [p for p in (tmp_path / "checkpoints/6/trained").rglob("*") if p.is_file()]
    largest = max(data, key=lambda p: p.stat().st_size)
    if damage == "truncate":
        largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    elif damage == "flip":
        content = bytearray(largest.read_bytes())
        content[len(content) // 2] ^= 16
        largest.write_bytes(content)
    else:
        largest.unlink()

    checkpoints = Checkpoints(tmp_path, POLICY)
    with caplog.at_level(logging.WARNING, "train"):
        restored = checkpoints.restore(plan)
    assert restored is not None
    assert (restored.step, restored.info, restored.skipped) == (3, {"at": 3}, (6,))
    same(at_step(start, 3), restored.state)
    assert "checkpoint 6 cannot be read" in caplog.text
    checkpoints.set_aside(restored.skipped)
    assert (tmp_path / "checkpoints/unreadable-6").is_dir()
    checkpoints.save(at_step(start, 6), {"at": 6})
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path, POLICY)
    again = checkpoints.restore(plan)
    checkpoints.close()
    assert again is not None
    assert (again.step, again.skipped) == (6, ())


def test_keeps_newest_periodic_and_best(tmp_path: Path) -> None:
    plan = plan_on(1)
    start = init_state(plan)
    policy = Checkpointing(keep=1, keep_period=4, keep_best="p/m", best="min")
    checkpoints = Checkpoints(tmp_path, policy)
    for step, value in ((1, 0.5), (2, 0.1), (3, 0.3), (4, 0.4), (5, None), (6, 0.2)):
        checkpoints.save(at_step(start, step), {}, None if value is None else {"p/m": value})
    checkpoints.wait()
    assert checkpoints.steps() == [2, 4, 6]
    checkpoints.close()


def test_a_checkpoint_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, POLICY)
    state = at_step(init_state(plan_on(1)), 2)
    checkpoints.begin(state)
    checkpoints.save(state, {})
    wider = dataclasses.replace(regression(), system=Regression(width=32))
    with pytest.raises(
        UserError, match=r"checkpoint 2.*hidden/bias: expected \(32,\), found \(16,\)"
    ):
        checkpoints.restore(plan_on(1, wider))
    more = dataclasses.replace(regression(), system=Regression(idle=True))
    with pytest.raises(UserError, match="missing idle/scale"):
        checkpoints.restore(plan_on(1, more))
    checkpoints.close()


def test_a_checkpoint_of_a_newer_version_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_on(1)
    state = at_step(init_state(plan), 2)
    checkpoints = Checkpoints(tmp_path, POLICY)
    checkpoints.begin(state)
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    checkpoints.save(state, {})
    checkpoints.wait()
    monkeypatch.setattr(checkpoint, "FORMAT", 1)
    with pytest.raises(
        UserError, match=r"checkpoint 2 .* newer version.*expected format 1 or older, found 2"
    ):
        checkpoints.restore(plan)
    checkpoints.close()


def test_parameters_alone(tmp_path: Path) -> None:
    plan = plan_on(1)
    params = init_state(plan).params
    folder = tmp_path / "weights"
    save_params(folder, params, {"recipe": "toy", "step": 3})
    assert is_params_folder(folder)
    assert not is_params_folder(tmp_path)
    assert read_facts(folder) == {"recipe": "toy", "step": 3}
    loaded = load_params(folder)
    assert isinstance(loaded["out"]["kernel"], np.ndarray)
    spread = plan_on(8, fsdp=8).abstract_sharded().params
    placed = load_params(folder, spread)
    for tree in (loaded, placed):
        assert jax.tree.structure(tree) == jax.tree.structure(params)
        for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(params), strict=True):
            np.testing.assert_array_equal(x, y)
    assert placed["stem"]["kernel"].sharding == spread["stem"]["kernel"].sharding
    with pytest.raises(UserError, match="expected a folder of parameters"):
        load_params(tmp_path)
    del spread["stem"]
    with pytest.raises(UserError, match="unexpected stem/kernel"):
        load_params(folder, spread)


def test_damaged_parameters_are_not_used(tmp_path: Path) -> None:
    kernel = np.random.default_rng(0).random((64, 64)).astype(np.float32)
    save_params(tmp_path, {"w": {"kernel": kernel}}, {})
    largest = max((p for p in tmp_path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 16
    largest.write_bytes(content)
    with pytest.raises(UserError, match="damaged: w/kernel; write the folder again"):
        load_params(tmp_path)


def test_digest_sees_every_word_and_ignores_the_mesh() -> None:
    values = np.random.default_rng(0).standard_normal((8, 24)).astype(np.float32)
    places = plan_on(8, fsdp=8).shardings.trained["hidden"]["kernel"]
    whole, spread = digests({"w": values}), digests({"w": jax.device_put(values, places)})
    assert whole == spread
    for i, bit in ((0, 0), (77, 31), (191, 7)):
        words = values.copy().view(np.uint32).reshape(-1)
        words[i] ^= np.uint32(1) << np.uint32(bit)
        assert digests({"w": words.view(np.float32).reshape(8, 24)}) != whole
    assert digests({"w": values[::-1].copy()}) != whole


def test_what_is_saved_is_what_was_given_even_if_it_changes_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writing goes on behind: nothing of the caller's may be looked at after `save`."""
    written = ocp.JsonCheckpointHandler._save_fn

    async def late(self: Any, *arguments: Any) -> None:
        await asyncio.sleep(0.5)
        await written(self, *arguments)

    monkeypatch.setattr(ocp.JsonCheckpointHandler, "_save_fn", late)
    plan = plan_on(1)
    state = at_step(init_state(plan), 4)
    window = Window()
    live: dict[str, Any] = {"window": window.state(), "counters": {"cut": {"boxes": 1}}}
    expected = copy.deepcopy(live)
    checkpoints = Checkpoints(tmp_path, POLICY)
    checkpoints.begin(state)
    checkpoints.save(state, live)
    window.add({"loss": 1.5})
    live["counters"]["cut"]["boxes"] = 2
    checkpoints.wait()
    restored = checkpoints.restore(plan)
    checkpoints.close()
    assert restored is not None
    assert restored.info == expected
