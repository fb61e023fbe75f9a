"""Proof that an exported folder is the same transformer: diffusers' class on its files against
ours."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmods.backbones.flux import Tokens
from jaxmods.system import Params
from jaxmods.systems.flux.base import FluxBase, Prompt
from jaxmods.weights.reader import PIPELINE

_COMPONENT = "transformer"


def verify(
    base: FluxBase,
    folder: Path,
    transformer: Params,
    image: Sequence[Tokens],
    rng: jax.Array,
    *,
    scale: float = 0.0,
) -> dict[str, float]:
    """||a - b|| / ||b|| of the velocity: ours (a) against diffusers' (b), in float32.

    Both take the transformer's parameters in float32, one after the other, from the host's memory
    (44 GiB each for FLUX.1).

    Args:
      folder: a diffusers pipeline; or one folder of all keys, as a system with adapters is written.
      transformer: what was exported, adapters attached where there are any.
      image: the noise's tokens, then conditions'; as few as one likes.
      rng: draws the text's features, noise levels and guidance.
      scale: of the adapters in `folder` (alpha / rank), which are added to the weights there.

    Raises:
      ImportError: torch or diffusers is not installed.
      RuntimeError: a key or a shape that PyTorch's `load_state_dict(strict=True)` refuses.
    """
    t, rows = base.transformer, image[0].values.shape[0]
    keys = jax.random.split(rng, 4)
    prompt = Prompt(
        jax.random.normal(keys[0], (rows, 8, t.text_width)),
        jax.random.normal(keys[1], (rows, t.pooled_width)),
    )
    time = jax.random.uniform(keys[2], (rows,), minval=0.1, maxval=0.9)
    guidance = jax.random.uniform(keys[3], (rows,), minval=1.0, maxval=4.0)
    theirs = _theirs(folder, scale, image, prompt, time, guidance if t.guidance else None)

    def velocity(transformer: Params) -> jax.Array:
        return base.velocity(transformer, image, prompt, time, guidance)

    wide = jax.tree.map(
        lambda p: p.astype(jnp.float32) if jnp.issubdtype(p.dtype, jnp.floating) else p,
        transformer,
    )
    ours = np.asarray(jax.jit(velocity)(wide), np.float64)
    return {"velocity": float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))}


def _theirs(
    folder: Path,
    scale: float,
    image: Sequence[Tokens],
    prompt: Prompt,
    time: jax.Array,
    guidance: jax.Array | None,
) -> np.ndarray:
    """Velocity of the noise's tokens by diffusers, float64 [B, N, C]."""
    import torch
    from diffusers import FluxTransformer2DModel

    def tensor(x: Any) -> Any:
        return torch.tensor(np.asarray(x, np.float32))

    config, tensors = _files(folder, scale)
    with torch.device("meta"):
        model = FluxTransformer2DModel.from_config(config)
    model.load_state_dict(tensors, strict=True, assign=True)
    with torch.no_grad():
        out = model.eval()(
            hidden_states=tensor(jnp.concatenate([x.values for x in image], axis=1)),
            encoder_hidden_states=tensor(prompt.states),
            pooled_projections=tensor(prompt.pooled),
            timestep=tensor(time),
            guidance=None if guidance is None else tensor(guidance),
            img_ids=tensor(np.concatenate([x.ids for x in image])),
            txt_ids=torch.zeros(prompt.states.shape[1], image[0].ids.shape[1]),
        ).sample
    return np.asarray(out[:, : image[0].values.shape[1]].double().numpy())


def _files(folder: Path, scale: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """Config and float32 tensors of the transformer, with adapters added: W + scale B A."""
    from safetensors.torch import load_file

    parts = (folder / PIPELINE).is_file()
    place, prefix = (folder / _COMPONENT, "") if parts else (folder, f"{_COMPONENT}.")
    config = json.loads((place / "config.json").read_text(encoding="utf-8"))
    tensors = {
        key.removeprefix(prefix): value.float()
        for path in sorted(place.glob("*.safetensors"))
        for key, value in load_file(path).items()
        if key.startswith(prefix)
    }
    for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
        module = key.removesuffix(".lora_A.weight")
        first, second = tensors.pop(key), tensors.pop(f"{module}.lora_B.weight")
        tensors[f"{module}.weight"] += scale * (second @ first)
    return config if parts else config[_COMPONENT], tensors
