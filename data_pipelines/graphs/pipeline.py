"""Training batches of a knowledge graph: positives, sampled negatives, weights.

The batch at step i is a pure function of (graph, options, seed, i). Even steps replace tails, odd
steps heads ("tail-batch" first, as the official loop), each direction walking through its own
shuffles of the triples. Where the official loader ends an epoch with a smaller batch, the batch
here is filled from the next shuffle, so that shapes are static.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from data_pipelines.batch import BatchInfo, DataError, HostBatch, Pipeline
from data_pipelines.graphs.answers import HEAD, TAIL, TrueAnswers, true_answers
from data_pipelines.graphs.cache import cached_tokens
from data_pipelines.graphs.tokenise import Tokens, TokenSpec
from data_pipelines.graphs.triples import Graph, GraphSource, inspect, load
from data_pipelines.graphs.weighting import subsampling_weights, with_inverse

_ORDER, _NEGATIVES = 1, 2  # streams of random numbers


@dataclasses.dataclass(frozen=True)
class TripleBatches(Pipeline):
    """Batches for StarGraph, and the tokens of its graph.

    Attributes:
      source: the triples.
      tokens: how entities become tokens (from the training triples without inverse edges).
      negatives: N, sampled per triple, uniform over entities (`negative_sample_size`).
      true_negatives: reject negatives that are true in train (`true_negative`).
      inverse: add (t, r + R, h) of every training triple (`inverse`).
      subsampling: weights 1/sqrt(count); False gives ones (`uni_weight`).
      distinct: slots for distinct entities, 0 for none (see `StarGraph.distinct`). Should a batch
        have more, its last triples are left out (weight 0) and counted as cut.
      pool: 0: negatives come from all entities. More: from that many, drawn anew for each step;
        needs `distinct`, and makes a step cheap when N is large.
      cache: folder for the tokens; None makes them at every start.
    """

    source: GraphSource
    tokens: TokenSpec = TokenSpec()  # noqa: RUF009 - frozen, so one instance serves all
    negatives: int = 64
    true_negatives: bool = True
    inverse: bool = False
    subsampling: bool = True
    distinct: int = 0
    pool: int = 0
    cache: str | None = None

    def __post_init__(self) -> None:
        if self.negatives < 1:
            raise ValueError(f"data.negatives: expected 1 or more, found {self.negatives}")
        if self.pool and not self.distinct:
            raise ValueError("data.pool: needs data.distinct (and system.distinct) > 0")

    def batches(
        self,
        *,
        global_batch: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        start_step: int = 0,
    ) -> Iterator[HostBatch]:
        graph = load(self.source)
        if self.pool > graph.entities:
            raise DataError(
                f"data.pool: expected at most the {graph.entities} entities, found {self.pool}"
            )
        sampler = _Sampler(self, graph, seed)
        step = start_step
        while True:
            arrays, cut, ids = sampler.batch(step, global_batch)
            part = {
                name: _share(array, name, process_index, process_count)
                for name, array in arrays.items()
            }
            names = _share(ids, "records", process_index, process_count).tolist()
            told = cut if process_index == 0 else {}  # of the whole batch: counted once
            info = BatchInfo(tuple(f"train:{i}" for i in names), cut=told, seen=len(names))
            yield HostBatch(part, info)
            step += 1

    def fingerprint(self) -> str:
        own = dataclasses.replace(self, cache=None)
        options = [getattr(own, f.name) for f in dataclasses.fields(own) if f.name != "source"]
        text = f"{self.source.fingerprint()} {options}"
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def constants(self) -> dict[str, np.ndarray]:
        """`graph/hashes`, `graph/path_ids`, `graph/nodes`, as far as the options use them."""
        return self.tokenised().constants()

    def tokenised(self) -> Tokens:
        """Tokens of the graph, from the cache where they are there."""
        graph = load(self.source)
        return cached_tokens(graph.train, graph.entities, self.tokens, self.cache)

    def describe(self) -> dict[str, Any]:
        graph = load(self.source)
        return {
            "source": graph.name,
            "entities": graph.entities,
            "relations": graph.relations * (1 + self.inverse),
            **{f"{s}_triples": len(graph.split(s)) for s in ("train", "valid", "test")},
            **inspect(graph),
        }

    def assets(self) -> dict[str, bytes]:
        """Names by id, one per line, so that exported weights can be asked about entities."""
        graph = load(self.source)
        names = {"entities.txt": graph.entity_names, "relations.txt": graph.relation_names}
        return {file: ("\n".join(n) + "\n").encode() for file, n in names.items() if n}


class _Sampler:
    """Everything that is the same for all steps of one run."""

    def __init__(self, options: TripleBatches, graph: Graph, seed: int) -> None:
        self.options = options
        self.entities = graph.entities
        self.seed = seed
        self.triples = graph.train
        relations = graph.relations
        if options.inverse:
            self.triples = with_inverse(self.triples, relations)
            relations *= 2
        self.weights = (
            subsampling_weights(self.triples)
            if options.subsampling
            else np.ones(len(self.triples), np.float32)
        )
        self.answers: TrueAnswers | None = None
        if options.true_negatives:
            self.answers = true_answers(self.triples, self.entities, relations)
        self.order = functools.lru_cache(maxsize=4)(self._order)

    def _order(self, mode: int, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, _ORDER, mode, epoch])
        return rng.permutation(len(self.triples)).astype(np.int32)

    def rows(self, step: int, size: int) -> np.ndarray:
        """Which triples make up the batch of a step, int64 [size]."""
        mode, turn = step % 2, step // 2
        total = len(self.triples)
        position = turn * size + np.arange(size)
        epochs = position // total
        picked = np.empty(size, np.int64)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            picked[here] = self.order(mode, epoch)[position[here] - epoch * total]
        return picked

    def batch(
        self, step: int, size: int
    ) -> tuple[dict[str, np.ndarray], dict[str, int], np.ndarray]:
        """Arrays of `StarGraph.batch_spec`, what was cut, and the rows of the triples."""
        mode = step % 2
        rows = self.rows(step, size)
        positive = self.triples[rows]
        negative = self.sample_negatives(step, positive, mode)
        arrays = {
            "positive": positive,
            "negative": negative,
            "weight": self.weights[rows],
            "mode": np.full(size, mode, np.int32),
        }
        cut: dict[str, int] = {}
        if self.options.distinct:
            arrays, dropped = list_distinct(arrays, self.options.distinct, self.entities)
            if dropped:
                cut["triples"] = dropped
        return arrays, cut, rows

    def sample_negatives(self, step: int, positive: np.ndarray, mode: int) -> np.ndarray:
        """int32 [B, N]: 2N drawn at a time per triple, true ones rejected, the first N kept."""
        rng = np.random.default_rng([self.seed, _NEGATIVES, step])
        size, wanted = len(positive), self.options.negatives
        pool = None
        if self.options.pool:
            pool = rng.choice(self.entities, self.options.pool, replace=False).astype(np.int32)
        if self.answers is None:
            return self._draw(rng, pool, (size, wanted))
        known = positive[:, 2 if mode == HEAD else 0]
        relation, modes = positive[:, 1], np.full(size, mode)
        self._check_possible(known, relation, modes, pool)
        result = np.empty((size, wanted), np.int32)
        have = np.zeros(size, np.int64)
        open_ = np.arange(size)
        while len(open_):
            drawn = self._draw(rng, pool, (len(open_), 2 * wanted))
            good = ~self.answers.contains(known[open_], relation[open_], modes[open_], drawn)
            slot = have[open_][:, None] + np.cumsum(good, 1) - 1
            row, column = np.nonzero(good & (slot < wanted))
            result[open_[row], slot[row, column]] = drawn[row, column]
            have[open_] += good.sum(1)
            open_ = open_[have[open_] < wanted]
        return result

    def _draw(
        self, rng: np.random.Generator, pool: np.ndarray | None, shape: tuple[int, int]
    ) -> np.ndarray:
        if pool is None:
            return rng.integers(0, self.entities, shape, np.int32)
        return pool[rng.integers(0, len(pool), shape)]

    def _check_possible(
        self,
        known: np.ndarray,
        relation: np.ndarray,
        modes: np.ndarray,
        pool: np.ndarray | None,
    ) -> None:
        """Refuse a query all of whose possible answers are true: rejection would never end."""
        assert self.answers is not None
        counts = self.answers.counts(known, relation, modes)
        available = self.entities if pool is None else len(pool)
        for i in np.flatnonzero(counts >= available):
            options = np.arange(self.entities) if pool is None else pool
            if self.answers.contains(
                known[i : i + 1], relation[i : i + 1], modes[i : i + 1], options[None]
            ).all():
                raise DataError(
                    f"negatives: every candidate is a true answer of entity {int(known[i])}, "
                    f"relation {int(relation[i])}; set data.true_negatives=False or a larger pool"
                )


def list_distinct(
    arrays: dict[str, np.ndarray], slots: int, entities: int
) -> tuple[dict[str, np.ndarray], int]:
    """Entities of a batch listed once in `entities` [slots], ids replaced by positions there.

    With at least as many slots as the graph has entities the list is simply all of them. Otherwise,
    when the batch has more distinct entities than slots, its last triples get weight 0.

    Returns:
      The arrays, and how many triples were left out.

    Raises:
      DataError: not even one triple fits.
    """
    if slots >= entities:
        listed = np.minimum(np.arange(slots), entities - 1).astype(np.int32)
        return {**arrays, "entities": listed}, 0
    positive, negative = arrays["positive"], arrays["negative"]
    ids = np.concatenate([positive[:, [0, 2]], negative], 1)
    size = len(ids)
    keep = size
    listed, where = np.unique(ids, return_inverse=True)
    if len(listed) > slots:
        first = np.full(entities, size, np.int64)
        np.minimum.at(first, ids.reshape(-1), np.repeat(np.arange(size), ids.shape[1]))
        needed = np.cumsum(np.bincount(first[listed], minlength=size))
        keep = int(np.searchsorted(needed, slots, side="right"))
        if keep == 0:
            raise DataError(
                f"data.distinct: one triple with its negatives has {int(needed[0])} entities, more "
                f"than the {slots} slots; raise data.distinct and system.distinct"
            )
        ids = np.concatenate([ids[:keep], np.repeat(ids[:1], size - keep, 0)])
        listed, where = np.unique(ids, return_inverse=True)
    where = where.reshape(ids.shape).astype(np.int32)
    weight = arrays["weight"].copy()
    weight[keep:] = 0
    padded = np.full(slots, listed[0], np.int32)
    padded[: len(listed)] = listed
    placed = np.stack([where[:, 0], positive[:, 1], where[:, 1]], 1)
    return {
        **arrays,
        "positive": np.ascontiguousarray(placed, np.int32),
        "negative": np.ascontiguousarray(where[:, 2:]),
        "weight": weight,
        "entities": padded,
    }, size - keep


def _share(array: np.ndarray, name: str, index: int, count: int) -> np.ndarray:
    if len(array) % count:
        raise DataError(f"{name}: {len(array)} rows cannot be split over {count} processes")
    part = len(array) // count
    return array[index * part : (index + 1) * part]


__all__ = ["HEAD", "TAIL", "TripleBatches", "list_distinct"]
