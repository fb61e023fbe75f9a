"""FG-CLIP against the recorded outputs of the official code (kinds in `fgclip_*.py`)."""

from __future__ import annotations

from tests.parity import registry


@registry.golden("fgclip")
def test_golden(case: registry.Case, check: registry.Check) -> None:
    check(case)
