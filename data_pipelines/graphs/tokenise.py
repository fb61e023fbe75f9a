"""Tokens of every entity: anchors one or two hops away, with paths, and nearest neighbours.

Spec `stargraph`, section 2.1 (official `model.py` `tokenize_anchors`, `tokenize_neighbors`). Two
ways to break ties between equally good anchors or neighbours:

* "official": in the iteration order of CPython sets of integers, which is what the official code
  does. Identical to it, token for token; one pass of plain Python over the entities.
* "id": smallest entity id first. An equally valid sample, fully vectorised, for graphs of millions
  of entities.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

from data_pipelines.graphs import anchors_by_id, anchors_official
from data_pipelines.graphs.adjacency import Adjacency, build_adjacency

Ties = Literal["official", "id"]


@dataclasses.dataclass(frozen=True)
class TokenSpec:
    """What to sample.

    Attributes:
      anchor_size: number of anchors; a value <= 1 is a fraction of the entities (1 = no limit).
      skip_ratio: an entity is no anchor when more than this fraction of its neighbours are.
      anchors: tokens per entity (A); 0 for none.
      neighbours: neighbour tokens per entity.
      center: whether the entity itself is a token.
      paths: whether anchors carry their path (relation ids).
      shared: anchor ids are entity ids (one table for anchors and nodes).
      ties: see the module's docstring.
      row_multiple: rows of the arrays are padded to a multiple of this, so that they can be split
        over devices; the padding rows hold padding ids and belong to no entity.
    """

    anchor_size: float = 1.0
    skip_ratio: float = 0.5
    anchors: int = 20
    neighbours: int = 0
    center: bool = False
    paths: bool = True
    shared: bool = False
    ties: Ties = "official"
    row_multiple: int = 1

    def __post_init__(self) -> None:
        if self.anchor_size <= 0:
            raise ValueError(f"tokens: expected anchor_size > 0, found {self.anchor_size}")
        if self.anchors < 0 or self.neighbours < 0 or self.row_multiple < 1:
            raise ValueError(f"tokens: expected sizes >= 0 and row_multiple >= 1, found {self}")
        if self.anchors + self.neighbours + self.center == 0:
            raise ValueError("tokens: expected anchors, neighbours or the centre, found none")
        if self.shared and not (self.center or self.neighbours):
            raise ValueError(
                "tokens: shared anchors need the node table; set center=True or neighbours > 0"
            )


@dataclasses.dataclass(frozen=True)
class Sample:
    """Raw result in entity and relation ids, -1 for padding.

    Attributes:
      anchor_order: int64 [M]; the entity whose embedding is row i of the anchor table.
      anchors: int32 [N, A] entity ids, in order of sampling.
      paths: int32 [N, A, 2]; two hops [r1, r2], one hop [-1, r].
    """

    anchor_order: np.ndarray
    anchors: np.ndarray
    paths: np.ndarray


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The graph buffers of the encoder (official names), rows padded to `row_multiple`.

    Attributes:
      hashes: int32 [N, A]; row of the anchor table, M (N where shared) for padding. None: A = 0.
      path_ids: int32 [N, A, 2]; relation labels, `paths` for none. None where unused.
      nodes: int32 [N, center + neighbours]; entity ids, N for padding. None where unused.
      anchor_entities: int64 [M]; the entity behind each anchor row.
      paths: largest path label that occurs + 1 (official `npath`).
      entities: N without padding rows.
    """

    hashes: np.ndarray | None
    path_ids: np.ndarray | None
    nodes: np.ndarray | None
    anchor_entities: np.ndarray
    paths: int
    entities: int

    def constants(self) -> dict[str, np.ndarray]:
        """The arrays by path in the parameter tree."""
        arrays = {"hashes": self.hashes, "path_ids": self.path_ids, "nodes": self.nodes}
        return {f"graph/{name}": array for name, array in arrays.items() if array is not None}


def anchor_limit(anchor_size: float, entities: int) -> int:
    """Most anchors to choose: a value <= 1 is a fraction of `entities` (official rule).

    Raises:
      ValueError: more anchors than entities.
    """
    limit = int(anchor_size if anchor_size > 1 else entities * anchor_size)
    if limit > entities:
        raise ValueError(f"tokens: expected at most {entities} anchors, found {limit}")
    return limit


def sample_anchors(triples: np.ndarray, entities: int, spec: TokenSpec) -> Sample:
    """Choose the anchors and sample `spec.anchors` of them for every entity.

    Args:
      triples: int [n, 3], the training triples without inverse edges, in file order.
      entities: N.
    """
    limit = anchor_limit(spec.anchor_size, entities)
    if spec.ties == "official":
        return Sample(
            *anchors_official.sample(triples, entities, limit, spec.skip_ratio, spec.anchors)
        )
    graph = build_adjacency(triples, entities)
    return Sample(*anchors_by_id.sample(graph, limit, spec.skip_ratio, spec.anchors))


def sample_neighbours(triples: np.ndarray, entities: int, count: int, ties: Ties) -> np.ndarray:
    """int32 [N, count]: neighbours by degree, largest first, -1 for padding."""
    if ties == "official":
        return anchors_official.neighbours(triples, entities, count)
    return _neighbours_by_id(build_adjacency(triples, entities), count)


def tokenise(triples: np.ndarray, entities: int, spec: TokenSpec) -> Tokens:
    """Build the graph buffers from the training triples (without inverse edges)."""
    hashes = path_ids = nodes = None
    anchor_entities = np.zeros(0, np.int64)
    paths = 0
    rows = -(-entities // spec.row_multiple) * spec.row_multiple
    if spec.anchors:
        sample = sample_anchors(triples, entities, spec)
        anchor_entities = sample.anchor_order
        if spec.shared:
            padding = entities
            table = np.arange(entities + 1, dtype=np.int32)
        else:
            padding = len(anchor_entities)
            table = np.full(entities + 1, padding, np.int32)
            table[anchor_entities] = np.arange(padding, dtype=np.int32)
        # Index -1 is the last entry, which holds the padding row.
        hashes = _pad_rows(table[sample.anchors], rows, padding)
        if spec.paths:
            paths = int(sample.paths.max(initial=-1)) + 1
            path_ids = _pad_rows(np.where(sample.paths < 0, paths, sample.paths), rows, paths)
    if spec.center or spec.neighbours:
        columns = []
        if spec.center:
            columns.append(np.arange(entities, dtype=np.int32)[:, None])
        if spec.neighbours:
            nearest = sample_neighbours(triples, entities, spec.neighbours, spec.ties)
            columns.append(np.where(nearest < 0, entities, nearest).astype(np.int32))
        nodes = _pad_rows(np.concatenate(columns, 1), rows, entities)
    return Tokens(hashes, path_ids, nodes, anchor_entities, paths, entities)


def _pad_rows(array: np.ndarray, rows: int, value: int) -> np.ndarray:
    padded = np.full((rows, *array.shape[1:]), value, np.int32)
    padded[: len(array)] = array
    return padded


def _neighbours_by_id(graph: Adjacency, count: int) -> np.ndarray:
    source = graph.sources()
    order = np.lexsort((graph.neighbours, -graph.degrees[graph.neighbours], source))
    result = np.full((graph.entities, count), -1, np.int32)
    position = np.arange(len(source)) - graph.starts[source]
    keep = position < count
    result[source[keep], position[keep]] = graph.neighbours[order][keep]
    return result
