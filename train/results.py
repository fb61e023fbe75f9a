"""Evaluation results in a run folder: written once per protocol and step, read by the report.

Layout:

    eval/<step>.json                       {"step": int, "results": [result, ...]}
    eval/<step>/<protocol>/panels.json     [{"title", "caption", "file", "html"}, ...]
    eval/<step>/<protocol>/<n>.png

A result holds `protocol, metrics {name: {value, chance, published, fraction}}, settings, records,
seconds, counts, notes`. A value that is not finite is written as a string ("nan", "inf"), so that
the file stays valid JSON for every reader.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.protocols.base import EvalResult, Metric, Panel

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")


def plain(value: Any) -> Any:
    """`value` as JSON types: dataclasses and mappings become objects, sequences and arrays become
    lists, NumPy scalars become numbers, paths and everything else become text."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, Set):
        return sorted((plain(v) for v in value), key=str)
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [plain(v) for v in value]
    return str(value)


def write_json(path: Path, value: Any) -> None:
    """Write `value` (through `plain`) to `path` at once: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.part")
    text = json.dumps(plain(value), indent=1, ensure_ascii=False, allow_nan=False)
    partial.write_text(text + "\n", encoding="utf-8")
    os.replace(partial, path)


def to_json(result: EvalResult) -> dict[str, Any]:
    """`result` without its panels, as JSON types."""
    named = {f.name: getattr(result, f.name) for f in dataclasses.fields(result)}
    del named["panels"]
    converted: dict[str, Any] = plain(named)
    return converted


def from_json(value: Mapping[str, Any], panels: Sequence[Panel] = ()) -> EvalResult:
    """Inverse of `to_json`, with its panels given back."""

    def number(x: float | str | None) -> float | None:
        return None if x is None else float(x)

    metrics = {
        name: Metric(
            float(m["value"]),
            number(m.get("chance")),
            number(m.get("published")),
            bool(m.get("fraction", True)),
        )
        for name, m in value["metrics"].items()
    }
    return EvalResult(
        protocol=value["protocol"],
        metrics=metrics,
        settings=dict(value["settings"]),
        records=int(value["records"]),
        seconds=float(value["seconds"]),
        panels=tuple(panels),
        counts=dict(value.get("counts", {})),
        notes=tuple(value.get("notes", ())),
    )


def save_result(result: EvalResult, folder: Path, step: int) -> Path:
    """Write one protocol's result for `step` into the run folder; a result that is there for the
    same protocol and step is replaced (a resumed run evaluates the same step again).

    Returns:
      Path of `eval/<step>.json`.

    Raises:
      ValueError: the protocol's name cannot be a folder name, or a negative step.
    """
    if not _NAME.fullmatch(result.protocol):
        raise ValueError(
            f"save_result: expected a protocol name of letters, digits, '_', '.', '+', '-', found "
            f"{result.protocol!r}; it becomes a folder name"
        )
    if step < 0:
        raise ValueError(f"save_result: expected a step of 0 or more, found {step}")
    pictures = Path(folder) / "eval" / str(step) / result.protocol
    if pictures.is_dir():
        for old in pictures.glob("*.png"):
            old.unlink()
    if result.panels or pictures.is_dir():
        pictures.mkdir(parents=True, exist_ok=True)
        index = []
        for n, panel in enumerate(result.panels):
            file = f"{n}.png" if panel.png is not None else None
            if panel.png is not None:
                (pictures / f"{n}.png").write_bytes(panel.png)
            index.append(
                {"title": panel.title, "caption": panel.caption, "file": file, "html": panel.html}
            )
        write_json(pictures / "panels.json", index)
    path = Path(folder) / "eval" / f"{step}.json"
    there = json.loads(path.read_text(encoding="utf-8"))["results"] if path.exists() else []
    kept = [r for r in there if r["protocol"] != result.protocol]
    write_json(path, {"step": step, "results": [*kept, to_json(result)]})
    return path


def _panels(folder: Path) -> list[Panel]:
    index = folder / "panels.json"
    if not index.exists():
        return []
    found = []
    for entry in json.loads(index.read_text(encoding="utf-8")):
        # Only the base name: an index never reaches out of its own folder.
        png = (folder / Path(entry["file"]).name).read_bytes() if entry["file"] else None
        found.append(Panel(entry["title"], entry["caption"], png, entry.get("html")))
    return found


def load_results(folder: Path) -> dict[int, dict[str, EvalResult]]:
    """Every result in a run folder: step (ascending) -> protocol -> result with its panels."""
    found: dict[int, dict[str, EvalResult]] = {}
    root = Path(folder) / "eval"
    for path in root.glob("*.json"):
        if not path.stem.isdigit():
            continue
        content = json.loads(path.read_text(encoding="utf-8"))
        found[int(content["step"])] = {
            r["protocol"]: from_json(r, _panels(root / path.stem / r["protocol"]))
            for r in content["results"]
        }
    return dict(sorted(found.items()))
