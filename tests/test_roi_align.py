"""RoIAlign against nested loops in float64, and the edge cases of its sample grid."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmods.nn.positions import cubic_matrix, resize_grid
from jaxmods.nn.roi_align import roi_align, roi_weights


def loops(features: np.ndarray, box: np.ndarray) -> np.ndarray:
    """torchvision's kernel for one box on [rows, columns, C]: grid in float32, sums in float64."""
    rows, columns, channels = features.shape
    x1, y1, x2, y2 = (np.float32(v) - np.float32(0.5) for v in box)
    height, width = y2 - y1, x2 - x1
    gh, gw = math.ceil(height), math.ceil(width)
    total = np.zeros(channels)
    for i in range(max(gh, 0)):
        for j in range(max(gw, 0)):
            y = float(y1) + (i + 0.5) * float(height) / gh
            x = float(x1) + (j + 0.5) * float(width) / gw
            if y < -1 or y > rows or x < -1 or x > columns:
                continue
            y, x = max(y, 0.0), max(x, 0.0)
            top, left = min(int(y), rows - 1), min(int(x), columns - 1)
            below, right = min(top + 1, rows - 1), min(left + 1, columns - 1)
            dy, dx = y - top, x - left
            total += (1 - dy) * ((1 - dx) * features[top, left] + dx * features[top, right])
            total += dy * ((1 - dx) * features[below, left] + dx * features[below, right])
    return total / max(gh * gw, 1)


BOXES = {
    "whole map": (0.0, 0.0, 1.0, 1.0),
    "one cell": (0.25, 0.25, 0.375, 0.375),
    "thin": (0.1, 0.2, 0.9, 0.21),
    "fractions": (0.123, 0.456, 0.789, 0.987),
    "right edge": (0.9, 0.9, 1.0, 1.0),
    "outside": (-0.3, 0.5, 0.4, 1.4),
    "larger than the map": (-0.2, -0.2, 1.3, 1.3),
    "empty": (0.0, 0.0, 0.0, 0.0),
    "line": (0.2, 0.3, 0.2, 0.8),
    "inverted": (0.8, 0.8, 0.2, 0.2),
}


@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES.keys())
@pytest.mark.parametrize("size", [(7, 7), (8, 5)])
def test_equals_loops(box: tuple[float, ...], size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(2, *size, 3)).astype(np.float32)
    scale = np.array([size[1], size[0]] * 2, np.float32)
    cells = np.array(box, np.float32) * scale
    boxes = np.stack([cells, cells * np.float32(0.9)])[None].repeat(2, axis=0)
    found = jax.jit(roi_align)(features, boxes)
    for b in range(2):
        for n in range(2):
            np.testing.assert_allclose(
                found[b, n], loops(features[b], boxes[b, n]), rtol=1e-5, atol=1e-6
            )


def test_zero_box_is_exactly_zero() -> None:
    features = jnp.full((1, 4, 4, 2), 1e6)
    assert not np.asarray(roi_align(features, jnp.zeros((1, 1, 4)))).any()


@pytest.mark.parametrize("cells", [14, 24])
def test_grid_count_is_the_ceiling_in_float32(cells: int) -> None:
    """Sides that are whole numbers in exact arithmetic but may round up in float32."""
    fractions = np.arange(1, cells, dtype=np.float32) / np.float32(cells)
    low, high = np.meshgrid(fractions, fractions)
    edges = np.stack([low, low, high, high], -1)[high > low] * np.float32(cells)
    constant = np.ones((1, cells, cells, 1), np.float32)
    weights, _ = jax.jit(lambda b: roi_weights(b, (cells, cells)))(edges)
    for box, row in zip(edges, np.asarray(weights), strict=True):
        length = (box[3] - np.float32(0.5)) - (box[1] - np.float32(0.5))
        count = math.ceil(length)
        at = (box[1] - np.float32(0.5)) + (np.arange(count) + 0.5) * float(length) / count
        hats = np.maximum(1 - np.abs(np.clip(at, 0, cells - 1)[:, None] - np.arange(cells)), 0)
        np.testing.assert_allclose(row, hats.mean(axis=0), atol=2e-6)
    np.testing.assert_allclose(roi_align(constant, edges[None]), 1.0, atol=1e-5)


def test_gradient_reaches_features_only() -> None:
    features = jnp.ones((1, 4, 4, 2))
    boxes = jnp.array([[[0.3, 0.4, 2.6, 3.1]]])
    d_features, d_boxes = jax.grad(lambda f, b: roi_align(f, b).sum(), (0, 1))(features, boxes)
    np.testing.assert_allclose(d_features.sum(), 2.0, rtol=1e-6)
    assert not np.asarray(d_boxes).any()


@pytest.mark.parametrize(("source", "target"), [(4, 6), (4, 3), (7, 7), (14, 24), (1, 3)])
def test_position_resize_equals_torch(source: int, target: int) -> None:
    torch = pytest.importorskip("torch")
    grid = np.random.default_rng(0).normal(size=(source, source + 1, 3)).astype(np.float32)
    expected = torch.nn.functional.interpolate(
        torch.tensor(grid.transpose(2, 0, 1))[None],
        size=(target, target + 2),
        mode="bicubic",
        align_corners=False,
    )[0]
    found = resize_grid(jnp.asarray(grid), (target, target + 2))
    np.testing.assert_allclose(found, expected.permute(1, 2, 0).numpy(), atol=1e-5)
    np.testing.assert_allclose(cubic_matrix(source, target).sum(axis=1), 1.0, atol=1e-12)
