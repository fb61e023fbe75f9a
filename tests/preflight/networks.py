"""Devices with coordinates, as libtpu describes them, for tests that run without it."""

from __future__ import annotations

import dataclasses
import itertools
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train.preflight import hlo

AXES = ("data", "fsdp", "tensor", "context")
PROGRAMS = Path(__file__).parent / "programs"


@dataclasses.dataclass(frozen=True)
class Device:
    coords: tuple[int, ...]
    core_on_chip: int = 0


def mesh(sizes: Sequence[int], torus: Sequence[int]) -> Any:
    """A mesh of `sizes` over the devices of `torus` in row-major order."""
    grid = np.empty(int(np.prod(torus)), dtype=object)
    for i, place in enumerate(itertools.product(*map(range, torus))):
        grid[i] = Device((*place, *(0,) * (3 - len(torus))))
    return types.SimpleNamespace(axis_names=AXES, devices=grid.reshape(sizes))


def program(name: str) -> hlo.Program:
    return hlo.parse((PROGRAMS / f"{name}.txt").read_text(encoding="utf-8"))
