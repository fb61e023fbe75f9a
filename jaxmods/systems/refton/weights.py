"""RefTON's weights: the base from a diffusers folder, adapters in and out in the official format.

    pytorch_lora_weights.safetensors       transformer.transformer_blocks.0.attn.to_q.lora_A.weight
    header lora_adapter_metadata           transformer.r, transformer.lora_alpha, ...

A file without that header is taken at scale 1, as diffusers does; `alpha` overrides what a file
says.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import jax
from jax.typing import DTypeLike

from jaxmods.nn import lora
from jaxmods.partitioning import unbox
from jaxmods.system import Params
from jaxmods.systems.flux import weights as flux
from jaxmods.systems.flux.base import FluxBase
from jaxmods.systems.flux.weights import (
    KONTEXT,
    abstract_transformer,
    base_map,
    hub_pipeline,
    published,
)
from jaxmods.systems.refton import prompt
from jaxmods.weights import Drop, Entry, WeightError, WeightMap
from jaxmods.weights.convert import Exported
from jaxmods.weights.pipeline import Component, HubPipeline, export_pipeline
from jaxmods.weights.writer import Progress

if TYPE_CHECKING:
    from jaxmods.systems.refton.system import RefTon

HUB_NAMES = ("qihoo360/RefVTON",)
_PROMPT = ("prompt.states", "prompt.pooled")


def refton_map(system: RefTon) -> WeightMap:
    """The map of everything that `system` holds. Adapters may be missing from a file."""
    config, base = system.lora_config, system.base
    total = base_map(base)
    if config is not None:
        transformer = abstract_transformer(base.transformer)
        total += WeightMap(lora.entries(published(base.transformer), transformer, config.targets))
        # The map of the base has the transformer one level down, the adapters beside it.
    if base.encoders is None:
        total += WeightMap(
            tuple(Entry(key, key.replace(".", "/"), optional=True) for key in _PROMPT)
        )
    else:
        total += WeightMap((Drop("prompt.*", "made by the text encoders here"),))
    return WeightMap(total.entries, (*HUB_NAMES, *total.hub_names))


def complete(system: RefTon, params: Params, missing: frozenset[str]) -> Params:
    """Parameters of a base folder with what it does not have.

    Adapters are drawn from `adapters.seed`, and change nothing. Features of the prompt cannot be
    made up.

    Raises:
      ValueError: the prompt's features are missing, or some adapters but not all.
    """
    if lacking := sorted(missing & set(_PROMPT)):
        raise ValueError(
            f"RefTon without text encoders: expected the prompt's features {', '.join(lacking)} "
            "(folder prompt/ of the pipeline), found none; write them once with "
            "jaxmods.systems.refton.prompt.write_prompt, or keep the text encoders (base.encoders)"
        )
    keys = adapter_keys(system)
    if not missing:
        return params
    if there := sorted(keys - missing):
        raise ValueError(
            f"RefTon adapters: expected all {len(keys)} tensors of adapters or none, found "
            f"{len(there)} of them ({there[0]}, ...); are they of another recipe?"
        )
    return {**params, "lora": fresh_adapters(system)}


def adapter_keys(system: RefTon) -> frozenset[str]:
    """Published keys of all adapters."""
    if system.lora_config is None:
        return frozenset()
    shapes = refton_map(system).torch_shapes(jax.eval_shape(system.init, jax.random.key(0)))
    return frozenset(key for key in shapes if ".lora_" in key)


def fresh_adapters(system: RefTon) -> Params:
    """Adapters that change nothing, drawn from `adapters.seed`."""
    config, adapters = system.lora_config, system.adapters
    if config is None or adapters is None:
        raise ValueError(
            "RefTon adapters: this recipe trains the whole transformer (adapters=None)"
        )
    key = jax.random.key(adapters.seed)
    boxed = abstract_transformer(system.base.transformer)
    return unbox(lora.init(key, boxed, config))


def adapter_map(system: RefTon) -> lora.AdapterMap | None:
    """Files of adapters as the official training writes and reads them."""
    config = system.lora_config
    if config is None:
        return None
    merged = dataclasses.replace(system, adapters=None)
    return flux.adapter_map(system.base, config, merged, KONTEXT)


def load_adapters(
    system: RefTon, params: Params, source: str | Path, *, alpha: float | None = None
) -> Params:
    """`params` with the adapters of a file in place of their own; see `lora.AdapterMap.read`.

    Raises:
      WeightError: also where the recipe trains the whole transformer.
    """
    adapters = adapter_map(system)
    if adapters is None:
        raise WeightError(
            f"{source}: this recipe trains the whole transformer (adapters=None), expected one "
            "with adapters"
        )
    return {**params, adapters.under: adapters.read(source, params, alpha=alpha).adapters}


def save_adapters(
    system: RefTon,
    params: Params,
    folder: str | Path,
    *,
    dialect: lora.Dialect = "diffusers",
    dtype: DTypeLike | None = None,
    overwrite: bool = False,
) -> dict[str, int]:
    """The adapters as the official training writes them: `pytorch_lora_weights.safetensors` with
    rank, alpha and targets in its header; see `lora.AdapterMap.write`. `load_lora_weights` of a
    diffusers pipeline reads it. The official files are bf16.

    Raises:
      WeightError: no adapters, or the folder is taken.
    """
    adapters = adapter_map(system)
    if adapters is None:
        raise WeightError("RefTon export: this recipe has no adapters; export the pipeline")
    return adapters.write(folder, params, dialect=dialect, dtype=dtype, overwrite=overwrite)


def pipeline(base: FluxBase) -> HubPipeline:
    """A diffusers folder; the features of the prompt stand in it where text encoders do not."""
    whole = hub_pipeline(base, "FluxKontextPipeline")
    if base.encoders is not None:
        return whole
    features = Component(prompt.FOLDER, None, {})
    return dataclasses.replace(whole, components=(*whole.components, features))


def save_pipeline(
    system: RefTon,
    params: Params,
    folder: str | Path,
    *,
    merged: bool = False,
    dtype: DTypeLike | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """The models underneath as a diffusers folder, with the adapters merged into the transformer
    where `merged` (a bf16 base keeps 8 bits of the sum; `save_adapters` keeps all).

    Raises:
      WeightError: the folder is taken, or the disk too small.
    """
    adapters = adapter_map(system)
    plain = system if adapters is None else adapters.merged
    if adapters is not None:
        rest = {name: tree for name, tree in params.items() if name != adapters.under}
        params = adapters.merge(params, dtype=dtype) if merged else rest
    return export_pipeline(
        params,
        plain.weights(),
        pipeline(system.base),
        folder,
        dtype=dtype,
        overwrite=overwrite,
        progress=progress,
    )
