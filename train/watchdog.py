"""Ends a process whose job cannot go on, whatever its main thread is doing.

Collectives cannot be interrupted: a process that waits for a host that has gone waits for ever. One
thread talks to the other processes (`Peers.talk`), and another one judges (`Peers.judge`), because
the first one hangs itself when the store does not answer.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from typing import Protocol

LOG = logging.getLogger("train")

BEAT = 1.0  # seconds between two signs of life
GRACE = 5.0  # for the main thread to end by itself, once a verdict is known
FAREWELL = 12.0  # process 0 carries the store and stays this long for the others to hear why
_PAUSED = 5.0  # this much between two looks at the clock: this process itself stood still


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Why this process has to end, although it did nothing wrong itself. `code`: its exit code."""

    text: str
    code: int


class Watched(Protocol):
    """What the watchdog asks."""

    decided: threading.Event
    ending: threading.Event

    @property
    def verdict(self) -> Verdict | None:
        """Why this process has to end; None while all is well."""

    @property
    def patience(self) -> float:
        """Seconds after which a verdict is certain to be known when another process has gone."""

    def talk(self) -> float:
        """One exchange with the others. Returns the seconds until the next one."""

    def talk_failed(self) -> None:
        """The exchange raised, or JAX's client gave the connection up."""

    def judge(self, *, paused: bool) -> None:
        """Look at the clock. `paused`: this process stood still, so that ages mean nothing."""


class Watchdog:
    """The two threads, from the moment it is made until `stop`."""

    def __init__(self, watched: Watched) -> None:
        self._watched = watched
        self._stop = threading.Event()
        self._abort = _DelayedAbort(watched)
        self._threads = [
            threading.Thread(target=work, name=name, daemon=True)
            for name, work in (("peers-talk", self._talk), ("peers-judge", self._judge))
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop watching. The talking thread is left alone where nobody answers it."""
        if not self._stop.is_set():
            self._stop.set()
            for thread in self._threads:
                thread.join(2 * BEAT)
            self._abort.restore()

    def _talk(self) -> None:
        pause = 0.0
        while not self._stop.wait(pause):
            try:
                pause = self._watched.talk()
            except Exception:  # whatever the client raises: the judge decides what it means
                self._watched.talk_failed()
                pause = BEAT / 2

    def _judge(self) -> None:
        last, decided = time.monotonic(), 0.0
        while not self._stop.wait(0.5):
            now = time.monotonic()
            self._watched.judge(paused=now - last > _PAUSED)
            last = now
            verdict = self._watched.verdict
            if verdict is None:
                continue
            decided = decided or now
            if now - decided > GRACE + (FAREWELL if self._watched.ending.is_set() else 0.0):
                leave(verdict)


class _DelayedAbort:
    """Holds back `abort()` until the judge has spoken.

    When process 0 dies, JAX's client in C++ aborts every other process at once, without a name and
    with the code of a crash. The thread that aborts waits here for the verdict instead, and the
    process ends with the verdict's code; without one the abort goes on as it would have.
    """

    def __init__(self, watched: Watched) -> None:
        def handler(number: int) -> None:
            del number
            watched.talk_failed()
            if watched.decided.wait(watched.patience):
                time.sleep(2 * (GRACE + FAREWELL))  # the main thread or the judge ends us

        libc = ctypes.CDLL(None)
        libc.signal.restype = ctypes.c_void_p
        libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
        self._libc = libc
        self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(handler)
        self._old = libc.signal(signal.SIGABRT, ctypes.cast(self._handler, ctypes.c_void_p))

    def restore(self) -> None:
        """As it was."""
        self._libc.signal(signal.SIGABRT, self._old)


def leave(verdict: Verdict) -> None:
    """Say why and end this process now."""

    def say() -> None:
        LOG.error("%s", verdict.text)
        flush()

    speaker = threading.Thread(target=say, daemon=True)
    speaker.start()
    speaker.join(GRACE)  # a log on storage that has gone must not keep the process
    os._exit(verdict.code)


def flush() -> None:
    """Before `os._exit`: write out what is buffered, end worker processes."""
    for child in multiprocessing.active_children():
        child.kill()
    for handler in LOG.handlers:
        with contextlib.suppress(Exception):
            handler.flush()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
