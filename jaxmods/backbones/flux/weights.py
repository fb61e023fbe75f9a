"""Maps between the published state dicts of the FLUX.1 transformer and our parameters.

Two layouts are about: diffusers' (`transformer/` of a hub folder), and Black Forest Labs' own (one
file, `flux1-dev.safetensors`; under `model.diffusion_model.` in files for other programs), which
keeps q, k and v (in single blocks also the MLP's first layer) in one matrix, and the final
modulation as shift and scale instead of scale and shift.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from jaxmods.backbones.flux.config import FluxConfig
from jaxmods.weights import Entry, Linear, Reorder, Split, WeightError, WeightMap

Layout = Literal["diffusers", "bfl"]

HUB_NAMES = (
    "black-forest-labs/FLUX.1-dev",
    "black-forest-labs/FLUX.1-Kontext-dev",
    "black-forest-labs/FLUX.1-schnell",
    "black-forest-labs/FLUX.1-Fill-dev",
    "black-forest-labs/FLUX.1-Canny-dev",
    "black-forest-labs/FLUX.1-Depth-dev",
)

BFL_PREFIX = "model.diffusion_model."

_DOUBLE, _SINGLE = "double_blocks", "single_blocks"
_QKV = ("to_q", "to_k", "to_v")


def flux_map(config: FluxConfig, layout: Layout = "diffusers") -> WeightMap:
    """The map for these sizes. A prefix is put on with `WeightMap.under(BFL_PREFIX)`."""
    entries = _diffusers(config) if layout == "diffusers" else _bfl(config)
    return WeightMap(tuple(entries), HUB_NAMES)


def find_layout(keys: Iterable[str]) -> tuple[Layout, str]:
    """Layout and prefix of a state dict with these keys.

    Raises:
      WeightError: the keys are of another model.
    """
    keys = set(keys)
    if "transformer_blocks.0.attn.add_q_proj.weight" in keys:
        return "diffusers", ""
    for prefix in ("", BFL_PREFIX):
        if f"{prefix}double_blocks.0.img_attn.qkv.weight" in keys:
            return "bfl", prefix
    raise WeightError(
        f"FLUX.1 transformer: expected transformer_blocks.* (diffusers) or double_blocks.* (Black "
        f"Forest Labs) among the {len(keys)} keys, found neither (first keys: "
        f"{', '.join(sorted(keys)[:3]) or 'none'}); give the transformer's weights"
    )


def _diffusers(config: FluxConfig) -> list[Entry]:
    double, single = "transformer_blocks.{i}", "single_transformer_blocks.{i}"
    embedders = [("timestep_embedder", "time_embedder"), ("text_embedder", "pooled_embedder")]
    if config.guidance:
        embedders.append(("guidance_embedder", "guidance_embedder"))
    linears = [
        ("x_embedder", "x_embedder"),
        ("context_embedder", "context_embedder"),
        *(
            (f"time_text_embed.{theirs}.linear_{n}", f"time_text/{ours}/fc{n}")
            for theirs, ours in embedders
            for n in (1, 2)
        ),
        ("norm_out.linear", "norm_out"),
        ("proj_out", "proj_out"),
    ]
    scales = []
    for stream, suffix, q, k, v, out, norm in (
        ("image", "", *_QKV, "to_out.0", "norm"),
        ("text", "_context", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "norm_added"),
    ):
        ours = f"{_DOUBLE}/{stream}"
        linears += [
            (f"{double}.norm1{suffix}.linear", f"{ours}/modulation"),
            *(
                (f"{double}.attn.{theirs}", f"{ours}/attn/{name}")
                for theirs, name in zip((q, k, v, out), (*_QKV, "to_out"), strict=True)
            ),
            (f"{double}.ff{suffix}.net.0.proj", f"{ours}/ff/fc1"),
            (f"{double}.ff{suffix}.net.2", f"{ours}/ff/fc2"),
        ]
        scales += [(f"{double}.attn.{norm}_{n}.weight", f"{ours}/attn/norm_{n}") for n in "qk"]
    linears += [
        (f"{single}.norm.linear", f"{_SINGLE}/modulation"),
        *((f"{single}.attn.{name}", f"{_SINGLE}/attn/{name}") for name in _QKV),
        (f"{single}.proj_mlp", f"{_SINGLE}/proj_mlp"),
        (f"{single}.proj_out", f"{_SINGLE}/proj_out"),
    ]
    scales += [(f"{single}.attn.norm_{n}.weight", f"{_SINGLE}/attn/norm_{n}") for n in "qk"]
    return [
        *(entry for theirs, ours in linears for entry in _linear(theirs, ours)),
        *(Entry(theirs, f"{ours}/scale") for theirs, ours in scales),
    ]


def _bfl(config: FluxConfig) -> list[Entry]:
    double, single = "double_blocks.{i}", "single_blocks.{i}"
    embedders = [("time_in", "time_embedder"), ("vector_in", "pooled_embedder")]
    if config.guidance:
        embedders.append(("guidance_in", "guidance_embedder"))
    linears = [
        ("img_in", "x_embedder"),
        ("txt_in", "context_embedder"),
        *(
            (f"{theirs}.{layer}_layer", f"time_text/{ours}/{name}")
            for theirs, ours in embedders
            for layer, name in (("in", "fc1"), ("out", "fc2"))
        ),
        ("final_layer.linear", "proj_out"),
    ]
    fused, scales = [], []
    for stream, short in (("image", "img"), ("text", "txt")):
        ours = f"{_DOUBLE}/{stream}"
        linears += [
            (f"{double}.{short}_mod.lin", f"{ours}/modulation"),
            (f"{double}.{short}_attn.proj", f"{ours}/attn/to_out"),
            (f"{double}.{short}_mlp.0", f"{ours}/ff/fc1"),
            (f"{double}.{short}_mlp.2", f"{ours}/ff/fc2"),
        ]
        fused.append((f"{double}.{short}_attn.qkv", tuple(f"{ours}/attn/{n}" for n in _QKV)))
        scales.append((f"{double}.{short}_attn.norm", f"{ours}/attn"))
    linears += [
        (f"{single}.modulation.lin", f"{_SINGLE}/modulation"),
        (f"{single}.linear2", f"{_SINGLE}/proj_out"),
    ]
    rows = (*(f"{_SINGLE}/attn/{n}" for n in _QKV), f"{_SINGLE}/proj_mlp")
    fused.append((f"{single}.linear1", rows))
    scales.append((f"{single}.norm", f"{_SINGLE}/attn"))
    final = "final_layer.adaLN_modulation.1"
    return [
        *(entry for theirs, ours in linears for entry in _linear(theirs, ours)),
        *(
            entry
            for theirs, ours in fused
            for entry in (
                Entry(f"{theirs}.weight", _each(ours, "kernel"), Linear() >> Split(axis=1)),
                Entry(f"{theirs}.bias", _each(ours, "bias"), Split(axis=0)),
            )
        ),
        *(
            Entry(f"{theirs}.{long}_norm.scale", f"{ours}/norm_{n}/scale")
            for theirs, ours in scales
            for long, n in (("query", "q"), ("key", "k"))
        ),
        Entry(f"{final}.weight", "norm_out/kernel", Linear() >> Reorder(axis=1, order=(1, 0))),
        Entry(f"{final}.bias", "norm_out/bias", Reorder(axis=0, order=(1, 0))),
    ]


def _linear(torch: str, jax: str) -> tuple[Entry, ...]:
    return (
        Entry(f"{torch}.weight", f"{jax}/kernel", Linear()),
        Entry(f"{torch}.bias", f"{jax}/bias"),
    )


def _each(paths: Iterable[str], leaf: str) -> tuple[str, ...]:
    return tuple(f"{path}/{leaf}" for path in paths)
