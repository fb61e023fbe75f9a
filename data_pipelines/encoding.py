"""Encoding pictures and texts once: what a pipeline tells `jaxmods encode`, and reads afterwards.

A pipeline that can train from encoded examples is `Encodable`: it says of every record which
functions of the system make which arrays of it. The command runs them in batches and writes a
folder per source (`DIR/source-0`, ...) with `data_pipelines.encoded.write_parts`.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.sources.base import Source


@dataclasses.dataclass(frozen=True)
class Piece:
    """One row for a function of the system.

    Attributes:
      names: of the arrays that it makes, in the order of the leaves of its result.
      function: its name. arrays: its arguments after the parameters, without a batch dimension.
    """

    names: tuple[str, ...]
    function: str
    arrays: tuple[np.ndarray, ...]


@dataclasses.dataclass(frozen=True)
class Pieces:
    """All of one record.

    Attributes:
      id: of the record.
      pieces: what is to be made. Names of `Encodable.lists` may come any number of times and are
        stacked in this order; all others come once.
      arrays: kept as they are.
    """

    id: str
    pieces: tuple[Piece, ...]
    arrays: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


class Encodable(abc.ABC):
    """A pipeline whose records can be encoded once."""

    @abc.abstractmethod
    def to_encode(self) -> tuple[Source[Any], ...]:
        """The sources, in order."""

    @abc.abstractmethod
    def pieces(self, record: Any) -> Pieces:
        """What is to be made of a record: everything that training may draw of it.

        Raises:
          BadRecordError: it cannot be used.
        """

    @abc.abstractmethod
    def lists(self) -> dict[str, Piece]:
        """Names that a record may have none or several of, each with a piece of that form."""

    @abc.abstractmethod
    def encoding_facts(self, source: Source[Any]) -> dict[str, Any]:
        """JSON values that the arrays depend on (sizes), kept with them."""


def source_folder(root: str | Path, number: int) -> Path:
    """Where the examples of source `number` are."""
    return Path(root).expanduser() / f"source-{number}"
