"""Anchors and neighbours with ties broken exactly as by the official code.

The official code sorts Python sets by degree; a stable sort leaves equal degrees in the order in
which CPython iterates over the set, and that depends on how the set was made. So the same set
operations are made here, on the same operands (`&`, `-`, insertion in triple order), wherever a tie
is possible, and nothing is sorted twice that a pointer can find.
"""

from __future__ import annotations

from itertools import repeat

import numpy as np

Result = tuple[np.ndarray, np.ndarray, np.ndarray]


def _sets(triples: np.ndarray, entities: int) -> tuple[list[set[int]], list[int]]:
    """Neighbour sets, filled in triple order, and degrees."""
    neighbours: list[set[int]] = [set() for _ in repeat(None, entities)]
    for head, tail in zip(triples[:, 0].tolist(), triples[:, 2].tolist(), strict=True):
        neighbours[head].add(tail)
        neighbours[tail].add(head)
    degrees = np.bincount(triples[:, 0], minlength=entities)
    degrees = degrees + np.bincount(triples[:, 2], minlength=entities)
    return neighbours, degrees.tolist()


def _smallest_labels(triples: np.ndarray) -> dict[tuple[int, int], int]:
    """(source, target) -> smallest label of an edge between them."""
    relations = int(triples[:, 1].max()) + 1
    head, relation, tail = triples[:, 0], triples[:, 1], triples[:, 2]
    source = np.concatenate([head, tail])
    target = np.concatenate([tail, head])
    label = np.concatenate([relation, relation + relations])
    order = np.argsort(-label, kind="stable")  # the smallest is written last and stays
    pairs = zip(source[order].tolist(), target[order].tolist(), strict=True)
    return dict(zip(pairs, label[order].tolist(), strict=True))


def _choose(
    neighbours: list[set[int]], degrees: list[int], limit: int, skip_ratio: float
) -> set[int]:
    """Entities by descending degree (ties by id) that few anchors surround, at most `limit`."""
    anchors: set[int] = set()
    surrounded = [0] * len(neighbours)  # anchors among the neighbours of each entity
    for i in sorted(range(len(neighbours)), key=degrees.__getitem__, reverse=True):
        near = neighbours[i]
        # An entity without edges has no neighbours to be covered by: it is skipped, where the
        # official code would divide by zero (spec, section 9, trap 10).
        if not near or surrounded[i] / len(near) > skip_ratio:
            continue
        anchors.add(i)
        for j in near:
            surrounded[j] += 1
        if len(anchors) == limit:
            break
    return anchors


def sample(triples: np.ndarray, entities: int, limit: int, skip_ratio: float, count: int) -> Result:
    """Anchor order int64 [M], anchors int32 [N, count], paths int32 [N, count, 2] (-1: padding).

    Args:
      triples: int [n, 3], in file order (the order decides ties).
      limit: most anchors to choose.
      skip_ratio: see `tokenise.TokenSpec`.
      count: anchors per entity.
    """
    neighbours, degrees = _sets(triples, entities)
    labels = _smallest_labels(triples)
    anchors = _choose(neighbours, degrees, limit, skip_ratio)
    near_anchors = [near & anchors for near in neighbours]
    rank = degrees.__getitem__
    node_rank = [len(near) for near in near_anchors]
    # Anchors of each entity by degree, with the degree that follows: where it differs from the
    # first unused one's there is no tie, and no set operation is needed.
    by_degree = [sorted(near, key=rank) for near in near_anchors]

    anchor_out = np.full((entities, count), -1, np.int32)
    path_out = np.full((entities, count, 2), -1, np.int32)
    for i in range(entities):
        found: list[int] = []
        paths: list[tuple[int, int]] = []
        used: set[int] = set()
        own = near_anchors[i]
        hops = sorted(neighbours[i] - own, key=node_rank.__getitem__)
        # One cursor per source of anchors; sources that have run out are dropped.
        sources = [(j, by_degree[j], near_anchors[j]) for j in hops if node_rank[j]]
        cursors = [0] * len(sources)
        own_sorted, own_cursor = by_degree[i], 0
        while len(found) < count:
            before = len(found)
            pick, own_cursor = _first_unused(own_sorted, own_cursor, own, used, degrees)
            if pick >= 0:
                used.add(pick)
                found.append(pick)
                paths.append((-1, labels[pick, i]))
            exhausted = False
            for k, (j, ordered, near) in enumerate(sources):
                if len(found) == count:
                    break
                pick, cursors[k] = _first_unused(ordered, cursors[k], near, used, degrees)
                if pick < 0:
                    exhausted = True
                    continue
                used.add(pick)
                found.append(pick)
                paths.append((labels[pick, j], labels[j, i]))
            if len(found) == before:
                break
            if exhausted and len(found) < count:
                alive = [k for k, c in enumerate(cursors) if c < len(sources[k][1])]
                sources = [sources[k] for k in alive]
                cursors = [cursors[k] for k in alive]
        if found:
            anchor_out[i, : len(found)] = found
            path_out[i, : len(found)] = paths
    return np.fromiter(anchors, np.int64, len(anchors)), anchor_out, path_out


def _first_unused(
    ordered: list[int], cursor: int, near: set[int], used: set[int], degrees: list[int]
) -> tuple[int, int]:
    """First of `sorted(near - used, key=degree)` or -1, and the cursor in `ordered`."""
    size = len(ordered)
    while cursor < size and ordered[cursor] in used:
        cursor += 1
    if cursor == size:
        return -1, cursor
    first = ordered[cursor]
    degree = degrees[first]
    following = cursor + 1
    while following < size and ordered[following] in used:
        following += 1
    if following < size and degrees[ordered[following]] == degree:
        first = min(near - used, key=degrees.__getitem__)
    return first, cursor


def neighbours(triples: np.ndarray, entities: int, count: int) -> np.ndarray:
    """int32 [N, count]: neighbours by descending degree, -1 for padding."""
    near, degrees = _sets(triples, entities)
    rank = degrees.__getitem__
    result = np.full((entities, count), -1, np.int32)
    for i, group in enumerate(near):
        first = sorted(group, key=rank, reverse=True)[:count]
        result[i, : len(first)] = first
    return result
