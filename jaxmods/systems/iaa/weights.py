"""The map between the official state dict (`qihoo360/Inner-Adaptor-Architecture`) and ours.

The head of the general branch is spelt `lm_head_condtion`, as published. The base alone (a
LlamaForCausalLM) fits as well: everything else is optional and is filled by `Iaa.complete_import`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax

from jaxmods.backbones.clip_weights import vision_entries
from jaxmods.backbones.llama import LlamaConfig, layer_entries, llama_map
from jaxmods.system import Params
from jaxmods.systems.iaa.model import Branch, projector_depth
from jaxmods.weights import Drop, Entry, Linear, WeightError, WeightMap, import_params, open_weights

HUB_NAMES = (
    "qihoo360/Inner-Adaptor-Architecture",
    "360ZhiNao/Inner-Adaptor-Architecture",
)
VISION = "model.vision_tower.vision_tower."


@dataclasses.dataclass(frozen=True)
class Names:
    """What a branch's five modules are called."""

    projector: str
    embedding: str
    layers: str
    norm: str
    head: str


NAMES: dict[Branch, Names] = {
    "MM": Names(
        "model.mm_projector",
        "model.embed_tokens_condition",
        "model.condition_layers",
        "model.norm_condition",
        "lm_head_condtion",
    ),
    "G": Names(
        "model.mm_projector_G",
        "model.embed_tokens_condition_grounding",
        "model.condition_layers_grounding",
        "model.norm_condition_grounding",
        "lm_head_condtion_grounding",
    ),
}


def iaa_map(
    llama: LlamaConfig,
    vision_layers: int | None,
    branches: tuple[Branch, ...],
    projector: str,
) -> WeightMap:
    """The map; `vision_layers` is None for a model without a vision tower."""
    vision: tuple[Entry | Drop, ...] = ()
    if vision_layers is not None:
        entries = vision_entries(f"{VISION}vision_model.", "vision_tower/", vision_layers)
        vision = (
            *(dataclasses.replace(entry, optional=True) for entry in entries),
            Drop(f"{VISION}vision_model.embeddings.position_ids", "the constant 0..n-1"),
        )
    return WeightMap(
        (
            *llama_map(llama).under(jax="base/").entries,
            *vision,
            *(entry for b in branches for entry in branch_entries(NAMES[b], b, llama, projector)),
        ),
        HUB_NAMES,
    )


def branch_entries(names: Names, jax: str, llama: LlamaConfig, projector: str) -> tuple[Entry, ...]:
    """A branch's modules under the path `jax`."""
    depth = projector_depth(projector)
    linears = []
    for number in range(depth):
        theirs = names.projector if projector == "linear" else f"{names.projector}.{2 * number}"
        ours = f"{jax}/projector/linear_{number}"
        linears += [
            Entry(f"{theirs}.weight", f"{ours}/kernel", Linear(), optional=True),
            Entry(f"{theirs}.bias", f"{ours}/bias", optional=True),
        ]
    layers = layer_entries(f"{names.layers}.{{i}}", f"{jax}/layers", llama)
    return (
        *linears,
        Entry(f"{names.embedding}.weight", f"{jax}/embedding", optional=True),
        *(dataclasses.replace(entry, optional=True) for entry in layers),
        Entry(f"{names.norm}.weight", f"{jax}/final_norm/scale", optional=True),
        Entry(f"{names.head}.weight", f"{jax}/unembedding", Linear(), optional=True),
    )


def load_grounding(llama: LlamaConfig, projector: str, params: Params, path: str | Path) -> Params:
    """`params` whose grounding branch is the general branch of another checkpoint.

    That is how the published model was put together: a model of one branch was trained for
    grounding, and its five modules were loaded into the grounding slots.

    Args:
      llama, projector: sizes, see `Iaa`.
      params: with a branch "G". path: weights in the layout of one branch ("MM").

    Raises:
      WeightError: no grounding branch here, or modules that are missing there or of other sizes.
    """
    if "G" not in params:
        raise WeightError(
            f"load_grounding: expected parameters with a branch G, found {sorted(params)}; set "
            'system.branches=("MM","G")'
        )
    wanted = branch_entries(NAMES["MM"], "G", llama, projector)
    entries = tuple(dataclasses.replace(entry, optional=False) for entry in wanted)
    with open_weights(path) as reader:
        keys = {k for b in WeightMap(entries).bind({"G": params["G"]}) for k, _ in b.tensors()}
        others = tuple(Drop(key, "another module") for key in reader.tensors if key not in keys)
        found: dict[str, Any]
        found, _ = import_params(
            reader,
            WeightMap((*entries, *others)),
            jax.eval_shape(lambda: {"G": params["G"]}),
            dtype="abstract",
        )
    return {**params, "G": found["G"]}
