"""What is suggested when a program does not fit."""

from __future__ import annotations

import dataclasses

import pytest

from jaxmods.partitioning import MeshShape
from jaxmods.system import System
from tests.preflight.test_flops import small_fgclip
from tests.preflight.toy import Toy, experiment
from train.overrides import apply_overrides
from train.preflight import memory
from train.preflight.advice import Suggestion, suggestions
from train.preflight.topologies import Topology, parse

ONE_SLICE = parse("v5e-16")
SIZES = {"data": 16, "fsdp": 1, "tensor": 1, "context": 1}


def suggested(
    system: System,
    state: float,
    rest: float,
    *,
    train: bool = True,
    topology: Topology = ONE_SLICE,
    mesh: MeshShape | None = None,
) -> list[Suggestion]:
    """For a state and everything else that take these shares of a chip."""
    capacity = topology.chip.hbm
    held = memory.StateBytes(state * capacity, 0.0, 0.0, 0.0, 0.0)
    found = memory.of_overflow(held, (state + rest) * capacity, capacity, ())
    recipe = experiment(system, mesh=mesh or MeshShape())
    return suggestions(recipe, topology, SIZES, found, train=train)


def settings(found: list[Suggestion]) -> list[tuple[str, ...]]:
    return [s.settings for s in found if s.settings]


def test_a_large_state_is_split_first():
    first, *_ = suggested(Toy(remat="full"), 1.2, 0.1)
    # In place of 1.2 chips the toy's real state counts, which any finer split makes small enough.
    assert first.settings == ("mesh.fsdp=2",)
    assert "instead of 18.90" in first.reason


def test_a_split_of_an_explicit_mesh_names_both_axes():
    first, *_ = suggested(Toy(remat="full"), 1.2, 0.1, mesh=MeshShape(data=16))
    assert first.settings == ("mesh.data=8", "mesh.fsdp=2")


def test_what_joins_the_slices_is_not_split():
    one_chip_each = parse("v5e-1", 16)
    found = settings(suggested(Toy(remat="full"), 1.2, 0.1, topology=one_chip_each))
    assert not [s for s in found if "fsdp" in s[0]]


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_activations_are_recomputed_first(remat):
    assert settings(suggested(Toy(remat=remat), 0.05, 1.5))[0] == ("system.remat=full",)


def test_then_come_fewer_rows_at_a_time():
    # A state of 0.1 leaves 0.85 of a chip for what takes 2: three parts, of 16 rows per device.
    found = settings(suggested(Toy(remat="full"), 0.1, 2.0))
    assert found == [("optim.accumulate=4",), ("mesh.fsdp=2",), ("batch_size=80",)]


def test_a_split_that_is_enough_comes_before_other_rows():
    found = settings(suggested(Toy(remat="none"), 0.5, 0.6))
    assert found[:2] == [("mesh.fsdp=2",), ("system.remat=full",)]


def test_a_contrastive_batch_is_not_accumulated():
    found = settings(suggested(small_fgclip(), 0.1, 2.0))
    assert found[0] == ("system.execution.remat=full",)
    assert found[1] == ("system.microbatch=64",)
    assert not [s for s in found if "accumulate" in s[0]]


@pytest.mark.parametrize("system", [Toy(remat="none"), small_fgclip()])
def test_every_setting_can_be_pasted(system):
    recipe = experiment(system)
    for suggestion in suggested(system, 0.6, 1.5):
        changed = apply_overrides(recipe, suggestion.settings)
        assert (changed != recipe) == bool(suggestion.settings)
        changed.system.batch_spec(changed.batch_size)


def test_a_function_takes_fewer_rows():
    found = suggested(Toy(), 0.1, 2.0, train=False)
    assert settings(found) == [("evaluation.batch_size=16",)]


def test_the_last_words_are_axes_and_chips():
    *_, axes, chips = suggested(Toy(remat="full"), 0.1, 0.95)
    assert "mesh.tensor, now 1" in axes.reason
    assert "v5e-32, 32 chips" in chips.reason
    largest = dataclasses.replace(ONE_SLICE, shape=(16, 16))
    assert "--slices" in suggested(Toy(remat="full"), 0.1, 0.95, topology=largest)[-1].reason
