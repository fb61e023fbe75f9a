"""Noise levels, weights, the sampling loop and guidance, against formulas."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmods import diffusion
from jaxmods.diffusion import At, Density, FlowSchedule, FlowTimes
from jaxmods.diffusion.densities import cosmap, mode

DRAWS = 200_000
ERROR = 4 * 0.5 / DRAWS**0.5  # 4 standard errors of a fraction


def fractions(density: Density, edges: np.ndarray) -> np.ndarray:
    """Empirical distribution function at `edges`."""
    times = np.asarray(jax.jit(lambda k: density.sample(k, (DRAWS,)))(jax.random.key(0)))
    assert times.dtype == np.float32
    assert times.min() >= density.low
    assert times.max() <= density.high
    return np.searchsorted(np.sort(times), edges, side="right") / DRAWS


def phi(z: np.ndarray) -> np.ndarray:
    return np.asarray(jax.scipy.stats.norm.cdf(z))


@pytest.mark.parametrize(
    ("density", "cdf"),
    [
        (Density(), lambda u: u),
        (Density("logit_normal"), lambda u: phi(np.log(u / (1 - u)))),
        (
            Density("logit_normal", mean=0.5, std=0.6),
            lambda u: phi((np.log(u / (1 - u)) - 0.5) / 0.6),
        ),
        (
            Density("logit_normal", low=0.2, high=0.7),
            lambda u: np.clip(
                (phi(np.log(u / (1 - u))) - phi(np.log(0.25)))
                / (phi(np.log(0.7 / 0.3)) - phi(np.log(0.25))),
                0,
                1,
            ),
        ),
        # integral of 2 / (pi (1 - 2u + 2u^2))
        (Density("cosmap"), lambda u: 0.5 + 2 / np.pi * np.arctan(2 * u - 1)),
    ],
    ids=["uniform", "logit_normal", "logit_normal_moved", "logit_normal_cut", "cosmap"],
)
def test_densities_are_distributed_as_they_say(
    density: Density, cdf: Callable[[np.ndarray], np.ndarray]
) -> None:
    edges = np.linspace(0.05, 0.95, 19)
    np.testing.assert_allclose(fractions(density, edges), cdf(edges), atol=ERROR)


def test_mode_inverts_as_published() -> None:
    """f(u) = 1 - u - s (cos^2(pi u / 2) - 1 + u) is monotone, so P(t <= f(u)) = P(U >= u)."""
    u = np.linspace(0.05, 0.95, 19)
    for scale in (1.29, 0.0, -0.5):
        density = Density("mode", mode_scale=scale)
        values = 1 - u - scale * (np.cos(np.pi * u / 2) ** 2 - 1 + u)
        np.testing.assert_allclose(fractions(density, values), 1 - u, atol=ERROR)
        np.testing.assert_allclose(mode(jnp.asarray(u), scale), values, atol=1e-6)


def test_cosmap_density_is_cosmap_weight() -> None:
    """E over uniform of w(u) f(u) is E over the density of f."""
    u = (np.arange(20000) + 0.5) / 20000
    weight = np.asarray(diffusion.loss_weight("cosmap", jnp.asarray(u, jnp.float32)))
    drawn = np.asarray(cosmap(jnp.asarray(u, jnp.float32)))
    for f in (lambda t: t**2, np.sin):
        assert np.mean(weight * f(u)) == pytest.approx(np.mean(f(drawn)), abs=1e-4)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Density("normal"), "expected one of"),
        (lambda: Density("logit_normal", std=0.0), "std: expected a positive"),
        (lambda: Density("mode", mode_scale=2.0), "times would leave"),
        (lambda: Density(low=0.1), "low and high are for logit_normal"),
        (lambda: Density("logit_normal", low=0.5, high=0.5), "expected 0 <= low < high <= 1"),
        (lambda: diffusion.loss_weight("snr", jnp.ones(1)), "expected 'none', 'sigma_sqrt'"),
        (lambda: diffusion.scheme("snr"), "weighting scheme: expected"),
        (lambda: FlowSchedule(time_shift_type="cubic"), "'exponential' or 'linear'"),
        (lambda: FlowSchedule(spacing="odd"), "'even' or 'table'"),
        (lambda: FlowSchedule().sigmas(0, mu=1.0), "steps: expected 1 or more"),
        (lambda: FlowSchedule().sigmas(4), "expected tokens or mu"),
        (lambda: FlowSchedule().sigmas(4, tokens=1, mu=1.0), "expected tokens or mu"),
        (
            lambda: FlowSchedule(use_dynamic_shifting=False).sigmas(4, mu=1.0),
            "expected neither tokens nor mu",
        ),
        (
            lambda: FlowSchedule.from_hub_config({"use_karras_sigmas": True}),
            "use_karras_sigmas is set, which is not supported",
        ),
        (
            lambda: FlowSchedule.from_hub_config({"_class_name": "DDIMScheduler"}),
            "expected FlowMatchEulerDiscreteScheduler, found DDIMScheduler",
        ),
        (lambda: FlowTimes(shift=3.0), "is for continuous times"),
        (lambda: diffusion.euler(np.ones(3), np.ones(3)), r"found shapes \[3\] and \[3\]"),
        (lambda: diffusion.euler(np.ones(1)), "expected sigmas"),
    ],
)
def test_bad_settings_are_refused(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_schemes_of_the_official_scripts() -> None:
    assert diffusion.scheme("none") == (Density(), "none")
    assert diffusion.scheme("logit_normal") == (Density("logit_normal"), "none")
    assert diffusion.scheme("mode") == (Density("mode"), "none")
    assert diffusion.scheme("sigma_sqrt") == (Density(), "sigma_sqrt")
    assert diffusion.scheme("cosmap") == (Density(), "cosmap")


def test_flow_is_a_straight_line() -> None:
    rng = np.random.default_rng(0)
    clean, noise = (rng.normal(size=(3, 2, 5)).astype(np.float32) for _ in range(2))
    sigma = jnp.asarray([0.0, 0.25, 1.0])
    noisy = diffusion.add_noise(jnp.asarray(clean), jnp.asarray(noise), sigma)
    np.testing.assert_allclose(noisy[1], 0.75 * clean[1] + 0.25 * noise[1], rtol=1e-6)
    np.testing.assert_array_equal(noisy[0], clean[0])
    np.testing.assert_array_equal(noisy[2], noise[2])
    v = diffusion.velocity(jnp.asarray(clean), jnp.asarray(noise))
    np.testing.assert_allclose(diffusion.clean_from(noisy, v, sigma), clean, atol=1e-6)
    half = diffusion.add_noise(jnp.asarray(clean, jnp.bfloat16), jnp.asarray(noise), sigma)
    assert half.dtype == jnp.bfloat16

    weight = jnp.asarray([1.0, 0.0, 3.0])
    errors = np.mean(np.square(noise - clean), axis=(1, 2))
    loss = diffusion.velocity_loss(v, jnp.zeros_like(v), weight)
    assert float(loss) == pytest.approx((errors[0] + 3 * errors[2]) / 3, rel=1e-6)
    assert float(diffusion.velocity_loss(v, jnp.zeros_like(v))) == pytest.approx(
        errors.mean(), rel=1e-6
    )


def test_training_levels_are_entries_of_the_table() -> None:
    """Entry floor(1000 u), noise first; u = 1 takes the last one."""
    times = FlowTimes()
    sigma, time = times.at(jnp.asarray([0.0, 0.0009, 0.001, 0.5, 0.9999, 1.0], jnp.float32))
    np.testing.assert_allclose(sigma, [1.0, 1.0, 0.999, 0.5, 0.001, 0.001], rtol=1e-6)
    np.testing.assert_allclose(time, sigma, rtol=1e-6)
    shifted = FlowTimes(schedule=FlowSchedule(use_dynamic_shifting=False, shift=3.0))
    np.testing.assert_allclose(shifted.at(jnp.asarray([0.5]))[0], [0.75], rtol=1e-6)

    direct = FlowTimes(Density("logit_normal"), None, shift=2.0)
    np.testing.assert_allclose(direct.at(jnp.asarray([0.5]))[0], [2 / 3], rtol=1e-6)
    drawn = jax.jit(direct.draw, static_argnums=1)(jax.random.key(0), 50)
    assert drawn[0].shape == (50,)
    assert len(np.unique(drawn[0])) == 50


def test_euler_follows_a_straight_flow_exactly() -> None:
    """The velocity of a straight line leads to its end in any number of steps; the loop tells the
    model its time and number, and compiles once."""
    schedule = FlowSchedule()
    clean, noise = jnp.full((2, 3), 2.0), jnp.full((2, 3), -1.0)
    traces = 0

    @jax.jit
    def run(noise: jax.Array) -> Any:
        nonlocal traces
        traces += 1
        sigmas = schedule.sigmas(5, tokens=768)
        solver = diffusion.euler(sigmas, schedule.model_times(sigmas[:-1]))
        return diffusion.sample(lambda x, at: noise - clean, noise, solver, trace=True)

    final, path = run(noise)
    run(noise + 1)
    assert traces == 1
    np.testing.assert_allclose(final, clean, rtol=1e-6)
    sigmas = schedule.sigmas(5, tokens=768)[1:]
    np.testing.assert_allclose(path[:, 0, 0], 2.0 - 3.0 * sigmas, rtol=1e-5)
    np.testing.assert_array_equal(path[-1], final)


def test_the_loop_and_single_steps_agree() -> None:
    """Also with a hook that puts a known region back, and with noise of its own at each step."""
    known = jnp.asarray([5.0, 0.0, 0.0])

    def model(x: jax.Array, at: At) -> jax.Array:
        return jnp.sin(x) * at.time + at.step

    def before(x: jax.Array, at: At) -> jax.Array:
        return x.at[:, 0].set(known[0] * at.time)

    tables = diffusion.euler(np.linspace(1, 0, 5))
    for solver in (tables, dataclasses.replace(tables, noise=np.full(4, 0.1, np.float32))):
        start, rng = jnp.ones((2, 3)), jax.random.key(7)
        options: dict[str, Any] = {"rng": rng, "before": before}
        looped = diffusion.sample(model, start, solver, **options)
        carry = solver.start(start)
        for index in range(4):
            carry = diffusion.step(model, solver, carry, jnp.asarray(index), **options)
        np.testing.assert_allclose(looped, solver.sample_of(carry), rtol=1e-6)
    with pytest.raises(ValueError, match="this solver adds noise, expected a key"):
        diffusion.sample(model, start, solver)


def test_samples_keep_their_dtype_between_steps() -> None:
    """The update is float32; what is carried is rounded to the sample's dtype after each step."""
    solver = diffusion.euler(np.linspace(1, 0, 4))
    start = jnp.asarray([[0.1, 1.7]], jnp.bfloat16)
    final = diffusion.sample(lambda x, at: x * jnp.bfloat16(0.3), start, solver)
    x = start
    for move in solver.move:
        wide = x.astype(jnp.float32) + move * (x * jnp.bfloat16(0.3)).astype(jnp.float32)
        x = wide.astype(jnp.bfloat16)
    assert final.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(final, np.float32), np.asarray(x, np.float32))


def test_solvers_may_carry_more_than_the_sample() -> None:
    """A two-step solver (Adams-Bashforth) fits the same loop; `before` is refused there."""

    class TwoStep:
        times = np.linspace(1, 0.1, 10, dtype=np.float32)

        def start(self, x: jax.Array) -> Any:
            return x, jnp.zeros_like(x)

        def advance(self, carry: Any, prediction: Any, index: Any, rng: Any) -> Any:
            x, last = carry
            last = jnp.where(index == 0, prediction, last)
            return x - 0.1 * (1.5 * prediction - 0.5 * last), prediction

        def sample_of(self, carry: Any) -> jax.Array:
            return carry[0]

    # dx/dt = t from 1 to 0 takes 1/2 away; the method is exact for it but for the first step,
    # which takes 0.1 * 1 instead of 0.095.
    model = lambda x, at: jnp.full_like(x, at.time)  # noqa: E731 - one use
    final = diffusion.sample(model, jnp.ones(2), TwoStep())
    np.testing.assert_allclose(final, 0.5 - 0.005, atol=1e-5)
    with pytest.raises(ValueError, match="this solver carries tuple"):
        diffusion.sample(model, jnp.ones(2), TwoStep(), before=lambda x, at: x)


def test_guidance_combines_predictions() -> None:
    condition = {"text": jnp.asarray([[3.0], [4.0]])}
    negative = {"text": jnp.asarray([[1.0], [1.5]])}
    calls = []

    def model(x: jax.Array, at: At, given: Any) -> jax.Array:
        calls.append(x.shape)
        return x * given["text"]

    x, at = jnp.asarray([[1.0, 2.0], [1.0, 1.0]]), At(jnp.asarray(0.5), jnp.asarray(1))
    expected = x * jnp.asarray([[1.0 + 3 * 2.0], [1.5 + 3 * 2.5]])
    for together in (True, False):
        guided = diffusion.classifier_free(model, condition, negative, 3.0, together=together)
        np.testing.assert_allclose(guided(x, at), expected, rtol=1e-6)
    assert calls == [(4, 2), (2, 2), (2, 2)]
    by_step = diffusion.classifier_free(model, condition, negative, np.asarray([9.0, 3.0]))
    np.testing.assert_allclose(by_step(x, at), expected, rtol=1e-6)
    alone = diffusion.classifier_free(model, condition, negative, 1.0)
    np.testing.assert_allclose(alone(x, at), x * condition["text"], rtol=1e-6)

    shorter = {"text": negative["text"][:1]}
    with pytest.raises(ValueError, match="of equal shapes"):
        diffusion.classifier_free(model, condition, shorter, 3.0)(x, at)
    with pytest.raises(ValueError, match=r"a number or one per step, found shape \[1, 1\]"):
        diffusion.classifier_free(model, condition, negative, np.ones((1, 1)))(x, at)


def test_distilled_guidance_is_an_input() -> None:
    seen = diffusion.distilled(lambda x, at, guidance: x + guidance[:, None], 3.5)
    out = seen(jnp.zeros((2, 3)), At(jnp.asarray(1.0), jnp.asarray(0)))
    np.testing.assert_array_equal(out, 3.5)
