"""Operation counts of training steps on FLUX: products, two operations per multiplication.

What is counted is what the mathematics needs: forward, gradients of activations where something
before them trains, gradients of what trains. Recomputation, norms and softmax are not.
"""

from __future__ import annotations

import math

from jaxmods.backbones.autoencoder_kl import AutoencoderConfig
from jaxmods.backbones.flux import FluxConfig, forward_flops
from jaxmods.systems.flux.base import TextEncoders
from jaxmods.systems.flux.squares import Squares
from jaxmods.systems.flux.weights import abstract_transformer
from jaxmods.weights.map import flatten


def step_flops(
    config: FluxConfig,
    text: int,
    image: int,
    *,
    adapters: tuple[tuple[str, ...], int] | None = None,
) -> float:
    """Operations of the transformer in one training step of one example.

    Args:
      config: sizes.
      text: text tokens. image: image tokens, those of conditions included.
      adapters: paths of the adapted kernels, and the rank, where only adapters train; None where
        the whole transformer does.
    """
    products = forward_flops(config, text, image, attention=False)
    attention = forward_flops(config, text, image) - products
    if adapters is None:
        return 3.0 * (products + attention)
    width, joint = config.width, text + image
    blocks = config.double_layers + config.single_layers
    through = 2 * blocks * joint * (4 * width * width + 2 * width * config.mlp)
    through += 2 * image * width * config.out_channels
    # Gradients go through the blocks' products once (frozen weights take none), through attention
    # to both factors of either product.
    return float(products + through + 3 * attention + 3 * _adapters(config, text, image, *adapters))


def _adapters(
    config: FluxConfig, text: int, image: int, paths: tuple[str, ...], rank: int
) -> float:
    """Operations of the low-rank products in one forward pass."""
    shapes = {path: leaf.shape for path, leaf in flatten(abstract_transformer(config)).items()}
    total = 0.0
    for path in paths:
        *stack, wide, out = shapes[path]
        tokens = text + image
        if path.startswith("double_blocks/"):
            tokens = text if path.startswith("double_blocks/text/") else image
        total += 2.0 * math.prod(stack) * tokens * rank * (wide + out)
    return total


def encoder_flops(config: AutoencoderConfig | Squares, height: int, width: int) -> float:
    """Operations of the autoencoder's encoder for one picture."""
    if isinstance(config, Squares):
        return 0.0
    c = config

    def conv(before: int, after: int, area: int, size: int = 3) -> float:
        return 2.0 * size * size * before * after * area

    def resnet(before: int, after: int, area: int) -> float:
        shortcut = conv(before, after, area, 1) if before != after else 0.0
        return conv(before, after, area) + conv(after, after, area) + shortcut

    area, before = height * width, c.channels[0]
    total = conv(c.picture_channels, before, area)
    for level, after in enumerate(c.channels):
        for _ in range(c.resnets):
            total += resnet(before, after, area)
            before = after
        if level + 1 < len(c.channels):
            area //= 4
            total += conv(after, after, area)
    total += 2 * resnet(before, before, area)
    if c.mid_attention:
        total += 4 * conv(before, before, area, 1) + 4.0 * area * area * before
    total += conv(before, 2 * c.latent_channels, area)
    if c.quant_conv:
        total += conv(2 * c.latent_channels, 2 * c.latent_channels, area, 1)
    return total


def text_flops(encoders: TextEncoders, length: int) -> float:
    """Operations of both text encoders for one text, forward."""
    t5, clip = encoders.t5, encoders.clip
    inner, rows = t5.heads * t5.head_dim, clip.context_short
    t5_layer = length * (4 * t5.width * inner + 3 * t5.width * t5.mlp) + 2 * length**2 * inner
    clip_layer = rows * (4 * clip.width**2 + 2 * clip.width * clip.mlp) + 2 * rows**2 * clip.width
    return 2.0 * (t5.layers * t5_layer + clip.layers * clip_layer)
