"""The harness itself: tolerances as cases word them, and cases that nothing recognises."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.parity.registry import Case, Tolerance, assert_close, pairs


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("exact", Tolerance()),
        ("exact uint8", Tolerance()),
        ("atol 1e-6", Tolerance(1e-6)),
        ("1e-6", Tolerance(1e-6)),
        ("atol 2e-5, rtol 1e-4", Tolerance(2e-5, 1e-4)),
        ("atol 2e-5 + rtol 2e-3 of the tensor max", Tolerance(2e-5, 2e-3, True)),
        ("rel 1e-3 of max-abs", Tolerance(0.0, 1e-3, True)),
        ({"atol": 2e-5, "rtol": 1e-4}, Tolerance(2e-5, 1e-4)),
    ],
)
def test_tolerance_words(text: str, expected: Tolerance) -> None:
    assert Tolerance.parse(text) == expected


def test_unreadable_tolerance() -> None:
    with pytest.raises(ValueError, match="found 'close enough'"):
        Tolerance.parse("close enough")


def test_assert_close_is_strict() -> None:
    expected = np.array([1.0, 10.0])
    assert_close("x", np.array([1.0001, 10.001]), expected, Tolerance(0, 1.01e-4))
    with pytest.raises(AssertionError, match=r"x: expected 1\.0"):
        assert_close("x", np.array([1.001, 10.0]), expected, Tolerance(0, 1.01e-4))
    assert_close("x", np.array([1.001, 10.0]), expected, Tolerance(0, 1.01e-4, of_max=True))
    with pytest.raises(AssertionError, match="expected shape"):
        assert_close("x", expected[:1], expected, Tolerance(1))
    with pytest.raises(AssertionError, match="found nan"):
        assert_close("x", expected * np.nan, expected, Tolerance(1))
    with pytest.raises(AssertionError):
        assert_close("x", expected + 1e-9, expected, Tolerance())


def test_unrecognised_case_fails_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "fgclip" / "brand_new"
    folder.mkdir(parents=True)
    (folder / "meta.json").write_text(json.dumps({"system": "fgclip"}))
    save_file({"in.something": np.zeros(2)}, folder / "io.safetensors")
    found = list(pairs(tmp_path, "fgclip"))
    assert [name for name, _, _ in found] == ["fgclip/brand_new-uncovered"]
    _, case, check = found[0]
    with pytest.raises(pytest.fail.Exception, match="fgclip/brand_new: no kind"):
        check(case)


def test_kinds_do_not_look_at_names(tmp_path: Path) -> None:
    """A case under another name is checked by the same checks."""
    goldens = Path(__file__).parents[1] / "goldens"
    (tmp_path / "fgclip").mkdir()
    for number, folder in enumerate(sorted((goldens / "fgclip").iterdir())):
        (tmp_path / "fgclip" / f"case{number}").symlink_to(folder)
    ours = sorted(check.__name__ for _, _, check in pairs(goldens, "fgclip"))
    assert ours == sorted(check.__name__ for _, _, check in pairs(tmp_path, "fgclip"))


def test_missing_tolerance_is_named(tmp_path: Path) -> None:
    (tmp_path / "meta.json").write_text(json.dumps({"tolerance": {"losses": "atol 1e-5"}}))
    case = Case("fgclip", "x", tmp_path)
    assert case.tolerance("losses") == Tolerance(1e-5)
    with pytest.raises(KeyError, match="activations"):
        case.tolerance("activations")
