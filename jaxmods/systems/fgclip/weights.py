"""The map between the official state dict (`qihoo360/fg-clip-base`, `-large`) and our parameters.

A plain OpenAI CLIP file fits as well: the five keys it lacks are optional, and are filled by
`FgClip.complete_import`.
"""

from __future__ import annotations

from jaxmods.backbones.clip_weights import text_entries, vision_entries
from jaxmods.weights import Drop, Entry, Linear, WeightMap

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


def fgclip_map(vision_layers: int, text_layers: int) -> WeightMap:
    """The map for towers of these depths."""
    return WeightMap(
        (
            Entry("logit_scale", "logit_scale"),
            Entry(SCALE_REGION, "logit_scale_region", optional=True),
            Entry(SCALE_HARD, "logit_scale_hard", optional=True),
            Entry(LONG_RES, "position_embedding_res", optional=True),
            Entry(LONG_ORI, "position_embedding_ori", optional=True),
            *text_entries("text_model.", "text_tower/", text_layers),
            *vision_entries("vision_model.", "vision_tower/", vision_layers),
            Entry("visual_projection.weight", "visual_projection/kernel", Linear()),
            Entry("text_projection.weight", "text_projection/kernel", Linear()),
            Entry(LONG_PROJECTION, "text_long_projection/kernel", Linear(), optional=True),
            Drop("*_model.embeddings.position_ids", "the constant 0..n-1, in old CLIP files"),
        ),
        HUB_NAMES,
    )
