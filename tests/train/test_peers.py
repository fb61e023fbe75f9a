"""Rules by which processes judge each other, with a store in memory and a clock that is set."""

from __future__ import annotations

import time
import types
from typing import Any

import pytest

from train import checkpoint, peers
from train.exits import ExitCode, UserError
from train.peers import PeerError, Peers
from train.rendezvous import Member

MEMBERS = tuple(Member(i, f"w{i}", 100 + i) for i in range(3))


class Store:
    """The part of JAX's key-value store that is used."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}

    def key_value_set(self, key: str, value: str, allow_overwrite: bool) -> None:
        assert allow_overwrite
        self.values[key] = value

    def key_value_try_get(self, key: str) -> str:
        if key not in self.values:
            raise RuntimeError(f"NOT_FOUND: {key}")
        return self.values[key]

    def key_value_dir_get(self, folder: str) -> list[tuple[str, str]]:
        return [(k, v) for k, v in self.values.items() if k.startswith(folder)]


class Clock:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.strftime, self.localtime = time.strftime, time.localtime

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(peers, "time", clock)
    return clock


@pytest.fixture
def three(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> list[Peers]:
    """Three processes that have just met; their threads are the test."""
    del clock
    store = Store()
    monkeypatch.setattr(peers, "Watchdog", lambda watched: None)
    made = []
    for index in range(3):
        state = types.SimpleNamespace(process_id=index, num_processes=3, client=store)
        monkeypatch.setattr(peers, "_runtime", lambda state=state: state)
        made.append(Peers(1, MEMBERS))
    return made


def pass_time(clock: Clock, seconds: float, *alive: Peers) -> None:
    """Let `alive` talk once a second, and judge."""
    for _ in range(int(seconds)):
        clock.now += 1.0
        for process in alive:
            process.talk()
        for process in alive:
            process.judge(paused=False)


def test_silence_is_noticed_and_named_by_all(clock: Clock, three: list[Peers]) -> None:
    pass_time(clock, 100, *three)
    assert [p.verdict for p in three] == [None] * 3
    three[2].doing = "at step 7"
    pass_time(clock, 1, *three)
    pass_time(clock, 29, *three[:2])
    assert [p.verdict for p in three] == [None] * 3
    pass_time(clock, 3, *three[:2])
    for process in three[:2]:
        assert process.verdict is not None
        assert process.verdict.code == ExitCode.HOST_LOST
        assert "process 2 (w2), pid 102, last seen at step 7" in process.verdict.text
        with pytest.raises(PeerError, match="host lost: process 2"):
            process.wait()


def test_process_0_is_judged_by_the_others(clock: Clock, three: list[Peers]) -> None:
    pass_time(clock, 5, *three)
    pass_time(clock, 28, *three[1:])  # its service answers, but it says nothing itself
    assert three[1].verdict is None
    pass_time(clock, 4, *three[1:])
    assert three[1].verdict is not None
    assert "process 0 (w0)" in three[1].verdict.text


def test_a_store_that_hangs_or_refuses_is_process_0_gone(clock: Clock, three: list[Peers]) -> None:
    pass_time(clock, 5, *three)
    three[1].talk_failed()
    for _ in range(6):
        clock.now += 1.0
        three[1].judge(paused=False)  # refused for six seconds
        three[2].judge(paused=False)  # its call has not come back
    assert three[1].verdict is not None
    assert "no longer accepts connections" in three[1].verdict.text
    assert three[2].verdict is None
    clock.now += 26.0
    three[2].judge(paused=False)
    assert three[2].verdict is not None


def test_a_process_that_stood_still_itself_blames_nobody(clock: Clock, three: list[Peers]) -> None:
    pass_time(clock, 5, *three)
    clock.now += 500.0
    for process in three:
        process.judge(paused=True)
        process.talk()
        process.judge(paused=False)
    assert [p.verdict for p in three] == [None] * 3


def test_who_is_waited_for_is_said_and_then_given_up(
    clock: Clock, three: list[Peers], caplog: pytest.LogCaptureFixture
) -> None:
    for process in three[:2]:
        assert not process.stops_here()
    three[2].doing = "at step 0, waiting for data"
    pass_time(clock, 50, *three)
    assert "waiting" not in caplog.text
    pass_time(clock, 20, *three)
    assert "for process 2 (w2), at step 0, waiting for data" in caplog.text
    assert caplog.text.count("have been waiting") == 1
    assert not three[2].stops_here()
    pass_time(clock, 2000, *three)  # all are equally far: a long compilation, for example
    assert three[0].verdict is None
    assert not three[0].stops_here()
    pass_time(clock, 1210, *three)
    assert three[1].verdict is not None
    assert "is alive but has not moved" in three[1].verdict.text
    assert "process 1 (w1)" in three[1].verdict.text


def test_all_stop_at_the_call_after_the_furthest(clock: Clock, three: list[Peers]) -> None:
    for count, process in zip((4, 5, 3), three, strict=True):
        assert not any(process.stops_here() for _ in range(count))
    three[1].ask_to_stop("SIGTERM")
    pass_time(clock, 6, *three)
    answers = [[p.stops_here() for _ in range(n)] for p, n in zip(three, (2, 1, 3), strict=True)]
    assert answers == [[False, True], [True], [False, False, True]]
    assert {p.stop_reason for p in three} == {"SIGTERM on process 1 (w1)"}


def failing(process: Peers, error: Exception) -> BaseException:
    """What the guard makes of an error."""
    with pytest.raises(Exception) as caught, process.guard():  # noqa: PT011 - any of them
        raise error
    return caught.value


def test_the_first_failure_counts_wherever_clocks_are(
    clock: Clock, three: list[Peers], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "BEAT", 0.001)
    pass_time(clock, 2, *three)
    first = KeyError("left")
    assert failing(three[1], first) is first
    clock.now += 0.5
    second = ValueError("right")
    failing(three[2], second)
    pass_time(clock, 3, *three)
    assert three[0].verdict is not None
    assert three[0].verdict.text.startswith("process 1 (w1) failed: KeyError: 'left'")
    assert "The first traceback of this job, of process 1 (w1)" in three[0].verdict.text
    assert "in failing" in three[0].verdict.text


def test_an_error_that_all_meet_stays_everybodys_own(clock: Clock, three: list[Peers]) -> None:
    for process in three:
        process.decided.set()  # do not wait for others
        assert isinstance(failing(process, UserError("a wrong setting")), UserError)
    pass_time(clock, 5, *three)
    assert all(p.verdict is not None and "wrong setting" in p.verdict.text for p in three)


def test_a_symptom_waits_for_its_cause(clock: Clock, three: list[Peers]) -> None:
    pass_time(clock, 2, *three)
    three[1]._publish(KeyError("left"))
    pass_time(clock, 3, three[0], three[2])
    found = failing(three[2], ValueError("UNKNOWN: Gloo AllGather failed: Connection closed"))
    assert isinstance(found, PeerError)
    assert "process 1 (w1) failed: KeyError" in str(found)
    published = [k for k in three[2]._store.folder("news") if k.startswith("failure")]
    assert published == ["failure1"]


def test_a_checkpoint_that_one_cannot_read_is_read_by_none(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    def gather(value: Any) -> list[Any]:
        told.append(value)
        return [None, value, "OSError: bad block"]

    fake = types.SimpleNamespace(gather=gather, members=MEMBERS)
    monkeypatch.setattr(checkpoint, "current", lambda: fake)
    with (
        pytest.raises(checkpoint.DamagedError, match=r"7 on process 2 \(w2\): OSError: bad block"),
        checkpoint.all_or_none("checkpoint 7"),
    ):
        pass
    with pytest.raises(ValueError, match="torn"), checkpoint.all_or_none("checkpoint 7"):
        raise ValueError("torn")
    assert told == [None, "ValueError: torn"]


@pytest.mark.parametrize("text", ["-1", "soon"])
def test_settings_of_the_environment_are_checked(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAXMODS_HOST_TIMEOUT", text)
    with pytest.raises(UserError, match=f"more than 0, found '{text}'"):
        peers.host_timeout()
