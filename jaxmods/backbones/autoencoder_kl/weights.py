"""Maps between the published state dicts of the autoencoder and our parameters.

Three layouts are about: diffusers' (`vae/` of a hub folder); the same with the attention names of
its first versions (the folders of Stable Diffusion 1); and the original one of latent diffusion
(Black Forest Labs' `ae.safetensors`, and under `first_stage_model.` Stable Diffusion's single
files).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Literal

from jaxmods.backbones.autoencoder_kl.config import AutoencoderConfig
from jaxmods.weights import Conv2d, Entry, Linear, Squeeze, Transform, WeightError, WeightMap

Layout = Literal["diffusers", "diffusers_old", "original"]

HUB_NAMES = (
    "black-forest-labs/FLUX.1-dev",
    "black-forest-labs/FLUX.1-Kontext-dev",
    "black-forest-labs/FLUX.1-schnell",
    "stabilityai/sd-vae-ft-ema",
    "stabilityai/sd-vae-ft-mse",
    "stabilityai/sdxl-vae",
)


@dataclasses.dataclass(frozen=True)
class _Names:
    """What one layout calls the parts. `down`, `up` take a level (and a block) of ours."""

    resnet: str  # of a level: fields side, level, block
    sample: str
    middle_resnet: str
    attention: str
    norm_out: str
    shortcut: str
    attention_norm: str
    projections: tuple[str, str, str, str]  # q, k, v, out
    projection: Transform


_DIFFUSERS = _Names(
    resnet="{side}_blocks.{level}.resnets.{block}",
    sample="{side}_blocks.{level}.{side}samplers.0.conv",
    middle_resnet="mid_block.resnets.{block}",
    attention="mid_block.attentions.0",
    norm_out="conv_norm_out",
    shortcut="conv_shortcut",
    attention_norm="group_norm",
    projections=("to_q", "to_k", "to_v", "to_out.0"),
    projection=Linear(),
)
_NAMES: dict[Layout, _Names] = {
    "diffusers": _DIFFUSERS,
    "diffusers_old": dataclasses.replace(
        _DIFFUSERS, projections=("query", "key", "value", "proj_attn")
    ),
    "original": _Names(
        resnet="{side}.{level}.block.{block}",
        sample="{side}.{level}.{side}sample.conv",
        middle_resnet="mid.block_{number}",
        attention="mid.attn_1",
        norm_out="norm_out",
        shortcut="nin_shortcut",
        attention_norm="norm",
        projections=("q", "k", "v", "proj_out"),
        projection=Squeeze(-1) >> Squeeze(-1) >> Linear(),  # 1x1 convolutions there
    ),
}


def find_layout(keys: Iterable[str]) -> Layout:
    """The layout of a file that holds `keys` (among others, and under any prefix).

    Raises:
      WeightError: none of the three.
    """
    keys = list(keys)
    if any("mid.block_1." in key for key in keys):
        return "original"
    if any("mid_block.attentions.0.query." in key for key in keys):
        return "diffusers_old"
    if any("mid_block.resnets.0." in key for key in keys):
        return "diffusers"
    raise WeightError(
        "autoencoder: expected keys with `mid_block.resnets.0.` (diffusers) or `mid.block_1.` "
        f"(ae.safetensors), found {len(keys)} keys, first {', '.join(sorted(keys)[:3]) or 'none'}; "
        "is this a file of an AutoencoderKL?"
    )


def autoencoder_kl_map(config: AutoencoderConfig, layout: Layout = "diffusers") -> WeightMap:
    """The map for these sizes in one layout."""
    names, levels = _NAMES[layout], len(config.channels)
    entries: list[Entry] = []
    for part, side, resnets in (
        ("encoder", "down", config.resnets),
        ("decoder", "up", config.resnets + 1),
    ):
        for end in ("conv_in", "conv_out"):
            entries += _conv(f"{part}.{end}", f"{part}/{end}")
        entries += _norm(f"{part}.{names.norm_out}", f"{part}/norm_out")
        entries += _middle(names, config, part)
        widths = config.channels if side == "down" else config.channels[::-1]
        before = widths[0]
        for level, width in enumerate(widths):
            # The original layout counts levels from the highest resolution in both directions.
            theirs = levels - 1 - level if layout == "original" and side == "up" else level
            for block in range(resnets):
                entries += _resnet(
                    names,
                    f"{part}.{names.resnet.format(side=side, level=theirs, block=block)}",
                    f"{part}/{side}_{level}_resnet_{block}",
                    shortcut=before != width,
                )
                before = width
            if level + 1 < levels:
                torch = names.sample.format(side=side, level=theirs)
                entries += _conv(f"{part}.{torch}", f"{part}/{side}_{level}_sample")
    if config.quant_conv:
        entries += _conv("quant_conv", "quant")
    if config.post_quant_conv:
        entries += _conv("post_quant_conv", "post_quant")
    return WeightMap(tuple(entries), HUB_NAMES)


def _conv(torch: str, jax: str) -> list[Entry]:
    return [
        Entry(f"{torch}.weight", f"{jax}/kernel", Conv2d()),
        Entry(f"{torch}.bias", f"{jax}/bias"),
    ]


def _norm(torch: str, jax: str) -> list[Entry]:
    return [Entry(f"{torch}.weight", f"{jax}/scale"), Entry(f"{torch}.bias", f"{jax}/bias")]


def _resnet(names: _Names, torch: str, jax: str, shortcut: bool) -> list[Entry]:
    entries = []
    for n in (1, 2):
        entries += _norm(f"{torch}.norm{n}", f"{jax}/norm{n}")
        entries += _conv(f"{torch}.conv{n}", f"{jax}/conv{n}")
    if shortcut:
        entries += _conv(f"{torch}.{names.shortcut}", f"{jax}/shortcut")
    return entries


def _middle(names: _Names, config: AutoencoderConfig, part: str) -> list[Entry]:
    entries = []
    for block in (0, 1):
        torch = names.middle_resnet.format(block=block, number=block + 1)
        entries += _resnet(names, f"{part}.{torch}", f"{part}/middle/resnet_{block}", False)
    if config.mid_attention:
        torch, jax = f"{part}.{names.attention}", f"{part}/middle/attention"
        entries += _norm(f"{torch}.{names.attention_norm}", f"{jax}/norm")
        for theirs, ours in zip(names.projections, ("q", "k", "v", "out"), strict=True):
            entries.append(
                Entry(f"{torch}.{theirs}.weight", f"{jax}/{ours}/kernel", names.projection)
            )
            entries.append(Entry(f"{torch}.{theirs}.bias", f"{jax}/{ours}/bias"))
    return entries
