"""The FLUX transformer without its reference: sizes, tokens, positions, meshes, errors."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmods import partitioning
from jaxmods.backbones.flux import (
    CONTROL,
    DEV,
    FILL,
    SCHNELL,
    FluxConfig,
    FluxTransformer,
    Tokens,
    apply_rope,
    forward_flops,
    grid_ids,
    pack,
    rope_table,
    text_ids,
    unpack,
)
from jaxmods.backbones.flux.blocks import Shared
from jaxmods.nn import lora
from jaxmods.nn.layers import Linear, dense
from jaxmods.nn.lora.adapters import LoraConfig
from jaxmods.nn.stack import run
from jaxmods.partitioning import MeshShape, make_mesh, sharding_for, tree_shardings, use_mesh
from jaxmods.systems.flux.base import FluxBase
from tests.flux_tiny import BATCH, GRID, MODEL, TEXT, TINY, apply, batch_of, boxed, call, params_of
from train.preflight.flops import count

# Sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (DEV, 11_901_408_320),
        (SCHNELL, 11_901_408_320 - 3072 * (256 + 3072 + 2)),
        (FILL, 11_901_408_320 + 3072 * (384 - 64)),
        (CONTROL, 11_901_408_320 + 3072 * (128 - 64)),
    ],
    ids=["dev", "schnell", "fill", "control"],
)
def test_published_parameter_counts(config: FluxConfig, parameters: int) -> None:
    found = partitioning.unbox(boxed(config))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(found)) == parameters


def test_operations() -> None:
    """Equal to the count of the program itself, and for dev to a count by hand.

    By hand, multiplications of one token: 12 D^2 per block of either kind, 57 blocks.
    """
    batch = jax.tree.map(jnp.asarray, batch_of(size=1))
    counted = count(jax.make_jaxpr(apply)(params_of(), batch))
    image = 2 * math.prod(GRID)
    assert counted.total == forward_flops(TINY, TEXT, image)
    assert counted.matmul == forward_flops(TINY, TEXT, image, attention=False)

    width, tokens = 3072, 512 + 4096
    by_hand = 57 * tokens * 12 * width**2 + 57 * 2 * tokens**2 * width
    by_hand += (19 * 12 + 38 * 3 + 2) * width**2  # modulation
    by_hand += (2 * (256 + width) + 768 + width) * width + 2 * 4096 * 64 * width
    by_hand += 512 * 4096 * width
    assert forward_flops(DEV, 512, 4096) == 2 * by_hand


def test_config_file() -> None:
    assert FluxConfig.from_hub_config(FILL.hub_config()) == FILL
    assert DEV.hub_config()["out_channels"] is None
    with pytest.raises(ValueError, match="FluxTransformer2DModel, found 'UNet"):
        FluxConfig.from_hub_config({"_class_name": "UNet2DConditionModel"})
    with pytest.raises(ValueError, match="patch_size 1, found 2"):
        FluxConfig.from_hub_config({"patch_size": 2})
    with pytest.raises(ValueError, match="mlp_ratio 4"):
        dataclasses.replace(DEV, mlp_ratio=3).hub_config()
    with pytest.raises(ValueError, match="rope_axes: expected even numbers with sum head_dim=8"):
        dataclasses.replace(TINY, rope_axes=(4, 2, 4))
    with pytest.raises(ValueError, match="single_layers=0"):
        dataclasses.replace(TINY, single_layers=0)


# Tokens and positions --------------------------------------------------------------------------


def test_packing() -> None:
    latents = np.random.default_rng(0).normal(size=(2, 4, 6, 3)).astype(np.float32)
    packed = np.asarray(pack(jnp.asarray(latents)))
    assert packed.shape == (2, 6, 12)
    for row, column, channel, y, x in np.ndindex(2, 3, 3, 2, 2):
        np.testing.assert_array_equal(
            packed[:, 3 * row + column, 4 * channel + 2 * y + x],
            latents[:, 2 * row + y, 2 * column + x, channel],
        )
    np.testing.assert_array_equal(unpack(jnp.asarray(packed), 4, 6), latents)
    with pytest.raises(ValueError, match="even number of latent rows and columns, found 4 x 5"):
        pack(jnp.zeros((1, 4, 5, 3)))
    with pytest.raises(ValueError, match=r"expected \[B, 2 \* 4, 4 Z\]"):
        unpack(jnp.asarray(packed), 4, 8)


def test_sizes_of_pictures() -> None:
    """Sides are multiples of 16: 8 of the autoencoder, 2 of the packing."""
    base = FluxBase()
    assert base.grid(1024, 768) == (128, 96)
    for height, width in ((1000, 768), (1024, 760), (0, 16)):
        with pytest.raises(ValueError, match=f"multiples of 16, found {height} x {width}"):
            base.grid(height, width)


def test_positions_of_grids() -> None:
    """Kontext's condition, and RefTON's of half the resolution."""
    assert grid_ids(2, 2, label=1).tolist() == [[1, 0, 0], [1, 0, 1], [1, 1, 0], [1, 1, 1]]
    half = grid_ids(1, 3, label=5, scale=2, offset=(1, 1))
    assert half.tolist() == [[5, 1, 1], [5, 1, 3], [5, 1, 5]]
    assert not text_ids(4).any()
    with pytest.raises(ValueError, match=r"ids \[S, axes\], found \[1, 5, 2\] and \[4, 3\]"):
        Tokens(jnp.zeros((1, 5, 2)), text_ids(4))


def test_rotation() -> None:
    """A multiplication of complex numbers by exp(i angle), in float64; bf16 in, bf16 out."""
    axes, ids = (4, 2, 2), np.array([[0, 0, 0], [1, 300, -7], [2, 1.5, 101]])
    table = rope_table(ids, axes)
    x = np.random.default_rng(0).normal(size=(2, 3, 3, 8))
    frequencies = [[1, 1e-2], [1], [1]]
    angles = np.concatenate(
        [ids[:, [a]] * np.asarray(f)[None] for a, f in enumerate(frequencies)], axis=1
    )
    turned = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)
    expected = np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)
    found = apply_rope(jnp.asarray(x, jnp.float32), table)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)  # products in float32
    half = apply_rope(jnp.asarray(x, jnp.bfloat16), table)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), expected, rtol=2**-7, atol=0.02)


def test_positions_from_the_data() -> None:
    """Tables per example give what the lists' own positions give, and only known ones are taken."""
    batch = jax.tree.map(jnp.asarray, batch_of())
    ids = np.concatenate([text_ids(TEXT), grid_ids(*GRID), grid_ids(*GRID, label=1)])
    per_example = rope_table(np.broadcast_to(ids, (BATCH, 1, *ids.shape)), TINY.rope_axes)
    forward = jax.jit(apply, static_argnums=2)
    expected = forward(params_of(), batch)
    found = forward(params_of(), batch, MODEL, per_example)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * float(jnp.abs(expected).max()))
    with pytest.raises(ValueError, match="found a traced value"):
        jax.jit(lambda ids: rope_table(ids, TINY.rope_axes))(ids)
    with pytest.raises(ValueError, match=r"ids \[S, 3\], found \[5, 2\]"):
        rope_table(np.zeros((5, 2)), TINY.rope_axes)


# The model -------------------------------------------------------------------------------------


def test_inputs_that_do_not_fit() -> None:
    batch = jax.tree.map(jnp.asarray, batch_of())
    with pytest.raises(ValueError, match=r"expected a scale per example.*config\.guidance=True"):
        apply(params_of(), batch | {"guidance": None})
    with pytest.raises(ValueError, match=r"found one with config\.guidance=False"):
        apply(params_of(), batch, FluxTransformer(dataclasses.replace(TINY, guidance=False)))
    with pytest.raises(ValueError, match=r"image tokens: expected \[B, S, 8\], found \[8, 8, 4\]"):
        apply(params_of(), batch | {"noise": batch["noise"][..., :4]})
    with pytest.raises(ValueError, match=r"text tokens: expected \[B, S, 16\]"):
        apply(params_of(), batch | {"text": batch["text"][..., :4]})


def test_start() -> None:
    """A fresh model answers zero, and its first gradient reaches the output layer."""
    batch = jax.tree.map(jnp.asarray, batch_of())

    @jax.jit
    def first(rng: jax.Array) -> tuple[jax.Array, Any]:
        params = partitioning.unbox(MODEL.init(rng, batch, method=call)["params"])
        last = params["proj_out"]

        def total(last: Any) -> tuple[jax.Array, jax.Array]:
            out = apply(params | {"proj_out": last}, batch)
            return jnp.sum(out), out

        gradient, out = jax.grad(total, has_aux=True)(last)
        return out, gradient

    out, gradient = first(jax.random.key(0))
    assert not out.any()
    assert gradient["kernel"].any()
    assert gradient["bias"].all()


def test_a_third_stream() -> None:
    """A stream with the text's weights does what more text tokens do."""
    params, batch = params_of(), jax.tree.map(jnp.asarray, batch_of())

    def streams(model: FluxTransformer, cut: bool) -> jax.Array:
        image = Tokens(batch["noise"], grid_ids(*GRID))
        text = Tokens(batch["text"], text_ids(TEXT))
        x = {"text": model.embed_text(text), "image": model.embed_image(image)}
        added = {}
        if cut:
            x = {"text": x["text"][:, :2], "more": x["text"][:, 2:], "image": x["image"]}
            added["more"] = params["double_blocks"]["text"]
        time = model.time(batch["time"], batch["guidance"], batch["pooled"])
        x = model.double(x, Shared(time, model.rope(text, image)), added=added)
        return jnp.concatenate([x["text"], *([x["more"]] if cut else []), x["image"]], axis=1)

    whole, parts = (MODEL.apply({"params": params}, cut, method=streams) for cut in (False, True))
    np.testing.assert_allclose(parts, whole, rtol=1e-5, atol=1e-5 * float(jnp.abs(whole).max()))


def test_low_rank_adapters() -> None:
    """On every linear layer; attached and merged are the same model."""
    config = LoraConfig(
        ("double_blocks/*/attn/to_*", "*/ff/*", "single_blocks/*", "*embedder*", "*_out/kernel"),
        rank=2,
    )
    base, batch = params_of(), jax.tree.map(jnp.asarray, batch_of())
    adapters = partitioning.unbox(lora.init(jax.random.key(0), boxed(TINY), config))
    kernels = [p for p, _ in jax.tree_util.tree_leaves_with_path(base) if p[-1].key == "kernel"]
    left_out = 2  # the modulation of the two streams
    assert len(jax.tree.leaves(adapters)) == 2 * (len(kernels) - left_out)
    adapters = jax.tree.map(
        lambda x: 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), adapters
    )
    forward = jax.jit(apply)
    found = forward(lora.attach(base, adapters, config), batch)
    expected = forward(lora.merge(base, adapters, config), batch)
    size = float(jnp.abs(expected).max())
    assert not np.allclose(forward(base, batch), expected, rtol=0, atol=0.01 * size)
    # Sums in another order through five blocks.
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * size)


def test_parts_of_an_input_side_by_side() -> None:
    rng = np.random.default_rng(0)
    x, kernel, a, b = (
        jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((3, 10), (10, 4), (10, 2), (2, 4))
    )
    params = {
        "kernel": kernel,
        "bias": jnp.arange(4.0),
        "lora": {"one": {"a": a, "b": b, "scale": jnp.float32(0.5)}},
    }
    np.testing.assert_allclose(
        dense(params, x[:, :3], x[:, 3:]), dense(params, x), rtol=1e-5, atol=1e-5
    )


def test_whole_numbers_among_the_layers() -> None:
    """Written out, as scanned, a stack may hold indices: they take no gradient."""
    layers = {"w": jnp.arange(1.0, 4.0), "n": jnp.arange(3)}

    def total(w: jax.Array, unroll: bool) -> jax.Array:
        return run(lambda p, x: p["w"] * x + p["n"], layers | {"w": w}, jnp.ones(()), unroll=unroll)

    assert (
        jax.grad(total)(layers["w"], True).tolist() == jax.grad(total)(layers["w"], False).tolist()
    )


# Meshes ----------------------------------------------------------------------------------------

MESHES = {
    "data x fsdp x tensor": MeshShape(data=2, fsdp=2, tensor=2),
    "fsdp": MeshShape(data=1, fsdp=8),
    "data x tensor": MeshShape(data=2, tensor=4),
    "data x context": MeshShape(data=4, context=2),
}


def value_and_grads(params: Any, batch: Any) -> tuple[jax.Array, Any]:
    def objective(params: Any) -> tuple[jax.Array, jax.Array]:
        out = apply(params, batch)
        return jnp.mean(jnp.square(out)), out

    (_, out), grads = jax.value_and_grad(objective, has_aux=True)(params)
    return out, grads


@functools.cache
def alone() -> tuple[Any, Any]:
    """The step on one device."""
    return jax.jit(value_and_grads)(params_of(), batch_of())


@pytest.mark.parametrize(
    "name",
    [
        "data x fsdp x tensor",
        "data x tensor",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("fsdp", "data x context")),
    ],
)
def test_same_step_on_every_mesh(name: str) -> None:
    assert jax.device_count() == 8
    mesh = make_mesh(MESHES[name])
    abstract = boxed(TINY)
    shardings = tree_shardings(
        partitioning.unbox(abstract), partitioning.logical_axes(abstract), mesh
    )
    batch = {
        k: jax.device_put(v, sharding_for(v.shape, ("batch", *[None] * (v.ndim - 1)), mesh))
        for k, v in batch_of().items()
    }

    def step(params: Any, batch: Any) -> Any:
        with use_mesh(mesh):
            return value_and_grads(params, batch)

    out, grads = jax.jit(step, out_shardings=(None, shardings))(
        jax.device_put(params_of(), shardings), batch
    )
    expected, expected_grads = alone()
    # Sums over devices are in another order; noise is measured against an array's largest entry.
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    largest = max(float(np.max(np.abs(g))) for g in jax.tree.leaves(expected_grads))
    for (path, found), wanted in zip(
        jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(expected_grads), strict=True
    ):
        limit = 1e-4 * float(np.max(np.abs(wanted))) + 1e-7 * largest
        np.testing.assert_allclose(
            found, wanted, rtol=0, atol=limit, err_msg=jax.tree_util.keystr(path)
        )


@pytest.mark.slow
def test_adapters_on_a_mesh() -> None:
    """Both factors are split; the step that trains them is that of one device."""
    config = LoraConfig(("double_blocks/*/attn/to_*", "*/ff/*", "single_blocks/*"), rank=2)
    mesh = make_mesh(MESHES["data x fsdp x tensor"])
    abstract = jax.eval_shape(lambda rng: lora.init(rng, boxed(TINY), config), jax.random.key(0))
    axes = partitioning.logical_axes(abstract)
    adapters = jax.tree.map(
        lambda x: 0.1 * jax.random.normal(jax.random.key(math.prod(x.shape)), x.shape),
        partitioning.unbox(abstract),
    )
    shardings = tree_shardings(adapters, axes, mesh)
    assert all("fsdp" in sharding.spec for sharding in jax.tree.leaves(shardings))
    base = params_of()
    base_axes = partitioning.logical_axes(boxed(TINY))

    def step(adapters: Any, base: Any, batch: Any) -> Any:
        def objective(adapters: Any) -> jax.Array:
            return jnp.mean(jnp.square(apply(lora.attach(base, adapters, config), batch)))

        return jax.value_and_grad(objective)(adapters)

    def on_mesh(*args: Any) -> Any:
        with use_mesh(mesh):
            return step(*args)

    batch = batch_of()
    value, grads = jax.jit(on_mesh, out_shardings=(None, shardings))(
        jax.device_put(adapters, shardings),
        jax.device_put(base, tree_shardings(base, base_axes, mesh)),
        {
            k: jax.device_put(v, sharding_for(v.shape, ("batch", *[None] * (v.ndim - 1)), mesh))
            for k, v in batch.items()
        },
    )
    expected, expected_grads = jax.jit(step)(adapters, base, batch)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    # As above: sums over devices are in another order.
    for found, wanted in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        limit = 1e-4 * float(np.max(np.abs(wanted)))
        np.testing.assert_allclose(found, wanted, rtol=0, atol=limit)


def test_product_that_the_partitioner_gets_wrong() -> None:
    """See `keep_whole`: without it, half of these rows are those of other devices."""
    mesh = make_mesh(MESHES["data x fsdp x tensor"])
    linear = Linear(4, ("heads", "embed"), use_bias=False)
    rng = np.random.default_rng(0)
    x, kernel, gate = (
        rng.integers(-4, 5, size).astype(np.float32) for size in ((8, 4), (4, 4), (8, 4))
    )
    axes = (("batch", "heads"), ("heads", "embed"), ("batch", "heads"))

    @jax.jit
    def gated(x: jax.Array, kernel: jax.Array, gate: jax.Array) -> jax.Array:
        with use_mesh(mesh):
            return gate * linear.apply({"params": {"kernel": kernel}}, x)

    split = [
        jax.device_put(a, sharding_for(a.shape, names, mesh))
        for a, names in zip((x, kernel, gate), axes, strict=True)
    ]
    np.testing.assert_array_equal(gated(*split), gate * (x @ kernel))  # whole numbers: exact


def test_parameters_are_split() -> None:
    """fsdp and tensor meshes divide all of dev but what is small."""
    abstract = boxed(DEV)
    shapes, axes = partitioning.unbox(abstract), partitioning.logical_axes(abstract)
    for shape, share in ((MESHES["fsdp"], 1 / 8), (MeshShape(data=1, tensor=8), 1 / 3.5)):
        shardings = tree_shardings(shapes, axes, make_mesh(shape))
        held = sum(
            math.prod(sharding.shard_shape(leaf.shape))
            for leaf, sharding in zip(
                jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True
            )
        )
        assert held < 1.01 * share * 11_901_408_320
