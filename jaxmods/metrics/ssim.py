"""Structural similarity of two pictures, as torchmetrics computes it.

Wang et al. 2004 with a Gaussian window of 11 x 11 (sigma 1.5), C1 = (0.01 L)^2, C2 = (0.03 L)^2 and
data range L = 1. Variances are clamped at 0, the covariance is not. Releases of torchmetrics differ
in where the map is averaged: 1.x takes all of it, with pictures mirrored at the border; some older
ones leave out a border of five pixels.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2


def ssim(
    predicted: npt.ArrayLike,
    target: npt.ArrayLike,
    *,
    border: Literal["mirror", "crop"] = "mirror",
) -> npt.NDArray[np.float64]:
    """SSIM of each pair.

    Args:
      predicted, target: [N, H, W, C] in 0..1, H and W at least 11.
      border: "mirror" averages the whole map (torchmetrics 1.x), "crop" leaves out 5 pixels on
        each side, where the window reaches over the border.

    Returns:
      float64 [N], mean over pixels and channels. The value of a set is their mean.

    Raises:
      ValueError: shapes disagree or are too small, or an entry is not finite or outside 0..1.
    """
    x, y = np.asarray(predicted, np.float64), np.asarray(target, np.float64)
    if x.shape != y.shape or x.ndim != 4 or min(x.shape[1:3]) < _WINDOW:
        raise ValueError(
            f"ssim: expected two arrays [N, H, W, C] of one shape with H, W >= {_WINDOW}, found "
            f"{x.shape} and {y.shape}"
        )
    for name, a in (("predicted", x), ("target", y)):
        if a.size and not (a.min() >= 0 and a.max() <= 1):  # NaN fails as well
            raise ValueError(
                f"ssim: expected {name} in 0..1, found {a.min():g}..{a.max():g}; divide bytes by "
                "255 first"
            )
    mx, my = _blur(x), _blur(y)
    vx, vy = np.maximum(_blur(x * x) - mx * mx, 0), np.maximum(_blur(y * y) - my * my, 0)
    cov = _blur(x * y) - mx * my
    values = ((2 * mx * my + _C1) * (2 * cov + _C2)) / ((mx * mx + my * my + _C1) * (vx + vy + _C2))
    if border == "crop":
        edge = _WINDOW // 2
        values = values[:, edge:-edge, edge:-edge]
    return values.mean(axis=(1, 2, 3))


def _blur(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Gaussian mean over the window, pictures mirrored at the border without repeating the edge."""
    edge = _WINDOW // 2
    taps = np.exp(-((np.arange(_WINDOW) - edge) ** 2) / (2 * _SIGMA**2))
    taps /= taps.sum()
    for axis in (1, 2):
        padding = [(0, 0)] * 4
        padding[axis] = (edge, edge)
        padded = np.pad(x, padding, mode="reflect")
        size = x.shape[axis]
        x = sum(
            tap * padded[(slice(None),) * axis + (slice(i, i + size),)]
            for i, tap in enumerate(taps)
        )
    return x
