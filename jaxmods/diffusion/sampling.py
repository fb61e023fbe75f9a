"""From noise to data: one loop for all solvers.

    solver = euler(schedule.sigmas(28, tokens=4096), times)     # tables, made on the host
    latents = sample(model, noise, solver)                      # under jit; one compilation a shape

A *model* is `(x, at) -> prediction` with everything else (weights, conditions, guidance) closed
over; `at` says the time that the network is told and the number of the step. A *solver* turns
predictions into samples: constant tables, and a carry that travels through the loop (the sample,
for multi-step solvers earlier predictions too). What the prediction means (velocity, noise, v) is
the solver's business alone, so DDPM, DDIM, v-prediction and multi-step solvers stand beside Euler.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxmods.system import Array


class At(NamedTuple):
    """Where in the loop a model is asked.

    Attributes:
      time: float32 scalar, what the network is told.
      step: int32 scalar, number of the step from 0.
    """

    time: Array
    step: Array


Model = Callable[[Array, At], Array]
Carry = Any


class Solver(Protocol):
    """Constant tables and two pure functions.

    `times` is float32 [steps]. `start(x)` makes the carry from the initial sample. `advance(carry,
    prediction, index, rng)` is the carry after step `index`; `sample_of(carry)` the sample in it.
    """

    @property
    def times(self) -> np.ndarray: ...

    def start(self, x: Array) -> Carry: ...

    def advance(
        self, carry: Carry, prediction: Array, index: Array, rng: Array | None
    ) -> Carry: ...

    def sample_of(self, carry: Carry) -> Array: ...


@dataclasses.dataclass(frozen=True, eq=False)
class OneStep:
    """Solvers whose next sample is a combination of the sample, the prediction, and fresh noise.

        x <- keep x + move prediction + noise eps

    Euler on a flow, and unclipped DDPM, DDIM and ancestral steps for any kind of prediction, are
    tables of this kind. The sum is in float32 and rounded to the dtype of the sample.

    Attributes:
      times, keep, move: float32 [steps]. noise: the same, or None for a deterministic solver.
    """

    times: np.ndarray
    keep: np.ndarray
    move: np.ndarray
    noise: np.ndarray | None = None

    def start(self, x: Array) -> Array:
        """The sample itself."""
        return x

    def advance(self, carry: Array, prediction: Array, index: Array, rng: Array | None) -> Array:
        """One step.

        Raises:
          ValueError: a stochastic solver without a key.
        """
        keep, move = jnp.asarray(self.keep)[index], jnp.asarray(self.move)[index]
        x = keep * carry.astype(jnp.float32) + move * prediction.astype(jnp.float32)
        if self.noise is not None:
            if rng is None:
                raise ValueError("sampling: this solver adds noise, expected a key, found none")
            fresh = jax.random.normal(rng, carry.shape, jnp.float32)
            x = x + jnp.asarray(self.noise)[index] * fresh
        return x.astype(carry.dtype)

    def sample_of(self, carry: Array) -> Array:
        """The sample itself."""
        return carry


def euler(sigmas: np.ndarray, times: np.ndarray | None = None) -> OneStep:
    """Euler's method on a flow, x <- x + (sigma_{k+1} - sigma_k) v.

    Args:
      sigmas: float32 [steps + 1], from noise to data, as from `FlowSchedule.sigmas`.
      times: float32 [steps], what the model is told; None for the sigmas.

    Raises:
      ValueError: lengths that do not fit.
    """
    sigmas = np.asarray(sigmas, np.float32)
    times = sigmas[:-1] if times is None else np.asarray(times, np.float32)
    if sigmas.ndim != 1 or len(sigmas) < 2 or times.shape != (len(sigmas) - 1,):
        raise ValueError(
            "euler: expected sigmas [steps + 1] and times [steps], found shapes "
            f"{list(sigmas.shape)} and {list(times.shape)}"
        )
    return OneStep(times, np.ones_like(times), np.diff(sigmas))


def step(
    model: Model,
    solver: Solver,
    carry: Carry,
    index: Array,
    *,
    rng: Array | None = None,
    before: Callable[[Array, At], Array] | None = None,
) -> Carry:
    """The carry after one step: what `sample` loops over.

    Jitted by itself and called in a Python loop, with `index` traced, it serves where somebody
    watches every step.

    Args:
      rng: key of the whole sampling; the step folds its number in.
      before: changes the sample before the model sees it (known regions put back, say); given the
        sample and where we are. Only for solvers whose carry is the sample.

    Raises:
      ValueError: `before` with a solver whose carry holds more.
    """
    at = At(jnp.asarray(solver.times, jnp.float32)[index], jnp.asarray(index, jnp.int32))
    if before is not None:
        if not isinstance(carry, jax.Array):
            raise ValueError(
                "sampling: `before` changes the sample alone, but this solver carries "
                f"{type(carry).__name__}; put the change into the model"
            )
        carry = before(carry, at)
    prediction = model(solver.sample_of(carry), at)
    key = None if rng is None else jax.random.fold_in(rng, at.step)
    return solver.advance(carry, prediction, at.step, key)


def sample(
    model: Model,
    x: Array,
    solver: Solver,
    *,
    rng: Array | None = None,
    before: Callable[[Array, At], Array] | None = None,
    trace: bool = False,
) -> Any:
    """Samples from noise, as one compiled loop over a fixed number of steps.

    Args:
      model: `(x, at) -> prediction` in the shape of x.
      x: initial noise, at the first level; its dtype is kept from step to step.
      solver: tables and update.
      rng: key, for solvers that add noise.
      before: see `step`.
      trace: return the samples after every step as well.

    Returns:
      The final sample; with `trace` also an array [steps, ...] of all of them.
    """

    def body(carry: Carry, index: Array) -> tuple[Carry, Array | None]:
        carry = step(model, solver, carry, index, rng=rng, before=before)
        return carry, solver.sample_of(carry) if trace else None

    indices = jnp.arange(len(solver.times), dtype=jnp.int32)
    carry, samples = jax.lax.scan(body, solver.start(x), indices)
    return (solver.sample_of(carry), samples) if trace else solver.sample_of(carry)
