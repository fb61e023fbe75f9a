"""The command line takes the log for itself; after each module it is as before."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def _logging_as_before() -> Iterator[None]:
    log, absl = logging.getLogger("train"), logging.getLogger("absl")
    saved = (log.handlers[:], log.level, log.propagate, absl.level)
    yield
    log.handlers[:], log.level, log.propagate, absl.level = saved
