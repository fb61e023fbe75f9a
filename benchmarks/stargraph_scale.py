"""A synthetic graph of ogbl-wikikg2's size: tokenisation, and one sharded step on 8 devices.

    python benchmarks/stargraph_scale.py [--scale 1.0] [--recipe wikikg2|wikikg2_nodes]

The devices are simulated on the CPU. Peak memory is that of the whole process.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import resource
import time

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np

from configs import stargraph as recipes
from data_pipelines.graphs.pipeline import TripleBatches
from data_pipelines.graphs.triples import Graph
from jaxmods.partitioning import MeshShape, make_mesh
from jaxmods.systems.stargraph.system import StarGraph
from tests.stargraph.memory import MemoryGraph
from train.state import init_state, make_plan
from train.step import compile_step

ENTITIES, RELATIONS, TRIPLES = 2_500_604, 535, 16_109_182


def peak_gb() -> float:
    """Peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def synthetic_graph(scale: float) -> Graph:
    """Uneven degrees as in wikikg2: a few hubs with a large share of all triples."""
    rng = np.random.default_rng(0)
    entities, size = max(int(ENTITIES * scale), 8), max(int(TRIPLES * scale), 8)
    head = rng.integers(0, entities, size, np.int32)
    tail = (entities * rng.random(size) ** 6).astype(np.int32)
    relation = (RELATIONS * rng.random(size) ** 3).astype(np.int32)
    relation[0] = RELATIONS - 1
    train = np.stack([head, relation, tail], 1)
    return Graph("synthetic", entities, RELATIONS, train, train[:0], train[:0])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--recipe", default="wikikg2", choices=["wikikg2", "wikikg2_nodes"])
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args()
    begin = time.perf_counter()
    graph = synthetic_graph(args.scale)
    print(
        f"{graph.entities} entities, {len(graph.train)} triples: "
        f"{time.perf_counter() - begin:.1f} s, peak {peak_gb():.1f} GB",
        flush=True,
    )
    experiment = getattr(recipes, args.recipe)()
    system, data = experiment.system, experiment.data
    assert isinstance(system, StarGraph)
    assert isinstance(data, TripleBatches)
    size = dataclasses.replace(data.tokens, anchor_size=max(2.0, 20_000 * args.scale))
    data = dataclasses.replace(data, source=MemoryGraph(graph), tokens=size, cache=None)
    begin = time.perf_counter()
    tokens = data.tokenised()
    print(
        f"tokenisation: {time.perf_counter() - begin:.1f} s, peak {peak_gb():.1f} GB; "
        f"{len(tokens.anchor_entities)} anchors, path labels {tokens.paths}",
        flush=True,
    )
    encoder = dataclasses.replace(
        system.encoder, anchors=len(tokens.anchor_entities), paths=tokens.paths
    )
    system = dataclasses.replace(system, entities=graph.entities, encoder=encoder)
    experiment = dataclasses.replace(
        experiment,
        system=system,
        data=data,
        batch_size=args.batch,
        mesh=MeshShape(data=1, fsdp=8),
        evaluation=dataclasses.replace(experiment.evaluation, protocols=()),
    )
    plan = make_plan(experiment, make_mesh(experiment.mesh))
    begin = time.perf_counter()
    state = init_state(plan, constants=tokens.constants())
    jax.block_until_ready(state.trained)
    print(f"initialised on 8 devices: {time.perf_counter() - begin:.1f} s, peak {peak_gb():.1f} GB")
    for name, table in state.frozen["graph"].items():
        print(f"  graph/{name} {table.shape}, per device {table.addressable_shards[0].data.shape}")
    for name in ("anchor_embedding", "node_embedding"):
        if name in state.trained["encoder"]:
            table = state.trained["encoder"][name]
            print(f"  {name} {table.shape}, per device {table.addressable_shards[0].data.shape}")
    begin = time.perf_counter()
    step = compile_step(plan)
    print(f"compiled: {time.perf_counter() - begin:.1f} s", flush=True)
    batches = data.batches(global_batch=args.batch, seed=0)
    for number in range(2):
        begin = time.perf_counter()
        host = next(batches).arrays
        drawn = time.perf_counter() - begin
        batch = {k: jax.device_put(v, step.batch_shardings[k]) for k, v in host.items()}
        state, output = step.run(state, batch, jnp.asarray(number, jnp.int32))
        loss = step.metrics(np.asarray(output.scalars))["loss"]
        print(
            f"step {number}: loss {loss:.4f}, batch {drawn:.1f} s, all "
            f"{time.perf_counter() - begin:.1f} s, peak {peak_gb():.1f} GB",
            flush=True,
        )


if __name__ == "__main__":
    main()
