"""Training with several processes is training with one: records, losses, and continuing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.hosts import ROOT, Job, free_port, until
from tests.train.kill_many import last_step
from tests.train.test_loop import lines
from tests.train.toy import regression
from train.loop import FitResult, fit
from train.overrides import apply_overrides

RECIPE = "tests.train.toy:regression"
SETTINGS = ["steps=36", "logging.every=2", "logging.tensorboard=false"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> FitResult:
    """The run of one process."""
    experiment = apply_overrides(regression(), SETTINGS)
    return fit(experiment, tmp_path_factory.mktemp("alone"), name=RECIPE)


def same_run(alone: Path, other: Path) -> None:
    """Numbers differ by the order of sums; what was read does not differ at all."""
    expected, found = lines(alone), lines(other)
    assert [e["step"] for e in expected] == [f["step"] for f in found]
    for a, b in zip(expected, found, strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            assert b[name] == pytest.approx(value, rel=2e-5), name
    for name in ("counters.json", "quarantine.jsonl"):
        assert (alone / name).read_text() == (other / name).read_text()


@pytest.mark.slow
def test_four_processes_then_two_then_one(alone: FitResult, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = ["-m", "train", "fit", RECIPE, "--workdir", str(folder), "--no-report"]
    command += ["--allow-change", "data.pause", "--set", *SETTINGS]
    stops = [5]  # behind the first checkpoint
    for count in (4, 2):
        with Job(tmp_path / str(count), count, [*command, "data.pause=0.3"]) as job:
            until(lambda: last_step(folder) > stops[-1], f"{count} processes have made steps")
            job.strike(count - 1, signal.SIGTERM)
            assert job.codes() == [10] * count, job.everything()
            if count == 2:
                assert f"checkpoint {stops[-1]} cannot be read" in job.output(0)
        saved = max(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit())
        assert stops[-1] < saved < 36
        stops.append(saved)
        if count == 4:  # two processes will have to do with the one before
            for part in (folder / f"checkpoints/{saved}/trained").rglob("*"):
                if part.parent.name == "d":
                    part.unlink()
        summary = json.loads((folder / "summary.json").read_text())
        assert (summary["status"], summary["step"]) == ("preempted", saved)
        assert summary["device"]["processes"] == count
    log = (folder / "log.txt").read_text()
    assert f"stopped by SIGTERM on process 3 ({os.uname().nodename}) at step {stops[1]}" in log
    before = (stops[1] - 1) // 5 * 5
    assert f"continuing from step {before} of 36" in (folder / "log.1.txt").read_text()
    with Job(tmp_path / "1", 1, command) as job:
        assert job.codes() == [0], job.everything()
    same_run(alone.workdir, folder)

    command = ["-m", "train", "eval", RECIPE, "--workdir", str(folder), "--json"]
    command += ["--out", str(tmp_path / "again"), "--set", *SETTINGS]
    with Job(tmp_path / "eval", 2, command) as job:
        assert job.codes() == [0, 0], job.everything()
    assert '"protocol": "fit"' in job.output(0)
    assert "protocol" not in job.output(1)
    again = json.loads((tmp_path / "again/eval/36.json").read_text())["results"][0]
    error = alone.results["fit"].metrics["error"].value
    assert again["metrics"]["error"]["value"] == pytest.approx(error, rel=2e-5)


CODE = """
import sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import train.loop
from jaxmods.partitioning import make_mesh
from tests.train.toy import regression
from train.overrides import apply_overrides

def interleaved(shape):  # as on a torus, where the rows of a host are not one block
    devices = jax.devices()
    return make_mesh(shape, [devices[i] for i in (0, 2, 1, 3)])

train.loop.make_mesh = interleaved
experiment = apply_overrides(regression(), ["mesh.fsdp=2", *sys.argv[4:]])
assert train.loop.fit(experiment, sys.argv[3]).status == "finished"
"""


@pytest.mark.slow
def test_rows_of_a_host_need_not_be_one_block(alone: FitResult, tmp_path: Path) -> None:
    address, folder = f"localhost:{free_port()}", tmp_path / "run"
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
    }
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", CODE, address, str(index), str(folder), *SETTINGS],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in pair]
    finally:
        for process in pair:
            process.kill()
    assert [p.returncode for p in pair] == [0, 0], "\n".join(outputs)
    same_run(alone.workdir, folder)


@pytest.mark.slow
def test_bad_data_on_one_host_ends_all_and_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = ["data.fail_at=7", "data.fail_share=1", "evaluation.protocols=[]"]
    command = ["-m", "train", "fit", RECIPE, "--workdir", str(folder), "--no-report"]
    flags = ["--set", *settings, "checkpoint.keep_best=none"]
    with Job(tmp_path / "job", 2, [*command, *flags], JAXMODS_HOST_TIMEOUT="20") as job:
        assert job.codes() == [14, 14], job.everything()
    assert "process 1 (" in job.output(0)
    assert "failed: DataError: 2 of 3 records are damaged" in job.output(0)
    assert "2 of 3 records are damaged" in job.output(1)
    assert "Traceback" in (folder / "log.1.txt").read_text()
    assert [p.name for p in (folder / "checkpoints").iterdir() if p.name.isdigit()] == ["5"]
