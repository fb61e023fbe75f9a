"""Two processes with two devices each: the run of one process with four."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.test_loop import lines

ROOT = Path(__file__).resolve().parents[2]
CODE = """
import sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
count = int(sys.argv[2])
if count > 1:
    jax.distributed.initialize(sys.argv[1], count, int(sys.argv[3]))
from tests.train.toy import regression
from train.loop import fit
from train.overrides import apply_overrides
for steps in ("10", "20"):  # the second call continues the first
    settings = ["steps=" + steps, "mesh.fsdp=2", "optim.schedule=constant"]
    experiment = apply_overrides(regression(), settings)
    assert fit(experiment, sys.argv[4], allow_change=["steps"]).status == "finished"
"""


def start(address: str, count: int, index: int, folder: Path) -> subprocess.Popen[str]:
    flags = f"--xla_force_host_platform_device_count={4 // count}"
    return subprocess.Popen(
        [sys.executable, "-c", CODE, address, str(count), str(index), str(folder)],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    one, two = tmp_path / "one", tmp_path / "two"
    alone = start(address, 1, 0, one)
    output, _ = alone.communicate(timeout=240)
    assert alone.returncode == 0, output
    pair = [start(address, 2, i, two) for i in range(2)]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in pair]
    finally:
        for process in pair:
            process.kill()
    assert [p.returncode for p in pair] == [0, 0], "\n".join(outputs)
    for a, b in zip(lines(one), lines(two), strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            assert b[name] == pytest.approx(value, rel=2e-5), name
    for name in ("counters.json", "quarantine.jsonl"):
        assert (one / name).read_text() == (two / name).read_text()
    assert json.loads((two / "summary.json").read_text())["device"]["processes"] == 2
    assert (two / "log.1.txt").exists()
