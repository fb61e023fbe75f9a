"""Options and settings of the whole test session.

The session runs on the CPU with eight simulated devices, so that sharding is tested everywhere, and
without the CPU compiler's costly optimisations: the programs here are tiny, and compiling them is
most of the time. Both have to be asked for before JAX is imported; programs that a test starts
inherit them.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_FLAGS = {
    "--xla_force_host_platform_device_count": "8",
    "--xla_backend_optimization_level": "0",
    "--xla_llvm_disable_expensive_passes": "true",
}
_given = os.environ.get("XLA_FLAGS", "")
_added = [f"{flag}={value}" for flag, value in _FLAGS.items() if flag not in _given]
os.environ["XLA_FLAGS"] = " ".join([_given, *_added]).strip()

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
