"""LPIPS with SqueezeNet 1.1 (Zhang et al. 2018), as torchmetrics' `net_type="squeeze"`.

Features after seven stages are normalised per pixel, their squared differences weighted by a
learned vector per stage and averaged over the picture. Tensors have the names of torchvision's
`squeezenet1_1` (`features.*`) and of the published heads `squeeze.pth` (`lin0.model.1.weight` to
`lin6...`); the files are given by the user (PyTorch's need PyTorch to be read, safetensors do not).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from jaxmods.metrics.convnet import Array, Conv, checked, max_pool, rectified, tensor_shapes

_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)
_WIDTHS = (64, 128, 256, 384, 384, 512, 512)
_EPS = 1e-8  # under the root of the length
# Squeeze and expand widths of the fire modules by their number in `features`.
_FIRES = {3: (16, 64), 4: (16, 64), 6: (32, 128), 7: (32, 128), 9: (48, 192), 10: (48, 192),
          11: (64, 256), 12: (64, 256)}  # fmt: skip
_POOLS = (2, 5, 8)
_LAST_OF_STAGE = (1, 4, 7, 9, 10, 11, 12)

Params = dict[str, np.ndarray]


def network(conv: Conv, x: Array) -> list[Array]:
    """Features after the seven stages, of scaled pictures [N, H, W, 3]."""
    stages = []
    for number in range(13):
        if number == 0:
            x = conv(x, "features.0", 64, (3, 3), 2)
        elif number in _POOLS:
            x = max_pool(x, ceil=True)
        elif number in _FIRES:
            squeeze, expand = _FIRES[number]
            name = f"features.{number}"
            small = conv(x, f"{name}.squeeze", squeeze)
            one = conv(small, f"{name}.expand1x1", expand)
            three = conv(small, f"{name}.expand3x3", expand, (3, 3), padding=(1, 1))
            x = jnp.concatenate([one, three], -1)
        if number in _LAST_OF_STAGE:
            stages.append(x)
    return stages


def _head(stage: int) -> str:
    return f"lin{stage}.model.1.weight"


@functools.cache
def shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of network and heads."""
    own = tensor_shapes(
        network, lambda name, weight: {f"{name}.weight": weight, f"{name}.bias": weight[:1]}
    )
    return {**own, **{_head(i): (1, width, 1, 1) for i, width in enumerate(_WIDTHS)}}


def load(tensors: Mapping[str, np.ndarray], sources: Sequence[str] = ("the tensors",)) -> Params:
    """Parameters for `distance`.

    Raises:
      ValueError: tensors are missing or have another shape.
    """
    return checked("LPIPS weights", tensors, shapes(), sources)


def distance(params: Params, first: Array, second: Array) -> Array:
    """LPIPS of each pair; jit-able.

    Args:
      params: from `load`.
      first, second: float32 [N, H, W, 3] in 0..1 (the networks see -1..1), H and W at least 35.

    Returns:
      float32 [N].
    """
    shift, scale = jnp.asarray(_SHIFT, jnp.float32), jnp.asarray(_SCALE, jnp.float32)

    def stages(pictures: Array) -> list[Array]:
        found = network(rectified(params), ((2 * pictures - 1) - shift) / scale)
        return [x / jnp.sqrt(_EPS + jnp.sum(x * x, -1, keepdims=True)) for x in found]

    total = jnp.zeros(first.shape[0])
    for i, (a, b) in enumerate(zip(stages(first), stages(second), strict=True)):
        weight = jnp.asarray(params[_head(i)])[0, :, 0, 0]
        total += jnp.mean(jnp.square(a - b) @ weight, axis=(1, 2))
    return total
