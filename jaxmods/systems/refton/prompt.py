"""The features of RefTON's one prompt, computed once: what lets a run leave the text encoders out.

    from jaxmods.systems.refton.prompt import write_prompt
    write_prompt("weights/FLUX.1-Kontext-dev")

Afterwards the folder has `prompt/model.safetensors` (states, pooled) and `prompt/config.json`, and
recipes with `base.encoders` None read it like the other components.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxmods.partitioning import unbox
from jaxmods.systems.flux.base import FluxBase
from jaxmods.systems.flux.weights import base_map
from jaxmods.weights import WeightMap, import_params, open_weights
from jaxmods.weights.lazy import from_numpy
from jaxmods.weights.writer import new_folder, write_json, write_safetensors

FOLDER = "prompt"


def write_prompt(
    folder: str | Path,
    base: FluxBase | None = None,
    *,
    t5: tuple[int, ...] | None = None,
    clip: tuple[int, ...] | None = None,
    dtype: DTypeLike | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes the features of one prompt beside the components of a pipeline.

    Args:
      folder: pipeline with `text_encoder` and `text_encoder_2`.
      base: sizes; None for the published ones.
      t5, clip: ids without padding; None for the empty prompt.
      dtype: of the encoders while they run; None for that of the files.
      overwrite: replace features that are there.

    Returns:
      The new folder.

    Raises:
      WeightError: encoders that do not fit, or features that are there already.
    """
    folder, base = Path(folder), FluxBase() if base is None else base
    abstract = unbox(jax.eval_shape(base.init, jax.random.key(0)))
    encoders = {name: abstract[name] for name in ("text_encoder", "text_encoder_2")}
    whole = base_map(base)
    rules = tuple(r for r in whole.rules if r.jax_patterns[0].startswith("text_encoder"))
    reader = open_weights(folder)
    wanted = {k: v for k, v in reader.tensors.items() if k.partition(".")[0] in encoders}
    with type(reader)(reader.source, wanted) as text:
        params = import_params(text, WeightMap((*rules, *whole.drops)), encoders, dtype=dtype)[0]
    ids = base.prompt_ids(t5, clip)
    features = jax.jit(lambda p: base.prompt(p, *ids))(params)
    tensors = {
        name: from_numpy(jax.device_get(value[0]), name)
        for name, value in features._asdict().items()
    }
    facts: dict[str, Any] = {
        "t5_ids": [int(i) for i in ids[0][0]],
        "clip_ids": [int(i) for i in ids[1][0]],
        "dtype": str(jnp.dtype(features.states.dtype)),
    }
    with new_folder(folder / FOLDER, overwrite) as work:
        write_safetensors(work / "model.safetensors", tensors)
        write_json(work / "config.json", facts)
    return folder / FOLDER
