"""The lock of a run folder, and holding a recipe against the saved one."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import socket
from pathlib import Path

import pytest

from train.exits import UserError
from train.recipes import Recipe, resolve
from train.workdir import Lock, match_recipe, storage, storage_problem

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


def test_a_folder_that_has_gone_or_was_taken_is_noticed(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    with Lock(folder) as lock:
        lock.check()
        folder.rename(elsewhere)
        with pytest.raises(UserError, match="run: the run folder has vanished"):
            lock.check()
        elsewhere.rename(folder)
        (folder / "lock").write_text(json.dumps({"pid": 5, "host": "elsewhere"}))
        with pytest.raises(UserError, match="in use by process 5 on elsewhere"):
            lock.check()
    with Lock(folder) as lock:
        shutil.rmtree(folder)  # leaving goes well
        folder.mkdir()


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/run: cannot be written \(Not a directory\)"):
        Lock(tmp_path / "file/run")
    with pytest.raises(UserError, match=r"/proc/nowhere/run: "):
        Lock(Path("/proc/nowhere/run"))


def wrapped(cause: Exception) -> Exception:
    """As libraries do it."""
    error = ValueError("could not save")
    error.__cause__ = cause
    return error


def test_errors_of_the_storage_are_one_sentence(tmp_path: Path) -> None:
    inside = str(tmp_path / "checkpoints/5")
    full = OSError(errno.ENOSPC, "No space left on device")
    in_cpp = ValueError(f'RESOURCE_EXHAUSTED: writing "{inside}": No space left on device')
    for error in (full, wrapped(full), in_cpp, wrapped(in_cpp)):
        text = storage_problem(error, tmp_path)
        assert text is not None
        assert "no space left" in text
        assert "MiB free" in text
    shut = storage_problem(OSError(errno.EROFS, "Read-only file system", inside), tmp_path)
    assert shut is not None
    assert shut.startswith(f"{tmp_path}: cannot be written (Read-only file system); give")
    stale = storage_problem(OSError(errno.ESTALE, "Stale file handle", inside), tmp_path)
    assert stale is not None
    assert "has gone or does not answer" in stale
    for other in (
        OSError(errno.EACCES, "Permission denied", "/data/picture.jpg"),  # the data's, not ours
        FileNotFoundError(errno.ENOENT, "No such file", inside),  # the folder itself is there
        ValueError("No space left on device for this and that"),
        KeyError("left"),
    ):
        assert storage_problem(other, tmp_path) is None
        with pytest.raises(type(other)), storage(tmp_path):
            raise other
    with pytest.raises(UserError, match="no space left"), storage(tmp_path):
        raise wrapped(full)


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
