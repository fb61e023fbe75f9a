"""`fit`: the one training loop.

    open the run folder   lock, recipe, newest checkpoint or fresh state
    each step             take a batch, dispatch the step, settle the step before it
    now and then          log line, evaluation, checkpoint
    whatever ends it      the state on disk is that of a finished step, and the exit code says why

With several processes all of them run this in step; process 0 alone writes to the run folder (each
has its own log there), and what ends one of them ends all (`train.peers`).

Steps are dispatched one ahead: the metrics of step i are fetched while step i+1 runs. A step whose
loss or gradient is not finite is refused on the device, and so is the one dispatched after it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from data_pipelines.batch import DataError
from data_pipelines.protocols.base import EvalResult
from jaxmods.partitioning import make_mesh
from jaxmods.system import Params
from train.agreement import check, check_shared
from train.canonical import canonical, recipe_hash
from train.checkpoint import Checkpoints
from train.evaluate import (
    Evaluator,
    as_metrics,
    check_protocols,
    run_protocols,
)
from train.exits import NonFiniteError, UserError
from train.experiment import Experiment
from train.feed import Feed, Ledger, Story, exchange
from train.metrics import Console, Window, Writer, announced, duration
from train.peers import current, guarded, leads, session
from train.recipes import Recipe
from train.results import write_json
from train.runlog import announce, has_results, log_file, write_summary
from train.runtime import device_summary, peak_flops, use_compilation_cache, versions
from train.state import Plan, TrainState, init_state, make_plan
from train.step import Step, StepOutput, compile_step
from train.watch import ChangeWatch, StopRequestedError, StopSignal
from train.workdir import Lock, is_allowed, match_recipe, storage

LOG = logging.getLogger("train")


@dataclasses.dataclass(frozen=True)
class FitResult:
    """How a call of `fit` ended.

    Attributes:
      status: "finished", or "preempted" (stopped by a signal; the same call continues).
      step: steps done in all. state: the final state, on its devices.
      metrics: values of the last log line. results: the last evaluation, by protocol.
    """

    status: Literal["finished", "preempted"]
    step: int
    state: TrainState
    metrics: dict[str, float]
    results: dict[str, EvalResult]
    workdir: Path


@dataclasses.dataclass(frozen=True)
class _Pending:
    """A dispatched step whose metrics have not been looked at."""

    index: int
    story: Story
    output: StepOutput


def fit(
    experiment: Experiment,
    workdir: Path | str,
    *,
    name: str = "",
    overrides: Sequence[str] = (),
    allow_change: Sequence[str] = (),
    quiet: bool = False,
) -> FitResult:
    """Train `experiment` in `workdir`, continuing the run that is there.

    Args:
      name, overrides: how the experiment was named, kept with it.
      allow_change: dotted paths in which the recipe may differ from the saved one.
      quiet: no progress bar.

    Raises:
      UserError: the folder is in use, belongs to another recipe or cannot be written, the hosts of
        the job do not agree, or settings do not fit.
      NonFiniteError: NaN or infinity; the state before that step is saved.
      DataError: the data cannot be used; the state so far is saved.
      PeerError: another process of the job was lost or failed.
    """
    workdir = Path(workdir)
    use_compilation_cache()
    recipe = Recipe(name, tuple(overrides), experiment)
    with session() as peers, contextlib.ExitStack() as stack, guarded(peers), storage(workdir):
        stop = stack.enter_context(StopSignal(peers))
        fingerprint = experiment.data.fingerprint()
        hosts = [] if peers is None else check(peers, recipe, fingerprint)
        lock = None
        if leads():
            lock = stack.enter_context(Lock(workdir))
        if peers is not None:
            check_shared(peers, workdir)
        stack.enter_context(log_file(workdir))
        changes: list[str] = []
        if leads():
            changes = match_recipe(workdir, recipe, allow_change)
        for line in [*hosts, *(f"changed: {line}" for line in changes)]:
            LOG.info("%s", line)
        if peers is not None:
            peers.wait()  # whether this recipe may run here at all is for process 0 to say
        run = _Run(recipe, workdir, stop, lock, fingerprint, allow_change, quiet, stack)
        return run.train()


class _Run:
    """One call of `fit`. Everything that is open while it lasts."""

    def __init__(
        self,
        recipe: Recipe,
        workdir: Path,
        stop: StopSignal,
        lock: Lock | None,
        fingerprint: str,
        allow_change: Sequence[str],
        quiet: bool,
        stack: contextlib.ExitStack,
    ) -> None:
        """Args: as `fit`; `stack` closes what is opened here, whatever happens."""
        experiment = recipe.experiment
        self.recipe, self.experiment = recipe, experiment
        self.workdir, self.stop, self.lock, self.quiet = workdir, stop, lock, quiet
        self.writes, self.peers = leads(), current()
        self.hash = recipe_hash(canonical(experiment))
        if experiment.steps < 1 or experiment.logging.every < 1 or experiment.checkpoint.every < 1:
            raise UserError("steps, logging.every, checkpoint.every: expected 1 or more")
        try:
            self.mesh = make_mesh(experiment.mesh)
        except ValueError as error:
            raise UserError(str(error)) from error
        self.plan: Plan = make_plan(experiment, self.mesh)
        self.evaluator = Evaluator(self.plan, stop.agreed)
        check_protocols(experiment.evaluation.protocols, self.evaluator.names)
        self.fingerprint = fingerprint
        self.checkpoints = Checkpoints(workdir, experiment.checkpoint)
        stack.push(self._close_checkpoints)
        self.stack = stack
        self.feed: Feed | None = None
        self.console: Console | None = None
        self.watch: ChangeWatch | None = None
        self.state, self.start, info = self._open_state(allow_change)
        folder = workdir if self.writes else None
        self.ledger = Ledger(folder, info.get("counters"), self.start)
        stack.callback(self.ledger.close)
        self.window = Window(info.get("window"))
        self.elapsed: float = info.get("elapsed", 0.0)
        self.still: list[str] | None = info.get("unchanged")
        self.writer = (
            Writer(workdir, step=self.start, tensorboard=experiment.logging.tensorboard)
            if self.writes
            else None
        )
        if self.writer is not None:
            stack.callback(self.writer.close)
        self.unentered: list[tuple[int, Story]] = []
        self.last: dict[str, float] = {}
        self.results: dict[str, EvalResult] = {}
        self.evaluated = -1  # step of `results`
        self._clock = time.perf_counter()
        self._paused = 0.0
        self._steps_in_line = 0

    def _open_state(self, allow_change: Sequence[str]) -> tuple[TrainState, int, dict[str, Any]]:
        """State, its step and the JSON saved with it: from the newest checkpoint, or fresh."""
        restored = self.checkpoints.restore(self.plan)
        if restored is None:
            init = self.experiment.init
            if init.weights:
                state = init_state(self.plan, self._initial_params(init.weights, init.adapters))
            elif init.adapters:
                raise UserError(
                    f"init.adapters={init.adapters}: expected the base that they were trained on "
                    "in init.weights, found none; set init.weights"
                )
            else:
                state = init_state(self.plan, constants=self.experiment.data.constants())
            self.checkpoints.begin(state)
            return state, 0, {}
        self.checkpoints.set_aside(restored.skipped)
        info = restored.info
        if info["data"] != self.fingerprint and not is_allowed("data", allow_change):
            raise UserError(
                f"{self.workdir}: the data is not what this run was trained on (fingerprint "
                f"{info['data']} → {self.fingerprint}); put the old data back, give another "
                "--workdir, or accept it with --allow-change data"
            )
        changed = {
            k: (v, versions().get(k)) for k, v in info["versions"].items() if versions().get(k) != v
        }
        if changed:
            LOG.info(
                "other versions than when this run was saved: %s",
                ", ".join(f"{k} {a} → {b}" for k, (a, b) in changed.items()),
            )
        if restored.step > self.experiment.steps:
            raise UserError(
                f"{self.workdir}: already at step {restored.step}, beyond steps="
                f"{self.experiment.steps}"
            )
        LOG.info("continuing from step %d of %d", restored.step, self.experiment.steps)
        return restored.state, restored.step, info

    def _initial_params(self, weights: str, adapters: str | None) -> Params:
        from train.adapters import read_adapters  # read PyTorch files: only when asked for
        from train.interchange import read_params

        system, target = self.experiment.system, self.plan.abstract_sharded().params
        params = read_params(system, Path(weights).expanduser(), like=target)
        return params if adapters is None else read_adapters(system, params, adapters)[0]

    def _close_checkpoints(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self.checkpoints.close()
        except Exception as second:  # a save that failed in the background, most often
            if error is None:
                raise
            LOG.warning("while closing: %s", str(second).partition("\n")[0])

    # The loop

    def train(self) -> FitResult:
        """Run to the last step or to a signal."""
        total = self.experiment.steps
        announce(self.plan, self.recipe.name, self.hash)
        try:
            protocols = self.experiment.evaluation.protocols
            if self._evaluation_due(self.start) and not self._leader_says(
                has_results(self.workdir, self.start, protocols)
            ):
                self._evaluate(self.start)
            if self.start < total:
                with announced(f"compiling train step for {self.mesh.size} device(s)"):
                    compiled = compile_step(self.plan)
                self._steps(compiled, total)
            status: Literal["finished", "preempted"] = "finished"
        except StopRequestedError:
            self._save()
            status = "preempted"
            LOG.info(
                "stopped by %s at step %d, saved; the same command continues",
                self.stop.name,
                int(self.state.step),
            )
        self.checkpoints.wait()
        step = int(self.state.step)
        if self.writes:
            write_summary(
                self.workdir,
                self.plan,
                name=self.recipe.name,
                digest=self.hash,
                status=status,
                step=step,
                seconds=self.elapsed,
                metrics=self.last,
                counters=self.ledger.state(),
            )
        LOG.info(
            "%s at step %d after %s of training; %s",
            status,
            step,
            duration(self.elapsed),
            self.workdir,
        )
        return FitResult(status, step, self.state, self.last, self.results, self.workdir)

    def _steps(self, step: Step, total: int) -> None:
        experiment = self.experiment
        self.watch = ChangeWatch(
            step.trained_names, step.trained_labels, self.plan.groups, self.still, self.start
        )
        self.feed = Feed(
            experiment.data,
            experiment.system.batch_spec(experiment.batch_size),
            step.batch_shardings,
            global_batch=experiment.batch_size,
            seed=experiment.seed,
            start_step=self.start,
        )
        self.stack.callback(self.feed.close)
        self.console = Console(total, self.start, quiet=self.quiet)
        self.stack.callback(self.console.close)
        self._restart_clock()
        pending: _Pending | None = None
        for index in range(self.start, total):
            self._doing("at step %d, waiting for data", index)
            try:
                batch = self.feed.take()
            except DataError:
                if jax.process_count() == 1:  # saving takes all processes, and the others go on
                    if pending is not None:
                        self._settle(step, pending)
                    self._save()
                raise
            self._doing("at step %d", index)
            self.state, output = step.run(self.state, batch.arrays, np.asarray(index, np.int32))
            if pending is not None:
                self._settle(step, pending)
            pending = _Pending(index, batch.story, output)
            done = index + 1
            stopping = self.stop.agreed()
            if not (stopping or self._boundary(done)):
                continue
            self._settle(step, pending)
            pending = None
            self._at_boundary(done, stopping)

    def _boundary(self, done: int) -> bool:
        return (
            done == self.experiment.steps
            or done % self.experiment.logging.every == 0
            or done % self.experiment.checkpoint.every == 0
            or self._evaluation_due(done)
        )

    def _at_boundary(self, done: int, stopping: bool) -> None:
        """Log, evaluate and save, whichever is due after `done` steps; all of them settled."""
        experiment = self.experiment
        last = done == experiment.steps
        if last or done % experiment.logging.every == 0:
            self._log(done)
        begun = time.perf_counter()
        if stopping and not last:
            raise StopRequestedError
        if self._evaluation_due(done):
            self._evaluate(done)
        if last or done % experiment.checkpoint.every == 0:
            self._save()
        self._paused += time.perf_counter() - begun

    def _settle(self, step: Step, pending: _Pending) -> None:
        """Look at a step that was dispatched: refuse what is not finite, count what was used."""
        scalars = np.asarray(pending.output.scalars)
        metrics = step.metrics(scalars)
        if scalars[0] == 0.0:
            self._refuse(pending, metrics)
        self.unentered.append((pending.index, pending.story))
        self.window.add(metrics)
        self._steps_in_line += 1
        done = pending.index + 1
        if self.console is not None:
            self.console.advance(done)
        if self.watch is not None and self.watch.active:
            self.watch.enter(np.asarray(pending.output.changes), done)

    def _refuse(self, pending: _Pending, metrics: dict[str, float]) -> None:
        """The step was not applied: save the state before it, name its records, stop."""
        self._save()
        self.checkpoints.wait()
        ((_, story),) = exchange([(pending.index, pending.story)])
        ids = tuple(record for _, info in story for record in info.record_ids)
        bad = {k: v for k, v in metrics.items() if not np.isfinite(v)}
        if self.writes:
            write_json(
                self.workdir / "nonfinite.json",
                {"step": pending.index, "record_ids": ids, "metrics": metrics},
            )
        shown = ", ".join(f"{k} {v}" for k, v in bad.items())
        listed = ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
        raise NonFiniteError(
            f"step {pending.index} is not finite ({shown}): its update was refused and the state "
            f"before it saved. Records of the batch: {listed or 'the pipeline gives no ids'} "
            f"(all in {self.workdir / 'nonfinite.json'}). Look at them, or lower optim.lr and "
            "continue with --allow-change optim.lr",
            pending.index,
            ids,
        )

    # What happens now and then

    def _doing(self, what: str, step: int) -> None:
        if self.peers is not None:  # shown where others wait for this process
            self.peers.doing = what % step

    def _enter(self) -> None:
        """Enter what all processes used since the last time. Called by all at the same steps."""
        for index, story in exchange(self.unentered):
            for _, info in story:
                self.ledger.enter(info, index)
        self.unentered = []

    def _log(self, done: int) -> None:
        self._check_folder()
        self._enter()
        now = time.perf_counter()
        busy = max(now - self._clock - self._paused, 1e-9)
        self.elapsed += busy
        values = self.window.take()
        if self._steps_in_line:
            rate = self._steps_in_line * self.experiment.batch_size / busy
            values["examples_per_second"] = rate
            values["data_wait"] = min(self.feed.waited / busy, 1.0) if self.feed else 0.0
            flops, peak = self.experiment.system.flops_per_example(), peak_flops()
            if flops and peak:
                values["mfu"] = rate * flops / peak
        stats = jax.local_devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" in stats:
            values["peak_memory_gib"] = stats["peak_bytes_in_use"] / 2**30
        self.last = values
        if self.writer is not None:
            self.writer.write(done, values)
            write_json(self.workdir / "counters.json", self.ledger.state())
        if self.console is not None:
            self.console.report(done, values)
        self.ledger.report(always=done == self.experiment.steps)
        self._restart_clock()

    def _restart_clock(self) -> None:
        self._clock, self._paused, self._steps_in_line = time.perf_counter(), 0.0, 0
        if self.feed is not None:
            self.feed.waited = 0.0

    def _evaluation_due(self, done: int) -> bool:
        evaluation = self.experiment.evaluation
        if not evaluation.protocols:
            return False
        if done == self.experiment.steps:
            return True
        if done == 0:
            return evaluation.at_start
        return evaluation.every > 0 and done % evaluation.every == 0

    def _leader_says(self, answer: bool) -> bool:
        """The answer of process 0: others may see a shared folder as it was a moment ago."""
        return answer if self.peers is None else bool(self.peers.share("yes" * answer))

    def _check_folder(self) -> None:
        """Files that are open can be written long after their folder has gone."""
        if self.lock is not None:
            self.lock.check()

    def _evaluate(self, step: int) -> None:
        self._doing("evaluating step %d", step)
        self.results = run_protocols(
            self.evaluator,
            self.state.averaged,
            self.experiment.evaluation.protocols,
            folder=self.workdir if self.writes else None,
            step=step,
            panels=step in (0, self.experiment.steps),
        )
        self.evaluated = step
        if self.writer is not None:
            values = {f"eval/{k}": v for k, v in as_metrics(self.results).items()}
            self.writer.write(step, values)

    def _save(self) -> None:
        """Begin a checkpoint of the present state; all its steps are settled."""
        self._check_folder()
        self._doing("saving step %d", int(self.state.step))
        self._enter()
        if self.writer is not None:
            self.writer.flush()
        self.ledger.flush()
        step = int(self.state.step)
        info = {
            "recipe": self.recipe.name,
            "recipe_hash": self.hash,
            "versions": versions(),
            "device": device_summary(),
            "data": self.fingerprint,
            "next_step": step,
            "seed": self.experiment.seed,
            "batch_size": self.experiment.batch_size,
            "counters": self.ledger.state(),
            "window": self.window.state(),
            "unchanged": self.still if self.watch is None else self.watch.state(),
            "elapsed": self.elapsed,
        }
        best = as_metrics(self.results) if self.evaluated == step else None
        self.checkpoints.save(self.state, info, best)
