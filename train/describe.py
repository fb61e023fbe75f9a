"""What a recipe is, before anything is allocated: parameters, optimiser, batch, memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, Sharding

from data_pipelines.batch import DataError, Pipeline
from jaxmods.partitioning import MESH_AXES, MeshShape
from jaxmods.system import FROZEN
from train.canonical import canonical, recipe_hash
from train.exits import UserError
from train.recipes import Recipe
from train.state import Plan, flatten, make_plan
from train.step import batch_shardings

_DEPTH = 2  # levels of module names in the table of parameters


def describe(recipe: Recipe) -> dict[str, Any]:
    """Facts about a recipe as JSON types; `render` prints them."""
    experiment = recipe.experiment
    plan = make_plan(experiment, _mesh(experiment.mesh))
    spec = experiment.system.batch_spec(experiment.batch_size)
    return {
        "recipe": recipe.name,
        "hash": recipe_hash(canonical(experiment)),
        "notes": experiment.notes,
        "system": type(experiment.system).__name__,
        "steps": experiment.steps,
        "batch_size": experiment.batch_size,
        "parameters": _parameters(plan),
        "optimiser": _optimiser(plan),
        "batch": {
            k: {"shape": list(s.shape), "dtype": s.dtype, "axes": list(s.axes)}
            for k, s in spec.items()
        },
        "functions": sorted(experiment.system.functions()),
        "protocols": [p.name for p in experiment.evaluation.protocols],
        "data": _data(experiment.data),
        "mesh": dict(plan.mesh.shape),
        "memory": _memory(plan, batch_shardings(plan, spec)),
        "flops_per_example": experiment.system.flops_per_example(),
    }


def _mesh(shape: MeshShape) -> Mesh:
    """The recipe's mesh, whether or not this machine has the devices for it: an open axis (-1)
    takes this machine's devices where they fit, and is 1 otherwise."""
    try:
        sizes = shape.resolve(len(jax.devices()))
    except ValueError:
        sizes = (shape.data, shape.fsdp, shape.tensor, shape.context)
        if any(s == 0 or s < -1 for s in sizes):
            raise UserError(f"mesh: expected positive sizes or -1, found {shape}") from None
    known = tuple(max(s, 1) for s in sizes)
    return cast(Mesh, AbstractMesh(known, MESH_AXES))  # shapes and shardings need no device


def _data(pipeline: Pipeline) -> dict[str, Any]:
    try:
        return {"fingerprint": pipeline.fingerprint(), **pipeline.describe()}
    except (DataError, OSError) as error:
        return {"not there": str(error)}


def _parameters(plan: Plan) -> list[dict[str, Any]]:
    labels, decay = flatten(plan.labels), flatten(plan.decay)
    rows: dict[str, dict[str, Any]] = {}
    for path, leaf in flatten(plan.abstract.params).items():
        module = "/".join(path[: max(min(len(path) - 1, _DEPTH), 1)])
        row = rows.setdefault(
            module,
            {"module": module, "count": 0, "trained": 0, "decayed": 0, "labels": set()},
        )
        count = math.prod(leaf.shape)
        trained = labels[path] != FROZEN
        row["count"] += count
        row["trained"] += count if trained else 0
        row["decayed"] += count if trained and bool(decay[path]) else 0
        row["labels"].add(labels[path])
    return [{**row, "labels": sorted(row["labels"])} for row in rows.values()]


def _optimiser(plan: Plan) -> list[dict[str, Any]]:
    optim = plan.experiment.optim
    return [
        {
            "label": group.label,
            "name": optim.name,
            "lr": group.lr,
            "schedule": optim.schedule,
            "warmup_steps": optim.warmup_steps,
            "start_step": group.start_step,
            "weight_decay": group.weight_decay,
            "b1": group.b1,
            "b2": group.b2,
            "lr_last_step": float(group.rate(plan.experiment.steps - 1)),
        }
        for group in plan.groups.values()
    ]


def _memory(plan: Plan, batch: Mapping[str, Sharding]) -> dict[str, Any]:
    """Bytes per device and in all, of what has to be there whatever the activations take."""
    abstract, shardings = plan.abstract, plan.shardings
    spec = plan.experiment.system.batch_spec(plan.experiment.batch_size)
    batch_structs = {k: s.struct() for k, s in spec.items()}
    parts = {
        "parameters": ((abstract.trained, abstract.frozen), (shardings.trained, shardings.frozen)),
        "gradients": (abstract.trained, shardings.trained),
        "optimiser": (abstract.opt_state, shardings.opt_state),
        "average": (abstract.ema, shardings.ema),
        "batch": (batch_structs, batch),
    }
    result: dict[str, Any] = {}
    for name, (structs, places) in parts.items():
        pairs = list(zip(jax.tree.leaves(structs), jax.tree.leaves(places), strict=True))
        result[name] = {
            "per_device": sum(_bytes(s.shard_shape(x.shape), x.dtype) for x, s in pairs),
            "total": sum(_bytes(x.shape, x.dtype) for x, _ in pairs),
        }
    result["sum"] = {
        key: sum(part[key] for part in result.values()) for key in ("per_device", "total")
    }
    result["note"] = "without activations and compiler temporaries"
    return result


def _bytes(shape: Sequence[int], dtype: Any) -> int:
    return math.prod(shape) * np.dtype(dtype).itemsize


def render(facts: dict[str, Any]) -> str:
    """The facts as text for a terminal."""
    parameters = facts["parameters"]
    total = {k: sum(r[k] for r in parameters) for k in ("count", "trained", "decayed")}
    lines = [
        f"{facts['recipe']} ({facts['hash']}): {facts['system']}, {facts['steps']:,} steps of "
        f"{facts['batch_size']:,} examples",
        *([facts["notes"]] if facts["notes"] else []),
        "",
        *table(
            ("module", "parameters", "trained", "decayed", "labels"),
            [
                (r["module"], r["count"], r["trained"], r["decayed"], " ".join(r["labels"]))
                for r in [*parameters, {"module": "all", **total, "labels": []}]
            ],
        ),
        "",
        *table(
            (
                "group",
                "optimiser",
                "lr",
                "last lr",
                "schedule",
                "warm-up",
                "start",
                "decay",
                "b1",
                "b2",
            ),
            [
                (
                    g["label"],
                    g["name"],
                    f"{g['lr']:g}",
                    f"{g['lr_last_step']:.3g}",
                    g["schedule"],
                    g["warmup_steps"],
                    g["start_step"],
                    f"{g['weight_decay']:g}",
                    f"{g['b1']:g}",
                    f"{g['b2']:g}",
                )
                for g in facts["optimiser"]
            ],
        ),
        "",
        *table(
            ("batch array", "dtype", "shape"),
            [(k, v["dtype"], " × ".join(map(str, v["shape"]))) for k, v in facts["batch"].items()],
        ),
        "",
        *table(
            ("memory", "per device", "in all"),
            [
                (k, size(v["per_device"]), size(v["total"]))
                for k, v in facts["memory"].items()
                if isinstance(v, dict)
            ],
        ),
        f"({facts['memory']['note']}; mesh "
        + " × ".join(f"{k} {v}" for k, v in facts["mesh"].items())
        + ")",
        "",
        *(f"data {k}: {v}" for k, v in facts["data"].items()),
        f"functions: {', '.join(facts['functions']) or 'none'}",
        f"protocols: {', '.join(facts['protocols']) or 'none'}",
    ]
    if facts["flops_per_example"]:
        lines.append(
            f"model FLOPs per example, forward and backward: {facts['flops_per_example']:.3g}"
        )
    return "\n".join(lines)


def size(count: int) -> str:
    """Bytes for a person."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} TiB"


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Aligned columns; whole numbers with thousands separators, to the right."""
    cells = [list(header)]
    numeric = [True] * len(header)
    for row in rows:
        shown = []
        for i, value in enumerate(row):
            whole = isinstance(value, int) and not isinstance(value, bool)
            numeric[i] = numeric[i] and whole
            shown.append(f"{value:,}" if whole else str(value))
        cells.append(shown)
    widths = [max(len(r[i]) for r in cells) for i in range(len(header))]
    return [
        "  ".join(
            c.rjust(w) if right else c.ljust(w)
            for c, w, right in zip(r, widths, numeric, strict=True)
        ).rstrip()
        for r in cells
    ]
