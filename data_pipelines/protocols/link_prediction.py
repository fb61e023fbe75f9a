"""Link prediction: rank the true head and the true tail of every triple of a split.

Two protocols, and nothing in between:

* "filtered": against all entities, other true answers (train + valid + test) left out, ties count
  against the model. FB15k-237 as the official StarGraph code evaluates it: the entities of train
  only (14,505), 17,526 valid and 20,438 test triples.
* "given": against the negatives that come with the split, nothing left out, ties count half (the
  OGB evaluator). ogbl-wikikg2: 500 per side; with inverse queries every triple asks four questions.

Numbers are means over all questions, heads and tails together.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.batch import DataError
from data_pipelines.graphs.answers import HEAD, TAIL, true_answers
from data_pipelines.graphs.triples import Graph, GraphSource, load
from data_pipelines.graphs.weighting import with_inverse
from data_pipelines.protocols.base import (
    EvalResult,
    Functions,
    IncomparableError,
    Metric,
    Panel,
    Protocol,
)
from jaxmods.metrics.ranking import HITS, chance, ranks, summarise
from jaxmods.systems.stargraph import scores

KINDS = ("1-1", "1-N", "N-1", "N-N")
SIDES = {TAIL: "tail", HEAD: "head"}
_MANY = 1.5  # answers per query from which a side counts as "N" (Bordes et al., 2013)
_LARGEST_TABLE = 8 << 30  # bytes of a candidate table that is kept


@dataclasses.dataclass(frozen=True)
class LinkPrediction(Protocol):
    """See the module's docstring.

    Attributes:
      source: the graph.
      split: "valid" or "test".
      candidates: "filtered" or "given".
      inverse: ask every question a second time through the inverse relation (`val_inverse`; the
        training data must have inverse relations).
      first: only so many triples, 0 for all; the name then says so.
      queries: questions scored at a time.
      published: (metric, value) pairs of the paper for this setting.
    """

    source: GraphSource
    split: Literal["valid", "test"] = "test"
    candidates: Literal["filtered", "given"] = "filtered"
    inverse: bool = False
    first: int = 0
    queries: int = 256
    published: tuple[tuple[str, float], ...] = ()

    @property
    def name(self) -> str:
        """As "link_prediction_test", or "link_prediction_test_first500"."""
        part = f"_first{self.first}" if self.first else ""
        return f"link_prediction_{self.split}{part}"

    def requires(self) -> tuple[str, ...]:
        return ("entity_vectors", "relation_terms", "score_candidates")

    def check(self) -> None:
        if self.first and self.published:
            raise IncomparableError(
                f"{self.name}: {self.first} triples of the split cannot be compared with the "
                "published figure; set first=0 or published=()"
            )
        if self.queries < 1:
            raise IncomparableError(f"{self.name}: expected queries >= 1, found {self.queries}")

    def run(self, functions: Functions, *, panels: bool = False) -> EvalResult:
        begin = time.perf_counter()
        graph = load(self.source)
        questions = _questions(graph, self.split, self.first, self.inverse)
        if not len(questions.triples):
            raise DataError(f"{graph.name}: expected {self.split} triples, found none")
        if self.candidates == "filtered":
            raw, filtered, pools = self._rank_all(functions, graph, questions)
            ranked = {"": filtered, "raw/": raw}
        else:
            given, pools = self._rank_given(functions, graph, questions)
            ranked = {"": given}
        metrics = _metrics(graph, questions, ranked, pools, dict(self.published))
        settings = {
            "split": self.split,
            "candidates": self.candidates,
            "ties": self._ties,
            "entities": graph.entities,
            "queries": len(questions.triples),
            "inverse": self.inverse,
            "filter": "train + valid + test" if self.candidates == "filtered" else "none",
        }
        left_out = {k: v for k, v in graph.counts.items() if k.startswith(f"{self.split}_")}
        return EvalResult(
            self.name,
            metrics,
            settings,
            len(questions.triples) // questions.per_triple,
            time.perf_counter() - begin,
            (_panel(metrics),) if panels else (),
            left_out,
        )

    @property
    def _ties(self) -> Literal["pessimistic", "mean"]:
        return "pessimistic" if self.candidates == "filtered" else "mean"

    def _rank_all(
        self, functions: Functions, graph: Graph, questions: _Questions
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Raw ranks, filtered ranks, and the number of filtered candidates of every question."""
        relations = graph.relations * (1 + self.inverse)
        known_triples = graph.known()
        if self.inverse:
            known_triples = with_inverse(known_triples, graph.relations)
        truth = true_answers(known_triples, graph.entities, relations)
        table = jnp.asarray(entity_table(functions, graph.entities))
        terms = _relation_terms(functions, relations)
        known, relation = questions.known, questions.triples[:, 1]
        sizes = truth.counts(known, relation, questions.mode)
        counts = np.empty((len(sizes), 4), np.int64)
        # Questions with similarly many answers go together: few shapes, little padding.
        order = np.argsort(sizes, kind="stable")
        for low in range(0, len(order), self.queries):
            rows = order[low : low + self.queries]
            width = _bucket(int(sizes[rows].max()))
            rows = np.resize(rows, self.queries)  # a short last group repeats itself
            skip = truth.padded(known[rows], relation[rows], questions.mode[rows], width)
            counts[rows] = _RANK_COUNTS(
                table,
                scores.Terms(*(t[relation[rows]] for t in terms)),
                questions.triples[rows],
                questions.mode[rows],
                skip,
            )
        raw = ranks(counts[:, 0], counts[:, 1], self._ties)
        filtered = ranks(counts[:, 2], counts[:, 3], self._ties)
        return raw, filtered, graph.entities - sizes + 1

    def _rank_given(
        self, functions: Functions, graph: Graph, questions: _Questions
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ranks, and the number of candidates of every question."""
        negatives = questions.negatives
        if negatives is None:
            raise DataError(
                f"{graph.name}: the {self.split} split has no given negatives; use "
                "candidates='filtered'"
            )
        answer = np.where(questions.mode == HEAD, questions.triples[:, 0], questions.triples[:, 2])
        relation = questions.triples[:, 1]
        size = len(answer)
        terms = _relation_terms(functions, graph.relations * (1 + self.inverse))
        width = terms.head.shape[1]
        table = None
        if graph.entities * width * 4 <= _LARGEST_TABLE:
            table = jnp.asarray(entity_table(functions, graph.entities))
        counts = np.empty((size, 2), np.int64)
        for low in range(0, size, self.queries):
            rows = np.resize(np.arange(low, min(low + self.queries, size)), self.queries)
            candidates = np.concatenate([answer[rows, None], negatives[rows]], 1)
            known, mode = questions.known[rows], questions.mode[rows]
            if table is not None:
                part = scores.Terms(*(t[relation[rows]] for t in terms))
                counts[rows] = _GIVEN_COUNTS(table, part, known, mode, candidates)
            else:
                score = functions["score_candidates"](known, relation[rows], mode, candidates)
                counts[rows] = scores.given_counts(jnp.asarray(score))
        pools = np.full(size, negatives.shape[1] + 1)
        return ranks(counts[:, 0], counts[:, 1], self._ties), pools


@dataclasses.dataclass(frozen=True)
class _Questions:
    """One row per question: its triple, the side asked for, the known entity."""

    triples: np.ndarray
    mode: np.ndarray
    negatives: np.ndarray | None
    per_triple: int

    @property
    def known(self) -> np.ndarray:
        return np.where(self.mode == HEAD, self.triples[:, 2], self.triples[:, 0])


def _questions(graph: Graph, split: str, first: int, inverse: bool) -> _Questions:
    """Head questions of all triples, then tail questions; inverse triples appended to each."""
    triples = graph.split(split)
    given = graph.negatives(split)
    if first:
        triples = triples[:first]
        given = None if given is None else (given[0][:first], given[1][:first])
    if inverse:
        triples = with_inverse(triples, graph.relations)
        if given is not None:
            heads, tails = given
            given = (np.concatenate([heads, tails]), np.concatenate([tails, heads]))
    mode = np.repeat(np.asarray([HEAD, TAIL], np.int32), len(triples))
    return _Questions(
        np.concatenate([triples, triples]),
        mode,
        None if given is None else np.concatenate(given),
        4 if inverse else 2,
    )


def entity_table(functions: Functions, entities: int) -> np.ndarray:
    """Normalised vectors float32 [N, D] of all entities."""
    return np.asarray(functions["entity_vectors"](np.arange(entities, dtype=np.int32)))


def relation_kinds(train: np.ndarray, relations: int) -> np.ndarray:
    """Kind of each relation, index into `KINDS`: 1 or N heads per tail, 1 or N tails per head.

    N means at least 1.5 on average over train (Bordes et al., 2013). Relations that train does not
    have count as 1-1.
    """
    many = []
    for one, other in ((2, 0), (0, 2)):  # heads per tail, tails per head
        triples = np.unique(train[:, [1, one, other]], axis=0)
        queries = np.unique(triples[:, :2], axis=0)
        answers = np.bincount(triples[:, 0], minlength=relations)
        asked = np.bincount(queries[:, 0], minlength=relations)
        many.append(answers / np.maximum(asked, 1) >= _MANY)
    return 2 * many[0].astype(int) + many[1].astype(int)


def _relation_terms(functions: Functions, relations: int) -> scores.Terms:
    found = functions["relation_terms"](np.arange(relations, dtype=np.int32))
    return scores.Terms(*found)


def _bucket(size: int) -> int:
    """Width of the padded answers: powers of 4 from 16."""
    width = 16
    while width < size:
        width *= 4
    return width


def _given_counts(
    table: jax.Array,
    terms: scores.Terms,
    known: jax.Array,
    mode: jax.Array,
    candidates: jax.Array,
) -> jax.Array:
    query = scores.query(terms, table[known], mode)
    return scores.given_counts(scores.score_candidates(query, table[candidates]))


_RANK_COUNTS = jax.jit(scores.rank_counts)
_GIVEN_COUNTS = jax.jit(_given_counts)


def _metrics(
    graph: Graph,
    questions: _Questions,
    ranked: dict[str, np.ndarray],
    pools: np.ndarray,
    published: dict[str, float],
) -> dict[str, Metric]:
    """All together; by side; by kind of relation and side (of the forward relation)."""
    kind = relation_kinds(graph.train, graph.relations)[questions.triples[:, 1] % graph.relations]
    everything = np.ones(len(pools), bool)
    groups = {"": everything}
    for mode, side in SIDES.items():
        groups[f"{side}/"] = questions.mode == mode
    for number, name in enumerate(KINDS):
        groups[f"{name}/"] = kind == number
        for mode, side in SIDES.items():
            groups[f"{name}/{side}/"] = (kind == number) & (questions.mode == mode)
    metrics = {}
    for prefix, rank in ranked.items():
        for group, member in groups.items():
            if not member.any() or (prefix and group):
                continue
            # Raw candidates are all entities; their number is known without the filter.
            sizes = np.full(len(rank), graph.entities) if prefix else pools
            guess = chance(sizes[member])
            for name, value in summarise(rank[member]).items():
                key = f"{prefix}{group}{name}"
                metrics[key] = Metric(value, guess[name], published.get(key))
    return metrics


def _panel(metrics: dict[str, Metric]) -> Panel:
    columns = ["mrr", "mr", *(f"hits@{k}" for k in HITS)]
    rows = [""] + [f"{s}/" for s in SIDES.values()]
    rows += [f"{k}/{s}" for k in KINDS for s in ("", *(f"{v}/" for v in SIDES.values()))]
    if "raw/mrr" in metrics:
        rows.append("raw/")
    body = "".join(
        f"<tr><td>{row.strip('/') or 'all'}</td>"
        + "".join(f"<td>{metrics[row + c].value:.4f}</td>" for c in columns)
        + "</tr>"
        for row in rows
        if row + "mrr" in metrics
    )
    head = "".join(f"<th>{c}</th>" for c in ("questions", *columns))
    return Panel(
        "Link prediction by side and kind of relation",
        "Rows are groups of questions: which side is asked for, and how many heads per tail and "
        "tails per head a relation has on average in train.",
        html=f"<table><tr>{head}</tr>{body}</table>",
    )
