"""`config.json` in the official (Hugging Face CLIPConfig) layout, read and written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jaxmods.backbones.clip import LOGIT_SCALE_INIT, TextConfig, VisionConfig

if TYPE_CHECKING:
    from jaxmods.systems.fgclip.system import FgClip

# Hugging Face leaves out what equals its defaults: those of CLIPTextConfig and CLIPVisionConfig.
_TEXT = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "vocab_size": 49408,
}
_VISION = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
}
_PUBLISHED_VOCABULARY = 49408


def to_config(system: FgClip) -> dict[str, Any]:
    """The `config.json` of a model of these sizes."""
    vision, text = system.vision, system.text
    common = {
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "attention_dropout": 0.0,
        "projection_dim": system.projection_dim,
    }
    return {
        "architectures": ["FGCLIPModel"],
        "model_type": "clip",
        "projection_dim": system.projection_dim,
        "logit_scale_init_value": LOGIT_SCALE_INIT,
        "text_config": {
            "model_type": "clip_text_model",
            "hidden_size": text.width,
            "intermediate_size": text.mlp,
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "max_position_embeddings": text.context_short,
            "vocab_size": text.vocab_size,
            "bos_token_id": text.bos_id,
            "eos_token_id": text.eos_id,
            "pad_token_id": text.pad_id,
            "long_positions": text.context_long,
            "keep_len": text.keep,
            **common,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": vision.width,
            "intermediate_size": vision.mlp,
            "num_hidden_layers": vision.layers,
            "num_attention_heads": vision.heads,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "num_channels": 3,
            **common,
        },
    }


def sizes(config: Mapping[str, Any]) -> tuple[VisionConfig, TextConfig, int]:
    """Sizes from a `config.json`.

    With the published vocabulary the special tokens are 49406/49407/49407 whatever the file says
    (OpenAI's files say eos 2; the official code overwrites them). `long_positions` and `keep_len`
    default to 4 n - 3 keep and 20.

    Raises:
      ValueError: an option that these towers do not have.
    """
    text = _TEXT | dict(config.get("text_config") or {})
    vision = _VISION | dict(config.get("vision_config") or {})
    for name, part in (("text_config", text), ("vision_config", vision)):
        for key, expected in (("hidden_act", "quick_gelu"), ("layer_norm_eps", 1e-5)):
            if part.get(key, expected) != expected:
                raise ValueError(
                    f"{name}.{key}: expected {expected!r}, found {part[key]!r}; FG-CLIP and "
                    "OpenAI's CLIP have no other"
                )
    vocabulary, rows = text["vocab_size"], text["max_position_embeddings"]
    keep = text.get("keep_len", 20)
    special: dict[str, Any] = {
        "bos_id": text.get("bos_token_id", vocabulary - 2),
        "eos_id": text.get("eos_token_id", vocabulary - 1),
        "pad_id": text.get("pad_token_id", vocabulary - 1),
    }
    if vocabulary == _PUBLISHED_VOCABULARY:
        special = {"bos_id": 49406, "eos_id": 49407, "pad_id": 49407}
    return (
        VisionConfig(
            width=vision["hidden_size"],
            layers=vision["num_hidden_layers"],
            heads=vision["num_attention_heads"],
            mlp=vision["intermediate_size"],
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
        ),
        TextConfig(
            width=text["hidden_size"],
            layers=text["num_hidden_layers"],
            heads=text["num_attention_heads"],
            mlp=text["intermediate_size"],
            vocab_size=vocabulary,
            context_short=rows,
            context_long=text.get("long_positions", 4 * rows - 3 * keep),
            keep=keep,
            **special,
        ),
        config.get("projection_dim", 512),
    )
