"""Tokenisation: the vectorised sampler against the definition, degenerate graphs, the cache."""

from __future__ import annotations

import numpy as np
import pytest

from data_pipelines.graphs import anchors_by_id
from data_pipelines.graphs.adjacency import build_adjacency
from data_pipelines.graphs.cache import cached_tokens
from data_pipelines.graphs.demo import DemoGraph
from data_pipelines.graphs.tokenise import TokenSpec, sample_anchors, tokenise
from data_pipelines.graphs.triples import load


def by_definition(triples, entities, limit, skip, count):
    """The rules of the spec, word for word, ties by entity id."""
    near = [set() for _ in range(entities)]
    label: dict[tuple[int, int], int] = {}
    relations = triples[:, 1].max() + 1
    degree = [0] * entities
    for h, r, t in triples.tolist():
        near[h].add(t)
        near[t].add(h)
        degree[h] += 1
        degree[t] += 1
        label[h, t] = min(label.get((h, t), 1 << 30), r)
        label[t, h] = min(label.get((t, h), 1 << 30), r + relations)
    order: list[int] = []
    for i in sorted(range(entities), key=lambda e: (-degree[e], e)):
        if near[i] and len(near[i] & set(order)) / len(near[i]) <= skip:
            order.append(i)
            if len(order) == limit:
                break
    own = [sorted(n & set(order), key=lambda e: (degree[e], e)) for n in near]
    rows = []
    for i in range(entities):
        found: list[tuple[int, int, int]] = []
        hops = sorted(near[i] - set(order), key=lambda e: (len(own[e]), e))
        while len(found) < count:
            before = len(found)
            for j, direct in ((i, True), *((j, False) for j in hops)):
                used = {f[0] for f in found}
                free = [a for a in own[j] if a not in used]
                if free and direct:
                    found.append((free[0], -1, label[free[0], i]))
                elif free:
                    found.append((free[0], label[free[0], j], label[j, i]))
            if len(found) == before:
                break
        rows.append((found + [(-1, -1, -1)] * count)[:count])
    table = np.asarray(rows)
    return np.asarray(order), table[..., 0], table[..., 1:]


def random_graph(rng: np.random.Generator) -> tuple[np.ndarray, int]:
    entities, size = int(rng.integers(3, 60)), int(rng.integers(1, 250))
    head = rng.integers(0, entities, size) ** 2 // entities  # a few hubs
    return np.stack([head, rng.integers(0, 4, size), rng.integers(0, entities, size)], 1), entities


@pytest.mark.parametrize("visits", [192, 2])  # in lockstep; finished one entity at a time
def test_vectorised_sampler_follows_the_definition(monkeypatch, visits: int) -> None:
    monkeypatch.setattr(anchors_by_id, "_VISITS", visits)
    rng = np.random.default_rng(visits)
    for _ in range(25):
        triples, entities = random_graph(rng)
        skip, limit = float(rng.choice([0.1, 0.2, 0.5, 0.9])), int(rng.integers(1, entities + 1))
        count = int(rng.integers(1, 9))
        order, anchors, paths = by_definition(triples, entities, limit, skip, count)
        found = anchors_by_id.sample(build_adjacency(triples, entities), limit, skip, count)
        assert np.array_equal(found[0], order)
        assert np.array_equal(found[1], anchors)
        assert np.array_equal(found[2], paths)


def test_tie_rules_choose_equally_good_samples() -> None:
    graph = load(DemoGraph())
    spec = TokenSpec(skip_ratio=0.2, anchors=6)
    official = sample_anchors(graph.train, graph.entities, spec)
    by_id = sample_anchors(
        graph.train, graph.entities, TokenSpec(skip_ratio=0.2, anchors=6, ties="id")
    )
    assert set(official.anchor_order) == set(by_id.anchor_order)
    assert np.array_equal((official.anchors >= 0).sum(1), (by_id.anchors >= 0).sum(1))


@pytest.mark.parametrize("ties", ["official", "id"])
def test_isolated_entities_and_self_loops(ties: str) -> None:
    triples = np.asarray([[0, 0, 0], [1, 0, 2]])  # a self-loop, a pair, and entity 3 alone
    spec = TokenSpec(anchors=3, neighbours=2, center=True, ties=ties)
    tokens = tokenise(triples, 4, spec)
    assert tokens.hashes is not None
    assert tokens.nodes is not None
    padding = len(tokens.anchor_entities)
    assert (tokens.hashes[3] == padding).all()
    assert tokens.nodes.tolist() == [[0, 0, 4], [1, 2, 4], [2, 1, 4], [3, 4, 4]]
    assert 0 in tokens.anchor_entities.tolist()


def test_rows_are_padded_to_a_multiple() -> None:
    graph = load(DemoGraph())
    tokens = tokenise(graph.train, graph.entities, TokenSpec(anchors=4, row_multiple=64))
    assert tokens.hashes is not None
    assert tokens.path_ids is not None
    assert tokens.hashes.shape == (640, 4)
    assert (tokens.hashes[graph.entities :] == len(tokens.anchor_entities)).all()
    assert (tokens.path_ids[graph.entities :] == tokens.paths).all()


def test_empty_graph_and_bad_ids_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one training triple"):
        build_adjacency(np.zeros((0, 3), int), 4)
    with pytest.raises(ValueError, match=r"expected entity ids in 0\.\.4"):
        build_adjacency(np.asarray([[0, 0, 5]]), 5)
    with pytest.raises(ValueError, match="at most 4 anchors"):
        tokenise(np.asarray([[0, 0, 1]]), 4, TokenSpec(anchor_size=5))


def test_cache_is_used_checked_and_repaired(tmp_path, caplog) -> None:
    graph = load(DemoGraph())
    spec = TokenSpec(anchors=4, center=True)
    first = cached_tokens(graph.train, graph.entities, spec, str(tmp_path))
    (path,) = tmp_path.glob("tokens_*.npz")
    stamp = path.stat().st_mtime_ns
    again = cached_tokens(graph.train, graph.entities, spec, str(tmp_path))
    assert path.stat().st_mtime_ns == stamp
    assert np.array_equal(first.hashes, again.hashes)
    assert (first.paths, first.entities) == (again.paths, again.entities)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))
    repaired = cached_tokens(graph.train, graph.entities, spec, str(tmp_path))
    assert "damaged" in caplog.text
    assert np.array_equal(first.nodes, repaired.nodes)
    cached_tokens(graph.train[::-1], graph.entities, spec, str(tmp_path))
    assert len(list(tmp_path.glob("tokens_*.npz"))) == 2  # another order is another graph
