"""What lies in the HBM of one device, and where the large buffers come from.

The state and the batch are counted from their shapes and shardings; the rest is what the compiler
says. Gradients have no place of their own in a compiled program: they are counted as one copy of
the trained parameters, and taken out of the compiler's temporaries.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax

from train.preflight.hlo import Array, Instruction, Program, arrays
from train.state import Plan

_OOM = re.compile(
    r"required for HLO temporaries \(([\d.]+)([KMG])\) exceeds available HBM \(([\d.]+)([KMG])\)"
)
_UNIT = {"K": 2**10, "M": 2**20, "G": 2**30}
_VALUE = re.compile(
    r"^ value: <\d+ ([\w.\-]+?)(?:\{[\d,]*\})? (?:\(phi\) )?@\d+> "
    r"\(size=(\d+),offset=(\d+)\): (.*)$"
)


@dataclasses.dataclass(frozen=True)
class Buffer:
    """A large temporary.

    Attributes:
      bytes: as allocated. logical: without the layout's padding. array: type and dimensions.
      origin: `op_name` of the instruction that writes it. source: file and line.
    """

    bytes: float
    logical: float
    array: str
    origin: str
    source: str


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device.

    Attributes:
      parameters, optimizer, gradients, batch, other: by shape and sharding (`other`: carried
        state, moving average, counters).
      argument_padding: what the arguments take beyond that in their layouts.
      temporaries: activations and everything else that the compiler allocates.
      code: the program itself.
      total: all of it at its highest. capacity: what the compiler lets a program use.
      buffers: the largest temporaries.
      fits: whether the compiler could place it.
    """

    parameters: float
    optimizer: float
    gradients: float
    batch: float
    other: float
    argument_padding: float
    temporaries: float
    code: float
    total: float
    capacity: float
    buffers: tuple[Buffer, ...]
    fits: bool

    @property
    def headroom(self) -> float:
        """What is left; negative when it does not fit."""
        return self.capacity - self.total


@dataclasses.dataclass(frozen=True)
class StateBytes:
    """Bytes per device of the arguments, by shape and sharding."""

    parameters: float
    optimizer: float
    gradients: float
    batch: float
    other: float


def shard_bytes(tree: Any, shardings: Any) -> float:
    """Bytes that one device holds of a tree of arrays or ShapeDtypeStructs."""
    sizes = jax.tree.map(
        lambda leaf, sharding: (
            math.prod(sharding.shard_shape(tuple(leaf.shape))) * leaf.dtype.itemsize
        ),
        tree,
        shardings,
    )
    return float(sum(jax.tree.leaves(sizes)))


def state_bytes(plan: Plan, batch: Any = None, batch_shardings: Any = None) -> StateBytes:
    """Bytes per device of a training state, and of a batch where one is given."""
    abstract, shardings = plan.abstract, plan.shardings
    return StateBytes(
        parameters=shard_bytes(
            (abstract.trained, abstract.frozen), (shardings.trained, shardings.frozen)
        ),
        optimizer=shard_bytes(abstract.opt_state, shardings.opt_state),
        gradients=shard_bytes(abstract.trained, shardings.trained),
        batch=shard_bytes(batch, batch_shardings),
        other=shard_bytes(
            (abstract.state, abstract.step, abstract.rng, abstract.ema),
            (shardings.state, shardings.step, shardings.rng, shardings.ema),
        ),
    )


def of_compiled(
    state: StateBytes, stats: Any, capacity: float, buffers: Sequence[Buffer]
) -> Memory:
    """Memory of a program that compiled, from `compiled.memory_analysis()`."""
    arguments = float(stats.argument_size_in_bytes)
    known = state.parameters + state.optimizer + state.batch + state.other
    # `peak_memory_in_bytes` is left aside: it counts what lies in VMEM as well.
    peak = (
        arguments
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
        + stats.temp_size_in_bytes
    )
    code = float(stats.generated_code_size_in_bytes)
    beyond = max(0.0, peak - arguments)
    gradients = min(state.gradients, beyond)
    return Memory(
        parameters=state.parameters,
        optimizer=state.optimizer,
        gradients=gradients,
        batch=state.batch,
        other=state.other,
        argument_padding=max(0.0, arguments - known),
        temporaries=beyond - gradients,
        code=code,
        total=max(peak, arguments) + code,
        capacity=capacity,
        buffers=tuple(buffers),
        fits=True,
    )


def of_overflow(
    state: StateBytes, required: float, capacity: float, buffers: Sequence[Buffer]
) -> Memory:
    """Memory of a program that the compiler refused, from its message."""
    known = state.parameters + state.optimizer + state.batch + state.other
    beyond = max(0.0, required - known)
    gradients = min(state.gradients, beyond)
    return Memory(
        parameters=state.parameters,
        optimizer=state.optimizer,
        gradients=gradients,
        batch=state.batch,
        other=state.other,
        argument_padding=0.0,
        temporaries=beyond - gradients,
        code=0.0,
        total=required,
        capacity=capacity,
        buffers=tuple(buffers),
        fits=False,
    )


def overflow(message: str) -> tuple[float, float] | None:
    """Required and available bytes of the compiler's out-of-memory message; None for another."""
    match = _OOM.search(message)
    if match is None:
        return None
    return float(match[1]) * _UNIT[match[2]], float(match[3]) * _UNIT[match[4]]


def is_overflow(message: str) -> bool:
    """Whether a compiler's message means that memory ran out."""
    return overflow(message) is not None or (
        "RESOURCE_EXHAUSTED" in message and "hbm" in message.lower()
    )


def largest(assignment: str, program: Program | None, count: int = 10) -> list[Buffer]:
    """The largest temporaries that lie beside each other, from XLA's buffer assignment.

    Args:
      assignment: text of the dump `*-buffer-assignment.txt`.
      program: for source lines.
    """
    slots: dict[tuple[int, int], list[tuple[str, str]]] = {}
    here = False
    for line in assignment.split("\n"):
        if line.startswith("allocation "):
            here = "preallocated-temp" in line and ", color " not in line
        elif here and (match := _VALUE.match(line)):
            slots.setdefault((int(match[2]), int(match[3])), []).append((match[1], match[4]))
    chosen: list[tuple[int, int]] = []
    result: list[Buffer] = []
    for size, offset in sorted(slots, reverse=True):
        if len(result) == count:
            break
        if any(offset < end and start < offset + size for start, end in chosen):
            continue
        chosen.append((offset, offset + size))
        result.append(_buffer(size, slots[size, offset], program))
    return result


def _buffer(size: int, values: Sequence[tuple[str, str]], program: Program | None) -> Buffer:
    known = program.by_name if program else {}
    best: tuple[int, Instruction | None, Array | None] = (-1, None, None)
    for name, shape in values:
        found = arrays(shape)
        array = max(found, key=lambda a: a.padded) if found else None
        instruction = known.get(name)
        # The instruction that computes it says more than the loop that carries it.
        score = 0 if instruction is None else 1 + ("fusion" in instruction.opcode)
        score += instruction is not None and bool(instruction.op_name)
        score += instruction is not None and instruction.opcode not in ("while", "parameter")
        score += 8 * (array is not None and abs(array.padded - size) <= 0.02 * size)
        if score > best[0]:
            best = (score, instruction, array)
    _, instruction, array = best
    for _ in range(4):  # what the compiler adds (copies, conversions) belongs to what it reads
        if instruction is None or instruction.op_name or not instruction.operand_names:
            break
        instruction = known.get(instruction.operand_names[0])
    return Buffer(
        bytes=size,
        logical=min(float(size), array.bytes) if array else size,
        array=str(array) if array else "",
        origin=instruction.op_name if instruction else "",
        source=program.source(instruction) if program and instruction else "",
    )
