"""Knowledge graphs as integer triples, whatever files they come from.

Readers: `TextTriples` (the usual train/valid/test.txt of names), `IntegerTriples` (one npz of ids),
`FolderTriples` (either of them), `OgbWikikg2` (the raw layout of ogbl-wikikg2). Numbering and what
is left out follow the official StarGraph code: entities are numbered by their sorted names *in
train*, and a valid or test triple with an entity or relation that train does not have is dropped,
and counted.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import gzip
import hashlib
from pathlib import Path
from typing import Literal

import numpy as np

from data_pipelines.batch import DataError

SPLITS = ("train", "valid", "test")
Numbering = Literal["train", "all"]


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """Triples of all splits, int32 [n, 3], columns head, relation, tail.

    Attributes:
      name: for logs.
      entities, relations: id ranges.
      valid_negatives, test_negatives: given wrong heads and tails, int32 [n, C] each, or None.
      entity_names, relation_names: by id; empty where the source has none.
      counts: what was met and left out, by name (see `inspect`).
    """

    name: str
    entities: int
    relations: int
    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray
    valid_negatives: tuple[np.ndarray, np.ndarray] | None = None
    test_negatives: tuple[np.ndarray, np.ndarray] | None = None
    entity_names: tuple[str, ...] = ()
    relation_names: tuple[str, ...] = ()
    counts: dict[str, int] = dataclasses.field(default_factory=dict)

    def split(self, name: str) -> np.ndarray:
        """Triples of "train", "valid" or "test"."""
        return {"train": self.train, "valid": self.valid, "test": self.test}[name]

    def negatives(self, name: str) -> tuple[np.ndarray, np.ndarray] | None:
        """Given (wrong heads, wrong tails) of a split, or None."""
        return {"valid": self.valid_negatives, "test": self.test_negatives}.get(name)

    def known(self) -> np.ndarray:
        """All triples of all splits: what a filtered ranking leaves out."""
        return np.concatenate([self.train, self.valid, self.test])


@dataclasses.dataclass(frozen=True)
class GraphSource(abc.ABC):
    """Where a graph comes from: a frozen description, read on demand."""

    @abc.abstractmethod
    def read(self) -> Graph:
        """Read everything. Raises DataError when it cannot be used."""

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """Short hash of what would be read (names and sizes, not contents)."""


@functools.lru_cache(maxsize=2)
def load(source: GraphSource) -> Graph:
    """The graph of a source, kept for the next reader of the same one."""
    return source.read()


@dataclasses.dataclass(frozen=True)
class TextTriples(GraphSource):
    """`train.txt`, `valid.txt`, `test.txt`: `head<TAB>relation<TAB>tail`, names, UTF-8.

    Attributes:
      folder: where the files are.
      numbering: "train" (official: entities of train only) or "all" (every entity that occurs; a
        triple with an unseen relation is still dropped).
    """

    folder: str
    numbering: Numbering = "train"

    def read(self) -> Graph:
        rows = {name: _read_lines(Path(self.folder) / f"{name}.txt") for name in SPLITS}
        counts = {f"{name}_blank_lines": blank for name, (_, blank) in rows.items() if blank}
        names = {name: triples for name, (triples, _) in rows.items()}
        used = [t for s in (("train",) if self.numbering == "train" else SPLITS) for t in names[s]]
        entities = sorted({t[0] for t in used} | {t[2] for t in used})
        relations = sorted({t[1] for t in names["train"]})
        entity_id = {e: i for i, e in enumerate(entities)}
        relation_id = {r: i for i, r in enumerate(relations)}
        arrays = {}
        for split, triples in names.items():
            ids = [
                (entity_id.get(h, -1), relation_id.get(r, -1), entity_id.get(t, -1))
                for h, r, t in triples
            ]
            arrays[split] = np.asarray(ids, np.int32).reshape(-1, 3)
        return _finish(
            Path(self.folder).name,
            arrays,
            len(entities),
            len(relations),
            counts,
            tuple(entities),
            tuple(relations),
        )

    def fingerprint(self) -> str:
        sizes = [_size(Path(self.folder) / f"{name}.txt") for name in SPLITS]
        return _hash(type(self).__name__, self.numbering, *sizes)


@dataclasses.dataclass(frozen=True)
class IntegerTriples(GraphSource):
    """One `triples.npz` with int arrays train, valid, test [n, 3]; ids of train come first.

    Attributes:
      folder: holds `triples.npz`, and optionally `entities.txt.gz`, `relations.txt.gz` (one name
        per line, line number = id).
      numbering: "train" drops triples whose ids exceed those of train; "all" keeps every id.
    """

    folder: str
    numbering: Numbering = "train"

    def read(self) -> Graph:
        folder = Path(self.folder)
        path = folder / "triples.npz"
        arrays = _read_npz(path, SPLITS)
        for split, array in arrays.items():
            if array.ndim != 2 or array.shape[1] != 3 or not np.issubdtype(array.dtype, np.integer):
                raise DataError(
                    f"{path}: expected {split} as integers [n, 3], found {array.dtype} "
                    f"{array.shape}; columns are head, relation, tail"
                )
        train = arrays["train"]
        if not len(train):
            raise DataError(f"{path}: expected training triples, found an empty array")
        used = [train] if self.numbering == "train" else list(arrays.values())
        entities = 1 + max(int(a[:, [0, 2]].max(initial=-1)) for a in used)
        relations = 1 + int(train[:, 1].max())
        names = _read_names(folder / "entities.txt.gz")[:entities]
        return _finish(
            folder.name,
            arrays,
            entities,
            relations,
            {},
            names,
            _read_names(folder / "relations.txt.gz")[:relations],
        )

    def fingerprint(self) -> str:
        path = Path(self.folder) / "triples.npz"
        return _hash(type(self).__name__, self.numbering, _size(path))


@dataclasses.dataclass(frozen=True)
class FolderTriples(GraphSource):
    """Whichever of `TextTriples` and `IntegerTriples` the folder holds (text first)."""

    folder: str
    numbering: Numbering = "train"

    def _inner(self) -> GraphSource:
        folder = Path(self.folder)
        if (folder / "train.txt").exists():
            return TextTriples(self.folder, self.numbering)
        if (folder / "triples.npz").exists():
            return IntegerTriples(self.folder, self.numbering)
        raise DataError(
            f"{folder}: expected train.txt, valid.txt and test.txt (head, relation, tail separated "
            "by tabs), or triples.npz; set the folder of the recipe's sources"
        )

    def read(self) -> Graph:
        return self._inner().read()

    def fingerprint(self) -> str:
        return self._inner().fingerprint()


@dataclasses.dataclass(frozen=True)
class OgbWikikg2(GraphSource):
    """The raw layout of ogbl-wikikg2, without pickles.

    Attributes:
      folder: `ogbl_wikikg2/`. Valid and test are `split/time/{valid,test}.npz` with head, relation,
        tail int [n] and head_neg, tail_neg int [n, C]; train is `split/time/train.npz`, or
        `raw/edge.csv.gz` with `raw/edge_reltype.csv.gz`. The published splits are PyTorch pickles,
        which are not opened here; convert them once with your own `ogb` and PyTorch:

            for s in ("train", "valid", "test"):
                numpy.savez(f"split/time/{s}.npz", **torch.load(f"split/time/{s}.pt"))
    """

    folder: str

    def read(self) -> Graph:
        root = Path(self.folder)
        arrays, negatives, largest = {}, {}, 0
        for split in SPLITS:
            path = root / "split" / "time" / f"{split}.npz"
            if split == "train" and not path.exists():
                arrays[split] = _read_csv_edges(root / "raw")
                continue
            if not path.exists() and path.with_suffix(".pt").exists():
                raise DataError(
                    f"{path}: missing; {split}.pt is a pickle, which is not opened. Convert it: "
                    f"numpy.savez({path.name!r}, **torch.load('{split}.pt'))"
                )
            wanted = ("head", "relation", "tail")
            given = () if split == "train" else ("head_neg", "tail_neg")
            data = _read_npz(path, (*wanted, *given))
            arrays[split] = np.stack([data[n].reshape(-1) for n in wanted], 1)
            if given:
                negatives[split] = (_int32(data["head_neg"]), _int32(data["tail_neg"]))
                largest = max(largest, *(int(a.max(initial=-1)) for a in negatives[split]))
        nodes = root / "raw" / "num-node-list.csv.gz"
        if nodes.exists():
            entities = int(np.loadtxt(nodes, dtype=np.int64, delimiter=",").sum())
        else:
            entities = 1 + max(largest, *(int(a[:, [0, 2]].max()) for a in arrays.values()))
        relations = 1 + max(int(a[:, 1].max()) for a in arrays.values())
        return _finish(
            "ogbl-wikikg2",
            arrays,
            entities,
            relations,
            {},
            (),
            (),
            negatives["valid"],
            negatives["test"],
        )

    def fingerprint(self) -> str:
        root = Path(self.folder)
        files = [root / "split" / "time" / f"{split}.npz" for split in SPLITS]
        return _hash(type(self).__name__, *(_size(f) for f in files if f.exists()))


def inspect(graph: Graph) -> dict[str, int]:
    """What a user wants to know of the training triples: duplicates, self-loops, isolated entities,
    and what reading left out."""
    train = graph.train
    key = (train[:, 0].astype(np.int64) * graph.relations + train[:, 1]) * graph.entities
    touched = np.zeros(graph.entities, bool)
    touched[train[:, [0, 2]]] = True
    return {
        "train_duplicates": len(train) - len(np.unique(key + train[:, 2])),
        "train_self_loops": int((train[:, 0] == train[:, 2]).sum()),
        "isolated_entities": int((~touched).sum()),
        **graph.counts,
    }


def _finish(
    name: str,
    arrays: dict[str, np.ndarray],
    entities: int,
    relations: int,
    counts: dict[str, int],
    entity_names: tuple[str, ...],
    relation_names: tuple[str, ...],
    valid_negatives: tuple[np.ndarray, np.ndarray] | None = None,
    test_negatives: tuple[np.ndarray, np.ndarray] | None = None,
) -> Graph:
    """Drop and count evaluation triples with ids out of range (-1 or beyond train's)."""
    kept = {}
    negatives = {"valid": valid_negatives, "test": test_negatives}
    for split, array in arrays.items():
        entity_ok = ((array[:, [0, 2]] >= 0) & (array[:, [0, 2]] < entities)).all(1)
        relation_ok = (array[:, 1] >= 0) & (array[:, 1] < relations)
        if split == "train" and not (entity_ok & relation_ok).all():
            row = int(np.argmin(entity_ok & relation_ok))
            raise DataError(
                f"{name}: expected ids of train in 0..{entities - 1} (entities) and "
                f"0..{relations - 1} (relations), found {array[row].tolist()} in row {row}"
            )
        if unknown := int((~entity_ok).sum()):
            counts[f"{split}_unknown_entity"] = unknown
        if unknown := int((entity_ok & ~relation_ok).sum()):
            counts[f"{split}_unknown_relation"] = unknown
        keep = entity_ok & relation_ok
        kept[split] = _int32(array[keep])
        given = negatives.get(split)
        if given is not None:
            if any(len(g) != len(array) for g in given):
                raise DataError(
                    f"{name}: expected given negatives for each of {len(array)} {split} triples, "
                    f"found {[len(g) for g in given]}"
                )
            negatives[split] = (given[0][keep], given[1][keep])
    if not len(kept["train"]):
        raise DataError(f"{name}: expected training triples, found none")
    return Graph(
        name,
        entities,
        relations,
        kept["train"],
        kept["valid"],
        kept["test"],
        negatives["valid"],
        negatives["test"],
        entity_names,
        relation_names,
        counts,
    )


def _read_lines(path: Path) -> tuple[list[tuple[str, str, str]], int]:
    """Triples of one text file, and how many lines were blank."""
    if not path.exists():
        raise DataError(
            f"{path}: missing; expected train.txt, valid.txt and test.txt in its folder"
        )
    triples, blank = [], 0
    with path.open(encoding="utf-8", errors="strict") as file:
        try:
            for number, line in enumerate(file, 1):
                text = line.strip()
                if not text:
                    blank += 1
                    continue
                fields = text.split("\t") if "\t" in text else text.split()
                if len(fields) != 3 or not all(fields):
                    raise DataError(
                        f"{path}:{number}: expected head, relation and tail separated by tabs, "
                        f"found {len(fields)} fields: {text[:80]!r}"
                    )
                triples.append((fields[0], fields[1], fields[2]))
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: expected UTF-8 text, found {error.reason}") from error
    if not triples:
        raise DataError(f"{path}: expected triples, found an empty file")
    return triples, blank


def _read_npz(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    if not path.exists():
        raise DataError(f"{path}: missing; expected a NumPy archive with {', '.join(names)}")
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [n for n in names if n not in file]
            if missing:
                raise DataError(
                    f"{path}: expected arrays {', '.join(names)}, found {', '.join(file.files)}"
                )
            return {n: file[n] for n in names}
    except (ValueError, OSError) as error:
        raise DataError(f"{path}: cannot be read as a NumPy archive ({error})") from error


def _read_csv_edges(raw: Path) -> np.ndarray:
    paths = raw / "edge.csv.gz", raw / "edge_reltype.csv.gz"
    for path in paths:
        if not path.exists():
            raise DataError(f"{path}: missing; expected it, or split/time/train.npz")
    edges, types = (_numbers(p) for p in paths)
    if edges.ndim != 2 or edges.shape[1] != 2 or len(edges) != len(types):
        raise DataError(
            f"{paths[0]}: expected two columns and {len(types)} rows, found {edges.shape}"
        )
    return np.stack([edges[:, 0], types.reshape(-1), edges[:, 1]], 1)


def _numbers(path: Path) -> np.ndarray:
    """Integers of a gzipped csv file without header."""
    with gzip.open(path, "rb") as file:
        data = file.read()
    columns = data.split(b"\n", 1)[0].count(b",") + 1
    values = np.fromstring(data.replace(b"\n", b","), np.int64, sep=",")
    if values.size % columns:
        raise DataError(f"{path}: expected {columns} integers per line")
    return values.reshape(-1, columns)


def _read_names(path: Path) -> tuple[str, ...]:
    if not path.exists():
        return ()
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return tuple(line.rstrip("\n") for line in file)


def _int32(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, np.int32)


def _size(path: Path) -> str:
    if not path.exists():
        raise DataError(f"{path}: missing")
    return f"{path.name}:{path.stat().st_size}"


def _hash(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]
