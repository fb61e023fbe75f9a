"""From noise to latents: Euler steps along a flow, as diffusers' FLUX pipelines do them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxmods.backbones.flux import pack, unpack
from jaxmods.diffusion import At, FlowSchedule, add_noise, euler
from jaxmods.diffusion import sample as run


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How pictures are made.

    Attributes:
      steps: model evaluations of a whole run from noise.
      guidance: scale for the guidance embedding; there is no second evaluation.
      strength: 1 starts from noise. Less skips the first steps, all but this share (rounded up),
        and starts from a picture with as much noise, so that more of the picture is kept (as
        diffusers' image-to-image pipelines do).
    """

    steps: int = 28
    guidance: float = 2.5
    strength: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 < self.strength <= 1:
            raise ValueError(
                "Sampling: expected steps >= 1 and 0 < strength <= 1, found "
                f"steps={self.steps}, strength={self.strength}"
            )


def generate(
    velocity: Callable[[jax.Array, jax.Array], jax.Array],
    noise: jax.Array,
    schedule: FlowSchedule,
    sampling: Sampling,
    *,
    start: jax.Array | None = None,
    trace: bool = False,
) -> Any:
    """Latents of a picture by Euler's method, in float32.

    Levels are shifted by the number of noise tokens alone. (The official pipeline rounds the
    latents to the model's dtype after every step; here they stay float32.)

    Args:
      velocity: `(latents [B, h, w, Z], time float32 [B]) -> velocity` in the same shape.
      noise: float32 [B, h, w, Z].
      schedule: noise levels.
      sampling: steps and strength.
      start: latents [B, h, w, Z] that a strength below 1 starts from.
      trace: return the packed latents after each step as well.

    Returns:
      float32 [B, h, w, Z]; with `trace` also [steps, B, N, 4 Z].

    Raises:
      ValueError: a strength below 1 without `start`.
    """
    batch, rows, columns, _ = noise.shape
    sigmas = schedule.sigmas(sampling.steps, tokens=rows * columns // 4)
    x = noise.astype(jnp.float32)
    if sampling.strength < 1:
        if start is None:
            raise ValueError("sampling: a strength below 1 needs latents to start from, found none")
        sigmas = sigmas[int(sampling.steps - sampling.steps * sampling.strength) :]
        x = add_noise(start.astype(jnp.float32), x, jnp.full((batch,), sigmas[0]))

    def model(packed: jax.Array, at: At) -> jax.Array:
        time = jnp.broadcast_to(at.time, (batch,))
        return pack(velocity(unpack(packed, rows, columns), time))

    solver = euler(sigmas, schedule.model_times(sigmas[:-1]))
    found = run(model, pack(x), solver, trace=trace)
    if trace:
        return unpack(found[0], rows, columns), found[1]
    return unpack(found, rows, columns)
