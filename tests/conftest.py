"""Options and settings of the whole test session.

The session runs on the CPU with eight simulated devices, so that sharding is tested everywhere.
They have to be asked for before JAX is imported.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_FLAG = "--xla_force_host_platform_device_count"
if _FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}=8".strip()

pytest.register_assert_rewrite("tests.parity")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--goldens",
        type=Path,
        default=Path(__file__).parent / "goldens",
        metavar="DIR",
        help="folder of recorded cases, <system>/<case> (default: tests/goldens)",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "golden(system): runs every recorded case of a system")
    folder: Path = config.getoption("--goldens")
    if not folder.is_dir():
        raise pytest.UsageError(f"--goldens: expected a folder of recorded cases, found {folder}")
