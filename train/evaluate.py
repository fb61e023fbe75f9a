"""Evaluation: a system's named functions, bound to parameters and jitted, given to protocols.

Functions are compiled for one number of rows (`Evaluation.batch_size`): longer inputs go through
in pieces, the last piece is padded and cut again, so nothing is compiled twice for a ragged end.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from data_pipelines.protocols.base import EvalResult, Protocol
from jaxmods.partitioning import sharding_for, use_mesh
from jaxmods.system import Params
from train.exits import UserError
from train.metrics import announced, duration
from train.results import save_result
from train.state import Plan, cast_floating
from train.watch import StopRequestedError

LOG = logging.getLogger("train")

_LINE = 12  # of more metrics the log shows those that are not parts ("tail/mrr"); files hold all

HostFunction = Callable[..., Any]


class Evaluator:
    """The jitted functions of a system on the mesh of a plan.

    Args:
      stop: asked before every call; True raises `StopRequestedError`.
    """

    def __init__(self, plan: Plan, stop: Callable[[], bool] = lambda: False) -> None:
        self._plan, self._stop = plan, stop
        self._rows = plan.experiment.evaluation.batch_size
        if self._rows < 1:
            raise UserError(f"evaluation.batch_size: expected 1 or more, found {self._rows}")
        self._jitted = {
            name: self._jit(function)
            for name, function in plan.experiment.system.functions().items()
        }

    @property
    def names(self) -> frozenset[str]:
        """Names of the functions that this system offers."""
        return frozenset(self._jitted)

    def _jit(self, function: Callable[..., Any]) -> Callable[..., Any]:
        everywhere = NamedSharding(self._plan.mesh, PartitionSpec())
        return jax.jit(planned(function, self._plan), out_shardings=everywhere)

    def functions(self, params: Params) -> dict[str, HostFunction]:
        """The functions with `params` bound: host arrays `[n, ...]` in, host arrays out."""
        return {name: self._bind(name, params) for name in self._jitted}

    def _bind(self, name: str, params: Params) -> HostFunction:
        jitted, rows = self._jitted[name], self._rows

        def call(*arrays: Any) -> Any:
            inputs = [np.asarray(a) for a in arrays]
            counts = {a.shape[0] if a.ndim else None for a in inputs}
            if len(counts) != 1 or None in counts:
                raise ValueError(
                    f"{name}: expected arrays with one common number of rows, "
                    f"found shapes {[a.shape for a in inputs]}"
                )
            count = inputs[0].shape[0]
            pieces = []
            for start in range(0, max(count, 1), rows):
                if self._stop():
                    raise StopRequestedError
                part = [self._place(_padded(a[start : start + rows], rows)) for a in inputs]
                keep = min(rows, count - start)
                output = jax.tree.map(np.asarray, jitted(params, *part))
                pieces.append(jax.tree.map(lambda x, keep=keep: x[:keep], output))
            return jax.tree.map(lambda *xs: np.concatenate(xs), *pieces)

        return call

    def _place(self, array: np.ndarray) -> jax.Array:
        axes = ("batch", *[None] * (array.ndim - 1))
        sharding = sharding_for(array.shape, axes, self._plan.mesh, self._plan.experiment.rules)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def planned(function: Callable[..., Any], plan: Plan) -> Callable[..., Any]:
    """`function(params, *arrays)` as a plan has it: in its compute dtype, on its mesh."""
    experiment = plan.experiment

    def call(params: Params, *arrays: jax.Array) -> Any:
        with use_mesh(plan.mesh, experiment.rules):
            return function(cast_floating(params, experiment.precision.compute), *arrays)

    return call


def _padded(array: np.ndarray, rows: int) -> np.ndarray:
    missing = rows - array.shape[0]
    return np.pad(array, [(0, missing), *[(0, 0)] * (array.ndim - 1)]) if missing else array


def check_protocols(protocols: Sequence[Protocol], offered: frozenset[str]) -> None:
    """Raise before anything is read when a protocol cannot be run as it is set.

    Raises:
      IncomparableError: settings that break a protocol.
      UserError: a function that the system does not offer, or one name twice.
    """
    names = [p.name for p in protocols]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise UserError(f"evaluation.protocols: {', '.join(twice)} is there twice")
    for protocol in protocols:
        protocol.check()
        missing = [f for f in protocol.requires() if f not in offered]
        if missing:
            raise UserError(
                f"protocol {protocol.name} needs {', '.join(missing)}; this system offers "
                f"{', '.join(sorted(offered)) or 'no functions'}"
            )


def run_protocols(
    evaluator: Evaluator,
    params: Params,
    protocols: Sequence[Protocol],
    *,
    folder: Path | None,
    step: int,
    panels: bool,
) -> dict[str, EvalResult]:
    """Run every protocol; results are written to `folder/eval` as they come.

    Args:
      folder: run folder; None writes nothing (processes that do not write).
      panels: ask for pictures too.
    """
    functions = evaluator.functions(params)
    results = {}
    for protocol in protocols:
        with announced(f"evaluating {protocol.name} at step {step}", closing=False):
            result = protocol.run(functions, panels=panels)
        results[protocol.name] = result
        if folder is not None:
            save_result(result, folder, step)
        shown = "  ".join(
            _shown(name, metric.value, metric.chance)
            for name, metric in result.metrics.items()
            if "/" not in name or len(result.metrics) <= _LINE
        )
        LOG.info(
            "%s: %s (%d records, %s)",
            protocol.name,
            shown,
            result.records,
            duration(result.seconds),
        )
        for note in result.notes:
            LOG.info("%s: %s", protocol.name, note)
    return results


def _shown(name: str, value: float, chance: float | None) -> str:
    return f"{name} {value:.4g}" + (f" (chance {chance:.4g})" if chance is not None else "")


def as_metrics(results: dict[str, EvalResult]) -> dict[str, float]:
    """`protocol/metric` → value."""
    return {
        f"{name}/{metric}": float(value.value)
        for name, result in results.items()
        for metric, value in result.metrics.items()
    }
