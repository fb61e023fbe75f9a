"""Collectives of stored programs: groups in all their forms, axes, bytes, repetitions, times."""

from __future__ import annotations

import pytest

from tests.preflight.networks import mesh, program
from train.preflight import collectives
from train.preflight.chips import CHIPS, HOP_LATENCY

V5E = CHIPS["v5e"]


def found(name, sizes, torus=(4, 4), slices=1, chip=V5E):
    parsed = program(name)
    executed, _ = parsed.executed()
    return collectives.find(parsed, executed, mesh(sizes, torus), chip, slices)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}, x", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=[2,4]<=[8], x", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=[4,2]<=[2,2,2]T(2,1,0), x", [[0, 4], [2, 6], [1, 5], [3, 7]]),
        ("replica_groups=mesh['axis_0'=8] {'axis_0'}, x", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        (
            "replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, x",
            [[0, 1, 2, 3], [4, 5, 6, 7]],
        ),
        (
            "replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}, x",
            [[0, 4], [1, 5], [2, 6], [3, 7]],
        ),
        ("replica_groups={}, x", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("replica_groups=mesh['axis_0'=8] {'axis_0':(2)4}, x", None),
        ("no groups at all", None),
    ],
)
def test_forms_of_groups(text, expected):
    assert collectives.groups(text, 8) == expected


def test_an_all_reduce_over_the_whole_mesh():
    (one,) = found("reduce", (1, 16, 1, 1))
    assert (one.kind, one.axes, one.size, one.times) == ("all-reduce", ("fsdp",), 16, 1)
    assert one.payload == 2048 * 1024 * 2
    assert not one.overlapped
    assert not one.dcn
    # 4x4 without rings: a line of w on both axes, or on the better one alone.
    moved = 2 * one.payload * 15 / 16
    assert one.low == pytest.approx(moved / (2 * V5E.link) + 6 * HOP_LATENCY)
    assert one.high == pytest.approx(moved / V5E.link + 6 * HOP_LATENCY)
    assert one.source.endswith("model.py:21")


def test_an_all_to_all_over_one_axis():
    (one,) = found("all_to_all", (4, 4, 1, 1))
    assert (one.kind, one.axes, one.size) == ("all-to-all", ("data",), 4)
    assert one.payload == 1024 * 4 * 512 * 2
    assert one.low == pytest.approx(one.payload * 4 / (4 * V5E.link) + 3 * HOP_LATENCY)


def test_what_crosses_slices():
    inside, across = found("slices", (2, 16, 1, 1), torus=(2, 4, 4), slices=2)
    assert (inside.kind, inside.axes, inside.dcn) == ("all-reduce", ("fsdp",), False)
    assert (across.kind, across.axes, across.size, across.dcn) == ("all-reduce", ("data",), 2, True)
    assert across.payload == 128 * 8 * 128 * 2
    assert across.low == pytest.approx(2 * across.payload / 2 / V5E.dcn)


def test_a_program_with_loops():
    records = found("loops", (1, 4, 4, 1))
    by_kind = {r.kind: r for r in records if r.times > 1}
    assert sorted(by_kind) == ["all-gather", "collective-permute", "reduce-scatter"]
    assert len(records) == 4
    # One asynchronous all-gather, spread over the products that hide it, counted at its start.
    gather = by_kind["all-gather"]
    assert (gather.times, gather.payload, gather.overlapped) == (5, 256 * 512 * 2, True)
    assert (gather.axes, gather.size) == (("fsdp", "tensor"), 16)
    # A fused reduce-scatter: of the array inside, without the permutes of its padding.
    scatter = by_kind["reduce-scatter"]
    assert (scatter.times, scatter.payload, scatter.overlapped) == (5, 2112 * 2048 * 2, False)
    assert scatter.axes == ("fsdp",)
    permute = by_kind["collective-permute"]
    assert (permute.times, permute.payload, permute.overlapped) == (35, 4 * 64 * 2, True)
    assert permute.axes == ("tensor",)
    assert permute.in_loop
    # One that is handed to a SparseCore runs beside computation, outside the loops.
    (offloaded,) = (r for r in records if r.times == 1)
    assert (offloaded.kind, offloaded.axes, offloaded.size) == ("all-gather", ("tensor",), 4)
    assert offloaded.overlapped
    assert offloaded.source == "jaxmods/nn/layers.py:48"


@pytest.mark.parametrize(
    ("sizes", "torus", "chip", "axis", "rate"),
    [
        ((16, 16, 1, 1), (16, 16), "v5e", "fsdp", 2 * 45e9),  # a whole ring
        ((64, 4, 1, 1), (16, 16), "v5e", "fsdp", 45e9),  # four neighbours: a line
        ((64, 4, 1, 1), (16, 16), "v5e", "data", 2 * 45e9 + 2 * 45e9 / 4),  # every fourth, a ring
        ((16, 4, 1, 1), (4, 4, 4), "v5p", "data", 2 * 2 * 90e9),  # two rings
    ],
)
def test_rates_of_physical_axes(sizes, torus, chip, axis, rate):
    grid = mesh(sizes, torus)
    network = collectives._Network(grid.axis_names, grid.devices, CHIPS[chip], 1)
    index = 0 if axis == "data" else 1
    strides = (sizes[1], 1)
    group = [i * strides[index] for i in range(sizes[index])]
    assert network.axes(group) == (axis,)
    low, _ = network._time("all-gather", 1e12, group)
    k = len(group)
    assert low == pytest.approx(1e12 * (k - 1) / k / rate, rel=1e-4)
