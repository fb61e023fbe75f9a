"""The chunked cross-entropy against float64 formulas, its buffers, and what it leaves out."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmods.objectives.cross_entropy import IGNORE, next_token_labels, token_cross_entropy

ROWS, POSITIONS, WIDTH, VOCABULARY = 3, 14, 8, 21


def draw() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(states, head, labels, weights); the second row is ignored as a whole."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, VOCABULARY, (ROWS, POSITIONS))
    labels[rng.random(labels.shape) < 0.3] = IGNORE
    labels[1] = IGNORE
    return (
        rng.normal(size=(ROWS, POSITIONS, WIDTH)).astype(np.float32),
        rng.normal(size=(WIDTH, VOCABULARY)).astype(np.float32),
        labels,
        rng.random(labels.shape).astype(np.float32),
    )


def reference(
    states: np.ndarray, head: np.ndarray, labels: np.ndarray, weights: np.ndarray
) -> tuple[float, float, np.ndarray, np.ndarray]:
    """Loss, accuracy, and the gradients of states and head, in float64."""
    states, head = states.astype(np.float64), head.astype(np.float64)
    weights = np.where(labels == IGNORE, 0.0, weights.astype(np.float64))
    weights = weights / weights.sum()
    logits = states @ head
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    softmax = shifted / shifted.sum(-1, keepdims=True)
    one = np.eye(VOCABULARY)[np.where(labels == IGNORE, 0, labels)]
    loss = -(weights * np.log((softmax * one).sum(-1))).sum()
    hit = (weights * (logits.argmax(-1) == labels)).sum()
    slope = weights[..., None] * (softmax - one)
    return loss, hit, slope @ head.T, np.einsum("btd,btv->dv", states, slope)


@pytest.mark.parametrize("piece", [1, 6, 9, 1024])
def test_values_and_gradients(piece: int) -> None:
    """For every cut into pieces, also those that do not divide the length: within 1e-5."""
    states, head, labels, weights = draw()

    def objective(states: jax.Array, head: jax.Array) -> Any:
        out = token_cross_entropy(states, head, labels, weights_BT=weights, piece=piece)
        return 2.0 * out.loss, out

    (_, out), grads = jax.jit(jax.value_and_grad(objective, (0, 1), has_aux=True))(states, head)
    loss, accuracy, of_states, of_head = reference(states, head, labels, weights)
    np.testing.assert_allclose(out.loss, loss, rtol=1e-5)
    np.testing.assert_allclose(out.accuracy, accuracy, rtol=1e-5)
    np.testing.assert_allclose(out.weight, weights[labels != IGNORE].sum(), rtol=1e-5)
    for found, expected in zip(grads, (of_states, of_head), strict=True):
        np.testing.assert_allclose(found, 2 * expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    # Without a gradient the same value comes from another program.
    plain, _ = jax.jit(objective)(states, head)
    np.testing.assert_allclose(plain, 2 * loss, rtol=1e-5)


def test_nothing_counted() -> None:
    states, head, labels, _ = draw()
    grad = jax.grad(lambda s: token_cross_entropy(s, head, jnp.full_like(labels, IGNORE)).loss)
    assert float(token_cross_entropy(states, head, np.full_like(labels, IGNORE)).loss) == 0
    assert not np.asarray(grad(jnp.asarray(states))).any()


def test_next_token_labels() -> None:
    labels = np.array([[5, IGNORE, 7], [1, 2, 3]])
    expected = [[IGNORE, 7, IGNORE], [2, 3, IGNORE]]
    assert next_token_labels(jnp.asarray(labels)).tolist() == expected


def compiled(train_head: bool) -> str:
    """The program of loss and gradients for 4 x 512 tokens and a vocabulary of 4,096."""
    sizes = [(4, 512, 16), (16, 4096)]
    arrays = [jax.ShapeDtypeStruct(size, jnp.float32) for size in sizes]
    labels = jax.ShapeDtypeStruct((4, 512), jnp.int32)

    def objective(states: jax.Array, head: jax.Array, labels: jax.Array) -> jax.Array:
        if not train_head:
            head = jax.lax.stop_gradient(head)
        return token_cross_entropy(states, head, labels, piece=256).loss

    step = jax.jit(jax.value_and_grad(objective, (0, 1) if train_head else 0))
    return step.lower(*arrays, labels).compile().as_text()


def buffers(hlo: str) -> list[int]:
    shapes = re.findall(r"\b(?:pred|[suf]\d+|bf16)\[([\d,]+)\]", hlo)
    return [int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes]


def test_the_logits_never_exist_at_once() -> None:
    """The largest buffer of forward and backward pass is a piece's logits."""
    assert max(buffers(compiled(True))) == 256 * 4096


def test_a_frozen_head_has_no_gradient_computed() -> None:
    """Fewer products: logits and gradient of the states, without the head's."""
    products = [compiled(train).count(" dot(") for train in (True, False)]
    assert products == [3, 2]


def test_bad_shapes() -> None:
    states, head, labels, _ = draw()
    with pytest.raises(ValueError, match=r"labels \[B, T\] = \(3, 14\), found \(3, 13\)"):
        token_cross_entropy(states, head, labels[:, 1:])
    with pytest.raises(ValueError, match=r"head \[D, V\] with D = 8, found \(21, 8\)"):
        token_cross_entropy(states, head.T, labels)
