"""IAA against the recorded outputs of the official code (kinds in `iaa_*.py`)."""

from __future__ import annotations

from tests.parity import registry


@registry.golden("iaa")
def test_golden(case: registry.Case, check: registry.Check) -> None:
    check(case)
