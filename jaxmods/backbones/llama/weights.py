"""The map between transformers' LlamaForCausalLM or Qwen2ForCausalLM and our parameters."""

from __future__ import annotations

from jaxmods.backbones.llama.config import LlamaConfig
from jaxmods.weights import Drop, Entry, Linear, Tie, WeightMap

HUB_NAMES = (
    "meta-llama/Meta-Llama-3-8B-Instruct",
    "meta-llama/Llama-2-7b-hf",
    "lmsys/vicuna-7b-v1.5",
    "lmsys/vicuna-7b-v1.5-16k",
    "Qwen/Qwen2-7B-Instruct",
)


def layer_entries(torch: str, jax: str, config: LlamaConfig) -> tuple[Entry, ...]:
    """Entries of a group of decoder layers.

    Args:
      torch: where a layer is, with its index: "model.layers.{i}".
      jax: where the stacked parameters are: "layers".
    """
    norms = (("input_layernorm", "norm1"), ("post_attention_layernorm", "norm2"))
    attention = tuple((f"self_attn.{n}_proj", n) for n in "qkvo")
    mlp = tuple((f"mlp.{n}_proj", n) for n in ("gate", "up", "down"))
    biases = attention[:3] if config.qkv_bias else ()
    return (
        *(Entry(f"{torch}.{theirs}.weight", f"{jax}/{ours}/scale") for theirs, ours in norms),
        *(
            Entry(f"{torch}.{theirs}.weight", f"{jax}/{ours}/kernel", Linear())
            for theirs, ours in attention + mlp
        ),
        *(Entry(f"{torch}.{theirs}.bias", f"{jax}/{ours}/bias") for theirs, ours in biases),
    )


def llama_map(config: LlamaConfig) -> WeightMap:
    """The map for these sizes.

    Where embedding and head are tied, a file may hold the table under either name or both, and
    both are written.
    """
    table, head = "model.embed_tokens.weight", "lm_head.weight"
    ends = (
        (Entry((table, head), "embedding", Tie(require_all=False)),)
        if config.tied
        else (Entry(table, "embedding"), Entry(head, "unembedding", Linear()))
    )
    return WeightMap(
        (
            *ends,
            *layer_entries("model.layers.{i}", "layers", config),
            Entry("model.norm.weight", "final_norm/scale"),
            Drop("model.*rotary_emb.inv_freq", "computed from the configuration"),
        ),
        HUB_NAMES,
    )
