"""Weights in from PyTorch, weights out to PyTorch, and the certificate that they are the same.

The command line, the loop's initialisation and the tests use these functions; the map itself is the
system's (`System.weights`), the engine is `jaxmods.weights`.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxmods.partitioning import unbox
from jaxmods.system import Array, Params, System
from jaxmods.weights import (
    Exported,
    Report,
    WeightError,
    export_params,
    export_tensors,
    import_lazies,
    import_params,
    open_weights,
    report,
)
from jaxmods.weights.convert import SHARD_BYTES, cast_floating, from_array
from jaxmods.weights.lazy import Lazy, same_values
from jaxmods.weights.map import flatten
from jaxmods.weights.pipeline import export_pipeline
from jaxmods.weights.reader import PIPELINE
from jaxmods.weights.writer import Progress, check_target
from train.adapters import read_adapters
from train.certificate import TOLERANCE, Certificate, certify, one_process
from train.checkpoint import is_params_folder, load_params, save_params
from train.exits import UserError, as_user_error

ASSETS = "assets"

# Files beside published weights that belong to the tokenizer or the processor.
ASSET_NAMES = (
    "added_tokens.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


def abstract_params(system: System) -> Params:
    """Shapes and dtypes of a system's parameters, nothing allocated."""
    return unbox(jax.eval_shape(system.init, jax.random.key(0)))


def dry_run(system: System, source: str | Path) -> Report:
    """Key by key, what `source` holds against what the system needs; `str()` of it is the table.

    Raises:
      UserError: the file cannot be opened.
    """
    with as_user_error(), open_weights(source) as reader:
        return report(reader, system.weights(), abstract_params(system))


def import_weights(
    system: System,
    source: str | Path,
    *,
    like: Params | None = None,
    dtype: DTypeLike | None = "abstract",
    progress: Progress | None = None,
) -> Params:
    """Published PyTorch weights as parameters of `system`.

    Args:
      source: a folder in the Hugging Face layout, a weight file, or an index.
      like: `ShapeDtypeStruct`s, with shardings where wanted (a plan's abstract parameters);
        None: the system's own, on one device.
      dtype: "abstract": the dtypes of `like`; None: as stored; otherwise that of all floats.
      progress: called with (bytes read, bytes in all).

    Raises:
      UserError: `config.json` is that of another size, or the weights do not fit, or are damaged.
    """
    target = abstract_params(system) if like is None else like
    with as_user_error(), open_weights(source) as reader:
        check_config(system, source)
        params, missing = import_params(
            reader, system.weights(), target, dtype=dtype, progress=progress
        )
        if missing:
            try:
                completed = system.complete_import(params, missing)
            except ValueError as error:
                raise WeightError(f"{reader.source}: {error}") from error
            params = jax.tree.map(_like, completed, params)
    return params


def read_params(
    system: System,
    source: str | Path,
    *,
    like: Params | None = None,
    progress: Progress | None = None,
) -> Params:
    """Parameters from a folder of `import_to_folder`, or else from PyTorch weights."""
    if is_params_folder(Path(source)):
        return load_params(Path(source), abstract_params(system) if like is None else like)
    return import_weights(system, source, like=like, progress=progress)


def import_to_folder(
    system: System,
    source: str | Path,
    to: str | Path,
    *,
    facts: Mapping[str, Any],
    like: Params | None = None,
    adapters: str | Path | None = None,
    dtype: DTypeLike | None = "abstract",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Params:
    """Imports weights and keeps them as a folder that `fit`, `eval` and `export` read.

    `to` then holds the parameters, `params.json` (`facts` and where they came from) and, in
    `assets/`, the tokenizer and processor files of the source.

    Args:
      adapters: a file of adapters for the imported base, see `train.adapters.read_adapters`.

    Returns:
      The parameters.

    Raises:
      UserError: `to` is taken, or see `import_weights`.
    """
    to = Path(to)
    if jax.process_index() == 0:
        with as_user_error():
            check_target(to, overwrite)
    origin = {"imported_from": str(Path(source).absolute())}
    params = import_weights(system, source, like=like, dtype=dtype, progress=progress)
    if adapters is not None:
        params, _ = read_adapters(system, params, adapters)
        origin["adapters_from"] = str(Path(adapters).absolute())
    if jax.process_index() == 0 and to.exists():
        shutil.rmtree(to / ASSETS, ignore_errors=True)
    save_params(to, params, {**facts, **origin})
    if jax.process_index() == 0:
        for name, file in hub_assets(source).items():
            (to / ASSETS / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, to / ASSETS / name)
    return params


def export_weights(
    system: System,
    params: Params,
    to: str | Path,
    *,
    assets: Mapping[str, Path | bytes] | None = None,
    dtype: DTypeLike | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Parameters as a folder that the published PyTorch class loads with `strict=True`: of one
    model, or of a sub-folder per model where the system says so (`System.hub_pipeline`).

    Args:
      assets: further files by name (tokenizer, processor); see `hub_assets`.
      dtype: conversion of floats; None keeps those of `params`.
      max_shard_bytes: size of one weight file.
      overwrite: replace what is there.
      progress: called with (bytes written, bytes in all).

    Raises:
      UserError: the folder is taken, the disk is too small, or the parameters do not fit the map.
    """
    pipeline = system.hub_pipeline()
    with as_user_error():
        if pipeline is not None:
            return export_pipeline(
                params,
                system.weights(),
                pipeline,
                to,
                max_shard_bytes=max_shard_bytes,
                assets=assets,
                dtype=dtype,
                overwrite=overwrite,
                progress=progress,
            )
        return export_params(
            params,
            system.weights(),
            to,
            system.hub_config(),
            max_shard_bytes=max_shard_bytes,
            assets={k: v for k, v in (assets or {}).items() if k != PIPELINE},
            dtype=dtype,
            overwrite=overwrite,
            progress=progress,
        )


def verify(
    system: System,
    params: Params,
    folder: str | Path,
    *,
    rng: Array | None = None,
    dtype: DTypeLike | None = None,
    tolerance: float = TOLERANCE,
) -> Certificate:
    """Reads an exported folder back, compares it, and leaves `verify.json` in it.

    Every parameter is re-read through the map (strictly) and compared bit for bit with `params`;
    then the system's PyTorch reference, where there is one and PyTorch is installed, runs on the
    folder and its outputs are compared with ours.

    Args:
      params: what was exported, before the conversion to `dtype`.
      rng: key of the random inputs of the forward pass.
      dtype: the dtype that the export converted floats to, None for none.
      tolerance: bound on each relative error.

    Returns:
      The certificate; its `passed` says how it went. A damaged folder counts as not bit-equal only
      when its tensors can be read at all.

    Raises:
      UserError: the folder cannot be read or its keys and shapes do not fit; several processes.
    """
    one_process()
    folder = Path(folder)
    weight_map = system.weights()
    with as_user_error(), open_weights(folder) as reader:
        stored, _ = import_lazies(reader, weight_map, params)
        sent = export_tensors(params, weight_map, dtype=dtype)
        ours = {path: _exported(leaf, path, dtype) for path, leaf in flatten(params).items()}
        differing = [path for path, leaf in ours.items() if not same_values(stored[path], leaf)]
        differing += [
            key
            for key, tensor in sent.items()
            if key not in reader.tensors or not same_values(tensor, reader.tensors[key])
        ]
        nbytes = sum(tensor.nbytes for tensor in reader.tensors.values())
        count = len(reader.tensors)
    forward, errors = _compare_forward(system, folder, params, rng, dtype)
    return certify(folder, differing, count, nbytes, forward, errors, tolerance)


def hub_assets(folder: str | Path) -> dict[str, Path]:
    """Tokenizer and processor files in a folder (or beside a file), by name; of a pipeline those of
    its sub-folders too, with its index."""
    folder = Path(folder)
    folder = folder if folder.is_dir() else folder.parent
    places, names = [folder], list(ASSET_NAMES)
    if (folder / PIPELINE).is_file():
        places += sorted(p for p in folder.iterdir() if p.is_dir())
        names.append(PIPELINE)
    files = [place / name for place in places for name in names]
    return {file.relative_to(folder).as_posix(): file for file in files if file.is_file()}


def check_config(system: System, source: str | Path) -> None:
    """Refuses weights whose `config.json` states other sizes than the system has.

    Compared are the sizes (whole numbers and lists of them), activations and epsilons that both
    name; token ids are not, since published files are known to be wrong about them.

    Raises:
      UserError: names every differing field with the expected and the found value.
    """
    path = Path(source)
    path = (path if path.is_dir() else path.parent) / "config.json"
    if not path.exists():
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); fetch it again") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(found).__name__}")
    if differences := list(_differences(system.hub_config(), found)):
        raise UserError(
            f"{path}: the weights are of another size than the recipe: {'; '.join(differences)}; "
            "choose the recipe of this size, or other weights"
        )


def _like(array: Any, model: jax.Array) -> jax.Array:
    """`array` in the dtype and at the place of another of its shape."""
    return jax.device_put(jnp.asarray(array, model.dtype), model.sharding)


def _differences(
    expected: Mapping[str, Any], found: Mapping[str, Any], prefix: str = ""
) -> Iterator[str]:
    for name, value in expected.items():
        if name not in found:
            continue  # published files leave defaults out
        if isinstance(value, Mapping):
            if isinstance(found[name], Mapping):
                yield from _differences(value, found[name], f"{prefix}{name}.")
        elif _is_structural(name, value) and value != found[name]:
            yield f"{prefix}{name}: expected {value!r}, found {found[name]!r}"


def _is_structural(name: str, value: Any) -> bool:
    if name.endswith("_token_id"):
        return False
    if name.endswith(("_act", "_eps", "activation")):
        return True
    values = value if isinstance(value, list | tuple) else [value]
    return all(type(v) is int for v in values)


def _exported(leaf: Any, path: str, dtype: DTypeLike | None) -> Lazy:
    """A parameter as an export would hand it to the map."""
    array = from_array(leaf, path)
    return array if dtype is None else cast_floating(array, jnp.dtype(dtype))


def _compare_forward(
    system: System, folder: Path, params: Params, rng: Array | None, dtype: DTypeLike | None
) -> tuple[str, dict[str, float]]:
    """What was compared, and the relative errors by output."""
    if importlib.util.find_spec("torch") is None:
        return "not compared: PyTorch is not installed", {}
    if dtype is not None:  # both sides must start from the rounded values
        params = jax.tree.map(
            lambda x: (
                x.astype(dtype).astype(x.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
            ),
            params,
        )
    try:
        errors = system.verify_export(folder, params, jax.random.key(0) if rng is None else rng)
    except ImportError as error:
        return f"not compared: {error}", {}
    if not errors:
        return f"not compared: {type(system).__name__} has no PyTorch reference", {}
    return "compared", {name: float(error) for name, error in errors.items()}
