"""Encoding a recipe's data once: every record through the system's encoders, into ArrayRecord.

Training then reads `DIR/source-<n>/` instead of pictures and texts. What was cut off goes on where
it was: whole files that are there are kept.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from data_pipelines.encoded import EncodedRecord, write_parts
from data_pipelines.encoding import Encodable, Piece, Pieces, source_folder
from data_pipelines.records import BadRecordError
from data_pipelines.sources.base import Source
from jaxmods.system import Params, System
from train.checkpoint import digests
from train.exits import UserError
from train.metrics import progress
from train.sample import Runner
from train.state import Plan

LOG = logging.getLogger("train")

PER_FILE = 1000
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@dataclasses.dataclass(frozen=True)
class Encoded:
    """What a call of `encode` did: examples by folder, and records left out by reason."""

    folders: dict[str, int]
    left_out: dict[str, int]


def encodable(data: object, system: System, name: str) -> Encodable:
    """The pipeline of a recipe, if it can be encoded with the functions of its system.

    Raises:
      UserError: it cannot.
    """
    if not isinstance(data, Encodable):
        raise UserError(
            f"recipe {name}: expected data that can be encoded once, found "
            f"{type(data).__name__}; train from it as it is"
        )
    needed = {piece.function for piece in data.lists().values()}
    missing = sorted(needed - set(system.functions()))
    if missing:
        raise UserError(
            f"recipe {name}: encoding its data needs {', '.join(missing)}; this system offers "
            f"{', '.join(sorted(system.functions())) or 'no functions'}"
        )
    return data


def encoder_digest(plan: Plan, params: Params, pieces: Sequence[Piece]) -> str:
    """16 hex digits over the parameters that the functions of `pieces` read."""
    functions = plan.experiment.system.functions()
    used: dict[str, Any] = {}
    names = [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    ]
    for piece in {piece.function: piece for piece in pieces}.values():
        rows = [jax.ShapeDtypeStruct((1, *a.shape), a.dtype) for a in piece.arrays]
        program = jax.make_jaxpr(functions[piece.function])(params, *rows).jaxpr
        read = {id(v) for e in program.eqns for v in e.invars}
        used.update(
            (name, leaf)
            for (name, leaf), v in zip(names, program.invars, strict=False)
            if id(v) in read
        )
    sums = digests({"used": used})
    return hashlib.sha256(repr(sorted(sums.items())).encode()).hexdigest()[:16]


def encode(
    runner: Runner,
    data: Encodable,
    root: Path,
    facts: Mapping[str, Any],
    *,
    rows: int,
    per_file: int = PER_FILE,
    limit: int | None = None,
) -> Encoded:
    """Encodes all sources of `data` into folders of `root`.

    Args:
      facts: what made the arrays, besides what the pipeline says; kept with them.
      rows: of a call. per_file: records in a file. limit: only so many of each source.

    Raises:
      DataError: a folder is complete already, or was begun with other facts.
    """
    folders: dict[str, int] = {}
    left_out: Counter[str] = Counter()
    for number, source in enumerate(data.to_encode()):
        folder = source_folder(root, number)
        total = len(source) if limit is None else min(limit, len(source))
        about = {
            **facts,
            "dtype": "bfloat16",
            "source": source.name,
            "source_fingerprint": source.fingerprint(),
            "limit": limit,
            **data.encoding_facts(source),
        }
        with progress(total, f"encoding {source.name}", "record") as advance:
            work = _Work(runner, data, source, rows, left_out, advance)
            parts = [
                functools.partial(work.examples, range(start, min(start + per_file, total)))
                for start in range(0, total, per_file)
            ]
            folders[str(folder)] = write_parts(parts, folder, about, lists=tuple(data.lists()))
    return Encoded(folders, dict(left_out))


class _Work:
    """Records of one source on their way through the encoders."""

    def __init__(
        self,
        runner: Runner,
        data: Encodable,
        source: Source[Any],
        rows: int,
        left_out: Counter[str],
        advance: Any,
    ) -> None:
        self._runner, self._data, self._source, self._rows = runner, data, source, rows
        self._left_out, self._advance = left_out, advance
        self._empty: dict[str, np.ndarray] | None = None

    def examples(self, indices: range) -> Iterator[EncodedRecord]:
        """Encoded records; those that cannot be used are counted and left out."""
        waiting: list[Pieces] = []
        for index in indices:
            try:
                waiting.append(self._data.pieces(self._source[index]))
            except BadRecordError as error:
                self._left_out[error.reason] += 1
                where = f"{self._source.name}:{self._source.record_id(index)}"
                LOG.warning("left out %s: %s", where, error)
            if len(waiting) == self._rows or index == indices[-1]:
                yield from self._together(waiting)
                waiting = []
            self._advance(index + 1)

    def _together(self, records: Sequence[Pieces]) -> Iterator[EncodedRecord]:
        """Records whose pieces go through the encoders together, by function and shape."""
        groups: dict[tuple[Any, ...], list[tuple[int, int, Piece]]] = {}
        for n, record in enumerate(records):
            for k, piece in enumerate(record.pieces):
                key = (piece.function, *(a.shape for a in piece.arrays))
                groups.setdefault(key, []).append((n, k, piece))
        made: dict[tuple[int, int], list[np.ndarray]] = {}
        for group in groups.values():
            for start in range(0, len(group), self._rows):
                chunk = group[start : start + self._rows]
                results = self._run([piece for _, _, piece in chunk])
                made.update(((n, k), r) for (n, k, _), r in zip(chunk, results, strict=True))
        for n, record in enumerate(records):
            found: dict[str, list[np.ndarray]] = {}
            for k, piece in enumerate(record.pieces):
                for name, array in zip(piece.names, made[n, k], strict=True):
                    found.setdefault(name, []).append(array)
            yield EncodedRecord(record.id, {**self._arrays(found), **record.arrays})

    def _arrays(self, found: Mapping[str, Sequence[np.ndarray]]) -> dict[str, np.ndarray]:
        if self._empty is None:
            self._empty = {
                name: self._run([piece])[0][piece.names.index(name)][None][:0]
                for name, piece in self._data.lists().items()
            }
        lists = {name: np.stack(found[name]) if name in found else e
                 for name, e in self._empty.items()}  # fmt: skip
        return {**{name: a[0] for name, a in found.items() if name not in lists}, **lists}

    def _run(self, pieces: Sequence[Piece]) -> list[list[np.ndarray]]:
        """Results of pieces of one function and shape, floats in bfloat16, by piece and leaf."""
        padded = [*pieces, *[pieces[-1]] * (self._rows - len(pieces))]
        arrays = tuple(np.stack(column) for column in zip(*(p.arrays for p in padded), strict=True))
        leaves = [
            np.asarray(x) for x in jax.tree.leaves(self._runner.run(pieces[0].function, arrays))
        ]
        halves = [x.astype(BFLOAT16) if x.dtype in (np.float32, BFLOAT16) else x for x in leaves]
        return [[leaf[row] for leaf in halves] for row in range(len(pieces))]
