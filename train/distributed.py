"""Starts JAX's distributed runtime by itself where several hosts run one job.

Where it starts: explicit flags or environment (`Wanted`), else what JAX's own detection knows (TPU
pods on VMs and on GKE, Slurm, Open MPI, indexed Kubernetes jobs). Where it does nothing: a laptop,
a machine with GPUs, a TPU VM of one host. It has to happen before JAX touches a device.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import re
import socket
from collections.abc import Iterator, Mapping
from typing import Any

from train.exits import UsageError, UserError
from train.runtime import tpu_attached

LOG = logging.getLogger("train")

DEFAULT_PORT = 8476  # one of those that the automatic firewall rule of TPU VMs opens
START_TIMEOUT = 60.0  # seconds for all processes to come
PODS_TIMEOUT = 300.0  # the same on Kubernetes, which starts pods one after another

_TPU, _GKE, _KUBERNETES = "TPU", "TPU on GKE", "Kubernetes"

COORDINATOR = "JAXMODS_COORDINATOR"
NUM_PROCESSES = "JAXMODS_NUM_PROCESSES"
PROCESS_ID = "JAXMODS_PROCESS_ID"
PORT = "JAXMODS_COORDINATOR_PORT"
OFF = "JAXMODS_NO_DISTRIBUTED"
TIMEOUT = "JAXMODS_START_TIMEOUT"


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What the command line says; None where it is silent.

    Attributes:
      coordinator: `host` or `host:port` of process 0. port: where `coordinator` names none, or
        where it is detected. off: one process, whatever the surroundings.
    """

    coordinator: str | None = None
    count: int | None = None
    index: int | None = None
    port: int | None = None
    off: bool = False


@dataclasses.dataclass(frozen=True)
class Launch:
    """This process among several.

    Attributes:
      coordinator: `host:port` of process 0. source: how this is known, for the log.
      local_devices: the only devices to use; None for all. names: host names by process, where
        they are known.
    """

    coordinator: str
    count: int
    index: int
    source: str
    local_devices: tuple[int, ...] | None = None
    names: tuple[str, ...] = ()


def find_launch(wanted: Wanted, environment: Mapping[str, str] = os.environ) -> Launch | None:
    """How this process belongs to a job of several; None where it is alone.

    Flags come before `JAXMODS_*` variables, these before what is detected.

    Raises:
      UsageError: some of coordinator, number and index without the others, or values that cannot
        be.
    """
    if wanted.off or environment.get(OFF, "0") not in ("", "0"):
        return None
    port = _number(wanted.port, "--coordinator-port", PORT, environment)
    if port is not None and not 0 < port < 65536:
        raise UsageError(f"--coordinator-port ({PORT}): expected 1 to 65535, found {port}")
    coordinator = wanted.coordinator or environment.get(COORDINATOR) or None
    count = _number(wanted.count, "--num-processes", NUM_PROCESSES, environment)
    index = _number(wanted.index, "--process-id", PROCESS_ID, environment)
    if coordinator is None and count is None and index is None:
        return _detect(port, environment)
    if count == 1 and index in (None, 0):
        return None
    given = {
        f"--coordinator HOST:PORT ({COORDINATOR})": coordinator,
        f"--num-processes N ({NUM_PROCESSES})": count,
        f"--process-id I ({PROCESS_ID})": index,
    }
    absent = [name for name, value in given.items() if value is None]
    if coordinator is None or count is None or index is None:
        raise UsageError(f"several processes: {' and '.join(absent)} missing; give all three")
    if count < 1 or not 0 <= index < count:
        raise UsageError(
            f"several processes: expected --process-id from 0 to {count - 1} for --num-processes "
            f"{count}, found {index}"
        )
    return Launch(_address(coordinator, port), count, index, "flags or environment")


def _number(
    value: int | None, flag: str, variable: str, environment: Mapping[str, str]
) -> int | None:
    text = environment.get(variable)
    if value is not None or not text:
        return value
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"{flag} ({variable}): expected a number, found {text!r}") from None


def _address(coordinator: str, port: int | None) -> str:
    """`host:port` of `host`, `host:port`, `[v6]` or `[v6]:port`."""
    match = re.fullmatch(r"(\[[^\]]+\]|[^:\[\]]+)(?::(\d{1,5}))?", coordinator)
    if match is None or not 0 < int(match[2] or port or DEFAULT_PORT) < 65536:
        raise UsageError(
            f"--coordinator ({COORDINATOR}): expected HOST:PORT, found {coordinator}; an address "
            "with colons goes in brackets, [::1]:8476"
        )
    return f"{match[1]}:{match[2] or port or DEFAULT_PORT}"


def _detect(port: int | None, environment: Mapping[str, str]) -> Launch | None:
    """Ask JAX's detection where the surroundings look like a cluster."""
    where = _surroundings(environment)
    if where is None:
        return None
    # Slurm and Open MPI may run several jobs on one host: JAX derives their port from the job.
    if port is not None:
        os.environ["JAX_COORDINATOR_PORT"] = str(port)
    elif where in (_TPU, _GKE, _KUBERNETES):
        os.environ.setdefault("JAX_COORDINATOR_PORT", str(DEFAULT_PORT))
    try:
        from jax._src import clusters  # the detection has no public name

        found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, int(_patience(where))
        )
        coordinator, count, index, local = found
    except Exception as error:  # libraries and services of many kinds are asked
        raise UserError(
            f"this looks like {where}, but its processes could not be found out ({error}); give "
            "--coordinator HOST:PORT --num-processes N --process-id I, or --no-distributed"
        ) from error
    if coordinator is None or count is None or index is None or count == 1:
        return None
    return Launch(
        str(coordinator),
        int(count),
        int(index),
        where,
        _local_devices(local, environment),
        _names(int(count), environment),
    )


def _surroundings(environment: Mapping[str, str]) -> str | None:
    """What kind of cluster this may be; None where it cannot be one."""

    def several(name: str) -> bool:
        value = environment.get(name, "")
        return value.isdigit() and int(value) > 1

    if several("SLURM_NTASKS") and "SLURM_PROCID" in environment:
        return "Slurm"
    if several("OMPI_COMM_WORLD_SIZE"):
        return "Open MPI"
    if tpu_attached() or "JAX_FORCE_TPU_INIT" in environment:
        if (environment.get("JAX_PLATFORMS") or "tpu").split(",")[0] != "tpu":
            return None
        return _GKE if "TPU_WORKER_HOSTNAMES" in environment else _TPU
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        return _KUBERNETES
    return None


def _patience(where: str) -> float:
    return PODS_TIMEOUT if where in (_GKE, _KUBERNETES) else START_TIMEOUT


def _local_devices(found: Any, environment: Mapping[str, str]) -> tuple[int, ...] | None:
    """One device per process is meant where a host runs several; a single one has them all."""
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE", environment.get("SLURM_TASKS_PER_NODE"))
    alone = tasks is not None and set(part.split("(")[0] for part in tasks.split(",")) == {"1"}
    return None if found is None or alone else tuple(found)


def _names(count: int, environment: Mapping[str, str]) -> tuple[str, ...]:
    names = tuple(filter(None, environment.get("TPU_WORKER_HOSTNAMES", "").split(",")))
    return names if len(names) == count else ()


@contextlib.contextmanager
def job(wanted: Wanted) -> Iterator[None]:
    """The body as one process of a job of several, or as it is where there is only one.

    Raises:
      StartError: not all processes came.
      PeerError: another process was lost or failed.
    """
    global _STARTED
    launch = find_launch(wanted)
    if launch is None:
        yield
        return
    _STARTED = True
    from train import peers

    members = _start(launch)
    with peers.session(members):
        yield
    import jax

    jax.distributed.shutdown()
    _STARTED = False


_STARTED = False


def started() -> bool:
    """Whether this process is one of several. It then ends without the farewell of libraries,
    which would wait for processes that may have gone."""
    return _STARTED


def leave_at_once(code: int) -> None:
    """End this process of a job that failed."""
    from train.watchdog import flush

    flush()
    os._exit(int(code))


def _start(launch: Launch) -> tuple[Any, ...]:
    """Meet the others, then initialise JAX's runtime. Returns the members."""
    import jax

    from train import peers
    from train.rendezvous import meet

    LOG.info(
        "process %d of %d on %s (%s), process 0 at %s",
        launch.index,
        launch.count,
        socket.gethostname(),
        launch.source,
        launch.coordinator,
    )
    timeout = peers.seconds(TIMEOUT, _patience(launch.source))
    members = meet(
        launch.coordinator, launch.count, launch.index, timeout=timeout, names=launch.names
    )
    if launch.index:
        _only_warnings(launch.index)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    with contextlib.suppress(AttributeError):  # ours sees SIGINT too and covers evaluations
        jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        launch.coordinator,
        launch.count,
        launch.index,
        local_device_ids=launch.local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=int(timeout),
        heartbeat_timeout_seconds=int(max(100.0, 4 * peers.host_timeout())),
    )
    return members


def _only_warnings(index: int) -> None:
    """One process tells the story on standard error; the others speak when something is wrong.
    Their log files in the run folder have everything."""
    for handler in LOG.handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.WARNING)
            handler.setFormatter(
                logging.Formatter(f"[process {index}] %(asctime)s %(message)s", "%H:%M:%S")
            )
