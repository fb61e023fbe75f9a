"""Noise levels, weights and trajectories against diffusers, live."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmods import diffusion
from jaxmods.diffusion import FlowSchedule, FlowTimes
from jaxmods.diffusion.densities import logit_normal, mode

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
training_utils = pytest.importorskip("diffusers.training_utils")

Scheduler = diffusers.FlowMatchEulerDiscreteScheduler
ULP = 2.0**-23  # relative spacing of float32

FLUX = {
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
SCHNELL = {**FLUX, "shift": 1.0, "use_dynamic_shifting": False}
SD3 = {"shift": 3.0, "use_dynamic_shifting": False}
LINEAR = {**FLUX, "time_shift_type": "linear"}
LTX = {**FLUX, "max_shift": 2.05, "base_shift": 0.95, "shift_terminal": 0.1}


@pytest.mark.parametrize("config", [FLUX, SCHNELL, SD3], ids=["flux", "schnell", "sd3"])
def test_training_table(config: dict[str, Any]) -> None:
    theirs = Scheduler(**config)
    ours = FlowSchedule.from_hub_config(config)
    table = ours.training_sigmas()
    np.testing.assert_allclose(table, theirs.sigmas.numpy(), rtol=ULP)
    # What the official training hands to the model: timestep / 1000.
    np.testing.assert_allclose(ours.model_times(table), (theirs.timesteps / 1000).numpy(), rtol=ULP)


@pytest.mark.parametrize("steps", [1, 4, 28, 50])
@pytest.mark.parametrize("tokens", [256, 768, 3072, 4096, 9000])
@pytest.mark.parametrize("config", [FLUX, LINEAR, LTX], ids=["flux", "linear", "terminal"])
def test_sampling_levels_with_dynamic_shift(
    config: dict[str, Any], tokens: int, steps: int
) -> None:
    if steps == 1 and "shift_terminal" in config:
        steps = 2  # one level cannot be both ends
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    theirs = Scheduler(**config)
    mu = calculate_shift(
        tokens,
        config["base_image_seq_len"],
        config["max_image_seq_len"],
        config["base_shift"],
        config["max_shift"],
    )
    theirs.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    ours = FlowSchedule.from_hub_config(config)
    assert ours.mu(tokens) == mu
    sigmas = ours.sigmas(steps, tokens=tokens)
    np.testing.assert_array_equal(sigmas, theirs.sigmas.numpy())
    np.testing.assert_array_equal(sigmas, ours.sigmas(steps, mu=mu))
    times = ours.model_times(sigmas[:-1])
    np.testing.assert_array_equal(times, (theirs.timesteps / 1000).numpy())


@pytest.mark.parametrize("config", [SCHNELL, SD3], ids=["schnell", "sd3"])
def test_sampling_levels_with_static_shift(config: dict[str, Any]) -> None:
    theirs = Scheduler(**config)
    for steps in (2, 4, 28):
        theirs.set_timesteps(steps)
        ours = FlowSchedule.from_hub_config(config, spacing="table")
        np.testing.assert_allclose(ours.sigmas(steps), theirs.sigmas.numpy(), rtol=ULP)
        theirs.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps))
        even = FlowSchedule.from_hub_config(config)
        np.testing.assert_allclose(even.sigmas(steps), theirs.sigmas.numpy(), rtol=ULP)


@pytest.mark.parametrize("name", ["none", "sigma_sqrt", "cosmap", "logit_normal", "mode"])
def test_draws_and_weights_of_the_training_script(name: str) -> None:
    """From the same random numbers: times, entries of the table, and weights."""
    options = {"logit_mean": 0.3, "logit_std": 0.8, "mode_scale": 1.29}

    def generator() -> Any:
        return torch.Generator().manual_seed(0)

    u = training_utils.compute_density_for_timestep_sampling(
        name, 5000, **options, generator=generator()
    )
    if name == "logit_normal":
        normal = torch.normal(mean=0.0, std=1.0, size=(5000,), generator=generator())
        ours = logit_normal(jnp.asarray(normal.numpy()), 0.3, 0.8)
    else:
        uniform = jnp.asarray(torch.rand(size=(5000,), generator=generator()).numpy())
        ours = mode(uniform, 1.29) if name == "mode" else uniform
    # One function (cosine, logistic) and two or three operations, each rounded on both sides.
    np.testing.assert_allclose(ours, u.numpy(), rtol=4 * ULP, atol=4 * ULP)

    theirs = Scheduler(**FLUX)
    index = (u * 1000).long().clamp(max=999)
    timesteps = theirs.timesteps[index]
    # `get_sigmas` of the official scripts looks the level up again by its timestep.
    found = [int((theirs.timesteps == t).nonzero()) for t in timesteps]
    sigma, time = FlowTimes().at(jnp.asarray(u.numpy()))
    np.testing.assert_array_equal(sigma, theirs.sigmas[found].numpy())
    np.testing.assert_array_equal(time, (timesteps / 1000).numpy())

    weights = training_utils.compute_loss_weighting_for_sd3(name, theirs.sigmas[found])
    _, weighting = diffusion.scheme(name)
    np.testing.assert_allclose(
        diffusion.loss_weight(weighting, sigma), weights.numpy(), rtol=8 * ULP
    )


def test_noising_is_the_scheduler_s() -> None:
    theirs = Scheduler(**FLUX)
    generator = torch.Generator().manual_seed(1)
    clean, noise = (torch.randn((6, 4, 3), generator=generator) for _ in range(2))
    index = torch.tensor([0, 1, 300, 500, 998, 999])
    expected = theirs.scale_noise(clean, theirs.timesteps[index], noise)
    ours = diffusion.add_noise(
        jnp.asarray(clean.numpy()),
        jnp.asarray(noise.numpy()),
        jnp.asarray(FlowSchedule().training_sigmas())[index.numpy()],
    )
    # Two products and a sum, each rounded on both sides.
    np.testing.assert_allclose(ours, expected.numpy(), atol=4 * ULP)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_trajectory(dtype: str) -> None:
    """A small network sampled by both: every state of 12 steps, FLUX's schedule at 768 tokens.

    In bf16 both round after each step; a product that rounds to another neighbour shows as one
    bf16 step (2^-8), and travels on."""
    rng = np.random.default_rng(0)
    first, second = (rng.normal(size=(6, 6)).astype(np.float32) / 2 for _ in range(2))
    noise = rng.normal(size=(2, 5, 6)).astype(np.float32)

    theirs = Scheduler(**FLUX)
    schedule = FlowSchedule()
    theirs.set_timesteps(sigmas=np.linspace(1.0, 1 / 12, 12), mu=schedule.mu(768))
    kind = getattr(torch, dtype)
    x = torch.tensor(noise).to(kind)
    weights = [torch.tensor(w).to(kind) for w in (first, second)]
    expected = []
    for t in theirs.timesteps:
        v = torch.tanh(x @ weights[0] + (t / 1000).to(kind)) @ weights[1]
        x = theirs.step(v, t, x, return_dict=False)[0]
        expected.append(x.float().numpy())

    a, b = jnp.asarray(first, dtype), jnp.asarray(second, dtype)

    @jax.jit
    def ours(noise: jax.Array) -> Any:
        sigmas = schedule.sigmas(12, tokens=768)
        solver = diffusion.euler(sigmas, schedule.model_times(sigmas[:-1]))

        def model(x: jax.Array, at: diffusion.At) -> jax.Array:
            return jnp.tanh(x @ a + at.time.astype(x.dtype)) @ b

        return diffusion.sample(model, noise, solver, trace=True)

    final, path = ours(jnp.asarray(noise, dtype))
    assert final.dtype == jnp.dtype(dtype)
    tolerance = 1e-5 if dtype == "float32" else 3 * 2.0**-8
    scale = np.abs(expected).max()
    np.testing.assert_allclose(
        np.asarray(path, np.float32), np.stack(expected), atol=tolerance * scale
    )
