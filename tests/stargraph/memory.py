"""A graph that is already in memory, and a system's functions bound to parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from data_pipelines.graphs.triples import Graph, GraphSource
from jaxmods.system import System


@dataclasses.dataclass(frozen=True)
class MemoryGraph(GraphSource):
    """A source that reads nothing."""

    graph: Graph

    def read(self) -> Graph:
        return self.graph

    def fingerprint(self) -> str:
        return f"memory:{self.graph.name}"


def bound(system: System, params: Any, rows: int = 1024) -> dict[str, Callable[..., Any]]:
    """Host functions as the evaluation binds them: rows in pieces, the last one padded."""

    def bind(function: Callable[..., Any]) -> Callable[..., Any]:
        jitted = jax.jit(function)

        def call(*arrays: Any) -> Any:
            count = len(arrays[0])
            size = min(rows, count)
            pieces = []
            for low in range(0, count, size):
                part = [np.asarray(a[low : low + size]) for a in arrays]
                keep = len(part[0])
                part = [np.resize(p, (size, *p.shape[1:])) for p in part]
                output = jax.tree.map(np.asarray, jitted(params, *part))
                pieces.append(jax.tree.map(lambda x, keep=keep: x[:keep], output))
            return jax.tree.map(lambda *xs: np.concatenate(xs), *pieces)

        return call

    return {name: bind(function) for name, function in system.functions().items()}
