"""Time and peak memory of tokenisation and of the full filtered evaluation of FB15k-237.

    JAXMODS_FB15K237=FOLDER python benchmarks/stargraph_eval.py [--width 64] [--weights FOLDER]

Without weights the model is random: the work is the same. `--weights` takes a folder or file
with an official state dict of the small setting; then it is also counted how often the question's
own entity (the head, where the tail is asked for) scores at least as high as the answer.
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
import time

import jax
import jax.numpy as jnp
import numpy as np

from configs.stargraph import fb15k237_small, fb15k237_source
from data_pipelines.graphs.answers import HEAD, TAIL, true_answers
from data_pipelines.graphs.pipeline import TripleBatches
from data_pipelines.graphs.tokenise import TokenSpec, tokenise
from data_pipelines.graphs.triples import GraphSource, load
from data_pipelines.protocols.base import Functions
from data_pipelines.protocols.link_prediction import LinkPrediction
from jaxmods.partitioning import unbox
from jaxmods.systems.stargraph.system import StarGraph
from jaxmods.weights import import_params, open_weights
from tests.stargraph.memory import bound


def peak_gb() -> float:
    """Peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def own_entity_above(functions: Functions, source: GraphSource, first: int = 2000) -> float:
    """Share of the questions of the first test triples whose own entity, a wrong answer, outranks
    the right one."""
    graph = load(source)
    triples = np.concatenate([graph.test[:first]] * 2)
    mode = np.repeat([TAIL, HEAD], len(triples) // 2).astype(np.int32)
    asks_head = mode == HEAD
    known = np.where(asks_head, triples[:, 2], triples[:, 0])
    answer = np.where(asks_head, triples[:, 0], triples[:, 2])
    candidates = np.stack([answer, known], 1)
    score = functions["score_candidates"](known, triples[:, 1], mode, candidates)
    truth = true_answers(graph.known(), graph.entities, graph.relations)
    wrong = ~truth.contains(known, triples[:, 1], mode, known[:, None])[:, 0]
    return float((wrong & (score[:, 1] >= score[:, 0])).mean())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--weights", default=None)
    args = parser.parse_args()
    source = fb15k237_source()
    begin = time.perf_counter()
    graph = load(source)
    print(f"read {len(graph.train)} triples: {time.perf_counter() - begin:.2f} s")
    for ties in ("official", "id"):
        for skip in (0.2, 0.5):
            begin = time.perf_counter()
            tokenise(graph.train, graph.entities, TokenSpec(1.0, skip, 20, ties=ties))
            seconds = time.perf_counter() - begin
            print(f"tokenise, 20 anchors, skip {skip}, ties {ties}: {seconds:.2f} s")
    print(f"peak memory {peak_gb():.2f} GB")
    experiment = fb15k237_small()
    system, data = experiment.system, experiment.data
    assert isinstance(system, StarGraph)
    assert isinstance(data, TripleBatches)
    encoder = dataclasses.replace(system.encoder, width=args.width)
    system = dataclasses.replace(system, encoder=encoder)
    params = unbox(system.init(jax.random.key(0)))
    if args.weights:
        with open_weights(args.weights) as reader:
            params = import_params(reader, system.weights(), params, dtype="abstract").params
    else:
        for path, array in dataclasses.replace(data, cache=None).constants().items():
            params["graph"][path.split("/")[1]] = jnp.asarray(array)
    functions = bound(system, params)
    for attempt in ("first call, with compilation", "again"):
        result = LinkPrediction(source, "test").run(functions)
        print(
            f"filtered test, {result.settings['queries']} questions, d {args.width}, {attempt}: "
            f"{result.seconds:.1f} s, MRR {result.metrics['mrr'].value:.4f}, "
            f"peak memory {peak_gb():.2f} GB"
        )
    if args.weights:
        print(
            f"own entity above the answer: {own_entity_above(functions, source):.1%} of questions"
        )


if __name__ == "__main__":
    main()
