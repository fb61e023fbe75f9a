"""The map between a diffusers pipeline of FLUX.1 and the parameters of a `FluxBase`.

A pipeline folder holds one sub-folder per component; the keys here are the component's name, a dot,
and the component's own key (`transformer.x_embedder.weight`), as `jaxmods.weights.open_weights`
gives them for such a folder.
"""

from __future__ import annotations

import functools
from typing import Any

import jax

from jaxmods.backbones.autoencoder_kl import AutoencoderConfig, autoencoder_kl_map
from jaxmods.backbones.clip_weights import clip_text_map
from jaxmods.backbones.flux import FluxConfig, flux_map
from jaxmods.backbones.t5.weights import t5_map
from jaxmods.nn import lora
from jaxmods.nn.stack import Execution
from jaxmods.partitioning import unbox
from jaxmods.system import Params, System
from jaxmods.systems.flux.base import FluxBase, init_transformer
from jaxmods.weights import Drop, WeightMap
from jaxmods.weights.pipeline import Component, HubPipeline

KONTEXT = "black-forest-labs/FLUX.1-Kontext-dev"
DEV = "black-forest-labs/FLUX.1-dev"


def base_map(base: FluxBase) -> WeightMap:
    """The map of all components; those that `base` does not hold may be in the folder."""
    total = flux_map(base.transformer).under("transformer.", "transformer/")
    if isinstance(base.vae, AutoencoderConfig):
        total += autoencoder_kl_map(base.vae).under("vae.", "vae/")
    else:
        total += WeightMap((Drop("vae.*", "pixels are the latents here"),))
    if base.encoders is not None:
        e = base.encoders
        total += clip_text_map(e.clip.layers).under("text_encoder.", "text_encoder/")
        total += t5_map(e.t5).under("text_encoder_2.", "text_encoder_2/")
    else:
        total += WeightMap((Drop("text_encoder*", "text features come from elsewhere here"),))
    return WeightMap(total.entries, tuple(dict.fromkeys(total.hub_names)))


def published(config: FluxConfig) -> lora.Published:
    """The names by which adapter files speak of the transformer, in diffusers' layout."""
    return lora.Published(flux_map(config))


@functools.lru_cache(maxsize=32)
def abstract_transformer(config: FluxConfig) -> Params:
    """Shapes of the transformer's parameters."""
    return unbox(jax.eval_shape(lambda key: init_transformer(config, Execution(), key), _key()))


@functools.lru_cache(maxsize=32)
def target_paths(config: FluxConfig, names: tuple[str, ...]) -> tuple[str, ...]:
    """Paths of the kernels of all modules that end in one of these names.

    Raises:
      ValueError: a name that no linear module of the transformer has.
    """
    return lora.targets_of(published(config), abstract_transformer(config), names)


def _key() -> jax.ShapeDtypeStruct:
    return jax.eval_shape(lambda: jax.random.key(0))


def components(base: FluxBase) -> tuple[Component, ...]:
    """The sub-folders of a pipeline of these sizes, each with its `config.json`."""
    parts = [
        Component(
            "transformer",
            ("diffusers", "FluxTransformer2DModel"),
            base.transformer.hub_config(),
            stem="diffusion_pytorch_model",
        )
    ]
    if isinstance(base.vae, AutoencoderConfig):
        parts.append(
            Component(
                "vae",
                ("diffusers", "AutoencoderKL"),
                base.vae.hub_config(),
                stem="diffusion_pytorch_model",
            )
        )
    if base.encoders is not None:
        e = base.encoders
        parts += [
            Component("text_encoder", ("transformers", "CLIPTextModel"), e.clip.hub_config()),
            Component("text_encoder_2", ("transformers", "T5EncoderModel"), e.t5.hub_config()),
        ]
    return tuple(parts)


def scheduler_config(base: FluxBase) -> dict[str, Any]:
    """`scheduler/scheduler_config.json` of a pipeline."""
    s = base.schedule
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": s.num_train_timesteps,
        "shift": s.shift,
        "use_dynamic_shifting": s.use_dynamic_shifting,
        "base_shift": s.base_shift,
        "max_shift": s.max_shift,
        "base_image_seq_len": s.base_image_seq_len,
        "max_image_seq_len": s.max_image_seq_len,
        "time_shift_type": s.time_shift_type,
        "shift_terminal": s.shift_terminal,
    }


def hub_pipeline(base: FluxBase, class_name: str) -> HubPipeline:
    """A pipeline of these sizes; `class_name` is diffusers' class for it."""
    return HubPipeline(
        components(base),
        {"_class_name": class_name},
        {"scheduler/scheduler_config.json": scheduler_config(base)},
    )


def adapter_map(
    base: FluxBase,
    config: lora.LoraConfig,
    merged: System,
    base_model: str,
    *,
    settings: str = "system.adapters",
) -> lora.AdapterMap:
    """Adapters `params["lora"]` on the transformer, in files as FLUX's are: diffusers' names, and
    those of the original code with its fused projections in kohya's.

    Args:
      config: targets as paths within the transformer.
      merged: the system without adapters.
      base_model: `KONTEXT` or `DEV`.
      settings: where a recipe keeps rank and targets.
    """
    return lora.AdapterMap(
        config,
        (published(base.transformer),),
        merged,
        kohya=(lora.Published(flux_map(base.transformer, "bfl")),),
        base_model=base_model,
        settings=settings,
    )


def hub_config(base: FluxBase) -> dict[str, Any]:
    """`config.json` of every component, by its name."""
    return {part.name: dict(part.config) for part in components(base)}
