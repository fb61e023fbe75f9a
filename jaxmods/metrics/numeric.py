"""Arithmetic that every counting rule shares: float64 products, rounded once to float32.

The official evaluation scripts compare float32 scores. A product computed in float32 depends on the
blocking of the matrix multiplication, so equal vectors may get unequal scores; a float64 product
rounded to float32 does not, and what is a tie by value stays a tie. Counting runs on the host and
needs no device.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.floating]
Int = npt.NDArray[np.integer]

# Entries of the largest score matrix held at once (float64: 128 MB).
BLOCK_ENTRIES = 1 << 24


def finite(what: str, x: npt.ArrayLike, ndim: int) -> npt.NDArray[np.float64]:
    """`x` as float64 with `ndim` dimensions.

    Raises:
      ValueError: another number of dimensions, or an entry that is not finite. Comparisons with NaN
        are false, so a counting rule would take a broken model for a perfect one.
    """
    a = np.asarray(x, np.float64)
    if a.ndim != ndim:
        raise ValueError(f"{what}: expected {ndim} dimensions, found shape {a.shape}")
    if not np.all(np.isfinite(a)):
        rows = np.flatnonzero(~np.isfinite(a.reshape(len(a), -1)).all(axis=1))
        raise ValueError(
            f"{what}: expected finite numbers, found NaN or infinity in {len(rows)} of {len(a)} "
            f"rows (first {rows[0]}); check the weights and the inputs of that row"
        )
    return a


def normalise(x: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Unit vectors along the last axis, float64; a zero vector stays zero."""
    a = np.asarray(x, np.float64)
    norm = np.linalg.norm(a, axis=-1, keepdims=True)
    return a / np.maximum(norm, np.finfo(np.float64).tiny)


def score_blocks(
    queries: npt.NDArray[np.float64],
    candidates: npt.NDArray[np.float64],
    block_entries: int = BLOCK_ENTRIES,
) -> Iterator[tuple[slice, npt.NDArray[np.float32]]]:
    """Rows of `queries @ candidates.T` in blocks of at most `block_entries` entries (one row at
    least).

    Args:
      queries: float64 [Q, D].
      candidates: float64 [M, D].

    Yields:
      (slice of query rows, float32 scores [rows, M]).
    """
    rows = max(1, block_entries // max(1, len(candidates)))
    for start in range(0, len(queries), rows):
        part = slice(start, min(start + rows, len(queries)))
        yield part, (queries[part] @ candidates.T).astype(np.float32)
