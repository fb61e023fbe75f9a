"""The TPU kernel, in Pallas' interpreter, equals plain attention: values and gradients."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmods.nn import flash_tpu
from jaxmods.nn.attention import attention
from jaxmods.partitioning import MeshShape, make_mesh, use_mesh


@dataclasses.dataclass(frozen=True)
class Case:
    batch: int = 2
    heads: int = 2
    kv_heads: int = 2
    queries: int = 130
    keys: int = 130
    width: int = 8
    value_width: int | None = None
    causal: bool = False
    segments: bool = False


CASES = {
    "padded": Case(),
    "causal": Case(causal=True),
    "causal, more keys than queries": Case(queries=100, keys=300, causal=True),
    "cross": Case(queries=40, keys=200),
    "grouped heads": Case(heads=4, kv_heads=2),
    "one key head": Case(heads=2, kv_heads=1, causal=True),
    "head width off the tile": Case(width=20, value_width=12),
    "segments": Case(segments=True),
    "segments, causal": Case(segments=True, causal=True),
    "several tiles": Case(batch=1, queries=1100, keys=1100, causal=True),
}


def arrays(case: Case) -> tuple[list[jax.Array], dict[str, jax.Array]]:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    kv = (case.batch, case.kv_heads, case.keys)
    q = normal(case.batch, case.heads, case.queries, case.width)
    segments = {}
    if case.segments:
        ids = np.sort(rng.integers(0, 3, (case.batch, case.keys)), axis=1)
        segments = {
            "q_segments": jnp.asarray(ids[:, : case.queries]),
            "kv_segments": jnp.asarray(ids),
        }
    return [q, normal(*kv, case.width), normal(*kv, case.value_width or case.width)], segments


def value_and_grads(implementation, case, qkv, segments):
    def scalar(q, k, v):
        out = attention(q, k, v, causal=case.causal, implementation=implementation, **segments)
        weights = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        return jnp.sum(weights * out), out

    (_, out), grads = jax.jit(jax.value_and_grad(scalar, (0, 1, 2), has_aux=True))(*qkv)
    return out, *grads


def assert_equal(found, expected):
    for name, a, b in zip(("output", "dq", "dk", "dv"), found, expected, strict=True):
        assert a.shape == b.shape
        error = float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
        assert error < 1e-5, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("name", CASES)
def test_equals_plain_attention(name):
    case = CASES[name]
    qkv, segments = arrays(case)
    assert_equal(
        value_and_grads("flash", case, qkv, segments),
        value_and_grads("xla", case, qkv, segments),
    )


@pytest.mark.parametrize(
    ("shape", "case"),
    [
        (MeshShape(data=2, tensor=2, context=2), Case(queries=200, keys=200)),
        (MeshShape(data=2, context=4), Case(queries=600, keys=600, causal=True)),
        (MeshShape(data=2, tensor=4), Case(heads=4, kv_heads=2, causal=True)),
        (
            MeshShape(data=1, fsdp=2, tensor=2, context=2),
            Case(heads=4, kv_heads=2, segments=True, causal=True),
        ),
    ],
    ids=["heads and context", "causal context", "fewer key heads than devices", "all of it"],
)
def test_split_over_a_mesh_equals_plain_attention(shape, case):
    qkv, segments = arrays(case)
    expected = value_and_grads("xla", case, qkv, segments)
    with use_mesh(make_mesh(shape)):
        found = value_and_grads("flash", case, qkv, segments)
    assert_equal(found, expected)


def test_tiles_waste_least():
    assert {n: flash_tpu._block(n) for n in (77, 197, 577, 729, 1152, 2048, 4173)} == {
        77: 128,
        197: 256,
        577: 640,
        729: 768,
        1152: 384,
        2048: 512,
        4173: 384,
    }


def test_off_the_tpu_it_is_not_chosen_by_itself():
    assert not flash_tpu.pays(4096, 4096)


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ({"causal": False, "masked": True}, "no explicit mask"),
        ({"causal": True, "masked": False}, "at least as many keys"),
    ],
)
def test_says_what_it_cannot_do(kwargs, reason):
    assert reason in flash_tpu.supports(8, 4, **kwargs)
    assert flash_tpu.supports(4, 4, causal=True, masked=False) is None


def test_an_explicit_mask_is_refused():
    q = jnp.ones((1, 1, 4, 8))
    with pytest.raises(ValueError, match="no explicit mask"):
        attention(q, q, q, mask=jnp.ones((1, 1, 4, 4), bool), implementation="flash")
