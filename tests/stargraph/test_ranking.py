"""Ranks, chance levels, and the protocol against a ranking written out triple by triple."""

from __future__ import annotations

import numpy as np
import pytest

from data_pipelines.graphs.triples import Graph
from data_pipelines.protocols.base import IncomparableError
from data_pipelines.protocols.link_prediction import KINDS, LinkPrediction, relation_kinds
from jaxmods.metrics.ranking import chance, ranks, summarise
from tests.stargraph.memory import MemoryGraph

N, R, D = 23, 4, 8


def test_tie_rules() -> None:
    greater, equal = np.asarray([0, 0, 3]), np.asarray([0, 2, 1])
    assert ranks(greater, equal, "pessimistic").tolist() == [1, 3, 5]
    assert ranks(greater, equal, "mean").tolist() == [1.0, 2.0, 4.5]


def test_summary_by_hand() -> None:
    found = summarise(np.asarray([1, 2, 4, 20]))
    assert found["mrr"] == pytest.approx((1 + 0.5 + 0.25 + 0.05) / 4)
    assert found["mr"] == 6.75
    assert (found["hits@1"], found["hits@3"], found["hits@10"]) == (0.25, 0.5, 0.75)
    with pytest.raises(ValueError, match="at least one rank"):
        summarise(np.zeros(0))


def test_chance_is_the_mean_over_random_orders() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 40, 200_000)
    drawn = summarise(rng.integers(1, sizes + 1))
    expected = chance(sizes)
    for name, value in expected.items():
        assert drawn[name] == pytest.approx(value, rel=0.02), name


def test_relation_kinds() -> None:
    one = [[h, 0, h + 10] for h in range(4)]
    fan_out = [[0, 1, t] for t in range(4)]
    fan_in = [[h, 2, 9] for h in range(4)]
    both = [[h, 3, t] for h in range(3) for t in range(3)]
    kinds = relation_kinds(np.asarray(one + fan_out + fan_in + both), 4)
    assert [KINDS[k] for k in kinds] == ["1-1", "1-N", "N-1", "N-N"]


class Toy:
    """Random tables under the functions that the protocol asks for."""

    def __init__(self, relations: int) -> None:
        rng = np.random.default_rng(1)
        # Few different values, so that scores tie.
        self.entity = rng.integers(-1, 2, (N, D)).astype(np.float32)
        self.terms = [rng.integers(1, 3, (relations, D)).astype(np.float32) for _ in range(3)]

    def functions(self) -> dict:
        return {
            "entity_vectors": lambda ids: self.entity[ids],
            "relation_terms": lambda ids: (
                *(t[ids] for t in self.terms),
                np.zeros(len(ids), np.float32),
            ),
            "score_candidates": self.score,
        }

    def score(self, known, relation, mode, candidates) -> np.ndarray:
        result = np.empty(candidates.shape, np.float32)
        for i, row in enumerate(candidates):
            for j, c in enumerate(row):
                h, t = (c, known[i]) if mode[i] else (known[i], c)
                head, tail, middle = (term[relation[i]] for term in self.terms)
                gap = self.entity[h] * head - self.entity[t] * tail + middle
                result[i, j] = -np.abs(gap).sum()
        return result


def toy_graph(given: bool) -> Graph:
    rng = np.random.default_rng(2)
    splits = [
        np.stack([rng.integers(0, n, s) for n in (N, R, N)], 1).astype(np.int32)
        for s in (60, 11, 13)
    ]
    negatives = [rng.integers(0, N, (13, 5)).astype(np.int32) for _ in range(2)]
    return Graph("toy", N, R, *splits, test_negatives=tuple(negatives) if given else None)


def expected_filtered(toy: Toy, graph: Graph) -> tuple[np.ndarray, np.ndarray]:
    """Raw and filtered ranks, one question at a time, in the official order."""
    truth = {tuple(t) for t in graph.known().tolist()}
    raw, filtered = [], []
    for side in (1, 0):
        for h, r, t in graph.test.tolist():
            known, answer = (t, h) if side else (h, t)
            args = [np.asarray([x]) for x in (known, r, side)]
            score = toy.score(*args, np.arange(N)[None])[0]
            true = [c for c in range(N) if ((c, r, t) if side else (h, r, c)) in truth]
            raw.append((score >= score[answer]).sum())
            others = np.setdiff1d(np.arange(N), true)
            filtered.append((score[others] >= score[answer]).sum() + 1)
    return np.asarray(raw), np.asarray(filtered)


def test_filtered_protocol_against_the_definition() -> None:
    toy, graph = Toy(R), toy_graph(False)
    result = LinkPrediction(MemoryGraph(graph), queries=7).run(toy.functions(), panels=True)
    raw, filtered = expected_filtered(toy, graph)
    for prefix, rank in (("", filtered), ("raw/", raw)):
        for name, value in summarise(rank).items():
            assert result.metrics[prefix + name].value == pytest.approx(value), prefix + name
    half = len(filtered) // 2
    for side, rank in (("head", filtered[:half]), ("tail", filtered[half:])):
        assert result.metrics[f"{side}/mrr"].value == pytest.approx(summarise(rank)["mrr"])
    assert result.records == 13
    assert result.settings["ties"] == "pessimistic"
    assert result.panels[0].html is not None
    assert result.metrics["mrr"].chance is not None


def test_given_negatives_with_inverse_questions() -> None:
    toy, graph = Toy(2 * R), toy_graph(True)
    task = LinkPrediction(MemoryGraph(graph), candidates="given", inverse=True, queries=6)
    result = task.run(toy.functions())
    assert graph.test_negatives is not None
    heads, tails = graph.test_negatives
    rank = []
    for inverse in (False, True):
        for side in (1, 0):
            for i, (h, r, t) in enumerate(graph.test.tolist()):
                if inverse:
                    h, r, t = t, r + R, h
                known, answer = (t, h) if side else (h, t)
                wrong = (heads if side != inverse else tails)[i]
                row = np.concatenate([[answer], wrong])[None]
                s = toy.score(*(np.asarray([x]) for x in (known, r, side)), row)[0]
                rank.append(0.5 * ((s[1:] > s[0]).sum() + (s[1:] >= s[0]).sum()) + 1)
    assert result.metrics["mrr"].value == pytest.approx(summarise(np.asarray(rank))["mrr"])
    assert result.settings["queries"] == 4 * 13


def test_a_part_of_the_split_cannot_carry_the_published_figure() -> None:
    part = LinkPrediction(MemoryGraph(toy_graph(False)), first=5)
    part.check()
    assert part.name == "link_prediction_test_first5"
    with pytest.raises(IncomparableError, match="first=0"):
        LinkPrediction(MemoryGraph(toy_graph(False)), first=5, published=(("mrr", 0.3),)).check()
