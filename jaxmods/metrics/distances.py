"""Distances between two sets of features: Fréchet (FID) and kernel (KID), as clean-fid has them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from jaxmods.metrics.numeric import finite


def frechet_distance(first: npt.ArrayLike, second: npt.ArrayLike) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of two sets of features.

    The trace of the root is the sum of the roots of the eigenvalues of C1^(1/2) C2 C1^(1/2), which
    is symmetric: no complex numbers and no added diagonal where there are fewer rows than columns
    (clean-fid takes a matrix square root of C1 C2; equal where that is well defined).

    Args:
      first, second: [n, D] and [m, D], two rows or more each.

    Raises:
      ValueError: too few rows, different D, or features that are not finite.
    """
    a, b = _sets(first, second)
    c1, c2 = np.atleast_2d(np.cov(a, rowvar=False)), np.atleast_2d(np.cov(b, rowvar=False))
    values, vectors = np.linalg.eigh(c1)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    middle = np.linalg.eigvalsh(root @ c2 @ root)
    trace = float(np.sqrt(np.maximum(middle, 0)).sum())
    gap = a.mean(axis=0) - b.mean(axis=0)
    return float(gap @ gap + np.trace(c1) + np.trace(c2) - 2 * trace)


def kernel_distance(
    first: npt.ArrayLike,
    second: npt.ArrayLike,
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> float:
    """Unbiased squared MMD with the kernel (x.y / D + 1)^3, mean over random subsets (KID).

    Subsets come from NumPy's legacy generator in clean-fid's order (the second set first), so
    `kernel_distance(truth, generated)` is its number for this seed (the evaluation scripts seed
    with 0). It is not multiplied by anything; papers often print 1000 times it.

    Args:
      first, second: [n, D] and [m, D].
      subsets: how many. subset_size: of each, at most the smaller set.

    Raises:
      ValueError: fewer than two rows, different D, or features that are not finite.
    """
    a, b = _sets(first, second)
    size = min(len(a), len(b), subset_size)
    draws = np.random.RandomState(seed)
    total = 0.0
    for _ in range(subsets):
        x = b[draws.choice(len(b), size, replace=False)]
        y = a[draws.choice(len(a), size, replace=False)]
        own = _kernel(x, x) + _kernel(y, y)
        total += (own.sum() - np.trace(own)) / (size - 1) - 2 * _kernel(x, y).sum() / size
    return float(total / subsets / size)


def _kernel(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _sets(
    first: npt.ArrayLike, second: npt.ArrayLike
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    a, b = finite("first set of features", first, 2), finite("second set of features", second, 2)
    if a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(
            f"distance of feature sets: expected two rows or more with one number of columns, "
            f"found {a.shape} and {b.shape}"
        )
    return a, b
