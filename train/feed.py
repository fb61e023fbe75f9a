"""Batches for the loop: checked against the system, read ahead by a thread, placed on devices.

The counters of what a pipeline left out, mended or cut travel with each batch and are entered in
the `Ledger` when the batch is *used*, so they belong to a step and continue exactly after a resume.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import logging
import math
import os
import queue
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from data_pipelines.batch import BatchInfo, HostBatch, Pipeline, Quarantined
from jaxmods.system import ArraySpec
from train.exits import UserError

LOG = logging.getLogger("train")


@dataclasses.dataclass(frozen=True)
class Shares:
    """Which parts of the global batch this process reads: `indices`, of `count` equal ones.

    One part where the rows of a process are one block, as with a single process, on GPUs, or where
    the mesh follows the hosts. On a TPU torus they rarely are: a host of 2×2 chips holds two or
    four separate blocks.
    """

    indices: tuple[int, ...]
    count: int


def local_shares(shardings: dict[str, NamedSharding], spec: dict[str, ArraySpec]) -> Shares:
    """The shares that the devices of this process hold. Processes that hold the same rows (tensor
    or context parallelism across hosts) read the same shares.

    Raises:
      UserError: the arrays of a batch are split differently.
    """
    found = {name: _shares_of(s, spec[name].shape) for name, s in shardings.items()}
    if len(set(found.values())) != 1:
        listing = ", ".join(f"{name} in {s.count}" for name, s in found.items())
        raise UserError(
            f"arrays of one batch are split differently between hosts ({listing}); choose "
            "batch_size as a multiple of the devices along data and fsdp"
        )
    return next(iter(found.values()))


def _shares_of(sharding: NamedSharding, shape: tuple[int, ...]) -> Shares:
    spans: dict[int, set[tuple[int, int]]] = {}
    places: Mapping[Any, Any] = sharding.devices_indices_map(shape)
    for device, index in places.items():
        start, stop, _ = index[0].indices(shape[0])
        spans.setdefault(device.process_index, set()).add((start, stop))
    return divide(spans, shape[0], jax.process_index())


def divide(spans: Mapping[int, Iterable[tuple[int, int]]], rows: int, process: int) -> Shares:
    """The shares of `process` when each process holds its `spans` (start, stop) of `rows` rows.

    The shares are as large as they can be with every block of every process made of whole ones.
    """
    blocks = {owner: _merged(sorted(mine)) for owner, mine in spans.items()}
    size = math.gcd(rows, *(edge for of_one in blocks.values() for pair in of_one for edge in pair))
    indices = (i for start, stop in blocks[process] for i in range(start // size, stop // size))
    return Shares(tuple(indices), rows // size)


def _merged(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sorted spans with those that touch made one."""
    blocks = [spans[0]]
    for start, stop in spans[1:]:
        if start <= blocks[-1][1]:
            blocks[-1] = (blocks[-1][0], max(stop, blocks[-1][1]))
        else:
            blocks.append((start, stop))
    return blocks


def check_batch(batch: HostBatch, spec: dict[str, ArraySpec], count: int) -> None:
    """Compare a host batch, one of `count` equal shares, with what the system expects.

    Raises:
      UserError: a missing or unexpected array, a wrong shape or dtype; all that differ are named.
    """
    problems = []
    for name in spec:
        if name not in batch.arrays:
            near = difflib.get_close_matches(name, set(batch.arrays) - set(spec), n=1)
            hint = f" (found {near[0]!r}: is that it?)" if near else ""
            problems.append(f"{name}: missing{hint}")
    for name, array in batch.arrays.items():
        if name not in spec:
            problems.append(f"{name}: not an array of this system's batch")
            continue
        want = spec[name]
        shape = (want.shape[0] // count, *want.shape[1:])
        if array.shape != shape or array.dtype != np.dtype(want.struct().dtype):
            problems.append(
                f"{name}: expected {want.dtype} {list(shape)}, "
                f"found {array.dtype} {list(array.shape)}"
            )
    if problems:
        raise UserError(
            "the data pipeline does not deliver what the system expects: " + "; ".join(problems)
        )


Story = tuple[tuple[int, BatchInfo], ...]  # what happened, by share


@dataclasses.dataclass(frozen=True)
class FedBatch:
    """A batch on its devices. `story`: of the shares that this process read."""

    arrays: dict[str, jax.Array]
    story: Story


class Feed:
    """Reads a pipeline ahead in a thread. `take` gives batches in order and measures the wait.

    Attributes:
      waited: seconds that `take` has spent waiting for data.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        spec: dict[str, ArraySpec],
        shardings: dict[str, NamedSharding],
        *,
        global_batch: int,
        seed: int,
        start_step: int,
        depth: int = 2,
    ) -> None:
        self.waited = 0.0
        self._spec, self._shardings = spec, shardings
        self._shares = local_shares(shardings, spec)
        self._queue: queue.Queue[FedBatch | BaseException] = queue.Queue(depth)
        self._stop = threading.Event()
        arguments = {"global_batch": global_batch, "seed": seed, "start_step": start_step}
        self._thread = threading.Thread(
            target=self._read, args=(pipeline, arguments), name="data-feed", daemon=True
        )
        self._thread.start()

    def take(self) -> FedBatch:
        """The next batch. Raises whatever the pipeline raised while making it."""
        start = time.perf_counter()
        item = self._queue.get()
        self.waited += time.perf_counter() - start
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """Stop reading and wait for the thread."""
        self._stop.set()
        while self._thread.is_alive():
            try:
                self._queue.get_nowait()
            except queue.Empty:
                self._thread.join(0.05)

    def _read(self, pipeline: Pipeline, arguments: dict[str, Any]) -> None:
        readers: list[Iterator[HostBatch]] = []
        indices, count = self._shares.indices, self._shares.count
        try:
            for index in indices:
                reader = pipeline.batches(process_index=index, process_count=count, **arguments)
                readers.append(reader)
            first = True
            while not self._stop.is_set():
                parts = [next(reader) for reader in readers]
                if first:
                    for part in parts:
                        check_batch(part, self._spec, count)
                    first = False
                story = tuple((i, part.info) for i, part in zip(indices, parts, strict=True))
                self._put(FedBatch(self._place([part.arrays for part in parts]), story))
        except StopIteration:
            self._put(UserError("the data pipeline ended; a training pipeline must be endless"))
        except BaseException as error:  # handed to the loop, which raises it in its own thread
            self._put(error)
        finally:
            for reader in readers:
                close = getattr(reader, "close", None)
                if close is not None:
                    close()

    def _place(self, parts: list[dict[str, np.ndarray]]) -> dict[str, jax.Array]:
        return {name: self._place_one(name, [part[name] for part in parts]) for name in self._spec}

    def _place_one(self, name: str, parts: list[np.ndarray]) -> jax.Array:
        """The global array of what this process holds of it: its shares, in ascending order."""
        rows, size = self._spec[name].shape[0], len(parts[0])
        held = parts[0] if len(parts) == 1 else np.concatenate(parts)
        places = {share: place * size for place, share in enumerate(self._shares.indices)}

        def read(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(rows)
            begin = places[start // size] + start % size  # a device's rows lie in one block
            return held[(slice(begin, begin + stop - start), *index[1:])]

        return jax.make_array_from_callback(self._spec[name].shape, self._shardings[name], read)

    def _put(self, item: FedBatch | BaseException) -> None:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return
            except queue.Full:
                continue


class Ledger:
    """Counters of the data used so far, and `quarantine.jsonl`.

    A record that was left out is written once per (source, id, reason) with the step that met it
    first, and counted: `records` distinct ones, `met` times in all. Opening a ledger at a step
    removes what later steps wrote.
    """

    def __init__(
        self, folder: Path | None, saved: dict[str, Any] | None = None, step: int = 0
    ) -> None:
        """Args:
        folder: the run folder; None keeps counts only (processes that do not write).
        saved: `state()` of the checkpoint at `step`; None begins at zero.
        """
        saved = saved or {}
        self.quarantine: dict[str, dict[str, int]] = {
            reason: dict(counts) for reason, counts in saved.get("quarantine", {}).items()
        }
        self.cut: dict[str, int] = dict(saved.get("cut", {}))
        self.repaired: dict[str, int] = dict(saved.get("repaired", {}))
        self.seen: int = saved.get("seen", 0)
        self.used: int = saved.get("used", 0)
        self._known: set[tuple[str, str, str]] = set()
        self._reported: tuple[dict[str, int], list[str]] | None = None
        self._file = None
        if folder is not None:
            path = folder / "quarantine.jsonl"
            for line in keep_lines(path, lambda entry: entry["step"] < step):
                self._known.add((line["source"], line["id"], line["reason"]))
            self._file = path.open("a", encoding="utf-8")

    def enter(self, info: BatchInfo, step: int) -> None:
        """Account for the batch of `step` (0-based)."""
        self.seen += info.seen
        self.used += len(info.record_ids)
        for total, part in ((self.cut, info.cut), (self.repaired, info.repaired)):
            for name, count in part.items():
                total[name] = total.get(name, 0) + int(count)
        for bad in info.quarantined:
            counts = self.quarantine.setdefault(bad.reason, {"records": 0, "met": 0})
            counts["met"] += 1
            key = (bad.source, bad.record_id, bad.reason)
            if key in self._known:
                continue
            self._known.add(key)
            counts["records"] += 1
            if self._file is not None:
                entry = {
                    "step": step,
                    "source": bad.source,
                    "id": bad.record_id,
                    "reason": bad.reason,
                    "detail": bad.detail,
                }
                self._file.write(json.dumps(entry, ensure_ascii=False) + "\n")
                self._file.flush()

    def state(self) -> dict[str, Any]:
        """The counters as JSON: saved in checkpoints, `counters.json` and the summary."""
        return {
            "seen": self.seen,
            "used": self.used,
            "quarantine": {k: dict(v) for k, v in sorted(self.quarantine.items())},
            "repaired": dict(sorted(self.repaired.items())),
            "cut": dict(sorted(self.cut.items())),
        }

    def report(self, *, always: bool) -> None:
        """Log the counters when a reason or a record is new since the last time, or always."""
        counts = {k: v["records"] for k, v in self.quarantine.items()}, sorted(self.repaired)
        if (counts != self._reported and any(counts)) or (always and self.line()):
            LOG.info(self.line())
        self._reported = counts

    def line(self) -> str:
        """One line for the log; empty when nothing was left out, mended or cut."""
        parts = []
        if self.quarantine:
            each = ", ".join(f"{k} {v['records']}" for k, v in sorted(self.quarantine.items()))
            parts.append(f"quarantined {each}")
        for word, counts in (("mended", self.repaired), ("cut", self.cut)):
            listed = ", ".join(f"{k} {v}" for k, v in sorted(counts.items()) if v)
            if listed:
                parts.append(f"{word} {listed}")
        return f"data: {'; '.join(parts)} (of {self.seen} records seen)" if parts else ""

    def flush(self) -> None:
        """Force `quarantine.jsonl` to the disk."""
        sync(self._file)

    def close(self) -> None:
        """Close the file. Every line was flushed before; a full disk was said then."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None


def exchange(mine: list[tuple[int, Story]]) -> list[tuple[int, Story]]:
    """The (step, story) of all processes together, by step and then in the order of the rows.

    A collective call where there are several processes; the argument where there is one. Shares
    that several processes read are told once.
    """
    if jax.process_count() == 1:
        return mine
    from jax.experimental import multihost_utils

    text = json.dumps(
        [[step, i, dataclasses.asdict(info)] for step, story in mine for i, info in story]
    ).encode()
    sizes = np.asarray(multihost_utils.process_allgather(np.asarray(len(text), np.int32)))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    gathered = np.asarray(multihost_utils.process_allgather(padded))
    stories: dict[int, dict[int, BatchInfo]] = {}
    for row, size in zip(gathered, sizes, strict=True):
        for step, index, facts in json.loads(row[: int(size)].tobytes()):
            facts["record_ids"] = tuple(facts["record_ids"])
            facts["quarantined"] = tuple(Quarantined(**q) for q in facts["quarantined"])
            stories.setdefault(step, {})[index] = BatchInfo(**facts)
    return [(step, tuple(sorted(story.items()))) for step, story in sorted(stories.items())]


def sync(file: Any) -> None:
    """Force an open file (or None) to the disk."""
    if file is not None:
        file.flush()
        os.fsync(file.fileno())


def keep_lines(path: Path, keep: Any) -> list[dict[str, Any]]:
    """Rewrite a JSONL file with the entries for which `keep(entry)` holds, and return them.

    A torn last line (the process was killed while writing) is dropped. Missing files are empty.
    """
    if not path.exists():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(entry, dict) and keep(entry):
            kept.append(entry)
    partial = path.with_name(f".{path.name}.part")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in kept)
        sync(file)
    os.replace(partial, path)
    return kept
