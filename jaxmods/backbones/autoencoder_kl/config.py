"""Sizes of the autoencoder, and diffusers' `config.json` read and written."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

# diffusers leaves nothing out of a written config, but older files lack the later fields.
_DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 32,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
# Fields that change the network and that this one does not have.
_FIXED: dict[str, Any] = {"act_fn": "silu", "latents_mean": None, "latents_std": None}


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes; the defaults are FLUX.1's.

    Attributes:
      channels: width of every level, highest resolution first.
      resnets: residual blocks of an encoder level; a decoder level has one more.
      latent_channels: Z. picture_channels: of the pictures.
      groups: of every group norm.
      quant_conv, post_quant_conv: 1x1 convolutions behind the encoder and before the decoder.
      mid_attention: attention at the lowest resolution.
      scaling_factor, shift_factor: see `scale`.
      sample_size: side of the training pictures; only written to the `config.json`.
    """

    channels: tuple[int, ...] = (128, 256, 512, 512)
    resnets: int = 2
    latent_channels: int = 16
    picture_channels: int = 3
    groups: int = 32
    quant_conv: bool = False
    post_quant_conv: bool = False
    mid_attention: bool = True
    scaling_factor: float = 0.3611
    shift_factor: float = 0.1159
    sample_size: int = 1024

    def __post_init__(self) -> None:
        if bad := [width for width in self.channels if width % self.groups]:
            raise ValueError(
                f"AutoencoderConfig: expected widths that {self.groups} groups divide, found {bad}"
            )

    @property
    def factor(self) -> int:
        """Side of the picture over side of the latents."""
        return 2 ** (len(self.channels) - 1)

    def scale(self, latents: jax.Array) -> jax.Array:
        """Latents as a diffusion model sees them: (z - shift_factor) * scaling_factor."""
        return (latents - self.shift_factor) * self.scaling_factor

    def unscale(self, latents: jax.Array) -> jax.Array:
        """The inverse of `scale`, for `AutoencoderKL.decode`."""
        return latents / self.scaling_factor + self.shift_factor

    @classmethod
    def from_hub_config(cls, config: Mapping[str, Any]) -> AutoencoderConfig:
        """Sizes from the `config.json` of a diffusers folder.

        Raises:
          ValueError: an option that this network does not have.
        """
        c = _DEFAULTS | dict(config)
        levels = len(c["block_out_channels"])
        fixed = _FIXED | {
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "out_channels": c["in_channels"],
        }
        for key, expected in fixed.items():
            found = c.get(key, expected)
            found = list(found) if isinstance(found, tuple) else found
            if found != expected:
                raise ValueError(
                    f"AutoencoderKL config.json: {key}: expected {expected!r}, found {found!r}; "
                    "this network has no other"
                )
        return cls(
            channels=tuple(c["block_out_channels"]),
            resnets=c["layers_per_block"],
            latent_channels=c["latent_channels"],
            picture_channels=c["in_channels"],
            groups=c["norm_num_groups"],
            quant_conv=c["use_quant_conv"],
            post_quant_conv=c["use_post_quant_conv"],
            mid_attention=c["mid_block_add_attention"],
            scaling_factor=c["scaling_factor"],
            shift_factor=c["shift_factor"] or 0.0,
            sample_size=c["sample_size"],
        )

    def hub_config(self) -> dict[str, Any]:
        """The `config.json` of a diffusers folder of these sizes."""
        return {
            "_class_name": "AutoencoderKL",
            "act_fn": "silu",
            "block_out_channels": list(self.channels),
            "down_block_types": ["DownEncoderBlock2D"] * len(self.channels),
            "force_upcast": True,
            "in_channels": self.picture_channels,
            "latent_channels": self.latent_channels,
            "layers_per_block": self.resnets,
            "mid_block_add_attention": self.mid_attention,
            "norm_num_groups": self.groups,
            "out_channels": self.picture_channels,
            "sample_size": self.sample_size,
            "scaling_factor": self.scaling_factor,
            "shift_factor": self.shift_factor or None,
            "up_block_types": ["UpDecoderBlock2D"] * len(self.channels),
            "use_post_quant_conv": self.post_quant_conv,
            "use_quant_conv": self.quant_conv,
        }


FLUX = AutoencoderConfig()
SD = AutoencoderConfig(
    latent_channels=4,
    quant_conv=True,
    post_quant_conv=True,
    scaling_factor=0.18215,
    shift_factor=0.0,
    sample_size=512,
)
SDXL = dataclasses.replace(SD, scaling_factor=0.13025, sample_size=1024)
# For tests and tiny recipes: the same factor of 8, about 0.1 M parameters.
TINY = AutoencoderConfig(
    channels=(8, 16, 16, 16), resnets=1, latent_channels=4, groups=4, sample_size=64
)
