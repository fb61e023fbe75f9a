"""Text to image: loss and sampling against diffusers' classes, operation counts, encoded data."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines.batch import DataError
from data_pipelines.encoded import Encoded, EncodedPipeline, EncodedRecord, write_encoded
from jaxmods.backbones.autoencoder_kl import FLUX, AutoencoderConfig, AutoencoderKL
from jaxmods.backbones.flux import pack
from jaxmods.partitioning import unbox
from jaxmods.system import Params, System
from jaxmods.systems.flux.flops import encoder_flops, text_flops
from jaxmods.systems.flux.objective import Draws
from jaxmods.systems.flux.sample import Sampling
from jaxmods.systems.flux.system import Flux
from jaxmods.systems.refton.system import RefTon
from tests.parity.live import relative
from tests.refton.tiny import BASE, PLAIN, SYSTEM, random_arrays, random_params
from train.interchange import abstract_params, import_weights
from train.preflight import flops

TOLERANCE = 2e-5  # fp32 on both sides: a few blocks, a few steps
PLAIN_BASE = dataclasses.replace(BASE, encoders=None)
LATENTS = Flux(
    base=PLAIN_BASE, height=16, width=24, inputs="latents", sampling=Sampling(3, guidance=3.5)
)
WITH_TEXT = dataclasses.replace(LATENTS, base=BASE, inputs="pictures")


@pytest.fixture(scope="module")
def params() -> Params:
    shapes = abstract_params(LATENTS)
    return {name: random_params(PLAIN)[name] for name in shapes}


@pytest.fixture(scope="module")
def pipe(params: Params, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """diffusers' pipeline of the same weights, from a folder that we wrote."""
    diffusers = pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("flux") / "pipeline"
    LATENTS.save_pipeline(params, folder)
    assert LATENTS.verify_export(folder, params, jax.random.key(0))["velocity"] < TOLERANCE
    again = import_weights(LATENTS, folder)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    pipe = diffusers.FluxPipeline(
        scheduler=scheduler,
        vae=diffusers.AutoencoderKL.from_pretrained(folder / "vae"),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=diffusers.FluxTransformer2DModel.from_pretrained(folder / "transformer"),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_loss_and_gradients_of_diffusers(params: Params, pipe: Any) -> None:
    torch = pytest.importorskip("torch")
    batch = random_arrays(LATENTS.batch_spec(2))
    batch = {k: v.astype(jnp.float32) for k, v in batch.items()}
    noise = jax.random.normal(jax.random.key(0), batch["image"].shape)
    draws = Draws(noise, jnp.asarray([0.2, 0.9]))

    @jax.jit
    def run(transformer: Params) -> Any:
        def value(t: Params) -> jax.Array:
            return LATENTS.objective({**params, "transformer": t}, batch, draws)[0]

        return jax.value_and_grad(value)(transformer)

    loss, grads = run(params["transformer"])

    def tensor(x: Any) -> Any:
        return torch.tensor(np.asarray(x))

    model = pipe.transformer
    clean, eps = (tensor(pack(x)) for x in (batch["image"], noise))
    sigma = torch.tensor([0.8, 0.1])  # table entries 200 and 900 of 1, 0.999, ..., 0.001
    mixed = (1 - sigma[:, None, None]) * clean + sigma[:, None, None] * eps
    rows, columns = LATENTS.base.grid(16, 24)
    grid = torch.cartesian_prod(torch.arange(rows // 2), torch.arange(columns // 2))
    ids = torch.cat([torch.zeros(len(grid), 1), grid.float()], dim=1)
    predicted = model(
        hidden_states=mixed,
        encoder_hidden_states=tensor(batch["states"]),
        pooled_projections=tensor(batch["pooled"]),
        timestep=sigma,
        guidance=torch.full((2,), LATENTS.guidance),
        img_ids=ids,
        txt_ids=torch.zeros(5, 3),
    ).sample
    theirs = ((predicted - (eps - clean)) ** 2).mean()
    theirs.backward()
    np.testing.assert_allclose(float(loss), theirs.item(), rtol=TOLERANCE)
    expected = model.proj_out.weight.grad.numpy()
    assert relative(grads["proj_out"]["kernel"].T, expected) < 10 * TOLERANCE
    model.zero_grad(set_to_none=True)


def test_sampling_of_diffusers(params: Params, pipe: Any) -> None:
    """The whole pipeline, from the same noise and text features to the picture."""
    torch = pytest.importorskip("torch")
    text = random_arrays(LATENTS.function_inputs(2)["sample"])
    key = text.pop("key")
    text = {k: v.astype(jnp.float32) for k, v in text.items()}
    ours = jax.jit(LATENTS.functions()["sample"])(params, *text.values(), key)
    assert ours.shape == (2, 16, 24, 3)
    shape = (*LATENTS.base.grid(16, 24), 4)
    noise = jax.vmap(lambda k: jax.random.normal(k, shape))(jax.random.wrap_key_data(key))
    theirs = pipe(
        prompt_embeds=torch.tensor(np.asarray(text["states"])),
        pooled_prompt_embeds=torch.tensor(np.asarray(text["pooled"])),
        latents=torch.tensor(np.asarray(pack(noise))),
        height=16,
        width=24,
        num_inference_steps=3,
        guidance_scale=3.5,
        output_type="np",
    ).images
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)


def test_ids_and_pictures_are_the_other_form_of_the_same_batch(params: Params) -> None:
    """Encoding in the step, and beforehand with the named functions, give one loss."""
    whole = {**random_params(SYSTEM), **params}
    batch = random_arrays(WITH_TEXT.batch_spec(2))
    batch |= {name: batch[name] % 40 for name in ("text_t5", "text_clip")}
    functions = WITH_TEXT.functions()
    states, pooled = functions["features"](whole, batch["text_t5"], batch["text_clip"])
    latents = functions["encode"](whole, batch["image"])
    encoded = {"image": latents, "states": states, "pooled": pooled}
    spec = LATENTS.batch_spec(2)
    assert {k: v.shape for k, v in encoded.items()} == {k: s.shape for k, s in spec.items()}
    draws = Draws(jax.random.normal(jax.random.key(0), latents.shape), jnp.asarray([0.3, 0.6]))
    one, _ = jax.jit(lambda p, b: WITH_TEXT.objective(p, b, draws))(whole, batch)
    two, _ = jax.jit(lambda p, b: LATENTS.objective(p, b, draws))(whole, encoded)
    np.testing.assert_allclose(one, two, rtol=1e-5)


def counted(system: System) -> float:
    """Products of one example's training step, from its jaxpr; nothing is compiled."""
    params, batch = abstract_params(system), system.batch_spec(1)
    labels = system.labels(params)
    trained = [name for name, tree in labels.items() if "train" in jax.tree.leaves(tree)]

    def value(mine: Params, rest: Params, batch: Any) -> jax.Array:
        key = jax.random.key(0)
        state = jax.eval_shape(system.init_state, params)
        state = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), state)
        return system.loss({**rest, **mine}, state, batch, key, jnp.zeros(())).loss

    mine = {name: params[name] for name in trained}
    rest = {name: params[name] for name in params if name not in trained}
    structs = {name: spec.struct() for name, spec in batch.items()}
    return flops.count(jax.make_jaxpr(jax.grad(value))(mine, rest, structs)).total


# What is left out of the analytic count (gradients of modulations, embedders), at these sizes.
@pytest.mark.parametrize(
    ("system", "share"),
    [
        (RefTon(), 0.01),
        (RefTon(adapters=None), 0.01),
        (Flux(base=dataclasses.replace(Flux().base, encoders=None), inputs="latents"), 0.01),
        (Flux(), 0.01),
    ],
    ids=["refton", "refton whole", "flux encoded", "flux"],
)
def test_operations_are_those_of_the_program(system: System, share: float) -> None:
    """The published sizes, traced: the analytic count is the program's."""
    analytic = system.flops_per_example()
    assert analytic is not None
    assert counted(system) == pytest.approx(analytic, rel=share)


@pytest.mark.parametrize("config", [FLUX, BASE.vae], ids=["published", "tiny"])
def test_operations_of_the_encoders(config: AutoencoderConfig) -> None:
    model = AutoencoderKL(config)
    shapes = unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3))))
    picture = jax.ShapeDtypeStruct((1, 64, 48, 3), jnp.float32)

    def encode(params: Params, pixels: jax.Array) -> jax.Array:
        posterior: Any = model.apply(params, pixels, method="encode")
        return posterior.mean

    traced = jax.make_jaxpr(encode)(shapes, picture)
    assert flops.count(traced).total == pytest.approx(encoder_flops(config, 64, 48), rel=1e-6)


def test_operations_of_the_text_encoders() -> None:
    """CLIP's last block is computed for one token only; that is all that the count has too much."""
    system = Flux()
    ids = [jax.ShapeDtypeStruct((1, n), jnp.int32) for n in (system.base.text_length, 77)]
    found = flops.count(jax.make_jaxpr(system.base.prompt)(abstract_params(system), *ids)).total
    assert system.base.encoders is not None
    counted = text_flops(system.base.encoders, system.base.text_length)
    assert 0 < counted - found < 0.001 * counted


def test_encoded_examples_come_back(tmp_path: Path) -> None:
    spec = LATENTS.batch_spec(2)
    rows = []
    for number in range(5):
        arrays = random_arrays(LATENTS.batch_spec(1), seed=number)
        rows.append(EncodedRecord(str(number), {k: np.asarray(v[0]) for k, v in arrays.items()}))
    facts = {"encoder": "tiny", "sha256": "0"}
    assert write_encoded(rows, tmp_path / "data", facts, per_file=2) == 5
    assert len(list((tmp_path / "data").glob("*.array_record"))) == 3
    data = EncodedPipeline(Encoded(str(tmp_path / "data")))
    batch = next(iter(data.batches(global_batch=2, seed=0)))
    assert {k: (v.shape, v.dtype.name) for k, v in batch.arrays.items()} == {
        k: (s.shape, s.dtype) for k, s in spec.items()
    }
    by_id = {row.id: row for row in rows}
    for position, record in enumerate(batch.info.record_ids):
        expected = by_id[record.rsplit(":", 1)[1]].arrays
        for name, array in batch.arrays.items():
            assert array[position].tobytes() == expected[name].tobytes()
    (facts_of,) = data.describe().values()
    assert (facts_of["records"], facts_of["encoder"]) == (5, "tiny")
    write_encoded(rows, tmp_path / "other", {**facts, "sha256": "1"})
    other = EncodedPipeline(Encoded(str(tmp_path / "other")))
    assert other.fingerprint() != data.fingerprint()
    with pytest.raises(DataError, match="already holds"):
        write_encoded(rows, tmp_path / "data", facts)
    different = [rows[0], EncodedRecord("x", {"image": rows[0].arrays["image"]})]
    with pytest.raises(DataError, match="x: expected arrays"):
        write_encoded(different, tmp_path / "third", facts)
    with pytest.raises(DataError, match="encode the data first"):
        len(Encoded(str(tmp_path / "nowhere")))
