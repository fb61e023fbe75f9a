"""Weights of the FLUX transformer: two layouts, to the bit; adapters and files that do not fit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmods import partitioning
from jaxmods.backbones.flux import BFL_PREFIX, Layout, find_layout, flux_map
from jaxmods.nn import lora
from jaxmods.weights import (
    Reorder,
    WeightError,
    WeightMap,
    export_params,
    export_tensors,
    import_params,
    memory_reader,
    open_weights,
    report,
)
from jaxmods.weights.lazy import from_numpy, same_bits
from tests.flux_tiny import TINY, boxed


def random_bits(weight_map: WeightMap, abstract: Any, dtype: Any) -> dict[str, np.ndarray]:
    """A state dict of any bits, NaNs among them."""
    rng = np.random.default_rng(0)
    size = jnp.dtype(dtype).itemsize
    return {
        key: rng.integers(0, 256, (*shape[:-1], shape[-1] * size), np.uint8).view(dtype)
        for key, shape in weight_map.torch_shapes(abstract).items()
    }


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("layout", ["diffusers", "bfl"])
def test_round_trip_keeps_every_bit(layout: Layout, dtype: Any) -> None:
    weight_map = flux_map(TINY, layout)
    abstract = partitioning.unbox(boxed(TINY))
    state = random_bits(weight_map, abstract, dtype)
    with memory_reader(state) as reader:
        params = import_params(reader, weight_map, abstract).params
    back = export_tensors(params, weight_map)
    assert back.keys() == state.keys()
    assert all(same_bits(back[key].all(), value) for key, value in state.items())


def test_layouts() -> None:
    abstract = partitioning.unbox(boxed(TINY))
    keys = {
        name: list(flux_map(TINY, name).torch_shapes(abstract)) for name in ("diffusers", "bfl")
    }
    assert find_layout(keys["diffusers"]) == ("diffusers", "")
    assert find_layout(keys["bfl"]) == ("bfl", "")
    assert find_layout(BFL_PREFIX + key for key in keys["bfl"]) == ("bfl", BFL_PREFIX)
    with pytest.raises(WeightError, match=r"expected transformer_blocks\.\*.*first keys: encoder"):
        find_layout(["encoder.conv_in.weight"])


@pytest.mark.parametrize(
    ("layout", "prefix"), [("diffusers", ""), ("bfl", ""), ("bfl", BFL_PREFIX)]
)
def test_one_file_becomes_the_other(layout: Layout, prefix: str, tmp_path: Path) -> None:
    """As the system's README says it: read whatever it is, write either."""
    abstract = partitioning.unbox(boxed(TINY))
    given = flux_map(TINY, layout).under(prefix)
    state = random_bits(given, abstract, np.float32)
    with memory_reader(state) as reader:
        params = import_params(reader, given, abstract).params
    export_params(params, given, tmp_path / "given", stem="flux")
    with open_weights(tmp_path / "given") as reader:
        found, before = find_layout(reader.tensors)
        assert (found, before) == (layout, prefix)
        weight_map = flux_map(TINY, found).under(before)
        read = import_params(reader, weight_map, abstract).params
    other = flux_map(TINY, "bfl" if layout == "diffusers" else "diffusers")
    export_params(read, other, tmp_path / "other", TINY.hub_config(), stem="flux")
    with open_weights(tmp_path / "other") as reader:
        back = export_tensors(import_params(reader, other, abstract).params, given)
        assert all(same_bits(back[key].all(), value) for key, value in state.items())


def test_files_that_do_not_fit() -> None:
    abstract = partitioning.unbox(boxed(TINY))
    weight_map = flux_map(TINY)
    state = random_bits(weight_map, abstract, np.float32)
    state["extra.weight"] = state.pop("transformer_blocks.1.attn.to_out.0.bias")
    state["x_embedder.weight"] = state["x_embedder.weight"][:, :4]
    with memory_reader(state) as reader:
        text = str(report(reader, weight_map, abstract))
        with pytest.raises(WeightError, match=r"transformer_blocks\.1\.attn\.to_out\.0\.bias"):
            import_params(reader, weight_map, abstract)
    assert "extra.weight" in text
    assert "x_embedder.weight" in text
    schnell = dataclasses.replace(TINY, guidance=False)
    with (
        memory_reader(random_bits(weight_map, abstract, np.float32)) as reader,
        pytest.raises(WeightError, match="guidance_embedder"),
    ):
        import_params(reader, flux_map(schnell), partitioning.unbox(boxed(schnell)))


def test_adapters_that_do_not_fit() -> None:
    """Of another model, of a wider FLUX, and of two ranks."""
    base, names = partitioning.unbox(boxed(TINY)), lora.Published(flux_map(TINY))

    def read(module: str, down: tuple[int, int], up: tuple[int, int], ends: str = "AB") -> None:
        halves = {"AB": ("lora_A.weight", "lora_B.weight"), "du": ("lora_down", "lora_up")}[ends]
        tensors = {
            f"{module}.{half}": np.zeros(shape, np.float32)
            for half, shape in zip(halves, (down, up), strict=True)
        }
        lora.load(memory_reader(tensors), base, [names])

    width = TINY.width
    query = "transformer.transformer_blocks.0.attn.to_q"
    read(query, (2, width), (width, 2))
    unet = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    with pytest.raises(WeightError, match="none of its 2 keys belong to adapters of this model"):
        read(unet, (2, width), (width, 2))
    with pytest.raises(WeightError, match="none of its 2 keys belong to adapters of this model"):
        read("lora_unet_down_blocks_1_attentions_0_proj_in", (2, width), (width, 2), "du")
    with pytest.raises(WeightError, match=r"expected shape \[2, 32\], found \[2, 64\]; .*size"):
        read(query, (2, 2 * width), (2 * width, 2))
    with pytest.raises(WeightError, match=r"expected shape \[32, 2\], found \[32, 3\]; .*ranks"):
        read(query, (2, width), (width, 3))


def test_reordered_parts() -> None:
    """Part n of JAX is part order[n] of PyTorch, read whole or in pieces."""
    values = np.arange(24.0).reshape(2, 12)
    transform = Reorder(axis=-1, order=(2, 0, 1))
    (moved,) = transform.to_jax((from_numpy(values, "w"),), ((2, 12),))
    expected = np.concatenate([values[:, 8:], values[:, :4], values[:, 4:8]], axis=1)
    np.testing.assert_array_equal(moved.all(), expected)
    np.testing.assert_array_equal(moved.read(((1, 2), (3, 9))), expected[1:2, 3:9])
    (back,) = transform.to_torch((from_numpy(expected, "w"),), 1)
    np.testing.assert_array_equal(back.all(), values)
    with pytest.raises(ValueError, match="cannot be divided into 3 equal parts"):
        transform.torch_shapes(((2, 10),), 1)
    with pytest.raises(ValueError, match=r"order of 0\.\.n-1, found \(0, 2\)"):
        Reorder(axis=0, order=(0, 2))
