"""Reading compiled programs: loops, sources, shapes. The programs are stored; no compiler runs."""

from __future__ import annotations

import pytest

from tests.preflight.networks import program
from train.preflight import hlo


@pytest.fixture(scope="module")
def loops() -> hlo.Program:
    return program("loops")


def test_header(loops):
    assert (loops.entry, loops.partitions, loops.aliased) == ("main", 16, 2)


def test_trip_counts_and_products_of_nested_loops(loops):
    executed, unknown = loops.executed()
    times = {e.instruction.name: e.times for e in executed}
    assert loops.trips(loops.by_name["while.2"]) == 5
    assert loops.trips(loops.by_name["while.1"]) == 7  # LE inside a fusion: one more
    assert times["add.9"] == 5
    assert times["fusion.2"] == 35
    assert times["copy.9"] == 1
    # A bound that is not a constant: counted once, and said so.
    assert loops.trips(loops.by_name["while.3"]) is None
    assert times["multiply.5"] == 1
    assert unknown == 1


def test_an_instruction_over_several_lines(loops):
    kernel = loops.by_name["splash_mha_fwd_residuals.1"]
    assert kernel.opcode == "custom-call"
    assert kernel.op_name.endswith("pallas_call")
    # What follows it in the computation is still there.
    assert "scattered.1" in loops.by_name
    assert [i.name for i in loops.computations["outer_body"] if i.root] == ["tuple.2"]


def test_a_computation_of_another_thread_ends_too(loops):
    assert [i.name for i in loops.computations["called"]] == ["p.20", "all-gather.20"]


def test_cycles(loops):
    assert loops.by_name["fusion.2"].cycles == 1000
    assert loops.by_name["while.2"].cycles is None
    assert loops.cycles_of("outer_body") == 300 + 7 * 1000


def test_sources_prefer_our_own_frames(loops):
    assert loops.source(loops.by_name["add.9"]) == "jaxmods/nn/layers.py:48"
    # The innermost frame is in a library, its caller is ours.
    assert loops.source(loops.by_name["fusion.2"]) == "jaxmods/nn/layers.py:48"
    assert loops.source(loops.by_name["copy.9"]) == ""


@pytest.mark.parametrize(
    ("shape", "content", "padded", "hbm"),
    [
        ("f32[8,128]{1,0:T(8,128)}", 4096, 4096, True),
        ("bf16[16,577,64]{2,1,0:T(8,128)(2,1)}", 16 * 577 * 64 * 2, 16 * 584 * 128 * 2, True),
        ("bf16[16,577,64]{1,2,0:T(8,128)(2,1)}", 16 * 577 * 64 * 2, 16 * 640 * 64 * 2, True),
        ("f32[100]{0:T(128)}", 400, 512, True),
        ("bf16[4,4]{1,0:T(8,128)(2,1)S(1)}", 32, 8 * 128 * 2, False),
        ("pred[3]", 3, 3, True),
        ("f8e4m3fn[4]{0}", 4, 4, True),
    ],
)
def test_shapes(shape, content, padded, hbm):
    (array,) = hlo.arrays(shape)
    assert (array.bytes, array.padded, array.in_hbm) == (content, padded, hbm)


def test_shapes_of_tuples():
    found = hlo.arrays("(bf16[2,3]{1,0}, u32[]{:S(2)}, /*index=2*/s8[4]{0})")
    assert [str(a) for a in found] == ["bf16[2,3]", "u32[]", "s8[4]"]


def test_a_line_that_is_no_instruction_is_an_error():
    with pytest.raises(ValueError, match="expected an instruction"):
        hlo._instruction("nonsense")
