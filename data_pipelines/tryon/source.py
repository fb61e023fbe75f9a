"""What every source of try-on records is, and the reading of folder trees with pair lists."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypeAlias

from data_pipelines.batch import DataError
from data_pipelines.records import BadRecordError, GarmentCategory, TryOnRecord
from data_pipelines.sources.base import InMemory, Source, digest, settings_of, spread
from data_pipelines.sources.matching import Listing, check_match, relative_path

Part: TypeAlias = Literal["target", "person", "agnostic", "reference", "mask", "dense"]
PARTS: tuple[Part, ...] = ("target", "person", "agnostic", "reference", "mask", "dense")

# Order of the category numbers in pair lists (DressCode, ViViD, IGPair), and the folders' names.
CATEGORIES: tuple[GarmentCategory, ...] = ("upper", "lower", "dresses")
FOLDERS: tuple[str, ...] = ("upper_body", "lower_body", "dresses")


@dataclasses.dataclass(frozen=True)
class TryOnSource(Source[TryOnRecord]):
    """Random access to `TryOnRecord`s that knows which pictures it has at all."""

    @abc.abstractmethod
    def offers(self) -> frozenset[Part]:
        """Which pictures besides the garment records of this source can have."""

    @abc.abstractmethod
    def looked_for(self, part: Part) -> str:
        """Where pictures of `part` are looked for, for messages."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One line of a pair list: base names of the person's photo and of the garment.

    Attributes:
      folder: sub-folder of the set that both are in ("upper_body", "test"; "" for the root).
    """

    person: str
    garment: str
    folder: str = ""
    category: GarmentCategory | None = None
    paired: bool = True


@dataclasses.dataclass(frozen=True)
class Files:
    """Where the pictures of one entry would be; a None has no place in this layout."""

    garment: Path
    target: Path | None = None
    person: Path | None = None
    agnostic: tuple[Path, ...] = ()
    reference: Path | None = None
    mask: Path | None = None
    dense: Path | None = None

    def places(self, part: Part) -> tuple[Path, ...]:
        """Paths of `part`."""
        if part == "agnostic":
            return self.agnostic
        path: Path | None = getattr(self, part)
        return () if path is None else (path,)


@dataclasses.dataclass(frozen=True)
class FolderSource(TryOnSource):
    """A tree of picture folders with equal or derived file names.

    A part whose file is not there is left out of the record (the pipeline decides whether that is
    a fault); garment and target have to be there, else the record is bad (missing_file). Opening
    looks at `checked` entries spread over the list and stops when fewer than `min_match` of them
    have both.

    Attributes:
      root: folder of the set.
      min_match: share of entries whose garment and target must exist.
      checked: entries that are looked at when the source is opened.
    """

    root: str
    _: dataclasses.KW_ONLY
    min_match: float = 0.5
    checked: int = 5000

    @abc.abstractmethod
    def _list(self) -> list[Entry]:
        """All entries, in order. Raises DataError."""

    @abc.abstractmethod
    def _files(self, entry: Entry) -> Files:
        """Where the pictures of an entry are."""

    def _shares(self) -> tuple[float, ...]:
        """Shares of the agnostic variants, in the order of `Files.agnostic`."""
        return ()

    @property
    def folder(self) -> Path:
        """The set's folder."""
        return Path(self.root).expanduser()

    @functools.cached_property
    def _listing(self) -> Listing:
        return Listing()

    @functools.cached_property
    def _entries(self) -> tuple[Entry, ...]:
        if not self.folder.is_dir():
            raise DataError(
                f"{self.name}: expected a folder at {self.folder}, found none; set data.source.root"
            )
        entries = tuple(self._list())
        if not entries:
            raise DataError(f"{self.name}: expected pairs under {self.folder}, found none")
        picks = spread(len(entries), self.checked)
        matched, missing = 0, ""
        for i in picks:
            files = self._files(entries[i])
            absent = [p for p in _required(files) if not self._listing.has(p)]
            matched += not absent
            if absent and not missing:
                missing = str(absent[0].relative_to(self.folder))
        check_match(
            matched,
            len(picks),
            self.min_match,
            path=missing,
            root=self.folder,
            field="data.source.root",
        )
        return entries

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> TryOnRecord:
        entry = self._entries[index]
        files = self._files(entry)
        for path in _required(files):
            if not self._listing.has(path):
                raise BadRecordError("missing_file", f"no picture at {path}")
        found = {part: tuple(filter(self._listing.has, files.places(part))) for part in PARTS}
        shares = self._shares()
        if shares:
            there = [self._listing.has(p) for p in files.agnostic]
            shares = tuple(s for s, t in zip(shares, there, strict=True) if t)

        def one(part: Part) -> Path | None:
            return found[part][0] if found[part] else None

        return TryOnRecord(
            id=self.record_id(index),
            garment=files.garment,
            target=one("target"),
            person=one("person"),
            agnostic=found["agnostic"],
            agnostic_shares=shares,
            references=found["reference"],
            mask=one("mask"),
            dense=one("dense"),
            category=entry.category,
            paired=entry.paired,
            extra={"file": entry.person, "folder": entry.folder},
        )

    def record_id(self, index: int) -> str:
        """Folder and person; with the garment where the two do not belong together."""
        entry = self._entries[index]
        person = f"{entry.folder}/{entry.person}" if entry.folder else entry.person
        return person if entry.paired else f"{person}+{entry.garment}"

    @functools.cached_property
    def _first_of_folders(self) -> tuple[Entry, ...]:
        """The first entry of each folder."""
        firsts: dict[str, Entry] = {}
        for entry in self._entries:
            firsts.setdefault(entry.folder, entry)
        return tuple(firsts.values())

    def offers(self) -> frozenset[Part]:
        """Parts for which a folder exists."""
        files = [self._files(e) for e in self._first_of_folders]
        return frozenset(
            part for part in PARTS if any(p.parent.is_dir() for f in files for p in f.places(part))
        )

    def looked_for(self, part: Part) -> str:
        files = [self._files(e) for e in self._first_of_folders]
        folders = dict.fromkeys(str(p.parent) for f in files for p in f.places(part))
        return ", ".join(folders) or f"nowhere (the layout of {self.name} has none)"

    def report(self) -> dict[str, int]:
        """Records, and how many of those looked at have each picture."""
        counts = {"records": len(self), "checked": 0}
        for i in spread(len(self), self.checked):
            files = self._files(self._entries[i])
            counts["checked"] += 1
            for part in PARTS:
                name = f"with_{part}"
                there = any(self._listing.has(p) for p in files.places(part))
                counts[name] = counts.get(name, 0) + there
        return counts

    def fingerprint(self) -> str:
        options = settings_of(self, "root", "min_match", "checked")
        names = digest([(e.folder, e.person, e.garment) for e in self._entries])
        return digest(self.name, options, names)


def _required(files: Files) -> list[Path]:
    return [p for p in (files.garment, files.target) if p is not None]


def first_folder(parent: Path, names: Iterable[str]) -> Path:
    """The first of `names` that is a folder in `parent`, else the first name."""
    options = [parent / name for name in names]
    return next((p for p in options if p.is_dir()), options[0])


def pictures_in(folder: Path) -> list[str]:
    """Names of the .jpg and .png files of a folder, sorted. Raises DataError without the folder."""
    if not folder.is_dir():
        raise DataError(
            f"expected a folder of pictures at {folder}, found none; set data.source.root"
        )
    return sorted(p.name for p in folder.iterdir() if p.suffix.lower() in (".jpg", ".png"))


def read_list(path: Path, columns: tuple[int, ...]) -> list[tuple[str, ...]]:
    """Rows of a pair list: file names separated by blanks, one row per line, blank lines ignored.

    Args:
      columns: numbers of columns that a row may have.

    Raises:
      DataError: no such file, a row of another length, or a name that leaves its folder; with file
        and line.
    """
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"{path}: cannot read the pair list: {e}") from e
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        cells = tuple(line.split())
        if not cells:
            continue
        if len(cells) not in columns:
            expected = " or ".join(map(str, columns))
            raise DataError(
                f"{path}:{number}: expected {expected} columns (person, garment"
                f"{', category' if 3 in columns else ''}), found {len(cells)}: {line[:80]!r}"
            )
        try:
            names = tuple(relative_path(cell) for cell in cells[:2])
        except BadRecordError as e:
            raise DataError(f"{path}:{number}: {e.detail}") from e
        rows.append((*names, *cells[2:]))
    return rows


def category_rows(path: Path) -> list[tuple[str, str, int]]:
    """Rows "person garment category" of a list at the root of a set.

    Raises:
      DataError: as `read_list`, and for a category that is not 0, 1 or 2.
    """
    rows = []
    for row in read_list(path, (3,)):
        if row[2] not in ("0", "1", "2"):
            raise DataError(
                f"{path}: expected category 0 (upper), 1 (lower) or 2 (dresses), found {row[2]!r} "
                f"in the row of {row[0]}"
            )
        rows.append((row[0], row[1], int(row[2])))
    return rows


def renamed(name: str, suffix: str, replacement: str) -> str:
    """`name` with its ending `suffix` replaced.

    Raises:
      DataError: the name does not end so; the naming rule of the set is broken.
    """
    if not name.endswith(suffix):
        raise DataError(
            f"expected a file name ending in {suffix!r} (the set's naming rule), found {name!r}"
        )
    return name[: -len(suffix)] + replacement


@dataclasses.dataclass(frozen=True)
class TryOnRecords(InMemory[TryOnRecord], TryOnSource):
    """Records held in memory, for small sets and tests."""

    def offers(self) -> frozenset[Part]:
        return frozenset(part for part in PARTS if any(has(r, part) for r in self.records))

    def looked_for(self, part: Part) -> str:
        return f"field of the {len(self)} records"


def has(record: TryOnRecord, part: Part) -> bool:
    """Whether a record carries `part`."""
    value: Any = getattr(record, "references" if part == "reference" else part)
    return bool(value) if isinstance(value, tuple) else value is not None
