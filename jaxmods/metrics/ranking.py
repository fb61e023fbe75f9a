"""Ranks of true answers among candidates, and what is reported of them.

Two tie rules, because the published numbers use two:

* "pessimistic": rank = #(score >= true score), the true answer itself giving the 1. Ties count
  against the model (official StarGraph on FB15k-237).
* "mean": rank = 1 + (#(score > true) + #(score >= true)) / 2 over the negatives, the average of
  the best and the worst place (OGB evaluator, 1.3.6).
"""

from __future__ import annotations

from typing import Literal

import numpy as np

TieRule = Literal["pessimistic", "mean"]

HITS = (1, 3, 10)


def ranks(greater: np.ndarray, equal: np.ndarray, ties: TieRule) -> np.ndarray:
    """Ranks from counts over the negatives (the true answer not among them).

    Args:
      greater: int [n], negatives with a larger score than the true answer.
      equal: int [n], negatives with the same score.

    Returns:
      int64 [n] ("pessimistic") or float32 [n] ("mean", as the OGB evaluator computes it).
    """
    greater, equal = np.asarray(greater, np.int64), np.asarray(equal, np.int64)
    if ties == "pessimistic":
        return greater + equal + 1
    return np.float32(0.5) * (2 * greater + equal).astype(np.float32) + np.float32(1)


def summarise(rank: np.ndarray) -> dict[str, float]:
    """Mean reciprocal rank, mean rank and hits, keys "mrr", "mr", "hits@1", "hits@3", "hits@10".

    Raises:
      ValueError: no ranks.
    """
    if len(rank) == 0:
        raise ValueError("ranking: expected at least one rank, found none")
    rank = np.asarray(rank, np.float64)
    result = {"mrr": float(np.mean(1.0 / rank)), "mr": float(np.mean(rank))}
    for k in HITS:
        result[f"hits@{k}"] = float(np.mean(rank <= k))
    return result


def chance(candidates: np.ndarray) -> dict[str, float]:
    """Expected `summarise` of random scores, given how many candidates each query has.

    Args:
      candidates: int [n], the true answer included.
    """
    sizes, counts = np.unique(np.asarray(candidates, np.int64), return_counts=True)
    if len(sizes) == 0 or sizes[0] < 1:
        raise ValueError("ranking: expected at least one candidate per query")
    share = counts / counts.sum()
    harmonic = np.cumsum(1.0 / np.arange(1, sizes[-1] + 1))
    result = {
        "mrr": float(np.sum(share * harmonic[sizes - 1] / sizes)),
        "mr": float(np.sum(share * (sizes + 1) / 2)),
    }
    for k in HITS:
        result[f"hits@{k}"] = float(np.sum(share * np.minimum(k / sizes, 1.0)))
    return result
