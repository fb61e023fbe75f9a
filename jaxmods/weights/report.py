"""What a file holds against what the map and the parameters expect, key by key."""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from jaxmods.weights.errors import WeightError
from jaxmods.weights.lazy import Shape

if TYPE_CHECKING:
    from jaxmods.weights.map import Binding, WeightMap

_MAX_LINES = 12


@dataclasses.dataclass(frozen=True)
class Row:
    """One PyTorch key: its path, both shapes, the transform, and how it stands.

    `status` is "ok", "missing", "optional" (missing, and may be), "copy" (missing, another tied
    copy is there), "shape", "extra" or "dropped".
    """

    key: str
    path: str
    expected: Shape | None
    found: Shape | None
    jax_shape: Shape | None
    transform: str
    status: str


@dataclasses.dataclass(frozen=True)
class Report:
    """Every key of a file and of a map. `str(report)` is a table."""

    source: str
    rows: tuple[Row, ...]

    def with_status(self, status: str) -> tuple[Row, ...]:
        """The rows of one status."""
        return tuple(row for row in self.rows if row.status == status)

    @property
    def fits(self) -> bool:
        """Whether the file can be imported."""
        return not any(row.status in ("missing", "shape", "extra") for row in self.rows)

    @property
    def missing_optional(self) -> frozenset[str]:
        """Keys that the file lacks and may lack."""
        return frozenset(row.key for row in self.with_status("optional"))

    def check(self) -> None:
        """Raises one `WeightError` that names every missing, extra and misshaped key."""
        if self.fits:
            return
        missing = [row.key for row in self.with_status("missing")]
        extra = [row.key for row in self.with_status("extra")]
        shapes = {
            row.key: f"expected {_shape(row.expected)}, found {_shape(row.found)}"
            for row in self.with_status("shape")
        }
        sections = []
        if missing:
            sections.append(_section(f"{len(missing)} missing", condense(missing)))
        if extra:
            sections.append(
                _section(f"{len(extra)} extra (in the file, not in the model)", condense(extra))
            )
        if shapes:
            grouped: dict[str, list[str]] = defaultdict(list)
            for key, text in shapes.items():
                grouped[text].append(key)
            lines = [f"{k}: {text}" for text, keys in grouped.items() for k in condense(keys)]
            sections.append(_section(f"{len(shapes)} of another shape", lines))
        raise WeightError(
            f"{self.source}: the weights do not fit the model\n"
            + "\n".join(sections)
            + f"\nto do: {_advice(missing, extra, self.missing_optional, bool(shapes))}"
        )

    def __str__(self) -> str:
        header = ("PyTorch key", "found", "path", "shape", "transform", "status")
        table = [header]
        for row in self.rows:
            found = _shape(row.found)
            if row.status == "shape":
                found += f" (expected {_shape(row.expected)})"
            table.append(
                (row.key, found, row.path, _shape(row.jax_shape), row.transform, row.status)
            )
        widths = [max(len(line[c]) for line in table) for c in range(len(header))]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
            for line in table
        ]
        counts: dict[str, int] = defaultdict(int)
        for row in self.rows:
            counts[row.status] += 1
        lines.append(", ".join(f"{n} {status}" for status, n in counts.items()))
        return "\n".join(lines)


def compare(
    weight_map: WeightMap,
    bindings: Sequence[Binding],
    found: Mapping[str, Shape],
    source: str,
) -> Report:
    """The report of a file's keys and shapes against a bound map."""
    rows = []
    known = set()
    for binding in bindings:
        paths = " + ".join(binding.paths)
        for number, row_keys in enumerate(binding.keys):
            any_present = any(key in found for key in row_keys)
            for key, shape in zip(row_keys, binding.torch_shapes, strict=True):
                known.add(key)
                if key not in found:
                    status = "missing"
                    if binding.entry.transform.any_of and any_present:
                        status = "copy"
                    elif binding.entry.optional:
                        status = "optional"
                else:
                    status = "ok" if tuple(found[key]) == shape else "shape"
                where = f"[{_index(number, binding.stack)}]" if binding.stack else ""
                rows.append(
                    Row(
                        key,
                        paths + where,
                        shape,
                        tuple(found[key]) if key in found else None,
                        binding.inner_shapes[0],
                        str(binding.entry.transform),
                        status,
                    )
                )
    for key, shape in found.items():
        if key not in known:
            drop = weight_map.dropped(key)
            rows.append(
                Row(
                    key,
                    "" if drop is None else drop.reason,
                    None,
                    tuple(shape),
                    None,
                    "" if drop is None else "Drop",
                    "extra" if drop is None else "dropped",
                )
            )
    return Report(source, tuple(rows))


def condense(keys: Iterable[str]) -> list[str]:
    """Keys that differ in one number only, as one line: `layers.{0..11}.weight (12 keys)`."""
    groups: dict[tuple[str, ...], list[tuple[str, ...]]] = defaultdict(list)
    for key in keys:
        parts = re.split(r"(?<=\.)(\d+)(?=\.|$)", key)
        groups[tuple(parts[::2])].append(tuple(parts[1::2]))
    lines = []
    for texts, members in groups.items():
        columns = list(zip(*members, strict=True))
        varying = [c for c, column in enumerate(columns) if len(set(column)) > 1]
        if len(varying) == 1:
            numbers = sorted({int(n) for n in columns[varying[0]]})
            span = (
                f"{numbers[0]}..{numbers[-1]}"
                if numbers == list(range(numbers[0], numbers[-1] + 1))
                else ",".join(map(str, numbers))
            )
            chosen = list(members[0])
            chosen[varying[0]] = "{" + span + "}"
            lines.append(f"{_join(texts, chosen)} ({len(members)} keys)")
        else:
            lines += [_join(texts, m) for m in members]
    return lines


def _join(texts: Sequence[str], numbers: Sequence[str]) -> str:
    return texts[0] + "".join(n + t for n, t in zip(numbers, texts[1:], strict=True))


def _section(title: str, lines: list[str]) -> str:
    more = [f"... and {len(lines) - _MAX_LINES} more lines (the key report lists all)"]
    shown = lines if len(lines) <= _MAX_LINES else lines[:_MAX_LINES] + more
    return f"  {title}:\n" + "\n".join(f"    {line}" for line in shown)


def _advice(missing: list[str], extra: list[str], optional: frozenset[str], shapes: bool) -> str:
    """What to try next, from how missing and extra keys relate."""
    wanted, present = {*missing, *optional}, set(extra)
    prefixes = {m[: len(m) - len(e)] for m in missing for e in extra[:1] if m.endswith("." + e)}
    for prefix in sorted(prefixes):
        if all(prefix + e in wanted for e in extra):
            return f"the keys of the file lack the prefix {prefix!r}; rename them"
    prefixes = {e[: len(e) - len(m)] for e in extra for m in missing[:1] if e.endswith("." + m)}
    for prefix in sorted(prefixes):
        if all(prefix + m in present for m in missing):
            return f"the keys of the file have an additional prefix {prefix!r}; rename them"
    if shapes or (missing and extra):
        return "the file is another model or size; choose the recipe of its size, or other weights"
    if missing:
        return "fetch a complete file, or choose the recipe that these weights belong to"
    return (
        "choose the recipe that these weights belong to, or drop the keys in the map with a reason"
    )


def _index(number: int, stack: Shape) -> str:
    index = []
    for size in reversed(stack):
        number, position = divmod(number, size)
        index.append(str(position))
    return ", ".join(reversed(index))


def _shape(shape: Shape | None) -> str:
    return "-" if shape is None else str(list(shape))
