"""The real step of a recipe, traced, lowered and compiled for a topology. No data, no weights."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxmods.nn.stack import Remat
from jaxmods.partitioning import make_mesh, sharding_for, use_mesh
from jaxmods.system import FROZEN
from train.exits import UserError
from train.experiment import Experiment
from train.preflight import flops, hlo, memory
from train.preflight.topologies import Topology
from train.state import Plan, cast_floating, make_plan, merge, select
from train.step import trace_step

_CONVERSATION = ("prefill_", "decode_")  # their caches go from call to call (`sample --chat`)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What is read from a compiled program.

    Attributes:
      mesh: over the topology's devices. split: whether a mesh axis takes a part of a torus axis.
      program: parsed text; None when memory ran out (then `early` is the program before
        allocation, without cycles).
      memory: of one device.
      hardware, model: operations of a step on all devices, as run and as needed.
      seconds: of tracing, lowering, compiling; "processor": what compiling took of all cores.
      state_leaves: arrays of a training state, which should be updated in place.
    """

    mesh: Mesh
    split: bool
    program: hlo.Program | None
    early: hlo.Program | None
    memory: memory.Memory
    hardware: flops.Flops
    model: flops.Flops
    seconds: dict[str, float]
    state_leaves: int = 0


def mesh_for(experiment: Experiment, topology: Topology, devices: list[Any]) -> tuple[Mesh, bool]:
    """The recipe's mesh over the devices, and whether it had to split a torus axis.

    Raises:
      UserError: sizes that do not fit.
    """
    try:
        mesh = make_mesh(experiment.mesh, devices)
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"preflight: {topology.name}: {error}") from error
    from jax.experimental import mesh_utils

    shape = mesh.devices.shape
    try:
        if topology.slices > 1:
            mesh_utils.create_hybrid_device_mesh(
                (shape[0] // topology.slices, *shape[1:]), (topology.slices, 1, 1, 1), devices
            )
        else:
            mesh_utils.create_device_mesh(shape, devices)
    except NotImplementedError:
        return mesh, True
    return mesh, False


def train_step(experiment: Experiment, topology: Topology, devices: list[Any]) -> Compiled:
    """The compiled training step.

    Raises:
      UserError: a recipe that cannot be built, or a compiler error other than memory.
    """
    mesh, split = mesh_for(experiment, topology, devices)
    plan = make_plan(experiment, mesh)
    started = time.perf_counter()
    step = trace_step(plan)
    traced = time.perf_counter() - started
    hardware = flops.count(step.traced.jaxpr)
    spec = experiment.system.batch_spec(experiment.batch_size)
    batch = {k: s.struct() for k, s in spec.items()}
    state = memory.state_bytes(plan, batch, step.batch_shardings)
    model = _needed(plan, batch, hardware)
    compiled = _compile(
        step.traced.lower, mesh, split, state, hardware, model, {"trace": traced}, topology
    )
    return dataclasses.replace(compiled, state_leaves=len(jax.tree.leaves(plan.abstract)))


def _needed(plan: Plan, batch: dict[str, Any], hardware: flops.Flops) -> flops.Flops:
    """Operations that the mathematics needs: three times the forward pass, plain attention,
    nothing recomputed. Where parts are frozen, what the gradients of the rest take."""
    system = plain(plan.experiment.system)
    compute = plan.experiment.precision.compute
    trained = set(plan.groups)

    def losses(own: set[str], params: Any, *rest: Any) -> Any:
        params = cast_floating(params, compute)
        return [
            loss.fn(params, *rest).loss
            for loss in system.losses()
            if own & set(loss.labels or trained)
        ]

    def forward(params: Any, *rest: Any) -> Any:
        return losses(trained, params, *rest)

    def gradients(params: Any, *rest: Any) -> Any:
        found = []
        for own in ({*(loss.labels or trained)} for loss in system.losses()):
            others = select(params, plan.labels, {*trained, FROZEN} - own)

            def total(mine: Any, others: Any = others, own: set[str] = own) -> Any:
                return sum(losses(own, merge(mine, others), *rest))

            found.append(jax.grad(total)(select(params, plan.labels, own)))
        return found

    key = jax.eval_shape(lambda: jax.random.key(0))
    arguments = (
        plan.abstract.params,
        plan.abstract.state,
        batch,
        jax.ShapeDtypeStruct(key.shape, key.dtype),
        plan.abstract.step,
    )
    counts = [hardware, flops.count(jax.make_jaxpr(forward)(*arguments)).times(3)]
    if plan.abstract.frozen:
        counts.append(flops.count(jax.make_jaxpr(gradients)(*arguments)))
    return min(counts, key=lambda count: count.total)


def plain(value: Any) -> Any:
    """A system (or any tree of dataclasses) without attention kernels, whose tiles are padded,
    and without recomputation. (Attention that is chosen by itself is plain outside a mesh.)"""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        inner = getattr(value, field.name)
        if dataclasses.is_dataclass(inner) and field.init:
            changes[field.name] = plain(inner)
        elif field.name == "attention" and inner == "flash":
            changes[field.name] = "xla"
        elif field.name == "remat" and inner in get_args(Remat):
            changes[field.name] = "none"
    changes = {name: new for name, new in changes.items() if new != getattr(value, name)}
    return dataclasses.replace(value, **changes) if changes else value


def inference(
    experiment: Experiment,
    topology: Topology,
    devices: list[Any],
    name: str,
    arguments: dict[str, Any],
) -> Compiled:
    """One named function of the system, compiled for a batch of `evaluation.batch_size` rows.

    Its outputs are whole on every device, as an evaluation needs them; those of a conversation's
    functions (`prefill_...`, `decode_...`) stay as they lie, for the next call.

    Args:
      arguments: `ArraySpec` by argument name, in order.
    """
    mesh, split = mesh_for(experiment, topology, devices)
    plan = make_plan(experiment, mesh)
    function = experiment.system.functions()[name]
    rules, compute = experiment.rules, experiment.precision.compute

    def call(params: Any, *arrays: Any) -> Any:
        with use_mesh(mesh, rules):
            return function(cast_floating(params, compute), *arrays)

    structs = [s.struct() for s in arguments.values()]
    placed = [sharding_for(s.shape, s.axes, mesh, rules) for s in arguments.values()]
    whole = NamedSharding(mesh, PartitionSpec())
    started = time.perf_counter()
    jitted = jax.jit(
        call,
        in_shardings=(plan.shardings.params, *placed),
        out_shardings=None if name.startswith(_CONVERSATION) else whole,
        keep_unused=True,  # parameters that a function does not read lie there all the same
    )
    traced = jitted.trace(plan.abstract.params, *structs)
    seconds = {"trace": time.perf_counter() - started}
    hardware = flops.count(traced.jaxpr)
    without = plain(experiment.system).functions()[name]
    needed = flops.count(
        jax.make_jaxpr(lambda p, *a: without(cast_floating(p, compute), *a))(
            plan.abstract.params, *structs
        )
    )
    state = memory.StateBytes(
        parameters=memory.shard_bytes(plan.abstract.params, plan.shardings.params),
        optimizer=0.0,
        gradients=0.0,
        batch=memory.shard_bytes(structs, placed),
        other=0.0,
    )
    return _compile(traced.lower, mesh, split, state, hardware, needed, seconds, topology)


def _compile(
    lower: Callable[[], Any],
    mesh: Mesh,
    split: bool,
    state: memory.StateBytes,
    hardware: flops.Flops,
    model: flops.Flops,
    seconds: dict[str, float],
    topology: Topology,
) -> Compiled:
    started = time.perf_counter()
    lowered = lower()
    seconds = {**seconds, "lower": time.perf_counter() - started}
    capacity = topology.chip.hbm
    with tempfile.TemporaryDirectory(prefix="preflight-") as folder:
        started, processor = time.perf_counter(), time.process_time()

        def stop() -> None:
            seconds["compile"] = time.perf_counter() - started
            seconds["processor"] = time.process_time() - processor

        try:
            compiled = lowered.compile(
                compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
            )
        except Exception as error:  # the compiler raises several types
            stop()
            message = str(error)
            if not memory.is_overflow(message):
                raise UserError(
                    f"preflight: the compiler refuses the program for {topology.name}: {message}"
                ) from error
            early = _parsed(folder, "after_optimizations.txt")
            buffers = memory.largest(_text(folder, "buffer-assignment.txt"), early)
            required, available = memory.overflow(message) or (float("inf"), capacity)
            overflow = memory.of_overflow(state, required, available, buffers)
            return Compiled(mesh, split, None, early, overflow, hardware, model, seconds)
        stop()
        program = _parsed(folder, "after_codegen.txt")
        if program is None:
            raise UserError(
                "preflight: the compiler wrote no program for the TPU; the pinned versions of jax "
                "and libtpu are in the extra: pip install 'jaxmods[preflight]'"
            )
        buffers = memory.largest(_text(folder, "buffer-assignment.txt"), program)
        placed = memory.of_compiled(state, compiled.memory_analysis(), capacity, buffers)
    return Compiled(mesh, split, program, None, placed, hardware, model, seconds)


def _text(folder: str, ending: str) -> str:
    """The dump of the largest module with this ending; empty when there is none."""
    files = sorted(Path(folder).glob(f"*{ending}"), key=lambda p: p.stat().st_size)
    return files[-1].read_text(encoding="utf-8", errors="replace") if files else ""


def _parsed(folder: str, ending: str) -> hlo.Program | None:
    text = _text(folder, ending)
    return hlo.parse(text) if text else None
