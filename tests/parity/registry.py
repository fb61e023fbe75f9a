"""Recorded reference cases, what kinds there are, and the checks that each kind must pass.

A *case* is a folder `<goldens>/<system>/<case>` with a `meta.json`. A *kind* says, from a case's
contents (files, `meta.json` fields, tensor names; never the folder's name), which cases it is for,
and holds the checks they must pass. A system is covered by

* `tests/parity/test_<system>.py`, which holds the one test function

      @registry.golden("<system>")
      def test_golden(case, check):
          check(case)

* any number of modules `tests/parity/<system>_<subject>.py`, imported by themselves, with kinds:

      TOKENIZER = Kind("fgclip", "tokenizer", lambda case: "vocab.json" in case.files)

      @TOKENIZER.check
      def token_ids(case: Case) -> None:
          '''What is compared with what.'''
          expected = case.io["out.ids_77"]
          assert_close("ids at 77", ids, expected, case.tolerance())

Every (case, check) pair is a test with the id `<system>/<case>-<kind>.<check>`. A case of a covered
system that no kind recognises is a test as well, which fails naming the case.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import pkgutil
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """|actual - expected| <= atol + rtol * |expected| (or * max|expected| where `of_max`)."""

    atol: float = 0.0
    rtol: float = 0.0
    of_max: bool = False

    @staticmethod
    def parse(text: str | float | dict[str, Any]) -> Tolerance:
        """From a case's words: "exact", "atol 2e-5, rtol 1e-4", "atol 2e-5 + rtol 2e-3 of the
        tensor max", "rel 1e-3 of max-abs", "1e-6", or a dict with atol/rtol.

        Raises:
          ValueError: no number and not "exact".
        """
        if isinstance(text, dict):
            return Tolerance(float(text.get("atol", 0.0)), float(text.get("rtol", 0.0)))
        text = str(text)
        number = r"(\d+(?:\.\d+)?(?:e[-+]?\d+)?)"
        atol = re.search(rf"\b(?:atol|abs)\s+{number}", text)
        rtol = re.search(rf"\b(?:rtol|rel(?:-L2)?)\s+{number}", text)
        if atol or rtol:
            return Tolerance(
                float(atol.group(1)) if atol else 0.0,
                float(rtol.group(1)) if rtol else 0.0,
                bool(re.search(r"of (the tensor )?max", text)),
            )
        if text.strip().startswith("exact"):
            return Tolerance()
        bare = re.match(rf"\s*{number}", text)
        if bare:
            return Tolerance(float(bare.group(1)))
        raise ValueError(f"tolerance: expected 'exact', atol, rtol or a number, found {text!r}")

    def violation(self, actual: np.ndarray, expected: np.ndarray) -> float:
        """Largest |actual - expected| as a multiple of what is allowed (<= 1 passes)."""
        a, e = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
        if e.size == 0:
            return 0.0
        scale = np.max(np.abs(e)) if self.of_max else np.abs(e)
        allowed = np.broadcast_to(self.atol + self.rtol * scale, e.shape)
        gap = np.abs(a - e)
        if not np.all(np.isfinite(gap)):
            return float("inf")
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(gap == 0, 0.0, gap / allowed)
        return float(np.max(ratio))


@dataclasses.dataclass(frozen=True)
class Case:
    """One recorded case: where it lies and what is in it."""

    system: str
    name: str
    folder: Path

    @property
    def id(self) -> str:
        """`<system>/<case>`."""
        return f"{self.system}/{self.name}"

    @functools.cached_property
    def meta(self) -> dict[str, Any]:
        """`meta.json` (empty when the folder has none)."""
        path = self.folder / "meta.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    @functools.cached_property
    def files(self) -> frozenset[str]:
        """Names of the files in the folder."""
        return frozenset(p.name for p in self.folder.iterdir() if p.is_file())

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of `io.safetensors`, by name, without reading the values."""
        path = self.folder / "io.safetensors"
        if not path.exists():
            return {}
        with safe_open(path, "np") as handle:
            return {k: tuple(handle.get_slice(k).get_shape()) for k in handle.keys()}  # noqa: SIM118 (not a dict)

    @functools.cached_property
    def io(self) -> dict[str, np.ndarray]:
        """Tensors of `io.safetensors`."""
        return load_file(self.folder / "io.safetensors")

    @property
    def weights_path(self) -> Path:
        """`weights.safetensors`, of this case or of the one named by `weights_from`."""
        other = self.meta.get("weights_from")
        folder = self.folder.parent / other if other else self.folder
        return folder / "weights.safetensors"

    @functools.cached_property
    def weights(self) -> dict[str, np.ndarray]:
        """Reference parameters under their own state-dict keys."""
        return load_file(self.weights_path)

    def tolerance(self, *names: str) -> Tolerance:
        """The case's tolerance: the only one there is, or the first of `names` that it gives.

        Raises:
          KeyError: the case gives named tolerances and none of `names` is among them.
        """
        given = self.meta["tolerance"]
        if not isinstance(given, dict) or (set(given) <= {"atol", "rtol"}):
            return Tolerance.parse(given)
        for name in (*names, "all"):
            if name in given:
                return Tolerance.parse(given[name])
        raise KeyError(f"{self.id}: expected a tolerance named {names}, found {sorted(given)}")


Check = Callable[[Case], None]


class Kind:
    """A kind of case: how to recognise it by its contents, and what it must pass.

    Args:
      system: name of the system (first folder level).
      name: name of the kind, shown in test ids.
      recognise: whether a case is of this kind, from its contents only.
    """

    def __init__(self, system: str, name: str, recognise: Callable[[Case], bool]) -> None:
        self.system = system
        self.name = name
        self.recognise = recognise
        self.checks: list[Check] = []
        _KINDS.append(self)

    def check(self, fn: Check) -> Check:
        """Decorator: `fn(case)` must pass for every case of this kind."""
        self.checks.append(fn)
        return fn


_KINDS: list[Kind] = []


def discover(goldens: Path, system: str) -> list[Case]:
    """Cases of `system` under `goldens`, sorted; none when the folder is absent."""
    root = goldens / system
    if not root.is_dir():
        return []
    return [Case(system, p.name, p) for p in sorted(root.iterdir()) if p.is_dir()]


def kinds(system: str) -> list[Kind]:
    """All kinds of `system`, after importing its `tests/parity/<system>_*.py` modules."""
    package = importlib.import_module("tests.parity")
    for module in pkgutil.iter_modules(package.__path__):
        if module.name.startswith(f"{system}_"):
            importlib.import_module(f"tests.parity.{module.name}")
    return [k for k in _KINDS if k.system == system]


def pairs(goldens: Path, system: str) -> Iterator[tuple[str, Case, Check]]:
    """(test id, case, check) of all checks; a case that no kind recognises gets one that fails."""
    known = kinds(system)
    for case in discover(goldens, system):
        matching = [k for k in known if k.recognise(case)]
        for kind in matching:
            for check in kind.checks:
                yield f"{case.id}-{kind.name}.{check.__name__}", case, check
        if not any(kind.checks for kind in matching):
            yield f"{case.id}-uncovered", case, _uncovered


def _uncovered(case: Case) -> None:
    pytest.fail(
        f"{case.id}: no kind in tests/parity/{case.system}_*.py recognises this case (files "
        f"{sorted(case.files)}, tensors {sorted(case.shapes)[:8]}...); add a Kind with checks"
    )


def golden(system: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Marks the test function `(case, check)` that runs every check of `system`'s cases."""
    return pytest.mark.golden(system)


def assert_close(what: str, actual: Any, expected: Any, tolerance: Tolerance) -> None:
    """Same shape, and within `tolerance`; the message names the tensor and the worst entry."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, (
        f"{what}: expected shape {expected.shape}, found {actual.shape}"
    )
    ratio = tolerance.violation(actual, expected)
    if ratio > 1.0:
        gap = np.abs(actual.astype(np.float64) - expected.astype(np.float64))
        at = np.unravel_index(np.argmax(np.nan_to_num(gap, nan=np.inf)), gap.shape)
        raise AssertionError(
            f"{what}: expected {expected[at]} at {tuple(int(i) for i in at)}, found {actual[at]}; "
            f"worst error is {ratio:.3g} times what {tolerance} allows"
        )
