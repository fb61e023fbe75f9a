"""Sub-sampling weights and inverse edges of training triples (spec `stargraph`, sections 3, 5)."""

from __future__ import annotations

import numpy as np

BASE_COUNT = 3  # every count starts here (official `train_count`)


def subsampling_weights(triples: np.ndarray) -> np.ndarray:
    """float32 [n]: `1 / sqrt(c(h, r) + c(t, r reversed))`, counts over `triples` plus 3 each."""
    relations = int(triples[:, 1].max()) + 1
    total = np.zeros(len(triples), np.int64)
    for column in (0, 2):
        key = triples[:, column].astype(np.int64) * relations + triples[:, 1]
        _, inverse, counts = np.unique(key, return_inverse=True, return_counts=True)
        total += counts[inverse] + BASE_COUNT
    return (1.0 / np.sqrt(total)).astype(np.float32)


def with_inverse(triples: np.ndarray, relations: int) -> np.ndarray:
    """All triples, then (t, r + relations, h) of each, in order."""
    inverse = triples[:, ::-1].copy()
    inverse[:, 1] += relations
    return np.concatenate([triples, inverse])
