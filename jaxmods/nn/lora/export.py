"""Adapters as files that PEFT, diffusers and kohya's tools load."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.typing import DTypeLike

from jaxmods.nn.lora.adapters import Factors, LoraConfig, sites
from jaxmods.nn.lora.files import (
    DIFFUSERS_FILE,
    METADATA,
    PEFT_CONFIG,
    PEFT_FILE,
    Dialect,
    kohya_name,
)
from jaxmods.nn.lora.modules import Pair, Published, modules, to_pairs
from jaxmods.system import Params
from jaxmods.weights.convert import from_array
from jaxmods.weights.errors import WeightError
from jaxmods.weights.lazy import from_numpy
from jaxmods.weights.writer import check_target, new_folder, write_json, write_safetensors

KOHYA_FILE = "lora.safetensors"


def save(
    folder: str | Path,
    adapters: Params,
    config: LoraConfig,
    base: Params,
    published: Sequence[Published],
    *,
    dialect: Dialect,
    base_model: str | None = None,
    dtype: DTypeLike | None = None,
    overwrite: bool = False,
) -> dict[str, int]:
    """One adapter as a folder in a dialect, with everything that states its scale.

    The rank of a module grows only where one published module is spread over kernels whose factors
    differ (q, k and v trained apart and written as one fused projection: three times the rank).
    Modules whose factors are all zeros are left out.

    Args:
      folder: appears whole or not at all; must not exist or be empty, unless `overwrite`.
      adapters: `{name: tree}` with one name; arrays may be sharded.
      base: parameters of the model or their abstract form.
      published: the names to write, one layout for each part of the model.
      base_model: name of the base model, for the config or the header.
      dtype: of the tensors; None for that of the adapters.

    Returns:
      Rank by module written.

    Raises:
      WeightError: several adapters; a kernel that no published module covers; PEFT with several
        parts; the folder is taken.
    """
    if len(adapters) != 1:
        raise WeightError(
            f"lora export: expected one adapter, found {sorted(adapters)}; export each by itself"
        )
    if dialect == "peft" and len(published) != 1:
        raise WeightError(
            "lora export: PEFT files hold one model, found parts "
            f"{[p.component for p in published]}; export each by itself, or as diffusers or kohya"
        )
    factors = {
        path: Factors(_numpy(f.a, path, dtype), _numpy(f.b, path, dtype))
        for path, by_name in sites(base, adapters).items()
        for f in by_name.values()
    }
    tensors: dict[str, np.ndarray] = {}
    statements: dict[str, dict[str, Any]] = {}
    ranks: dict[str, int] = {}
    covered: set[str] = set()
    for part in published:
        known = modules(part, base)
        covered |= {piece.path for module in known.values() for piece in module.pieces}
        pairs = {}
        for module, (A, B) in to_pairs(factors, known.values()):
            ones = (1,) * (len(module.shape) - 2)
            pairs[module.name] = (
                A.reshape(A.shape[0], *module.shape[1:]),
                B.reshape(*B.shape, *ones),
            )
        ranks.update({name: A.shape[0] for name, (A, _) in pairs.items()})
        tensors.update(_named(part, pairs, config, dialect))
        if pairs:
            universe = _weight_names(part, base)
            statements[part.component] = _statement(pairs, config, universe, base_model)
    if bare := sorted(set(factors) - covered):
        raise WeightError(
            f"lora export: no published module covers the adapted kernels {', '.join(bare[:5])}; "
            "give the map that does"
        )
    _write(Path(folder), tensors, statements, config, dialect, base_model, overwrite)
    return ranks


def _numpy(array: Any, name: str, dtype: DTypeLike | None) -> np.ndarray:
    value = from_array(array, name).all()
    return value if dtype is None else value.astype(jnp.dtype(dtype))


def _named(
    part: Published, pairs: Mapping[str, Pair], config: LoraConfig, dialect: Dialect
) -> dict[str, np.ndarray]:
    """Tensors by the keys of a dialect."""
    result = {}
    for name, (A, B) in pairs.items():
        if dialect == "kohya":
            stem = kohya_name(part, name)
            result[f"{stem}.lora_down.weight"], result[f"{stem}.lora_up.weight"] = A, B
            result[f"{stem}.alpha"] = np.asarray(config.scale * A.shape[0], np.float32)
        else:
            stem = f"{'base_model.model' if dialect == 'peft' else part.component}.{name}"
            result[f"{stem}.lora_A.weight"], result[f"{stem}.lora_B.weight"] = A, B
    return result


def _statement(
    pairs: Mapping[str, Pair], config: LoraConfig, universe: Iterable[str], base_model: str | None
) -> dict[str, Any]:
    """The PEFT config of a set of modules."""
    ranks = {name: A.shape[0] for name, (A, _) in pairs.items()}
    common = Counter(ranks.values()).most_common(1)[0][0]
    other = {name: rank for name, rank in ranks.items() if rank != common}

    def alpha(rank: int) -> float | int:
        value = config.scale * (rank**0.5 if config.rslora else rank)
        return round(value) if abs(value - round(value)) < 1e-9 * max(value, 1.0) else value

    return {
        "alpha_pattern": {f"^{re.escape(name)}": alpha(rank) for name, rank in other.items()},
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": False,
        "init_lora_weights": "gaussian" if config.init == "gaussian" else True,
        "lora_alpha": alpha(common),
        "lora_dropout": config.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": common,
        "rank_pattern": {f"^{re.escape(name)}": rank for name, rank in other.items()},
        "target_modules": target_modules(set(pairs), universe),
        "task_type": None,
        "use_dora": False,
        "use_rslora": config.rslora,
    }


def _weight_names(part: Published, base: Params) -> list[str]:
    """Modules of the model that have a matrix: what a PEFT target could hit."""
    shapes = part.weight_map.torch_shapes(part.part(base))
    return [
        key.removesuffix(".weight")
        for key, shape in shapes.items()
        if key.endswith(".weight") and len(shape) > 1
    ]


def target_modules(wanted: set[str], universe: Iterable[str]) -> list[str] | str:
    """What PEFT calls these modules: short suffixes where they hit exactly the wanted ones among
    all modules of the model, else one regular expression."""
    suffixes = {module_end(name) for name in wanted}
    hit = {n for n in universe if any(n == s or n.endswith(f".{s}") for s in suffixes)}
    if hit == wanted:
        return sorted(suffixes)
    return "|".join(re.escape(name) for name in sorted(wanted))


def module_end(name: str) -> str:
    """A module's name from within its block: "attn.to_q" of "blocks.3.attn.to_q"."""
    return re.split(r"\.\d+\.", name, maxsplit=1)[-1]


def _write(
    folder: Path,
    tensors: Mapping[str, np.ndarray],
    statements: Mapping[str, Mapping[str, Any]],
    config: LoraConfig,
    dialect: Dialect,
    base_model: str | None,
    overwrite: bool,
) -> None:
    """Writes from the first process; the others wait."""
    if jax.process_index() == 0:
        check_target(folder, overwrite)
        lazies = {key: from_numpy(tensor, key) for key, tensor in tensors.items()}
        metadata: dict[str, str] = {}
        name = {"peft": PEFT_FILE, "diffusers": DIFFUSERS_FILE, "kohya": KOHYA_FILE}[dialect]
        if dialect == "diffusers":
            merged = {
                f"{component}.{field}": value
                for component, fields in statements.items()
                for field, value in fields.items()
            }
            metadata[METADATA] = json.dumps(merged, indent=2, sort_keys=True)
        elif dialect == "kohya":
            metadata["ss_network_module"] = "networks.lora"
            metadata["ss_network_dim"] = str(config.rank)
            metadata["ss_network_alpha"] = str(config.scale * config.rank)
            if base_model is not None:
                metadata["ss_sd_model_name"] = base_model
        nbytes = sum(tensor.nbytes for tensor in tensors.values())
        with new_folder(folder, overwrite, nbytes) as work:
            write_safetensors(work / name, lazies, metadata=metadata)
            if dialect == "peft":
                write_json(work / PEFT_CONFIG, next(iter(statements.values())))
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("lora export")
