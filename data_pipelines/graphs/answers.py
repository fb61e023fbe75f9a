"""Which answers are true: lookups over sorted integer keys, no Python per query.

A query is a known entity, a relation, and which side is asked for. Triples (h, r, t) answer the
query (h, r, tail) with t and the query (t, r, head) with h.
"""

from __future__ import annotations

import dataclasses

import numpy as np

TAIL, HEAD = 0, 1


@dataclasses.dataclass(frozen=True)
class TrueAnswers:
    """Distinct true answers of every query, in compressed rows.

    Attributes:
      entities, relations: id ranges.
      keys: int64 [Q], sorted query keys.
      starts: int64 [Q + 1]; row i of `answers` is `starts[i]:starts[i + 1]`.
      answers: int32, ascending within a row.
      pairs: int64, sorted `key * entities + answer`, for membership.
    """

    entities: int
    relations: int
    keys: np.ndarray
    starts: np.ndarray
    answers: np.ndarray
    pairs: np.ndarray

    def key(self, known: np.ndarray, relation: np.ndarray, mode: np.ndarray) -> np.ndarray:
        """int64 query keys."""
        return (known.astype(np.int64) * self.relations + relation) * 2 + mode

    def counts(self, known: np.ndarray, relation: np.ndarray, mode: np.ndarray) -> np.ndarray:
        """int64: how many true answers each query has."""
        _, low, high = self._rows(known, relation, mode)
        return high - low

    def contains(
        self, known: np.ndarray, relation: np.ndarray, mode: np.ndarray, candidates: np.ndarray
    ) -> np.ndarray:
        """bool [B, C]: which of each query's candidates [B, C] are true."""
        wanted = self.key(known, relation, mode)[:, None] * self.entities + candidates
        at = np.searchsorted(self.pairs, wanted)
        at = np.minimum(at, len(self.pairs) - 1)
        return self.pairs[at] == wanted

    def padded(
        self, known: np.ndarray, relation: np.ndarray, mode: np.ndarray, width: int
    ) -> np.ndarray:
        """int32 [B, width]: the true answers of each query, -1 for padding.

        Raises:
          ValueError: a query with more than `width` answers.
        """
        _, low, high = self._rows(known, relation, mode)
        longest = int((high - low).max(initial=0))
        if longest > width:
            raise ValueError(f"answers: expected at most {width} per query, found {longest}")
        at = low[:, None] + np.arange(width)
        inside = at < high[:, None]
        return np.where(inside, self.answers[np.minimum(at, len(self.answers) - 1)], -1)

    def _rows(
        self, known: np.ndarray, relation: np.ndarray, mode: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        key = self.key(known, relation, mode)
        at = np.minimum(np.searchsorted(self.keys, key), len(self.keys) - 1)
        found = self.keys[at] == key
        return at, np.where(found, self.starts[at], 0), np.where(found, self.starts[at + 1], 0)


def true_answers(triples: np.ndarray, entities: int, relations: int) -> TrueAnswers:
    """Index of `triples` (int [n, 3]; duplicates count once).

    Raises:
      ValueError: no triples, or ids too large for 63-bit keys.
    """
    if len(triples) == 0:
        raise ValueError("answers: expected at least one triple, found none")
    if 2 * relations * entities * entities >= 2**63:
        raise ValueError(f"answers: {entities} entities, {relations} relations overflow the key")
    head, relation, tail = (triples[:, c].astype(np.int64) for c in range(3))
    pairs = np.concatenate(
        [
            ((head * relations + relation) * 2 + TAIL) * entities + tail,
            ((tail * relations + relation) * 2 + HEAD) * entities + head,
        ]
    )
    pairs = np.unique(pairs)
    query = pairs // entities
    first = np.flatnonzero(np.concatenate([[True], query[1:] != query[:-1]]))
    return TrueAnswers(
        entities,
        relations,
        query[first],
        np.append(first, len(pairs)),
        (pairs - query * entities).astype(np.int32),
        pairs,
    )
