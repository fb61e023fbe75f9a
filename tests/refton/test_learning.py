"""A minute of the tiny recipe: the loss falls, colours come out right more often than by chance."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.command import jaxmods, losses

STEPS = 300
SCENES = 128


@pytest.mark.slow
def test_a_short_run_learns(tmp_path: Path) -> None:
    work = tmp_path / "run"
    settings = [f"steps={STEPS}", "logging.every=20"]
    jaxmods("fit", "refton/tiny", "--no-report", "--workdir", str(work), "--set", *settings)
    found = losses(work)
    # The first twenty steps to the last: velocities of the data, then of its parts.
    assert found[-1] < 0.5 * found[0]
    results = json.loads((work / "eval" / f"{STEPS}.json").read_text())["results"]
    assert len(results) == 4
    for result in results:
        colour = result["metrics"]["colour_accuracy"]
        # Four standard deviations above what guessing gives on so many scenes.
        spread = math.sqrt(colour["chance"] * (1 - colour["chance"]) / SCENES)
        assert colour["value"] > colour["chance"] + 4 * spread, result["protocol"]
