"""Step time from a compiled program: the compiler's cycles for computation, a model of the links
for communication, operations for attention kernels. An estimate, always given as a range.

    C = products + elementwise + kernels
    low     max(C_low, S_low + A_low)                       everything overlaps
    high    C_high + S_high + A_high                        nothing does
    point   1.05 C_low + S_low + max(0, A_low - C_low / 2)

S are collectives that block, A those that run beside computation. The compiler's cycles are close
for products and two to four and a half times too high for elementwise work, hence a third of them
in the low estimate. Attention kernels have no cycles: their operations run at 25 to 60 % of peak.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence

from train.preflight.chips import Chip
from train.preflight.collectives import Collective
from train.preflight.flops import attention_work
from train.preflight.hlo import Executed, Instruction, Program, arrays

ELEMENTWISE_LOW = 1 / 3
KERNEL_LOW, KERNEL_HIGH = 0.60, 0.25  # share of peak: in the low and in the high estimate
IMPLAUSIBLE_MFU = 0.65
_HEAD_WIDTH = 128  # narrower heads fill the matrix unit's width all the same
_PRODUCTS = {"dkv": 4, "dq": 3, "fwd": 2}
_TARGET = 'custom_call_target="tpu_custom_call"'


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Calls of one custom kernel.

    Attributes:
      name: as in the program. kind: "flash" (this library's attention), "fused attention" (put in
        by the compiler for plain attention) or "other". times: calls per step.
      work: operations of one call on one device; 0 if unknown.
    """

    name: str
    kind: str
    times: int
    work: float
    backward: bool


@dataclasses.dataclass(frozen=True)
class Hot:
    """An instruction that takes much of the step, by estimated cycles."""

    seconds: float
    times: int
    product: bool
    name: str
    origin: str
    source: str


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds of one step on one device.

    Attributes:
      products, elementwise, kernels: computation (elementwise and kernels: low and high).
      blocking, overlapped: collectives, low and high.
      low, point, high: the step. mfu: model operations over peak, at high, point and low time.
    """

    products: float
    elementwise: tuple[float, float]
    kernels: tuple[float, float]
    blocking: tuple[float, float]
    overlapped: tuple[float, float]
    low: float
    point: float
    high: float
    mfu: tuple[float, float, float]


def kernels(executed: Sequence[Executed]) -> list[Kernel]:
    """Custom kernels that the program runs."""
    found: dict[tuple[str, str, float, bool], int] = {}
    for place in executed:
        instruction = place.instruction
        if instruction.opcode != "custom-call" or _TARGET not in instruction.attributes:
            continue
        name = re.sub(r"[.\d]+$", "", instruction.name)
        origin = f"{instruction.op_name} {name}"
        estimate = re.search(r'"cost_estimate":\{[^}]*"flops":"(\d+)"', instruction.attributes)
        if "splash" in origin or "flash" in origin:
            key = (name, "flash", _flash_work(instruction), "fwd" not in name)
        elif estimate:
            # The compiler puts its own kernel where it recognises plain attention.
            key = (name, "fused attention", float(estimate[1]), False)
        else:
            key = (name, "other", 0.0, False)
        found[key] = found.get(key, 0) + place.times
    return [Kernel(n, kind, times, work, back) for (n, kind, work, back), times in found.items()]


def _flash_work(instruction: Instruction) -> float:
    """Operations of one call of the splash kernel, with the head width that the unit fills."""
    match = re.search(r"operand_layout_constraints=\{(.*?)\}, (?:\w+)=", instruction.attributes)
    found = [a for a in arrays(match[1] if match else "") if len(a.dims) >= 3]
    floats = [a for a in found if a.dtype[0] in "bf"]
    if len(floats) < 2:
        return 0.0
    query, key = floats[0].dims, floats[1].dims
    width = -(-query[-1] // _HEAD_WIDTH) * _HEAD_WIDTH
    products = next((n for word, n in _PRODUCTS.items() if word in instruction.name), 2)
    work = attention_work((*query[:-1], width), key, products)
    # A causal mask comes as positions of the queries, without a partner for the keys.
    integers = [a for a in found if a.dtype == "s32" and {query[-2], key[-2]} & set(a.dims)]
    return work / 2 if len(integers) % 2 else work


def estimate(
    program: Program,
    executed: Sequence[Executed],
    collectives: Sequence[Collective],
    used: Sequence[Kernel],
    chip: Chip,
    model_work: float,
) -> tuple[Estimate, list[Hot]]:
    """The step time, and the ten instructions that take most of it.

    Args:
      model_work: model operations of a step per device.
    """
    products = others = 0.0
    hot: dict[str, Hot] = {}
    for place in executed:
        cycles = place.instruction.cycles
        if not cycles or place.instruction.opcode == "while":
            continue
        seconds = cycles * place.times / chip.clock
        product = _is_product(program, place.instruction)
        products += seconds if product else 0.0
        others += 0.0 if product else seconds
        name = place.instruction.name
        hot[f"{place.computation}/{name}"] = Hot(
            seconds,
            place.times,
            product,
            name,
            place.instruction.op_name,
            program.source(place.instruction),
        )
    work = sum(k.work * k.times for k in used)
    in_kernels = (work / (chip.peak * KERNEL_LOW), work / (chip.peak * KERNEL_HIGH))
    elementwise = (others * ELEMENTWISE_LOW, others)
    compute = tuple(products + elementwise[i] + in_kernels[i] for i in (0, 1))
    blocking, overlapped = (
        (
            math.fsum(c.low * c.times for c in collectives if c.overlapped == asynchronous),
            math.fsum(c.high * c.times for c in collectives if c.overlapped == asynchronous),
        )
        for asynchronous in (False, True)
    )
    low = max(compute[0], blocking[0] + overlapped[0])
    high = compute[1] + blocking[1] + overlapped[1]
    point = 1.05 * compute[0] + blocking[0] + max(0.0, overlapped[0] - 0.5 * compute[0])
    point = min(max(point, low), high)

    def mfu(seconds: float) -> float:
        return model_work / (chip.peak * seconds) if seconds else 0.0

    result = Estimate(
        products=products,
        elementwise=elementwise,
        kernels=in_kernels,
        blocking=blocking,
        overlapped=overlapped,
        low=low,
        point=point,
        high=high,
        mfu=(mfu(high), mfu(point), mfu(low)),
    )
    return result, sorted(hot.values(), key=lambda h: -h.seconds)[:10]


def _is_product(program: Program, instruction: Instruction) -> bool:
    return any(
        i.opcode in ("dot", "convolution") for i in (instruction, *program.inside(instruction))
    )
