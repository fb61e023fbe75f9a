"""Fine-grained hard negatives: is a box closest to its own phrase among altered ones?

Counting rule of the official FG-OVD script (FG-CLIP `eval/fgovd_eval.py`, spec section 6): texts
are normalised, the box vector is not; a row is right when entry 0, the true phrase, reaches the
maximum. An exact tie with entry 0 counts as right. Rows have different numbers of negatives.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from jaxmods.metrics.numeric import finite, normalise


def hard_negative_scores(
    boxes: npt.ArrayLike, texts: npt.ArrayLike, mask: npt.ArrayLike
) -> npt.NDArray[np.float32]:
    """Scores of each row's texts; -inf where the row has none.

    Args:
      boxes: [N, D] box features, any length.
      texts: [N, K, D] text features, entry 0 the true phrase, normalised here.
      mask: bool [N, K], which texts exist; entry 0 always does.

    Returns:
      float32 [N, K].

    Raises:
      ValueError: shapes disagree, entry 0 is masked, or features are not finite.
    """
    b = finite("box features", boxes, 2)
    exists = np.asarray(mask, bool)
    raw = np.asarray(texts)
    if raw.ndim != 3 or exists.shape != raw.shape[:2] or len(raw) != len(b):
        raise ValueError(
            f"hard negatives: expected texts [N, K, D] with a mask [N, K] for {len(b)} boxes, "
            f"found texts {raw.shape} and mask {exists.shape}"
        )
    if not exists[:, 0].all():
        raise ValueError(
            f"hard negatives: expected the true phrase in entry 0 of every row, found it masked in "
            f"row {int(np.flatnonzero(~exists[:, 0])[0])}"
        )
    t = normalise(finite("hard-negative texts", np.where(exists[..., None], raw, 0.0), 3))
    scores = np.einsum("nd,nkd->nk", b, t).astype(np.float32)
    return np.where(exists, scores, np.float32(-np.inf))


def hard_negative_correct(scores: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """bool [N]: whether entry 0 of `scores` [N, K] reaches the row's maximum."""
    s = np.asarray(scores)
    return s[:, 0] >= s.max(axis=1)


def hard_negative_chance(mask: npt.ArrayLike) -> float:
    """Expected accuracy of guessing: mean of 1 / number of texts of the row."""
    return float(np.mean(1.0 / np.asarray(mask, bool).sum(axis=1)))
