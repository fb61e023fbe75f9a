"""All processes of a job find each other before JAX starts, and say who is missing.

Process 0 listens on the coordinator's port and every other process connects to it. When all are
there the port is given back and JAX's own coordination service takes it, so that only one port has
to be reachable. JAX itself would end a process whose partners do not come without naming them.

One line of JSON in each direction:

    → {"job": …, "index": 2, "count": 4, "host": "w2", "pid": 77, "clock": 1700000000.0}
    ← {"heard": true}
    ← {"members": […]}  or  {"error": "…"}
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import os
import socket
import time
from collections.abc import Sequence
from typing import Any

from train.exits import ExitCode, UserError

LOG = logging.getLogger("train")

_JOB = "jaxmods-1"  # protocol and version: anything else that connects is ignored
_ATTEMPT = 3.0  # seconds for one connection
_PAUSE = 0.25  # between two attempts
_REMIND = 15.0  # between two lines that say who is missing
_LINE = 1 << 20

CHECKS = (
    "Check that the command runs on every host with its own process number (hosts that all believe "
    "to be process 0 wait for each other for ever), that port {port} of the coordinator is open "
    "between the hosts (the automatic rule for TPU VMs opens 8470, 8471, 8474 and 8476), and the "
    "output of the missing hosts."
)


class StartError(UserError):
    """Processes of this job did not find each other."""

    code = ExitCode.HOST_LOST


@dataclasses.dataclass(frozen=True)
class Member:
    """A process of the job. `ahead`: its clock minus that of process 0, in seconds."""

    index: int
    host: str
    pid: int
    ahead: float = 0.0

    def __str__(self) -> str:
        return f"{self.index} ({self.host})"


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `host:port` (also `[::1]:8476`)."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def meet(
    address: str, count: int, index: int, *, timeout: float, names: Sequence[str] = ()
) -> tuple[Member, ...]:
    """Wait for all `count` processes at `address` (process 0 listens there).

    Args:
      timeout: seconds. names: host names by process, where the launcher knows them.

    Returns:
      All members, in order.

    Raises:
      StartError: not all came; who is missing, and what to check.
    """
    me = Member(index, socket.gethostname(), os.getpid())
    if index == 0:
        return _Meeting(address, count, me, names).hold(timeout)
    return _join(address, count, me, timeout)


class _Meeting:
    """Process 0's side."""

    def __init__(self, address: str, count: int, me: Member, names: Sequence[str]) -> None:
        self._count, self._names = count, names
        self._host, self._port = split_address(address)
        self._members = {0: me}
        self._open: dict[int, socket.socket] = {}
        self._last_reminder = time.monotonic()

    def hold(self, timeout: float) -> tuple[Member, ...]:
        """Listen until all are there."""
        deadline = time.monotonic() + timeout
        with contextlib.ExitStack() as stack:
            server = stack.enter_context(self._listen())
            stack.callback(self._hang_up)
            server.settimeout(0.2)
            while len(self._members) < self._count:
                if time.monotonic() > deadline:
                    self._refuse(self._missing(timeout))
                with contextlib.suppress(TimeoutError):
                    self._receive(server.accept()[0])
                self._forget_the_gone()
                self._remind()
            members = tuple(self._members[i] for i in range(self._count))
            self._send_all({"members": [dataclasses.asdict(m) for m in members]})
            for connection in self._open.values():  # they close first, so that the port is free
                with contextlib.suppress(OSError):
                    connection.settimeout(2.0)
                    connection.recv(1)
            return members

    def _listen(self) -> socket.socket:
        try:
            if socket.has_dualstack_ipv6():
                return socket.create_server(
                    ("", self._port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024
                )
            return socket.create_server(("", self._port), backlog=1024)
        except OSError as error:
            what = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used ({error})"
            raise StartError(
                f"port {self._port} on {self._members[0].host} {what}: process 0 listens there. "
                "Either another process here believes to be process 0 (give each its own "
                "--process-id), or another job still runs (end it, or choose another port)"
            ) from error

    def _receive(self, connection: socket.socket) -> None:
        """One newcomer. What does not speak this protocol is ignored."""
        try:
            hello = _read(connection, _ATTEMPT)
            if hello.get("job") != _JOB:
                raise ValueError("another protocol")
            index, count = int(hello["index"]), int(hello["count"])
            member = Member(index, str(hello["host"]), int(hello["pid"]))
            member = dataclasses.replace(member, ahead=float(hello["clock"]) - time.time())
        except (OSError, ValueError, KeyError, TypeError):
            connection.close()
            return
        known = self._members.get(index)
        if count != self._count:
            problem = (
                f"expected {self._count} processes on every host, process {member} was started "
                f"for {count}; give all the same --num-processes"
            )
        elif not 0 < index < count or known is not None:
            problem = (
                f"two processes call themselves process {index}: "
                + " and ".join(
                    f"{m.host} (pid {m.pid})" for m in (known or self._members[0], member)
                )
                + f"; give each its own --process-id, 0 to {count - 1}"
            )
        else:
            self._members[index], self._open[index] = member, connection
            _send(connection, {"heard": True})
            return
        _send(connection, {"error": problem})
        connection.close()
        self._refuse(problem)

    def _forget_the_gone(self) -> None:
        """A process that hung up (interrupted and started again, perhaps) is missing again."""
        for index, connection in list(self._open.items()):
            try:
                connection.setblocking(False)
                gone = connection.recv(1, socket.MSG_PEEK) == b""
            except (BlockingIOError, InterruptedError):
                gone = False
            except OSError:
                gone = True
            if gone:
                connection.close()
                del self._open[index], self._members[index]

    def _absent(self) -> list[str]:
        return [
            f"{i} ({self._names[i]})" if i < len(self._names) else str(i)
            for i in range(self._count)
            if i not in self._members
        ]

    def _remind(self) -> None:
        if time.monotonic() - self._last_reminder >= _REMIND:
            self._last_reminder = time.monotonic()
            LOG.info("waiting for process %s", ", ".join(self._absent()))

    def _missing(self, timeout: float) -> str:
        absent = self._absent()
        here = ", ".join(str(m) for _, m in sorted(self._members.items()))
        return (
            f"{len(absent)} of {self._count} processes did not come to {self._host}:{self._port} "
            f"within {timeout:.0f} s: process {', '.join(absent)}. Present: {here}. "
            + CHECKS.format(port=self._port)
        )

    def _refuse(self, problem: str) -> None:
        self._send_all({"error": problem})
        raise StartError(problem)

    def _send_all(self, message: dict[str, Any]) -> None:
        for connection in self._open.values():
            _send(connection, message)

    def _hang_up(self) -> None:
        for connection in self._open.values():
            connection.close()


def _join(address: str, count: int, me: Member, timeout: float) -> tuple[Member, ...]:
    """The side of all others."""
    host, port = split_address(address)
    deadline, attempts, reason = time.monotonic() + timeout, 0, "not tried"
    while time.monotonic() < deadline:
        attempts += 1
        try:
            with socket.create_connection((host, port), timeout=_ATTEMPT) as connection:
                hello = {"job": _JOB, "count": count, "clock": time.time()}
                _send(connection, {**dataclasses.asdict(me), **hello})
                answer = _read(connection, 10.0)
                if "error" not in answer:  # heard; process 0 may have begun to wait later than we
                    answer = _read(connection, timeout + 10.0)
                if "error" in answer:
                    raise StartError(str(answer["error"]))
                return tuple(Member(**m) for m in answer["members"])
        except socket.gaierror as error:
            reason = f"its name cannot be resolved ({error.strerror})"
        except TimeoutError:
            reason = "no answer (a firewall drops the packets, or the host is off)"
        except ConnectionRefusedError:
            reason = "connection refused (nothing listens there: process 0 has not started)"
        except (OSError, ValueError) as error:
            reason = str(error)
        time.sleep(_PAUSE)
    raise StartError(
        f"process {me} could not reach process 0 at {address} within {timeout:.0f} s: {reason}, "
        f"{attempts} attempts. " + CHECKS.format(port=port)
    )


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # who hung up is noticed when reading
        connection.settimeout(_ATTEMPT)
        connection.sendall(json.dumps(message).encode() + b"\n")


def _read(connection: socket.socket, timeout: float) -> dict[str, Any]:
    """One line. Raises OSError when the other side hangs up, ValueError for anything else."""
    connection.settimeout(timeout)
    data = b""
    while not data.endswith(b"\n"):
        part = connection.recv(1)
        if not part or len(data) > _LINE:
            raise ConnectionError("the connection was closed")
        data += part
    message = json.loads(data)
    if not isinstance(message, dict):
        raise ValueError("expected an object")
    return message
