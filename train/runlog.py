"""What a run folder tells afterwards: its log, the first lines of it, and `summary.json`."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from data_pipelines.protocols.base import Protocol
from jaxmods.system import Params
from train.peers import number
from train.results import write_json
from train.runtime import device_summary, versions
from train.state import Plan

LOG = logging.getLogger("train")


class _LogFile(logging.FileHandler):
    """A log on storage that may fill up or go away: what cannot be written is left out."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the base class's name
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


@contextlib.contextmanager
def log_file(workdir: Path) -> Iterator[None]:
    """Everything that is logged also goes to `log.txt` (`log.<i>.txt` on other processes), and so
    does the traceback of whatever ends the run."""
    process = number()
    handler = _LogFile(workdir / (f"log.{process}.txt" if process else "log.txt"), encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    LOG.setLevel(logging.INFO)
    LOG.addHandler(handler)
    try:
        yield
    except BaseException:
        trace = sys.exc_info()
        handler.handle(
            LOG.makeRecord(LOG.name, logging.ERROR, __file__, 0, "the run ended", (), trace)
        )
        raise
    finally:
        LOG.removeHandler(handler)
        with contextlib.suppress(OSError):
            handler.close()


def count(tree: Params) -> int:
    """Numbers in a tree of arrays or abstract arrays."""
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


def announce(plan: Plan, name: str, digest: str) -> None:
    """The first lines of a log: what is trained, on what."""
    experiment, device = plan.experiment, device_summary()
    shape = "×".join(f"{k} {v}" for k, v in plan.mesh.shape.items() if v > 1) or "one device"
    LOG.info(
        "%s (%s): %d steps of %d examples on %d %s (%s)",
        name or type(experiment.system).__name__,
        digest,
        experiment.steps,
        experiment.batch_size,
        device["devices"],
        device["kind"],
        shape,
    )
    LOG.info(
        "parameters: %s trained in %s, %s frozen",
        f"{count(plan.abstract.trained):,}",
        ", ".join(plan.groups),
        f"{count(plan.abstract.frozen):,}",
    )
    splits = plan.mesh.shape["data"] * plan.mesh.shape["fsdp"]
    if experiment.batch_size % splits:
        LOG.warning(
            "batch_size %d cannot be split over %d devices (data×fsdp): each computes more than "
            "its share; choose a multiple of %d",
            experiment.batch_size,
            splits,
            splits,
        )


def has_results(workdir: Path, step: int, protocols: Sequence[Protocol]) -> bool:
    """Whether every protocol has been evaluated at `step`."""
    path = workdir / "eval" / f"{step}.json"
    if not path.exists():
        return False
    there = {r["protocol"] for r in json.loads(path.read_text(encoding="utf-8"))["results"]}
    return there >= {p.name for p in protocols}


def write_summary(
    workdir: Path,
    plan: Plan,
    *,
    name: str,
    digest: str,
    status: str,
    step: int,
    seconds: float,
    metrics: dict[str, float],
    counters: dict[str, Any],
) -> None:
    """`summary.json` and `counters.json`: the run in one object, for programs and the report."""
    experiment = plan.experiment
    summary = {
        "recipe": name,
        "recipe_hash": digest,
        "status": status,
        "step": step,
        "steps": experiment.steps,
        "examples": step * experiment.batch_size,
        "training_seconds": seconds,
        "metrics": metrics or _last_line(workdir),
        "evaluation": _newest_evaluation(workdir),
        "counters": counters,
        "data": experiment.data.describe(),
        "parameters": {
            "trained": count(plan.abstract.trained),
            "frozen": count(plan.abstract.frozen),
        },
        "versions": versions(),
        "device": device_summary(),
    }
    write_json(workdir / "summary.json", summary)
    write_json(workdir / "counters.json", counters)


def _newest_evaluation(workdir: Path) -> dict[str, Any] | None:
    files = [p for p in (workdir / "eval").glob("*.json") if p.stem.isdigit()]
    if not files:
        return None
    newest = max(files, key=lambda p: int(p.stem))
    found: dict[str, Any] = json.loads(newest.read_text(encoding="utf-8"))
    return found


def _last_line(workdir: Path) -> dict[str, Any]:
    lines = (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    training = [entry for entry in map(json.loads, lines) if "loss" in entry]
    return training[-1] if training else {}
