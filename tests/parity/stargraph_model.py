"""Encoder, scores, losses, gradients and Adam steps of the recorded tiny cases."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from benchmarks.stargraph_torch import Options, StarGraphTorch, adam
from data_pipelines.graphs.weighting import subsampling_weights
from jaxmods.systems.stargraph.system import StarGraph
from jaxmods.weights import export_tensors
from tests.parity import stargraph_common as common
from tests.parity.registry import Case, Kind, Tolerance, assert_close
from train.experiment import Optim
from train.optim import make_groups, make_optimizer

MODEL = Kind("stargraph", "model", lambda case: "batch0.head" in case.shapes)
WEIGHTS = Kind("stargraph", "weights", lambda case: "weights.safetensors" in case.files)


def batch(case: Case, number: int) -> dict[str, jax.Array]:
    """A recorded batch in the layout of `StarGraph.batch_spec`."""
    head, relation, tail = (case.io[f"batch{number}.{n}"] for n in ("head", "relation", "tail"))
    asks_head = head.shape[1] > 1
    negative = (head if asks_head else tail)[:, 1:]
    return {
        "positive": jnp.asarray(np.stack([head[:, 0], relation[:, 0], tail[:, 0]], 1), jnp.int32),
        "negative": jnp.asarray(negative, jnp.int32),
        "weight": jnp.asarray(case.io[f"batch{number}.weight"]),
        "mode": jnp.full(len(head), int(asks_head), jnp.int32),
    }


def batch_numbers(case: Case) -> list[int]:
    return [n for n in range(len(case.shapes)) if f"batch{n}.head" in case.shapes]


def by_official_name(case: Case, model: StarGraph, tree: Any) -> dict[str, np.ndarray]:
    """A tree like the parameters under official keys and layouts."""
    tree = {**tree, "graph": common.params(case, model)["graph"]}
    return {k: v.all() for k, v in export_tensors(tree, model.weights()).items()}


@MODEL.check
def encoder(case: Case) -> None:
    """Token sequences, attention branch and output of every block, pooled vectors."""
    model = common.system(case)
    params = common.params(case, model)
    ids = jnp.asarray(case.io["entities"], jnp.int32)
    tolerance = common.part_tolerance(case, "forward")
    captured: dict[str, jax.Array] = {}
    vectors = model._encode(params, ids, None, captured)
    assert_close("entity_embedding", vectors, case.io["enc.entity_embedding"], tolerance)
    fast = model.encode(params, ids)
    assert_close("entity_embedding, pooled first", fast, case.io["enc.entity_embedding"], tolerance)
    expected = [n for n in case.io if n.startswith("enc.") and n != "enc.entity_embedding"]
    for name in expected:
        assert_close(name, captured[name.removeprefix("enc.")], case.io[name], tolerance)


@MODEL.check
def scores_and_losses(case: Case) -> None:
    """Scores of triples and negatives, both loss terms, their sum."""
    model = common.system(case)
    params = common.params(case, model)
    for n in batch_numbers(case):
        if f"batch{n}.score" not in case.io:
            continue
        b = batch(case, n)
        positive = model.score_triples(params, b["positive"])
        asks_head = b["mode"][0] == 1
        known = b["positive"][:, 2 if asks_head else 0]
        given = model.score_candidates(params, known, b["positive"][:, 1], b["mode"], b["negative"])
        found = np.concatenate([positive[:, None], given], 1)
        tolerance = common.part_tolerance(case, "score")
        assert_close(f"batch{n}.score", found, case.io[f"batch{n}.score"], tolerance)
        out = model.loss(params, {}, b, jax.random.key(0), jnp.asarray(0))
        tolerance = common.part_tolerance(case, "losses")
        assert_close(f"batch{n}.loss", out.loss, case.io[f"batch{n}.loss"], tolerance)
        for term in ("positive_loss", "negative_loss"):
            expected = case.io[f"batch{n}.{term}"]
            assert_close(f"batch{n}.{term}", out.metrics[term], expected, tolerance)


@MODEL.check
def gradients(case: Case) -> None:
    """Gradients of all trained parameters; those not recorded are exactly zero."""
    model = common.system(case)
    params = common.params(case, model)
    tolerance = common.part_tolerance(case, "gradients")
    trained = {k: v for k, v in params.items() if k in ("encoder", "relation_embedding")}
    fixed = {k: v for k, v in params.items() if k not in trained}
    numbers = sorted({int(n.split(".")[1][5:]) for n in case.io if n.startswith("grad.")})
    assert numbers
    for n in numbers:
        b = batch(case, n)

        def loss(trained: Any, b: Any = b) -> jax.Array:
            return model.loss(trained | fixed, {}, b, jax.random.key(0), jnp.asarray(0)).loss

        found = by_official_name(case, model, jax.grad(loss)(trained) | fixed)
        prefix = f"grad.batch{n}."
        expected = {k.removeprefix(prefix): v for k, v in case.io.items() if k.startswith(prefix)}
        for name, gradient in expected.items():
            assert_close(prefix + name, found[name], gradient, tolerance)
        frozen = {"gamma", "embedding_range", "hashes", "path_ids", "nodes", "type_ids"}
        tied = model.encoder.share_anchors
        for name in set(found) - set(expected) - frozen:
            if not (tied and name == "anchor_embedding.weight"):
                assert not np.any(found[name]), f"{name}: expected no gradient"


@MODEL.check
def adam_steps(case: Case) -> None:
    """Successive Adam steps of the recipe's optimiser under the official learning-rate rule."""
    model = common.system(case)
    params = common.params(case, model)
    rates, losses = case.io["adam.lr_used"], case.io["adam.losses"]
    steps = len(rates)
    optim = Optim(name="adam", lr=float(rates[0]), schedule="step_drop", drop_at=steps // 2 + 1)
    trained = {k: v for k, v in params.items() if k in ("encoder", "relation_embedding")}
    fixed = {k: v for k, v in params.items() if k not in trained}
    labels = {k: v for k, v in model.labels(params).items() if k in trained}
    groups = make_groups(optim, labels, steps)
    optimizer = make_optimizer(optim, groups, labels, jax.tree.map(lambda _: False, trained))
    state = optimizer.init(trained)

    @jax.jit
    def step(trained: Any, state: Any, b: Any) -> Any:
        def loss(trained: Any) -> jax.Array:
            return model.loss(trained | fixed, {}, b, jax.random.key(0), jnp.asarray(0)).loss

        value, grad = jax.value_and_grad(loss)(trained)
        updates, state = optimizer.update(grad, state, trained)
        return optax.apply_updates(trained, updates), state, value

    for n in range(steps):
        rate = next(iter(groups.values())).rate(n)
        assert_close("learning rate", rate, np.float64(rates[n]), Tolerance(rtol=1e-6))
        trained, state, value = step(trained, state, batch(case, n))
        tolerance = common.part_tolerance(case, "losses")
        assert_close(f"loss {n}", value, losses[n], tolerance)
    found = by_official_name(case, model, trained | fixed)
    tolerance = common.part_tolerance(case, "Adam")
    for name, expected in final_parameters(case).items():
        assert_close(f"adam.final.{name}", found[name], expected, tolerance)


def final_parameters(case: Case) -> dict[str, np.ndarray]:
    """Parameters after the case's Adam steps, by official name.

    Those of the case, unless they are void: a recording whose every "final" tensor is bit for bit
    the initial one, while its own losses moved from step to step, was taken after the initial
    parameters had been put back. Then all tensors come from an independent float64 computation
    (plain PyTorch, written from the spec), which has to reproduce the recorded losses first.
    """
    prefix = "adam.final."
    recorded = {k.removeprefix(prefix): v for k, v in case.io.items() if k.startswith(prefix)}
    if not all(np.array_equal(v, case.weights[k]) for k, v in recorded.items()):
        return recorded
    losses, final = float64_adam(case)
    assert_close("float64 losses", losses, case.io["adam.losses"], Tolerance(rtol=1e-5))
    assert len(set(case.io["adam.losses"].tolist())) > 1
    moved = [k for k, v in final.items() if np.abs(v - case.weights[k]).max() > 0]
    assert set(recorded) <= set(moved), "the initial parameters cannot be the final ones"
    return {k: v for k, v in final.items() if k in moved}


def float64_adam(case: Case) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Losses before each of the case's Adam steps, and trained parameters after the last."""
    config = case.meta["config"]
    model = common.system(case)
    options = Options(
        model.score,
        model.gamma,
        model.offset,
        model.temperature,
        config["head_dim"],
        config["attn_layers_num"],
        config["merge_strategy"],
        types=model.encoder.has_types,
    )
    network = StarGraphTorch(case.weights, options, torch.float64)
    optimizer = adam(network, 0.0)
    losses = []
    for n, rate in enumerate(case.io["adam.lr_used"]):
        optimizer.param_groups[0]["lr"] = float(rate)
        names = ("head", "relation", "tail", "weight")
        arrays = [torch.tensor(case.io[f"batch{n}.{name}"]) for name in names]
        optimizer.zero_grad()
        loss = network.loss(*arrays[:3], arrays[3].double())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    final = {
        name: tensor.detach().numpy()
        for name, tensor in network.table.items()
        if tensor.requires_grad
    }
    return np.asarray(losses), final


@MODEL.check
def sampling_weights(case: Case) -> None:
    """Sub-sampling weights of all training triples (the case has them unless it uses ones)."""
    triples = case.io["train_triples"]
    if case.meta["config"]["uni_weight"]:
        assert "subsampling_weights" not in case.io
        for n in batch_numbers(case):
            assert (case.io[f"batch{n}.weight"] == 1).all()
        return
    found = subsampling_weights(triples)
    tolerance = common.part_tolerance(case, "forward")
    assert_close("weights", found, case.io["subsampling_weights"], tolerance)


@WEIGHTS.check
def round_trip(case: Case) -> None:
    """Official state dict to parameters and back: bit for bit, every key, nothing more."""
    model = common.system(case)
    params = common.params(case, model)
    exported = {k: v.all() for k, v in export_tensors(params, model.weights()).items()}
    assert exported.keys() == case.weights.keys()
    for name, array in case.weights.items():
        assert np.array_equal(exported[name], array), name
