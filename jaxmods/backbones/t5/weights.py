"""The map between transformers' T5EncoderModel (or UMT5EncoderModel) and our parameters."""

from __future__ import annotations

from jaxmods.backbones.t5.model import T5Config
from jaxmods.weights import Drop, Entry, Linear, Tie, WeightMap

HUB_NAMES = (
    "google/t5-v1_1-xxl",
    "black-forest-labs/FLUX.1-dev",
    "black-forest-labs/FLUX.1-schnell",
)

_BLOCK = "encoder.block.{i}.layer"
_TABLE = "SelfAttention.relative_attention_bias.weight"


def t5_map(config: T5Config) -> WeightMap:
    """The map for these sizes.

    The embedding is kept as `shared.weight`, as `encoder.embed_tokens.weight`, or as both: any of
    them is enough, and both are written. Whole checkpoints of encoder and decoder fit as well.
    """
    norms = (("0.layer_norm", "norm1"), ("1.layer_norm", "norm2"))
    attention = tuple((f"0.SelfAttention.{n}", n) for n in ("q", "k", "v", "o"))
    mlp = tuple((f"1.DenseReluDense.{n}", n) for n in ("wi_0", "wi_1", "wo"))
    table = (
        Entry(f"{_BLOCK}.0.{_TABLE}", "blocks/bias")
        if config.bias_per_layer
        else Entry(f"encoder.block.0.layer.0.{_TABLE}", "bias")
    )
    return WeightMap(
        (
            Entry(
                ("shared.weight", "encoder.embed_tokens.weight"),
                "embedding",
                Tie(require_all=False),
            ),
            table,
            *(Entry(f"{_BLOCK}.{theirs}.weight", f"blocks/{ours}/scale") for theirs, ours in norms),
            *(
                Entry(f"{_BLOCK}.{theirs}.weight", f"blocks/{ours}/kernel", Linear())
                for theirs, ours in attention + mlp
            ),
            Entry("encoder.final_layer_norm.weight", "final_norm/scale"),
            Drop("decoder.*", "the decoder of a whole checkpoint, not used here"),
            Drop("lm_head.weight", "the head of a whole checkpoint, not used here"),
        ),
        HUB_NAMES,
    )
