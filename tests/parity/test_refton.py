"""RefTON against the recorded outputs of the official code (kinds in `refton_*.py`)."""

from __future__ import annotations

from tests.parity import registry


@registry.golden("refton")
def test_golden(case: registry.Case, check: registry.Check) -> None:
    check(case)
