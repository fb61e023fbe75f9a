"""Schedules, groups, decay and late starts, against their formulas."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from train.exits import UserError
from train.experiment import GroupOptim, Optim
from train.optim import make_groups, make_optimizer, make_schedule, start_at

LABELS = {"a": {"w": "train", "b": "train"}, "h": {"w": "head"}, "f": {"w": "frozen"}}
TRAINED = {"a": {"w": "train", "b": "train"}, "h": {"w": "head"}}
DECAY = {"a": {"w": True, "b": False}, "h": {"w": True}}


def params() -> dict[str, dict[str, jax.Array]]:
    return {"a": {"w": jnp.full(3, 2.0), "b": jnp.ones(2)}, "h": {"w": jnp.full(3, -1.0)}}


@pytest.mark.parametrize(
    ("optim", "step", "factor"),
    [
        (Optim(), 0, 1.0),
        (Optim(), 50, 0.5),
        (Optim(warmup_steps=10), 0, 0.0),
        (Optim(warmup_steps=10), 5, 0.5),
        (Optim(warmup_steps=10), 10, 1.0),
        (Optim(warmup_steps=10), 55, 0.5),
        (Optim(end_factor=0.1), 50, 0.1 + 0.9 * 0.5),
        (Optim(end_factor=0.1), 200, 0.1),
        (Optim(schedule="linear"), 25, 0.75),
        (Optim(schedule="linear", end_factor=0.5), 100, 0.5),
        (Optim(schedule="constant", warmup_steps=4), 3, 0.75),
        (Optim(schedule="constant"), 99, 1.0),
        (Optim(schedule="step_drop", drop_at=40), 39, 1.0),
        (Optim(schedule="step_drop", drop_at=40), 40, 0.1),
    ],
)
def test_schedule(optim: Optim, step: int, factor: float) -> None:
    assert float(make_schedule(optim, 2e-3, 100)(step)) == pytest.approx(2e-3 * factor, rel=1e-5)


def test_schedule_refuses_what_cannot_be() -> None:
    with pytest.raises(UserError, match="warmup_steps"):
        make_schedule(Optim(warmup_steps=-1), 1.0, 100)
    with pytest.raises(UserError, match="drop_at"):
        make_schedule(Optim(schedule="step_drop"), 1.0, 100)


def test_adamw_decays_only_where_told_and_scales_decay_by_lr() -> None:
    optim = Optim(lr=0.1, schedule="constant", weight_decay=0.5)
    groups = make_groups(optim, LABELS, 10)
    transform = make_optimizer(optim, groups, TRAINED, DECAY)
    state = transform.init(params())
    zeros = jax.tree.map(jnp.zeros_like, params())
    updates, _ = transform.update(zeros, state, params())
    np.testing.assert_allclose(updates["a"]["w"], -0.1 * 0.5 * 2.0, rtol=1e-6)
    np.testing.assert_array_equal(updates["a"]["b"], 0.0)
    np.testing.assert_allclose(updates["h"]["w"], 0.1 * 0.5, rtol=1e-6)


def test_adamw_equals_the_formula_in_float64() -> None:
    optim = Optim(lr=0.01, schedule="cosine", warmup_steps=2, weight_decay=0.1, b1=0.9, b2=0.95)
    groups = make_groups(optim, LABELS, 6)
    transform = make_optimizer(optim, groups, TRAINED, DECAY)
    p, state = params(), transform.init(params())
    draw = np.random.default_rng(0)
    w = np.full(3, 2.0)
    m, v = np.zeros(3), np.zeros(3)
    for t in range(5):
        g = draw.standard_normal(3)
        grads = {"a": {"w": jnp.asarray(g, jnp.float32), "b": jnp.ones(2)}, "h": {"w": jnp.ones(3)}}
        updates, state = transform.update(grads, state, p)
        p = optax.apply_updates(p, updates)
        lr = 0.01 * (t / 2 if t < 2 else 0.5 * (1 + np.cos(np.pi * (t - 2) / 4)))
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        direction = m / (1 - 0.9 ** (t + 1)) / (np.sqrt(v / (1 - 0.95 ** (t + 1))) + 1e-8)
        w = w - lr * (direction + 0.1 * w)
    np.testing.assert_allclose(p["a"]["w"], w, rtol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "adam", "lion", "sgd", "adafactor"])
def test_every_optimiser_goes_downhill(name: str) -> None:
    optim = Optim(name=name, lr=0.05, schedule="constant")  # type: ignore[arg-type]  # the names above
    transform = make_optimizer(optim, make_groups(optim, LABELS, 60), TRAINED, DECAY)
    p, state = params(), transform.init(params())

    def loss(p: dict[str, dict[str, jax.Array]]) -> jax.Array:
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(p))

    first = float(loss(p))
    for _ in range(60):
        updates, state = transform.update(jax.grad(loss)(p), state, p)
        p = optax.apply_updates(p, updates)
    assert float(loss(p)) < 0.2 * first


def test_a_late_group_is_held_still_and_warms_up_from_its_own_start() -> None:
    optim = Optim(
        lr=0.1, warmup_steps=2, schedule="constant", groups=(GroupOptim("head", start_step=3),)
    )
    groups = make_groups(optim, LABELS, 20)
    rates = [float(groups["head"].rate(s)) for s in range(7)]
    np.testing.assert_allclose(rates, [0, 0, 0, 0, 0.05, 0.1, 0.1], rtol=1e-6)
    transform = start_at(optax.scale_by_adam(), 3)
    w, state = jnp.ones(2), transform.init(jnp.ones(2))
    for _ in range(3):
        update, state = transform.update(jnp.ones(2), state, w)
        np.testing.assert_array_equal(update, 0.0)
        assert all(float(jnp.sum(jnp.abs(x))) == 0 for x in jax.tree.leaves(state.inner))
    update, state = transform.update(jnp.ones(2), state, w)
    np.testing.assert_allclose(update, 1.0, rtol=1e-5)


def test_groups_are_checked() -> None:
    optim = Optim(groups=(GroupOptim("haed"),))
    with pytest.raises(UserError, match=r"no parameter is labelled 'haed'.*head, train"):
        make_groups(optim, LABELS, 10)
    with pytest.raises(UserError, match="given twice"):
        make_groups(dataclasses.replace(optim, groups=(GroupOptim("head"),) * 2), LABELS, 10)
    with pytest.raises(UserError, match=r"start_step of 'head': expected 0\.\.9, found 10"):
        make_groups(Optim(groups=(GroupOptim("head", start_step=10),)), LABELS, 10)
    adam = Optim(name="adam", weight_decay=0.1)
    with pytest.raises(UserError, match="adamw"):
        make_optimizer(adam, make_groups(adam, LABELS, 10), TRAINED, DECAY)
