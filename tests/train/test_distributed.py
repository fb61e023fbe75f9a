"""Several processes: how they find each other, agree, stop together, and what ends all of them.

The processes run on this machine and stand for hosts. Jobs that only wait for a timeout run side
by side; `tests/train/test_processes.py` holds training itself against one process.
"""

from __future__ import annotations

import http.server
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from tests.train.hosts import Job, free_port, until
from train import distributed
from train.agreement import Item, compare
from train.distributed import Launch, Wanted, find_launch
from train.exits import ExitCode, UsageError
from train.rendezvous import StartError, meet
from train.workdir import Lock

# Does this process belong to a job?


def test_alone_where_nothing_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "tpu_attached", lambda: False)
    assert find_launch(Wanted(), {}) is None
    assert find_launch(Wanted(), {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}) is None  # a notebook
    assert find_launch(Wanted(), {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}) is None
    assert find_launch(Wanted(count=1), {}) is None


def test_flags_come_before_the_environment() -> None:
    environment = {
        "JAXMODS_COORDINATOR": "w0", "JAXMODS_NUM_PROCESSES": "4", "JAXMODS_PROCESS_ID": "2"
    }  # fmt: skip
    launch = find_launch(Wanted(), environment)
    assert launch == Launch("w0:8476", 4, 2, "flags or environment")
    launch = find_launch(Wanted(coordinator="w9:99", index=3), environment)
    assert launch == Launch("w9:99", 4, 3, "flags or environment")
    assert find_launch(Wanted(off=True), environment) is None
    assert find_launch(Wanted(), {**environment, "JAXMODS_NO_DISTRIBUTED": "1"}) is None
    launch = find_launch(Wanted(), {**environment, "JAXMODS_COORDINATOR_PORT": "77"})
    assert launch is not None
    assert launch.coordinator == "w0:77"


@pytest.mark.parametrize(
    ("given", "address"),
    [("h", "h:8476"), ("h:1", "h:1"), ("[::1]", "[::1]:8476"), ("[::1]:5", "[::1]:5")],
)
def test_forms_of_an_address(given: str, address: str) -> None:
    launch = find_launch(Wanted(given, 2, 0), {})
    assert launch is not None
    assert launch.coordinator == address


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (Wanted(count=2), r"--coordinator HOST:PORT \(JAXMODS_COORDINATOR\) and --process-id"),
        (Wanted("h", 2, 2), "--process-id from 0 to 1 for --num-processes 2, found 2"),
        (Wanted("::1", 2, 0), r"expected HOST:PORT, found ::1.*in brackets"),
        (Wanted("h:70000", 2, 0), "expected HOST:PORT"),
    ],
)
def test_what_cannot_be_is_refused(wanted: Wanted, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        find_launch(wanted, {})


def test_slurm_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "tpu_attached", lambda: False)
    variables = {
        "SLURM_JOB_ID": "4097",
        "SLURM_STEP_NODELIST": "node[007-008]",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": "1",
        "SLURM_LOCALID": "0",
        "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert find_launch(Wanted()) == Launch("node007:61441", 2, 1, "Slurm")
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "2")  # one process for each GPU
    launch = find_launch(Wanted())
    assert launch is not None
    assert launch.local_devices == (0,)


ATTRIBUTES = {
    "agent-worker-number": "2",
    "worker-network-endpoints": ",".join(f"u:u:10.0.0.{i}" for i in range(4)),
    "tpu-env": "ACCELERATOR_TYPE: 'v5p-32'\n",
}


class _Metadata(http.server.BaseHTTPRequestHandler):
    """The part of a cloud machine's metadata service that is asked for."""

    def do_GET(self) -> None:
        value = ATTRIBUTES.get(self.path.rpartition("/")[2])
        self.send_response(200 if value is not None else 404)
        self.end_headers()
        self.wfile.write((value or "").encode())

    def log_message(self, *arguments: Any) -> None:
        del arguments


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A TPU VM, as far as JAX's detection can tell."""
    from jax._src.clusters import cloud_tpu_cluster

    server = http.server.ThreadingHTTPServer(("localhost", 0), _Metadata)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("GCE_METADATA_IP", f"localhost:{server.server_port}")
    monkeypatch.setenv("JAX_PLATFORMS", "")
    monkeypatch.setenv("JAX_COORDINATOR_PORT", "")
    for name in ("JAX_PLATFORMS", "JAX_COORDINATOR_PORT", "TPU_SKIP_MDS_QUERY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(distributed, "tpu_attached", lambda: True)
    yield
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.usefixtures("metadata")
def test_tpu_pods_are_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_launch(Wanted()) == Launch("10.0.0.0:8476", 4, 2, "TPU")
    # GKE: the environment names the hosts, and the slices of a job of several.
    for name, value in {
        "TPU_WORKER_HOSTNAMES": "127.0.0.1,127.0.0.2",
        "TPU_WORKER_ID": "1",
        "TPU_SKIP_MDS_QUERY": "true",
        "MEGASCALE_COORDINATOR_ADDRESS": "localhost",
        "MEGASCALE_NUM_SLICES": "3",
        "MEGASCALE_SLICE_ID": "2",
    }.items():
        monkeypatch.setenv(name, value)
    assert find_launch(Wanted()) == Launch("localhost:8476", 6, 5, "TPU on GKE")
    for name in ("TPU_WORKER_HOSTNAMES", "MEGASCALE_NUM_SLICES"):
        monkeypatch.setenv(name, "localhost" if name.startswith("TPU") else "1")
    monkeypatch.setenv("TPU_WORKER_ID", "0")
    monkeypatch.setenv("MEGASCALE_SLICE_ID", "0")
    assert find_launch(Wanted()) is None  # a slice of one host


# Do all come?


def meet_all(
    members: Sequence[tuple[int, int]], timeout: float = 1.0, names: Sequence[str] = ()
) -> list[Any]:
    """What `meet` gives to each of `(count, index)`, or its error."""
    address, results = f"localhost:{free_port()}", [None] * len(members)

    def one(place: int) -> None:
        count, index = members[place]
        try:
            results[place] = meet(address, count, index, timeout=timeout, names=names)
        except StartError as error:
            results[place] = error

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(members))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_all_meet_and_know_each_other() -> None:
    results = meet_all([(3, 2), (3, 0), (3, 1)], timeout=30.0)
    assert results[0] == results[1] == results[2]
    assert [m.index for m in results[0]] == [0, 1, 2]
    assert max(abs(m.ahead) for m in results[0]) < 10.0


def test_who_is_missing_is_named_on_every_host() -> None:
    for error in meet_all([(3, 0), (3, 1)], names=["w0", "w1", "w2"]):
        assert error.code == ExitCode.HOST_LOST
        assert "1 of 3 processes did not come" in str(error)
        assert "process 2 (w2)" in str(error)
        assert "8470, 8471, 8474 and 8476" in str(error)


def test_without_process_0_the_reason_is_said() -> None:
    (error,) = meet_all([(2, 1)])
    assert "could not reach process 0" in str(error)
    assert "connection refused" in str(error)
    assert "hosts that all believe to be process 0" in str(error)


def test_one_number_for_two_is_refused() -> None:
    for error in meet_all([(3, 0), (3, 1), (3, 1)], timeout=5.0):
        assert "two processes call themselves process 1" in str(error)
    for error in meet_all([(2, 0), (3, 1)], timeout=5.0):
        assert "expected 2 processes on every host" in str(error)
    errors = meet_all([(2, 0), (2, 0)])
    assert sum("believes to be process 0" in str(e) for e in errors) == 1
    assert sum("process 1" in str(e) for e in errors) == 1


# Do all agree?


def test_the_host_that_differs_is_named_with_both_values() -> None:
    def host(code: str, data: str) -> list[Item]:
        return [Item("code", code, "install it"), Item("data", data, "copy it")]

    names = ["0 (w0)", "1 (w1)", "2 (w2)"]
    assert compare([host("a", "x")] * 3, names) == ""
    text = compare([host("old", "x"), host("new", "x"), host("new", "y")], names)
    assert "code: process 0 (w0): expected new, found old; install it" in text
    assert "data: process 2 (w2): expected x, found y; copy it" in text
    assert len(text.splitlines()) == 3
    tie = compare([host("a", "x"), host("b", "x")], names[:2])
    assert "process 1 (w1): expected a, found b" in tie


FIT = ["-m", "train", "fit", "tests.train.toy:regression", "--no-report"]


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Job]]:
    """Jobs of the real command that must not begin, side by side."""
    folder = tmp_path_factory.mktemp("refused")
    workdir = ["--workdir", str(folder / "run")]

    def settings(index: int) -> list[str]:
        return ["--set", "optim.lr=0.5"] if index == 1 else []

    def elsewhere(index: int) -> list[str]:
        return ["--workdir", str(folder / f"run.{index}")]

    busy = ["--workdir", str(folder / "busy")]
    with (
        Lock(folder / "busy"),
        Job(folder / "differ", 2, [*FIT, *workdir], own=settings) as differ,
        Job(folder / "apart", 2, FIT, own=elsewhere) as apart,
        Job(folder / "second", 2, [*FIT, *busy]) as second,
    ):
        yield {"differ": differ, "apart": apart, "second": second}


def test_another_recipe_on_one_host_is_refused(refused: dict[str, Job]) -> None:
    job = refused["differ"]
    assert job.codes() == [1, 1], job.everything()
    for index in range(2):
        assert "the hosts of this job do not agree" in job.output(index)
        assert "recipe: process 1 (" in job.output(index)
    assert not (job.folder.parent / "run").exists()


def test_a_folder_that_is_not_shared_is_refused(refused: dict[str, Job]) -> None:
    job = refused["apart"]
    assert job.codes() == [1, 1], job.everything()
    for index in range(2):
        assert "is not one folder for all hosts" in job.output(index)
        assert "not seen by process 1 (" in job.output(index)
    assert not list((job.folder.parent / "run.0").glob(".shared-*"))
    assert not (job.folder.parent / "run.1").exists()


def test_a_second_job_in_one_folder_is_refused(refused: dict[str, Job]) -> None:
    job = refused["second"]
    assert job.codes() == [1, 1], job.everything()
    for index in range(2):
        assert f"in use by process {os.getpid()} on" in job.output(index)
    assert "process 0 (" in job.output(1)


# What ends one of them ends all.

TIMEOUT = 8.0  # seconds, in place of 30: the jobs wait for it
SIXTY = 60.0  # what is promised, with the timeout of 30


@pytest.fixture(scope="module")
def struck(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Job]]:
    """Jobs that run until something happens to one of their processes, side by side."""
    folder = tmp_path_factory.mktemp("struck")
    sizes = {"killed": 3, "first killed": 2, "stopped": 2, "first stopped": 2, "asked": 2}
    sizes |= {"bad data": 3, "bug": 2}
    jobs = {}
    try:
        for name, size in sizes.items():
            place = folder / name.replace(" ", "_")
            command = ["-m", "tests.train.member", str(place)]
            jobs[name] = Job(place, size, command, JAXMODS_HOST_TIMEOUT=str(TIMEOUT))
        for name, job in jobs.items():
            marks = [job.folder / f"at.{i}" for i in range(job.count)]
            until(lambda marks=marks: all(m.exists() for m in marks), f"{name} begins")
        jobs["killed"].strike(1, signal.SIGKILL)
        jobs["first killed"].strike(0, signal.SIGKILL)
        jobs["stopped"].strike(1, signal.SIGSTOP)
        jobs["first stopped"].strike(0, signal.SIGSTOP)
        jobs["asked"].strike(1, signal.SIGTERM)
        (jobs["bad data"].folder / "fail.1").write_text("data")
        (jobs["bug"].folder / "fail.0").write_text("bug")
        yield jobs
    finally:
        for job in jobs.values():
            job.__exit__(None, None, None)


@pytest.mark.parametrize(("name", "victim"), [("killed", 1), ("first killed", 0)])
def test_a_killed_process_is_named_by_the_others(
    struck: dict[str, Job], name: str, victim: int
) -> None:
    job = struck[name]
    others = [i for i in range(job.count) if i != victim]
    codes = job.codes()
    assert {codes[i] for i in others} == {11}, job.everything()
    assert codes[victim] == -signal.SIGKILL
    for index in others:
        assert f"host lost: process {victim} (" in job.output(index)
        assert f"pid {job.processes[victim].pid}" in job.output(index)


@pytest.mark.parametrize(("name", "victim"), [("stopped", 1), ("first stopped", 0)])
def test_a_process_that_hangs_is_named_by_the_others(
    struck: dict[str, Job], name: str, victim: int
) -> None:
    job = struck[name]
    codes = job.codes(victim)
    assert codes[1 - victim] == 11, job.everything()
    assert codes[victim] is None  # it still hangs
    said = job.output(1 - victim)
    assert f"host lost: process {victim} (" in said
    assert f"no sign of life for {TIMEOUT:.0f} s" in said


def test_a_signal_to_one_stops_all_at_one_step(struck: dict[str, Job]) -> None:
    job = struck["asked"]
    assert job.codes() == [10, 10], job.everything()
    step = (job.folder / "at.0").read_text()
    for index in range(2):
        assert f"stopped at {step} by SIGTERM on process 1 (" in job.output(index)


def test_the_failure_of_one_is_that_of_all(struck: dict[str, Job]) -> None:
    job = struck["bad data"]
    assert job.codes() == [14, 14, 14], job.everything()
    assert "3 of 4 records are bad" in job.output(1)
    for index in (0, 2):
        assert "process 1 (" in job.output(index)
        assert "failed: DataError: 3 of 4 records are bad" in job.output(index)
    assert "The first traceback of this job, of process 1" in job.output(0)
    assert "raise failures[order.read_text()]" in job.output(0)


def test_the_failure_of_process_0_reaches_the_others_before_its_store_goes(
    struck: dict[str, Job],
) -> None:
    job = struck["bug"]
    assert job.codes() == [1, 1], job.everything()
    assert "process 0 (" in job.output(1)
    assert "failed: KeyError: 'left'" in job.output(1)
    assert "Traceback" in job.output(0)


def test_the_promise_of_sixty_seconds() -> None:
    """Detection, and the patience after it, with the timeout that users have."""
    from train import peers, watchdog

    worst = peers.host_timeout() + 3 * watchdog.BEAT + watchdog.GRACE + watchdog.FAREWELL
    assert worst < SIXTY
