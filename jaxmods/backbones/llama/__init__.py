"""The decoder of the Llama family: Llama 2 and 3, Vicuna, Qwen2."""

from jaxmods.backbones.llama.config import (
    LLAMA2_7B,
    LLAMA3_8B,
    QWEN2_7B,
    VICUNA_7B,
    VICUNA_7B_16K,
    LlamaConfig,
    RopeScaling,
)
from jaxmods.backbones.llama.model import (
    Context,
    DecoderLayer,
    Llama,
    layers_param,
    packed_positions,
    run_cached,
    run_layers,
    unembed,
)
from jaxmods.backbones.llama.rope import Rope, rope_of
from jaxmods.backbones.llama.weights import layer_entries, llama_map

__all__ = [
    "LLAMA2_7B",
    "LLAMA3_8B",
    "QWEN2_7B",
    "VICUNA_7B",
    "VICUNA_7B_16K",
    "Context",
    "DecoderLayer",
    "Llama",
    "LlamaConfig",
    "Rope",
    "RopeScaling",
    "layer_entries",
    "layers_param",
    "llama_map",
    "packed_positions",
    "rope_of",
    "run_cached",
    "run_layers",
    "unembed",
]
