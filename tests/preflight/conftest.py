"""The TPU compiler in the process of the tests."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import jax
import pytest

from train.preflight import topologies


@pytest.fixture(scope="module")
def libtpu() -> Iterator[None]:
    """The compiler, ready; afterwards environment and configuration are as they were."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed (extra: preflight; Linux x86-64 only)")
    environment = dict(os.environ)
    cached = jax.config.jax_enable_compilation_cache
    topologies.settle_environment()
    yield
    os.environ.clear()
    os.environ.update(environment)
    jax.config.update("jax_enable_compilation_cache", cached)
