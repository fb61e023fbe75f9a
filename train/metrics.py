"""Where numbers go: `metrics.jsonl`, TensorBoard, and a line for the person watching."""

from __future__ import annotations

import json
import logging
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from train.feed import keep_lines, sync

LOG = logging.getLogger("train")


class Window:
    """Mean of each metric over the steps since the last log line.

    Sums are kept in float64 and saved with checkpoints, so that a line is the same whether or not
    the run was interrupted inside its window.
    """

    def __init__(self, saved: dict[str, Any] | None = None) -> None:
        saved = saved or {}
        self.count: int = saved.get("count", 0)
        self.sums: dict[str, float] = dict(saved.get("sums", {}))
        self.last: dict[str, float] = dict(saved.get("last", {}))

    def add(self, metrics: dict[str, float]) -> None:
        """Enter the metrics of one step."""
        self.count += 1
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.last = metrics

    def take(self) -> dict[str, float]:
        """Means since the last call (learning rates: the latest), and begin anew."""
        means = {
            name: self.last[name] if name.split("/")[0] == "lr" else total / self.count
            for name, total in self.sums.items()
        }
        self.count, self.sums, self.last = 0, {}, {}
        return means

    def state(self) -> dict[str, Any]:
        """JSON for the checkpoint."""
        return {"count": self.count, "sums": dict(self.sums), "last": dict(self.last)}


class Writer:
    """`metrics.jsonl` (one object per line, `step` first) and TensorBoard, from step `step` on.

    Lines of later steps, left by a run that was cut off after its last checkpoint, are removed.
    """

    def __init__(self, folder: Path, *, step: int, tensorboard: bool) -> None:
        path = folder / "metrics.jsonl"
        keep_lines(path, lambda entry: entry.get("step", 0) <= step)
        self._file = path.open("a", encoding="utf-8")
        self._board = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(
                str(folder / "tensorboard"), purge_step=step + 1 if step else 0
            )

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line, and one scalar per value. NaN and infinity are written as null."""
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def flush(self) -> None:
        """Force everything to the disk."""
        sync(self._file)
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        """Close the files. Every line was flushed before; a full disk was said then."""
        with suppress(OSError):
            self._file.close()
        if self._board is not None:
            with suppress(OSError):
                self._board.close()


class Console:
    """Progress for a person: a bar with rate and ETA on a terminal, plain lines elsewhere."""

    def __init__(self, total: int, initial: int, *, quiet: bool = False) -> None:
        self._total, self._start, self._begun = total, initial, time.perf_counter()
        self._bar: Any = None
        if not quiet and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total, initial=initial, unit="step", dynamic_ncols=True, file=sys.stderr
            )

    def advance(self, step: int) -> None:
        """Show that `step` steps are done."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def report(self, step: int, values: dict[str, float]) -> None:
        """Show the values of a log line."""
        text = headline(values)
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            return
        spent = time.perf_counter() - self._begun
        done = max(step - self._start, 1)
        left = spent / done * (self._total - step)
        LOG.info("step %d/%d  %s  ETA %s", step, self._total, text, duration(left))

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def headline(values: dict[str, float]) -> str:
    """The few values that belong on a line."""
    names = ("loss", "grad_norm", "lr", "examples_per_second", "data_wait", "mfu")
    labels = {"grad_norm": "grad", "examples_per_second": "ex/s", "data_wait": "wait"}
    parts = []
    for name in names:
        if name in values:
            value = values[name]
            shown = f"{value:.0%}" if name in ("data_wait", "mfu") else f"{value:.4g}"
            parts.append(f"{labels.get(name, name)} {shown}")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """`1:02:03` or `02:03`."""
    whole = int(max(seconds, 0))
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes:02d}:{whole % 60:02d}"


_LINES = 10  # of `progress` where there is no terminal


@contextmanager
def progress(total: int, what: str, unit: str) -> Iterator[Callable[[int], None]]:
    """Something to tell how many of `total` are done: a bar on a terminal, lines elsewhere."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total, desc=what, unit=unit, file=sys.stderr) as bar:

            def move(done: int) -> None:
                bar.update(done - bar.n)

            yield move
        return
    begun, said = time.perf_counter(), 0
    every = max(1, total // _LINES)

    def tell(done: int) -> None:
        nonlocal said
        if done >= said + every or (done == total and done > said):
            said = done
            left = (time.perf_counter() - begun) / done * (total - done)
            LOG.info("%s: %d of %d, ETA %s", what, done, total, duration(left))

    yield tell


@contextmanager
def announced(what: str, *, closing: bool = True) -> Iterator[None]:
    """Say that something long goes on (`compiling train step …, 41 s`): counting on a terminal,
    a line before it elsewhere, and with `closing` a line after it with the seconds it took."""
    begun = time.perf_counter()
    terminal = sys.stderr.isatty()
    done = threading.Event()

    def count() -> None:
        while not done.wait(1.0):
            sys.stderr.write(f"\r{what} …, {time.perf_counter() - begun:.0f} s ")
            sys.stderr.flush()

    ticker = threading.Thread(target=count, daemon=True) if terminal else None
    if ticker is not None:
        ticker.start()
    else:
        LOG.info("%s …", what)
    try:
        yield
    finally:
        done.set()
        if ticker is not None:
            ticker.join()
            sys.stderr.write("\r\x1b[K")
    if closing:
        LOG.info("%s …, %.1f s", what, time.perf_counter() - begun)
