"""The canonical form of a recipe: JSON with type names, its hash, and differences as lines."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

TYPE_KEY = "_type"
ABSENT = "(absent)"


def canonical(value: Any, path: str = "experiment") -> Any:
    """JSON-ready form of a recipe value.

    Dataclasses become objects with their type name under `_type`, tuples become lists, paths and
    enums strings; bytes are replaced by their SHA-256. Floats keep every bit (JSON's repr), NaN
    and infinity become strings.

    Raises:
      TypeError: a value without a canonical form, with its path.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            f.name: canonical(getattr(value, f.name), f"{path}.{f.name}")
            for f in dataclasses.fields(value)
        }
        return {TYPE_KEY: type_name(type(value)), **fields}
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, np.generic):
        return canonical(value.item(), path)
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, bytes):
        return "sha256:" + hashlib.sha256(value).hexdigest()
    if isinstance(value, (tuple, list)):
        return [canonical(v, f"{path}.{i}") for i, v in enumerate(value)]
    if isinstance(value, (set, frozenset)):
        return sorted(canonical(v, path) for v in value)
    if isinstance(value, dict):
        return {str(k): canonical(v, f"{path}.{k}") for k, v in sorted(value.items())}
    if isinstance(value, type):
        return type_name(value)
    raise TypeError(
        f"{path}: expected plain values and dataclasses in a recipe, found {type(value).__name__}; "
        "keep arrays, functions and open files out of recipes"
    )


def type_name(cls: type) -> str:
    """`module.QualName`, as written under `_type`."""
    return f"{cls.__module__}.{cls.__qualname__}"


def recipe_hash(form: Any) -> str:
    """First 16 hex digits of the SHA-256 of a canonical form."""
    text = json.dumps(form, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def flatten(form: Any, path: str = "") -> dict[str, Any]:
    """Leaves of a canonical form by dotted path; a type name sits at the path of its object."""
    if isinstance(form, dict):
        leaves: dict[str, Any] = {}
        for key, value in form.items():
            name = path if key == TYPE_KEY else f"{path}.{key}" if path else key
            leaves.update({name: value} if key == TYPE_KEY else flatten(value, name))
        return leaves or {path: {}}
    if isinstance(form, list) and any(isinstance(v, (dict, list)) for v in form):
        leaves = {}
        for i, value in enumerate(form):
            leaves.update(flatten(value, f"{path}.{i}" if path else str(i)))
        return leaves
    return {path: form}


def differences(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """`{path: (old, new)}` of two canonical forms, in the order of the new one. A field that the
    old one does not know and that is none in the new one is no difference."""
    before, after = flatten(old), flatten(new)
    after = {path: value for path, value in after.items() if path in before or value is not None}
    return {
        path: (before.get(path, ABSENT), after.get(path, ABSENT))
        for path in [*after, *(p for p in before if p not in after)]
        if path not in before or path not in after or before[path] != after[path]
    }


def diff_lines(old: Any, new: Any) -> list[str]:
    """Differences as lines `path: old → new`."""
    return [f"{path}: {show(a)} → {show(b)}" for path, (a, b) in differences(old, new).items()]


def show(value: Any) -> str:
    """Short text of a canonical leaf."""
    if value == ABSENT:
        return ABSENT
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
