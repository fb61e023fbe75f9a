"""Rectified flow: noising, target, loss, and tables of noise levels.

    x_sigma = (1 - sigma) x0 + sigma eps        v = d x / d sigma = eps - x0

sigma = 1 is noise, 0 is data, as in SD3's paper and in diffusers. Where a paper lets t run from
noise to data, t = 1 - sigma; where its target is x0 - eps, that is the negative of v.

Sources: Liu et al. 2022 (arXiv 2209.03003); Esser et al. 2024 (arXiv 2403.03206); diffusers
`schedulers/scheduling_flow_match_euler_discrete.py`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from jaxmods.diffusion.densities import Density
from jaxmods.system import Array


def add_noise(clean: Array, noise: Array, sigma: Array) -> Array:
    """(1 - sigma) x0 + sigma eps in float32, cast to the dtype of `clean`.

    Args:
      clean, noise: [B, ...]. sigma: [B], or any shape that a [B, ...] array starts with.
    """
    s = _expand(sigma.astype(jnp.float32), clean.ndim)
    mixed = (1.0 - s) * clean.astype(jnp.float32) + s * noise.astype(jnp.float32)
    return mixed.astype(clean.dtype)


def velocity(clean: Array, noise: Array) -> Array:
    """eps - x0 in float32: what the model learns."""
    return noise.astype(jnp.float32) - clean.astype(jnp.float32)


def clean_from(noisy: Array, prediction: Array, sigma: Array) -> Array:
    """x0 = x - sigma v in float32: the data that a predicted velocity points at."""
    s = _expand(sigma.astype(jnp.float32), noisy.ndim)
    return noisy.astype(jnp.float32) - s * prediction.astype(jnp.float32)


def velocity_loss(prediction: Array, target: Array, weight: Array | None = None) -> Array:
    """Mean over examples of weight * mean over everything else of (prediction - target)^2.

    Args:
      prediction, target: [B, ...], any float dtype. weight: [B]; None for 1.

    Returns:
      float32 scalar.
    """
    error = jnp.square(prediction.astype(jnp.float32) - target.astype(jnp.float32))
    per_example = jnp.mean(error.reshape(error.shape[0], -1), axis=1)
    return jnp.mean(per_example if weight is None else weight * per_example)


def _expand(x: Array, ndim: int) -> Array:
    return x.reshape(*x.shape, *(1,) * (ndim - x.ndim))


def shift_static(sigma: Any, shift: float) -> Any:
    """s sigma / (1 + (s - 1) sigma): moves levels towards noise for s > 1."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def shift_exponential(sigma: Any, mu: float) -> Any:
    """e^mu / (e^mu + 1 / sigma - 1): `shift_static` by e^mu, in the scheduler's order of terms."""
    return math.exp(mu) / (math.exp(mu) + (1 / sigma - 1))


def shift_linear(sigma: Any, mu: float) -> Any:
    """mu / (mu + 1 / sigma - 1): `shift_static` by mu."""
    return mu / (mu + (1 / sigma - 1))


@dataclasses.dataclass(frozen=True)
class FlowSchedule:
    """Tables of noise levels, made on the host and constant in a compiled program.

    The defaults are those of FLUX.1-dev and Kontext-dev. Field names are those of the published
    `scheduler_config.json`.

    Attributes:
      num_train_timesteps: levels of the training table, and the factor from sigma to timesteps.
      shift: static shift of both tables, where `use_dynamic_shifting` is off.
      use_dynamic_shifting: shift the sampling table by mu, which grows with the number of tokens;
        the training table is then not shifted.
      base_shift, max_shift, base_image_seq_len, max_image_seq_len: mu is the line through these
        two points, also beyond them.
      time_shift_type: what mu does.
      shift_terminal: stretch the sampling table so that its last level (before 0) is this.
      spacing: levels before shifting: "even" is 1, ..., 1/n (what the FLUX pipelines hand to the
        scheduler); "table" spans the training table (what the scheduler takes by itself; a static
        shift then acts twice on the ends, as there).
    """

    num_train_timesteps: int = 1000
    shift: float = 3.0
    use_dynamic_shifting: bool = True
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    time_shift_type: Literal["exponential", "linear"] = "exponential"
    shift_terminal: float | None = None
    spacing: Literal["even", "table"] = "even"

    def __post_init__(self) -> None:
        if self.time_shift_type not in ("exponential", "linear"):
            raise ValueError(
                "time_shift_type: expected 'exponential' or 'linear', found "
                f"{self.time_shift_type!r}"
            )
        if self.spacing not in ("even", "table"):
            raise ValueError(f"spacing: expected 'even' or 'table', found {self.spacing!r}")

    @classmethod
    def from_hub_config(
        cls, config: Mapping[str, Any], spacing: Literal["even", "table"] = "even"
    ) -> FlowSchedule:
        """From the fields of a `scheduler_config.json` of FlowMatchEulerDiscreteScheduler.

        Raises:
          ValueError: an option that no system here uses (inverted, Karras, exponential or beta
            levels, stochastic sampling), or another scheduler's file.
        """
        kind = config.get("_class_name", "FlowMatchEulerDiscreteScheduler")
        if kind != "FlowMatchEulerDiscreteScheduler":
            raise ValueError(
                f"scheduler config: expected FlowMatchEulerDiscreteScheduler, found {kind}"
            )
        refused = (
            "invert_sigmas",
            "use_karras_sigmas",
            "use_exponential_sigmas",
            "use_beta_sigmas",
            "stochastic_sampling",
        )
        if on := [name for name in refused if config.get(name)]:
            raise ValueError(f"scheduler config: {', '.join(on)} is set, which is not supported")
        official: dict[str, Any] = {"shift": 1.0, "use_dynamic_shifting": False}
        names = {field.name for field in dataclasses.fields(cls)} - {"spacing"}
        official.update({k: v for k, v in config.items() if k in names})
        return cls(**official, spacing=spacing)

    def training_sigmas(self) -> np.ndarray:
        """float32 [num_train_timesteps], from 1 down: the levels that training draws from."""
        count = self.num_train_timesteps
        steps = np.linspace(1, count, count, dtype=np.float32)[::-1]
        sigmas = (steps / np.float32(count)).astype(np.float32)
        if self.use_dynamic_shifting:
            return sigmas
        return shift_static(sigmas, self.shift).astype(np.float32)

    def mu(self, tokens: int) -> float:
        """Shift for pictures of so many noise tokens (conditions are not counted)."""
        slope = (self.max_shift - self.base_shift) / (
            self.max_image_seq_len - self.base_image_seq_len
        )
        return tokens * slope + (self.base_shift - slope * self.base_image_seq_len)

    def sigmas(
        self, steps: int, *, tokens: int | None = None, mu: float | None = None
    ) -> np.ndarray:
        """float32 [steps + 1], from noise down to a final 0: the levels that sampling visits.

        Args:
          steps: model evaluations.
          tokens: noise tokens, for the dynamic shift. mu: that shift itself, instead.

        Raises:
          ValueError: neither or both of tokens and mu with dynamic shifting, one of them without.
        """
        if steps < 1:
            raise ValueError(f"sampling steps: expected 1 or more, found {steps}")
        given = (tokens is not None) + (mu is not None)
        if given != int(self.use_dynamic_shifting):
            raise ValueError(
                "flow schedule: expected "
                + ("tokens or mu" if self.use_dynamic_shifting else "neither tokens nor mu")
                + f" with use_dynamic_shifting={self.use_dynamic_shifting}, found tokens={tokens}, "
                f"mu={mu}"
            )
        if self.spacing == "even":
            levels: np.ndarray = np.linspace(1.0, 1 / steps, steps).astype(np.float32)
        else:
            table = self.training_sigmas()
            count = self.num_train_timesteps
            levels = np.linspace(float(table[0]) * count, float(table[-1]) * count, steps) / count
        if not self.use_dynamic_shifting:
            levels = shift_static(levels, self.shift)
        else:
            shifted = shift_exponential if self.time_shift_type == "exponential" else shift_linear
            levels = shifted(levels, self.mu(tokens) if tokens is not None else mu or 0.0)
        if self.shift_terminal:
            rest = 1 - levels
            levels = 1 - rest / (rest[-1] / (1 - self.shift_terminal))
        return np.append(levels.astype(np.float32), np.float32(0))

    def model_times(self, sigmas: np.ndarray) -> np.ndarray:
        """float32, what a model that takes times in [0, 1] is told at these levels.

        The timestep 1000 sigma, divided by 1000 again as the official pipelines do: equal to sigma
        up to one rounding, which a sinusoid of 1000 sigma shows.
        """
        count = np.float32(self.num_train_timesteps)
        return (sigmas.astype(np.float32) * count) / count


@dataclasses.dataclass(frozen=True)
class FlowTimes:
    """Draws the noise levels of a training batch.

    Attributes:
      density: of the times u.
      schedule: its training table is drawn from, entry floor(u * length) as the official scripts
        do (u = 0 is the noisiest). None: sigma = u itself, continuous.
      shift: further static shift of a continuous sigma; 1 for none.
    """

    density: Density = Density()  # noqa: RUF009 - frozen, so one instance serves all
    schedule: FlowSchedule | None = FlowSchedule()
    shift: float = 1.0

    def __post_init__(self) -> None:
        if self.schedule is not None and self.shift != 1.0:
            raise ValueError(
                f"flow times: shift {self.shift} is for continuous times; a table has its own, set "
                "schedule.shift"
            )

    def draw(self, rng: Array, batch: int) -> tuple[Array, Array]:
        """(sigma, time for the model), both float32 [batch]."""
        return self.at(self.density.sample(rng, (batch,)))

    def at(self, u: Array) -> tuple[Array, Array]:
        """The same for given times u in [0, 1] (float32 [B]).

        u = 1, which a sigmoid can round to, takes the last entry; the official scripts fail there.
        """
        if self.schedule is None:
            sigma = shift_static(u, self.shift)
            return sigma, sigma
        table = self.schedule.training_sigmas()
        index = jnp.minimum((u * len(table)).astype(jnp.int32), len(table) - 1)
        times = self.schedule.model_times(table)
        return jnp.asarray(table)[index], jnp.asarray(times)[index]
