"""RefTON's sampler, the official `FluxKontextPipelineI2I.__call__`, and its position ids."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxmods.backbones.flux import pack, unpack
from jaxmods.system import Params
from jaxmods.systems.flux.sample import Sampling
from jaxmods.systems.refton.layout import ALWAYS, OPTIONAL, condition_ids
from jaxmods.systems.refton.system import RefTon
from tests.parity.refton_system import NAMES, channels_first, channels_last, params, system, tight
from tests.parity.registry import Case, Kind, Tolerance, assert_close

SAMPLE = Kind(
    "refton",
    "sample",
    lambda case: {"in.noise", "out.velocity", "out.latents", "out.image"} <= set(case.shapes),
)
IDS = Kind(
    "refton",
    "positions",
    lambda case: bool(case.shapes) and set(case.meta.get("cases", ())) == set(case.shapes),
)


@IDS.check
def same_positions(case: Case) -> None:
    """Labels and rescaled rows and columns, for whole and broken scales."""
    for name, grid in case.meta["cases"].items():
        scale = {"int": int, "float": float}[grid["scale_type"]](grid["scale"])
        found = condition_ids(grid["grid_h"], grid["grid_w"], grid["label"], scale)
        assert_close(name, found, case.io[name], case.tolerance())


def setting(case: Case) -> tuple[RefTon, dict[str, jax.Array], jax.Array]:
    """The system, its pictures by name of a condition, and the noise."""
    pictures = {
        NAMES[key.removeprefix("in.")]: channels_last(case.io[key])
        for key in case.shapes
        if key.removeprefix("in.") in NAMES
    }
    official = {NAMES[key]: tuple(value) for key, value in case.meta["key_to_index_scale"].items()}
    optional = tuple(name for name in OPTIONAL if name in pictures)
    scale = official["reference"][1] if "reference" in official else None
    model = system(
        case,
        optional=optional,
        sampling=Sampling(case.meta["num_inference_steps"], case.meta["guidance_scale"]),
        reference_scale=scale,
    )
    return model, pictures, channels_last(case.io["in.noise"])


@functools.lru_cache(maxsize=2)
def run(case: Case) -> dict[str, jax.Array]:
    """The whole sampling, and the velocities at the recorded latents."""
    model, pictures, noise = setting(case)
    rows, columns = noise.shape[1:3]
    before = np.concatenate([np.asarray(pack(noise))[None], case.io["out.latents"][:-1]])
    times = case.io["mid.timesteps"] / model.base.schedule.num_train_timesteps

    @jax.jit
    def all_of_it(tree: Params) -> dict[str, jax.Array]:
        latents, trace = model.denoise(tree, pictures, noise, trace=True)
        conditions = model.conditions_of(tree, pictures)

        def velocity(at: tuple[jax.Array, jax.Array]) -> jax.Array:
            x = unpack(at[0], rows, columns)
            time = jnp.full((x.shape[0],), at[1])
            guidance = model.sampling.guidance
            return pack(model.velocity(tree, x, conditions, model.prompt(tree), time, guidance))

        return {
            "conditions": jnp.concatenate([pack(x) for _, x in conditions], axis=1),
            "trace": trace,
            "last": pack(latents),
            "velocity": jax.lax.map(velocity, (jnp.asarray(before), jnp.asarray(times))),
            "decoded": model.base.decode(tree, latents),
            "image": model.decode(tree, latents),
        }

    return all_of_it(params(case, model))


@SAMPLE.check
def conditions_and_positions(case: Case) -> None:
    """Packed latents of all conditions in their order, and where they stand."""
    model, pictures, _ = setting(case)
    official = {NAMES[k]: tuple(v) for k, v in case.meta["key_to_index_scale"].items()}
    known = [c for c in (*ALWAYS, *OPTIONAL.values()) if c.name in pictures]
    assert [c.label for c in known] == [official[c.name][0] for c in known]
    rows = {
        c.name: [n // (2 * model.base.vae.factor) for n in pictures[c.name].shape[1:3]]
        for c in known
    }
    ids = [condition_ids(*rows[c.name], c.label, official[c.name][1]) for c in known]
    assert_close("positions", np.concatenate(ids), case.io["mid.cond_ids"], Tolerance())
    packed = run(case)["conditions"]
    assert_close("packed", packed, case.io["mid.cond_latents_packed"], tight(case, "latents"))


@SAMPLE.check
def levels(case: Case) -> None:
    """Noise levels, shifted by the number of noise tokens, and what the network is told."""
    model, _, noise = setting(case)
    schedule = model.base.schedule
    count = noise.shape[1] * noise.shape[2] // 4
    sigmas = schedule.sigmas(model.sampling.steps, tokens=count)
    # Levels lie in 0..1, where two neighbours in float32 are up to 6e-8 apart.
    assert_close("sigmas", sigmas, case.io["mid.sigmas"], Tolerance(atol=1e-7))
    times = schedule.model_times(sigmas[:-1]) * schedule.num_train_timesteps
    assert_close("timesteps", times, case.io["mid.timesteps"], Tolerance(rtol=2e-7))


@SAMPLE.check
def trajectory(case: Case) -> None:
    """Latents after every step, velocities at the recorded latents, and the picture."""
    found = run(case)
    assert_close("latents", found["trace"], case.io["out.latents"], tight(case, "latents"))
    assert_close("last", found["last"], case.io["out.latents"][-1], tight(case, "latents"))
    assert_close("velocity", found["velocity"], case.io["out.velocity"], tight(case, "velocity"))
    picture = tight(case, "image")
    # The decoder's own output has twice the picture's range.
    twice = dataclasses.replace(picture, atol=2 * picture.atol)
    decoded = channels_first(found["decoded"])
    assert_close("decoded", decoded, case.io["out.decoded_unclamped"], twice)
    assert_close("image", channels_first(found["image"]), case.io["out.image"], picture)
