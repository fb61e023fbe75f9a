"""The command line: names, options, output, exit codes."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from tests.train import toy
from tests.train.test_loop import terminate_when
from train import commands, exits
from train.cli import main
from train.exits import ExitCode, classify

ROOT = Path(__file__).resolve().parents[2]
RECIPE = "tests.train.toy:regression"
QUICK = ["--set", "steps=8", "evaluation.at_start=false", "logging.tensorboard=false"]


@pytest.fixture(autouse=True)
def _logging_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The command line takes the log for itself; give it back."""
    log, absl = logging.getLogger("train"), logging.getLogger("absl")
    saved = (log.handlers[:], log.level, log.propagate, absl.level)
    monkeypatch.setattr(commands, "_try_report", lambda folder: None)  # has its own tests
    yield
    log.handlers[:], log.level, log.propagate, absl.level = saved


def test_help_answers_at_once_and_names_every_command() -> None:
    before = os.times()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "train", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    after = os.times()
    words = (
        "list",
        "describe",
        "fit",
        "eval",
        "sample",
        "encode",
        "report",
        "import",
        "export",
        "data",
        "13 loss",
    )
    for word in words:
        assert word in done.stdout
    loaded = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert not loaded & {"jax", "numpy", "flax", "orbax", "train.loop"}
    spent = after.children_user - before.children_user  # not the clock: machines are shared
    assert spent < 0.5


@pytest.mark.parametrize(
    "command", [["list"], ["describe"], ["fit"], ["eval"], ["import"], ["export"],
                ["report"], ["sample"], ["encode"], ["data", "inspect"]]
)  # fmt: skip
def test_every_command_shows_an_example_and_its_exit_codes(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert f"example:\n  jaxmods {' '.join(command)}" in text
    assert "--json" in text
    assert "exit codes:" in text


def test_wrong_usage_is_two(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == ExitCode.USAGE
    with pytest.raises(SystemExit) as caught:
        main(["fit", RECIPE])
    assert caught.value.code == ExitCode.USAGE
    capsys.readouterr()
    assert main(["describe", "no/such"]) == ExitCode.USAGE
    assert main(["describe", RECIPE, "--set", "optim.rl=1"]) == ExitCode.USAGE
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("jaxmods: no recipe 'no/such'")
    assert "did you mean optim.lr?" in lines[1]
    assert len(lines) == 2  # no traceback
    assert main(["describe", "no/such", "--debug"]) == ExitCode.USAGE
    assert "Traceback" in capsys.readouterr().err


def test_list(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"toy/regression": toy.regression, "toy/pair": toy.pair}
    monkeypatch.setattr("train.recipes.all_recipes", lambda: known)
    assert main(["list"]) == ExitCode.OK
    assert "toy/pair        Two losses over two groups" in capsys.readouterr().out
    assert main(["list", "--json"]) == ExitCode.OK
    assert [r["recipe"] for r in json.loads(capsys.readouterr().out)] == list(known)


def test_describe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", RECIPE, "--json", "--set", "mesh.fsdp=4"]) == ExitCode.OK
    facts = json.loads(capsys.readouterr().out)
    rows = {r["module"]: r for r in facts["parameters"]}
    assert rows["stem"] == {
        "module": "stem", "count": 64, "trained": 0, "decayed": 0, "labels": ["frozen"],
    }  # fmt: skip
    assert (rows["hidden"]["trained"], rows["hidden"]["decayed"]) == (144, 128)
    head = next(g for g in facts["optimiser"] if g["label"] == "head")
    assert (head["lr"], head["start_step"], head["weight_decay"]) == (0.02, 3, 0.1)
    assert facts["batch"]["x"] == {"shape": [8, 8], "dtype": "float32", "axes": ["batch", None]}
    memory = facts["memory"]
    assert memory["parameters"]["total"] == 4 * (208 + 64)
    assert memory["gradients"]["total"] == memory["average"]["total"] == 4 * 208
    assert memory["optimiser"]["total"] >= 2 * 4 * 208
    # the kernels are split over four devices, the bias is not
    assert memory["gradients"]["per_device"] == 4 * ((128 + 64) // 4 + 16)
    assert main(["describe", RECIPE]) == ExitCode.OK
    text = capsys.readouterr().out
    assert "hidden         144      144      128  train" in text


def test_fit_eval_and_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tmp_path / "run")
    assert main(["fit", RECIPE, "--workdir", folder, "--json", *QUICK]) == ExitCode.OK
    captured = capsys.readouterr()
    summary = json.loads(captured.out)
    assert (summary["status"], summary["step"]) == ("finished", 8)
    assert "step 8/8" in captured.err

    arguments = ["eval", RECIPE, "--workdir", folder, "--json"]
    assert main([*arguments, "--protocol", "fit"]) == ExitCode.OK
    result = json.loads(capsys.readouterr().out)
    assert result["step"] == 8
    assert result["results"][0]["metrics"]["error"]["value"] == pytest.approx(
        summary["evaluation"]["results"][0]["metrics"]["error"]["value"], rel=1e-6
    )
    assert main([*arguments, "--protocol", "fti"]) == ExitCode.USAGE
    assert main([*arguments, "--set", "system.width=32"]) == ExitCode.ERROR
    assert main(["fit", RECIPE, "--workdir", folder]) == ExitCode.ERROR
    message = capsys.readouterr().err
    assert "system.width: 16 → 32" in message
    assert "steps: 8 → 20" in message
    assert "--allow-change steps" in message

    poisoned = ["--workdir", str(tmp_path / "nan"), *QUICK, "data.poison=2"]
    assert main(["fit", RECIPE, *poisoned]) == ExitCode.NON_FINITE
    empty = ["--workdir", str(tmp_path / "data"), *QUICK, "data.fail_at=0"]
    assert main(["fit", RECIPE, *empty]) == ExitCode.DATA


def test_a_stopped_run_says_so_with_its_exit_code(tmp_path: Path) -> None:
    slow = ["--set", "data.pause=0.1", "logging.tensorboard=false"]
    sender = terminate_when(tmp_path / "metrics.jsonl", 4)
    code = main(["fit", RECIPE, "--workdir", str(tmp_path), *slow])
    sender.join()
    assert code == ExitCode.PREEMPTED


def test_exit_codes_of_what_the_device_reports() -> None:
    error = jax.errors.JaxRuntimeError
    assert classify(error("RESOURCE_EXHAUSTED: Out of memory")) == ExitCode.OUT_OF_MEMORY
    assert classify(error("UNAVAILABLE: coordination service lost task 3")) == ExitCode.HOST_LOST
    assert classify(error("INVALID_ARGUMENT: something")) == ExitCode.ERROR
    assert classify(exits.UserError("x")) == ExitCode.ERROR
    assert classify(RuntimeError("x")) == ExitCode.ERROR


def test_a_fault_of_the_program_keeps_its_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("should not be")

    monkeypatch.setattr("train.recipes.resolve", broken)
    assert main(["describe", RECIPE]) == ExitCode.ERROR
    assert "Traceback" in capsys.readouterr().err
