"""Features for FID and KID: Inception v3 as trained in 2015, in the form that FID uses.

The network is that of `inception-2015-12-05`, which clean-fid and pytorch-fid compute with: average
pools that do not count the padding, and a maximum pool in the last block. Tensors have the names of
pytorch-fid's `pt_inception-2015-12-05-6726825d.pth` (torchvision's names), to be given by the user
(as they are, which needs PyTorch to read them, or converted to safetensors).

Pictures come in at 299 x 299, levels 0..255; the network sees `(x - 128) / 128`, as in clean-fid.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from jaxmods.metrics.convnet import (
    Array,
    Conv,
    average_pool,
    checked,
    max_pool,
    rectified,
    tensor_shapes,
)

SIDE, WIDTH = 299, 2048
_EPS = 0.001  # of the batch norms

Params = dict[str, np.ndarray]


def network(conv: Conv, x: Array) -> Array:
    """[N, H, W, 3], -1..1, to the mean of the last block's features [N, 2048]."""
    x = conv(x, "Conv2d_1a_3x3", 32, (3, 3), 2)
    x = conv(x, "Conv2d_2a_3x3", 32, (3, 3))
    x = max_pool(conv(x, "Conv2d_2b_3x3", 64, (3, 3), padding=(1, 1)))
    x = conv(x, "Conv2d_3b_1x1", 80)
    x = max_pool(conv(x, "Conv2d_4a_3x3", 192, (3, 3)))
    for letter, pooled in (("b", 32), ("c", 64), ("d", 64)):
        x = _five(conv, x, f"Mixed_5{letter}", pooled)
    x = _reduce_five(conv, x, "Mixed_6a")
    for letter, width in (("b", 128), ("c", 160), ("d", 160), ("e", 192)):
        x = _six(conv, x, f"Mixed_6{letter}", width)
    x = _reduce_six(conv, x, "Mixed_7a")
    x = _seven(conv, x, "Mixed_7b", average_pool(x))
    x = _seven(conv, x, "Mixed_7c", max_pool(x, stride=1, padding=1))
    return x.mean(axis=(1, 2))


def _chain(conv: Conv, x: Array, *steps: tuple[str, int, tuple[int, int]]) -> Array:
    """Convolutions one after the other, each of the same size as its input."""
    for name, out, kernel in steps:
        x = conv(x, name, out, kernel, padding=(kernel[0] // 2, kernel[1] // 2))
    return x


def _five(conv: Conv, x: Array, name: str, pooled: int) -> Array:
    fives, threes = f"{name}.branch5x5_", f"{name}.branch3x3dbl_"
    branches = [
        conv(x, f"{name}.branch1x1", 64),
        _chain(conv, x, (f"{fives}1", 48, (1, 1)), (f"{fives}2", 64, (5, 5))),
        _chain(
            conv,
            x,
            (f"{threes}1", 64, (1, 1)),
            (f"{threes}2", 96, (3, 3)),
            (f"{threes}3", 96, (3, 3)),
        ),
        conv(average_pool(x), f"{name}.branch_pool", pooled),
    ]
    return jnp.concatenate(branches, -1)


def _reduce_five(conv: Conv, x: Array, name: str) -> Array:
    threes = f"{name}.branch3x3dbl_"
    double = _chain(conv, x, (f"{threes}1", 64, (1, 1)), (f"{threes}2", 96, (3, 3)))
    branches = [
        conv(x, f"{name}.branch3x3", 384, (3, 3), 2),
        conv(double, f"{threes}3", 96, (3, 3), 2),
        max_pool(x),
    ]
    return jnp.concatenate(branches, -1)


def _six(conv: Conv, x: Array, name: str, width: int) -> Array:
    single, double = f"{name}.branch7x7_", f"{name}.branch7x7dbl_"
    branches = [
        conv(x, f"{name}.branch1x1", 192),
        _chain(
            conv,
            x,
            (f"{single}1", width, (1, 1)),
            (f"{single}2", width, (1, 7)),
            (f"{single}3", 192, (7, 1)),
        ),
        _chain(
            conv,
            x,
            (f"{double}1", width, (1, 1)),
            (f"{double}2", width, (7, 1)),
            (f"{double}3", width, (1, 7)),
            (f"{double}4", width, (7, 1)),
            (f"{double}5", 192, (1, 7)),
        ),
        conv(average_pool(x), f"{name}.branch_pool", 192),
    ]
    return jnp.concatenate(branches, -1)


def _reduce_six(conv: Conv, x: Array, name: str) -> Array:
    threes, sevens = f"{name}.branch3x3_", f"{name}.branch7x7x3_"
    seven = _chain(
        conv,
        x,
        (f"{sevens}1", 192, (1, 1)),
        (f"{sevens}2", 192, (1, 7)),
        (f"{sevens}3", 192, (7, 1)),
    )
    branches = [
        conv(conv(x, f"{threes}1", 192), f"{threes}2", 320, (3, 3), 2),
        conv(seven, f"{sevens}4", 192, (3, 3), 2),
        max_pool(x),
    ]
    return jnp.concatenate(branches, -1)


def _seven(conv: Conv, x: Array, name: str, pooled: Array) -> Array:
    threes, doubles = f"{name}.branch3x3_", f"{name}.branch3x3dbl_"

    def pair(y: Array, prefix: str) -> list[Array]:
        return [
            conv(y, f"{prefix}a", 384, (1, 3), padding=(0, 1)),
            conv(y, f"{prefix}b", 384, (3, 1), padding=(1, 0)),
        ]

    double = _chain(conv, x, (f"{doubles}1", 448, (1, 1)), (f"{doubles}2", 384, (3, 3)))
    branches = [
        conv(x, f"{name}.branch1x1", 320),
        *pair(conv(x, f"{threes}1", 384), f"{threes}2"),
        *pair(double, f"{doubles}3"),
        conv(pooled, f"{name}.branch_pool", 192),
    ]
    return jnp.concatenate(branches, -1)


def _tensors_of(name: str, weight: tuple[int, int, int, int]) -> dict[str, tuple[int, ...]]:
    norm = {f"{name}.bn.{k}": weight[:1] for k in ("weight", "bias", "running_mean", "running_var")}
    return {f"{name}.conv.weight": weight, **norm}


@functools.cache
def shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that the network needs."""
    return tensor_shapes(network, _tensors_of)


def load(tensors: Mapping[str, np.ndarray], sources: Sequence[str] = ("the tensors",)) -> Params:
    """Parameters for `features`: each batch norm folded into its convolution.

    Raises:
      ValueError: tensors are missing or have another shape.
    """
    found = checked("Inception weights", tensors, shapes(), sources)
    params = {}
    for name in (k.removesuffix(".conv.weight") for k in found if k.endswith(".conv.weight")):
        scale = found[f"{name}.bn.weight"] / np.sqrt(found[f"{name}.bn.running_var"] + _EPS)
        params[f"{name}.weight"] = found[f"{name}.conv.weight"] * scale[:, None, None, None]
        params[f"{name}.bias"] = found[f"{name}.bn.bias"] - found[f"{name}.bn.running_mean"] * scale
    return params


def features(params: Params, pictures: Array) -> Array:
    """Features of prepared pictures; jit-able.

    Args:
      params: from `load`.
      pictures: float32 [N, H, W, 3], 0..255; 299 x 299 for published numbers.

    Returns:
      float32 [N, 2048].
    """
    return network(rectified(params), (pictures - 128) / 128)
