"""The system: published sizes, equal results however encoded and on every mesh, dropout."""

from __future__ import annotations

import dataclasses
import functools
import math
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import stargraph as recipes
from data_pipelines.graphs.demo import DemoGraph
from data_pipelines.graphs.pipeline import TripleBatches
from data_pipelines.graphs.tokenise import TokenSpec
from jaxmods.partitioning import MeshShape, logical_axes, make_mesh, tree_shardings, unbox, use_mesh
from jaxmods.systems.stargraph.dropout import dropout, fold, keep_mask, make_seed
from jaxmods.systems.stargraph.feed_forward import feed_forward
from jaxmods.systems.stargraph.model import EncoderConfig
from jaxmods.systems.stargraph.system import StarGraph
from jaxmods.weights import export_tensors, import_params, memory_reader

SMALL = EncoderConfig(
    width=32, anchors=121, anchors_per_entity=4, paths=21, center=True, node_width=16
)
SYSTEM = StarGraph(entities=599, relations=11, encoder=SMALL, negatives=6)
DATA = recipes.pipeline(
    SYSTEM, DemoGraph(), anchor_size=1.0, skip_ratio=0.2, true_negatives=True, cache=None
)


def params_of(system: StarGraph, data: TripleBatches, seed: int = 0) -> dict:
    params = jax.jit(lambda key: unbox(system.init(key)))(jax.random.key(seed))
    constants = data.constants()
    system.check_constants(constants)
    for path, array in constants.items():
        group, name = path.split("/")
        params[group][name] = jnp.asarray(array)
    return params


def batch_of(data: TripleBatches, step: int = 0, size: int = 32) -> dict:
    batch = next(iter(data.batches(global_batch=size, seed=0, start_step=step)))
    return {k: jnp.asarray(v) for k, v in batch.arrays.items()}


def value_and_grads(system: StarGraph, params: dict, batch: dict, key: int = 0):
    """Loss and gradients of the trained parameters."""
    trained = {k: params[k] for k in ("encoder", "relation_embedding")}
    fixed = {k: v for k, v in params.items() if k not in trained}
    return compiled(system)(trained, fixed, batch, key)


@functools.cache
def compiled(system: StarGraph):
    """One jitted function per system, so that nothing is compiled twice."""

    def loss(trained, fixed, batch, key):
        return system.loss(trained | fixed, {}, batch, jax.random.key(key), jnp.asarray(0)).loss

    return jax.jit(jax.value_and_grad(loss))


def without_dropout(system: StarGraph) -> StarGraph:
    return dataclasses.replace(system, encoder=dataclasses.replace(system.encoder, dropout=0.0))


def assert_same(a, b, rtol: float = 2e-5, atol: float = 1e-7) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


@pytest.mark.parametrize(
    ("recipe", "published"),
    [
        (recipes.fb15k237, 3_148_290),
        (recipes.fb15k237_skip05, 4_274_178),
        (recipes.wikikg2, 7_148_802),
        (recipes.wikikg2_nodes, 93_039_522),
    ],
)
def test_published_parameter_counts(recipe, published: int) -> None:
    system = dataclasses.replace(recipe().system, row_multiple=1)
    params = unbox(jax.eval_shape(system.init, jax.random.key(0)))
    params.pop("graph")
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == published


def test_encoding_each_entity_once_is_equal_without_dropout() -> None:
    system = without_dropout(SYSTEM)
    params = params_of(system, DATA)
    expected = value_and_grads(system, params, batch_of(DATA))
    for slots, chunk in ((640, 0), (256, 0), (640, 128)):
        other = dataclasses.replace(system, distinct=slots, encode_chunk=chunk)
        data = dataclasses.replace(DATA, distinct=slots)
        assert_same(value_and_grads(other, params, batch_of(data)), expected, 1e-4, 1e-6)


def test_triples_a_few_at_a_time_give_the_same_loss_gradients_and_metrics() -> None:
    """Parts of 5 triples: 7 parts of a batch of 32, the last one padded."""
    system = without_dropout(SYSTEM)
    params, batch = params_of(system, DATA), batch_of(DATA)
    in_parts = dataclasses.replace(system, encode_chunk=5 * 8)
    assert_same(
        value_and_grads(in_parts, params, batch), value_and_grads(system, params, batch), 1e-4, 1e-6
    )

    def metrics(system: StarGraph) -> dict:
        key, step = jax.random.key(0), jnp.asarray(0)
        return jax.jit(lambda p, b: system.loss(p, {}, b, key, step).metrics)(params, batch)

    assert_same(metrics(in_parts), metrics(system))


def test_gradients_of_the_mlp_are_those_of_its_definition() -> None:
    """With dropout, against automatic differentiation of the same expression."""
    shapes = ((3, 4, 8), (8, 16), (16,), (16, 8), (8,))
    keys = jax.random.split(jax.random.key(0), len(shapes) + 1)
    arrays = tuple(jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=False))
    weight = jax.random.normal(keys[-1], shapes[0])
    seeds, rate = (make_seed(keys[0]), make_seed(keys[1])), 0.25

    def plain(y, kernel_1, bias_1, kernel_2, bias_2):
        hidden = jax.nn.gelu(y @ kernel_1 + bias_1, approximate=False)
        hidden = jnp.where(keep_mask(seeds[0], hidden.shape, rate), hidden / (1 - rate), 0)
        out = hidden @ kernel_2 + bias_2
        return jnp.where(keep_mask(seeds[1], out.shape, rate), out / (1 - rate), 0)

    def value(function, *arrays):
        return jnp.sum(weight * function(*arrays))

    found, expected = (
        jax.value_and_grad(functools.partial(value, f), argnums=tuple(range(5)))(*arrays)
        for f in (lambda *a: feed_forward(*a, *seeds, rate), plain)
    )
    assert_same(found, expected, 1e-5, 1e-5)


def test_batches_are_as_the_system_says() -> None:
    for slots in (0, 640):
        system = dataclasses.replace(SYSTEM, distinct=slots)
        batch = batch_of(dataclasses.replace(DATA, distinct=slots), size=64)
        spec = system.batch_spec(64)
        assert {k: (v.shape, str(v.dtype)) for k, v in batch.items()} == {
            k: (s.shape, s.dtype) for k, s in spec.items()
        }


def test_dropout_draws_anew_for_every_key_and_occurrence() -> None:
    params = params_of(SYSTEM, DATA)
    batch = batch_of(DATA)
    losses = [float(value_and_grads(SYSTEM, params, batch, key)[0]) for key in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    twice = SYSTEM._encode(params, jnp.asarray([5, 5]), jnp.asarray([1, 2], jnp.uint32))
    assert not np.allclose(twice[0], twice[1])
    still = SYSTEM.encode(params, jnp.asarray([5, 5]))
    np.testing.assert_array_equal(still[0], still[1])


def test_keep_mask_has_the_rate_and_no_visible_structure() -> None:
    seed = make_seed(jax.random.key(0))
    rate, shape = 0.1, (512, 1024)
    a = np.asarray(keep_mask(seed, shape, rate), np.float64)
    sigma = math.sqrt(rate * (1 - rate) / a.size)
    assert abs(a.mean() - (1 - rate)) < 5 * sigma
    others = {
        "next row": np.roll(a, 1, 0),
        "next column": np.roll(a, 1, 1),
        "another seed": np.asarray(keep_mask(fold(seed, 1), shape, rate)),
        "another key": np.asarray(keep_mask(make_seed(jax.random.key(1)), shape, rate)),
    }
    for name, other in others.items():
        assert abs(np.corrcoef(a.ravel(), other.ravel())[0, 1]) < 5 / math.sqrt(a.size), name
    for axis in (0, 1):  # rows and columns vary as independent draws do
        spread = a.mean(axis).std() / math.sqrt(rate * (1 - rate) / a.shape[axis])
        assert 0.85 < spread < 1.15


def test_dropout_gradient_uses_the_same_mask() -> None:
    seed, x = make_seed(jax.random.key(3)), jnp.ones((64, 64))
    out = dropout(x, seed, 0.25)
    grad = jax.grad(lambda x: dropout(x, seed, 0.25).sum())(x)
    np.testing.assert_array_equal(out, grad)
    assert set(np.unique(out).tolist()) == {0.0, np.float32(1 / 0.75)}
    np.testing.assert_array_equal(dropout(x, None, 0.25), x)


@pytest.mark.parametrize(
    ("shape", "slots", "chunk"),
    [
        (MeshShape(data=1, fsdp=8), 0, 0),
        (MeshShape(data=1, fsdp=8), 256, 0),
        (MeshShape(data=1, fsdp=8), 0, 128),
        (MeshShape(data=2, fsdp=2, tensor=2), 0, 0),
        (MeshShape(data=2, fsdp=2, tensor=2), 256, 0),
    ],
)
def test_sharded_equals_unsharded(shape: MeshShape, slots: int, chunk: int) -> None:
    """Tables split by rows, batch split, dropout on: the same loss and gradients."""
    system = dataclasses.replace(SYSTEM, row_multiple=8, distinct=slots, encode_chunk=chunk)
    tokens = dataclasses.replace(DATA.tokens, row_multiple=8)
    data = dataclasses.replace(DATA, tokens=tokens, distinct=slots)
    params, batch = params_of(system, data), batch_of(data)
    expected = value_and_grads(system, params, batch)
    mesh = make_mesh(shape)
    axes = logical_axes(jax.eval_shape(system.init, jax.random.key(0)))
    placed = jax.device_put(params, tree_shardings(params, axes, mesh))
    for table in ("anchor_embedding", "node_embedding"):
        rows = placed["encoder"][table]
        assert rows.addressable_shards[0].data.shape[0] < rows.shape[0]
    hashes = placed["graph"]["hashes"]
    assert hashes.addressable_shards[0].data.shape[0] < hashes.shape[0]
    spec = system.batch_spec(32)
    inputs = {k: jax.device_put(v, tree_shardings(v, spec[k].axes, mesh)) for k, v in batch.items()}
    compiled.cache_clear()  # `constrain` reads the mesh while the function is traced
    with use_mesh(mesh):
        assert_same(value_and_grads(system, placed, inputs), expected, 1e-4, 1e-6)
    compiled.cache_clear()


def test_padded_tables_change_no_result_and_export_without_padding() -> None:
    padded = dataclasses.replace(SYSTEM, row_multiple=64)
    data = dataclasses.replace(DATA, tokens=dataclasses.replace(DATA.tokens, row_multiple=64))
    params = params_of(padded, data)
    tensors = {k: v.all() for k, v in export_tensors(params, padded.weights()).items()}
    assert tensors["hashes"].shape == (599, 4)
    assert tensors["node_embedding.weight"].shape == (600, 16)
    abstract = unbox(jax.eval_shape(SYSTEM.init, jax.random.key(0)))
    plain = import_params(memory_reader(tensors), SYSTEM.weights(), abstract).params
    ids = jnp.arange(599)
    np.testing.assert_array_equal(SYSTEM.encode(plain, ids), padded.encode(params, ids))
    back = import_params(memory_reader(tensors), padded.weights(), params).params
    assert back["encoder"]["node_embedding"].shape == (640, 16)
    np.testing.assert_array_equal(back["graph"]["hashes"], params["graph"]["hashes"])


def test_initialisation_follows_the_official_rules() -> None:
    params = unbox(SYSTEM.init(jax.random.key(0)))
    limit = (6.0 + 2.0) / 32
    assert float(params["embedding_range"][0]) == limit
    for table in (params["relation_embedding"], params["encoder"]["anchor_embedding"]):
        assert float(jnp.abs(table).max()) <= limit
        assert float(table.std()) == pytest.approx(limit / math.sqrt(3), rel=0.05)
    assert not np.any(params["encoder"]["path_embedding"][-1])
    assert np.any(params["encoder"]["path_embedding"][-2])
    kernel = params["encoder"]["mlp_2_kernel"]
    assert float(jnp.abs(kernel).max()) <= 64**-0.5
    assert np.array_equal(params["graph"]["type_ids"], [0, 2, 2, 2, 2])


def test_constants_that_do_not_fit_say_what_to_set() -> None:
    constants = DATA.constants()
    wrong = dataclasses.replace(SYSTEM, encoder=dataclasses.replace(SMALL, anchors=200, paths=30))
    with pytest.raises(
        ValueError, match=r"set system\.encoder\.anchors=121.*system\.encoder\.paths=21"
    ):
        wrong.check_constants(constants)
    with pytest.raises(ValueError, match=r"graph/nodes: missing"):
        SYSTEM.check_constants({k: v for k, v in constants.items() if k != "graph/nodes"})
    with pytest.raises(ValueError, match=r"expected shape \(500, 4\), found \(599, 4\)"):
        dataclasses.replace(SYSTEM, entities=500).check_constants(constants)
    bare = dataclasses.replace(SMALL, center=False)
    with pytest.raises(ValueError, match="no such table"):
        dataclasses.replace(SYSTEM, encoder=bare).check_constants(constants)


def test_options_that_contradict_each_other_are_refused() -> None:
    for change, message in (
        ({"width": 30}, "multiple of 8"),
        ({"center": False, "share_anchors": True}, "needs center or neighbours"),
        ({"anchors_per_entity": 0, "center": False}, "at least one token"),
        ({"dropout": 1.0}, "rate < 1"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(SMALL, **change)
    with pytest.raises(ValueError, match="expected 0 or more"):
        dataclasses.replace(SYSTEM, encode_chunk=-1)


def test_tables_of_the_graph_are_frozen() -> None:
    params = unbox(jax.eval_shape(SYSTEM.init, jax.random.key(0)))
    labels = SYSTEM.labels(params)
    assert jax.tree.structure(labels) == jax.tree.structure(params)
    assert set(jax.tree.leaves(labels["graph"])) == {"frozen"}
    assert (labels["gamma"], labels["relation_embedding"]) == ("frozen", "train")


def test_tiny_recipe_fits_its_graph() -> None:
    experiment = recipes.tiny()
    data = experiment.data
    assert isinstance(data, TripleBatches)
    experiment.system.check_constants(data.constants())
    facts = data.describe()
    assert facts["entities"] == experiment.system.entities
    assert facts["relations"] == experiment.system.relations
    batch = next(islice(data.batches(global_batch=8, seed=0), 1))
    assert batch.arrays.keys() == experiment.system.batch_spec(8).keys()


def test_bfloat16_compute_stays_close() -> None:
    system = without_dropout(SYSTEM)
    params, batch = params_of(system, DATA), batch_of(DATA)
    full = system.loss(params, {}, batch, jax.random.key(0), jnp.asarray(0)).loss
    half = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16) if jnp.issubdtype(x.dtype, jnp.floating) else x, params
    )
    low = system.loss(half, {}, batch, jax.random.key(0), jnp.asarray(0)).loss
    assert low.dtype == jnp.float32
    assert float(low) == pytest.approx(float(full), rel=0.02)


def test_token_spec_and_encoder_agree() -> None:
    assert DATA.tokens == TokenSpec(
        anchor_size=1.0, skip_ratio=0.2, anchors=4, center=True, row_multiple=1
    )
