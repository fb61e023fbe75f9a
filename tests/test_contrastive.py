"""The chunked, sharded contrastive loss against the dense formula in float64."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmods.objectives.contrastive import Contrast, SameText, hash_texts, info_nce, local_info_nce
from jaxmods.partitioning import MeshShape, make_mesh, sharding_for, use_mesh


def dense(
    x: np.ndarray,
    y: np.ndarray,
    scale: float,
    same_text: SameText = "negative",
    group: np.ndarray | None = None,
    valid: np.ndarray | None = None,
) -> tuple[float, np.ndarray, np.ndarray, float]:
    """Loss and its gradients for x, y and scale, from the whole B x B matrix."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    size = len(x)
    valid = np.ones(size, bool) if valid is None else valid
    pair = np.eye(size, dtype=bool)
    same = pair if group is None else group[:, None] == group[None, :]
    counted = valid[:, None] & valid[None, :]
    positive = pair & counted
    if same_text == "mask":
        counted = counted & (pair | ~same)
    if same_text == "positive":
        positive = same & counted
    number = max(int(valid.sum()), 1)
    products = x @ y.T
    scores = np.where(counted, scale * products, -np.inf)
    d_scores, loss = np.zeros((size, size)), 0.0
    for axis in (1, 0):
        with np.errstate(invalid="ignore", over="ignore"):
            top = np.max(scores, axis=axis, keepdims=True, initial=-1e300)
            weights = np.exp(scores - top)
            total = weights.sum(axis=axis, keepdims=True)
        share = np.where(counted, weights / np.where(total > 0, total, 1), 0)
        target = positive / np.maximum(positive.sum(axis=axis, keepdims=True), 1)
        lse = np.where(total > 0, top + np.log(np.where(total > 0, total, 1)), 0)
        each = lse.sum(axis=axis) - (target * np.where(counted, scores, 0)).sum(axis=axis)
        loss += each[valid].sum() / number / 2
        d_scores += (share - target) / number / 2
    return loss, scale * d_scores @ y, scale * d_scores.T @ x, float((d_scores * products).sum())


def draw(size: int, width: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(2, size, width)).astype(np.float32)
    y += 0.5 * x
    return x / np.linalg.norm(x, axis=1, keepdims=True), y / np.linalg.norm(
        y, axis=1, keepdims=True
    )


def value_and_grads(fn: Any, *args: Any) -> tuple[float, list[np.ndarray]]:
    value, grads = jax.jit(jax.value_and_grad(fn, (0, 1, 2)))(*args)
    return float(value), [np.asarray(g) for g in grads]


GROUP = np.array([0, 1, 2, 1, 3, 4, 1, 5, 6, 6, 7, 8])
VALID = np.array([1, 1, 0, 1, 1, 0, 1, 1, 1, 1, 0, 1], bool)


@pytest.mark.parametrize("same_text", ["negative", "mask", "positive"])
@pytest.mark.parametrize(("chunk", "partial"), [(1, True), (5, True), (5, False), (100, False)])
def test_equals_dense(same_text: SameText, chunk: int, partial: bool) -> None:
    x, y = draw(12)
    valid = VALID if partial else None
    text = hash_texts(jnp.asarray(GROUP)[:, None])

    def loss(x: jax.Array, y: jax.Array, scale: jax.Array) -> jax.Array:
        return info_nce(x, y, scale, same_text=same_text, text=text, valid=valid, chunk=chunk).loss

    step = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    for scale in (0.7, 14.3, 300.0):
        value, grads = step(x, y, jnp.float32(scale))
        expected, *expected_grads = dense(x, y, scale, same_text, GROUP, valid)
        np.testing.assert_allclose(value, expected, rtol=2e-5)
        for found, wanted in zip(grads, expected_grads, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=2e-6 * max(scale, 1))


def test_no_valid_pairs_give_zero() -> None:
    x, y = draw(4)
    valid = np.zeros(4, bool)
    value, grads = value_and_grads(
        lambda x, y, s: info_nce(x, y, s, valid=valid, chunk=3).loss, x, y, jnp.float32(5.0)
    )
    assert value == 0.0
    assert not any(g.any() for g in grads)


def test_one_valid_pair_gives_zero() -> None:
    x, y = draw(4)
    valid = np.array([False, True, False, False])
    value, grads = value_and_grads(
        lambda x, y, s: info_nce(x, y, s, valid=valid).loss, x, y, jnp.float32(5.0)
    )
    assert abs(value) < 1e-6
    for g in grads:
        np.testing.assert_allclose(g, 0.0, atol=1e-6)


def test_accuracies() -> None:
    x, y = draw(12)
    scores = x @ y.T
    out = info_nce(x, y, jnp.float32(10.0), chunk=5)
    assert float(out.accuracy_rows) == pytest.approx(np.mean(scores.argmax(1) == np.arange(12)))
    assert float(out.accuracy_columns) == pytest.approx(np.mean(scores.argmax(0) == np.arange(12)))


@pytest.mark.parametrize("same_text", ["negative", "positive"])
def test_local_is_the_mean_over_groups(same_text: SameText) -> None:
    x, y = (a.reshape(3, 4, 6) for a in draw(12))
    group, valid = GROUP.reshape(3, 4), VALID.reshape(3, 4).copy()
    valid[1] = False
    text = hash_texts(jnp.asarray(group)[..., None])

    def loss(x: jax.Array, y: jax.Array, scale: jax.Array) -> jax.Array:
        return local_info_nce(
            x, y, scale, same_text=same_text, text=text, valid=valid, chunk=3
        ).loss

    value, grads = value_and_grads(loss, x, y, jnp.float32(9.0))
    each = [dense(x[w], y[w], 9.0, same_text, group[w], valid[w]) for w in range(3)]
    np.testing.assert_allclose(value, np.mean([e[0] for e in each]), rtol=2e-5)
    np.testing.assert_allclose(grads[0], np.stack([e[1] for e in each]) / 3, atol=2e-5)
    np.testing.assert_allclose(grads[1], np.stack([e[2] for e in each]) / 3, atol=2e-5)
    np.testing.assert_allclose(grads[2], np.mean([e[3] for e in each]), atol=2e-5)


def test_text_is_needed_for_same_text() -> None:
    x, y = draw(4)
    with pytest.raises(ValueError, match="needs `text`"):
        info_nce(x, y, jnp.float32(1.0), same_text="mask")


def test_hashes_tell_texts_apart() -> None:
    """All of 20,000 random texts, and texts that differ by a swap, a shift or one token."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 50, (20_000, 8))
    special = np.array([[1, 2, 3, 0], [2, 1, 3, 0], [0, 1, 2, 3], [1, 2, 3, 3], [1, 2, 4, 0]])
    for texts in (ids, special, np.arange(4096)[:, None] * 2**20):
        hashes = np.asarray(hash_texts(jnp.asarray(texts)))
        distinct = len(np.unique(texts, axis=0))
        assert len(np.unique(hashes, axis=0)) == distinct
    first = np.asarray(hash_texts(jnp.asarray(ids)))[:, 0]
    assert len(np.unique(first)) > 0.999 * len(np.unique(ids, axis=0))


MESHES = (MeshShape(), MeshShape(data=2, fsdp=2, tensor=2), MeshShape(data=1, tensor=8))


@pytest.mark.parametrize("shape", MESHES, ids=["data", "mixed", "tensor"])
@pytest.mark.parametrize("same_text", ["negative", "mask", "positive"])
def test_sharded_equals_dense(shape: MeshShape, same_text: SameText) -> None:
    x, y = draw(48)
    rng = np.random.default_rng(3)
    group, valid = rng.integers(0, 30, 48), rng.random(48) < 0.9
    text = hash_texts(jnp.asarray(group)[:, None])
    mesh = make_mesh(shape)

    def loss(x: jax.Array, y: jax.Array, scale: jax.Array) -> tuple[jax.Array, Contrast]:
        with use_mesh(mesh):
            out = info_nce(x, y, scale, same_text=same_text, text=text, valid=valid, chunk=7)
        return out.loss, out

    rows = sharding_for((48, 6), ("batch", None), mesh)
    args = (*jax.device_put((x, y), rows), jnp.float32(11.0))
    (value, out), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*args)
    expected, *expected_grads = dense(x, y, 11.0, same_text, group, valid)
    np.testing.assert_allclose(value, expected, rtol=2e-5)
    for found, wanted in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=2e-5)
    scores = np.where(valid[:, None] & valid[None], np.float32(11.0) * x @ y.T, -np.inf)
    same = (group[:, None] == group[None]) & (same_text != "negative") | np.eye(48, dtype=bool)
    share = same / np.where(valid, same, 0).sum(axis=1, keepdims=True).clip(1)
    for axis, accuracy in ((1, out.accuracy_rows), (0, out.accuracy_columns)):
        finite = np.where(np.isfinite(scores), scores, 0)
        own = np.diag(finite)
        if same_text == "positive":
            own = (finite * share).sum(axis=1) if axis == 1 else (finite * share.T).sum(axis=0)
        best_other = np.where(same, -np.inf, scores).max(axis=axis)
        hits = (own > best_other)[valid].mean()
        assert float(accuracy) == pytest.approx(hits, abs=1e-6)


def buffer_sizes(hlo: str) -> set[int]:
    """Element counts of every array in a compiled program."""
    shapes = re.findall(r"\b(?:pred|[suf]\d+|bf16)\[([\d,]*)\]", hlo)
    return {int(np.prod([int(d) for d in s.split(",")])) if s else 1 for s in shapes}


@pytest.mark.parametrize("devices", [1, 8])
def test_no_device_holds_the_score_matrix(devices: int) -> None:
    """Forward and backward of a batch of 512, compiled: the largest array of a device is its
    gathered embeddings, not rows x batch, and a dense loss would be caught."""
    size, width, chunk = 512, 16, 32
    mesh = make_mesh(MeshShape(), jax.devices()[:devices])
    rows = sharding_for((size, width), ("batch", None), mesh)

    def largest(fn: Any) -> int:
        def loss(x: jax.Array, y: jax.Array, scale: jax.Array) -> jax.Array:
            with use_mesh(mesh):
                return fn(x, y, scale)

        struct = jax.ShapeDtypeStruct((size, width), jnp.float32, sharding=rows)
        scale = jax.ShapeDtypeStruct((), jnp.float32)
        step = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
        return max(buffer_sizes(step.lower(struct, struct, scale).compile().as_text()))

    def plain(x: jax.Array, y: jax.Array, scale: jax.Array) -> jax.Array:
        scores = scale * x @ y.T
        diagonal = jnp.diagonal(scores)
        by_row, by_column = (jax.nn.logsumexp(scores, axis=a) for a in (1, 0))
        return jnp.mean(by_row + by_column) / 2 - jnp.mean(diagonal)

    local = size // devices
    chunked = largest(lambda x, y, s: info_nce(x, y, s, chunk=chunk).loss)
    assert chunked <= max(size * width, local * chunk)
    assert chunked < local * size
    assert largest(plain) >= local * size


def test_global_batch_of_131072_lowers() -> None:
    """The published scale: nothing with rows x batch elements even before optimisation."""
    size, width, chunk = 131_072, 512, 1024
    mesh = make_mesh(MeshShape())
    rows = sharding_for((size, width), ("batch", None), mesh)

    def loss(x: jax.Array, y: jax.Array, scale: jax.Array) -> jax.Array:
        with use_mesh(mesh):
            return info_nce(x, y, scale, chunk=chunk).loss

    struct = jax.ShapeDtypeStruct((size, width), jnp.float32, sharding=rows)
    scale = jax.ShapeDtypeStruct((), jnp.float32)
    step = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    assert [s.shape for s in jax.eval_shape(step, struct, struct, scale)[1]] == [
        (size, width),
        (size, width),
        (),
    ]
    text = step.lower(struct, struct, scale).as_text()
    shapes = re.findall(r"tensor<((?:\d+x)+)[a-z]", text)
    largest = max(int(np.prod([int(d) for d in s.split("x")[:-1]])) for s in shapes)
    assert largest <= size * width
