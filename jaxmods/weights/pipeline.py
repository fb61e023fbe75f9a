"""Writing folders of several models, as diffusers keeps a pipeline: one sub-folder per component.

    folder/model_index.json             which class every component is of
    folder/transformer/config.json, diffusion_pytorch_model.safetensors
    folder/text_encoder/config.json, model.safetensors

`open_weights` reads such a folder as one set of tensors, named `<component>.<key>`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.typing import DTypeLike

from jaxmods.weights.convert import SHARD_BYTES, Exported, export_tensors, write_asset
from jaxmods.weights.errors import WeightError
from jaxmods.weights.lazy import Lazy
from jaxmods.weights.map import WeightMap
from jaxmods.weights.reader import PIPELINE
from jaxmods.weights.writer import (
    Progress,
    check_target,
    file_order,
    new_folder,
    plan_shards,
    write_json,
    write_sharded,
)


@dataclasses.dataclass(frozen=True)
class Component:
    """One sub-folder of a pipeline.

    Attributes:
      name: of the folder, and what stands before the dot of its keys.
      kind: library and class, as `model_index.json` says; None for what it does not speak of.
      config: its `config.json`.
      stem: of its weight files.
    """

    name: str
    kind: tuple[str, str] | None
    config: Mapping[str, Any]
    stem: str = "model"


@dataclasses.dataclass(frozen=True)
class HubPipeline:
    """What a pipeline folder holds besides weights.

    Attributes:
      components: every sub-folder with weights.
      index: further fields of `model_index.json`, as `_class_name`.
      documents: further JSON files by path ("scheduler/scheduler_config.json").
    """

    components: tuple[Component, ...]
    index: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    documents: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)


def export_pipeline(
    params: Any,
    weight_map: WeightMap,
    pipeline: HubPipeline,
    folder: str | Path,
    *,
    max_shard_bytes: int = SHARD_BYTES,
    assets: Mapping[str, Path | bytes] | None = None,
    dtype: DTypeLike | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Parameters as a pipeline folder that appears whole or not at all.

    In a run of several processes all must call it; the first one writes.

    Args:
      params: nested dict of arrays; may be sharded over devices and processes.
      weight_map: covers `params`; its keys begin with the name of a component and a dot.
      pipeline: its components are all that the map speaks of.
      folder: target; must not exist, or be empty, unless `overwrite`.
      max_shard_bytes: size of a weight file at which the next is begun.
      assets: further files by path (tokenizers). From a `model_index.json` among them the fields
        about their sub-folders are kept.
      dtype: conversion of floating tensors; None keeps the parameters' dtypes.
      overwrite: replace what is at `folder`, after the new one is complete.
      progress: called with (bytes written, bytes in all).

    Raises:
      WeightError: the folder is taken, the disk too small, the map does not fit, or a key belongs
        to no component.
    """
    folder, components = Path(folder), pipeline.components
    tensors = export_tensors(params, weight_map, dtype=dtype)
    nbytes = sum(t.nbytes for t in tensors.values())
    parts = _by_component(tensors, components)
    if jax.process_index() != 0:
        for part in components:
            for keys in plan_shards(parts[part.name], max_shard_bytes, part.stem).values():
                for key in file_order({key: parts[part.name][key] for key in keys}):
                    parts[part.name][key].all()  # takes part in the gathers of the writing process
        multihost_utils.sync_global_devices("export_pipeline")
        return Exported({}, nbytes)
    check_target(folder, overwrite)
    files: dict[str, list[str]] = {}
    done = 0

    def advance(count: int, total: int) -> None:
        del total
        if progress is not None:
            progress(done + count, nbytes)

    with new_folder(folder, overwrite, nbytes) as work:
        for part in components:
            (work / part.name).mkdir()
            written = write_sharded(
                work / part.name,
                parts[part.name],
                max_shard_bytes=max_shard_bytes,
                stem=part.stem,
                progress=advance,
            )
            done += sum(t.nbytes for t in parts[part.name].values())
            files.update({f"{part.name}/{name}": keys for name, keys in written.items()})
            if part.config:
                write_json(work / part.name / "config.json", dict(part.config))
        for name, content in pipeline.documents.items():
            (work / name).parent.mkdir(exist_ok=True)
            write_json(work / name, dict(content))
        for name, asset in (assets or {}).items():
            if name != PIPELINE:
                write_asset(work, name, asset)
        kinds = {part.name: list(part.kind) for part in components if part.kind is not None}
        others = _index_of_assets(assets or {}, pipeline)
        write_json(work / PIPELINE, {**others, **pipeline.index, **kinds})
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("export_pipeline")
    return Exported(files, nbytes)


def _index_of_assets(assets: Mapping[str, Path | bytes], pipeline: HubPipeline) -> dict[str, Any]:
    """What the `model_index.json` among the assets says of sub-folders that hold no weights."""
    source = assets.get(PIPELINE)
    if source is None:
        return {}
    found = json.loads(source if isinstance(source, bytes) else source.read_bytes())
    folders = {name.partition("/")[0] for name in (*assets, *pipeline.documents) if "/" in name}
    return {name: value for name, value in found.items() if name in folders}


def _by_component(
    tensors: Mapping[str, Lazy], components: Sequence[Component]
) -> dict[str, dict[str, Lazy]]:
    """Tensors by component and by the key within it."""
    parts: dict[str, dict[str, Lazy]] = {part.name: {} for part in components}
    for key, tensor in tensors.items():
        name, _, inner = key.partition(".")
        if name not in parts:
            raise WeightError(
                f"pipeline export: expected {key} to belong to one of the components "
                f"{', '.join(parts)}; give the component, or leave the key out of the map"
            )
        parts[name][inner] = tensor
    return parts
