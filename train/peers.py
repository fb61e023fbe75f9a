"""The other processes of a job: signs of life, failures, and questions that all must answer alike.

Everything goes through the key-value store of JAX's coordination service, which lives in process 0.

    signs of life  every process writes one a second; process 0 watches them and publishes who is
                   lost; the others watch process 0
    failures       whatever ends a process is published with its traceback; the others stop with
                   its exit code and say which host failed and why
    stopping       a signal on one process becomes one step after which all of them stop
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax

from train.exits import ExitCode, UserError, classify
from train.rendezvous import Member
from train.watchdog import BEAT, FAREWELL, Verdict, Watchdog

LOG = logging.getLogger("train")

_SILENT = 30.0  # seconds without a sign of life after which a process counts as lost
_REFUSED = 5.0  # process 0 counts as lost when its service refuses for this long
_STALL_WARNING = 60.0  # others wait for a process that is alive but does not move
_STALL = 1200.0  # ... and give up
_TRACE = 20_000  # characters of a published traceback

# In messages of libraries when the other end of a collective has gone: the symptom, not the cause.
_SYMPTOMS = (
    "gloo", "nccl", "connection closed by peer", "connection reset", "socket closed", "unavailable",
    "heartbeat", "coordination", "deadline_exceeded", "barrier", "broken pipe", "megascale",
)  # fmt: skip


class PeerError(UserError):
    """Another process of the job was lost or failed; `code` is that of the cause."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(verdict.text)
        self.code = ExitCode(verdict.code)


class _Store:
    """A part of the key-value store of JAX's coordination service."""

    def __init__(self, client: Any, prefix: str) -> None:
        self._client, self._prefix = client, prefix

    def set(self, key: str, value: str) -> None:
        self._client.key_value_set(f"{self._prefix}/{key}", value, allow_overwrite=True)

    def get(self, key: str) -> str | None:
        try:
            return str(self._client.key_value_try_get(f"{self._prefix}/{key}"))
        except Exception as error:  # the client has one type for every failure
            if "NOT_FOUND" in str(error):
                return None
            raise

    def folder(self, name: str) -> dict[str, str]:
        """Values by the last part of their keys."""
        found = self._client.key_value_dir_get(f"{self._prefix}/{name}/")
        return {key.rpartition("/")[2]: value for key, value in found}


@dataclasses.dataclass
class _Sign:
    """The last sign of life of a process, and when it changed on our clock.

    Its text: `<a number that changes> <calls of stops_here> <what the main thread does>`.
    """

    at: float
    text: str = ""

    def hear(self, text: str) -> None:
        if text and text != self.text:
            self.text, self.at = text, time.monotonic()

    @property
    def ticks(self) -> int:
        return int(self.text.split(" ", 2)[1])

    @property
    def doing(self) -> str:
        return self.text.split(" ", 2)[2] if self.text else "starting"


@dataclasses.dataclass
class _Stall:
    """Who is behind the others, since when, and whether that was said."""

    who: tuple[int, ...] = ()
    ticks: int = 0
    since: float = 0.0
    said: bool = False


class Peers:
    """This process among `count`. Made by `session`; all processes make theirs at the same time.

    Process 0 here is the one that carries the store, which need not be `jax.process_index()` 0.

    Attributes:
      index, count: of this process, of all. members: who they are.
      stop_reason: after an agreed stop, what asked for it.
      doing: what the main thread does, for the message of those who wait for it.
      decided: set once there is a verdict. ending: set once the main thread is on its way out.
    """

    def __init__(self, number: int, members: tuple[Member, ...] | None) -> None:
        state = _runtime()
        self.index, self.count = int(state.process_id), int(state.num_processes)
        self.stop_reason: str | None = None
        self.doing = "starting"
        self.decided, self.ending = threading.Event(), threading.Event()
        self._limit = host_timeout()
        self._stall_limit = seconds("JAXMODS_STALL_TIMEOUT", _STALL)
        self._store = _Store(state.client, f"jaxmods/{number}")
        self._calls = 0
        self._moves = threading.Condition()
        self._ticks, self._hold, self._stop_at = 0, False, -1
        self._asked: str | None = None
        self._verdict: Verdict | None = None
        self._first_failure = 0.0  # when a failure was seen first
        self._store_lost = False
        self.members = self._meet() if members is None else members
        self._answered, self._refused = time.monotonic(), 0.0  # the store: last time, since when
        self._signs = [_Sign(self._answered) for _ in self.members]
        self._stall = _Stall()
        self._watchdog = Watchdog(self)

    def _meet(self) -> tuple[Member, ...]:
        me = Member(self.index, socket.gethostname(), os.getpid())
        return tuple(Member(**m) for m in self.gather(dataclasses.asdict(me)))

    @property
    def me(self) -> Member:
        """This process."""
        return self.members[self.index]

    # Questions that all must answer alike. Called by all processes in the same order.

    def gather(self, value: Any) -> list[Any]:
        """The JSON values of all processes, on all of them, in order."""
        found: list[Any] = json.loads(self.share(json.dumps(self.collect(value))))
        return found

    def collect(self, value: Any) -> list[Any]:
        """The JSON values of all processes on process 0, in order; an empty list elsewhere."""
        self._calls += 1
        folder = f"collect{self._calls}"
        self._store.set(f"{folder}/{self.index}", json.dumps(value))
        if self.index:
            return []
        found = self._poll(lambda: self._complete(folder))
        return [json.loads(found[str(i)]) for i in range(self.count)]

    def share(self, value: str) -> str:
        """The text of process 0, on all."""
        self._calls += 1
        key = f"share{self._calls}"
        if self.index == 0:
            self._store.set(key, value)
            return value
        return str(self._poll(lambda: self._store.get(key)))

    def wait(self) -> None:
        """Until all processes are here."""
        self.gather(None)

    def _complete(self, folder: str) -> dict[str, str] | None:
        found = self._store.folder(folder)
        return found if len(found) == self.count else None

    def _poll(self, read: Callable[[], Any]) -> Any:
        pause = 0.01
        while self._verdict is None:
            value = read()
            if value is not None:
                return value
            self.decided.wait(pause)
            pause = min(pause * 1.5, 0.5)
        raise PeerError(self._verdict)

    # Stopping together.

    def ask_to_stop(self, reason: str) -> None:
        """Ask all processes to stop. Safe in a signal handler."""
        self._asked = reason

    def stops_here(self) -> bool:
        """Whether all stop now. Called by all equally often; the answer is the same on all."""
        with self._moves:
            while self._hold and self._verdict is None:
                self._moves.wait(0.5)
            self._ticks += 1
            return 0 <= self._stop_at <= self._ticks

    def _agree_on_stop(self, news: dict[str, str]) -> None:
        """A turn of the talking thread. Everybody holds still and says how far it is; the call of
        `stops_here` after the furthest one is where all stop."""
        if self._asked is not None and "stop" not in news:
            self._store.set("news/stop", f"{self._asked} on process {self.me}")
        if "stop" not in news or self._stop_at >= 0:
            return
        if not self._hold:
            with self._moves:
                self._hold, ticks = True, self._ticks
            self.stop_reason = news["stop"]
            self._store.set(f"ticks/{self.index}", str(ticks))
        if self.index == 0 and "stop_at" not in news:
            everybody = self._complete("ticks")
            if everybody is not None:
                self._store.set("news/stop_at", str(max(map(int, everybody.values())) + 1))
        if "stop_at" in news:
            with self._moves:
                self._stop_at, self._hold = int(news["stop_at"]), False
                self._moves.notify_all()

    # Failures.

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Publish what ends the body, and raise the cause where it lies on another host. To be put
        inside of whatever closes files and waits for threads: others must not wait for that.

        Raises:
          PeerError: another process was lost or failed first.
        """
        try:
            yield
        except BaseException as error:
            if self.ending.is_set():
                raise  # settled further inside
            self.ending.set()
            self._settle_failure(error)
            raise

    def _settle_failure(self, error: BaseException) -> None:
        """Raise PeerError where `error` is the consequence of another host's failure."""
        if isinstance(error, PeerError):
            self._farewell()
            return
        text, code = f"{type(error).__name__}: {error}", classify(error)
        line = text.partition("\n")[0]
        known = isinstance(error, UserError) or code not in (ExitCode.ERROR, ExitCode.HOST_LOST)
        if known or not any(word in text.lower() for word in _SYMPTOMS):
            self._publish(error)
            self.decided.wait(3 * BEAT)  # somebody may have failed before
        else:
            LOG.warning("%s; looking for the host that caused it", line[:300])
            if not self.decided.wait(self.patience):
                self._publish(error)
        cause = self._verdict
        # From here on it may be necessary to wait for others that have gone: the watchdog's turn.
        self._decide(Verdict(line, int(code)))
        self._farewell()
        if cause is not None:
            raise PeerError(cause) from error

    def _publish(self, error: BaseException) -> None:
        facts = {
            "index": self.index,
            "time": time.time() - self.me.ahead,
            "code": int(classify(error)),
            "kind": type(error).__name__,
            "message": str(error),
            "trace": "".join(traceback.format_exception(error))[-_TRACE:],
        }
        with contextlib.suppress(Exception):  # the store may be what has gone
            self._store.set(f"news/failure{self.index}", json.dumps(facts))

    def _read_failures(self, news: dict[str, str]) -> None:
        found = [json.loads(v) for k, v in news.items() if k.startswith("failure")]
        if not found or self._verdict is not None:
            return
        self._first_failure = self._first_failure or time.monotonic()
        if time.monotonic() - self._first_failure < 1.5 * BEAT:
            return  # the report of an earlier one may still be on its way
        first = min(found, key=lambda f: f["time"])
        same = [f["index"] for f in found if f["kind"] == first["kind"]]
        if self.index in same:
            return  # it is ours, or all hosts met the same
        who = self.members[first["index"]]
        text = f"process {who} failed: {first['kind']}: {first['message']}"
        if self.index == 0:
            at = time.strftime("%H:%M:%S", time.localtime(first["time"]))
            text += f"\nThe first traceback of this job, of process {who} at {at}:\n"
            text += first["trace"].rstrip()
        self._decide(Verdict(text, first["code"]))

    def _decide(self, verdict: Verdict) -> None:
        if self._verdict is None:
            self._verdict = verdict
            self.decided.set()
            with self._moves:
                self._moves.notify_all()

    def _farewell(self) -> None:
        """Process 0 carries the store: it stays until the others know why the job ends."""
        if self._store_lost:
            return
        with contextlib.suppress(Exception):
            self._store.set(f"knows/{self.index}", "")
            deadline = time.monotonic() + FAREWELL
            while self.index == 0 and time.monotonic() < deadline:
                news = self._store.folder("news")
                lost = json.loads(news["lost"])["who"] if "lost" in news else []
                known = {int(k) for k in self._store.folder("knows")}
                if len(known | set(lost)) >= self.count:
                    return
                time.sleep(0.1)

    # Signs of life: what the watchdog calls.

    @property
    def verdict(self) -> Verdict | None:
        """Why this process has to end; None while all is well."""
        return self._verdict

    @property
    def patience(self) -> float:
        """Seconds after which it is certain to be known that another process has gone."""
        return self._limit + 3 * _REFUSED

    def talk(self) -> float:
        """One exchange with the store. Returns the seconds until the next one."""
        sign = f"{time.monotonic():.1f} {self._ticks} {self.doing}"
        self._store.set(f"signs/{self.index}" if self.index else "news/sign", sign)
        news = self._store.folder("news")
        self._answered, self._refused = time.monotonic(), 0.0
        self._signs[0].hear(news.get("sign", ""))
        self._agree_on_stop(news)
        self._read_failures(news)
        if self.index == 0:
            self._look_around(news)
        elif "lost" in news:
            self._decide(Verdict(json.loads(news["lost"])["text"], ExitCode.HOST_LOST))
        if self._verdict is not None:
            self._store.set(f"knows/{self.index}", "")
        return 0.05 if self._hold else BEAT

    def talk_failed(self) -> None:
        """The store did not answer."""
        self._refused = self._refused or time.monotonic()

    def judge(self, *, paused: bool) -> None:
        """Has process 0 gone? `paused`: this process itself stood still, ages mean nothing."""
        now, first = time.monotonic(), self._signs[0]
        if paused:
            self._answered, self._refused = now, 0.0
            for sign in self._signs:
                sign.at = now
        if self.index == 0 or self._verdict is not None:
            return
        if self._refused and now - self._refused > _REFUSED:
            what = "has gone, it no longer accepts connections"
        elif now - min(self._answered, first.at) > self._limit:
            what = self._silence
        else:
            return
        self._store_lost = True
        self._decide(Verdict(self._lost([0], what), ExitCode.HOST_LOST))

    def _look_around(self, news: dict[str, str]) -> None:
        """Process 0: publish who is lost, say who is waited for."""
        for name, text in self._store.folder("signs").items():
            self._signs[int(name)].hear(text)
        if "lost" in news or any(k.startswith("failure") for k in news):
            return
        now = time.monotonic()
        silent = [i for i, s in enumerate(self._signs) if i and now - s.at > self._limit]
        if silent:
            self._lose(silent, self._silence)
        elif all(s.text for s in self._signs):
            self._look_for_stalls(now)

    def _look_for_stalls(self, now: float) -> None:
        least = min(s.ticks for s in self._signs)
        behind = tuple(i for i, s in enumerate(self._signs) if s.ticks == least)
        stall = self._stall
        if len(behind) == self.count or (stall.who, stall.ticks) != (behind, least):
            self._stall = _Stall(behind, least, now)
        elif now - stall.since > self._stall_limit:
            what = f"is alive but has not moved for {now - stall.since:.0f} s while others wait"
            self._lose(list(behind), what)
        elif now - stall.since > _STALL_WARNING and not stall.said:
            stall.said = True
            who = ", ".join(f"process {self.members[i]}, {self._signs[i].doing}" for i in behind)
            LOG.warning("the others have been waiting %.0f s for %s", now - stall.since, who)

    @property
    def _silence(self) -> str:
        return f"has given no sign of life for {self._limit:.0f} s"

    def _lose(self, who: list[int], what: str) -> None:
        text = self._lost(who, what)
        self._store.set("news/lost", json.dumps({"who": who, "text": text}))
        self._decide(Verdict(text, ExitCode.HOST_LOST))

    def _lost(self, who: list[int], what: str) -> str:
        named = "; ".join(
            f"process {m}, pid {m.pid}, last seen {self._signs[m.index].doing}"
            for m in (self.members[i] for i in who)
        )
        return (
            f"host lost: {named}: {what}. It was killed, its machine is gone, or it hangs; look at "
            "its own log. The same command on all hosts continues from the last checkpoint"
        )

    def close(self) -> None:
        """Leave together: wait for all, then stop watching."""
        self.doing = "done"
        self.wait()
        self._watchdog.stop()

    def abandon(self) -> None:
        """Stop watching without waiting for anybody."""
        self._watchdog.stop()


def seconds(name: str, default: float) -> float:
    """A setting of the environment in seconds.

    Raises:
      UserError: not a positive number.
    """
    text = os.environ.get(name)
    try:
        value = float(text) if text else default
    except ValueError:
        value = 0.0
    if value <= 0:
        raise UserError(f"{name}: expected seconds, more than 0, found {text!r}")
    return value


def host_timeout() -> float:
    """Seconds without a sign of life after which a process counts as lost."""
    return seconds("JAXMODS_HOST_TIMEOUT", _SILENT)


def _runtime() -> Any:
    from jax._src import distributed  # its store and numbers have no public name

    return distributed.global_state


_CURRENT: Peers | None = None
_NUMBER = 0


def current() -> Peers | None:
    """The peers of this process inside a `session`; None where it is alone."""
    return _CURRENT


def number() -> int:
    """The number of this process, 0 where it is alone: that of its log and of all messages."""
    return jax.process_index() if _CURRENT is None else _CURRENT.index


def leads() -> bool:
    """Whether this is the process that writes what only one of them may write."""
    return number() == 0


def guarded(peers: Peers | None) -> contextlib.AbstractContextManager[None]:
    """`peers.guard()`, or nothing for a process that is alone."""
    return contextlib.nullcontext() if peers is None else peers.guard()


@contextlib.contextmanager
def session(members: tuple[Member, ...] | None = None) -> Iterator[Peers | None]:
    """Watch the other processes during the body. All processes enter and leave it together; inside
    another session, or alone, it does nothing.

    Args:
      members: who they are, where it is known already.

    Raises:
      PeerError: in place of whatever another process caused here.
    """
    global _CURRENT, _NUMBER
    if _CURRENT is not None or not jax.distributed.is_initialized() or _runtime().num_processes < 2:
        yield _CURRENT
        return
    _NUMBER += 1
    peers = _CURRENT = Peers(_NUMBER, members)
    try:
        with peers.guard():
            yield peers
            peers.close()
    finally:
        peers.abandon()
        _CURRENT = None
