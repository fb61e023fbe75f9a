"""Where training looks along the noise levels: densities of the time, and weights of the loss.

Time u runs over [0, 1]. The maps take standard draws to times, so that recorded draws of another
framework can be replayed; `Density.sample` makes the draws from a key.

Sources: Esser et al. 2024 (SD3, arXiv 2403.03206), section 3.1; diffusers `training_utils.py`,
`compute_density_for_timestep_sampling` and `compute_loss_weighting_for_sd3`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp

from jaxmods.system import Array

DensityKind = Literal["uniform", "logit_normal", "mode", "cosmap"]
Weighting = Literal["none", "sigma_sqrt", "cosmap"]


def logit_normal(normal: Array, mean: float = 0.0, std: float = 1.0) -> Array:
    """sigmoid(mean + std z) of a standard normal z."""
    return jax.nn.sigmoid(mean + std * normal)


def mode(uniform: Array, scale: float = 1.29) -> Array:
    """1 - U - scale (cos^2(pi U / 2) - 1 + U): heavy around 1/2 for scale > 0, uniform for 0."""
    return 1 - uniform - scale * (jnp.square(jnp.cos(jnp.pi * uniform / 2)) - 1 + uniform)


def cosmap(uniform: Array) -> Array:
    """1 - 1 / (tan(pi U / 2) + 1): density 2 / (pi (1 - 2u + 2u^2)), symmetric about 1/2."""
    return 1 - 1 / (jnp.tan(jnp.pi * uniform / 2) + 1)


@dataclasses.dataclass(frozen=True)
class Density:
    """A density of times on [0, 1].

    Attributes:
      kind: "uniform"; "logit_normal" sigmoid of a normal; "mode" with heavy middle; "cosmap" the
        density that equals the "cosmap" weighting under uniform times.
      mean, std: of the normal, for "logit_normal".
      mode_scale: for "mode", between -1 and 2 / (pi - 2) = 1.75, where the map is monotone.
      low, high: "logit_normal" is restricted to times between these (by inverse CDF).
    """

    kind: DensityKind = "uniform"
    mean: float = 0.0
    std: float = 1.0
    mode_scale: float = 1.29
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        kinds = ("uniform", "logit_normal", "mode", "cosmap")
        if self.kind not in kinds:
            raise ValueError(f"density kind: expected one of {kinds}, found {self.kind!r}")
        if self.std <= 0:
            raise ValueError(f"density std: expected a positive number, found {self.std}")
        if self.kind == "mode" and not -1 <= self.mode_scale <= 2 / (math.pi - 2):
            raise ValueError(
                f"density mode_scale: expected -1 to {2 / (math.pi - 2):.3f}, found "
                f"{self.mode_scale}; times would leave [0, 1]"
            )
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(
                f"density: expected 0 <= low < high <= 1, found {self.low} and {self.high}"
            )
        if (self.low, self.high) != (0, 1) and self.kind != "logit_normal":
            raise ValueError(f"density: low and high are for logit_normal, not {self.kind!r}")

    def sample(self, rng: Array, shape: tuple[int, ...]) -> Array:
        """float32 times of `shape`, in [0, 1]."""
        if self.kind == "logit_normal":
            if (self.low, self.high) == (0, 1):
                normal = jax.random.normal(rng, shape, jnp.float32)
            else:
                ends = [_logit_cdf(t, self.mean, self.std) for t in (self.low, self.high)]
                inside = jax.random.uniform(rng, shape, jnp.float32, ends[0], ends[1])
                normal = jax.scipy.special.ndtri(inside)
            return jnp.clip(logit_normal(normal, self.mean, self.std), self.low, self.high)
        uniform = jax.random.uniform(rng, shape, jnp.float32)
        if self.kind == "mode":
            return mode(uniform, self.mode_scale)
        return cosmap(uniform) if self.kind == "cosmap" else uniform


def _logit_cdf(time: float, mean: float, std: float) -> float:
    """Probability that a logit-normal time is below `time`."""
    if time in (0, 1):
        return float(time)
    z = (math.log(time / (1 - time)) - mean) / std
    return 0.5 * (1 + math.erf(z / math.sqrt(2)))


def loss_weight(weighting: Weighting, sigma: Array) -> Array:
    """Weight of the squared error at noise level sigma, float32, in the shape of `sigma`.

    "none" 1; "sigma_sqrt" sigma^-2 (so called in the source, without a root); "cosmap"
    2 / (pi (1 - 2 sigma + 2 sigma^2)).

    Raises:
      ValueError: an unknown weighting.
    """
    sigma = sigma.astype(jnp.float32)
    if weighting == "none":
        return jnp.ones_like(sigma)
    if weighting == "sigma_sqrt":
        return sigma**-2.0
    if weighting == "cosmap":
        return 2 / (jnp.pi * (1 - 2 * sigma + 2 * jnp.square(sigma)))
    raise ValueError(
        f"loss weighting: expected 'none', 'sigma_sqrt' or 'cosmap', found {weighting!r}"
    )


def scheme(name: str) -> tuple[Density, Weighting]:
    """Density and weighting behind one `weighting_scheme` of the official training scripts.

    There "logit_normal" and "mode" choose the density and leave the weight at 1; "sigma_sqrt" and
    "cosmap" choose the weight under uniform times; "none" is neither.

    Raises:
      ValueError: another name.
    """
    if name in ("logit_normal", "mode"):
        return Density("logit_normal" if name == "logit_normal" else "mode"), "none"
    if name in ("none", "sigma_sqrt", "cosmap"):
        weightings: dict[str, Weighting] = {"sigma_sqrt": "sigma_sqrt", "cosmap": "cosmap"}
        return Density(), weightings.get(name, "none")
    raise ValueError(
        "weighting scheme: expected 'none', 'sigma_sqrt', 'cosmap', 'logit_normal' or 'mode', "
        f"found {name!r}"
    )
