"""The FLUX.1 transformer (diffusers' FluxTransformer2DModel)."""

from jaxmods.backbones.flux.config import (
    CONTROL,
    DEV,
    FILL,
    KONTEXT,
    SCHNELL,
    FluxConfig,
    forward_flops,
)
from jaxmods.backbones.flux.rope import Rope, apply_rope, rope_table
from jaxmods.backbones.flux.tokens import Tokens, grid_ids, pack, text_ids, unpack
from jaxmods.backbones.flux.transformer import ExtraKeys, FluxTransformer, Residuals
from jaxmods.backbones.flux.weights import BFL_PREFIX, Layout, find_layout, flux_map

__all__ = [
    "BFL_PREFIX",
    "CONTROL",
    "DEV",
    "FILL",
    "KONTEXT",
    "SCHNELL",
    "ExtraKeys",
    "FluxConfig",
    "FluxTransformer",
    "Layout",
    "Residuals",
    "Rope",
    "Tokens",
    "apply_rope",
    "find_layout",
    "flux_map",
    "forward_flops",
    "grid_ids",
    "pack",
    "rope_table",
    "text_ids",
    "unpack",
]
