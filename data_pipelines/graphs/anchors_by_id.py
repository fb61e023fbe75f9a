"""Anchors with ties broken by entity id, vectorised over entities, for graphs of any size.

The same sample as `anchors_official` up to the order of equally good anchors. All entities of a
block are advanced together, one visit to one source of anchors at a time; memory is a few flat
arrays over the edges.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from data_pipelines.graphs.adjacency import Adjacency, take_rows

_BLOCK = 1 << 16  # entities advanced together
_VISITS = 192  # visits in lockstep; the few entities that need more are finished one by one
_THREADS = 2


def choose(graph: Adjacency, limit: int, skip_ratio: float) -> np.ndarray:
    """Anchors int64 [M] in order of choice: by descending degree, ties by id.

    An entity is skipped when more than `skip_ratio` of its neighbours are anchors already, or when
    it has no neighbours.
    """
    sizes = np.diff(graph.starts)
    surrounded = np.zeros(graph.entities, np.int64)
    order = np.lexsort((np.arange(graph.entities), -graph.degrees))
    chosen: list[int] = []
    for i in order.tolist():
        if sizes[i] == 0 or surrounded[i] / sizes[i] > skip_ratio:
            continue
        chosen.append(i)
        surrounded[graph.row(i)] += 1
        if len(chosen) == limit:
            break
    return np.asarray(chosen, np.int64)


def sample(
    graph: Adjacency, limit: int, skip_ratio: float, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Anchor order int64 [M], anchors int32 [N, count], paths int32 [N, count, 2] (-1: padding)."""
    order = choose(graph, limit, skip_ratio)
    sources = _Sources(graph, order)
    anchors = np.full((graph.entities, count), -1, np.int32)
    middle = np.full((graph.entities, count), -1, np.int32)
    blocks = range(0, graph.entities, _BLOCK)
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(lambda low: _sample_block(sources, low, anchors, middle), blocks))
    return order, anchors, _paths(graph, anchors, middle)


class _Sources:
    """For each entity: its own anchors by degree, and the neighbours to look through, by rank."""

    def __init__(self, graph: Adjacency, order: np.ndarray) -> None:
        is_anchor = np.zeros(graph.entities, bool)
        is_anchor[order] = True
        target_is_anchor = is_anchor[graph.neighbours]
        source = graph.sources()
        # Rows are sorted by id already, so a stable sort by (row, key) breaks ties by id.
        starts, near, rows = take_rows(graph.starts, target_is_anchor, graph.neighbours, source)
        self.anchor_starts = starts
        self.anchors = near[_stable_within_rows(rows, graph.degrees[near])]
        ranks = np.diff(starts)  # anchor neighbours of every entity
        useful = ~target_is_anchor & (ranks[graph.neighbours] > 0)
        starts, hops, rows = take_rows(graph.starts, useful, graph.neighbours, source)
        self.hop_starts = starts
        self.hops = hops[_stable_within_rows(rows, ranks[hops])]


def _stable_within_rows(rows: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Permutation that sorts by `key` within rows (rows ascending), keeping ties in order."""
    high = int(key.max(initial=0)) + 1
    return np.argsort(rows.astype(np.int64) * high + key, kind="stable")


def _sample_block(sources: _Sources, low: int, anchors: np.ndarray, middle: np.ndarray) -> None:
    """Fill rows `low .. low + _BLOCK` of `anchors` and `middle` (-1: one hop)."""
    high = min(low + _BLOCK, len(anchors))
    count = anchors.shape[1]
    rows = np.arange(low, high)
    hops = np.diff(sources.hop_starts)[rows]
    own = np.diff(sources.anchor_starts)[rows]
    rows = rows[(hops > 0) | (own > 0)]
    filled = np.zeros(len(rows), np.int64)
    turn = np.zeros(len(rows), np.int64)  # 0: own anchors, 1 + k: neighbour k
    before = np.zeros(len(rows), np.int64)  # anchors when the round began
    for _ in range(_VISITS):
        if not len(rows):
            return
        at_own = turn == 0
        first_hop = sources.hop_starts[rows]
        hop_at = np.minimum(first_hop + np.maximum(turn - 1, 0), max(len(sources.hops) - 1, 0))
        via = np.where(at_own, rows, sources.hops[hop_at] if len(sources.hops) else rows)
        pick = _first_unused(sources, via, anchors, rows, filled)
        hit = pick >= 0
        where = rows[hit], filled[hit]
        anchors[where] = pick[hit]
        middle[where] = np.where(at_own, -1, via)[hit]
        filled = filled + hit
        turn = turn + 1
        wrap = turn > sources.hop_starts[rows + 1] - first_hop
        done = (filled == count) | (wrap & (filled == before))
        before = np.where(wrap, filled, before)
        turn = np.where(wrap, 0, turn)
        keep = ~done
        rows, filled, turn, before = rows[keep], filled[keep], turn[keep], before[keep]
    for row, have, at, start in zip(rows, filled, turn, before, strict=True):
        _finish(sources, int(row), int(have), int(at), int(start), anchors[row], middle[row])


def _first_unused(
    sources: _Sources, via: np.ndarray, anchors: np.ndarray, rows: np.ndarray, filled: np.ndarray
) -> np.ndarray:
    """For each row the first anchor of entity `via` that the row has not used, or -1."""
    result = np.full(len(rows), -1, np.int64)
    cursor, end = sources.anchor_starts[via], sources.anchor_starts[via + 1]
    open_ = np.flatnonzero(cursor < end)
    width = int(filled.max(initial=0))
    while len(open_):
        candidate = sources.anchors[cursor[open_]]
        used = (anchors[rows[open_], :width] == candidate[:, None]).any(1)
        free = open_[~used]
        result[free] = candidate[~used]
        open_ = open_[used]
        cursor[open_] += 1
        open_ = open_[cursor[open_] < end[open_]]
    return result


def _finish(
    sources: _Sources,
    row: int,
    filled: int,
    turn: int,
    before: int,
    anchors: np.ndarray,
    middle: np.ndarray,
) -> None:
    """Go on with one entity from where the lockstep stopped; `anchors`, `middle` are its rows."""
    hops = sources.hops[sources.hop_starts[row] : sources.hop_starts[row + 1]]
    own = sources.anchors[sources.anchor_starts[row] : sources.anchor_starts[row + 1]]
    used = set(anchors[:filled].tolist())
    while True:
        if turn == 0:
            turn = 1
            free = next((a for a in own.tolist() if a not in used), None)
            if free is not None:
                filled = _put(anchors, middle, filled, free, -1, used)
        while filled < len(anchors) and turn <= len(hops):
            step, free = _next_source(sources, hops, turn - 1, anchors[:filled])
            turn = step + 2
            if free >= 0:
                filled = _put(anchors, middle, filled, free, int(hops[step]), used)
        if filled == len(anchors) or filled == before:
            return
        before, turn = filled, 0


def _put(
    anchors: np.ndarray, middle: np.ndarray, filled: int, anchor: int, via: int, used: set[int]
) -> int:
    anchors[filled], middle[filled] = anchor, via
    used.add(anchor)
    return filled + 1


def _next_source(
    sources: _Sources, hops: np.ndarray, begin: int, used: np.ndarray
) -> tuple[int, int]:
    """First neighbour at or after `begin` with an unused anchor: its position and the anchor.

    (len(hops) - 1, -1) when there is none. At most `len(used) + 1` anchors of each neighbour need
    a look, so whole blocks are tested at once.
    """
    look = np.arange(len(used) + 1)
    block = 256
    while begin < len(hops):
        via = hops[begin : begin + block]
        at = sources.anchor_starts[via][:, None] + look
        valid = at < sources.anchor_starts[via + 1][:, None]
        candidate = sources.anchors[np.minimum(at, len(sources.anchors) - 1)]
        free = valid & ~np.isin(candidate, used)
        some = free.any(1)
        if some.any():
            k = int(np.argmax(some))
            return begin + k, int(candidate[k, np.argmax(free[k])])
        begin += len(via)
        block = min(2 * block, 1 << 16)
    return len(hops) - 1, -1


def _paths(graph: Adjacency, anchors: np.ndarray, middle: np.ndarray) -> np.ndarray:
    """Labels along anchor -> [middle ->] entity, int32 [N, A, 2]; -1 where there is no edge."""
    paths = np.full((*anchors.shape, 2), -1, np.int32)
    for low in range(0, len(anchors), _BLOCK):
        block = slice(low, low + _BLOCK)
        row, column = np.nonzero(anchors[block] >= 0)
        entity = row + low
        anchor, via = anchors[entity, column], middle[entity, column]
        two = via >= 0
        paths[entity[two], column[two], 0] = graph.label(anchor[two], via[two])
        last = np.where(two, via, anchor)
        paths[entity, column, 1] = graph.label(last, entity)
    return paths
