"""Maps between transformers' CLIP towers and our parameters."""

from __future__ import annotations

from collections.abc import Iterable

from jaxmods.weights import Conv2d, Drop, Entry, Linear, WeightMap

TEXT_HUB_NAMES = (
    "openai/clip-vit-large-patch14",
    "black-forest-labs/FLUX.1-dev",
    "black-forest-labs/FLUX.1-schnell",
)
_POSITIONS = "the constant 0..n-1, in old CLIP files"


def text_prefix(keys: Iterable[str]) -> str:
    """What stands before the text tower's keys in a file that holds `keys`.

    Hub files have `text_model.`; the class of transformers 5 has nothing there.
    """
    return "text_model." if any(key.startswith("text_model.") for key in keys) else ""


def clip_text_map(layers: int, prefix: str = "text_model.") -> WeightMap:
    """CLIPTextModel ↔ a `TextTower` of this depth; `prefix` as from `text_prefix`."""
    theirs = WeightMap(
        (
            *text_entries("", "", layers),
            Drop("embeddings.position_ids", _POSITIONS),
        ),
        TEXT_HUB_NAMES,
    )
    return theirs.under(torch=prefix)


def text_entries(torch: str, jax: str, layers: int) -> tuple[Entry, ...]:
    """The text tower; `torch` and `jax` stand before every key and path."""
    embeddings = f"{torch}embeddings"
    return (
        Entry(f"{embeddings}.token_embedding.weight", f"{jax}token_embedding"),
        Entry(f"{embeddings}.position_embedding.weight", f"{jax}position_embedding"),
        *_encoder(torch, jax, layers),
        *_norm(f"{torch}final_layer_norm", f"{jax}final_norm"),
    )


def vision_entries(torch: str, jax: str, layers: int) -> tuple[Entry, ...]:
    """The vision tower; `torch` and `jax` stand before every key and path."""
    embeddings = f"{torch}embeddings"
    return (
        Entry(f"{embeddings}.class_embedding", f"{jax}class_embedding"),
        Entry(f"{embeddings}.patch_embedding.weight", f"{jax}patch_embedding", Conv2d()),
        Entry(f"{embeddings}.position_embedding.weight", f"{jax}position_embedding"),
        *_norm(f"{torch}pre_layrnorm", f"{jax}pre_norm"),
        *_encoder(torch, jax, layers),
        *_norm(f"{torch}post_layernorm", f"{jax}post_norm"),
    )


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
    theirs, ours = f"{torch}encoder.layers", f"{jax}encoder"
    stacked = _block(f"{theirs}.{{i}}", f"{ours}/blocks") if layers > 1 else ()
    return stacked + _block(f"{theirs}.{layers - 1}", f"{ours}/last")
