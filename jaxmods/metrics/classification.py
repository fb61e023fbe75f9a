"""Zero-shot classification of pictures and of boxes.

Counting rules of the official scripts (FG-CLIP `eval/in_1K`, spec section 6). The class vector is
normalise(mean over templates of normalise(text)). Picture or box features need no normalisation:
their length scales all scores of a row alike. Scores are ranked, not the softmax probabilities
that the official code ranks: those underflow to 0 for long box vectors and leave the last places
of a top five to the order of tied zeros.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from jaxmods.metrics.numeric import BLOCK_ENTRIES, finite, normalise, score_blocks


def class_vectors(template_texts: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """Zero-shot classifier from text features.

    Args:
      template_texts: [C, T, D], features of C classes in T templates, any length.

    Returns:
      float32 [C, D], unit length.
    """
    texts = normalise(finite("class texts", template_texts, 3))
    return normalise(texts.mean(axis=1)).astype(np.float32)


def label_ranks(
    features: npt.ArrayLike,
    classes: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    block_entries: int = BLOCK_ENTRIES,
) -> npt.NDArray[np.int64]:
    """Rank (0 is best) of the label's score among all classes; of equal scores the lower class
    index ranks first, as in argmax.

    Args:
      features: [N, D] of pictures or boxes, any length.
      classes: [C, D] class vectors.
      labels: int [N], each in 0..C-1.
      block_entries: most entries of the score matrix that exist at once.

    Returns:
      int64 [N].

    Raises:
      ValueError: a label outside the classes, or features that are not finite.
    """
    x = finite("features to classify", features, 2)
    c = finite("class vectors", classes, 2)
    y = np.asarray(labels)
    if y.shape != (len(x),) or (len(y) and (y.min() < 0 or y.max() >= len(c))):
        raise ValueError(
            f"labels: expected {len(x)} values in 0..{len(c) - 1}, found shape {y.shape}"
            + (f" and range {y.min()}..{y.max()}" if len(y) else "")
        )
    ranks = np.empty(len(x), np.int64)
    order = np.arange(len(c))
    for rows, scores in score_blocks(x, c, block_entries):
        own = np.take_along_axis(scores, y[rows, None], axis=1)
        first = (scores == own) & (order < y[rows, None])
        ranks[rows] = ((scores > own) | first).sum(axis=1)
    return ranks


def top_accuracy(ranks: npt.ArrayLike, ks: Sequence[int] = (1, 5)) -> dict[str, float]:
    """ "top<k>": fraction of rows whose label is among the k best classes."""
    r = np.asarray(ranks)
    return {f"top{k}": float(np.mean(r < k)) for k in ks}


def top_chance(classes: int, ks: Sequence[int] = (1, 5)) -> dict[str, float]:
    """What guessing among `classes` gives for each number of `top_accuracy`."""
    return {f"top{k}": min(k, classes) / classes for k in ks}
