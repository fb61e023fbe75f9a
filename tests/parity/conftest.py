"""Turns recorded cases into tests: one per (case, check), `<system>/<case>-<kind>.<check>`."""

from __future__ import annotations

import pytest

from tests.parity import registry


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("golden")
    if marker is None:
        return
    found = list(registry.pairs(metafunc.config.getoption("--goldens"), marker.args[0]))
    metafunc.parametrize(("case", "check"), [p[1:] for p in found], ids=[p[0] for p in found])
