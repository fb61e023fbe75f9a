"""`jaxmods preflight`: options, exit codes, and what is said without libtpu."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxmods.partitioning import unbox
from tests.preflight.toy import Toy
from train.cli import main
from train.exits import ExitCode, UsageError
from train.preflight import command, topologies

ROOT = Path(__file__).parents[2]
TOY = str(Path(__file__).with_name("toy.py"))
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu (extra: preflight) is not installed"
)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own: libtpu is set up before JAX starts."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.run(
        [sys.executable, "-m", "train", "preflight", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


def test_without_libtpu_it_names_the_extra(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "libtpu" else find(name, *a)
    )
    assert main(["preflight", f"{TOY}:small", "--topology", "v5e-256"]) == ExitCode.ERROR
    assert "pip install 'jaxmods[preflight]'" in capsys.readouterr().err


def test_a_wrong_topology_is_a_usage_error_with_or_without_libtpu(capsys):
    assert main(["preflight", f"{TOY}:small", "--topology", "v5e-255"]) == ExitCode.USAGE
    assert "did you mean v5e-256" in capsys.readouterr().err


def test_meshes_by_name():
    topology = topologies.parse("v5e-256", 2)
    assert command.mesh_sizes("fsdp=16,tensor=4", topology) == {
        "data": 8,
        "fsdp": 16,
        "tensor": 4,
        "context": 1,
    }
    assert command.mesh_sizes("data=512", topology)["data"] == 512


@pytest.mark.parametrize("text", ["fsdp", "fsdp=0", "fsdp=x", "rows=4", "fsdp=7"])
def test_wrong_meshes(text):
    with pytest.raises(UsageError, match="--compare"):
        command.mesh_sizes(text, topologies.parse("v5e-256"))


def test_sweeps_take_every_combination_that_divides_a_slice():
    topology = topologies.parse("v5e-16", 2)
    found = list(command.sweep_sizes(["fsdp=1,4,64", "tensor=1,2"], topology))
    assert [(m["data"], m["fsdp"], m["tensor"]) for m in found] == [
        (32, 1, 1),
        (16, 1, 2),
        (8, 4, 1),
        (4, 4, 2),
    ]
    assert len(list(command.sweep_sizes([], topologies.parse("v5e-256")))) == 5


@pytest.mark.parametrize("choice", ["fsdp", "data=4", "fsdp=a", "fsdp=7"])
def test_wrong_sweeps(choice):
    with pytest.raises(UsageError, match="--sweep"):
        list(command.sweep_sizes([choice], topologies.parse("v5e-16")))


def test_every_function_of_fgclip_says_what_it_takes():
    from tests.preflight.test_flops import small_fgclip

    system = small_fgclip()
    params = unbox(jax.eval_shape(system.init, jax.random.key(0)))
    inputs, functions = system.function_inputs(6), system.functions()
    assert sorted(inputs) == sorted(functions)
    for name, arguments in inputs.items():
        structs = [spec.struct() for spec in arguments.values()]
        assert jax.eval_shape(functions[name], params, *structs).shape[0] == 6


# With the compiler -----------------------------------------------------------------------------


@needs_libtpu
@pytest.mark.slow
def test_a_small_recipe_on_a_pod():
    result = run(f"{TOY}:small", "--topology", "v5e-256", "--json", "--set", "batch_size=256")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["fits"]
    assert (found["topology"]["devices"], found["topology"]["hosts"]) == (256, 64)
    assert found["mesh"]["fsdp"] == 256
    flops = found["flops"]
    assert flops["model_per_example"] == pytest.approx(flops["analytic_per_example"])
    memory = found["memory"]
    assert 0 < memory["total"] < memory["capacity"]
    assert memory["parameters"] * 2 == pytest.approx(memory["optimizer"], rel=0.01)
    assert any(c["axes"] == "fsdp" and c["in_loops"] for c in found["collectives"])
    estimate = found["estimate"]
    assert 0 < estimate["low"] <= estimate["point"] <= estimate["high"]
    assert 0 < estimate["mfu"][1] < 0.65
    assert not [w for w in found["warnings"] if "copied" in w or "not understood" in w]


@needs_libtpu
@pytest.mark.slow
def test_a_recipe_that_does_not_fit_says_why():
    result = run(f"{TOY}:large", "--topology", "v5e-4", "--set", "system.remat=none")
    assert result.returncode == ExitCode.OUT_OF_MEMORY
    assert "DOES NOT FIT" in result.stdout
    assert "tests/preflight/toy.py:" in result.stdout
    assert "try: " in result.stdout


@needs_libtpu
@pytest.mark.slow
def test_long_sequences_take_the_flash_kernel_by_themselves():
    result = run(
        f"{TOY}:small",
        "--topology",
        "v5e-4",
        "--json",
        "--set",
        "system.tokens=512",
        "system.layers=2",
        "batch_size=16",
    )
    assert result.returncode == 0, result.stderr
    kernels = json.loads(result.stdout)["attention_kernels"]
    flash = [k for k in kernels if k["kind"] == "flash"]
    # Per layer: forward, forward again (remat), dq and dkv.
    assert sum(k["times"] for k in flash) == 2 * 4
    assert sum(k["times"] for k in flash if k["backward"]) == 2 * 2


@needs_libtpu
@pytest.mark.slow
def test_named_functions():
    result = run(f"{TOY}:small", "--topology", "v5e-4", "--what", "eval", "--json")
    assert result.returncode == 0, result.stderr
    (found,) = json.loads(result.stdout)
    assert (found["what"], found["batch_size"]) == ("encode", 64)
    forward = Toy().forward_matmul_flops() + Toy().forward_attention_flops()
    assert found["flops"]["model_per_example"] == pytest.approx(forward)
    assert found["memory"]["optimizer"] == found["memory"]["gradients"] == 0


@needs_libtpu
@pytest.mark.slow
def test_two_slices_join_over_the_network():
    result = run(
        f"{TOY}:small",
        "--topology",
        "v5e-4",
        "--slices",
        "2",
        "--json",
        "--set",
        "mesh.data=2",
        "mesh.fsdp=4",
        "system.layers=2",
    )
    assert result.returncode == 0, result.stderr
    crossing = [c for c in json.loads(result.stdout)["collectives"] if c["dcn"]]
    assert crossing
    assert {c["axes"] for c in crossing} == {"data"}


@needs_libtpu
@pytest.mark.slow
def test_two_meshes_side_by_side():
    result = run(
        f"{TOY}:small",
        "--topology",
        "v5e-4",
        "--compare",
        "data=4",
        "fsdp=4",
        "--set",
        "system.layers=2",
    )
    assert result.returncode == 0, result.stderr
    assert "data=4" in result.stdout
    assert "fsdp=4" in result.stdout
