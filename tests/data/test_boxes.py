"""Box conventions: both ways on random boxes, and the judgement on a wrong declaration."""

from __future__ import annotations

import numpy as np
import pytest

from data_pipelines.boxes import CONVENTIONS, ConventionCheck, from_canonical, to_canonical

# One box by hand: left 64, top 48, right 320, bottom 240 of 640x480.
CANONICAL = (0.1, 0.1, 0.5, 0.5)
WRITTEN = {
    "xyxy_norm": (0.1, 0.1, 0.5, 0.5),
    "xyxy": (64, 48, 320, 240),
    "xywh": (64, 48, 256, 192),
    "xywh_norm": (0.1, 0.1, 0.4, 0.4),
    "cxcywh_norm": (0.3, 0.3, 0.4, 0.4),
    "yxyx_norm": (0.1, 0.1, 0.5, 0.5),
    "xxyy_norm": (0.1, 0.5, 0.1, 0.5),
}


def test_every_convention_is_known_by_hand():
    assert set(WRITTEN) == set(CONVENTIONS)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_by_hand(convention):
    assert to_canonical(WRITTEN[convention], convention, 640, 480) == pytest.approx(CANONICAL)
    assert from_canonical(CANONICAL, convention, 640, 480) == pytest.approx(WRITTEN[convention])


def test_order_of_yxyx_and_xxyy():
    assert to_canonical((0.1, 0.2, 0.3, 0.4), "yxyx_norm") == (0.2, 0.1, 0.4, 0.3)
    assert to_canonical((0.1, 0.2, 0.3, 0.4), "xxyy_norm") == (0.1, 0.3, 0.2, 0.4)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_round_trip_on_random_boxes(convention):
    rng = np.random.default_rng(0)
    for _ in range(200):
        x, y = np.sort(rng.random((2, 2)), axis=1)
        box = (x[0], y[0], x[1], y[1])
        w, h = (int(v) for v in rng.integers(1, 2000, 2))
        written = from_canonical(box, convention, w, h)
        assert to_canonical(written, convention, w, h) == pytest.approx(box, abs=1e-12)


def test_a_fifth_number_is_left_out():
    assert to_canonical([0.1, 0.2, 0.3, 0.4, 0.9], "xyxy_norm") == (0.1, 0.2, 0.3, 0.4)


@pytest.mark.parametrize(
    ("box", "convention", "size", "message"),
    [
        ((1, 2, 3), "xyxy_norm", (1, 1), "four numbers"),
        ((1, 2, 3, 4), "xyxy", (0, 5), "image size"),
        ((1, 2, 3, 4), "corners", (1, 1), "expected one of"),
    ],
)
def test_what_cannot_be_converted(box, convention, size, message):
    with pytest.raises(ValueError, match=message):
        to_canonical(box, convention, *size)


def _check(convention: str, written: str, count: int = 300) -> str | None:
    """Declare `convention` for boxes that are written in another."""
    check = ConventionCheck(convention)
    rng = np.random.default_rng(1)
    for _ in range(count):
        x, y = np.sort(rng.random((2, 2)), axis=1)
        box = from_canonical((x[0], y[0], x[1], y[1]), written, 640, 480)
        check.add([box], (640, 480))
    return check.problem()


def test_xywh_read_as_xyxy():
    problem = _check("xyxy", "xywh")
    assert problem is not None
    assert "x2<=x1 in" in problem
    assert "of 300 records; this looks like xywh: set data.source.boxes=xywh" in problem


def test_pixels_read_as_fractions():
    assert "set data.source.boxes=xyxy" in (_check("xyxy_norm", "xyxy") or "")
    assert "set data.source.boxes=xywh" in (_check("xyxy_norm", "xywh") or "")


def test_fractions_read_as_pixels():
    assert "set data.source.boxes=xyxy_norm" in (_check("xyxy", "xyxy_norm") or "")


def test_xyxy_read_as_xywh():
    assert "this looks like xyxy" in (_check("xywh", "xyxy") or "")


@pytest.mark.parametrize("convention", ["xyxy_norm", "xyxy", "xywh", "xywh_norm"])
def test_a_right_declaration_is_accepted(convention):
    assert _check(convention, convention) is None


def test_a_few_bad_boxes_are_no_other_convention():
    check = ConventionCheck("xyxy_norm")
    for i in range(100):
        check.add([(0.5, 0.5, 0.1, 0.1) if i < 4 else (0.1, 0.1, 0.5, 0.5)])
    assert check.problem() is None
    assert ConventionCheck("xyxy").problem() is None
