"""The Llama decoder: caches, shared prefixes, packed rows, meshes, bad input."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmods import partitioning
from jaxmods.backbones.llama import (
    Context,
    Llama,
    LlamaConfig,
    packed_positions,
    rope_of,
    run_cached,
    run_layers,
)
from jaxmods.nn.kv_cache import Decoding, Past, require_room, start
from jaxmods.nn.stack import unstack
from jaxmods.objectives.cross_entropy import IGNORE, next_token_labels, token_cross_entropy
from jaxmods.partitioning import MeshShape, make_mesh, sharding_for, tree_shardings, use_mesh

CONFIG = LlamaConfig(
    vocab_size=48,
    width=24,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    mlp=32,
    rope_theta=100.0,
)
MODEL = Llama(CONFIG)
LENGTHS = np.array([5, 9, 2, 7])
TOKENS = 16


@functools.cache
def parameters() -> Any:
    """Parameters whose logits differ between tokens by whole numbers."""
    init = jax.jit(lambda rng: MODEL.init(rng, jnp.zeros((1, 1), jnp.int32)))
    params = partitioning.unbox(init(jax.random.key(0)))["params"]
    return jax.tree.map(lambda x: x * 5 if x.ndim > 1 and x.shape[-1] > 2 else x, params)


def call(params: Any, *args: Any, **kwargs: Any) -> Any:
    return MODEL.apply({"params": params}, *args, **kwargs)


def ids_of(rows: int = 4, tokens: int = TOKENS, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, (rows, tokens))


@functools.cache
def full_logits() -> np.ndarray:
    """[4, TOKENS, V] by one pass over whole texts."""
    states = functools.partial(call, parameters())
    return np.asarray(jax.jit(lambda ids: states(states(ids), method="logits"))(ids_of()))


def close(a: Any, b: Any, tolerance: float = 1e-5) -> None:
    """Within `tolerance` of the largest value: the order of sums differs."""
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * float(np.abs(b).max()))


@pytest.mark.parametrize("form", ["scanned", "written out"])
def test_cached_decoding_equals_the_whole_pass(form: str) -> None:
    """Ragged prompts, then single tokens, then a ragged piece, then a token: the same logits."""
    params = parameters()
    if form == "written out":
        params = {**params, "layers": unstack(params["layers"])}
    ids, rows = ids_of(), np.arange(4)

    @jax.jit
    def run(params: Any, ids: jax.Array) -> Any:
        logits, state = call(params, ids[:, :9], LENGTHS, capacity=TOKENS, method="prefill")
        found = [(logits, state.lengths)]

        def read(state: Decoding, counts: Any) -> Decoding:
            at = jnp.minimum(state.lengths[:, None] + jnp.arange(max(counts)), TOKENS - 1)
            logits, state = call(
                params,
                jnp.take_along_axis(ids, at, axis=1),
                jnp.asarray(counts),
                state,
                method="extend",
            )
            found.append((logits, state.lengths))
            return state

        for counts in ((1, 1, 1, 1), (4, 1, 3, 2), (1, 1, 1, 1)):
            state = read(state, counts)
        return found

    for logits, lengths in run(params, ids):
        close(logits, full_logits()[rows, np.asarray(lengths) - 1])


def test_cache_in_half_precision() -> None:
    """bfloat16 keys and values: 8 bits of mantissa, logits within 1 % of their largest."""

    @jax.jit
    def run(params: Any, ids: jax.Array) -> Any:
        _, state = call(
            params,
            ids[:, :9],
            LENGTHS,
            capacity=12,
            cache_dtype=jnp.bfloat16,
            method="prefill",
        )
        token = jnp.take_along_axis(ids, state.lengths[:, None], axis=1)[:, 0]
        logits, after = call(params, token, state, method="decode_step")
        return logits, state.cache.k.dtype == after.cache.k.dtype == jnp.bfloat16

    logits, half = run(parameters(), ids_of())
    assert half
    close(logits, full_logits()[np.arange(4), LENGTHS], 1e-2)


def test_shared_prefix_equals_separate_prompts() -> None:
    """One prefix held once, ragged continuations, decoding, and rows taken out of the batch."""
    prefix_ids, ids = ids_of(1, 6, seed=1), ids_of()
    whole = np.concatenate([np.repeat(prefix_ids, 4, axis=0), ids], axis=1)
    kept = np.array([3, 1, 1])

    @jax.jit
    def shared(params: Any, ids: jax.Array) -> Any:
        # Padded on the right to eight: hidden tokens of a prefix stay hidden.
        padded = jnp.pad(prefix_ids, ((0, 0), (0, 2)))
        _, read = call(params, padded, jnp.array([6]), capacity=8, method="prefill")
        first, state = call(
            params,
            ids[:, :9],
            LENGTHS,
            capacity=12,
            prefix=read.as_prefix(),
            method="prefill",
        )
        state = state.take_rows(kept)
        token = jnp.take_along_axis(ids[kept], state.lengths[:, None], axis=1)[:, 0]
        return first, call(params, token, state, method="decode_step")[0]

    states = functools.partial(call, parameters())
    expected = jax.jit(lambda ids: states(states(ids), method="logits"))(whole)
    first, second = shared(parameters(), ids)
    close(first, expected[np.arange(4), 6 + LENGTHS - 1])
    close(second, expected[kept, 6 + LENGTHS[kept]])


def test_packed_rows_equal_separate_texts() -> None:
    """Two texts and padding in a row against each alone: states, loss and gradients."""
    ids = ids_of(1, TOKENS)
    cuts = ((0, 6), (6, 13))
    segments = np.repeat([[1, 2, 0]], 1, axis=0).repeat([6, 7, 3], axis=1)
    positions = packed_positions(jnp.asarray(segments))
    assert positions[0].tolist() == [*range(6), *range(7), *range(3)]
    labels = np.where(segments == 0, IGNORE, ids)
    labels[:, [0, 6]] = IGNORE  # the first token of a text is not predicted from the last one's

    def packed(params: Any) -> Any:
        states = call(params, ids, positions=positions, segments=segments)
        head = call(params, method="head")
        return token_cross_entropy(states, head, next_token_labels(labels)).loss, states

    def apart(params: Any) -> Any:
        head = call(params, method="head")
        total, found = jnp.zeros(()), []
        for begin, end in cuts:
            found.append(call(params, ids[:, begin:end]))
            result = token_cross_entropy(found[-1], head, next_token_labels(ids[:, begin:end]))
            total += result.loss * result.weight
        return total / 11, jnp.concatenate(found, axis=1)

    run = jax.jit(lambda p: [jax.value_and_grad(f, has_aux=True)(p) for f in (packed, apart)])
    ((loss, states), grads), ((loss2, states2), grads2) = run(parameters())
    close(states[:, :13], states2)
    close(loss, loss2, 1e-6)
    jax.tree.map(close, grads, grads2)


def test_layers_of_another_owner_in_between() -> None:
    """Groups of layers run one after the other, with one state for both: as one stack."""
    params, ids = parameters(), ids_of()
    first, second = (jax.tree.map(lambda x, n=n: x[n : n + 1], params["layers"]) for n in (0, 1))
    lengths = jnp.asarray(LENGTHS)

    @jax.jit
    def run(ids: jax.Array) -> Any:
        x = params["embedding"][ids]
        context = Context(rope_of(jnp.arange(TOKENS)[None], CONFIG))
        for group in (first, second):
            x = run_layers(group, x, context, CONFIG)

        y = params["embedding"][ids[:, :9]]
        context = Context(rope_of(jnp.arange(9)[None], CONFIG))
        fresh = {}
        for name, group in (("base", first), ("own", second)):
            y, fresh[name] = run_cached(group, y, context, (), CONFIG)
        state = start(fresh, lengths, lengths, capacity=12)

        token = jnp.take_along_axis(ids, state.lengths[:, None], axis=1)
        z = params["embedding"][token]
        context = Context(rope_of(state.positions[:, None], CONFIG))
        for name, group in (("base", first), ("own", second)):
            past = [Past(state.cache[name], state.lengths)]
            z, fresh[name] = run_cached(group, z, context, past, CONFIG)
        state = state.write(fresh, jnp.ones_like(lengths))
        return x, y, z[:, 0], state.lengths

    whole, prompts, after, filled = run(ids)
    for row, length in enumerate(LENGTHS):
        close(prompts[row, :length], whole[row, :length])
        close(after[row], whole[row, length])
    assert filled.tolist() == (LENGTHS + 1).tolist()


def test_sharded_equals_unsharded() -> None:
    """Loss and gradients of packed rows with biases, and cached decoding, over data, fsdp and
    tensor axes of two devices each."""
    config = dataclasses.replace(CONFIG, qkv_bias=True)
    model = Llama(config)
    mesh = make_mesh(MeshShape(data=2, fsdp=2, tensor=2))
    boxed = jax.eval_shape(
        lambda rng: model.init(rng, jnp.zeros((1, 1), jnp.int32))["params"], jax.random.key(0)
    )
    axes, shapes = partitioning.logical_axes(boxed), partitioning.unbox(boxed)
    shardings = tree_shardings(shapes, axes, mesh)
    assert "tensor" in shardings["layers"]["q"]["kernel"].spec
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(0)
    params = tree.unflatten(
        [rng.normal(0.3, 0.3, leaf.shape).astype(np.float32) for leaf in leaves]
    )
    ids = ids_of()
    segments = np.repeat([[1, 2]], 4, axis=0).repeat([5, 11], axis=1)

    def step(params: Any, ids: jax.Array, lengths: jax.Array) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            return model.apply({"params": params}, *args, **kwargs)

        def objective(params: Any) -> jax.Array:
            variables = {"params": params}
            positions = packed_positions(jnp.asarray(segments))
            states = model.apply(variables, ids, positions=positions, segments=segments)
            head = model.apply(variables, method="head")
            return token_cross_entropy(states, head, next_token_labels(ids), piece=8).loss

        loss, grads = jax.value_and_grad(objective)(params)
        _, state = call(ids[:, :9], lengths, capacity=12, method="prefill")
        logits, state = call(ids[:, 9], state, method="decode_step")
        return (loss, logits, state.cache.k), grads

    def traced(*args: Any) -> Any:
        with use_mesh(mesh):
            return step(*args)

    rows = [
        sharding_for(x.shape, ("batch",) + (None,) * (x.ndim - 1), mesh) for x in (ids, LENGTHS)
    ]
    placed = (jax.device_put(params, shardings), *map(jax.device_put, (ids, LENGTHS), rows))
    values, grads = jax.jit(traced, out_shardings=(None, shardings))(*placed)
    expected, expected_grads = jax.jit(step)(params, ids, LENGTHS)
    jax.tree.map(close, values, expected)
    jax.tree.map(close, grads, expected_grads)


def test_bad_input() -> None:
    ids = jnp.zeros((2, 4), jnp.int32)
    params = jax.eval_shape(lambda: MODEL.init(jax.random.key(0), ids))["params"]
    lengths = jnp.array([4, 4])

    def shape(*args: Any, **kwargs: Any) -> None:
        jax.eval_shape(lambda p: call(p, *args, **kwargs), partitioning.unbox(params))

    with pytest.raises(ValueError, match="ids or embeddings"):
        shape()
    with pytest.raises(ValueError, match=r"embeddings \[B, T, 24\], found \(2, 4, 8\)"):
        shape(embeddings=jnp.zeros((2, 4, 8)))
    with pytest.raises(ValueError, match=r"segments \[B, T\] = \(2, 4\), found \(2, 3\)"):
        shape(ids, segments=ids[:, :3])
    with pytest.raises(ValueError, match=r"need LlamaConfig\.rope_sections"):
        shape(ids, positions=jnp.zeros((3, 2, 4)))
    with pytest.raises(ValueError, match="prompts of at most 3 tokens, found 4"):
        shape(ids, lengths, capacity=3, method="prefill")
    with pytest.raises(ValueError, match=r"at most 12 tokens .* found \[13\] in row\(s\) \[1\]"):
        require_room([12, 13], 4, 16)
    with pytest.raises(ValueError, match=r"found none in row\(s\) \[0\]"):
        require_room([0, 3], 4, 16)
    require_room([12, 1], 4, 16)
    state = Decoding(None, lengths, lengths)
    with pytest.raises(ValueError, match="one row without a prefix, found 2"):
        state.as_prefix()
