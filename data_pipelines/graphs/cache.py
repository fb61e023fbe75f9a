"""Tokens of a graph, kept in a folder: found by what they depend on, checked when read."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import zipfile
from pathlib import Path

import numpy as np

from data_pipelines.graphs.tokenise import Tokens, TokenSpec, tokenise

_VERSION = 1  # raise when the same inputs would give other tokens
_ARRAYS = ("hashes", "path_ids", "nodes", "anchor_entities")

log = logging.getLogger(__name__)


def cached_tokens(
    triples: np.ndarray, entities: int, spec: TokenSpec, folder: str | None
) -> Tokens:
    """`tokenise(triples, entities, spec)`, from `folder` where it has been done before.

    A file is named by the hash of the triples and of every option, and holds a checksum of its
    arrays; one that does not match is reported, and made again.
    """
    if folder is None:
        return tokenise(triples, entities, spec)
    path = Path(folder) / f"tokens_{_key(triples, entities, spec)}.npz"
    if path.exists():
        tokens = _read(path)
        if tokens is not None:
            return tokens
        log.warning("%s: damaged, tokenising again", path)
    tokens = tokenise(triples, entities, spec)
    _write(path, tokens)
    return tokens


def _key(triples: np.ndarray, entities: int, spec: TokenSpec) -> str:
    digest = hashlib.sha256(repr((_VERSION, entities, dataclasses.astuple(spec))).encode())
    digest.update(np.ascontiguousarray(triples, np.int64).tobytes())
    return digest.hexdigest()[:20]


def _checksum(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name}{array.dtype}{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _read(path: Path) -> Tokens | None:
    """The tokens of a file, or None when it is not what was written."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files if name != "checksum"}
            if str(file["checksum"]) != _checksum(arrays):
                return None
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None
    paths, entities = (int(n) for n in arrays.pop("sizes"))
    anchors = arrays.pop("anchor_entities")
    graph = {name: arrays.get(name) for name in ("hashes", "path_ids", "nodes")}
    return Tokens(**graph, anchor_entities=anchors, paths=paths, entities=entities)


def _write(path: Path, tokens: Tokens) -> None:
    arrays = {n: getattr(tokens, n) for n in _ARRAYS if getattr(tokens, n) is not None}
    arrays["sizes"] = np.asarray([tokens.paths, tokens.entities])
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        np.savez(file, checksum=np.asarray(_checksum(arrays)), **arrays)
    temporary.replace(path)
