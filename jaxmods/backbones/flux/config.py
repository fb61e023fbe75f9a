"""Sizes of the FLUX.1 transformer, diffusers' `config.json` read and written, operation counts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

TIME_FEATURES = 256  # width of the sinusoids of time and guidance

# diffusers' defaults, for fields that a file leaves out.
_DEFAULTS: dict[str, Any] = {
    "in_channels": 64,
    "out_channels": None,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": False,
    "axes_dims_rope": (16, 56, 56),
}


@dataclasses.dataclass(frozen=True)
class FluxConfig:
    """Sizes; the defaults are FLUX.1-dev's, and FLUX.1-Kontext-dev's, which has the same.

    Attributes:
      in_channels: of an image token (16 latent channels of 2 x 2 pixels, and what a variant puts
        beside them). out_channels: of its velocity.
      double_layers, single_layers: blocks with a stream each for text and image, and blocks over
        the joint sequence.
      heads, head_dim: their product is the width.
      mlp_ratio: width of the hidden layers of the MLPs, in widths.
      text_width, pooled_width: of the token-wise and the pooled text features.
      guidance: embeds a guidance scale beside the time (all but schnell).
      rope_axes: channels of a head that each of a token's positions turns; even, sum `head_dim`.
      rope_theta: longest wavelength of the positions, in units of 2 pi.
    """

    in_channels: int = 64
    out_channels: int = 64
    double_layers: int = 19
    single_layers: int = 38
    heads: int = 24
    head_dim: int = 128
    mlp_ratio: int = 4
    text_width: int = 4096
    pooled_width: int = 768
    guidance: bool = True
    rope_axes: tuple[int, ...] = (16, 56, 56)
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        if sum(self.rope_axes) != self.head_dim or any(n % 2 for n in self.rope_axes):
            raise ValueError(
                f"FluxConfig.rope_axes: expected even numbers with sum head_dim={self.head_dim}, "
                f"found {self.rope_axes}"
            )
        if self.double_layers < 1 or self.single_layers < 1:
            raise ValueError(
                "FluxConfig: expected one block or more of either kind, found double_layers="
                f"{self.double_layers}, single_layers={self.single_layers}"
            )

    @property
    def width(self) -> int:
        """Channels of the residual stream."""
        return self.heads * self.head_dim

    @property
    def mlp(self) -> int:
        """Hidden channels of the MLPs."""
        return self.mlp_ratio * self.width

    @classmethod
    def from_hub_config(cls, config: Mapping[str, Any]) -> FluxConfig:
        """Sizes from diffusers' `transformer/config.json`.

        Raises:
          ValueError: a file of another class, or a patch size other than 1 (packing is done
            outside of the model, see `pack`).
        """
        kind = config.get("_class_name", "FluxTransformer2DModel")
        if kind != "FluxTransformer2DModel":
            raise ValueError(
                f"FLUX config.json: expected _class_name FluxTransformer2DModel, found {kind!r}; "
                "give the `transformer` folder of a FLUX.1 model"
            )
        if config.get("patch_size", 1) != 1:
            raise ValueError(
                f"FLUX config.json: expected patch_size 1, found {config['patch_size']!r}; "
                "every published FLUX.1 model has 1"
            )
        found = _DEFAULTS | {k: v for k, v in config.items() if k in _DEFAULTS}
        return cls(
            in_channels=found["in_channels"],
            out_channels=found["out_channels"] or found["in_channels"],
            double_layers=found["num_layers"],
            single_layers=found["num_single_layers"],
            heads=found["num_attention_heads"],
            head_dim=found["attention_head_dim"],
            text_width=found["joint_attention_dim"],
            pooled_width=found["pooled_projection_dim"],
            guidance=found["guidance_embeds"],
            rope_axes=tuple(found["axes_dims_rope"]),
        )

    def hub_config(self) -> dict[str, Any]:
        """The `config.json` that diffusers' class is built from.

        Raises:
          ValueError: sizes that diffusers fixes and that are different here.
        """
        if self.mlp_ratio != 4 or self.rope_theta != 10000.0:
            raise ValueError(
                "FLUX config.json: expected mlp_ratio 4 and rope_theta 10000, which diffusers' "
                f"class cannot change, found {self.mlp_ratio} and {self.rope_theta}"
            )
        return {
            "_class_name": "FluxTransformer2DModel",
            "patch_size": 1,
            "in_channels": self.in_channels,
            "out_channels": self.out_channels if self.out_channels != self.in_channels else None,
            "num_layers": self.double_layers,
            "num_single_layers": self.single_layers,
            "attention_head_dim": self.head_dim,
            "num_attention_heads": self.heads,
            "joint_attention_dim": self.text_width,
            "pooled_projection_dim": self.pooled_width,
            "guidance_embeds": self.guidance,
            "axes_dims_rope": list(self.rope_axes),
        }


DEV = FluxConfig()
KONTEXT = DEV  # condition pictures are further tokens of the sequence
SCHNELL = FluxConfig(guidance=False)
FILL = FluxConfig(in_channels=384)  # noise 64, masked picture 64, mask 8 x 8 x 2 x 2
CONTROL = FluxConfig(in_channels=128)  # Canny and Depth: noise 64, control picture 64


def forward_flops(config: FluxConfig, text: int, image: int, *, attention: bool = True) -> int:
    """Operations of one example's forward pass: products, two operations per multiplication.

    What is counted is what is computed: every token in every block, the head for every image
    token. Norms, softmax, activations and the rotation are not, as is usual. A backward pass costs
    the same once for the activations, and once more for the weights that train.

    Args:
      text: text tokens. image: image tokens, those of condition pictures included.
      attention: whether scores and weighted values count (profilers that hook into modules leave
        them out).
    """
    width, mlp, joint = config.width, config.mlp, text + image
    per_token = 4 * width * width + 2 * width * mlp  # q, k, v, out and the MLP, in either block
    double = joint * per_token + 2 * 6 * width * width
    single = joint * per_token + 3 * width * width
    if attention:
        double += 2 * joint * joint * width
        single += 2 * joint * joint * width
    embedders = (
        image * config.in_channels * width
        + text * config.text_width * width
        + (1 + config.guidance) * (TIME_FEATURES * width + width * width)
        + (config.pooled_width + width) * width
    )
    head = 2 * width * width + image * width * config.out_channels
    blocks = config.double_layers * double + config.single_layers * single
    return 2 * (embedders + blocks + head)
