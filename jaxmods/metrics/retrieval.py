"""Image-text retrieval with any number of captions per image.

Counting rule of the official scripts (FG-CLIP `eval/coco_retrieval.py`, spec section 6): features
are normalised; an image is a hit at k when *any* of its captions is among the k best texts; a
caption is a hit at k when its image is among the k best images. The k best are the last k of an
ascending stable sort, so of two equal scores the later index ranks first. With this rule a model
whose features are all equal scores exactly chance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from jaxmods.metrics.numeric import BLOCK_ENTRIES, finite, normalise, score_blocks


def best_ranks(
    queries: npt.ArrayLike,
    query_group: npt.ArrayLike,
    candidates: npt.ArrayLike,
    candidate_group: npt.ArrayLike,
    *,
    block_entries: int = BLOCK_ENTRIES,
) -> npt.NDArray[np.int64]:
    """Rank (0 is best) of each query's best candidate of the same group, by cosine similarity.

    Args:
      queries: [Q, D]; normalised here.
      query_group: int [Q].
      candidates: [M, D]; normalised here.
      candidate_group: int [M].
      block_entries: most entries of the score matrix that exist at once.

    Returns:
      int64 [Q], each in 0..M-1.

    Raises:
      ValueError: shapes disagree, features are not finite, or a query has no candidate.
    """
    q = normalise(finite("retrieval queries", queries, 2))
    c = normalise(finite("retrieval candidates", candidates, 2))
    q_group, c_group = np.asarray(query_group), np.asarray(candidate_group)
    if q_group.shape != (len(q),) or c_group.shape != (len(c),):
        raise ValueError(
            f"retrieval: expected one group per row, found {len(q)} queries with groups of shape "
            f"{q_group.shape} and {len(c)} candidates with groups of shape {c_group.shape}"
        )
    lonely = np.flatnonzero(~np.isin(q_group, c_group))
    if len(lonely):
        raise ValueError(
            f"retrieval: expected a candidate for every query, found none for query {lonely[0]} "
            f"(group {q_group[lonely[0]]}); leave it out of the queries or add its candidate"
        )
    ranks = np.empty(len(q), np.int64)
    order = np.arange(len(c))
    for rows, scores in score_blocks(q, c, block_entries):
        own = q_group[rows, None] == c_group[None, :]
        best = np.where(own, scores, -np.inf).max(axis=1)
        at = np.where(own & (scores == best[:, None]), order, -1).max(axis=1)
        better = (scores > best[:, None]).sum(axis=1)
        tied = ((scores == best[:, None]) & (order > at[:, None])).sum(axis=1)
        ranks[rows] = better + tied
    return ranks


def recall_at(ranks: npt.ArrayLike, k: int) -> float:
    """Fraction of ranks below `k`."""
    return float(np.mean(np.asarray(ranks) < k))


def recall_chance(positives: npt.ArrayLike, candidates: int, k: int) -> float:
    """Expected recall at `k` of a random order: mean of 1 - C(M-m, k) / C(M, k).

    Args:
      positives: int [Q], number of right candidates m of each query.
      candidates: number M of candidates.
      k: how many are looked at.
    """
    counts, times = np.unique(np.asarray(positives), return_counts=True)
    total = math.comb(candidates, min(k, candidates))
    miss = [math.comb(candidates - int(m), min(k, candidates)) / total for m in counts]
    return float(1.0 - np.dot(miss, times) / times.sum())


def retrieval_recalls(
    image: npt.ArrayLike,
    text: npt.ArrayLike,
    text_image: npt.ArrayLike,
    *,
    ks: Sequence[int] = (1, 5, 10),
    block_entries: int = BLOCK_ENTRIES,
) -> dict[str, float]:
    """Recall at each k in both directions, fractions 0..1.

    Args:
      image: [N, D] features, any length.
      text: [T, D] features, any length.
      text_image: int [T], row of the image that each text belongs to.
      ks: values of k.
      block_entries: most entries of the score matrix that exist at once.

    Returns:
      "i2t_r<k>" over images and "t2i_r<k>" over texts.
    """
    rows = np.arange(len(np.asarray(image)))
    i2t = best_ranks(image, rows, text, text_image, block_entries=block_entries)
    t2i = best_ranks(text, text_image, image, rows, block_entries=block_entries)
    return {
        **{f"i2t_r{k}": recall_at(i2t, k) for k in ks},
        **{f"t2i_r{k}": recall_at(t2i, k) for k in ks},
    }


def retrieval_chance(
    images: int, text_image: npt.ArrayLike, *, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """What guessing gives for each number of `retrieval_recalls`, with the same names."""
    owners = np.asarray(text_image)
    per_image = np.bincount(owners, minlength=images)
    return {
        **{f"i2t_r{k}": recall_chance(per_image, len(owners), k) for k in ks},
        **{f"t2i_r{k}": recall_chance(np.ones(len(owners), int), images, k) for k in ks},
    }
