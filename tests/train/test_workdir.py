"""The lock of a run folder, and holding a recipe against the saved one."""

from __future__ import annotations

import json
import logging
import os
import socket
from pathlib import Path

import pytest

from train.exits import UserError
from train.recipes import Recipe, resolve
from train.workdir import Lock, match_recipe

NAME = "tests.train.toy:regression"


def test_second_job_is_refused_and_a_released_folder_is_free(tmp_path: Path) -> None:
    with Lock(tmp_path), pytest.raises(UserError, match=f"in use by process {os.getpid()} on"):
        Lock(tmp_path)
    with Lock(tmp_path):
        pass


def test_stale_lock_is_taken_over_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "lock"
    path.write_text(json.dumps({"pid": 2**22 + 1, "host": socket.gethostname()}))
    with caplog.at_level(logging.WARNING, "train"), Lock(tmp_path):
        assert f"stale lock of process {2**22 + 1}" in caplog.text


def test_lock_of_another_host_counts_while_it_shows_life(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.write_text(json.dumps({"pid": 5, "host": "elsewhere"}))
    with pytest.raises(UserError, match="process 5 on elsewhere"):
        Lock(tmp_path)
    os.utime(path, (0, 0))
    with Lock(tmp_path):
        pass


def resolved(*settings: str) -> Recipe:
    return resolve(NAME, settings)


def test_recipe_is_saved_then_held_against(tmp_path: Path) -> None:
    assert match_recipe(tmp_path, resolved(), ()) == []
    saved = json.loads((tmp_path / "recipe.json").read_text())
    assert (saved["recipe"], saved["overrides"]) == (NAME, [])
    assert saved["experiment"]["optim"]["lr"] == 0.01
    assert match_recipe(tmp_path, resolved(), ()) == []
    (tmp_path / "checkpoints/5").mkdir(parents=True)

    with pytest.raises(UserError) as caught:
        match_recipe(tmp_path, resolved("optim.lr=1", "steps=9"), ("optim",))
    message = str(caught.value)
    assert "steps: 20 → 9" in message
    assert "optim.lr" not in message.split("Differences:")[1].split("To go on")[0]
    assert "--allow-change steps" in message
    assert json.loads((tmp_path / "recipe.json").read_text()) == saved

    lines = match_recipe(tmp_path, resolved("optim.lr=1", "steps=9"), ("optim", "steps"))
    assert lines == ["steps: 20 → 9", "optim.lr: 0.01 → 1.0"]
    assert json.loads((tmp_path / "recipe.1.json").read_text()) == saved
    assert json.loads((tmp_path / "recipe.json").read_text())["experiment"]["steps"] == 9


def test_a_run_that_saved_nothing_binds_nobody(tmp_path: Path) -> None:
    match_recipe(tmp_path, resolved(), ())
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval/0.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text('{"step": 4}')
    assert match_recipe(tmp_path, resolved("steps=9"), (), write=False) == []
    assert (tmp_path / "eval/0.json").exists()
    assert match_recipe(tmp_path, resolved("steps=9"), ()) == []
    assert json.loads((tmp_path / "recipe.json").read_text())["experiment"]["steps"] == 9
    assert not (tmp_path / "eval").exists()
    assert not (tmp_path / "metrics.jsonl").exists()
