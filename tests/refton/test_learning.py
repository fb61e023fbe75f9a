"""A minute of the tiny recipe: the loss falls, colours come out right more often than by chance."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STEPS = 300
SCENES = 128


@pytest.mark.slow
def test_a_short_run_learns(tmp_path: Path) -> None:
    work = tmp_path / "run"
    command = ["fit", "refton/tiny", "--no-report", "--json", "--workdir", str(work), "--set"]
    settings = [f"steps={STEPS}", "logging.every=20"]
    done = subprocess.run(
        [sys.executable, "-m", "train", *command, *settings],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    # The first twenty steps to the last: velocities of the data, then of its parts.
    assert losses[-1] < 0.5 * losses[0]
    results = json.loads((work / "eval" / f"{STEPS}.json").read_text())["results"]
    assert len(results) == 4
    for result in results:
        colour = result["metrics"]["colour_accuracy"]
        # Four standard deviations above what guessing gives on so many scenes.
        spread = math.sqrt(colour["chance"] * (1 - colour["chance"]) / SCENES)
        assert colour["value"] > colour["chance"] + 4 * spread, result["protocol"]
