"""The step: meshes, accumulation, groups, clipping, averages, precision, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmods.partitioning import MeshShape, make_mesh
from tests.train.toy import Contrastive, Numbers, Pair, Regression, pair, regression
from train.exits import UserError
from train.experiment import Experiment, Optim, Precision
from train.feed import FedBatch, Feed
from train.state import Plan, TrainState, flatten, init_state, make_plan
from train.step import Step, compile_step

SMALL = dataclasses.replace(regression(), data=Numbers(), steps=6)


def build(experiment: Experiment, mesh: MeshShape | None = None) -> tuple[Plan, Step]:
    devices = None if mesh else jax.devices()[:1]
    plan = make_plan(experiment, make_mesh(mesh or MeshShape(), devices))
    return plan, compile_step(plan)


def feed(experiment: Experiment, step: Step, count: int) -> list[FedBatch]:
    reader = Feed(
        experiment.data,
        experiment.system.batch_spec(experiment.batch_size),
        step.batch_shardings,
        global_batch=experiment.batch_size,
        seed=experiment.seed,
        start_step=0,
    )
    try:
        return [reader.take() for _ in range(count)]
    finally:
        reader.close()


def run(
    experiment: Experiment, steps: int, mesh: MeshShape | None = None
) -> tuple[TrainState, list[dict[str, float]], Step]:
    plan, step = build(experiment, mesh)
    state, metrics = init_state(plan), []
    for i, batch in enumerate(feed(experiment, step, steps)):
        state, output = step.run(state, batch.arrays, np.asarray(i, np.int32))
        scalars = np.asarray(output.scalars)
        assert scalars[0] == 1.0
        metrics.append(step.metrics(scalars))
    return state, metrics, step


def close(a: Any, b: Any, rtol: float) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=rtol, atol=1e-6)


@pytest.mark.parametrize(
    "mesh", [MeshShape(), MeshShape(fsdp=4), MeshShape(data=2, fsdp=2, tensor=2)], ids=str
)
def test_eight_devices_step_like_one(mesh: MeshShape) -> None:
    one, metrics_one, _ = run(SMALL, 4)
    many, metrics_many, _ = run(SMALL, 4, mesh)
    for a, b in zip(metrics_one, metrics_many, strict=True):
        assert a.keys() == b.keys()
        np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=2e-5)
    close(one.trained, many.trained, 2e-5)
    close(one.state, many.state, 2e-5)
    np.testing.assert_array_equal(one.rng, many.rng)


def test_state_is_sharded_as_the_rules_say_and_moments_like_parameters() -> None:
    plan, _ = build(SMALL, MeshShape(data=2, fsdp=2, tensor=2))
    kernel = plan.shardings.trained["hidden"]["kernel"]
    assert tuple(kernel.spec) == ("fsdp", "tensor")
    state = init_state(plan)
    moments = [
        leaf.sharding.spec
        for keys, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
        if "hidden" in jax.tree_util.keystr(keys) and leaf.shape == (8, 16)
    ]
    assert moments == [kernel.spec, kernel.spec]
    assert state.ema["hidden"]["kernel"].sharding.spec == kernel.spec


def test_accumulation_equals_the_big_batch() -> None:
    still = dataclasses.replace(
        SMALL,
        system=Regression(noise=0.0),
        optim=dataclasses.replace(SMALL.optim, clip_norm=0.1),
    )
    split = dataclasses.replace(still, optim=dataclasses.replace(still.optim, accumulate=4))
    for mesh in (None, MeshShape(data=2, fsdp=4)):
        whole, metrics_whole, _ = run(still, 3, mesh)
        parts, metrics_parts, _ = run(split, 3, mesh)
        close(whole.trained, parts.trained, 1e-5)
        for a, b in zip(metrics_whole, metrics_parts, strict=True):
            for name in ("loss", "grad_norm", "update_norm"):
                assert a[name] == pytest.approx(b[name], rel=1e-5)


def test_accumulation_is_refused_where_it_changes_the_objective() -> None:
    optim = Optim(accumulate=2)
    with pytest.raises(UserError, match="negatives come from the batch"):
        build(dataclasses.replace(SMALL, system=Contrastive(), optim=optim))
    with pytest.raises(UserError, match="batch_size 8 cannot be split into 3"):
        build(dataclasses.replace(SMALL, optim=Optim(accumulate=3)))


def test_frozen_parameters_have_no_optimiser_state_and_their_own_dtype() -> None:
    experiment = dataclasses.replace(SMALL, precision=Precision(frozen="bfloat16"))
    plan, step = build(experiment)
    state = init_state(plan)
    assert set(flatten(state.frozen)) == {("stem", "kernel")}
    assert state.frozen["stem"]["kernel"].dtype == jnp.bfloat16
    assert ("stem", "kernel") not in set(flatten(state.trained))
    names = [
        jax.tree_util.keystr(k) for k, _ in jax.tree_util.tree_leaves_with_path(state.opt_state)
    ]
    assert sum("hidden" in n for n in names) == 4
    assert not any("stem" in n for n in names)
    before = np.asarray(state.frozen["stem"]["kernel"])
    (batch,) = feed(experiment, step, 1)
    after, _ = step.run(state, batch.arrays, np.asarray(0, np.int32))
    np.testing.assert_array_equal(before, after.frozen["stem"]["kernel"])


def test_masters_stay_float32_while_the_loss_computes_in_bfloat16() -> None:
    seen = []

    @dataclasses.dataclass(frozen=True)
    class Spy(Regression):
        def predict(self, params: Any, x: jax.Array) -> jax.Array:
            seen.append({str(p.dtype) for p in jax.tree.leaves(params)})
            return super().predict(params, x)

    experiment = dataclasses.replace(SMALL, system=Spy(), precision=Precision(compute="bfloat16"))
    state, _, _ = run(experiment, 1)
    assert seen[-1] == {"bfloat16"}
    assert {str(p.dtype) for p in jax.tree.leaves(state.trained)} == {"float32"}


def test_nan_is_refused_with_everything_after_it() -> None:
    experiment = dataclasses.replace(SMALL, data=Numbers(poison=2))
    plan, step = build(experiment)
    batches = feed(experiment, step, 5)
    state = init_state(plan)
    for i in range(2):
        state, _ = step.run(state, batches[i].arrays, np.asarray(i, np.int32))
    clean = jax.tree.map(np.array, state)
    flags = []
    for i in range(2, 5):  # dispatched before anybody looked
        state, output = step.run(state, batches[i].arrays, np.asarray(i, np.int32))
        flags.append(float(output.scalars[0]))
        assert not np.any(np.asarray(output.changes))
    assert flags == [0.0, 0.0, 0.0]
    for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)
    assert int(state.step) == 2


def test_two_losses_train_their_own_groups() -> None:
    experiment = pair()
    plan, step = build(experiment)
    state = init_state(plan)
    start = jax.tree.map(np.array, state.trained)
    moved = []
    for i, batch in enumerate(feed(experiment, step, 6)):
        state, output = step.run(state, batch.arrays, np.asarray(i, np.int32))
        metrics = step.metrics(np.asarray(output.scalars))
        changes = dict(zip(step.trained_names, np.asarray(output.changes), strict=True))
        moved.append((changes["generator/kernel"] > 0, changes["critic/kernel"] > 0))
        assert metrics["loss"] == pytest.approx(
            metrics["loss/generator"] + metrics["loss/critic"], rel=1e-6
        )
    # the generator's loss is gated by step 2 inside the loss, the critic by its group at step 3
    assert moved == [
        (False, False), (False, False), (True, False), (True, True), (True, True), (True, True),
    ]  # fmt: skip
    assert int(state.state["turns"]) == 12  # both losses hand the state on, once each a step
    assert not np.array_equal(start["critic"]["kernel"], state.trained["critic"]["kernel"])


def test_losses_and_labels_must_match() -> None:
    @dataclasses.dataclass(frozen=True)
    class Half(Pair):
        def losses(self) -> Any:
            return super().losses()[:1]

    @dataclasses.dataclass(frozen=True)
    class Twice(Pair):
        def losses(self) -> Any:
            return super().losses() * 2

    plain = dataclasses.replace(pair(), optim=Optim())
    with pytest.raises(UserError, match="no loss trains label critic"):
        build(dataclasses.replace(plain, system=Half()))
    with pytest.raises(UserError, match="trained by two losses"):
        build(dataclasses.replace(plain, system=Twice()))


def test_clipping_average_and_update_norm() -> None:
    optim = Optim(name="sgd", lr=1.0, b1=0.0, schedule="constant", clip_norm=0.01, ema_decay=0.5)
    plan, step = build(dataclasses.replace(SMALL, optim=optim))
    state = init_state(plan)
    before = jax.tree.map(np.array, state.trained)
    (batch,) = feed(SMALL, step, 1)
    state, output = step.run(state, batch.arrays, np.asarray(0, np.int32))
    metrics = step.metrics(np.asarray(output.scalars))
    assert metrics["grad_norm"] > 0.01
    assert metrics["update_norm"] == pytest.approx(0.01, rel=1e-4)
    middle = jax.tree.map(lambda a, b: 0.5 * a + 0.5 * np.asarray(b), before, state.trained)
    close(middle, state.ema, 1e-6)
    close(state.averaged["hidden"], state.ema["hidden"], 0.0)


def test_constants_of_the_data_take_their_place_among_the_frozen() -> None:
    plan, _ = build(SMALL, MeshShape(fsdp=4))
    given = np.arange(64, dtype=np.float32).reshape(8, 8)
    state = init_state(plan, constants={"stem/kernel": given})
    np.testing.assert_array_equal(state.frozen["stem"]["kernel"], given)
    close(init_state(plan).trained, state.trained, 0.0)
    with pytest.raises(UserError, match=r"stem/kernel: expected \(8, 8\) in Regression, found.*2"):
        init_state(plan, constants={"stem/kernel": given[:2]})
    with pytest.raises(UserError, match="expected no such parameter"):
        init_state(plan, constants={"stem/karnel": given})
    with pytest.raises(UserError, match="expected a frozen parameter, found one labelled 'head'"):
        init_state(plan, constants={"out/kernel": np.zeros((16, 4))})
