"""Kill a training run many times at random moments; its end must be that of a run left alone.

    python -m tests.train.kill_many tests.train.toy:regression --kills 20 --workdir /some/folder
    python -m tests.train.kill_many fgclip/tiny --kills 50 --workdir W --set steps=200 batch_size=8
    python -m tests.train.kill_many RECIPE --processes 2 …     one of two processes is killed

Two run folders are made, `untouched` and `killed`. Most kills (SIGKILL) are aimed at a random step
with a random delay, every fourth at a random moment of the start (reading, compiling, restoring).
At the end parameters, optimiser, random numbers, carried state and averages have to be equal bit
for bit, and so have log lines, evaluations, counters and the list of bad records. Exit code 0: so
it is.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.train.hosts import Job


def start(folder: Path, recipe: str, settings: Sequence[str], processes: int) -> Job:
    """The run in `folder`, as a job; what it says is appended to `folder/said.txt` by `collect`."""
    command = ["-m", "train", "fit", recipe, "--workdir", str(folder), "--no-report"]
    flags = ["--set", *settings] if settings else []
    return Job(folder / "output", processes, [*command, *flags], JAXMODS_HOST_TIMEOUT="10")


def finish(folder: Path, recipe: str, settings: Sequence[str], processes: int) -> None:
    """Run to the end."""
    with start(folder, recipe, settings, processes) as job:
        codes = job.codes(timeout=3600)
        collect(job, folder)
    assert codes == [0] * processes, (codes, (folder / "said.txt").read_text()[-4000:])


def collect(job: Job, folder: Path) -> None:
    """Keep what process 0 said; the next start overwrites it."""
    with (folder / "said.txt").open("a", encoding="utf-8") as file:
        file.write(job.output(0))


def last_step(folder: Path) -> int:
    """Step of the last log line."""
    path = folder / "metrics.jsonl"
    found = 0
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            found = max(found, json.loads(line)["step"])
        except json.JSONDecodeError:
            continue  # being written
    return found


def kill_once(
    folder: Path,
    recipe: str,
    settings: Sequence[str],
    processes: int,
    draw: random.Random,
    *,
    early: bool,
    reach: int,
    startup: float,
) -> int | None:
    """Start the run and kill one of its processes at a random moment.

    Args:
      early: at a random moment of the first `startup` seconds, else at a random step, at most
        `reach` after the last one.

    Returns:
      The last step that was logged, or None when the run ended first.
    """
    before, victim = last_step(folder), draw.randrange(processes)
    with start(folder, recipe, settings, processes) as job:
        target = job.processes[victim]
        aim = before + draw.randrange(1, reach + 1)
        wait = draw.random() * startup if early else 600.0
        deadline = time.time() + wait
        while (early or last_step(folder) < aim) and time.time() < deadline:
            if target.poll() is not None:
                break
            time.sleep(0.002)
        if not early:
            time.sleep(draw.random() * 0.2)
        job.strike(victim, signal.SIGKILL)
        target.wait()
        if target.returncode != -signal.SIGKILL:
            return None
        if not early:  # during the start the others may still be waiting for each other
            codes = job.codes(timeout=120)
            others = [code for i, code in enumerate(codes) if i != victim]
            assert others == [11] * (processes - 1), (codes, job.everything())
        collect(job, folder)
    return last_step(folder)


def differences(
    untouched: Path, killed: Path, recipe: str, settings: Sequence[str]
) -> tuple[int, list[str]]:
    """What the two folders do not agree in, and the step of their ends."""
    import jax
    import numpy as np

    from jaxmods.partitioning import MeshShape, make_mesh
    from tests.train.test_loop import lines
    from train.checkpoint import Checkpoints
    from train.recipes import resolve
    from train.state import make_plan

    plan = make_plan(
        resolve(recipe, settings).experiment, make_mesh(MeshShape(), jax.devices()[:1])
    )
    ends = []
    for folder in (untouched, killed):
        checkpoints = Checkpoints(folder, plan.experiment.checkpoint, read_only=True)
        restored = checkpoints.restore(plan)
        checkpoints.close()
        assert restored is not None, folder
        ends.append(restored)
    found = []
    if ends[0].step != ends[1].step:
        found.append(f"step: {ends[0].step} and {ends[1].step}")
    paths = jax.tree_util.tree_leaves_with_path(ends[0].state)
    for (path, x), y in zip(paths, jax.tree.leaves(ends[1].state), strict=True):
        if not np.array_equal(np.asarray(x), np.asarray(y), equal_nan=True):
            found.append(f"state{jax.tree_util.keystr(path)}")
    if ends[0].info["counters"] != ends[1].info["counters"]:
        found.append("counters of the checkpoint")
    if lines(untouched) != lines(killed):
        found.append("metrics.jsonl")
    if results(untouched) != results(killed):
        found.append("eval/")
    for name in ("quarantine.jsonl", "counters.json"):
        if (untouched / name).read_text() != (killed / name).read_text():
            found.append(name)
    return ends[0].step, found


def results(folder: Path) -> dict[str, Any]:
    """Evaluations without the time they took."""
    found = {}
    for path in sorted((folder / "eval").glob("*.json")):
        content = json.loads(path.read_text())
        for result in content["results"]:
            del result["seconds"]
        found[path.name] = content
    return found


def compare_after_kills(
    workdir: Path,
    recipe: str,
    settings: Sequence[str],
    *,
    kills: int,
    processes: int = 1,
    seed: int | None = None,
    reach: int = 15,
    startup: float = 8.0,
) -> list[str]:
    """Do all of it; returns what differs (see the description of this module)."""
    seed = random.SystemRandom().randrange(2**31) if seed is None else seed
    draw = random.Random(seed)
    print(f"seed {seed}", flush=True)
    untouched, killed = workdir / "untouched", workdir / "killed"
    for folder in (untouched, killed):
        folder.mkdir(parents=True)
    finish(untouched, recipe, settings, processes)
    done = 0
    for number in range(kills):
        early = number % 4 == 3
        step = kill_once(
            killed, recipe, settings, processes, draw, early=early, reach=reach, startup=startup
        )
        if step is None:
            print("the run ended before it could be killed", flush=True)
            break
        done += 1
        print(f"kill {done}: {'early' if early else 'running'}, logged to {step}", flush=True)
    assert done, "the process was never caught alive"
    finish(killed, recipe, settings, processes)
    step, found = differences(untouched, killed, recipe, settings)
    verdict = f"differ in {', '.join(found)}" if found else "equal bit for bit"
    print(f"after {done} kills, at step {step}: {verdict}", flush=True)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns 0 when both runs are equal."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("--workdir", type=Path, required=True, help="a new folder")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, help="to repeat the same moments, as far as possible")
    parser.add_argument("--reach", type=int, default=15, help="steps between two kills, at most")
    parser.add_argument("--startup", type=float, default=8.0, help="seconds that a start takes")
    parser.add_argument("--set", nargs="+", action="extend", default=[], dest="settings")
    options = parser.parse_args(arguments)
    logging.getLogger("absl").setLevel(logging.ERROR)  # the checkpoint library's own diary
    found = compare_after_kills(
        options.workdir,
        options.recipe,
        options.settings,
        kills=options.kills,
        processes=options.processes,
        seed=options.seed,
        reach=options.reach,
        startup=options.startup,
    )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
