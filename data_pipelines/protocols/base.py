"""Evaluation by named protocol.

A protocol fixes everything that a published number depends on: data layout, text length, prompt,
counting rule. It uses a model only through named functions (`System.functions`), so one protocol
serves every system that offers them, and it refuses settings that make its number incomparable.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

# Named inference functions with parameters already bound and jitted: arrays in, arrays out.
Functions = Mapping[str, Callable[..., Any]]


class IncomparableError(ValueError):
    """The settings would give a number that must not be compared with the protocol's."""


@dataclasses.dataclass(frozen=True)
class Panel:
    """One picture (or fragment of HTML) of the report.

    Attributes:
      title: heading in the report.
      caption: what to look for, one or two sentences.
      png: encoded PNG, or None.
      html: HTML fragment that stands alone, or None.
    """

    title: str
    caption: str
    png: bytes | None = None
    html: str | None = None


@dataclasses.dataclass(frozen=True)
class Metric:
    """One number of a protocol.

    Attributes:
      value: a fraction 0..1 unless the name says otherwise.
      chance: what guessing gives; None where that is not defined.
      published: the paper's figure for this size, for comparison; None when there is none.
      fraction: whether it is a share of something, shown in percent; a distance is not.
    """

    value: float
    chance: float | None = None
    published: float | None = None
    fraction: bool = True


@dataclasses.dataclass(frozen=True)
class EvalResult:
    """Everything a protocol found. `settings` holds each choice the numbers depend on."""

    protocol: str
    metrics: dict[str, Metric]
    settings: dict[str, Any]
    records: int
    seconds: float
    panels: tuple[Panel, ...] = ()
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Protocol(abc.ABC):
    """A named evaluation: frozen description, run against named functions."""

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """Name in logs and results, as "coco_retrieval"."""

    def requires(self) -> tuple[str, ...]:
        """Names of the functions that `run` calls; checked before anything is read."""
        return ()

    def check(self) -> None:
        """Raise IncomparableError when the settings break the protocol."""
        return None

    @abc.abstractmethod
    def run(self, functions: Functions, *, panels: bool = False) -> EvalResult:
        """Evaluate. Functions take and return host arrays; `panels` asks for pictures too."""


def to_numpy(x: Any) -> np.ndarray:
    """Device array to host array."""
    return np.asarray(x)
