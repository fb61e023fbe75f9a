"""Guidance: models made of models.

Everything here takes and returns the `(x, at) -> prediction` of `jaxmods.diffusion.sampling`, so it
can be put around any network and under any solver.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmods.diffusion.sampling import At, Model
from jaxmods.system import Array

Scale = float | np.ndarray | Array
Conditioned = Callable[[Array, At, Any], Array]  # (x, at, condition) -> prediction


def guide(without: Array, given: Array, scale: Array | float) -> Array:
    """without + scale (given - without), in float32: beyond `given` for a scale above 1.

    Ho and Salimans 2022 (arXiv 2207.12598) in the form of Imagen and diffusers: scale 1 is `given`
    alone. Autoguidance (arXiv 2406.02507) is the same with a weaker model's as `without`.
    """
    low = without.astype(jnp.float32)
    return low + scale * (given.astype(jnp.float32) - low)


def classifier_free(
    model: Conditioned,
    condition: Any,
    negative: Any,
    scale: Scale,
    *,
    together: bool = True,
) -> Model:
    """A model guided away from the prediction for `negative`.

    Args:
      model: `(x [B, ...], at, condition) -> prediction`.
      condition, negative: trees of arrays with a leading batch axis B, of equal shapes.
      scale: one number, or a table [steps] for a scale that changes from step to step.
      together: one pass over both halves, negative first, in a batch of 2B; otherwise two passes,
        for half the memory.

    Returns:
      `(x, at) -> prediction`, float32.

    Raises:
      ValueError: conditions that differ in structure or shape (when the model is traced).
    """

    def guided(x: Array, at: At) -> Array:
        shapes = [jax.tree.map(jnp.shape, tree) for tree in (condition, negative)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                "classifier-free guidance: expected condition and negative of equal shapes, found "
                f"{shapes[0]} and {shapes[1]}"
            )
        if together:
            both = jax.tree.map(lambda n, c: jnp.concatenate([n, c]), negative, condition)
            without, given = jnp.split(model(jnp.concatenate([x, x]), at, both), 2)
        else:
            without, given = model(x, at, negative), model(x, at, condition)
        return guide(without, given, at_step(scale, at))

    return guided


def distilled(model: Conditioned, scale: Scale) -> Model:
    """A model that was distilled to take the guidance scale as an input (FLUX.1-dev): one pass.

    Args:
      model: `(x [B, ...], at, guidance float32 [B]) -> prediction`.
      scale: as in `classifier_free`; the network sees the number itself.
    """

    def guided(x: Array, at: At) -> Array:
        return model(x, at, jnp.full((x.shape[0],), at_step(scale, at), jnp.float32))

    return guided


def at_step(scale: Scale, at: At) -> Array:
    """The scale of this step, float32 scalar. Raises ValueError for more than one axis."""
    table = jnp.asarray(scale, jnp.float32)
    if table.ndim > 1:
        raise ValueError(
            f"guidance scale: expected a number or one per step, found shape {list(table.shape)}"
        )
    return table[at.step] if table.ndim else table
