"""What every source is: a frozen description of files that behaves like a list of records.

A source is part of a recipe, so constructing one touches no file. The first `len()` or `[i]` opens
it: indexes (offsets, file lists) are read once and kept in memory, records are read when asked for.
Sources are thread-safe for reading and can be pickled (worker processes reopen them).
"""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from data_pipelines.batch import DataError

R_co = TypeVar("R_co", covariant=True)


class _Identified(Protocol):
    @property
    def id(self) -> str: ...


I_co = TypeVar("I_co", bound=_Identified, covariant=True)


@dataclasses.dataclass(frozen=True)
class Source(abc.ABC, Generic[R_co]):
    """Random access to records (of one type), in a fixed order.

    Subclasses keep everything derived (indexes, open readers) in `functools.cached_property`, so
    equality, `dataclasses.replace` and pickling see the description only.
    """

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """Short name, as "coco/train2017"; it prefixes record ids in logs and quarantine."""

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of records. Raises DataError when the source cannot be opened."""

    @abc.abstractmethod
    def __getitem__(self, index: int) -> R_co:
        """Record `index` (0 <= index < len). Raises BadRecordError when it cannot be used."""

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """Short hash of what is read (names, sizes, options; not contents)."""

    def report(self) -> dict[str, Any]:
        """What opening the source found, by name ("records", "matched", "missing", ...)."""
        return {"records": len(self)}

    def record_id(self, index: int) -> str:
        """Best known id of record `index` without reading it; used when reading it failed."""
        return str(index)

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


@dataclasses.dataclass(frozen=True)
class ListFile:
    """What sources whose records are listed in one file have in common.

    Attributes:
      path: the file.
      root: folder that the paths of pictures are relative to; "" is the folder of `path`.
    """

    path: str
    root: str = ""

    @property
    def name(self) -> str:
        """The file's name without its suffix."""
        return Path(self.path).stem

    @property
    def folder(self) -> Path:
        """Where pictures are."""
        return Path(self.root).expanduser() if self.root else Path(self.path).expanduser().parent


@dataclasses.dataclass(frozen=True)
class InMemory(Source[I_co]):
    """Records held in memory, for small sets and tests."""

    records: tuple[I_co, ...] = ()
    label: str = "memory"

    @property
    def name(self) -> str:
        return self.label

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> I_co:
        return self.records[index]

    def record_id(self, index: int) -> str:
        return self.records[index].id

    def fingerprint(self) -> str:
        return digest(self.label, [r.id for r in self.records])


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Several sources drawn from in fixed proportion.

    Attributes:
      sources: at least one.
      weights: relative shares of the examples, one per source; None weights them by their length.
    """

    sources: tuple[Source, ...]
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("Mixture: expected at least one source, found none")
        if self.weights is None:
            return
        if len(self.weights) != len(self.sources) or min(self.weights) <= 0:
            raise ValueError(
                f"Mixture: expected one positive weight per source, found {len(self.sources)} "
                f"sources and weights {self.weights}; leave a source out instead of weighting it 0"
            )


def sources_of(source: Source[Any] | Mixture) -> tuple[Source[Any], ...]:
    """The sources of a pipeline's `source`, one or several."""
    return source.sources if isinstance(source, Mixture) else (source,)


def weights_of(source: Source[Any] | Mixture) -> tuple[float, ...] | None:
    """Their weights; None for those by length."""
    return source.weights if isinstance(source, Mixture) else None


def describe_sources(sources: Iterable[Source[Any]]) -> dict[str, Any]:
    """What opening each source found; one that cannot be opened is described by its problem."""
    facts: dict[str, Any] = {}
    for source in sources:
        try:
            facts[f"source {source.name}"] = source.report()
        except (DataError, OSError) as e:
            facts[f"source {source.name}"] = {"problem": str(e)}
    return facts


def spread(count: int, most: int) -> list[int]:
    """At most `most` of the indices 0..count-1, evenly spread, with the first and the last."""
    return [int(i) for i in np.unique(np.linspace(0, count - 1, min(most, count)).astype(int))]


def settings_of(description: Any, *left_out: str) -> dict[str, Any]:
    """Fields of a dataclass by name, without some: what its fingerprint speaks of."""
    names = (f.name for f in dataclasses.fields(description))
    return {name: getattr(description, name) for name in names if name not in left_out}


def digest(*parts: Any) -> str:
    """Sixteen hex digits over JSON-able `parts`; the fingerprint of everything here."""
    text = json.dumps(parts, sort_keys=True, default=str, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def files_digest(files: Iterable[Path], *parts: Any) -> str:
    """`digest` of names and sizes of files plus `parts`."""
    return digest([(p.name, p.stat().st_size) for p in files], *parts)


def as_paths(value: str | Sequence[str]) -> tuple[str, ...]:
    """One path or several, as a tuple."""
    return (value,) if isinstance(value, str) else tuple(value)
