"""A run folder: who may write in it, whether it belongs to this recipe, what its storage says."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from train.canonical import differences, show
from train.exits import UserError
from train.recipes import RECIPE_FILE, Recipe, read_document

LOG = logging.getLogger("train")

_HEARTBEAT = 15.0  # seconds between signs of life
_SILENT = 120.0  # a lock of another host this long without one is stale


class Lock:
    """Only one job writes to a run folder.

    The lock file is held with `flock`, which ends with the process however it ends; it names the
    holder's pid and host and is touched every 15 s, so that a job on another host that shares the
    folder without sharing locks is recognised too. Process 0 holds it for all processes of a job.

    Raises:
      UserError: another job holds it, or the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "lock"
        self._stop = threading.Event()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a+", encoding="utf-8")
        except OSError as error:
            raise UserError(storage_problem(error, folder) or f"{folder}: {error}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = self._holder()
            self._file.close()
            raise UserError(self._refusal(holder)) from None
        holder = self._holder()
        if holder:
            age = time.time() - self._path.stat().st_mtime
            if holder.get("host") != socket.gethostname() and age < _SILENT:
                self._file.close()
                raise UserError(self._refusal(holder))
            LOG.warning(
                "stale lock of process %s on %s (it ended without releasing it): taken over",
                holder.get("pid"),
                holder.get("host"),
            )
        self._mine = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}
        self._write(self._mine)
        self._thread = threading.Thread(target=self._beat, name="lock-heartbeat", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Make sure that the folder is still there and still ours.

        Raises:
          UserError: it has vanished, or another job has taken it.
        """
        folder = self._path.parent
        try:
            holder = json.loads(self._path.read_text(encoding="utf-8") or "{}")
        except FileNotFoundError as error:
            raise UserError(
                f"{folder}: the run folder has vanished (deleted, renamed, or its storage is no "
                "longer mounted); bring it back and run the same command again"
            ) from error
        except (OSError, json.JSONDecodeError) as error:
            raise UserError(
                f"{folder}: the run folder cannot be read any more ({error})"
            ) from error
        if holder != self._mine:
            raise UserError(self._refusal(holder))

    def release(self) -> None:
        """Give the folder back."""
        if not self._stop.is_set():
            self._stop.set()
            self._thread.join()
            with contextlib.suppress(OSError):  # a full disk, or a folder that has gone
                self._write(None)
                self._file.close()

    def __enter__(self) -> Lock:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def _refusal(self, holder: dict[str, Any]) -> str:
        return (
            f"{self._path.parent}: in use by process {holder.get('pid', '?')} on "
            f"{holder.get('host', '?')}; wait for it, stop it, or give another --workdir"
        )

    def _holder(self) -> dict[str, Any]:
        self._file.seek(0)
        try:
            value = json.loads(self._file.read() or "{}")
        except json.JSONDecodeError:
            return {}
        return value if isinstance(value, dict) else {}

    def _write(self, value: dict[str, Any] | None) -> None:
        self._file.seek(0)
        self._file.truncate()
        if value is not None:
            self._file.write(json.dumps(value))
        self._file.flush()

    def _beat(self) -> None:
        while not self._stop.wait(_HEARTBEAT):
            with contextlib.suppress(OSError):  # `check` says so, in the main thread
                os.utime(self._path)


_FULL = {errno.ENOSPC, errno.EDQUOT}
_CLOSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}
_GONE = {errno.ENOENT, errno.ESTALE, errno.ENODEV, errno.EIO, errno.ENOTCONN}
_WORDS = {  # of libraries that write in C++ and raise types of their own
    "no space left": errno.ENOSPC,
    "disk quota exceeded": errno.EDQUOT,
    "read-only file system": errno.EROFS,
    "permission denied": errno.EACCES,
    "stale file handle": errno.ESTALE,
}


@contextlib.contextmanager
def storage(folder: Path) -> Iterator[None]:
    """Says in one sentence what is wrong with the storage under `folder`.

    Raises:
      UserError: in place of an error of that storage.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # libraries wrap the system's errors in many types
        problem = storage_problem(error, folder)
        if problem is None:
            raise
        raise UserError(problem) from error


def storage_problem(error: BaseException, folder: Path) -> str | None:
    """The storage under `folder` as the cause of `error`, in one sentence; None when it is not."""
    code = _storage_code(error, folder)
    if code in _FULL:
        place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        free = shutil.disk_usage(place).free / 2**20
        return (
            f"{folder}: no space left ({free:,.0f} MiB free, or a quota is used up). The last "
            "complete checkpoint is untouched; make room, or keep fewer (checkpoint.keep), and run "
            "the same command again"
        )
    if code in _CLOSED:
        return f"{folder}: cannot be written ({os.strerror(code)}); give a --workdir that can be"
    if code in _GONE and (code != errno.ENOENT or not folder.exists()):
        return (
            f"{folder}: its storage has gone or does not answer ({os.strerror(code)}); bring it "
            "back and run the same command again"
        )
    return None


def _storage_code(error: BaseException, folder: Path) -> int:
    """The system's number of what is wrong with the storage under `folder`, 0 for nothing."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        if isinstance(cause, OSError) and cause.errno:
            name = cause.filename
            if name is None or Path(os.fsdecode(name)).absolute().is_relative_to(folder.absolute()):
                return cause.errno
        elif str(folder) in str(cause):
            for words, code in _WORDS.items():
                if words in str(cause).lower():
                    return code
        cause = cause.__cause__ or cause.__context__
    return 0


def match_recipe(
    folder: Path, recipe: Recipe, allowed: Sequence[str], *, write: bool = True
) -> list[str]:
    """Save the recipe with a new run, or hold it against the one saved with an old run.

    A run that never saved a checkpoint binds nobody: what it left is removed, and said.

    Args:
      write: False on processes that only compare.
      allowed: dotted paths whose differences (and those inside them) are accepted; the saved
        recipe is then replaced and the old one kept as `recipe.<n>.json`.

    Returns:
      The accepted differences as lines `path: old → new`; empty when there are none.

    Raises:
      UserError: differences that are not allowed, each as a line, and how to go on.
    """
    path = folder / RECIPE_FILE
    document = recipe.document()
    if not path.exists():
        if write:
            write_text(path, _dump(document))
        return []
    saved = read_document(path)
    found = differences(saved["experiment"], document["experiment"])
    if not found:
        return []
    if not has_checkpoint(folder):
        if write:
            LOG.info("the run begun here never saved a checkpoint: starting anew")
            _remove_traces(folder)
            write_text(path, _dump(document))
        return []
    lines = {p: f"{p}: {show(a)} → {show(b)}" for p, (a, b) in found.items()}
    refused = [p for p in lines if not is_allowed(p, allowed)]
    if refused:
        listing = "\n".join(f"  {lines[p]}" for p in refused)
        raise UserError(
            f"{folder} holds a run of another recipe ({saved['recipe']}). Differences:\n{listing}\n"
            "To go on: give another --workdir for a new run; or repeat the command of the saved "
            f"run; or accept each difference with --allow-change {' '.join(refused)}"
        )
    if not write:
        return list(lines.values())
    number = 1
    while (folder / f"recipe.{number}.json").exists():
        number += 1
    write_text(folder / f"recipe.{number}.json", path.read_text(encoding="utf-8"))
    write_text(path, _dump(document))
    return list(lines.values())


def has_checkpoint(folder: Path) -> bool:
    """Whether a run in `folder` has saved anything."""
    return any(p.name.isdigit() for p in (folder / "checkpoints").glob("*"))


def _remove_traces(folder: Path) -> None:
    for name in ("eval", "tensorboard"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("metrics.jsonl", "quarantine.jsonl", "counters.json", "nonfinite.json"):
        (folder / name).unlink(missing_ok=True)


def is_allowed(path: str, allowed: Sequence[str]) -> bool:
    """Whether a difference at `path` is covered by one of the allowed paths."""
    return any(path == a or path.startswith(f"{a}.") for a in allowed)


def write_text(path: Path, text: str) -> None:
    """Write a file at once: readers see the old or the new content, never a part."""
    partial = path.with_name(f".{path.name}.part")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _dump(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"
