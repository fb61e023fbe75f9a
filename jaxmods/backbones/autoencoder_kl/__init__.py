"""The KL autoencoder of Stable Diffusion and FLUX (diffusers' AutoencoderKL)."""

from jaxmods.backbones.autoencoder_kl.config import FLUX, SD, SDXL, TINY, AutoencoderConfig
from jaxmods.backbones.autoencoder_kl.model import AutoencoderKL, Posterior
from jaxmods.backbones.autoencoder_kl.weights import Layout, autoencoder_kl_map, find_layout

__all__ = [
    "FLUX",
    "SD",
    "SDXL",
    "TINY",
    "AutoencoderConfig",
    "AutoencoderKL",
    "Layout",
    "Posterior",
    "autoencoder_kl_map",
    "find_layout",
]
