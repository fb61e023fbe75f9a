"""Convolution, group norm and doubling against float64 references and PyTorch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmods.nn.conv import Conv2d, GroupNorm, double_nearest, group_norm
from jaxmods.nn.layers import rms_norm


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("shape", [(2, 5, 12), (2, 3, 4, 12), (2, 2, 3, 4, 12)])
@pytest.mark.parametrize("activation", ["none", "silu"])
def test_group_norm(shape: tuple[int, ...], activation: str) -> None:
    """Any number of spatial dimensions, and a mean a thousand times the deviation."""
    x = 1000 + draw(*shape)
    scale, bias = draw(12, seed=1), draw(12, seed=2)
    wide = x.astype(np.float64).reshape(2, -1, 3, 4)
    mean, variance = (f(wide, axis=(1, 3), keepdims=True) for f in (np.mean, np.var))
    expected = ((wide - mean) / np.sqrt(variance + 1e-6)).reshape(shape) * scale + bias
    if activation == "silu":
        expected = expected / (1 + np.exp(-expected))
    # One unit in the last place of 1000 is 6e-5.
    np.testing.assert_allclose(group_norm(x, scale, bias, 3, 1e-6, activation), expected, atol=2e-4)


def test_group_norm_needs_groups_that_divide() -> None:
    with pytest.raises(ValueError, match="that 5 groups divide, found 12"):
        jax.eval_shape(lambda: GroupNorm(5).init(jax.random.key(0), jnp.zeros((1, 2, 12))))


@pytest.mark.parametrize(
    ("size", "stride", "padding"), [(3, 1, None), (1, 1, None), (3, 2, (0, 1))]
)
def test_convolution(size: int, stride: int, padding: tuple[int, int] | None) -> None:
    torch = pytest.importorskip("torch")
    x, kernel, bias = draw(2, 6, 8, 3), draw(size, size, 3, 5, seed=1), draw(5, seed=2)
    low, high = ((size - 1) // 2,) * 2 if padding is None else padding
    expected = torch.nn.functional.conv2d(
        torch.nn.functional.pad(torch.tensor(x).permute(0, 3, 1, 2), (low, high, low, high)),
        torch.tensor(kernel).permute(3, 2, 0, 1),
        torch.tensor(bias),
        stride,
    )
    found = Conv2d(5, size, stride, padding).apply({"params": {"kernel": kernel, "bias": bias}}, x)
    np.testing.assert_allclose(found, expected.permute(0, 2, 3, 1), atol=1e-5)


def test_doubling() -> None:
    x = draw(2, 3, 4, 5)
    np.testing.assert_array_equal(double_nearest(x), x.repeat(2, axis=1).repeat(2, axis=2))


def test_rms_norm() -> None:
    x, scale = 50 * draw(3, 4, 16), draw(16, seed=1)
    wide = x.astype(np.float64)
    expected = wide / np.sqrt(np.mean(wide**2, axis=-1, keepdims=True) + 1e-6) * scale
    np.testing.assert_allclose(rms_norm(x, scale, 1e-6), expected, atol=1e-5)
    assert rms_norm(x, scale.astype(jnp.bfloat16), 1e-6).dtype == jnp.bfloat16
