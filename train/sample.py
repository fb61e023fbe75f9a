"""Sampling: examples in batches through a system's named functions, results into a folder.

Each function is compiled once per shape: batches have one number of rows, and the last one is
padded. Batches are dispatched one ahead, so that pictures are read and written while the device
works. With several processes all of them compute and process 0 writes.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from data_pipelines.samplers.base import Call, Made, Request, Sampler
from data_pipelines.samplers.outputs import SUFFIXES, Format, encode_picture
from data_pipelines.samplers.requests import check_data, from_data, from_file, from_pairs
from jaxmods.partitioning import sharding_for
from jaxmods.system import ArraySpec, Params
from train.evaluate import planned
from train.exits import UsageError, UserError
from train.metrics import announced, progress
from train.results import plain, write_json
from train.state import Plan

LOG = logging.getLogger("train")

DEFAULT_COUNT = 8
RESULTS, GRID, FACTS = "results.jsonl", "grid.png", "sample.json"


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where parameters come from: a run (or a folder of parameters), or PyTorch weights or a folder
    of `jaxmods import`; adapters are read onto them."""

    workdir: str | None = None
    weights: str | None = None
    adapters: str | None = None


@dataclasses.dataclass(frozen=True)
class Given:
    """What is asked for.

    Attributes:
      pairs: `name=value` of one example. file: a batch file. Without both: the evaluation data.
      start, count: first example, and how many; None for all of a batch file, or `DEFAULT_COUNT` of
        the evaluation data.
      seed: of the noise, 0 .. 2**32 - 1.
    """

    pairs: tuple[str, ...] = ()
    file: str | None = None
    start: int = 0
    count: int | None = None
    seed: int = 0

    def requests(self, sampler: Sampler) -> tuple[Iterable[Request | str], int]:
        """The examples, and how many there are.

        Raises:
          UsageError: options that do not go together.
          RequestError: inputs that do not fit.
        """
        if self.pairs and self.file:
            raise UsageError("sample: expected --input for one example, or --inputs FILE, not both")
        few = self.count is not None and self.count < 1
        if not 0 <= self.seed < 2**32 or self.start < 0 or few:
            raise UsageError(
                "sample: expected --seed from 0 to 4294967295, --start from 0 and --count from 1"
            )
        if self.pairs:
            return [from_pairs(sampler, self.pairs, self.seed)], 1
        if self.file:
            found = from_file(sampler, Path(self.file), self.seed, self.start, self.count)
            return found, len(found)
        count = self.count or DEFAULT_COUNT
        check_data(sampler, self.start)
        total = min(count, sampler.count() - self.start)
        return from_data(sampler, self.seed, self.start, count), total


class Runner:
    """The functions of a system on the mesh of a plan, compiled when a shape is first seen.

    Attributes:
      compiled: seconds that each compilation took, by function and rows.
    """

    def __init__(self, plan: Plan, params: Params) -> None:
        self._plan, self._params = plan, params
        self._functions = plan.experiment.system.functions()
        self._programs: dict[tuple[Any, ...], Any] = {}
        self._direct: dict[str, Callable[..., Any]] = {}
        self.compiled: list[dict[str, Any]] = []

    def specs(self, name: str, rows: int) -> list[ArraySpec] | None:
        """Arguments of a function for `rows` rows; None where the system does not list them."""
        found = self._plan.experiment.system.function_inputs(rows).get(name)
        return None if found is None else list(found.values())

    def run(self, name: str, arrays: tuple[np.ndarray, ...]) -> Any:
        """Starts a function on host arrays [rows, ...]; the result is on the devices, whole on
        each."""
        placed = self._placed(name, arrays)
        key = (name, *((a.shape, a.dtype) for a in arrays))
        if key not in self._programs:
            rows = arrays[0].shape[0]
            begun = time.perf_counter()
            with announced(f"compiling {name} for {rows} row(s)"):
                everywhere = NamedSharding(self._plan.mesh, PartitionSpec())
                call = planned(self._functions[name], self._plan)
                jitted = jax.jit(call, out_shardings=everywhere)
                self._programs[key] = jitted.lower(self._params, *placed).compile()
            seconds = round(time.perf_counter() - begun, 3)
            self.compiled.append({"function": name, "rows": rows, "seconds": seconds})
        return self._programs[key](self._params, *placed)

    def functions(self) -> dict[str, Callable[..., Any]]:
        """All functions with the parameters bound: arrays in, device arrays out as they lie."""
        return {name: self._bound(name) for name in self._functions}

    def _bound(self, name: str) -> Callable[..., Any]:
        def call(*arrays: Any) -> Any:
            if name not in self._direct:
                self._direct[name] = jax.jit(planned(self._functions[name], self._plan))
            return self._direct[name](self._params, *arrays)

        return call

    def _placed(self, name: str, arrays: tuple[np.ndarray, ...]) -> list[jax.Array]:
        specs = self.specs(name, arrays[0].shape[0])
        axes = [("batch", *[None] * (a.ndim - 1)) for a in arrays]
        if specs is not None:
            axes = [spec.axes for spec in specs]
        mesh, rules = self._plan.mesh, self._plan.experiment.rules
        return [
            _placed(array, sharding_for(array.shape, names, mesh, rules))
            for array, names in zip(arrays, axes, strict=True)
        ]


def _placed(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """An array that every process has whole, on the devices that hold its parts."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


@dataclasses.dataclass(frozen=True)
class Output:
    """Where results go, and what they say about themselves.

    Attributes:
      folder: of the results; None writes nothing (processes that do not write).
      metadata: of every picture, besides what is its own.
      format: of pictures. sheet: examples in the sheet, 0 for none.
    """

    folder: Path | None
    metadata: Mapping[str, Any]
    format: Format = "png"
    sheet: int = 16


@dataclasses.dataclass
class Outcome:
    """What a call of `sample` did.

    Attributes:
      made: examples with a result. failed: what was wrong, by name of an example.
      seconds: from the first dispatched batch to the last result, without compilation.
      compiled: see `Runner`. files: pictures written.
    """

    made: int = 0
    failed: dict[str, str] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    compiled: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    files: list[str] = dataclasses.field(default_factory=list)


def check_sampler(sampler: Sampler | None, offered: Iterable[str], name: str) -> Sampler:
    """The sampler of a recipe, if it can be used with the functions that its system offers.

    Raises:
      UserError: there is none, or it asks for other functions.
      ValueError: its settings cannot work.
    """
    if sampler is None:
        raise UserError(
            f"recipe {name} has no sampler: expected Experiment.sampler, which says what its model "
            "is given and what comes back; choose another recipe (jaxmods list), or set it there"
        )
    offered = set(offered)
    missing = [f for f in sampler.requires() if f not in offered]
    if missing:
        raise UserError(
            f"the sampler of {name} needs {', '.join(missing)}; this system offers "
            f"{', '.join(sorted(offered)) or 'no functions'}"
        )
    sampler.check()
    return sampler


def default_rows(plan: Plan, total: int) -> int:
    """Rows of a batch: those of evaluation, or fewer where there are fewer examples, in a multiple
    of the devices that a batch is split over."""
    split = plan.mesh.shape["data"] * plan.mesh.shape["fsdp"]
    wanted = max(1, min(plan.experiment.evaluation.batch_size, total))
    return -(-wanted // split) * split


def sample(
    runner: Runner,
    sampler: Sampler,
    requests: Iterable[Request | str],
    output: Output,
    *,
    rows: int,
    total: int,
) -> Outcome:
    """Makes every example and writes it.

    Args:
      requests: examples; a text instead of one is said, and the example left out.
      rows: of a batch. total: examples that are expected, for the progress.

    Returns:
      What was made. An example that cannot be used is left out, with its reason in the results.

    Raises:
      UserError: arrays of other shapes than the system takes, or nothing could be made.
    """
    if rows < 1:
        raise UserError(f"--batch: expected 1 or more, found {rows}")
    work = _Work(runner, sampler, output, rows)
    with progress(total, "sampling", "example") as advance:
        for request in requests:
            advance(work.outcome.made + len(work.outcome.failed))
            if isinstance(request, str):
                LOG.warning("left out: %s", request)
                continue
            try:
                call = sampler.call(request)
            except ValueError as error:  # a picture that cannot be read, a text that is too long
                work.refuse(request, error)
                continue
            work.add(request, call)
        work.finish()
        advance(work.outcome.made)
    outcome = work.outcome
    if not outcome.made:
        first = next(iter(outcome.failed.items()), None)
        said = "no example was usable" if first is None else f"{first[0]}: {first[1]}"
        raise UserError(f"nothing could be made; {said}")
    return outcome


class _Work:
    """Examples on their way through the functions, and what came of them."""

    def __init__(self, runner: Runner, sampler: Sampler, output: Output, rows: int) -> None:
        self._runner, self._sampler, self._output, self._rows = runner, sampler, output, rows
        self._waiting: dict[str, list[tuple[Request, Call]]] = {}
        self._running: list[tuple[list[tuple[Request, Call]], Any]] = []
        self._lines: list[tuple[int, str]] = []
        self._sheet: list[tuple[int, Made]] = []
        self._begun: float | None = None
        self.outcome = Outcome(compiled=runner.compiled)
        if output.folder is not None:
            output.folder.mkdir(parents=True, exist_ok=True)
            (output.folder / RESULTS).write_text("", encoding="utf-8")

    def refuse(self, request: Request, error: Exception) -> None:
        """Note what is wrong with an example."""
        LOG.warning("%s: %s", request.name, error)
        self.outcome.failed[request.name] = str(error)
        self._enter(request, {"error": str(error)})

    def add(self, request: Request, call: Call) -> None:
        """Take an example; a full batch begins to run."""
        self._check(request, call)
        waiting = self._waiting.setdefault(call.function, [])
        waiting.append((request, call))
        if len(waiting) == self._rows:
            self._start(self._waiting.pop(call.function))

    def finish(self) -> None:
        """Run what is left, and write what belongs to all."""
        for name in list(self._waiting):
            self._start(self._waiting.pop(name))
        while self._running:
            self._settle()
        if self._begun is not None:
            spent = time.perf_counter() - self._begun
            self.outcome.seconds = spent - sum(c["seconds"] for c in self.outcome.compiled)
        folder = self._output.folder
        if folder is None:
            return
        ordered = (line for _, line in sorted(self._lines, key=lambda entry: entry[0]))
        (folder / RESULTS).write_text("".join(ordered), encoding="utf-8")
        made = [made for _, made in sorted(self._sheet, key=lambda entry: entry[0])]
        sheet = self._sampler.sheet(made) if made else None
        if sheet is not None:
            (folder / GRID).write_bytes(sheet)

    def _check(self, request: Request, call: Call) -> None:
        specs = self._runner.specs(call.function, 1)
        if specs is None:
            return
        found = [f"{a.dtype} {list(a.shape)}" for a in call.arrays]
        expected = [f"{s.dtype} {list(s.shape[1:])}" for s in specs]
        if found != expected:
            raise UserError(
                f"{request.name}: {call.function} expected {', '.join(expected)}, found "
                f"{', '.join(found)}; the sampler of the recipe has to have the sizes of its system"
            )

    def _start(self, batch: list[tuple[Request, Call]]) -> None:
        if self._begun is None:
            self._begun = time.perf_counter()
        calls = [call for _, call in batch]
        calls += [calls[-1]] * (self._rows - len(calls))
        arrays = tuple(np.stack(column) for column in zip(*(c.arrays for c in calls), strict=True))
        self._running.append((batch, self._runner.run(calls[0].function, arrays)))
        if len(self._running) > 1:
            self._settle()

    def _settle(self) -> None:
        batch, result = self._running.pop(0)
        host = jax.tree.map(np.asarray, result)
        for row, (request, call) in enumerate(batch):
            made = self._sampler.finish(
                request, call, jax.tree.map(lambda x, row=row: x[row], host)
            )
            self._write(request, call, made)
            self.outcome.made += 1

    def _write(self, request: Request, call: Call, made: Made) -> None:
        folder, line = self._output.folder, dict(plain(made.facts))
        if folder is not None and made.picture is not None:
            kind = self._output.format
            file = f"{request.name}{SUFFIXES[kind]}"
            own = {**self._about(request), "function": call.function, **line}
            metadata = {**own, **self._output.metadata}
            (folder / file).write_bytes(encode_picture(made.picture, metadata, kind))
            self.outcome.files.append(file)
            line = {"file": file, **line}
        self._enter(request, line)
        if len(self._sheet) < self._output.sheet:
            self._sheet.append((request.index, made))

    def _enter(self, request: Request, line: dict[str, Any]) -> None:
        text = json.dumps({**self._about(request), **line}, ensure_ascii=False) + "\n"
        self._lines.append((request.index, text))
        if self._output.folder is not None:  # in the order they come, until all are there
            with (self._output.folder / RESULTS).open("a", encoding="utf-8") as file:
                file.write(text)

    @staticmethod
    def _about(request: Request) -> dict[str, Any]:
        """Name, index and seed of an example, and its inputs as far as they are paths or texts."""
        given = {
            name: [str(v) for v in values]
            for name, values in request.inputs.items()
            if all(isinstance(v, str | Path) for v in values)
        }
        inputs = {k: v[0] if len(v) == 1 else v for k, v in given.items()}
        own = {"name": request.name, "index": request.index, "seed": request.seed}
        return {**own, "inputs": inputs} if inputs else own


def check_folder(folder: Path, *, overwrite: bool) -> None:
    """Whether results can go to a folder.

    Raises:
      UserError: it holds something and `overwrite` is not set, or it is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder}: expected a folder, found a file; name another place")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise UserError(
            f"--out {folder}: expected a new or empty folder, found {len(list(folder.iterdir()))} "
            "entries; name another one, or add --overwrite to replace files of the same names"
        )


def write_facts(folder: Path, outcome: Outcome, facts: Mapping[str, Any]) -> dict[str, Any]:
    """`sample.json`; what it holds."""
    per = outcome.seconds / outcome.made
    whole = {
        **facts,
        "made": outcome.made,
        "failed": outcome.failed,
        "seconds_per_example": round(per, 4),
        "compiled": outcome.compiled,
    }
    write_json(folder / FACTS, whole)
    return whole
