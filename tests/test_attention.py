"""Attention against a float64 reference; implementations against each other."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmods.nn.attention import attention


def reference(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, visible: np.ndarray, scale: float
) -> np.ndarray:
    """[B, H, T, D] in float64; k and v heads are repeated as needed."""
    repeat = q.shape[1] // k.shape[1]
    q, k, v = (a.astype(np.float64) for a in (q, k.repeat(repeat, 1), v.repeat(repeat, 1)))
    scores = np.where(visible, scale * np.einsum("bhtd,bhsd->bhts", q, k), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhts,bhsd->bhtd", weights / weights.sum(-1, keepdims=True), v)


def draw(b: int, h: int, kv: int, t: int, s: int, d: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = ((b, h, t, d), (b, kv, s, d), (b, kv, s, d))
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (3, 9)])
def test_xla_equals_reference(
    heads: int, kv_heads: int, causal: bool, queries: int, keys: int
) -> None:
    q, k, v = draw(2, heads, kv_heads, queries, keys, 8)
    visible = np.ones((queries, keys), bool)
    if causal:
        visible = np.tril(visible, keys - queries)
    found = attention(q, k, v, causal=causal, implementation="xla")
    np.testing.assert_allclose(found, reference(q, k, v, visible, 8**-0.5), atol=2e-6)


def test_mask_segments_and_scale() -> None:
    q, k, v = draw(2, 2, 2, 4, 6, 8)
    q_segments, kv_segments = np.array([[0, 0, 1, 1]] * 2), np.array([[0, 0, 0, 1, 1, 1]] * 2)
    mask = np.random.default_rng(1).random((2, 1, 4, 6)) < 0.6
    mask[..., [0, 3]] = True  # at least one key of each segment
    same = (q_segments[:, :, None] == kv_segments[:, None, :])[:, None]
    found = attention(q, k, v, mask=mask, q_segments=q_segments, kv_segments=kv_segments, scale=0.3)
    np.testing.assert_allclose(found, reference(q, k, v, mask & same, 0.3), atol=2e-6)


def test_bias_is_added_to_the_scaled_scores() -> None:
    q, k, v = draw(2, 2, 2, 4, 6, 8)
    bias = np.random.default_rng(1).normal(size=(1, 2, 4, 6)).astype(np.float32)
    mask = np.random.default_rng(2).random((2, 1, 1, 6)) < 0.7
    scores = 0.3 * np.einsum("bhtd,bhsd->bhts", q.astype(np.float64), k) + bias
    scores = np.where(mask, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = np.einsum("bhts,bhsd->bhtd", weights / weights.sum(-1, keepdims=True), v)
    found = attention(q, k, v, bias=bias, mask=mask, scale=0.3)
    # float32 against float64, as everywhere here: outputs of about 1, six products each.
    np.testing.assert_allclose(found, expected, atol=2e-6)
    with pytest.raises(ValueError, match="it takes no bias"):
        attention(q, k, v, bias=bias, implementation="flash")


def test_query_without_keys_gets_the_mean() -> None:
    q, k, v = draw(1, 1, 1, 2, 3, 4)
    found = attention(q, k, v, mask=np.zeros((1, 1, 2, 3), bool))
    np.testing.assert_allclose(found[0, 0, 0], v[0, 0].mean(axis=0), atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("segments", [False, True])
def test_flash_equals_xla(causal: bool, segments: bool) -> None:
    """The TPU kernel in the interpreter, on a length that needs padding, with gradients."""
    q, k, v = draw(1, 2, 2, 200, 200, 16)
    ids = np.repeat([[0, 1]], 100, axis=1).astype(np.int32) if segments else None
    weight = np.random.default_rng(2).normal(size=q.shape).astype(np.float32)

    def run(implementation: str) -> list[np.ndarray]:
        call = functools.partial(
            attention,
            causal=causal,
            q_segments=ids,
            kv_segments=ids,
            implementation=implementation,  # type: ignore[arg-type]  # a Literal by its cases
        )
        out, vjp = jax.vjp(call, *(jnp.asarray(a) for a in (q, k, v)))
        return [np.asarray(a) for a in (out, *vjp(jnp.asarray(weight)))]

    for found, expected in zip(run("flash"), run("xla"), strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-5, rtol=2e-5)


def test_half_precision_keeps_scores_in_float32() -> None:
    q, k, v = draw(1, 2, 2, 7, 7, 8)
    half = [jnp.asarray(a, jnp.bfloat16) for a in (q, k, v)]
    found = attention(*half)
    assert found.dtype == jnp.bfloat16
    wide = [np.asarray(a, np.float32) for a in half]
    expected = reference(*wide, np.ones((7, 7), bool), 8**-0.5)
    np.testing.assert_allclose(np.asarray(found, np.float32), expected, atol=2e-2)


def test_errors_name_the_shapes() -> None:
    q, k, v = draw(1, 4, 3, 5, 5, 8)
    with pytest.raises(ValueError, match=r"4 query heads.*found 3"):
        attention(q, k, v)
    with pytest.raises(ValueError, match=r"found k \(1, 3, 5, 8\) and v \(1, 3, 4, 8\)"):
        attention(q, k, v[:, :, :4])
    with pytest.raises(ValueError, match="together"):
        attention(q, k[:, :2], v[:, :2], q_segments=np.zeros((1, 5)))
    mask = np.ones((1, 1, 5, 5), bool)
    with pytest.raises(ValueError, match="segments but no explicit mask"):
        attention(q, k[:, :2], v[:, :2], mask=mask, implementation="flash")
