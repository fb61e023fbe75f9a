"""Communication of a compiled program: by kind, by mesh axis, how often, how many bytes, how long.

Bytes are those of one device: the result of an all-gather, the operand of a reduce-scatter, the
array of an all-reduce, all-to-all or permute. Times come from an explicit model of the links:

    ring of k devices:  all-gather, reduce-scatter  V (k-1)/k / B      all-reduce  twice that
    all-to-all:         V k' / (8 w) per ring, V k' / (4 w) per line   permute     V / w
    between slices:     all-reduce 2 V (m-1)/m / dcn, all-gather V (m-1)/m / dcn

w is one link in one direction, B adds 2 w for every physical axis that the group covers as a ring
and w where it is a line; a group that takes every s-th chip of an axis shares its links with s
others. The optimistic time uses all axes at once, the pessimistic one the best alone (permutes:
half the rate), plus a microsecond per hop.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from train.preflight.chips import HOP_LATENCY, Chip
from train.preflight.hlo import Executed, Instruction, Program, arrays

_KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_GROUPS = re.compile(
    r"replica_groups=(mesh\[[^\]]*\] ?\{[^}]*\}|\{\{.*?\}\}|\[[\d,]+\]<=\[[\d,]+\]"
    r"(?:T\([\d,]+\))?|\{\})"
)
_PAIRS = re.compile(r"source_target_pairs=\{(\{.*?\})\}")
_DCN_KINDS = {
    "ALL_REDUCE": "all-reduce",
    "ALL_GATHER": "all-gather",
    "ONE_TO_ONE": "collective-permute",
}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of communication over one set of mesh axes at one place of the program.

    Attributes:
      kind: as "all-gather". axes: names of the mesh axes ("data", "fsdp", ...), empty if unknown.
      size: devices per group. payload: bytes per device and time. times: how often in a step.
      in_loop: whether it stands in a loop. overlapped: whether it runs beside computation.
      dcn: whether it crosses slices. low, high: seconds of one, optimistic and pessimistic.
      origin: `op_name` of the program. source: file and line.
    """

    kind: str
    axes: tuple[str, ...]
    size: int
    payload: float
    times: int
    in_loop: bool
    overlapped: bool
    dcn: bool
    low: float
    high: float
    origin: str
    source: str


def find(
    program: Program, executed: Sequence[Executed], mesh: Mesh, chip: Chip, slices: int
) -> list[Collective]:
    """All collectives that a program runs.

    Args:
      mesh: of the recipe, over all slices; the program is that of one slice.
    """
    shape = (mesh.devices.shape[0] // slices, *mesh.devices.shape[1:])
    network = _Network(mesh.axis_names, mesh.devices[: shape[0]], chip, slices)
    seen: set[tuple[str, str]] = set()
    result = []
    for place, instruction, kind, overlapped in _places(program, executed):
        channel = re.search(r"channel_id=(\d+)", instruction.attributes)
        key = (place.computation, channel[1] if channel else instruction.name)
        if key in seen:
            continue
        seen.add(key)
        record = network.collective(program, place, instruction, kind, overlapped)
        if record.size > 1:  # groups of one move nothing
            result.append(record)
    for place in executed:
        crossing = _across_slices(place.instruction)
        if crossing and (place.computation, crossing[2]) not in seen:
            seen.add((place.computation, crossing[2]))
            result.append(network.crossing(program, place, crossing[0], crossing[1]))
    return result


_Place = tuple[Executed, Instruction, str, bool]


def _places(program: Program, executed: Sequence[Executed]) -> Iterator[_Place]:
    """Where each collective of the program runs; whether it is overlapped.

    An asynchronous collective that is fused with the products which hide it appears in each of
    them, loops included, under one channel: it counts where it starts.
    """
    spread: dict[str, list[tuple[bool, _Place]]] = {}
    for place in executed:
        instruction = place.instruction
        kind = _kind(instruction.opcode)
        if kind:
            yield place, instruction, kind, instruction.opcode.endswith("-start")
            continue
        if instruction.opcode not in ("fusion", "async-start", "custom-call"):
            continue
        scattered = (instruction.attribute("calls") or "").startswith("all-reduce-scatter")
        inside = list(program.inside(instruction))
        starts = any("AsyncCollectiveStart" in i.attributes for i in inside)
        for inner in inside:
            kind = _kind(inner.opcode)
            if kind is None or (scattered and kind != "all-reduce"):
                continue  # the permutes in a fused reduce-scatter only move its padding
            found = (place, inner, "reduce-scatter" if scattered else kind, not scattered)
            channel = re.search(r"channel_id=(\d+)", inner.attributes)
            if "async_collective_fusion_config" in inner.attributes and channel:
                spread.setdefault(channel[1], []).append((starts, found))
            else:
                yield found
    for parts in spread.values():
        begun = [found for starts, found in parts if starts]
        yield from begun or [min((f for _, f in parts), key=lambda f: f[0].times)]


def _kind(opcode: str) -> str | None:
    base = opcode.removesuffix("-start")
    return base if base in _KINDS else None


def _across_slices(instruction: Instruction) -> tuple[str, float, str] | None:
    """Kind, bytes and rendezvous of a transfer between slices."""
    if instruction.opcode not in ("send", "recv"):
        return None
    text = instruction.attributes
    if "xla_megascale" not in text:
        return None
    transfer = re.search(r'_xla_megascale_transfer_type="(\w+)"', text)
    meeting = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', text)
    kind = _DCN_KINDS.get(transfer[1], transfer[1].lower()) if transfer else "transfer"
    # What is received of an all-gather is larger than what is sent.
    if kind == "all-gather" and instruction.opcode == "send":
        return None
    found = arrays(instruction.shape)
    return kind, found[0].bytes if found else 0.0, meeting[1] if meeting else instruction.name


def payload(instruction: Instruction, kind: str, program: Program) -> float:
    """Bytes per device, see the head of this file."""
    data = [a.bytes for a in arrays(instruction.shape) if a.dims or a.dtype[0] not in "us"]
    if instruction.opcode.endswith("-start") and kind != "all-reduce" and len(data) > 1:
        data = data[len(data) // 2 :]  # operands, then results
    if kind == "reduce-scatter" and instruction.opcode == "reduce-scatter":
        read = [program.by_name[n] for n in instruction.operand_names if n in program.by_name]
        return sum(a.bytes for i in read for a in arrays(i.shape))
    return sum(data)


def groups(attributes: str, partitions: int) -> list[list[int]] | None:
    """Groups of partition numbers of a collective's text; None when the form is unknown."""
    pairs = _PAIRS.search(attributes)
    if pairs:
        return [[int(a), int(b)] for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs[1])]
    match = _GROUPS.search(attributes)
    if match is None:
        return None
    text = match[1]
    if text == "{}":
        return [list(range(partitions))]
    if text.startswith("{{"):
        return [[int(n) for n in g.split(",")] for g in re.findall(r"\{([\d,]+)\}", text)]
    if text.startswith("["):
        form = re.fullmatch(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
        if form is None:
            return None
        shape, dims = (tuple(map(int, form[i].split(","))) for i in (1, 2))
        ids = np.arange(math.prod(dims)).reshape(dims)
        if form[3]:
            ids = ids.transpose(tuple(map(int, form[3].split(","))))
        return ids.reshape(shape[0], -1).tolist()
    axes = re.findall(r"'([^']+)'=(\d+)", text[: text.index("]")])
    chosen = text[text.index("]") :]
    if "(" in chosen:  # part of an axis
        return None
    names = re.findall(r"'([^']+)'", chosen)
    ids = np.arange(math.prod(int(n) for _, n in axes)).reshape([int(n) for _, n in axes])
    order = [name for name, _ in axes]
    if any(name not in order for name in names):
        return None
    inside = [order.index(name) for name in names]
    outside = [i for i in range(len(order)) if i not in inside]
    size = math.prod(ids.shape[i] for i in inside)
    return ids.transpose(*outside, *inside).reshape(-1, size).tolist()


class _Network:
    """Mesh axes, coordinates and link rates of the devices of one slice."""

    def __init__(self, names: Sequence[str], devices: Any, chip: Chip, slices: int) -> None:
        self.names, self.chip, self.slices = tuple(names), chip, slices
        self.shape = devices.shape
        flat = devices.flatten()
        self.chips_xyz = [tuple(d.coords) for d in flat]
        self.coords = [
            (*d.coords, getattr(d, "core_on_chip", 0)) if chip.devices > 1 else tuple(d.coords)
            for d in flat
        ]
        self.sides = [max(c[i] for c in self.chips_xyz) + 1 for i in range(len(self.chips_xyz[0]))]
        plane = chip.kind in ("v5e", "v6e")
        whole = all(s % 4 == 0 for s in self.sides)
        self.rings = [s == 16 if plane else whole for s in self.sides]

    def collective(
        self,
        program: Program,
        place: Executed,
        instruction: Instruction,
        kind: str,
        overlapped: bool,
    ) -> Collective:
        """The record of one collective."""
        size_of = payload(instruction, kind, program)
        found = groups(instruction.attributes, len(self.coords))
        group = [g for g in found if g] if found else []
        group_size = max((len(g) for g in group), default=0 if found else len(self.coords))
        if kind == "collective-permute":
            axes = self._axes_of_many(group)
            low = size_of / self.chip.link
            hops = max((self._hops(a, b) for a, b in group), default=0)
            times = (low + hops * HOP_LATENCY, 2 * low + hops * HOP_LATENCY)
            group_size = 2
        else:
            axes = self.axes(group[0]) if group else ()
            times = self._time(kind, size_of, group[0] if group else [0])
        return Collective(
            kind=kind,
            axes=axes,
            size=group_size,
            payload=size_of,
            times=place.times,
            in_loop=place.times > 1,
            overlapped=overlapped,
            dcn=False,
            low=times[0],
            high=times[1],
            origin=instruction.op_name or place.instruction.op_name,
            source=program.source(instruction) or program.source(place.instruction),
        )

    def crossing(self, program: Program, place: Executed, kind: str, size: float) -> Collective:
        """The record of a transfer between slices."""
        share = 1.0 if kind == "collective-permute" else (self.slices - 1) / self.slices
        seconds = size * share / self.chip.dcn * (2 if kind == "all-reduce" else 1)
        return Collective(
            kind=kind,
            axes=("data",),
            size=self.slices,
            payload=size,
            times=place.times,
            in_loop=place.times > 1,
            overlapped=True,
            dcn=True,
            low=seconds,
            high=seconds,
            origin=place.instruction.op_name,
            source=program.source(place.instruction),
        )

    def axes(self, group: Sequence[int]) -> tuple[str, ...]:
        """Mesh axes along which the members of a group differ."""
        if max(group) >= len(self.coords):
            return ()
        places = np.stack(np.unravel_index(np.asarray(group), self.shape), axis=1)
        return tuple(n for i, n in enumerate(self.names) if len(set(places[:, i].tolist())) > 1)

    def _axes_of_many(self, found: Sequence[Sequence[int]]) -> tuple[str, ...]:
        names = {name for group in found for name in self.axes(group)}
        return tuple(n for n in self.names if n in names)

    def _hops(self, a: int, b: int) -> int:
        """Links between two devices."""
        if max(a, b) >= len(self.coords):
            return 1
        total = 0
        for x, y, side, ring in zip(
            self.chips_xyz[a], self.chips_xyz[b], self.sides, self.rings, strict=True
        ):
            distance = abs(x - y)
            total += min(distance, side - distance) if ring else distance
        return total

    def _time(self, kind: str, size: float, group: Sequence[int]) -> tuple[float, float]:
        """Seconds of one collective, optimistic and pessimistic."""
        k = len(group)
        if k < 2 or max(group) >= len(self.coords):
            return 0.0, 0.0
        spans = self._spans(group)
        if not spans:  # the two devices of one chip
            spans = [(2, False, 1)]
        w = self.chip.link
        rates = [(2 * w if ring else w) / stride for _, ring, stride in spans]
        hops = sum(n - 1 if not ring else n // 2 for n, ring, _ in spans) * HOP_LATENCY
        if kind in ("all-to-all", "ragged-all-to-all"):
            each = [size * n * stride / ((8 if ring else 4) * w) for n, ring, stride in spans]
            return max(each) + hops, sum(each) + hops
        moved = size * (k - 1) / k * (2 if kind == "all-reduce" else 1)
        return moved / sum(rates) + hops, moved / max(rates) + hops

    def _spans(self, group: Sequence[int]) -> list[tuple[int, bool, int]]:
        """Per physical axis that a group varies on: chips, whether a ring, and the stride."""
        spans = []
        for axis, side in enumerate(self.sides):
            values = sorted({self.chips_xyz[i][axis] for i in group})
            if len(values) < 2:
                continue
            stride = min(b - a for a, b in itertools.pairwise(values))
            ring = self.rings[axis] and len(values) * stride == side
            spans.append((len(values), ring, stride))
        return spans
