"""A real process, killed at random moments: the end is that of a run which nobody touched."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxmods.partitioning import MeshShape, make_mesh
from tests.train.test_loop import lines
from train.checkpoint import Checkpoints
from train.recipes import resolve
from train.state import make_plan

ROOT = Path(__file__).resolve().parents[2]
RECIPE = "tests.train.toy:regression"
STEPS = 60
SETTINGS = [f"steps={STEPS}", "checkpoint.every=4", "evaluation.every=8", "data.pause=0.02"]


def start(folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "train", "fit", RECIPE, "--workdir", str(folder)]
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    with (folder / "stderr.txt").open("ab") as errors:
        return subprocess.Popen(
            [*command, "--no-report", "--set", *SETTINGS],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )


def finish(folder: Path) -> None:
    """Run to the end; whatever happens no process stays behind."""
    process = start(folder)
    try:
        code = process.wait(timeout=900)  # seconds when idle, minutes on a crowded machine
    finally:
        process.kill()
        process.wait()
    assert code == 0, (folder / "stderr.txt").read_text()


def last_step(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    if not path.exists():
        return 0
    found = 0
    for line in path.read_text(errors="replace").splitlines():
        try:
            found = max(found, json.loads(line)["step"])
        except json.JSONDecodeError:
            continue
    return found


def results(folder: Path) -> dict[str, Any]:
    found = {}
    for path in sorted((folder / "eval").glob("*.json")):
        content = json.loads(path.read_text())
        for result in content["results"]:
            del result["seconds"]
        found[path.name] = content
    return found


@pytest.mark.slow
def test_kill_nine_at_random_moments(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(2**31)
    draw = random.Random(seed)
    print(f"seed {seed}")  # shown when the test fails
    untouched, killed = tmp_path / "untouched", tmp_path / "killed"
    untouched.mkdir()
    killed.mkdir()
    finish(untouched)

    kills: list[int] = []
    for _ in range(3):
        before, process = last_step(killed), start(killed)
        aim = before + draw.randrange(4, 16)
        deadline = time.time() + 600
        while last_step(killed) < aim and process.poll() is None and time.time() < deadline:
            time.sleep(0.005)
        time.sleep(draw.random() * 0.2)
        process.send_signal(signal.SIGKILL)
        if process.wait() == -signal.SIGKILL:
            kills.append(last_step(killed))
    assert kills, "the process was never caught alive"
    finish(killed)
    assert (killed / "stderr.txt").read_text().count("stale lock") == len(kills)

    plan = make_plan(
        resolve(RECIPE, SETTINGS).experiment, make_mesh(MeshShape(), jax.devices()[:1])
    )
    states = []
    for folder in (untouched, killed):
        checkpoints = Checkpoints(folder, plan.experiment.checkpoint, read_only=True)
        restored = checkpoints.restore(plan)
        checkpoints.close()
        assert restored is not None
        assert restored.step == STEPS
        states.append(restored)
    for x, y in zip(
        jax.tree.leaves(states[0].state), jax.tree.leaves(states[1].state), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=f"kills at {kills}")
    assert states[0].info["counters"] == states[1].info["counters"]
    assert lines(untouched) == lines(killed)
    assert results(untouched) == results(killed)
    for name in ("quarantine.jsonl", "counters.json"):
        assert (untouched / name).read_text() == (killed / name).read_text()
