"""What helps when a program does not fit: settings to paste, the most promising first.

Sizes of parameters, optimiser state and gradients on other meshes are exact (shapes and shardings).
What becomes of the temporaries is taken as proportional, which only a compilation can confirm:
`jaxmods preflight --suggest` does that.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, cast

from jax.sharding import AbstractMesh, Mesh

from jaxmods.partitioning import MESH_AXES
from train.exits import UserError
from train.experiment import Experiment
from train.overrides import apply_overrides
from train.preflight.chips import GIB
from train.preflight.memory import Memory, state_bytes
from train.preflight.topologies import Topology, larger
from train.state import make_plan

_FILL = 0.95  # of the capacity: what a suggestion aims at
_WORTH = 0.02  # of the capacity: a finer split that saves less is not worth its traffic
_REMAT = ("execution.remat", "remat")


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """One remedy.

    Attributes:
      settings: for `--set`; empty where there is nothing to set.
      reason: what it does.
    """

    settings: tuple[str, ...]
    reason: str

    def __str__(self) -> str:
        return f"--set {' '.join(self.settings)}: {self.reason}" if self.settings else self.reason


def suggestions(
    experiment: Experiment,
    topology: Topology,
    sizes: dict[str, int],
    memory: Memory,
    *,
    train: bool = True,
) -> list[Suggestion]:
    """Remedies for a program that does not fit.

    Args:
      sizes: of the mesh axes. memory: of one device. train: a training step, else a function.
    """
    state = memory.parameters + memory.optimizer + memory.gradients
    rest = memory.total - state
    found: list[Suggestion] = []
    # What the rest has to shrink to, and so into how many parts the rows.
    room = _FILL * memory.capacity - min(state, 0.5 * memory.capacity)
    parts = max(2, math.ceil(rest / room))
    large = rest > 0.3 * memory.capacity
    if train:
        found = _rows(experiment, sizes, parts) if large else []
        split, enough = _finer(experiment, topology, sizes, memory)
        if split:
            found.insert(0 if enough or state > rest else len(found), split)
    if large:
        found += _fewer(experiment, sizes, parts, train)
    more = larger(topology)
    return [
        *found,
        Suggestion(
            (),
            f"split heads and MLPs (mesh.tensor, now {sizes['tensor']}) or the sequence "
            f"(mesh.context, now {sizes['context']})",
        ),
        Suggestion(
            (),
            f"a larger topology ({more.product}, {more.chips} chips)"
            if more
            else "more slices (--slices)",
        ),
    ]


def _finer(
    experiment: Experiment, topology: Topology, sizes: dict[str, int], memory: Memory
) -> tuple[Suggestion | None, bool]:
    """The coarsest split of the parameters over more devices that makes the program fit; without
    one the finest that still saves something. And whether it is enough."""
    state = memory.parameters + memory.optimizer + memory.gradients
    enough = False
    if state < 0.1 * memory.capacity:
        return None, enough
    best: tuple[dict[str, int], float] | None = None
    held = state
    for factor in _divisors(sizes["data"] // topology.slices)[1:]:
        mesh = {**sizes, "data": sizes["data"] // factor, "fsdp": sizes["fsdp"] * factor}
        # Shardings look at the sizes of a mesh, not at its devices.
        abstract = AbstractMesh(tuple(mesh[a] for a in MESH_AXES), MESH_AXES)
        plan = make_plan(experiment, cast(Mesh, abstract))
        counted = state_bytes(plan)
        taken = counted.parameters + counted.optimizer + counted.gradients
        if held - taken > _WORTH * memory.capacity:
            best, held = (mesh, taken), taken
        enough = memory.total - state + taken < _FILL * memory.capacity
        if enough:
            break
    if best is None:
        return None, enough
    mesh, taken = best
    free = experiment.mesh.data == -1
    settings = () if free else (f"mesh.data={mesh['data']}",)
    reason = (
        f"parameters, optimiser state and gradients take {taken / GIB:.2f} GiB instead of "
        f"{state / GIB:.2f}"
    )
    return Suggestion((*settings, f"mesh.fsdp={mesh['fsdp']}"), reason), enough


def _rows(experiment: Experiment, sizes: dict[str, int], parts: int) -> list[Suggestion]:
    """Remedies for the activations of a training step."""
    system, batch = experiment.system, experiment.batch_size
    spread = sizes["data"] * sizes["fsdp"]
    found = []
    for path in _REMAT:
        current = _field(system, path)
        if current in ("none", "dots"):
            found.append(
                Suggestion(
                    (f"system.{path}=full",),
                    "recompute activations instead of keeping them",
                )
            )
            break
    microbatch = _field(system, "microbatch")
    if microbatch is not _ABSENT:
        now = microbatch or batch
        for count in _divisors(now // spread):
            setting = f"system.microbatch={now // count}"
            if count >= parts and _accepted(experiment, setting):
                found.append(
                    Suggestion(
                        (setting,),
                        f"activations of {now // count // spread} rows per device at a time, "
                        f"instead of {now // spread}",
                    )
                )
                break
    elif not system.batch_negatives:
        per_step = experiment.optim.accumulate
        for count in _divisors(batch // per_step // spread):
            setting = f"optim.accumulate={per_step * count}"
            if count >= parts and _accepted(experiment, setting):
                found.append(
                    Suggestion((setting,), f"{per_step * count} micro-batches of a smaller size")
                )
                break
    return found


def _fewer(
    experiment: Experiment, sizes: dict[str, int], parts: int, train: bool
) -> list[Suggestion]:
    """The next smaller batch that the system takes."""
    path = "batch_size" if train else "evaluation.batch_size"
    rows = experiment.batch_size if train else experiment.evaluation.batch_size
    step = min(sizes["data"] * sizes["fsdp"], max(1, rows // parts))
    for fewer in range(rows // parts // step * step, 0, -step):
        setting = f"{path}={fewer}"
        if _accepted(experiment, setting):
            reason = "a smaller batch, which is another experiment" if train else "fewer per call"
            return [Suggestion((setting,), reason)]
    return []


_ABSENT: Any = object()


def _field(value: Any, path: str) -> Any:
    for name in path.split("."):
        value = getattr(value, name, _ABSENT)
        if value is _ABSENT:
            break
    return value


def _accepted(experiment: Experiment, setting: str) -> bool:
    """Whether the recipe takes a setting, with its batch."""
    try:
        changed = apply_overrides(experiment, [setting])
        changed.system.batch_spec(changed.batch_size // changed.optim.accumulate)
    except (UserError, ValueError):
        return False
    return True


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
