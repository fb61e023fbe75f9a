"""The machine of every test in this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tpu_scripts.stand_ins import Machine


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """Cloud commands that record, and no hosts."""
    return Machine(tmp_path)
