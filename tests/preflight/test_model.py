"""The step-time model on stored programs, and the report made of it."""

from __future__ import annotations

import json

import pytest

from tests.preflight.networks import mesh, program
from tests.preflight.toy import Toy, experiment
from train.preflight import memory, model, report
from train.preflight.chips import CHIPS
from train.preflight.collectives import Collective
from train.preflight.flops import Flops
from train.preflight.program import Compiled
from train.preflight.topologies import parse

V5E = CHIPS["v5e"]


def collective(low: float, high: float, overlapped: bool, times: int = 1) -> Collective:
    return Collective(
        "all-gather", ("fsdp",), 4, 8.0, times, False, overlapped, False, low, high, "", ""
    )


def estimate(name, collectives=(), used=(), work=0.0):
    parsed = program(name)
    executed, _ = parsed.executed()
    return model.estimate(parsed, executed, collectives, used, V5E, work)


def test_cycles_times_trips():
    found, hot = estimate("loops")
    assert found.products == pytest.approx(35 * 1000 / 1.5e9)
    others = (5 * 300 + 7) / 1.5e9
    assert found.elementwise == pytest.approx((others / 3, others))
    assert found.low == pytest.approx(found.products + others / 3)
    assert found.high == pytest.approx(found.products + others)
    assert found.low <= found.point <= found.high
    assert [h.name for h in hot[:2]] == ["fusion.2", "add.9"]
    assert (hot[0].times, hot[0].product) == (35, True)


def test_overlapped_communication_costs_less_than_blocking():
    base = estimate("loops")[0]
    seconds = 0.4 * base.low
    hidden = estimate("loops", [collective(seconds, 2 * seconds, True)])[0]
    blocking = estimate("loops", [collective(seconds, 2 * seconds, False)])[0]
    # Without communication the point would be capped by the high end, which is close here.
    assert hidden.low == base.low
    assert hidden.point == pytest.approx(1.05 * base.low)
    assert blocking.point == pytest.approx(1.05 * base.low + seconds)
    assert hidden.high == blocking.high == pytest.approx(base.high + 2 * seconds)


def test_communication_that_cannot_be_hidden_bounds_the_step():
    found = estimate("loops", [collective(1.0, 1.5, True, times=2)])[0]
    assert found.low == 2.0
    assert found.high == pytest.approx(3.0 + estimate("loops")[0].high)


def test_attention_kernels_run_by_their_operations():
    parsed = program("loops")
    (kernel,) = model.kernels(parsed.executed()[0])
    assert (kernel.kind, kernel.times, kernel.backward) == ("flash", 5, False)
    # Two products of 640 x 640 in 64 calls; heads of 64 fill the unit like heads of 128.
    assert kernel.work == 4 * 64 * 640 * 640 * 128
    found = estimate("loops", used=[kernel])[0]
    total = 5 * kernel.work
    assert found.kernels == pytest.approx((total / (0.6 * V5E.peak), total / (0.25 * V5E.peak)))


def test_mfu_is_model_work_over_peak():
    found = estimate("loops", work=V5E.peak)[0]
    assert found.mfu == pytest.approx((1 / found.high, 1 / found.point, 1 / found.low))


def compiled(overflow: bool = False) -> Compiled:
    state = memory.StateBytes(2.0**30, 2.0**31, 2.0**30, 2.0**20, 0.0)
    buffers = (
        memory.Buffer(
            2.0**33, 2.0**32, "bf16[8,72,64]", "jit(step)/while/body/add", "jaxmods/nn/x.py:3"
        ),
    )
    capacity = V5E.hbm
    found = (
        memory.of_overflow(state, 1.5 * capacity, capacity, buffers)
        if overflow
        else memory.Memory(
            2.0**30,
            2.0**31,
            2.0**30,
            2.0**20,
            0,
            0,
            2.0**33,
            0,
            2.0**33 + 2.0**32,
            capacity,
            buffers,
            True,
        )
    )
    parsed = program("loops")
    return Compiled(
        mesh=_Mesh(),
        split=True,
        program=None if overflow else parsed,
        early=parsed if overflow else None,
        memory=found,
        hardware=Flops(4e12, 1e12),
        model=Flops(3e12, 5e11),
        seconds={"trace": 0.5, "compile": 2.0},
        state_leaves=3,
    )


class _Mesh:
    """A mesh of libtpu's devices as far as reports look at it."""

    def __init__(self) -> None:
        grid = mesh((1, 4, 4, 1), (4, 4))
        self.axis_names, self.devices = grid.axis_names, grid.devices
        self.shape = dict(zip(grid.axis_names, grid.devices.shape, strict=True))


def make(overflow: bool = False) -> report.Report:
    return report.make_report(
        "toy/small",
        "train",
        experiment(Toy(remat="none")),
        parse("v5e-16"),
        compiled(overflow),
        256,
        1.4e10,
    )


def test_the_table_says_what_was_asked():
    text = report.table(make())
    for words in (
        "toy/small, train: fits",
        "16 chips, 16 devices, 4 hosts",
        "mesh fsdp 4 x tensor 4",
        "gradients",
        "of 15.75 GiB usable",
        "takes 2.00 times its content",
        "flash kernel, 5 forward and 0 backward calls",
        "(ratio 0.977)",
        "reduce-scatter",
        "ESTIMATED",
        "examples/s",
        "note: a mesh axis takes part of a torus axis",
        "note: 1 loops have no constant length",
        "note: 1 of 3 arrays of the state are copied",
    ):
        assert words in text, words


def test_what_does_not_fit_gets_reasons_and_advice():
    found = make(overflow=True)
    text = report.table(found)
    assert "DOES NOT FIT" in text
    assert "why it does not fit" in text
    assert "jaxmods/nn/x.py:3" in text
    assert "try: --set system.remat=full: recompute activations" in text
    assert found.estimate is None
    assert "ESTIMATED" not in text


def test_json_is_json_and_has_the_same_figures():
    for found in (make(), make(overflow=True)):
        document = json.loads(json.dumps(found.json(), allow_nan=False))
        assert document["fits"] is found.fits
        assert document["memory"]["headroom"] == pytest.approx(
            found.memory.capacity - found.memory.total
        )
        assert {c["kind"] for c in document["collectives"]} == {
            "all-gather",
            "collective-permute",
            "reduce-scatter",
        }
    low, point, high = (make().json()["estimate"][k] for k in ("low", "point", "high"))
    assert low <= point <= high


def test_meshes_side_by_side():
    text = report.compare([make(), make(overflow=True)], title="two")
    assert "fsdp=4 tensor=4 *" in text
    assert " yes " in text
    assert " NO " in text
