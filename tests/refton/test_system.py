"""RefTON as a system: hidden conditions, cached latents, sampling, what trains, what is refused."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.refton import KONTEXT, pipeline
from data_pipelines.scenes.try_on import TryOnScenes
from jaxmods.nn.attention import attention
from jaxmods.partitioning import MeshShape, logical_axes, make_mesh, tree_shardings, unbox
from jaxmods.system import Params
from jaxmods.systems.flux.base import to_unit
from jaxmods.systems.flux.objective import draw
from jaxmods.systems.flux.sample import Sampling
from jaxmods.systems.flux.squares import Squares
from jaxmods.systems.refton.layout import Optional
from jaxmods.systems.refton.system import RefTon
from tests.refton.tiny import BASE, PLAIN, SYSTEM, random_arrays, random_params

ROWS = 2
# fp32 sums in another order: masked keys are summed along with the others, as zeros.
CLOSE: dict[str, Any] = {"rtol": 2e-5, "atol": 2e-6}


@pytest.fixture(scope="module")
def params() -> Params:
    return random_params(PLAIN)


def batch_of(system: RefTon, rows: int = ROWS) -> dict[str, jax.Array]:
    return random_arrays(system.batch_spec(rows))


def draws_of(system: RefTon, rows: int = ROWS) -> Any:
    shape = (rows, *system.base.grid(system.height, system.width), 4)
    drawn = draw(jax.random.key(3), shape, system.weighting_scheme)
    return dataclasses.replace(drawn, dropout=None)


def value_and_grad(system: RefTon, params: Params, batch: Any, draws: Any) -> Any:
    def value(adapters: Params, batch: Any) -> jax.Array:
        return system.objective({**params, "lora": adapters}, batch, draws)[0]

    return jax.jit(jax.value_and_grad(value))(params["lora"], batch)


def test_hidden_tokens_change_nothing(params: Params) -> None:
    """One example of two uses its reference: as that one with, and the other without a reference
    in its sequence; whatever picture stands in the hidden place."""
    batch, draws = batch_of(PLAIN), draws_of(PLAIN)
    assert list(batch["use_reference"]) == [True, False]
    found = value_and_grad(PLAIN, params, batch, draws)

    first = dataclasses.replace(draws, noise=draws.noise[:1], u=draws.u[:1])
    second = dataclasses.replace(draws, noise=draws.noise[1:], u=draws.u[1:])
    without = dataclasses.replace(PLAIN, optional=())
    visible = {k: v[:1] for k, v in batch.items()}
    rest = {k: v[1:] for k, v in batch.items() if "reference" not in k}
    one = value_and_grad(PLAIN, params, visible, first)
    two = value_and_grad(without, params, rest, second)
    expected = jax.tree.map(lambda a, b: (a + b) / 2, one, two)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), found, expected)
    assert not np.allclose(one[0], two[0], rtol=1e-3)


def test_cached_latents_are_the_same_input(params: Params) -> None:
    batch, draws = batch_of(PLAIN), draws_of(PLAIN)
    latents = jax.jit(PLAIN.encode_batch)(params, batch)
    flags = {k: v for k, v in batch.items() if k.startswith("use_")}
    cached = dataclasses.replace(PLAIN, inputs="latents")
    spec = cached.batch_spec(ROWS)
    assert {k: v.shape for k, v in latents.items()} | {"use_reference": (ROWS,)} == {
        k: s.shape for k, s in spec.items()
    }
    assert {s.dtype for k, s in spec.items() if k not in flags} == {"bfloat16"}
    whole, _ = jax.jit(lambda p, b: PLAIN.objective(p, b, draws))(params, batch)
    found, _ = jax.jit(lambda p, b: cached.objective(p, b, draws))(params, {**latents, **flags})
    np.testing.assert_allclose(found, whole, rtol=1e-6)
    assert cached.flops_per_example() < PLAIN.flops_per_example()


def test_a_picture_depends_on_its_own_row_alone(params: Params) -> None:
    inputs = random_arrays(PLAIN.function_inputs(3)["sample_reference"])
    run = jax.jit(PLAIN.functions()["sample_reference"])
    whole = run(params, *inputs.values())
    assert whole.shape == (3, 32, 24, 3)
    assert whole.dtype == jnp.float32
    assert 0 <= float(whole.min()) < float(whole.max()) <= 1
    order = np.array([2, 0, 1])
    moved = run(params, *(x[order] for x in inputs.values()))
    # Values in [0, 1], float32: another batch order may be summed in another order.
    np.testing.assert_allclose(moved, whole[order], atol=1e-5)
    other = run(params, *[*list(inputs.values())[:-1], inputs["key"] + 1])
    assert float(jnp.abs(other - whole).max()) > 1e-3


def test_strength_keeps_more_of_the_subject(params: Params) -> None:
    """As diffusers: of 30 steps the last 11 for a strength of 0.34, from the subject with noise."""
    pictures = random_arrays(PLAIN.function_inputs(1)["sample"])
    del pictures["key"]
    start = PLAIN.base.encode(params, pictures["subject"])
    noise = jax.random.normal(jax.random.key(1), start.shape)
    distance = {}
    for strength, steps in ((1.0, 30), (0.34, 11)):
        system = dataclasses.replace(PLAIN, sampling=Sampling(30, 2.5, strength))
        denoise = jax.jit(lambda p, s=system: s.denoise(p, pictures, noise, trace=True))
        latents, trace = denoise(params)
        assert trace.shape[0] == steps
        distance[strength] = float(jnp.abs(latents - start).mean())
    assert distance[0.34] < distance[1.0]


def test_prompt_of_the_state_is_that_of_the_encoders() -> None:
    params = random_params(SYSTEM)
    state = jax.jit(SYSTEM.init_state)(params)
    assert state["prompt"]["states"].shape == (5, 24)
    states, pooled = jax.jit(SYSTEM.prompt)(params)
    np.testing.assert_allclose(state["prompt"]["states"], states[0], rtol=1e-6)
    np.testing.assert_allclose(state["prompt"]["pooled"], pooled[0], rtol=1e-6)
    # The empty text: the end token, then padding; start, end, padding for CLIP.
    t5, clip = BASE.prompt_ids()
    assert t5.tolist() == [[1, 0, 0, 0, 0]]
    assert clip.tolist() == [[48, 49, 49, 49, 49, 49, 49]]
    with pytest.raises(ValueError, match="expected 1 to 5 ids for T5, found 6"):
        BASE.prompt_ids(t5=range(6))


@pytest.mark.parametrize("prob", [(0.5, 0.5), (1.0, 0.0)])
def test_batches_of_the_pipeline_fit(prob: tuple[float, float]) -> None:
    person, reference = prob
    optional: tuple[Optional, ...] = ("reference",) if reference else ()
    system = dataclasses.replace(SYSTEM, optional=optional)
    source = TryOnScenes(count=4, height=32, width=24)
    data = pipeline(system, source, person_prob=person, reference_prob=reference)
    batch = next(iter(data.batches(global_batch=2, seed=0))).arrays
    spec = system.batch_spec(2)
    assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
        k: (s.shape, s.dtype) for k, s in spec.items()
    }
    pixels = jnp.asarray(batch["target"])
    # Values in [-1, 1]: a few roundings of float32 (6e-8 each).
    np.testing.assert_allclose(to_unit(pixels), batch["target"] / 127.5 - 1, atol=1e-6)


def test_published_size() -> None:
    """380 modules with 216,662,016 numbers of adapters; nothing else trains. fsdp splits all."""
    system = RefTon(base=KONTEXT)
    boxed = jax.eval_shape(system.init, jax.random.key(0))
    abstract = unbox(boxed)
    counts = {k: sum(math.prod(x.shape) for x in jax.tree.leaves(v)) for k, v in abstract.items()}
    assert counts == {
        "transformer": 11_901_408_320,
        "vae": 83_819_683,
        "text_encoder": 123_060_480,
        "text_encoder_2": 4_762_310_656,
        "lora": 216_662_016,
    }
    keys = [k for k in system.weights().torch_shapes(abstract) if ".lora_" in k]
    assert len(keys) == 2 * 380
    labels = system.labels(abstract)
    assert set(jax.tree.leaves(labels["lora"])) == {"train"}
    rest = [v for k, v in labels.items() if k != "lora"]
    assert set(jax.tree.leaves(rest)) == {"frozen"}
    config = system.lora_config
    assert config is not None
    assert (config.rank, config.scale, config.dropout) == (64, 2.0, 0.0)
    mesh = make_mesh(MeshShape(data=1, fsdp=8))
    shardings = tree_shardings(abstract["lora"], logical_axes(boxed["lora"]), mesh)
    held = jax.tree.map(lambda x, s: math.prod(s.shard_shape(x.shape)), abstract["lora"], shardings)
    assert sum(jax.tree.leaves(held)) == counts["lora"] // 8


def test_squares_lose_nothing() -> None:
    codec = Squares(4, scaling_factor=2.0)
    pixels = jax.random.normal(jax.random.key(0), (2, 8, 12, 3))
    latents = codec.encode(pixels)
    assert latents.shape == (2, 2, 3, codec.latent_channels)
    np.testing.assert_array_equal(latents[0, 1, 2, :3], 2 * pixels[0, 4, 8])
    np.testing.assert_array_equal(codec.decode(latents), pixels)
    with pytest.raises(ValueError, match="multiples of 4, found 6 x 8"):
        codec.encode(jnp.zeros((1, 6, 8, 3)))


def test_key_mask_in_the_flash_kernel() -> None:
    """Hidden keys, by segments inside the kernel: as plain attention hides them."""
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (2, 2, 140, 16)) for key in keys)
    mask = np.ones((2, 1, 1, 140), bool)
    mask[1, ..., 100:] = False
    flash = attention(q, k, v, mask=jnp.asarray(mask), implementation="flash")
    plain = attention(q, k, v, mask=jnp.asarray(mask), implementation="xla")
    # float32; the kernel adds up blocks of keys one after the other.
    np.testing.assert_allclose(flash, plain, atol=2e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 30}, r"size of the target: .*multiples of 4, found 30 x 24; change height=30"),
        ({"cond_scale": 3}, r"size of the conditions: .*found 10 x 8"),
        ({"cond_scale": 0}, r"cond_scale: expected more than 0, found 0"),
        ({"optional": ("reference", "mask")}, r"in this order, found \('reference', 'mask'\)"),
    ],
)
def test_wrong_options_say_what_to_do(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SYSTEM, **options)


def test_bases_that_do_not_fit_together() -> None:
    with pytest.raises(ValueError, match=r"transformer.out_channels = 4 \* 48"):
        dataclasses.replace(BASE, vae=Squares(4))
    wide = dataclasses.replace(BASE.transformer, text_width=32)
    with pytest.raises(ValueError, match=r"widths T5 32 and CLIP 16 .* found 24 and 16"):
        dataclasses.replace(BASE, transformer=wide)
    with pytest.raises(ValueError, match="0 < strength <= 1, found steps=10, strength=0"):
        Sampling(10, 2.5, 0.0)
