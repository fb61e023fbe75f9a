"""Training speed of StarGraph beside a plain PyTorch step of the same shapes, in one run.

    python benchmarks/stargraph_step.py [--setting small|d512|all] [--steps 10] [--threads 2]

Both sides get the same batches and weights and do the whole step: forward, backward, Adam. They
take turns (ours, PyTorch, ours, ...), so that other work on the machine meets both. The last column
compares processor seconds instead of the clock: what to look at where other work cannot be kept
away, on one core (`taskset -c 0 ... --threads 1`, so that no thread waits for another). Rows:

  each       every occurrence of an entity encoded with its own dropout (official semantics)
  distinct   every distinct entity encoded once, dropout shared by its occurrences in the step
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from benchmarks.stargraph_torch import Options, StarGraphTorch, adam
from data_pipelines.graphs.pipeline import TripleBatches
from data_pipelines.graphs.tokenise import TokenSpec
from data_pipelines.graphs.triples import Graph
from jaxmods.partitioning import unbox
from jaxmods.systems.stargraph.model import EncoderConfig
from jaxmods.systems.stargraph.system import StarGraph
from jaxmods.weights import export_tensors
from tests.stargraph.memory import MemoryGraph


@dataclasses.dataclass(frozen=True)
class Setting:
    """Sizes of one comparison; `micro` is PyTorch's share of the batch per pass (memory)."""

    width: int
    anchors_per_entity: int
    batch: int
    negatives: int
    distinct: int
    chunk: int
    micro: int


# The graph has FB15k-237's sizes: 14,505 entities, 237 relations, 272,115 triples.
ENTITIES, RELATIONS, TRIPLES = 14505, 237, 272_115
SETTINGS = {
    "small": Setting(64, 10, 256, 8, 2304, 320, 256),
    "d512": Setting(512, 20, 128, 64, 6656, 128, 32),
    "d512_full_batch": Setting(512, 20, 512, 64, 14592, 128, 32),
}


def synthetic_graph() -> Graph:
    """Triples with FB15k-237's sizes and a similarly uneven degree."""
    rng = np.random.default_rng(0)
    ends = (ENTITIES * rng.random((TRIPLES, 2)) ** 2.5).astype(np.int32)
    ends[:ENTITIES, 0] = np.arange(ENTITIES)
    relation = (RELATIONS * rng.random(TRIPLES) ** 2).astype(np.int32)
    train = np.stack([ends[:, 0], relation, ends[:, 1]], 1)
    return Graph("synthetic", ENTITIES, RELATIONS, train, train[:0], train[:0])


def build(setting: Setting, graph: Graph, distinct: int) -> tuple[StarGraph, TripleBatches, Any]:
    """System, data and parameters."""
    data = TripleBatches(
        MemoryGraph(graph),
        TokenSpec(1.0, 0.2, setting.anchors_per_entity, ties="id"),
        negatives=setting.negatives,
        distinct=distinct,
    )
    tokens = data.tokenised()
    system = StarGraph(
        ENTITIES,
        RELATIONS,
        EncoderConfig(
            width=setting.width,
            anchors=len(tokens.anchor_entities),
            anchors_per_entity=setting.anchors_per_entity,
            paths=tokens.paths,
        ),
        negatives=setting.negatives,
        distinct=distinct,
        encode_chunk=setting.chunk,
    )
    params = unbox(system.init(jax.random.key(0)))
    for path, array in tokens.constants().items():
        params["graph"][path.split("/")[1]] = jnp.asarray(array)
    return system, data, params


def ours(system: StarGraph, params: Any) -> Callable[[dict[str, np.ndarray]], float]:
    """One step, compiled: (batch) -> loss."""
    optimizer = optax.adam(2e-3)
    trained = {k: jax.tree.map(jnp.copy, params[k]) for k in ("encoder", "relation_embedding")}
    fixed = {k: v for k, v in params.items() if k not in trained}
    state = {"trained": trained, "optimizer": optimizer.init(trained), "step": 0}

    @jax.jit
    def step(trained: Any, opt: Any, fixed: Any, batch: Any, number: jax.Array) -> Any:
        def loss(trained: Any) -> jax.Array:
            key = jax.random.fold_in(jax.random.key(0), number)
            return system.loss(trained | fixed, {}, batch, key, number).loss

        value, grads = jax.value_and_grad(loss)(trained)
        updates, opt = optimizer.update(grads, opt)
        return optax.apply_updates(trained, updates), opt, value

    step = jax.jit(step, donate_argnums=(0, 1))

    def run(batch: dict[str, np.ndarray]) -> float:
        state["trained"], state["optimizer"], value = step(
            state["trained"], state["optimizer"], fixed, batch, np.int32(state["step"])
        )
        state["step"] += 1
        return float(value)

    return run


def theirs(system: StarGraph, params: Any, micro: int) -> Callable[[dict[str, np.ndarray]], float]:
    """One PyTorch step on the same weights; gradients add up over slices of `micro` triples."""
    weights = {k: v.all() for k, v in export_tensors(params, system.weights()).items()}
    e = system.encoder
    options = Options(
        system.score,
        system.gamma,
        system.offset,
        system.temperature,
        e.head_width,
        e.layers,
        dropout=e.dropout,
    )
    network = StarGraphTorch(weights, options, torch.float32).train()
    optimizer = adam(network, 2e-3)

    def run(batch: dict[str, np.ndarray]) -> float:
        optimizer.zero_grad()
        total, losses = float(batch["weight"].sum()), []
        for low in range(0, len(batch["weight"]), micro):
            part = {k: torch.from_numpy(v[low : low + micro]) for k, v in batch.items()}
            h, r, t = part["positive"].long().T[:, :, None]
            negative = part["negative"].long()
            if part["mode"][0]:
                h = torch.cat([h, negative], 1)
            else:
                t = torch.cat([t, negative], 1)
            share = float(part["weight"].sum()) / total
            loss = network.loss(h, r, t, part["weight"]) * share
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
        return sum(losses)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--setting", default="all", choices=[*SETTINGS, "all"])
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each side")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    graph = synthetic_graph()
    names = list(SETTINGS)[:2] if args.setting == "all" else [args.setting]
    print(
        "| setting | side | median ms/step | min | triples/s | against PyTorch | processor time |"
    )
    print("|---|---|---|---|---|---|---|")
    for name in names:
        setting = SETTINGS[name]
        sides: dict[str, tuple[Callable[..., float], list[dict[str, np.ndarray]]]] = {}
        for label, distinct in (("each", 0), ("distinct", setting.distinct)):
            system, data, params = build(setting, graph, distinct)
            batches = data.batches(global_batch=setting.batch, seed=0)
            arrays = [b.arrays for b in islice(batches, args.steps + 1)]
            sides[label] = ours(system, params), arrays
        system, data, params = build(setting, graph, 0)
        batches = data.batches(global_batch=setting.batch, seed=0)
        arrays = [b.arrays for b in islice(batches, args.steps + 1)]
        sides["PyTorch"] = theirs(system, params, setting.micro), arrays
        times: dict[str, list[float]] = {label: [] for label in sides}
        processor: dict[str, list[float]] = {label: [] for label in sides}
        for step in range(args.steps + 1):
            for label, (run, arrays) in sides.items():
                begin, spent = time.perf_counter(), time.process_time()
                run(arrays[step])
                if step:  # the first compiles, or warms up
                    times[label].append(time.perf_counter() - begin)
                    processor[label].append(time.process_time() - spent)
        base = statistics.median(times["PyTorch"])
        base_cost = statistics.median(processor["PyTorch"])
        for label, values in times.items():
            median, cost = statistics.median(values), statistics.median(processor[label])
            print(
                f"| {name} | {label} | {1e3 * median:.0f} | {1e3 * min(values):.0f} | "
                f"{setting.batch / median:.0f} | {base / median:.2f}x | "
                f"{1e3 * cost:.0f} ms, {base_cost / cost:.2f}x |",
                flush=True,
            )


if __name__ == "__main__":
    main()
