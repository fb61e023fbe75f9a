"""Proof that an exported folder is the same model: PyTorch on its files against our functions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmods.backbones.clip import normalise
from jaxmods.system import Params

if TYPE_CHECKING:
    from jaxmods.systems.fgclip.system import FgClip


def verify(system: FgClip, folder: Path, params: Params, rng: jax.Array) -> dict[str, float]:
    """||a - b|| / ||b|| of every function of `system`: ours (a) against PyTorch's (b), in float32.

    Args:
      folder: holds `config.json` and safetensors files in the official layout.
      params: what was exported. rng: draws two random images, texts and boxes.

    Raises:
      ImportError: torch is not installed.
      RuntimeError: a key or a shape that PyTorch's `load_state_dict(strict=True)` refuses.
    """
    import torch
    from safetensors.torch import load_file

    from jaxmods.systems.fgclip.torch_reference import FgClipReference

    tensors: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    reference = FgClipReference(config)
    reference.load_state_dict({k: v.float() for k, v in tensors.items()}, strict=True)

    keys = jax.random.split(rng, 4)
    side = system.vision.image_size
    image = normalise(jax.random.randint(keys[0], (2, side, side, 3), 0, 256).astype(jnp.uint8))
    corners = jnp.sort(jax.random.uniform(keys[1], (2, 3, 2, 2)), axis=2)
    boxes = corners.reshape(2, 3, 4)
    short = _texts(keys[2], system, system.text.context_short)
    long = _texts(keys[3], system, system.text.context_long)

    def to_torch(x: jax.Array) -> Any:
        host = np.array(x)
        return torch.tensor(host.astype(np.int64) if host.dtype == np.int32 else host)

    pixels = to_torch(image.transpose(0, 3, 1, 2))
    inputs: dict[str, tuple[tuple[jax.Array, ...], tuple[Any, ...]]] = {
        "image_features": ((image,), (pixels,)),
        "dense_features": ((image,), (pixels,)),
        "box_features": ((image, boxes), (pixels, to_torch(boxes))),
        "text_features_short": ((short,), (to_torch(short),)),
        "text_features_long": ((long,), (to_torch(long),)),
    }
    wide = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)
    errors = {}
    for name, function in system.functions().items():
        ours, theirs = inputs[name]
        a = np.asarray(jax.jit(function)(wide, *ours), np.float64)
        with torch.no_grad():
            b = getattr(reference, name)(*theirs).double().numpy()
        errors[name] = float(np.linalg.norm(a - b) / np.linalg.norm(b))
    return errors


def _texts(rng: jax.Array, system: FgClip, length: int) -> jax.Array:
    """Two random texts, int32 [2, length]: bos, words, eos, padding; one fills the length."""
    text = system.text
    words = jax.random.randint(rng, (2, length), 0, min(text.bos_id, text.eos_id))
    end = jnp.array([[length - 1], [length // 2]])
    at = jnp.arange(length)
    ids = jnp.where(at == 0, text.bos_id, jnp.where(at < end, words, text.pad_id))
    return jnp.where(at == end, text.eos_id, ids).astype(jnp.int32)
