"""The compiled program as text: instructions, loops and how often each instruction runs.

The text is what XLA dumps as `*.after_codegen.txt`. Its traps, and how they are met:

* an instruction may span lines: one ends where the next begins, a computation at a line
  that is `}` (and perhaps the thread that runs it);
* loops carry no trip count: it is the constant that the condition compares the counter with;
* JSON keys of `backend_config` are looked up one by one, in no order;
* source positions are a table at the head (`stack_frame_id`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_START = re.compile(r"^  (?:ROOT )?%[\w.\-]+ = ")
_HEAD = re.compile(r"^(ENTRY )?%([\w.\-]+) \(")
_END = re.compile(r'^\}(, execution_thread="[^"]*")?$')
_NAME = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = ")
_OPCODE = re.compile(r" ?([\w\-]+)\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\](\{[^{}]*\})?")
_CALLS = re.compile(r"(?:calls|to_apply|body)=%([\w.\-]+)")
_OPERAND = re.compile(r"%([\w.\-]+)")
_ITEM_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "token": 0}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
      name: without `%`. shape: its text. opcode: as `fusion`.
      operands: text between the parentheses. attributes: what follows them.
    """

    name: str
    shape: str
    opcode: str
    operands: str
    attributes: str
    root: bool

    def attribute(self, key: str) -> str | None:
        """Value of `key=%name` or `key={...}`-free attributes."""
        match = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return match[1] if match else None

    @property
    def op_name(self) -> str:
        """Where the instruction comes from in the traced program."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1].replace("\\'", "'") if match else ""

    @property
    def cycles(self) -> float | None:
        """The compiler's estimate; collectives and custom kernels have none."""
        match = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return float(match[1]) if match else None

    @property
    def operand_names(self) -> list[str]:
        """Instructions that it reads."""
        return _OPERAND.findall(self.operands)


@dataclasses.dataclass(frozen=True)
class Executed:
    """An instruction, how often the program runs it, and the computation it stands in."""

    instruction: Instruction
    times: int
    computation: str


@dataclasses.dataclass
class Program:
    """A parsed program.

    Attributes:
      computations: instructions by computation. entry: the name of the first.
      partitions: devices that the program is for (of one slice).
      aliased: outputs that live in the memory of an argument.
    """

    computations: dict[str, list[Instruction]]
    entry: str
    partitions: int
    aliased: int
    frames: dict[int, tuple[int, int]]
    locations: dict[int, tuple[int, int]]
    files: dict[int, str]

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        """Every instruction by its name (unique in a module)."""
        return {i.name: i for body in self.computations.values() for i in body}

    def source(self, instruction: Instruction) -> str:
        """`file:line` of the innermost frame in this repository's code; empty if unknown."""
        match = re.search(r"stack_frame_id=(\d+)", instruction.attributes)
        if match is None:
            old = re.search(r'source_file="([^"]*)" source_line=(\d+)', instruction.attributes)
            return f"{shorten(old[1])}:{old[2]}" if old else ""
        frame, first = int(match[1]), ""
        while frame in self.frames:
            location, parent = self.frames[frame]
            file, line = self.locations.get(location, (0, 0))
            path = self.files.get(file, "")
            first = first or f"{shorten(path)}:{line}"
            if "site-packages" not in path:
                return f"{shorten(path)}:{line}"
            if parent == frame:
                break
            frame = parent
        return first

    def callees(self, instruction: Instruction) -> list[str]:
        """Computations that an instruction calls, conditions of loops left out."""
        found = _CALLS.findall(instruction.attributes)
        for several in re.findall(
            r"(?:branch|called)_computations=\{([^}]*)\}", instruction.attributes
        ):
            found += _OPERAND.findall(several)
        for key in ("true_computation", "false_computation"):
            name = instruction.attribute(key)
            found += [name] if name else []
        return [name for name in found if name in self.computations]

    def trips(self, loop: Instruction) -> int | None:
        """How often the body of a `while` runs; None where the bound is not a constant."""
        body = self.computations.get(loop.attribute("condition") or "", [])
        here = {i.name: i for i in body}
        root = next((i for i in body if i.root), None)
        if root is None:
            return None
        compare, operands = root, root.operand_names
        if root.opcode == "fusion":  # the comparison inside, its parameters are the operands
            inner = [i for name in self.callees(root) for i in self.computations[name]]
            found = next((i for i in inner if i.opcode == "compare"), None)
            if found is None:
                return None
            numbers = {i.name: int(i.operands) for i in inner if i.opcode == "parameter"}
            here |= {i.name: i for i in inner}
            compare = found
            operands = [
                root.operand_names[numbers[o]] if o in numbers else o for o in found.operand_names
            ]
        if compare.opcode != "compare" or len(operands) != 2:
            return None
        direction = compare.attribute("direction")
        for position, name in enumerate(operands):
            bound = _constant(here.get(name))
            if bound is None:
                continue
            if position == 0:  # constant on the left: mirrored
                direction = {"GT": "LT", "GE": "LE"}.get(direction or "", direction)
            if direction in ("LT", "NE"):
                return bound
            return bound + 1 if direction == "LE" else None
        return None

    def executed(self) -> tuple[list[Executed], int]:
        """Every instruction that runs outside fusions, with its count; and loops of unknown
        length (counted once). Of a conditional the branch with more cycles is taken."""
        result: list[Executed] = []
        unknown = 0

        def walk(name: str, times: int) -> None:
            nonlocal unknown
            for instruction in self.computations[name]:
                result.append(Executed(instruction, times, name))
                callees = self.callees(instruction)
                if instruction.opcode == "while":
                    trips = self.trips(instruction)
                    unknown += trips is None
                    for callee in callees:
                        walk(callee, times * (1 if trips is None else trips))
                elif instruction.opcode == "conditional" and callees:
                    walk(max(callees, key=self.cycles_of), times)
                elif instruction.opcode == "call":
                    for callee in callees:
                        walk(callee, times)

        walk(self.entry, 1)
        return result, unknown

    def cycles_of(self, computation: str) -> float:
        """Estimated cycles of one run of a computation."""
        total = 0.0
        for instruction in self.computations[computation]:
            total += instruction.cycles or 0.0
            if instruction.opcode in ("while", "call"):
                times = self.trips(instruction) or 1 if instruction.opcode == "while" else 1
                total += times * sum(self.cycles_of(c) for c in self.callees(instruction))
        return total

    def inside(self, instruction: Instruction) -> Iterator[Instruction]:
        """Instructions of the fused (or asynchronous) computations below an instruction."""
        for name in self.callees(instruction):
            for inner in self.computations[name]:
                yield inner
                yield from self.inside(inner)


def parse(text: str) -> Program:
    """A program from its text."""
    head = re.search(r"num_partitions=(\d+)", text[:200_000])
    first = text.split("\n", 2)[0]
    program = Program(
        {},
        "",
        int(head[1]) if head else 1,
        len(re.findall(r"may-alias|must-alias", first)),
        {},
        {},
        {},
    )
    lines = text.split("\n")
    _tables(lines, program)
    name, pending = "", [""]
    body: list[Instruction] = []

    def flush() -> None:
        if pending[0]:
            body.append(_instruction(pending[0]))
        pending[0] = ""

    for line in lines:
        if name:
            if _END.match(line):
                flush()
                program.computations[name] = body
                name, body = "", []
            elif _START.match(line):
                flush()
                pending[0] = line
            elif pending[0]:
                pending[0] += line
            continue
        head = _HEAD.match(line)
        if head and line.endswith("{"):
            name = head[2]
            if head[1]:
                program.entry = name
    return program


def _tables(lines: list[str], program: Program) -> None:
    section = ""
    for line in lines:
        if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            section = line
        elif line.startswith(("%", "ENTRY")):
            return
        elif section == "FileNames" and (match := re.match(r'(\d+) "(.*)"', line)):
            program.files[int(match[1])] = match[2]
        elif section == "FileLocations" and (
            match := re.match(r"(\d+) \{file_name_id=(\d+) .*?\bline=(\d+)", line)
        ):
            program.locations[int(match[1])] = (int(match[2]), int(match[3]))
        elif section == "StackFrames" and (
            match := re.match(r"(\d+) \{file_location_id=(\d+)(?: parent_frame_id=(\d+))?", line)
        ):
            program.frames[int(match[1])] = (int(match[2]), int(match[3] or match[1]))


def _instruction(text: str) -> Instruction:
    head = _NAME.match(text)
    if head is None:
        raise ValueError(f"preflight: expected an instruction, found {text[:120]!r}")
    rest = text[head.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape = rest[:end]
    opcode = _OPCODE.match(rest, end)
    if opcode is None:
        raise ValueError(f"preflight: expected an operation, found {rest[end : end + 80]!r}")
    close = _closing(rest, opcode.end() - 1)
    return Instruction(
        name=head[2],
        shape=shape,
        opcode=opcode[1],
        operands=rest[opcode.end() : close],
        attributes=rest[close + 1 :],
        root=head[1] is not None,
    )


def _closing(text: str, start: int) -> int:
    """Position of the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    return len(text) - 1


def _constant(instruction: Instruction | None) -> int | None:
    if instruction is None or instruction.opcode != "constant":
        return None
    return int(instruction.operands) if re.fullmatch(r"-?\d+", instruction.operands) else None


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a shape's text."""

    dtype: str
    dims: tuple[int, ...]
    layout: str

    @property
    def item(self) -> float:
        """Bytes of an element."""
        if self.dtype in _ITEM_BYTES:
            return _ITEM_BYTES[self.dtype]
        digits = re.search(r"\d+", self.dtype)
        return int(digits[0]) / 8 if digits else 1

    @property
    def bytes(self) -> float:
        """Without padding."""
        return math.prod(self.dims) * self.item

    @property
    def padded(self) -> float:
        """With the two minor dimensions rounded up to the layout's tile."""
        order = re.match(r"\{([\d,]+)", self.layout)
        tile = re.search(r":T\(([\d,]+)\)", self.layout)
        if not order or not tile or not self.dims:
            return self.bytes
        dims = [self.dims[int(i)] for i in order[1].split(",")]  # minor first
        sides = [int(s) for s in tile[1].split(",")][::-1]
        for i, side in enumerate(sides[: len(dims)]):
            dims[i] = -(-dims[i] // side) * side
        return math.prod(dims) * self.item

    @property
    def in_hbm(self) -> bool:
        """Whether it lies in HBM, and not in one of the small memories."""
        return not re.search(r"S\([1-9]\d*\)", self.layout)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


def arrays(shape: str) -> list[Array]:
    """The arrays of a shape's text, tuples flattened."""
    return [
        Array(m[1], tuple(int(d) for d in m[2].split(",") if d), m[3] or "")
        for m in _ARRAY.finditer(shape)
    ]


def shorten(path: str) -> str:
    """A path without the part that depends on the machine."""
    for marker in ("/site-packages/", "/jaxmods/", "/train/", "/tests/", "/configs/"):
        at = path.rfind(marker)
        if at >= 0:
            return path[at + (len(marker) if "site" in marker else 1) :]
    return path
