"""A real process, killed at random moments: the end is that of a run which nobody touched."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train.kill_many import compare_after_kills


@pytest.mark.slow
def test_kill_nine_at_random_moments(tmp_path: Path) -> None:
    settings = ["steps=60", "checkpoint.every=4", "evaluation.every=8", "data.pause=0.02"]
    found = compare_after_kills(tmp_path, "tests.train.toy:regression", settings, kills=4)
    assert not found
    said = (tmp_path / "killed/said.txt").read_text()
    assert said.count("stale lock") >= 3  # the fourth kill may come before the lock is taken
