"""What lies in RefTON's token sequence, in which order and at which positions.

    [text | noise | subject | garment | mask | dense | reference]

The noise has label 0 on the first position axis; a condition has its own label, and positions that
are spread by its scale, so that a picture of half the size covers the same range as the target.

Official code: `train_refton_lora.py` (`process_latent_cond`) and
`FluxKontextPipelineI2I._prepare_latent_image_ids`; paper section on position indices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxmods.backbones.flux import Tokens, grid_ids, pack

Optional = Literal["mask", "dense", "reference"]


@dataclasses.dataclass(frozen=True)
class Condition:
    """A picture that the model is given.

    Attributes:
      name: of its array in a batch.
      label: first position of its tokens.
      reduced: whether it has the conditions' size (`cond_scale`) instead of the target's.
    """

    name: str
    label: int
    reduced: bool


ALWAYS = (Condition("subject", 1, False), Condition("garment", 2, False))
OPTIONAL: dict[Optional, Condition] = {
    "mask": Condition("mask", 3, True),
    "dense": Condition("dense", 4, True),
    "reference": Condition("reference", 5, True),
}


def reduced_size(height: int, width: int, cond_scale: float) -> tuple[int, int]:
    """Pixels of a reduced condition: (int(H // s), int(W // s))."""
    return int(height // cond_scale), int(width // cond_scale)


def condition_ids(rows: int, columns: int, label: int, scale: float) -> np.ndarray:
    """Positions (label, i s + s // 2, j s + s // 2) of the token at row i, column j.

    `//` rounds down, also for fractions: 2 gives offset 1 (1, 3, 5, ...), 1 and 1.5 give 0.

    Args:
      rows, columns: of tokens, 16 pixels each.
      scale: target size over condition size.

    Returns:
      float32 [rows * columns, 3].
    """
    offset = scale // 2
    return grid_ids(rows, columns, label=label, scale=scale, offset=(offset, offset))


def tokens(latents: jax.Array, label: int = 0, scale: float = 1) -> Tokens:
    """Packed latents [B, rows, columns, Z] with their positions; the defaults are the noise's."""
    rows, columns = latents.shape[1:3]
    return Tokens(pack(latents), condition_ids(rows // 2, columns // 2, label, scale))


def key_mask(
    always: int, lists: Sequence[tuple[str, Tokens]], used: Mapping[str, jax.Array]
) -> jax.Array | None:
    """Which tokens may be attended to: bool [B, 1, 1, tokens in all]; None when all may.

    Hidden tokens have a weight of exactly zero in every attention, so the noise tokens come out as
    from a sequence without them.

    Args:
      always: leading tokens that are seen in any case (text and noise).
      lists: names of the conditions with their tokens, in the order of the sequence.
      used: bool [B] by name; False hides. Conditions that are not named are seen.
    """
    if not used:
        return None
    rows = next(iter(used.values())).shape[0]
    seen = [jnp.ones((rows, always), bool)]
    for name, condition in lists:
        flag = used.get(name, jnp.ones((rows,), bool))
        seen.append(jnp.broadcast_to(flag[:, None], (rows, condition.values.shape[1])))
    return jnp.concatenate(seen, axis=1)[:, None, None]
