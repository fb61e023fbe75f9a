"""What the fixed convolutional networks of metrics share: convolutions, pools, their tensors.

Such a network is a function `features(conv, x)` that names each convolution as it uses it, so the
same lines say which tensors it needs (`tensor_shapes`) and compute it (`rectified`). Pictures are
[N, H, W, C]; tensors have their PyTorch names and layouts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


class Conv(Protocol):
    """A convolution by name: `x` [N, H, W, I] to [N, H', W', out]."""

    def __call__(
        self,
        x: Array,
        name: str,
        out: int,
        kernel: tuple[int, int] = (1, 1),
        stride: int = 1,
        padding: tuple[int, int] = (0, 0),
    ) -> Array: ...


Network = Callable[[Conv, Array], Any]


def convolve(
    x: Array, weight: Array, bias: Array | None, stride: int, padding: tuple[int, int]
) -> Array:
    """`x` [N, H, W, I], `weight` [O, I, kh, kw] in PyTorch's layout, zero padding."""
    y = jax.lax.conv_general_dilated(
        x,
        weight,
        (stride, stride),
        [(p, p) for p in padding],
        dimension_numbers=("NHWC", "OIHW", "NHWC"),
        precision=jax.lax.Precision.HIGHEST,
    )
    return y if bias is None else y + bias


def rectified(params: Mapping[str, Any]) -> Conv:
    """Each convolution with the `<name>.weight` and `<name>.bias` of `params`, and ReLU."""

    def conv(
        x: Array,
        name: str,
        out: int,
        kernel: tuple[int, int] = (1, 1),
        stride: int = 1,
        padding: tuple[int, int] = (0, 0),
    ) -> Array:
        del out, kernel
        weight, bias = jnp.asarray(params[f"{name}.weight"]), jnp.asarray(params[f"{name}.bias"])
        return jax.nn.relu(convolve(x, weight, bias, stride, padding))

    return conv


def max_pool(x: Array, *, ceil: bool = False, stride: int = 2, padding: int = 0) -> Array:
    """3 x 3; `ceil` keeps a last window that reaches over the border (PyTorch's `ceil_mode`)."""
    pads = [(0, 0)]
    for size in x.shape[1:3]:
        over = (-(size + 2 * padding - 3)) % stride if ceil else 0
        pads.append((padding, padding + over))
    return jax.lax.reduce_window(
        x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, stride, stride, 1), [*pads, (0, 0)]
    )


def average_pool(x: Array) -> Array:
    """3 x 3, stride 1, same size; what lies outside does not count."""
    window, strides, pads = (1, 3, 3, 1), (1, 1, 1, 1), [(0, 0), (1, 1), (1, 1), (0, 0)]
    total = jax.lax.reduce_window(x, 0.0, jax.lax.add, window, strides, pads)
    ones = jnp.ones((1, *x.shape[1:3], 1), x.dtype)
    return total / jax.lax.reduce_window(ones, 0.0, jax.lax.add, window, strides, pads)


def tensor_shapes(
    network: Network, tensors_of: Callable[[str, tuple[int, int, int, int]], Mapping[str, Any]]
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a network.

    Args:
      network: the function.
      tensors_of: shapes by name of the tensors of one convolution, from its name and its weight's
        shape (out, in, kernel height, kernel width).
    """
    shapes: dict[str, tuple[int, ...]] = {}

    def record(
        x: Array,
        name: str,
        out: int,
        kernel: tuple[int, int] = (1, 1),
        stride: int = 1,
        padding: tuple[int, int] = (0, 0),
    ) -> Array:
        weight = (out, x.shape[-1], *kernel)
        shapes.update(tensors_of(name, weight))
        return convolve(x, jnp.zeros(weight), None, stride, padding)

    jax.eval_shape(lambda x: network(record, x), jax.ShapeDtypeStruct((1, 299, 299, 3), "float32"))
    return shapes


def checked(
    what: str,
    tensors: Mapping[str, np.ndarray],
    shapes: Mapping[str, tuple[int, ...]],
    sources: Sequence[str],
) -> dict[str, np.ndarray]:
    """The tensors named in `shapes` as float32; others are ignored.

    Raises:
      ValueError: some are missing or have another shape: names them, and where they were looked
        for.
    """
    missing = [k for k in shapes if k not in tensors]
    wrong = [
        f"{k} {tuple(tensors[k].shape)} instead of {shape}"
        for k, shape in shapes.items()
        if k in tensors and tuple(tensors[k].shape) != shape
    ]
    if missing or wrong:
        found = f"{len(shapes) - len(missing)} of {len(shapes)} tensors"
        first = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ValueError(
            f"{what}: expected {len(shapes)} tensors in {', '.join(sources)}, found {found}"
            + (f"; missing {first}" if missing else "")
            + (f"; of another shape: {'; '.join(wrong[:3])}" if wrong else "")
        )
    return {k: np.asarray(tensors[k], np.float32) for k in shapes}
