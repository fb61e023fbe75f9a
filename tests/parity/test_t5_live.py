"""The T5 encoder against transformers' T5EncoderModel and UMT5EncoderModel, live."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmods import partitioning
from jaxmods.backbones.t5 import T5Config, T5Encoder, distance_buckets, t5_map
from jaxmods.nn.stack import Execution
from jaxmods.partitioning import MeshShape, make_mesh, sharding_for, tree_shardings, use_mesh
from jaxmods.weights import WeightError, export_params, import_params, open_weights
from tests.parity.live import (
    abstract_of,
    assert_round_trip,
    assert_same_gradients,
    count,
    exported,
    imported,
    perturbed,
    relative,
    state_of,
)

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# Heads times their width is not the model's width, and texts are longer than the last bucket.
TINY = T5Config(
    vocab_size=40,
    width=24,
    layers=3,
    heads=4,
    head_dim=5,
    mlp=32,
    buckets=8,
    max_distance=16,
)
KINDS = {"t5": TINY, "umt5": dataclasses.replace(TINY, bias_per_layer=True)}
LENGTH = 24


def theirs_of(config: T5Config, kind: str = "EncoderModel") -> Any:
    family = "UMT5" if config.bias_per_layer else "T5"
    settings = getattr(transformers, f"{family}Config")(**config.hub_config())
    return getattr(transformers, f"{family}{kind}")(settings)


def abstract(config: T5Config) -> Any:
    ids = jnp.zeros((1, 1), jnp.int32)
    return abstract_of(lambda rng: T5Encoder(config).init(rng, ids))


@functools.cache
def pair_of(kind: str) -> tuple[Any, T5Config, Any]:
    """(their model, its sizes, the same weights here)."""
    config = KINDS[kind]
    torch.manual_seed(0)
    theirs = perturbed(theirs_of(config))
    return theirs, config, imported(state_of(theirs), t5_map(config), abstract(config))


@pytest.fixture(params=KINDS)
def pair(request: pytest.FixtureRequest) -> tuple[Any, T5Config, Any]:
    return pair_of(request.param)


def inputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids [3, T] padded with 0, which of them are words, and weights for a scalar."""
    rng = np.random.default_rng(0)
    ids = rng.integers(2, TINY.vocab_size, (3, LENGTH))
    for row, end in enumerate((4, 15, LENGTH - 1)):
        ids[row, end] = TINY.eos_id
        ids[row, end + 1 :] = TINY.pad_id
    return ids, ids != TINY.pad_id, rng.normal(size=(3, LENGTH, TINY.width)).astype(np.float32)


def encode(model: T5Encoder, params: Any, ids: Any, mask: Any = None) -> jax.Array:
    return model.apply({"params": params}, ids, mask)


@pytest.mark.parametrize(
    ("execution", "masked"),
    [(Execution(), False), (Execution(unroll=True, remat="full"), True)],
    ids=["scanned", "masked, unrolled, recomputed"],
)
def test_values_and_gradients(
    pair: tuple[Any, T5Config, Any], execution: Execution, masked: bool
) -> None:
    """States within 1e-5 and the gradient of every parameter within 1e-4, relative."""
    theirs, config, params = pair
    ids, words, weights = inputs()
    if masked:
        weights = weights * words[..., None]
    mask = words if masked else None
    expected = theirs(
        torch.tensor(ids), attention_mask=torch.tensor(words if masked else np.ones_like(words))
    ).last_hidden_state
    theirs.zero_grad()
    (expected * torch.tensor(weights)).sum().backward()

    @jax.jit
    def step(params: Any) -> Any:
        def objective(params: Any) -> Any:
            states = encode(T5Encoder(config, execution), params, ids, mask)
            return jnp.sum(states * weights), states

        return jax.value_and_grad(objective, has_aux=True)(params)

    (_, states), grads = step(params)
    seen = words if masked else np.ones_like(words)
    assert relative(np.asarray(states)[seen], expected.detach().numpy()[seen]) < 1e-5
    assert_same_gradients(theirs, exported(grads, t5_map(config)), 1e-4)


def test_unmasked_padding_is_attended() -> None:
    """FLUX passes no mask: the states of the words depend on how much padding follows."""
    _, config, params = pair_of("t5")
    ids, words, _ = inputs()
    run = jax.jit(functools.partial(encode, T5Encoder(config)))
    short = ids[:1, :12]
    assert relative(run(params, ids[:1])[:, :5], run(params, short)[:, :5]) > 1e-2
    hidden = run(params, ids[:1], words[:1])[:, :5]
    assert relative(hidden, run(params, short, words[:1, :12])[:, :5]) < 1e-5


@pytest.mark.parametrize("mixed", [True, False], ids=["wo in fp32", "all bf16"])
def test_bfloat16_is_as_close_to_float32_as_theirs(mixed: bool, tmp_path: Path) -> None:
    """Parameters in bf16, all or all but `wo` (which transformers keeps in fp32 for some dtypes):
    our error against fp32 is no more than theirs, with a tenth for the rounding that falls in
    different places."""
    theirs, config, _ = pair_of("t5")
    half = theirs_of(config).to(torch.bfloat16).eval()
    half.load_state_dict(theirs.state_dict())
    if mixed:
        for ours, block in zip(half.encoder.block, theirs.encoder.block, strict=True):
            ours.layer[1].DenseReluDense.wo = block.layer[1].DenseReluDense.wo
    half.save_pretrained(tmp_path)
    with open_weights(tmp_path) as reader:
        params = import_params(reader, t5_map(config), abstract(config)).params
    assert params["blocks"]["wo"]["kernel"].dtype == (jnp.float32 if mixed else jnp.bfloat16)
    assert params["blocks"]["wi_0"]["kernel"].dtype == jnp.bfloat16
    ids, _, _ = inputs()
    with torch.no_grad():
        exact = theirs(torch.tensor(ids)).last_hidden_state.numpy()
        rounded = half(torch.tensor(ids)).last_hidden_state.float().numpy()
    states = jax.jit(functools.partial(encode, T5Encoder(config)))(params, ids)
    assert states.dtype == jnp.bfloat16
    assert relative(states.astype(jnp.float32), exact) < 1.1 * relative(rounded, exact)


@pytest.mark.parametrize(("buckets", "farthest"), [(32, 128), (8, 20), (64, 256)])
def test_buckets(buckets: int, farthest: int) -> None:
    """All distances up to 1024, those on the edge of a logarithmic bucket included."""
    from transformers.models.t5.modeling_t5 import T5Attention

    positions = torch.arange(1025)
    expected = T5Attention._relative_position_bucket(
        positions[None] - positions[:, None], True, buckets, farthest
    )
    np.testing.assert_array_equal(distance_buckets(1025, 1025, buckets, farthest), expected)


def test_published_size_by_shape() -> None:
    config = T5Config()
    with torch.device("meta"):
        theirs = {k: tuple(v.shape) for k, v in theirs_of(config).state_dict().items()}
    shapes = abstract(config)
    assert count(shapes) == 4_762_310_656
    assert t5_map(config).torch_shapes(shapes) == theirs


def test_round_trip(pair: tuple[Any, T5Config, Any]) -> None:
    theirs, config, _ = pair
    assert_round_trip(state_of(theirs), t5_map(config), abstract(config))


def test_embedding_under_either_name() -> None:
    theirs, config, params = pair_of("t5")
    state = state_of(theirs)
    names = ("shared.weight", "encoder.embed_tokens.weight")
    for name in names:
        one = {k: v for k, v in state.items() if k != name}
        found = imported(one, t5_map(config), abstract(config))
        np.testing.assert_array_equal(found["embedding"], params["embedding"])
    with pytest.raises(WeightError, match="2 missing"):
        imported(
            {k: v for k, v in state.items() if k not in names}, t5_map(config), abstract(config)
        )
    with pytest.raises(WeightError, match=r"encoder\.embed_tokens\.weight"):
        imported({**state, names[1]: state[names[1]] + 1}, t5_map(config), abstract(config))


def test_encoder_of_a_whole_checkpoint() -> None:
    whole = theirs_of(TINY, "ForConditionalGeneration")
    params = imported(state_of(whole), t5_map(TINY), abstract(TINY))
    ours = exported(params, t5_map(TINY))
    encoder = {k: v for k, v in state_of(whole).items() if k in ours}
    assert ours.keys() == encoder.keys()
    assert all(np.array_equal(v, encoder[k]) for k, v in ours.items())


def test_exported_folder_loads_into_transformers(
    pair: tuple[Any, T5Config, Any], tmp_path: Path
) -> None:
    theirs, config, params = pair
    folder = tmp_path / "text_encoder_2"
    export_params(params, t5_map(config), folder, config.hub_config())
    again, info = type(theirs).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    expected = theirs.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in again.state_dict().items())
    assert T5Config.from_hub_config(again.config.to_dict()) == config


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="expected 'gated-gelu', found 'relu'"):
        T5Config.from_hub_config({**TINY.hub_config(), "feed_forward_proj": "relu"})
    with pytest.raises(ValueError, match="found 'bert'"):
        T5Config.from_hub_config({**TINY.hub_config(), "model_type": "bert"})
    ids = jnp.zeros((2, 4), jnp.int32)
    with pytest.raises(ValueError, match=r"found \(2, 4\) and \(2, 3\)"):
        jax.eval_shape(lambda: T5Encoder(TINY).init(jax.random.key(0), ids, ids[:, :3]))


def test_sharded_equals_unsharded() -> None:
    """States and gradients with heads, MLP and vocabulary over two devices, and with the batch and
    the parameters over two each."""
    _, config, params = pair_of("t5")
    model = T5Encoder(config)
    mesh = make_mesh(MeshShape(data=2, fsdp=2, tensor=2))
    boxed = jax.eval_shape(
        lambda rng: model.init(rng, jnp.zeros((1, 1), jnp.int32))["params"], jax.random.key(0)
    )
    shardings = tree_shardings(partitioning.unbox(boxed), partitioning.logical_axes(boxed), mesh)
    assert "tensor" in shardings["blocks"]["wo"]["kernel"].spec
    ids, words, weights = (np.concatenate([x, x[:1]]) for x in inputs())

    def step(params: Any, ids: Any, words: Any) -> Any:
        def objective(params: Any) -> Any:
            states = encode(model, params, ids, words)
            return jnp.sum(states * weights), states

        return jax.value_and_grad(objective, has_aux=True)(params)

    def traced(*args: Any) -> Any:
        with use_mesh(mesh):
            return step(*args)

    rows = sharding_for(ids.shape, ("batch", None), mesh)
    placed = (jax.device_put(params, shardings), *(jax.device_put(x, rows) for x in (ids, words)))
    (_, states), grads = jax.jit(traced, out_shardings=((None, None), shardings))(*placed)
    (_, expected), expected_grads = jax.jit(step)(params, ids, words)
    assert relative(states, expected) < 1e-5
    errors = jax.tree.map(relative, grads, expected_grads)
    assert all(error < 1e-5 for error in jax.tree.leaves(errors)), errors
