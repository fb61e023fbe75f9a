"""What lies in HBM: state by sharding, the compiler's messages and its buffer assignment."""

from __future__ import annotations

import types

import pytest

from jaxmods.partitioning import MeshShape, make_mesh
from tests.preflight.networks import program
from tests.preflight.toy import Toy, experiment
from train.preflight import memory
from train.preflight.chips import GIB
from train.state import make_plan

STATE = memory.StateBytes(parameters=100.0, optimizer=200.0, gradients=100.0, batch=40.0, other=8.0)

MESSAGE = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
    "required for HLO temporaries (65.75G) exceeds available HBM (15.75G). HLO module: jit_f.\n"
    "See https://openxla.org/xla/errors/error_1000 for more details."
)

ASSIGNMENT = """BufferAssignment:
allocation 0: size 512, page 0, thread-local:
 value: <44 or @0> (size=512,offset=0): u16[]{:T(256)}
allocation 1: size 4096, page 0, parameter 0, shape |f32[8]| at ShapeIndex {}:
 value: <1 param @0> (size=999999,offset=0): f32[8]{0:T(128)}
allocation 2: size 400000, page 0, preallocated-temp:
 value: <10 while.2{1} (phi) @0> (size=147456,offset=0): bf16[8,72,64]{2,1,0:T(8,128)(2,1)}
 value: <11 add.9 @0> (size=147456,offset=0): bf16[8,72,64]{2,1,0:T(8,128)(2,1)}
 value: <12 copy.9 @0> (size=100000,offset=100000): f32[25000]{0:T(128)}
 value: <13 fusion.2 @0> (size=90000,offset=147456): f32[22500]{0:T(128)}
allocation 3: size 5000000, color 1, page 0, preallocated-temp:
 value: <14 fusion.2 @0> (size=5000000,offset=0): f32[22500]{0:T(128)}
"""


def stats(**values):
    names = ("argument", "output", "alias", "temp", "generated_code")
    return types.SimpleNamespace(**{f"{n}_size_in_bytes": values[n] for n in names})


def test_parts_add_up_to_the_total():
    found = memory.of_compiled(
        STATE, stats(argument=360, output=310, alias=308, temp=500, generated_code=50), 1000.0, ()
    )
    assert found.argument_padding == 360 - 348
    assert found.gradients == 100
    assert found.temporaries == 500 + 2 - 100
    assert found.total == 360 + 2 + 500 + 50
    parts = (
        found.parameters
        + found.optimizer
        + found.gradients
        + found.batch
        + found.other
        + found.argument_padding
        + found.temporaries
        + found.code
    )
    assert parts == found.total
    assert found.headroom == 1000 - found.total
    assert found.fits


def test_without_donation_the_state_counts_twice():
    found = memory.of_compiled(
        STATE, stats(argument=360, output=310, alias=0, temp=500, generated_code=0), 1000.0, ()
    )
    assert found.total == 360 + 310 + 500


def test_the_message_of_the_compiler():
    required, available = memory.overflow(MESSAGE) or (0, 0)
    assert (required, available) == (65.75 * GIB, 15.75 * GIB)
    assert memory.is_overflow(MESSAGE)
    assert not memory.is_overflow("INVALID_ARGUMENT: No such compile option: 'xla_x'")
    found = memory.of_overflow(STATE, required, available, ())
    assert not found.fits
    assert found.headroom == pytest.approx(-50 * GIB)


def test_largest_buffers_lie_beside_each_other_and_know_their_source():
    first, second = memory.largest(ASSIGNMENT, program("loops"))
    assert (first.bytes, first.array) == (147456, "bf16[8,72,64]")
    assert first.logical == 8 * 72 * 64 * 2  # padded from 64 to 128 lanes
    assert first.source == "jaxmods/nn/layers.py:48"
    assert first.origin == "jit(step)/add"
    # copy.9 overlaps the first and is left out; VMEM (color 1) and arguments do not count.
    assert second.bytes == 90000


def test_state_bytes_follow_the_shardings():
    recipe = experiment(Toy(), mesh=MeshShape(data=1, fsdp=8))
    plan = make_plan(recipe, make_mesh(recipe.mesh))
    held = memory.shard_bytes(plan.abstract.trained, plan.shardings.trained)
    toy = Toy()
    count = toy.layers * (4 * toy.width**2 + 2 * toy.width * toy.mlp)
    assert held == 4 * count / 8
