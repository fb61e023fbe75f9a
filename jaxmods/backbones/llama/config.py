"""Sizes of the Llama family, and transformers' `config.json` read and written."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

Kind = Literal["llama", "qwen2"]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for texts longer than those of the pre-training.

    Attributes:
      kind: "linear" divides every frequency by `factor`; "llama3" (Llama 3.1) divides those whose
        wavelength is longer than `original_length / low`, keeps those shorter than
        `original_length / high`, and goes over smoothly in between.
      factor: at least 1.
      low, high, original_length: of "llama3"; wavelengths and lengths are in tokens.
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low: float = 1.0
    high: float = 4.0
    original_length: int = 8192

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "llama3"):
            raise ValueError(
                f"RopeScaling.kind: expected 'linear' or 'llama3', found {self.kind!r}"
            )
        if self.factor < 1:
            raise ValueError(f"RopeScaling.factor: expected at least 1, found {self.factor}")
        if self.high <= self.low:
            raise ValueError(
                f"RopeScaling: expected low < high, found low={self.low} and high={self.high}"
            )


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes; the defaults are Llama-3-8B's.

    Attributes:
      heads, kv_heads: query heads, and key and value heads, each of which serves
        `heads / kv_heads` consecutive query heads.
      head_dim: even; `heads * head_dim` need not be `width`.
      mlp: width of each of the two branches of the gated MLP.
      epsilon: of the RMS norms.
      rope_theta: longest wavelength of the positions, in units of 2 pi tokens.
      rope_scaling: None for none.
      rope_sections: for positions of three numbers each (time, row, column: M-RoPE of Qwen2-VL),
        how many of the `head_dim / 2` frequencies turn with which. None: one number per token.
      qkv_bias: q, k and v have biases (Qwen2).
      tied: the head is the embedding table.
      initializer_range: standard deviation of drawn parameters.
      max_positions: length of the pre-training; nothing here depends on it.
      bos_id, eos_ids: special tokens; generation stops at any of `eos_ids`.
    """

    vocab_size: int = 128256
    width: int = 4096
    layers: int = 32
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    mlp: int = 14336
    epsilon: float = 1e-5
    rope_theta: float = 500000.0
    rope_scaling: RopeScaling | None = None
    rope_sections: tuple[int, int, int] | None = None
    qkv_bias: bool = False
    tied: bool = False
    initializer_range: float = 0.02
    max_positions: int = 8192
    bos_id: int | None = 128000
    eos_ids: tuple[int, ...] = (128001,)

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(
                f"LlamaConfig: expected heads to be a multiple of kv_heads, found {self.heads} "
                f"and {self.kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"LlamaConfig.head_dim: expected an even number, found {self.head_dim}"
            )
        if self.rope_sections is not None and sum(self.rope_sections) != self.head_dim // 2:
            raise ValueError(
                f"LlamaConfig.rope_sections: expected three numbers with sum head_dim / 2 = "
                f"{self.head_dim // 2}, found {self.rope_sections}"
            )

    @classmethod
    def from_hub_config(cls, config: Mapping[str, Any], kind: Kind | None = None) -> LlamaConfig:
        """Sizes from a `config.json` of transformers, of version 4 or 5.

        Args:
          config: its contents.
          kind: the architecture; None takes it from `model_type`. To be given for models built on
            one of the two (`model_type` "llava_llama", say).

        Raises:
          ValueError: another kind of model, or an option that this decoder does not have.
        """
        kind = kind or config.get("model_type", "llama")
        if kind not in ("llama", "qwen2"):
            raise ValueError(
                f"config.json: model_type: expected llama or qwen2, found {kind!r}; for a model "
                'built on one of them give kind="llama" or kind="qwen2"'
            )
        for name, expected in (
            ("hidden_act", "silu"),
            ("attention_bias", False),
            ("mlp_bias", False),
            ("use_sliding_window", False),
        ):
            if config.get(name, expected) != expected:
                raise ValueError(
                    f"config.json: {name}: expected {expected!r}, found {config[name]!r}; this "
                    "decoder does not have that option"
                )
        heads = config["num_attention_heads"]
        eos = config.get("eos_token_id")
        theta, scaling, sections = _rope(config)
        return cls(
            vocab_size=config["vocab_size"],
            width=config["hidden_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            mlp=config["intermediate_size"],
            epsilon=config.get("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            rope_sections=sections,
            qkv_bias=kind == "qwen2",
            tied=config.get("tie_word_embeddings", False),
            initializer_range=config.get("initializer_range", 0.02),
            max_positions=config.get("max_position_embeddings", 2048),
            bos_id=config.get("bos_token_id"),
            eos_ids=() if eos is None else (eos,) if isinstance(eos, int) else tuple(eos),
        )

    def hub_config(self) -> dict[str, Any]:
        """The `config.json` of a decoder of these sizes (versions 4 and 5 of transformers read it).

        Raises:
          ValueError: positions of three numbers: they belong to a model around the decoder.
        """
        if self.rope_sections is not None:
            raise ValueError(
                "LlamaConfig.hub_config: expected rope_sections=None, found "
                f"{self.rope_sections}; neither LlamaForCausalLM nor Qwen2ForCausalLM has them"
            )
        eos = self.eos_ids[0] if len(self.eos_ids) == 1 else list(self.eos_ids) or None
        return {
            "architectures": ["Qwen2ForCausalLM" if self.qkv_bias else "LlamaForCausalLM"],
            "model_type": "qwen2" if self.qkv_bias else "llama",
            "attention_dropout": 0.0,
            **({"use_sliding_window": False} if self.qkv_bias else {"attention_bias": False}),
            "bos_token_id": self.bos_id,
            "eos_token_id": eos,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.width,
            "initializer_range": self.initializer_range,
            "intermediate_size": self.mlp,
            "max_position_embeddings": self.max_positions,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": self.epsilon,
            "rope_scaling": _scaling_fields(self.rope_scaling),
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": self.tied,
            "use_cache": True,
            "vocab_size": self.vocab_size,
        }


LLAMA2_7B = LlamaConfig(
    vocab_size=32000,
    kv_heads=32,
    mlp=11008,
    rope_theta=10000.0,
    max_positions=4096,
    bos_id=1,
    eos_ids=(2,),
)
VICUNA_7B = LLAMA2_7B  # version 1.5
VICUNA_7B_16K = dataclasses.replace(
    LLAMA2_7B, rope_scaling=RopeScaling("linear", 4.0), max_positions=4096
)
LLAMA3_8B = LlamaConfig()
QWEN2_7B = LlamaConfig(
    vocab_size=152064,
    width=3584,
    layers=28,
    heads=28,
    kv_heads=4,
    mlp=18944,
    epsilon=1e-6,
    rope_theta=1e6,
    qkv_bias=True,
    max_positions=32768,
    bos_id=151643,
    eos_ids=(151643,),
)


def _rope(
    config: Mapping[str, Any],
) -> tuple[float, RopeScaling | None, tuple[int, int, int] | None]:
    """(theta, scaling, sections) from the fields of version 4 or of version 5."""
    fields = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta = fields.get("rope_theta") or config.get("rope_theta", 10000.0)
    kind = fields.get("rope_type") or fields.get("type") or "default"
    sections = fields.get("mrope_section")
    scaling = None
    if kind == "linear":
        scaling = RopeScaling("linear", fields["factor"])
    elif kind == "llama3":
        scaling = RopeScaling(
            "llama3",
            fields["factor"],
            fields["low_freq_factor"],
            fields["high_freq_factor"],
            fields["original_max_position_embeddings"],
        )
    elif kind not in ("default", "mrope"):
        raise ValueError(
            f"config.json: rope_scaling: expected null, linear, llama3 or mrope, found {kind!r}"
        )
    return float(theta), scaling, None if sections is None else tuple(sections)


def _scaling_fields(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    if scaling.kind == "linear":  # version 4 takes exactly these two fields
        return {"type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low,
        "high_freq_factor": scaling.high,
        "original_max_position_embeddings": scaling.original_length,
    }
