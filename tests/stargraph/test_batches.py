"""Training batches: a pure function of seed and step, official sampling, distinct entities."""

from __future__ import annotations

import dataclasses
from itertools import islice

import numpy as np
import pytest

from data_pipelines.batch import DataError
from data_pipelines.graphs.answers import HEAD, TAIL, true_answers
from data_pipelines.graphs.demo import DemoGraph
from data_pipelines.graphs.pipeline import TripleBatches, list_distinct
from data_pipelines.graphs.tokenise import TokenSpec
from data_pipelines.graphs.triples import Graph, load
from data_pipelines.graphs.weighting import subsampling_weights, with_inverse
from tests.stargraph.memory import MemoryGraph

DATA = TripleBatches(DemoGraph(), TokenSpec(anchors=4), negatives=6)


def take(pipeline: TripleBatches, count: int, **options: int) -> list:
    settings = {"global_batch": 64, "seed": 3} | options
    return list(islice(pipeline.batches(**settings), count))


def test_a_resumed_run_reads_the_same_batches() -> None:
    whole = take(DATA, 6)
    resumed = take(DATA, 3, start_step=3)
    for a, b in zip(whole[3:], resumed, strict=True):
        assert a.info == b.info
        assert a.arrays.keys() == b.arrays.keys()
        assert all(np.array_equal(a.arrays[k], b.arrays[k]) for k in a.arrays)


def test_processes_share_one_global_batch() -> None:
    (whole,) = take(DATA, 1)
    parts = [take(DATA, 1, process_index=i, process_count=4)[0] for i in range(4)]
    for name, array in whole.arrays.items():
        assert np.array_equal(array, np.concatenate([p.arrays[name] for p in parts]))
    assert whole.info.record_ids == sum((p.info.record_ids for p in parts), ())


def test_directions_alternate_and_each_walks_through_all_triples() -> None:
    graph = load(DATA.source)
    steps = 2 * -(-len(graph.train) // 64)
    seen: dict[int, list[str]] = {TAIL: [], HEAD: []}
    for step, batch in enumerate(take(DATA, steps)):
        assert set(batch.arrays["mode"].tolist()) == {step % 2}
        seen[step % 2] += batch.info.record_ids
    for ids in seen.values():
        assert len(set(ids[: len(graph.train)])) == len(graph.train)


def test_negatives_are_not_true_in_train_and_cover_all_entities() -> None:
    graph = load(DATA.source)
    truth = true_answers(graph.train, graph.entities, graph.relations)
    drawn = []
    for batch in take(DATA, 8, global_batch=256):
        a = batch.arrays
        known = np.where(a["mode"] == HEAD, a["positive"][:, 2], a["positive"][:, 0])
        assert not truth.contains(known, a["positive"][:, 1], a["mode"], a["negative"]).any()
        drawn.append(a["negative"])
    assert len(np.unique(np.concatenate(drawn))) > 0.95 * graph.entities


def test_without_rejection_true_answers_are_drawn_too() -> None:
    triples = np.asarray([[0, 0, t] for t in range(1, 5)], np.int32)
    graph = MemoryGraph(Graph("small", 5, 1, triples, triples[:0], triples[:0]))
    free = TripleBatches(graph, TokenSpec(anchors=2), negatives=40, true_negatives=False)
    batch = take(free, 1, global_batch=8)[0].arrays
    assert set(batch["negative"].reshape(-1).tolist()) == set(range(5))
    strict = dataclasses.replace(free, true_negatives=True)
    assert set(take(strict, 1, global_batch=8)[0].arrays["negative"].reshape(-1).tolist()) == {0}


def test_a_query_without_possible_negatives_is_refused() -> None:
    triples = np.asarray([[0, 0, t] for t in range(3)], np.int32)
    graph = MemoryGraph(Graph("full", 3, 1, triples, triples[:0], triples[:0]))
    data = TripleBatches(graph, TokenSpec(anchors=2), negatives=2)
    with pytest.raises(DataError, match="every candidate is a true answer of entity 0, relation 0"):
        take(data, 1, global_batch=4)


def test_inverse_triples_follow_the_forward_ones() -> None:
    triples = np.asarray([[0, 0, 1], [2, 1, 3]], np.int32)
    assert with_inverse(triples, 2).tolist() == [[0, 0, 1], [2, 1, 3], [1, 2, 0], [3, 3, 2]]
    data = dataclasses.replace(DATA, inverse=True)
    assert data.describe()["relations"] == 22
    relations = np.concatenate([b.arrays["positive"][:, 1] for b in take(data, 10)])
    assert relations.max() >= 11


def test_sampling_weights_by_hand() -> None:
    triples = np.asarray([[0, 0, 1], [0, 0, 2], [3, 0, 1]])
    # c(0, r) = 3 + 2, c(1, r reversed) = 3 + 2, the others 3 + 1
    expected = 1 / np.sqrt([5 + 5, 5 + 4, 4 + 5])
    assert np.allclose(subsampling_weights(triples), expected)


def resolve(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A batch with positions in its list of entities turned back into ids."""
    listed, positive = arrays["entities"], arrays["positive"].copy()
    positive[:, [0, 2]] = listed[positive[:, [0, 2]]]
    return {**arrays, "positive": positive, "negative": listed[arrays["negative"]]}


@pytest.mark.parametrize("slots", [640, 599, 400])
def test_listing_distinct_entities_changes_nothing_else(slots: int) -> None:
    (plain,) = take(DATA, 1)
    (listed,) = take(dataclasses.replace(DATA, distinct=slots), 1)
    assert listed.info.cut == {}
    found = resolve(listed.arrays)
    assert len(found.pop("entities")) == slots
    assert all(np.array_equal(found[k], plain.arrays[k]) for k in plain.arrays)


def test_more_distinct_entities_than_slots_cut_the_last_triples() -> None:
    (plain,) = take(DATA, 1)
    arrays, cut = list_distinct(plain.arrays, 100, 599)
    kept = 64 - cut
    assert 0 < cut < 64
    found = resolve(arrays)
    assert np.array_equal(found["positive"][:kept], plain.arrays["positive"][:kept])
    assert np.array_equal(found["negative"][:kept], plain.arrays["negative"][:kept])
    assert (arrays["weight"][kept:] == 0).all()
    assert (arrays["weight"][:kept] > 0).all()
    one_more = np.concatenate(
        [
            plain.arrays["positive"][: kept + 1, [0, 2]].reshape(-1),
            plain.arrays["negative"][: kept + 1].reshape(-1),
        ]
    )
    assert len(np.unique(one_more)) > 100
    with pytest.raises(DataError, match=r"more than the 3 slots; raise data\.distinct"):
        list_distinct(plain.arrays, 3, 599)


def test_a_pool_limits_the_entities_of_a_step() -> None:
    data = dataclasses.replace(DATA, distinct=64 * 2 + 32, pool=32)
    for batch in take(data, 3):
        assert batch.info.cut == {}
        assert len(np.unique(resolve(batch.arrays)["negative"])) <= 32


def test_fingerprint_follows_data_and_options_but_not_the_cache() -> None:
    assert DATA.fingerprint() == dataclasses.replace(DATA, cache="elsewhere").fingerprint()
    others = [
        dataclasses.replace(DATA, negatives=7),
        dataclasses.replace(DATA, source=DemoGraph(seed=1)),
        dataclasses.replace(DATA, tokens=TokenSpec(anchors=5)),
    ]
    assert len({DATA.fingerprint(), *(o.fingerprint() for o in others)}) == 4


def test_assets_name_entities_and_relations() -> None:
    lines = DATA.assets()["entities.txt"].decode().splitlines()
    assert len(lines) == 599
    assert lines[0] == "person_0"
