"""Undirected neighbourhoods of a knowledge graph, as flat arrays.

Everything the tokeniser asks of a graph: who is next to whom, over which relation, and how often
an entity is an end of a triple (spec `stargraph`, section 2.1).
"""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Adjacency:
    """Distinct undirected neighbours in compressed rows; row `i` is `starts[i]:starts[i + 1]`.

    Attributes:
      starts: int64 [N + 1].
      neighbours: int32 [E], ascending within a row; a self-loop makes an entity its own neighbour.
      labels: int32 [E], label of the edge *from the row's entity to the neighbour*: relation `r`
        along a triple, `r + relations` against it, the smallest where there are several.
      degrees: int64 [N], triple ends at each entity (a self-loop counts twice).
      relations: largest relation id of the triples + 1.
    """

    starts: np.ndarray
    neighbours: np.ndarray
    labels: np.ndarray
    degrees: np.ndarray
    relations: int

    @property
    def entities(self) -> int:
        """N."""
        return len(self.starts) - 1

    def row(self, i: int) -> np.ndarray:
        """Neighbours of entity `i`, ascending."""
        return self.neighbours[self.starts[i] : self.starts[i + 1]]

    def sources(self) -> np.ndarray:
        """int32 [E]: the row of every edge."""
        counts = np.diff(self.starts)
        return np.repeat(np.arange(self.entities, dtype=np.int32), counts)

    def label(self, source: np.ndarray, target: np.ndarray) -> np.ndarray:
        """Labels of the edges source -> target (arrays of one shape; the edges must exist)."""
        return self.labels[self.find(source, target)]

    def find(self, source: np.ndarray, target: np.ndarray) -> np.ndarray:
        """Positions of edges in `neighbours`, by bisection within each row."""
        source = np.asarray(source, np.int64)
        low, high = self.starts[source], self.starts[source + 1]
        target = np.asarray(target)
        longest = int((high - low).max(initial=0))
        for _ in range(longest.bit_length()):
            middle = (low + high) >> 1
            probe = np.minimum(middle, len(self.neighbours) - 1)
            right = (low < high) & (self.neighbours[probe] < target)
            low, high = np.where(right, middle + 1, low), np.where(right, high, middle)
        return low


def build_adjacency(triples: np.ndarray, entities: int) -> Adjacency:
    """`Adjacency` of `triples` (int [n, 3], columns head, relation, tail) over `entities` ids.

    Raises:
      ValueError: no triples, or an entity id outside `0..entities - 1`.
    """
    if len(triples) == 0:
        raise ValueError("graph: expected at least one training triple, found none")
    head, relation, tail = (np.ascontiguousarray(triples[:, c]) for c in range(3))
    low, high = min(head.min(), tail.min()), max(head.max(), tail.max())
    if low < 0 or high >= entities:
        raise ValueError(
            f"graph: expected entity ids in 0..{entities - 1}, found {low}..{high}; "
            f"set the number of entities to at least {high + 1}"
        )
    relations = int(relation.max()) + 1
    degrees = np.bincount(head, minlength=entities) + np.bincount(tail, minlength=entities)
    # One integer per directed edge, ordered by (source, target, label): a single sort settles
    # uniqueness and the smallest label.
    labels = 2 * relations
    if entities * entities * labels >= 2**63:
        raise ValueError(
            f"graph: {entities} entities and {relations} relations do not fit the 63-bit edge key"
        )
    size = len(head)
    key = np.empty(2 * size, np.int64)
    key[:size] = (head.astype(np.int64) * entities + tail) * labels + relation
    key[size:] = (tail.astype(np.int64) * entities + head) * labels + relation + relations
    key.sort()
    pair = key // labels
    first = np.empty(len(key), bool)
    first[0] = True
    np.not_equal(pair[1:], pair[:-1], out=first[1:])
    pair, key = pair[first], key[first]
    edge_labels = (key % labels).astype(np.int32)
    del key
    source = pair // entities
    neighbours = (pair - source * entities).astype(np.int32)
    starts = np.zeros(entities + 1, np.int64)
    np.cumsum(np.bincount(source, minlength=entities), out=starts[1:])
    return Adjacency(starts, neighbours, edge_labels, degrees, relations)


def take_rows(starts: np.ndarray, keep: np.ndarray, *columns: np.ndarray) -> tuple[np.ndarray, ...]:
    """Compressed rows with only the entries where `keep` (bool [E]) holds: starts, columns."""
    counts = np.zeros(len(keep) + 1, np.int64)
    np.cumsum(keep, out=counts[1:])
    return (counts[starts], *(column[keep] for column in columns))
