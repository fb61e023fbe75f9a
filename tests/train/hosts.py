"""Jobs of several processes on this machine, one per host that they stand for."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port: int = probe.getsockname()[1]
        return port


class Job:
    """`count` processes of one command, started together; none of them outlives the block.

    Args:
      command: after the interpreter; `--coordinator` and so on are appended. own: further
        arguments of process i. environment: added to this one's.
    """

    def __init__(
        self,
        folder: Path,
        count: int,
        command: Sequence[str],
        *,
        own: Callable[[int], Sequence[str]] = lambda index: (),
        **environment: str,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.count = folder, count
        settings = {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "JAXMODS_START_TIMEOUT": "240"}
        address = f"localhost:{free_port()}"
        self.processes: list[subprocess.Popen[bytes]] = []
        for index in range(count):
            flags = ["--coordinator", address, "--num-processes", str(count)]
            with (folder / f"output.{index}").open("wb") as output:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, *command, *own(index), *flags, "--process-id", str(index)],
                        cwd=ROOT,
                        env={**os.environ, **settings, **environment},
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                )

    def __enter__(self) -> Job:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def output(self, index: int) -> str:
        """What process `index` has written so far."""
        return (self.folder / f"output.{index}").read_text(errors="replace")

    def strike(self, index: int, number: signal.Signals) -> None:
        """Send a signal to one of them."""
        self.processes[index].send_signal(number)

    def codes(self, *expected_to_stay: int, timeout: float = 240.0) -> list[int | None]:
        """Exit codes once all but `expected_to_stay` have ended (None for those)."""
        deadline = time.time() + timeout
        for index, process in enumerate(self.processes):
            if index not in expected_to_stay:
                process.wait(max(deadline - time.time(), 0.1))
        return [process.poll() for process in self.processes]

    def everything(self) -> str:
        """All outputs, to be shown when a test fails."""
        return "\n".join(f"--- {i}\n{self.output(i)}" for i in range(self.count))


def until(condition: Callable[[], bool], what: str, timeout: float = 240.0) -> None:
    """Wait for a condition. The timeout is for machines that are shared by many."""
    deadline = time.time() + timeout
    while not condition():
        assert time.time() < deadline, f"waited {timeout} s in vain: {what}"
        time.sleep(0.02)
