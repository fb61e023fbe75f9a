"""The map between the official state dict (`qihoo360/fg-clip-base`, `-large`) and our parameters.

A plain OpenAI CLIP file fits as well: the five keys it lacks are optional, and are filled by
`FgClip.complete_import`.
"""

from __future__ import annotations

from jaxmods.weights import Conv2d, Drop, Entry, Linear, WeightMap

HUB_NAMES = (
    "qihoo360/fg-clip-base",
    "qihoo360/fg-clip-large",
    "openai/clip-vit-base-patch16",
    "openai/clip-vit-base-patch32",
    "openai/clip-vit-large-patch14",
    "openai/clip-vit-large-patch14-336",
)

LONG_ORI = "text_model.embeddings.position_embedding_ori.weight"
LONG_RES = "text_model.embeddings.position_embedding_res.weight"
LONG_PROJECTION = "text_filip_projection.weight"
SCALE_REGION = "logit_scale_finegraind"
SCALE_HARD = "logit_scale_hardneg"

# What FG-CLIP adds to CLIP.
ADDED = frozenset((LONG_ORI, LONG_RES, LONG_PROJECTION, SCALE_REGION, SCALE_HARD))


def _norm(torch: str, jax: str) -> tuple[Entry, ...]:
    return (Entry(f"{torch}.weight", f"{jax}/scale"), Entry(f"{torch}.bias", f"{jax}/bias"))


def _linear(torch: str, jax: str) -> tuple[Entry, ...]:
    return (
        Entry(f"{torch}.weight", f"{jax}/kernel", Linear()),
        Entry(f"{torch}.bias", f"{jax}/bias"),
    )


def _block(torch: str, jax: str) -> tuple[Entry, ...]:
    return (
        *_norm(f"{torch}.layer_norm1", f"{jax}/norm1"),
        *(
            entry
            for name in ("q", "k", "v", "out")
            for entry in _linear(f"{torch}.self_attn.{name}_proj", f"{jax}/{name}")
        ),
        *_norm(f"{torch}.layer_norm2", f"{jax}/norm2"),
        *_linear(f"{torch}.mlp.fc1", f"{jax}/fc1"),
        *_linear(f"{torch}.mlp.fc2", f"{jax}/fc2"),
    )


def _encoder(torch: str, jax: str, layers: int) -> tuple[Entry, ...]:
    """All blocks but the last are stacked; see `jaxmods.backbones.clip`."""
    stacked = _block(f"{torch}.encoder.layers.{{i}}", f"{jax}/blocks") if layers > 1 else ()
    return stacked + _block(f"{torch}.encoder.layers.{layers - 1}", f"{jax}/last")


def fgclip_map(vision_layers: int, text_layers: int) -> WeightMap:
    """The map for towers of these depths."""
    vision, text = "vision_model.embeddings", "text_model.embeddings"
    return WeightMap(
        (
            Entry("logit_scale", "logit_scale"),
            Entry(SCALE_REGION, "logit_scale_region", optional=True),
            Entry(SCALE_HARD, "logit_scale_hard", optional=True),
            Entry(f"{text}.token_embedding.weight", "text_tower/token_embedding"),
            Entry(f"{text}.position_embedding.weight", "text_tower/position_embedding"),
            Entry(LONG_RES, "position_embedding_res", optional=True),
            Entry(LONG_ORI, "position_embedding_ori", optional=True),
            *_encoder("text_model", "text_tower/encoder", text_layers),
            *_norm("text_model.final_layer_norm", "text_tower/final_norm"),
            Entry(f"{vision}.class_embedding", "vision_tower/class_embedding"),
            Entry(f"{vision}.patch_embedding.weight", "vision_tower/patch_embedding", Conv2d()),
            Entry(f"{vision}.position_embedding.weight", "vision_tower/position_embedding"),
            *_norm("vision_model.pre_layrnorm", "vision_tower/pre_norm"),
            *_encoder("vision_model", "vision_tower/encoder", vision_layers),
            *_norm("vision_model.post_layernorm", "vision_tower/post_norm"),
            Entry("visual_projection.weight", "visual_projection/kernel", Linear()),
            Entry("text_projection.weight", "text_projection/kernel", Linear()),
            Entry(LONG_PROJECTION, "text_long_projection/kernel", Linear(), optional=True),
            Drop("*_model.embeddings.position_ids", "the constant 0..n-1, in old CLIP files"),
        ),
        HUB_NAMES,
    )
