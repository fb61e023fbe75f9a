"""RefTON's training step: the official `process_latent_cond` and the body of the loop."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.tryon.draws import Probabilities, draw_conditions
from jaxmods.backbones.flux import FluxTransformer, Tokens, text_ids, unpack
from jaxmods.backbones.flux.blocks import Shared
from jaxmods.diffusion import FlowTimes, add_noise, loss_weight, velocity
from jaxmods.nn import lora
from jaxmods.nn.positions import sinusoid
from jaxmods.nn.stack import Execution
from jaxmods.system import Params
from jaxmods.systems.flux.objective import Draws
from jaxmods.systems.refton.layout import OPTIONAL, tokens
from jaxmods.systems.refton.system import RefTon
from jaxmods.weights import WeightMap, export_tensors
from tests.parity.refton_system import (
    NAMES,
    channels_first,
    channels_last,
    params,
    system,
    tight,
)
from tests.parity.registry import Case, Kind, Tolerance, assert_close
from train.experiment import Optim
from train.optim import make_groups, make_optimizer

STEP = Kind(
    "refton",
    "train",
    lambda case: {"rand.noise", "rand.u", "loss.total", "in.pixel_values"} <= set(case.shapes),
)

_OFFICIAL = {name: key for key, name in NAMES.items()}


def conditions(case: Case) -> tuple[bool, tuple[str, ...]]:
    """Whether the subject is the person, and the optional conditions, from the recorded draws."""
    share = case.meta["dropout_reference"]
    numbers = [*case.io["rand.person_draw"], *case.io["rand.include_draws"]]
    drawn = draw_conditions(
        [float(n) for n in numbers], Probabilities(case.meta["person_prob"], share, share, share)
    )
    there = [n for n in OPTIONAL if f"in.{_OFFICIAL[n]}" in case.shapes and getattr(drawn, n)]
    return drawn.person, tuple(there)


def batch_of(case: Case) -> tuple[RefTon, dict[str, jax.Array]]:
    """The system and its batch: optional conditions that were not drawn are hidden."""
    person, used = conditions(case)
    present = tuple(n for n in OPTIONAL if f"in.{_OFFICIAL[n]}" in case.shapes)
    model = system(
        case,
        optional=present,
        guidance=case.meta["guidance_scale"],
        weighting_scheme=case.meta["weighting_scheme"],
    )
    subject = "person" if person else "agnostic"
    arrays = {
        "target": case.io["in.pixel_values"],
        "subject": case.io[f"in.cond_pixel_values_{subject}"],
        "garment": case.io["in.cond_pixel_values_cloth"],
        **{name: case.io[f"in.{_OFFICIAL[name]}"] for name in present},
    }
    batch: dict[str, Any] = {name: channels_last(a) for name, a in arrays.items()}
    rows = case.meta["batch"]
    batch |= {f"use_{name}": jnp.full((rows,), name in used) for name in present}
    return model, batch


def draws_of(case: Case) -> Draws:
    return Draws(channels_last(case.io["rand.noise"]), jnp.asarray(case.io["rand.u"]))


@functools.lru_cache(maxsize=4)
def gradients(case: Case) -> tuple[float, Params]:
    """Loss, and gradients of the adapters."""
    model, batch = batch_of(case)

    @jax.jit
    def run(tree: Params) -> tuple[jax.Array, Params]:
        def value(adapters: Params) -> jax.Array:
            return model.objective({**tree, "lora": adapters}, batch, draws_of(case))[0]

        return jax.value_and_grad(value)(tree["lora"])

    loss, grads = run(params(case, model))
    return float(loss), grads


@functools.lru_cache(maxsize=4)
def forward(case: Case) -> dict[str, jax.Array]:
    """What the reference recorded on the way, under our names, from the parts of the model.

    Conditions that were not drawn are left out here, where `gradients` hides them.
    """
    model, batch = batch_of(case)
    _, used = conditions(case)
    positions: list[np.ndarray] = []

    @jax.jit
    def run(tree: Params) -> dict[str, jax.Array]:
        latents = model.encode_batch(tree, batch)
        sigma, time = FlowTimes(schedule=model.base.schedule).at(draws_of(case).u)
        noisy = add_noise(latents["target"], draws_of(case).noise, sigma)
        image = [tokens(noisy)] + [
            tokens(latents[c.name], c.label, model.cond_scale if c.reduced else 1)
            for c in model.conditions
            if not c.reduced or c.name in used
        ]
        positions[:] = [x.ids for x in image]
        config = model.lora_config
        assert config is not None
        attached = lora.attach(tree["transformer"], tree["lora"], config)
        rows = (case.meta["batch"],)
        states, pooled = (jnp.broadcast_to(x, (*rows, *x.shape[1:])) for x in model.prompt(tree))
        guidance = jnp.full(rows, model.guidance, jnp.float32)
        text = Tokens(states, text_ids(states.shape[1]))
        network = FluxTransformer(model.base.transformer)
        return {
            "latents": latents["target"],
            "sigma": sigma,
            "time": time,
            "guidance": guidance,
            "target": velocity(latents["target"], draws_of(case).noise),
            "packed": jnp.concatenate([x.values for x in image], axis=1),
            **_activations(network, attached, image, text, pooled, time, guidance),
        }

    found = run(params(case, model))
    return {**found, "positions": jnp.asarray(np.concatenate(positions))}


def _activations(
    network: FluxTransformer,
    transformer: Params,
    image: list[Tokens],
    text: Tokens,
    pooled: jax.Array,
    time: jax.Array,
    guidance: jax.Array,
) -> dict[str, jax.Array]:
    """Embeddings, both streams after each block, the output."""

    def method(name: str, *args: Any, tree: Params = transformer, **kwargs: Any) -> Any:
        return network.apply({"params": tree}, *args, method=name, **kwargs)

    def only(kind: str, block: int) -> Params:
        """The same weights with one block of a kind."""
        return {
            **transformer,
            kind: jax.tree.map(lambda x: x[block : block + 1], transformer[kind]),
        }

    shared = Shared(method("time", time, guidance, pooled), method("rope", text, *image))
    streams = {"text": method("embed_text", text), "image": method("embed_image", *image)}
    found = {"x_embedder": streams["image"], "temb": shared.time}
    one = dataclasses.replace(network.config, double_layers=1, single_layers=1)
    network = FluxTransformer(one, Execution(unroll=True))
    for block in range(transformer["double_blocks"]["text"]["attn"]["norm_q"]["scale"].shape[0]):
        streams = method("double", streams, shared, tree=only("double_blocks", block))
        found |= {f"double{block}.{name}": x for name, x in streams.items()}
    joint = jnp.concatenate([streams["text"], streams["image"]], axis=1)
    length = streams["image"].shape[1]
    for block in range(transformer["single_blocks"]["attn"]["norm_q"]["scale"].shape[0]):
        joint = method(
            "single", joint, shared, image_tokens=length, tree=only("single_blocks", block)
        )
        found[f"single{block}.text"] = joint[:, :-length]
        found[f"single{block}.image"] = joint[:, -length:]
    return {**found, "raw": method("head", joint[:, -length:], shared.time)}


def published(adapters: Params, model: RefTon) -> dict[str, np.ndarray]:
    """Adapters (or their gradients) under their official keys."""
    rules = tuple(r for r in model.weights().rules if r.jax_patterns[0].startswith("lora/"))
    tensors = export_tensors({"lora": adapters}, WeightMap(rules))
    return {key: np.asarray(t.all()) for key, t in tensors.items()}


@STEP.check
def draws_select_the_recorded_conditions(case: Case) -> None:
    """The host's draws, from the recorded numbers, choose what the official code chose."""
    person, used = conditions(case)
    assert case.meta["selected"]["base"] == ("person" if person else "agnostic")
    assert case.meta["selected"]["optional"] == [_OFFICIAL[name] for name in used]


@STEP.check
def levels_targets_and_weights(case: Case) -> None:
    """Latents, noise levels, the velocity to learn, and the weights of all schemes."""
    found, allowed = forward(case), tight(case, "forward")
    assert_close("latents", channels_first(found["latents"]), case.io["mid.latents_x0"], allowed)
    # Levels lie in 0..1, where two neighbours in float32 are up to 6e-8 apart.
    assert_close("sigmas", found["sigma"], case.io["mid.sigmas"], Tolerance(atol=1e-7))
    times = found["time"] * 1000
    assert_close("times", times, case.io["mid.timesteps"], Tolerance(rtol=2e-7))
    assert_close("target", channels_first(found["target"]), case.io["mid.target"], allowed)
    for name in (k.removeprefix("weight.") for k in case.shapes if k.startswith("weight.")):
        weight = loss_weight(name, found["sigma"]).reshape(case.shapes[f"weight.{name}"])
        assert_close(f"weight {name}", weight, case.io[f"weight.{name}"], Tolerance(rtol=1e-6))


@STEP.check
def sequence_and_network(case: Case) -> None:
    """Packed tokens, positions, sinusoids, activations of every block, and the velocity."""
    found, allowed = forward(case), tight(case, "forward")
    assert_close("packed", found["packed"], case.io["mid.packed_input"], allowed)
    assert_close("positions", found["positions"], case.io["mid.img_ids"], Tolerance())
    length = case.shapes["in.prompt_embeds"][1]
    assert_close("text positions", text_ids(length), case.io["in.txt_ids"], Tolerance())
    assert_close("guidance", found["guidance"], case.io["in.guidance"], Tolerance())
    for name in ("time", "guidance"):
        features = sinusoid(found[name] * 1000, case.shapes[f"mid.sinusoid_{name}"][1])
        assert_close(name, features, case.io[f"mid.sinusoid_{name}"], allowed)
    recorded = {k.removeprefix("act.") for k in case.shapes if k.startswith("act.")}
    assert recorded
    for name in sorted(recorded):
        expected = case.io[f"act.{name}"]
        if name == "temb":  # ours is what the blocks see of it
            expected = jax.nn.silu(expected)
        assert_close(name, found[name], expected, allowed)
    assert_close("raw", found["raw"], case.io["out.raw"], allowed)
    rows, columns = found["latents"].shape[1:3]
    predicted = unpack(found["raw"][:, : rows * columns // 4], rows, columns)
    assert_close("velocity", channels_first(predicted), case.io["out.pred_unpacked"], allowed)


@STEP.check
def losses(case: Case) -> None:
    """The case's own loss, and that of every scheme on the recorded prediction."""
    assert_close("loss", np.float32(gradients(case)[0]), case.io["loss.total"], tight(case, "loss"))
    error = np.square(case.io["out.pred_unpacked"] - case.io["mid.target"])
    per_example = error.reshape(len(error), -1).mean(1)
    for name in (k.removeprefix("weight.") for k in case.shapes if k.startswith("weight.")):
        weight = np.asarray(loss_weight(name, jnp.asarray(case.io["mid.sigmas"])))
        found = np.mean(weight * per_example)
        assert_close(f"loss {name}", found, case.io[f"loss.{name}"], tight(case, "loss"))


@STEP.check
def gradients_of_adapters(case: Case) -> None:
    """Every recorded gradient under its official key, and the norm over all of them."""
    _, grads = gradients(case)
    ours = published(grads, batch_of(case)[0])
    recorded = {k.removeprefix("grad."): v for k, v in case.io.items() if k.startswith("grad.")}
    assert recorded
    for key, expected in recorded.items():
        assert_close(key, ours[key], expected, tight(case, "grad"))
    norm = np.sqrt(sum(np.sum(np.square(g.astype(np.float64))) for g in ours.values()))
    assert_close("norm", norm, case.io["grad_norm.before_clip"], tight(case, "grad"))


@STEP.check
def one_step_of_the_optimiser(case: Case) -> None:
    """Clipped to norm 1, then AdamW with the published settings (those the spec gives)."""
    _, grads = gradients(case)
    model, _ = batch_of(case)
    tree = params(case, model)
    optim = Optim(lr=1e-4, schedule="constant", weight_decay=1e-4, clip_norm=1.0)
    labels, decay = model.labels({"lora": tree["lora"]}), model.decay({"lora": tree["lora"]})
    optimizer = make_optimizer(optim, make_groups(optim, labels, 1), labels, decay)

    @jax.jit
    def step(trained: Params, grads: Params) -> Params:
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)))
        clipped = jax.tree.map(lambda g: g * jnp.minimum(1.0, 1.0 / norm), grads)
        updates, _ = optimizer.update(clipped, optimizer.init(trained), trained)
        return jax.tree.map(jnp.add, trained, updates)

    ours = published(step({"lora": tree["lora"]}, {"lora": grads})["lora"], model)
    raw = published(grads, model)
    recorded = {
        k.removeprefix("adamw_step1."): v for k, v in case.io.items() if k.startswith("adamw_")
    }
    assert recorded
    for key, expected in recorded.items():
        # Where a gradient is rounding noise, its sign, and so the whole step, is undetermined.
        tiny = np.abs(raw[key]) < 1e-6
        allowed = np.where(tiny, 2e-4, 2e-6)
        gap = np.abs(ours[key].astype(np.float64) - expected)
        assert np.all(gap <= allowed), (key, float((gap / allowed).max()))
