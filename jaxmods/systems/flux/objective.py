"""The rectified-flow loss of FLUX, with everything random as an argument.

Formulas: Esser et al. 2024 (SD3, arXiv 2403.03206); noise levels and weights as in diffusers'
training scripts (`training_utils.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from jaxmods.diffusion import (
    FlowSchedule,
    FlowTimes,
    add_noise,
    loss_weight,
    scheme,
    velocity,
    velocity_loss,
)

Scheme = Literal["none", "sigma_sqrt", "logit_normal", "mode", "cosmap"]


@dataclasses.dataclass(frozen=True)
class Draws:
    """What is random in a training step.

    Attributes:
      noise: float32, in the shape of the clean latents [B, h, w, Z].
      u: float32 [B], times in [0, 1] after the density; 0 is the noisiest.
      dropout: key of adapters' dropout, None for none.
    """

    noise: jax.Array
    u: jax.Array
    dropout: jax.Array | None = None


def draw(rng: jax.Array, shape: tuple[int, ...], weighting_scheme: Scheme) -> Draws:
    """Draws for clean latents of `shape`."""
    noise_rng, time_rng, dropout = jax.random.split(rng, 3)
    density, _ = scheme(weighting_scheme)
    noise = jax.random.normal(noise_rng, shape, jnp.float32)
    return Draws(noise, density.sample(time_rng, shape[:1]), dropout)


def flow_loss(
    predict: Callable[[jax.Array, jax.Array], jax.Array],
    clean: jax.Array,
    draws: Draws,
    schedule: FlowSchedule,
    weighting_scheme: Scheme,
) -> tuple[jax.Array, jax.Array]:
    """Mean over examples of w(sigma) * mean (v - (noise - x0))^2, and the noise levels.

    Args:
      predict: `(noisy [B, h, w, Z], time float32 [B]) -> velocity` in the shape of the first.
      clean: x0, float32 [B, h, w, Z].
      draws: noise and times.
      schedule: its training table is what times are looked up in.
      weighting_scheme: gives w.

    Returns:
      float32 scalar, and sigma float32 [B].
    """
    sigma, time = FlowTimes(schedule=schedule).at(draws.u)
    predicted = predict(add_noise(clean, draws.noise, sigma), time)
    _, weighting = scheme(weighting_scheme)
    target = velocity(clean, draws.noise)
    return velocity_loss(predicted, target, loss_weight(weighting, sigma)), sigma
