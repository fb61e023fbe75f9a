"""Adapters on a frozen tree: which kernels, what they compute, what trains."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmods import partitioning
from jaxmods.nn import lora
from jaxmods.nn.layers import dense
from jaxmods.nn.stack import run
from jaxmods.system import Params
from jaxmods.weights.map import flatten
from tests import lora_toy
from tests.train.toy import Numbers
from train.experiment import Experiment, Optim, Precision
from train.state import init_state, make_plan
from train.step import compile_step

BLOCK = ("blocks/to_q/kernel", "blocks/mlp/kernel", "blocks/out/kernel")
CONFIG = lora.LoraConfig((*BLOCK, "head/kernel"), rank=2, alpha=3.0)


def noisy(tree: Any, seed: int = 5) -> Any:
    """`tree` with noise on every leaf, so that `b` is not zero."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return structure.unflatten(
        [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    )


@pytest.fixture(scope="module")
def base() -> Params:
    return partitioning.unbox(jax.jit(lora_toy.boxed)(jax.random.key(0)))


def fresh(base: Params, config: lora.LoraConfig = CONFIG) -> Params:
    """New adapters, unboxed."""
    return partitioning.unbox(jax.jit(lambda key: lora.init(key, base, config))(jax.random.key(1)))


@pytest.fixture(scope="module")
def adapters(base: Params) -> Params:
    return noisy(fresh(base))


@pytest.fixture(scope="module")
def x() -> jax.Array:
    return jax.random.normal(jax.random.key(2), (4, 7, lora_toy.INPUT))


@functools.partial(jax.jit, static_argnames="unroll")
def apply(params: Params, x: jax.Array, unroll: bool = False) -> jax.Array:
    return lora_toy.Net(unroll).apply({"params": params}, x)


def test_patterns_name_whole_paths_of_kernels(base: Params) -> None:
    found = lora.matching(base, ("*/to_?/kernel", r"re:(inp|head)/kernel"))
    assert found == {
        "*/to_?/kernel": ("blocks/to_k/kernel", "blocks/to_q/kernel", "blocks/to_v/kernel"),
        "re:(inp|head)/kernel": ("head/kernel", "inp/kernel"),
    }
    assert lora.chosen(base, ("*/to_q/kernel", "blocks/to_*/kernel")) == (
        "blocks/to_k/kernel",
        "blocks/to_q/kernel",
        "blocks/to_v/kernel",
    )
    for pattern in ("*/to_z/kernel", "to_q", "*/bias", "re:to_q"):
        with pytest.raises(ValueError, match="found no match among 7"):
            lora.matching(base, ("head/kernel", pattern))
    with pytest.raises(ValueError, match="at least one pattern"):
        lora.matching(base, ())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "rank: expected 1 or more"),
        ({"dropout": 1.0}, "dropout: expected 0 <= p < 1"),
        ({"init": "zeros"}, "'kaiming' or 'gaussian'"),
    ],
)
def test_config_is_checked(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lora.LoraConfig(("*",), **fields)


def test_scale_is_alpha_over_rank_or_its_root() -> None:
    assert lora.LoraConfig(("*",), rank=64, alpha=128).scale == 2.0
    assert lora.LoraConfig(("*",), rank=64).scale == 1.0
    assert lora.LoraConfig(("*",), rank=16, alpha=8, rslora=True).scale == 2.0


def test_fresh_adapters_inherit_axes_and_change_nothing(base: Params, x: jax.Array) -> None:
    boxed = jax.eval_shape(
        lambda key: lora.init(key, lora_toy.boxed(key), CONFIG), jax.random.key(0)
    )
    assert flatten(partitioning.logical_axes(boxed)) == {
        "default/blocks/to_q/a": ("layers", "embed", "rank"),
        "default/blocks/to_q/b": ("layers", "rank", "heads"),
        "default/blocks/mlp/a": ("layers", "embed", "rank"),
        "default/blocks/mlp/b": ("layers", "rank", "mlp"),
        "default/blocks/out/a": ("layers", "proj", "rank"),
        "default/blocks/out/b": ("layers", "rank", "embed"),
        "default/head/a": ("embed", "rank"),
        "default/head/b": ("rank", "channels"),
    }
    new = fresh(base)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(new)} == {"float32"}
    a, b = new["default"]["blocks"]["out"]["a"], new["default"]["blocks"]["out"]["b"]
    wide = lora_toy.WIDTH + lora_toy.HIDDEN
    assert a.shape == (3, wide, 2)
    assert b.shape == (3, 2, 8)
    assert len(np.unique(a)) == a.size  # every layer has its own draw
    assert lora.count(new) == 3 * (2 * (8 + 8) + 2 * (8 + 12) + 2 * (wide + 8)) + 2 * (8 + 5)
    attached = apply(lora.attach(base, new, CONFIG), x)
    np.testing.assert_array_equal(attached, apply(base, x))


def test_initialisations_are_those_of_peft() -> None:
    """kaiming_uniform(a=sqrt 5) is U(-1/sqrt(in), 1/sqrt(in)); gaussian has standard deviation
    1/rank. Bounds: 4 standard errors of the estimate from 64,000 draws."""
    wide = {"x": {"kernel": jax.ShapeDtypeStruct((4000, 3), jnp.float32)}}
    config = lora.LoraConfig(("x/kernel",), rank=16)
    uniform = partitioning.unbox(lora.init(jax.random.key(0), wide, config))["default"]["x"]["a"]
    assert jnp.abs(uniform).max() <= 4000**-0.5
    assert jnp.std(uniform) * 4000**0.5 == pytest.approx(3**-0.5, rel=0.01)
    config = dataclasses.replace(config, init="gaussian")
    normal = partitioning.unbox(lora.init(jax.random.key(0), wide, config))["default"]["x"]["a"]
    assert jnp.std(normal) * 16 == pytest.approx(1.0, rel=0.012)
    assert abs(float(jnp.mean(normal))) * 16 < 4 / 64000**0.5


def test_attached_equals_merged_equals_the_formula(
    base: Params, adapters: Params, x: jax.Array
) -> None:
    """Two adapters with weights, scanned and unrolled; rounding of fp32 sums: 1e-5."""
    pair = {"one": adapters["default"], "two": noisy(adapters["default"], 9)}
    configs = {"one": CONFIG, "two": dataclasses.replace(CONFIG, alpha=1.0)}
    weights = {"two": -0.7}
    by_hand = flatten(base)
    for path in CONFIG.targets:
        for name, scale in (("one", 1.5), ("two", 0.5 * -0.7)):
            found = lora.sites(base, pair)[path][name]
            by_hand[path] = by_hand[path] + scale * jnp.einsum(
                "...ir,...ro->...io", found.a, found.b, precision="highest"
            )
    merged = lora.merge(base, pair, configs, weights=weights)
    for path, kernel in flatten(merged).items():
        np.testing.assert_allclose(kernel, by_hand[path], atol=1e-6)
    attached = lora.attach(base, pair, configs, weights=weights)
    expected = apply(merged, x)
    np.testing.assert_allclose(apply(attached, x), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(apply(attached, x, unroll=True), expected, rtol=1e-5, atol=1e-5)
    off = lora.attach(base, pair, configs, weights={"one": 0.0, "two": 0.0})
    np.testing.assert_array_equal(apply(off, x), apply(base, x))


def test_weights_may_differ_by_example_and_token(
    base: Params, adapters: Params, x: jax.Array
) -> None:
    rows, tokens = jnp.asarray([[0.0], [1.0], [0.5], [2.0]]), jnp.arange(7) >= 3
    by_row = apply(lora.attach(base, adapters, CONFIG, weights={"default": rows}), x)
    for row, weight in enumerate(rows[:, 0]):
        one = lora.attach(base, adapters, CONFIG, weights={"default": float(weight)})
        np.testing.assert_allclose(by_row[row], apply(one, x[row]), rtol=1e-5, atol=1e-5)
    by_token = apply(lora.attach(base, adapters, CONFIG, weights={"default": tokens}), x)
    np.testing.assert_array_equal(by_token[:, :3], apply(base, x)[:, :3])
    full = apply(lora.attach(base, adapters, CONFIG), x)
    np.testing.assert_allclose(by_token[:, 3:], full[:, 3:], rtol=1e-5, atol=1e-5)


def test_dropout_hides_inputs_of_the_adapter_alone() -> None:
    """On y = x W + x a b with everything ones and p = 0.25: what is left is scaled by 4/3."""
    config = lora.LoraConfig(("*kernel",), rank=1, dropout=0.25)
    base = {"l": {"kernel": jnp.zeros((3, 400, 1))}}
    ones = {"default": {"l": {"a": jnp.ones((3, 400, 1)), "b": jnp.ones((3, 1, 1))}}}

    def layers(rng: jax.Array | None) -> np.ndarray:
        tree = lora.attach(base, ones, config, rng=rng)["l"]
        return np.asarray(jax.lax.map(lambda layer: dense(layer, jnp.ones((50, 400))), tree))

    np.testing.assert_array_equal(layers(None), 400.0)
    key = jax.random.key(0)
    shown = layers(key) * 0.75
    np.testing.assert_allclose(shown, np.round(shown), atol=1e-3)  # whole numbers of inputs
    assert len(np.unique(shown[0] - shown[1])) > 1  # layers draw apart
    # 60,000 inputs: the mean is within 4 standard errors.
    assert shown.mean() / 400 == pytest.approx(0.75, abs=4 * (0.75 * 0.25 / 60000) ** 0.5)
    np.testing.assert_array_equal(layers(key), layers(key))
    assert np.any(layers(key) != layers(jax.random.key(1)))


def test_dropout_runs_in_every_kind_of_stack() -> None:
    """Scanned and unrolled, recomputed in the backward pass: the same masks, the same gradient."""
    config = lora.LoraConfig(("l/kernel",), rank=2, dropout=0.5)
    base = {"l": {"kernel": jnp.zeros((2, 6, 6))}}
    adapters, x = noisy(fresh(base, config)), jnp.ones((4, 6))

    @functools.partial(jax.jit, static_argnames=("unroll", "dropped"))
    @jax.value_and_grad
    def loss(adapters: Params, unroll: bool, dropped: bool) -> jax.Array:
        tree = lora.attach(base, adapters, config, rng=jax.random.key(3) if dropped else None)
        y = run(lambda p, y: jnp.sin(y + dense(p, y)), tree["l"], x, policy="full", unroll=unroll)
        return jnp.sum(y)

    scanned, unrolled = (loss(adapters, unroll=u, dropped=True) for u in (False, True))
    for a, b in zip(jax.tree.leaves(scanned), jax.tree.leaves(unrolled), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    whole = loss(adapters, unroll=False, dropped=False)
    assert abs(float(scanned[0] - whole[0])) > 0.1


def test_unmerge_comes_back_to_rounding(base: Params, adapters: Params) -> None:
    base = {"head": base["head"]}
    adapters = {"default": {"head": adapters["default"]["head"]}}
    for dtype in ("float32", "bfloat16"):
        cast = jax.tree.map(lambda w: np.asarray(w).astype(dtype), base)  # noqa: B023 - now
        merged = lora.merge(cast, adapters, CONFIG)
        back = lora.unmerge(merged, adapters, CONFIG)
        assert merged["head"]["kernel"].dtype == back["head"]["kernel"].dtype == dtype
        wide = [np.asarray(t["head"]["kernel"], np.float32) for t in (cast, merged, back)]
        assert np.abs(wide[0] - wide[1]).max() > 0.1
        assert np.abs(wide[0] - wide[2]).max() <= 2 * jnp.finfo(dtype).eps * np.abs(wide[1]).max()
        np.testing.assert_array_equal(back["head"]["bias"], cast["head"]["bias"])


def test_what_does_not_fit_is_refused(base: Params, adapters: Params) -> None:
    with pytest.raises(ValueError, match=r"no adapter \['other'\]; there are \['default'\]"):
        lora.attach(base, adapters, CONFIG, weights={"other": 1.0})
    with pytest.raises(ValueError, match=r"no adapter \['other'\]"):
        lora.merge(base, adapters, CONFIG, weights={"other": 1.0})
    with pytest.raises(ValueError, match="expected one for adapter 'default'"):
        lora.attach(base, adapters, {"other": CONFIG})
    with pytest.raises(ValueError, match="expected at least one adapter"):
        lora.attach(base, {}, CONFIG)
    smaller = {**base, "head": {"kernel": jnp.zeros((8, 4))}}
    with pytest.raises(ValueError, match=r"at head/kernel: expected .* b \[2, 4\] .* and \[2, 5\]"):
        lora.attach(smaller, adapters, CONFIG)
    with pytest.raises(ValueError, match="expected a kernel at head/kernel, found none"):
        lora.attach({"blocks": base["blocks"]}, adapters, CONFIG)


def test_average_of_factors(adapters: Params) -> None:
    other = noisy(adapters["default"], 11)
    trees = {"one": adapters["default"], "two": other}
    mean = lora.average(trees, {"one": 0.25, "two": 0.75})
    np.testing.assert_allclose(
        mean["head"]["a"],
        0.25 * adapters["default"]["head"]["a"] + 0.75 * other["head"]["a"],
        rtol=1e-6,
    )
    with pytest.raises(ValueError, match="a weight for each of"):
        lora.average(trees, {"one": 1.0})
    with pytest.raises(ValueError, match="differ in their paths or shapes"):
        lora.average({"one": other, "two": {"head": other["head"]}}, {"one": 0.5, "two": 0.5})


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a program, inner ones included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in jax.tree.leaves(value, is_leaf=lambda v: hasattr(v, "eqns")):
                if hasattr(inner, "jaxpr"):
                    inner = inner.jaxpr
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def test_no_array_of_a_kernel_s_shape_is_ever_computed(base: Params, x: jax.Array) -> None:
    """No merged weight, no weight gradient, no cast copy: in the forward and the backward pass the
    only equations that yield an array shaped like an adapted kernel pass one on."""
    config = lora.LoraConfig(("blocks/*/kernel",), rank=2)
    adapters = noisy(fresh(base, config))

    def loss(adapters: Params) -> jax.Array:
        return jnp.sum(jnp.square(apply(lora.attach(base, adapters, config), x)))

    program = jax.make_jaxpr(jax.value_and_grad(loss))(adapters)
    kernels = {flatten(base)[path].shape for path in lora.chosen(base, config.targets)}
    kernels |= {shape[1:] for shape in kernels}
    computed = [
        equation.primitive.name
        for equation in equations(program.jaxpr)
        for out in equation.outvars
        if out.aval.shape in kernels
    ]
    # The backward pass takes kernels transposed, and rows by the parts of an input.
    assert set(computed) <= {"transpose", "split"}


def test_the_training_step_trains_adapters_only() -> None:
    """fp32 masters and moments for the adapters; the base is bf16, without optimiser state, and
    the same to the bit after training; the loss falls."""
    adapters = lora_toy.Adapters(rank=2, alpha=2.0, targets=("proj_out",), dropout=0.1)
    experiment = Experiment(
        system=lora_toy.Adapted(adapters=adapters),
        data=Numbers(),
        steps=60,
        batch_size=16,
        optim=Optim(lr=2e-2, schedule="constant", weight_decay=1e-4, clip_norm=1.0),
        precision=Precision(frozen="bfloat16", compute="bfloat16"),
    )
    mesh = partitioning.make_mesh(partitioning.MeshShape(), jax.devices()[:1])
    plan = make_plan(experiment, mesh)
    names = set(flatten(plan.abstract.trained))
    assert names == {f"lora/default/{p}/{leaf}" for p in ("blocks/out", "head") for leaf in "ab"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(plan.abstract.trained)} == {"float32"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(plan.abstract.frozen)} == {"bfloat16"}
    moments = [leaf.shape for leaf in jax.tree.leaves(plan.abstract.opt_state) if leaf.shape]
    trained = [leaf.shape for leaf in jax.tree.leaves(plan.abstract.trained)]
    assert sorted(moments) == sorted(trained * 2)

    state, step = init_state(plan), compile_step(plan)
    before = jax.tree.map(np.asarray, state.frozen)
    batches = experiment.data.batches(global_batch=16, seed=0)
    losses = []
    for number in range(60):
        state, output = step.run(state, next(batches).arrays, np.int32(number))
        losses.append(step.metrics(np.asarray(output.scalars))["loss"])
        if number == 1:  # b is zero at first, so a has no gradient before the second step
            assert np.all(np.asarray(output.changes) > 0)
    for ours, theirs in zip(jax.tree.leaves(before), jax.tree.leaves(state.frozen), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:10])
