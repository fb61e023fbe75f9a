"""Image tokens in a sequence, with static shapes: each `IMAGE` becomes N positions on the host.

The model then needs one gather: `embedding = where(slot >= 0, features[slot], table[ids])`. What
official LLaVA code does with lists of tensors of changing length is here four arrays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

IGNORE = -100  # label that is not learnt
IMAGE = -200  # id that stands for a picture before splicing


@dataclasses.dataclass(frozen=True)
class Spliced:
    """One row of a batch, [T] each.

    Attributes:
      ids: int32, 0 at image and padding positions.
      slot: int32, index into the row's image tokens (picture m, token k: m N + k), else -1.
      labels: int32, `IGNORE` at image and padding positions (not shifted: position t has the label
        of its own token).
      valid: bool, False at right padding.
      length: positions before the padding.
    """

    ids: np.ndarray
    slot: np.ndarray
    labels: np.ndarray
    valid: np.ndarray
    length: int


def splice(
    ids: Sequence[int],
    labels: Sequence[int] | None,
    image_tokens: int,
    length: int,
    *,
    pad_id: int = 0,
    what: str = "sequence",
) -> Spliced:
    """One row: every `IMAGE` of `ids` expanded, padded at the right.

    Args:
      ids: token ids, with `IMAGE` where a picture stands.
      labels: as long as `ids`; None for none.
      image_tokens: N, tokens of a picture.
      length: T.
      pad_id: id at padding.
      what: name of the sequence in the error.

    Raises:
      ValueError: the row is longer than `length`.
    """
    at = np.asarray(ids, np.int64)
    counts = np.where(at == IMAGE, image_tokens, 1)
    total = int(counts.sum())
    if total > length:
        raise ValueError(
            f"{what}: expected at most {length} positions, found {total} ({len(at)} tokens, of "
            f"which {int((at == IMAGE).sum())} are pictures of {image_tokens}); shorten the text "
            "or raise the length"
        )
    where = np.repeat(at == IMAGE, counts)
    out_ids = np.full(length, pad_id, np.int32)
    out_ids[:total] = np.where(where, pad_id, np.repeat(at, counts))
    slot = np.full(length, -1, np.int32)
    slot[:total][where] = np.arange(int(where.sum()))
    out_labels = np.full(length, IGNORE, np.int32)
    if labels is not None:
        spread = np.repeat(np.asarray(labels, np.int64), counts)
        out_labels[:total] = np.where(where, IGNORE, spread)
    return Spliced(out_ids, slot, out_labels, np.arange(length) < total, total)


def bucket(length: int, multiple: int = 128) -> int:
    """The padded length of a sequence: the next multiple, so that few programs are compiled."""
    return -(-max(length, 1) // multiple) * multiple
