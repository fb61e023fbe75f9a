"""`jaxmods preflight`: options, exit codes, and what is said without libtpu."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxmods.nn.attention import attention
from jaxmods.partitioning import MeshShape, make_mesh, sharding_for, unbox, use_mesh
from jaxmods.system import ArraySpec
from tests.preflight.toy import Toy, experiment
from train.cli import main
from train.exits import ExitCode, UsageError, UserError
from train.preflight import command, topologies
from train.preflight.advice import Suggestion

ROOT = Path(__file__).parents[2]
TOY = str(Path(__file__).with_name("toy.py"))


@pytest.fixture
def preflight(libtpu):
    """The command in this process: (exit code, output)."""

    def call(*arguments: str) -> tuple[int, str]:
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            code = main(["preflight", *arguments])
        return code, output.getvalue()

    return call


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


class Painter(Toy):
    """A toy that generates."""

    def function_inputs(self, batch_size: int) -> dict[str, dict[str, ArraySpec]]:
        noise = {"noise": ArraySpec((batch_size, 4), "float32", ("batch", None))}
        return {**super().function_inputs(batch_size), "sample": noise, "sample_fast": noise}


def test_functions_that_generate_are_apart():
    recipe = experiment(Painter())
    assert list(command.functions_for("eval", recipe)) == ["encode", "widen", "prefill_kept"]
    assert list(command.functions_for("sample", recipe)) == ["sample", "sample_fast"]


def test_functions_by_name():
    assert list(command.functions_for("widen,sample_fast", experiment(Painter()))) == [
        "widen",
        "sample_fast",
    ]
    with pytest.raises(
        UsageError, match=r"functions of Toy, found enlarge; it lists encode, widen"
    ):
        command.functions_for("enlarge,widen", experiment())


def test_a_system_that_generates_nothing_says_so():
    with pytest.raises(
        UserError, match=r"--what sample: .*Toy.*called sample; it lists encode, widen"
    ):
        command.functions_for("sample", experiment())


@pytest.mark.parametrize(
    ("fits", "settings"),
    [
        (lambda e: e.optim.accumulate == 2, ("system.remat=full", "optim.accumulate=2")),
        (lambda e: e.system.remat == "full", ("system.remat=full",)),
        (lambda e: False, None),
    ],
)
def test_suggestions_are_tried_one_more_at_a_time(monkeypatch, fits, settings):
    def reports(recipe, what, changed, topology, devices):
        return [types.SimpleNamespace(fits=fits(changed), advice=())]

    monkeypatch.setattr(command, "reports_for", reports)
    advice = (
        Suggestion(("system.remat=full",), ""),
        Suggestion(("optim.accumulate=2",), ""),
        Suggestion((), "a larger topology"),
    )
    refused = [types.SimpleNamespace(fits=False, advice=advice)]
    recipe, topology = experiment(Toy(remat="none")), topologies.parse("v5e-4")
    found = command.first_that_fits("toy", "train", recipe, topology, [], refused)
    assert (found.settings if found else None) == settings


def test_suggestions_are_for_one_mesh(monkeypatch, capsys):
    monkeypatch.setattr(topologies, "require_libtpu", lambda: None)
    monkeypatch.setattr(topologies, "settle_environment", lambda: None)
    monkeypatch.setattr(topologies, "devices", lambda topology: [])
    arguments = ["preflight", f"{TOY}:small", "--topology", "v5e-4", "--suggest", "--sweep"]
    assert main(arguments) == ExitCode.USAGE
    assert "--suggest: expected one mesh" in capsys.readouterr().err


# With the compiler -----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_small_recipe_on_a_pod(libtpu):
    """In a process of its own, where libtpu is set up before JAX starts and says nothing."""
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    paths = (str(ROOT), environment.get("PYTHONPATH", ""))
    environment["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
    arguments = (f"{TOY}:small", "--topology", "v5e-256", "--json", "--set", "batch_size=256")
    result = subprocess.run(
        [sys.executable, "-m", "train", "preflight", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "compiling" in result.stderr
    assert len(result.stderr.splitlines()) == 2, result.stderr
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


@pytest.mark.slow
def test_a_recipe_that_does_not_fit_says_why(preflight):
    code, text = preflight(f"{TOY}:large", "--topology", "v5e-4")
    assert code == ExitCode.OUT_OF_MEMORY
    assert "DOES NOT FIT" in text
    assert "tests/preflight/toy.py:" in text
    assert "try: --set system.remat=full: " in text


@pytest.mark.slow
def test_long_sequences_take_the_flash_kernel_by_themselves(preflight):
    code, text = preflight(
        f"{TOY}:small",
        "--topology",
        "v5e-4",
        "--json",
        "--set",
        "system.tokens=512",
        "system.layers=2",
        "batch_size=4",
    )
    assert code == 0
    kernels = json.loads(text)["attention_kernels"]
    flash = [k for k in kernels if k["kind"] == "flash"]
    # Per layer: forward, forward again (remat), dq and dkv.
    assert sum(k["times"] for k in flash) == 2 * 4
    assert sum(k["times"] for k in flash if k["backward"]) == 2 * 2


@pytest.mark.slow
def test_the_kernel_compiles_for_every_chip_grouped_padded_and_split(libtpu):
    """Grouped heads of odd width, segments, a ragged length; heads and sequence split."""
    for name in ("v4-8", "v5e-4", "v5p-8", "v6e-4", "tpu7x-8"):
        mesh = make_mesh(MeshShape(tensor=2, context=2), topologies.devices(topologies.parse(name)))

        def loss(q, k, v, ids, mesh=mesh):
            with use_mesh(mesh):
                return jnp.sum(attention(q, k, v, causal=True, q_segments=ids, kv_segments=ids))

        def struct(shape, dtype, mesh=mesh):
            placed = sharding_for(shape, ("batch", *(None,) * (len(shape) - 1)), mesh)
            return jax.ShapeDtypeStruct(shape, dtype, sharding=placed)

        batch = 2 * mesh.shape["data"]
        q, kv = (struct((batch, heads, 600, 40), jnp.bfloat16) for heads in (4, 2))
        lowered = jax.jit(jax.grad(loss, (0, 1, 2))).lower(
            q, kv, kv, struct((batch, 600), jnp.int32)
        )
        assert lowered.as_text().count("tpu_custom_call") >= 3
        assert lowered.compile().memory_analysis().temp_size_in_bytes > 0


@pytest.mark.slow
def test_named_functions(preflight):
    code, text = preflight(f"{TOY}:small", "--topology", "v5e-4", "--what", "eval", "--json")
    assert code == 0
    found, part, kept = json.loads(text)
    assert (found["what"], found["batch_size"]) == ("encode", 64)
    forward = Toy().forward_matmul_flops() + Toy().forward_attention_flops()
    assert found["flops"]["model_per_example"] == pytest.approx(forward)
    assert found["memory"]["optimizer"] == found["memory"]["gradients"] == 0
    # Parameters that a function does not read are in memory all the same.
    assert part["memory"]["parameters"] == found["memory"]["parameters"]
    assert part["memory"]["total"] > part["memory"]["parameters"]
    # What a conversation keeps stays with its rows; what an evaluation gets is whole everywhere.
    output = 64 * Toy().tokens * Toy().width * 2  # bfloat16
    assert found["memory"]["total"] - kept["memory"]["total"] == pytest.approx(
        output * 3 / 4,
        rel=0.3,  # temporaries differ with the gather
    )


@pytest.mark.slow
def test_two_meshes_over_two_slices(preflight):
    code, text = preflight(
        f"{TOY}:small",
        "--topology",
        "v5e-4",
        "--slices",
        "2",
        "--json",
        "--compare",
        "data=8",
        "fsdp=4",
        "--set",
        "system.layers=2",
        "system.tokens=64",
        "batch_size=8",
    )
    assert code == 0
    copies, split = json.loads(text)["meshes"]
    assert (copies["mesh"]["data"], split["mesh"]["data"], split["mesh"]["fsdp"]) == (8, 2, 4)
    for found in (copies, split):
        crossing = [c for c in found["collectives"] if c["dcn"]]
        assert {c["axes"] for c in crossing} == {"data"}
        # Gradients, in bfloat16 as the forward pass, of a fourth of the parameters (within a slice
        # they are reduced first), and little else.
        gradients = copies["memory"]["parameters"] / 2 / 4
        assert sum(c["bytes"] for c in crossing) == pytest.approx(gradients, rel=0.02)
        assert any("over the network" in w for w in found["warnings"])
