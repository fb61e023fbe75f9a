"""What the tests against live PyTorch classes share: weights over, gradients compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import pytest

from jaxmods import partitioning
from jaxmods.weights import WeightError, WeightMap, export_tensors, import_params, memory_reader

torch = pytest.importorskip("torch")


def relative(a: Any, b: Any) -> float:
    """‖a - b‖ / ‖b‖ in float64."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def perturbed(model: Any, seed: int = 0, std: float = 0.1) -> Any:
    """`model` with noise on every parameter, so that no bias is 0 and no norm scale 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(std * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def abstract_of(init: Callable[[jax.Array], Any]) -> Any:
    """Shapes of the parameters that `init(rng)` (variables with boxes) makes."""
    return partitioning.unbox(jax.eval_shape(init, jax.random.key(0)))["params"]


def count(abstract: Any) -> int:
    """Number of parameters."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(abstract))


def state_of(model: Any) -> dict[str, np.ndarray]:
    """The state dict as NumPy arrays."""
    return {k: v.detach().numpy() for k, v in model.state_dict().items()}


def imported(state: Mapping[str, np.ndarray], weight_map: WeightMap, abstract: Any) -> Any:
    """The parameters of a state dict."""
    with memory_reader(dict(state)) as reader:
        return import_params(reader, weight_map, abstract).params


def exported(params: Any, weight_map: WeightMap) -> dict[str, np.ndarray]:
    """The state dict of parameters (or of their gradients)."""
    return {k: np.asarray(v.all()) for k, v in export_tensors(params, weight_map).items()}


def assert_round_trip(state: Mapping[str, np.ndarray], weight_map: WeightMap, abstract: Any) -> Any:
    """PyTorch → JAX → PyTorch is bit-equal and strict on both sides; returns the parameters."""
    params = imported(state, weight_map, abstract)
    back = exported(params, weight_map)
    assert back.keys() == state.keys()
    for key, value in state.items():
        assert back[key].dtype == value.dtype
        assert back[key].tobytes() == np.ascontiguousarray(value).tobytes(), key
    first = next(
        k for k in state if k.endswith(("norm1.weight", "layer_norm.weight", "layernorm.weight"))
    )
    with pytest.raises(WeightError, match=r"1 extra"):
        imported({**state, "no_such.weight": state[first]}, weight_map, abstract)
    with pytest.raises(WeightError, match=r"1 missing"):
        imported({k: v for k, v in state.items() if k != first}, weight_map, abstract)
    return params


def assert_same_gradients(model: Any, ours: Mapping[str, np.ndarray], tolerance: float) -> None:
    """Every parameter's gradient within `tolerance`, relative to its norm.

    A gradient that is exactly zero (a key bias: it moves all scores of a query alike) is rounding
    noise on both sides, so 1e-6 of the largest gradient is always allowed.
    """
    grads = {k: p.grad.numpy() for k, p in model.named_parameters() if p.grad is not None}
    assert grads
    largest = max(float(np.abs(g).max()) for g in grads.values())
    for name, parameter in model.named_parameters():
        expected = grads.get(name, np.zeros(parameter.shape, np.float32))
        error = np.linalg.norm(ours[name] - expected)
        assert error < tolerance * np.linalg.norm(expected) + 1e-6 * largest, name
