"""What runs on the hosts: two folders play them, and everything sent there is really executed."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.tpu_scripts.stand_ins import COMMIT, ROOT, SETTINGS, Machine
from tests.tpu_scripts.test_commands import AWKWARD

HOSTS = ("w-0", "w-1")
NAME = "clip-base"
# Prints, saves when told to stop, and ends as the host's own file `behave` says.
_JAXMODS = r"""#!/usr/bin/env bash
printf '%s\0' "$@" > "$HOME/arguments"
trap 'echo "saved"; exit 10' TERM
echo "12:00:00 step 1"
[[ ! -e $HOME/behave ]] || . "$HOME/behave"
while :; do sleep 0.05; done
"""
_SETUP = r"""set -e
cd "$(dirname "${BASH_SOURCE[0]}")"
mkdir -p .venv/bin
cp jaxmods_stand_in .venv/bin/jaxmods
echo "$1 $PYTHON" >> .venv/installed
"""


@pytest.fixture
def machine(machine: Machine) -> Iterator[Machine]:
    """With two hosts; what still runs on them is killed at the end."""
    code = machine.folder / "code"
    (code / "tpu_scripts").mkdir()
    for name in ("host.sh", "earliest.awk"):
        shutil.copy(ROOT / "tpu_scripts" / name, code / "tpu_scripts")
    (code / "setup.sh").write_text(_SETUP, encoding="utf-8")
    (code / "jaxmods_stand_in").write_text(_JAXMODS, encoding="utf-8")
    (code / "jaxmods_stand_in").chmod(0o755)
    for host in HOSTS:
        (machine.folder / "hosts" / host).mkdir()
    record = '#!/usr/bin/env bash\necho "$*" >> "$HOME/${0##*/}"\n'
    machine.program("hostname", '#!/usr/bin/env bash\necho "${HOME##*/}"\n')
    machine.program("sudo", '#!/usr/bin/env bash\nexec "$@"\n')
    machine.program("mountpoint", "#!/usr/bin/env bash\n[[ -e $HOME/gcsfuse ]]\n")
    machine.program("gcsfuse", record)
    yield machine
    for path in machine.folder.glob("hosts/*/jaxmods/runs/*/child"):
        try:
            os.kill(int(path.read_text(encoding="utf-8")), signal.SIGKILL)
        except ProcessLookupError:
            continue


def run(machine: Machine, verb: str, *words: str) -> subprocess.CompletedProcess[str]:
    return machine.run("vm", verb, *words, f"--mount={machine.folder}/bucket")


def host(machine: Machine, name: str) -> Path:
    return machine.folder / "hosts" / name


def behave(machine: Machine, name: str, commands: str) -> None:
    (host(machine, name) / "behave").write_text(commands, encoding="utf-8")


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "waited 60 s"
        time.sleep(0.02)


def ended(machine: Machine) -> bool:
    return all((host(machine, h) / f"jaxmods/runs/{NAME}/exit").exists() for h in HOSTS)


def began(log: Path) -> bool:
    return log.read_text(encoding="utf-8").endswith("step 1\n")


def test_a_run_from_start_to_resume(machine: Machine) -> None:
    words = ("fgclip/tiny", "--set", f"data.path={AWKWARD}", "steps=3")
    launched = run(machine, "launch", *words)
    assert launched.returncode == 0, launched.stderr
    workdir = f"{machine.folder}/bucket/runs/{NAME}"
    for name in HOSTS:
        home = host(machine, name)
        until(functools.partial(began, home / "jaxmods/runs" / NAME / "log"))
        given = (home / "arguments").read_text(encoding="utf-8").split("\0")[:-1]
        assert given == [
            *("fit", "fgclip/tiny", "--workdir", workdir),
            *("--set", f"data.path={AWKWARD}", "steps=3"),
        ]
        assert (home / "jaxmods/code/COMMIT").read_text(encoding="utf-8") == f"{COMMIT}\n"
        mounted = (home / "gcsfuse").read_text(encoding="utf-8").split()
        assert mounted[-2:] == ["my-bucket", f"{machine.folder}/bucket"]
    assert not list(machine.folder.rglob("pwned"))

    # It goes on without the connection, and a second start is refused by every host.
    again = run(machine, "launch", *words)
    assert again.returncode == 3
    for name in HOSTS:
        assert f"{name}: error: {NAME} is running here" in again.stderr
    shown = run(machine, "status")
    assert shown.stdout.count(f": {NAME} running, ") == len(HOSTS)
    assert shown.stdout.count("Z 12:00:00 step 1") == len(HOSTS)

    # Stopping saves; the exit code says so; the log is in the run folder.
    assert run(machine, "stop").returncode == 0
    until(lambda: ended(machine))
    followed = run(machine, "logs")
    assert followed.returncode == 10
    assert "exit code 10: preempted, state saved: resume" in followed.stdout
    assert followed.stdout.count(" saved\n") == len(HOSTS)
    copies = sorted((machine.folder / "bucket/runs" / NAME / "hosts").iterdir())
    assert [copy.name.split(".")[0] for copy in copies] == list(HOSTS)
    assert copies[0].read_text(encoding="utf-8").endswith("Z saved\n")
    assert run(machine, "stop").stdout.count("nothing is running") == len(HOSTS)

    # The same command again; the log before is kept; the environment is not made anew.
    assert run(machine, "resume", *words).returncode == 0
    for name in HOSTS:
        runs = host(machine, name) / "jaxmods/runs" / NAME
        until(functools.partial(began, runs / "log"))
        assert len(list(runs.glob("log.before-*"))) == 1
        installed = host(machine, name) / "jaxmods/code/.venv/installed"
        assert installed.read_text(encoding="utf-8").startswith("tpu ")


def test_the_earliest_failure_is_shown(machine: Machine) -> None:
    go = machine.folder / "go"
    wait = f"until [[ -e {go} ]]; do sleep 0.02; done\n"
    cause = 'Traceback (most recent call last):\n  File "a.py", line 1\nValueError: the cause'
    behave(machine, "w-1", f"{wait}cat <<'END'\n{cause}\nEND\nexit 1\n")
    behave(machine, "w-0", f"{wait}sleep 0.5; echo 'jaxmods: host w-1 was lost'; exit 11\n")
    assert run(machine, "launch", "fgclip/tiny").returncode == 0
    follower = subprocess.Popen(
        [ROOT / "tpu_scripts/vm.sh", "logs", "--settings", SETTINGS],
        env=machine.environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    go.touch()  # while somebody follows
    out, _ = follower.communicate(timeout=30)
    assert follower.returncode in (1, 11)
    assert "w-1 exit code 1\n" in out
    assert "w-0 exit code 11\n" in out
    shown = out[out.index("earliest failure: w-1") :].splitlines()
    assert shown[1:] == [f"  {line}" for line in cause.splitlines()]
    assert "exit code 11: another host was lost: resume" in run(machine, "status").stdout


def test_signals_to_the_whole_machine_arrive_once(machine: Machine) -> None:
    # A machine that shuts down sends SIGTERM to every process, the supervisor included.
    counts = "count=0; trap 'count=$((count + 1))' TERM\n"
    waits = "echo counting; for i in {1..20}; do sleep 0.05; done\n"
    behave(machine, "w-0", f'{counts}{waits}echo "signals $count"; exit $((9 + count))\n')
    behave(machine, "w-1", "exit 0\n")
    assert run(machine, "launch", "fgclip/tiny").returncode == 0
    runs = host(machine, "w-0") / "jaxmods/runs" / NAME
    until((runs / "child").exists)
    # Not "step 1": until the trap above is set, a signal ends the stand-in by its first one.
    until(lambda: "counting" in (runs / "log").read_text(encoding="utf-8"))
    group = os.getpgid(int((runs / "pid").read_text(encoding="utf-8")))
    assert group != os.getpgid(0)  # a session of its own
    os.killpg(group, signal.SIGTERM)
    until(lambda: ended(machine))
    assert (runs / "exit").read_text(encoding="utf-8") == "10\n"
    assert (runs / "log").read_text(encoding="utf-8").endswith(" signals 1\n")


def test_a_start_that_gcloud_repeats_is_no_error(machine: Machine) -> None:
    assert run(machine, "launch", "fgclip/tiny").returncode == 0
    start = machine.calls()[-1]
    (command,) = (w.removeprefix("--command=") for w in start if w.startswith("--command="))
    home = host(machine, "w-0")
    log = home / f"jaxmods/runs/{NAME}/log"
    until(lambda: began(log))
    environment = {**machine.environment(), "HOME": str(home)}

    def repeat(text: str) -> subprocess.CompletedProcess[str]:
        words = ["bash", "-c", text]
        return subprocess.run(
            words, env=environment, cwd=home, capture_output=True, text=True, check=False
        )

    assert repeat(command).returncode == 0
    other = repeat(command.replace("fgclip/tiny", "fgclip/other"))
    assert other.returncode == 3
    assert f"{NAME} is running here already" in other.stderr
    assert log.read_text(encoding="utf-8").count("step 1") == 1
