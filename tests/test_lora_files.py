"""Adapter files: dialects, layouts, where the scale is stated, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxmods import partitioning
from jaxmods.nn import lora
from jaxmods.nn.lora import Published
from jaxmods.system import Params
from jaxmods.weights import (
    Entry,
    Fuse,
    Linear,
    WeightError,
    WeightMap,
    import_params,
    memory_reader,
    open_weights,
)
from jaxmods.weights.lazy import from_numpy
from jaxmods.weights.map import flatten
from jaxmods.weights.writer import write_safetensors
from tests import lora_toy

APART, FUSED = Published(lora_toy.apart_map()), Published(lora_toy.fused_map())
BOTH = (APART, FUSED)
TARGETS = ("blocks/*/kernel", "head/kernel")


@pytest.fixture(scope="module")
def base() -> Params:
    return partitioning.unbox(jax.eval_shape(lora_toy.boxed, jax.random.key(0)))


def drawn(base: Params, targets: tuple[str, ...] = TARGETS, rank: int = 2, seed: int = 0) -> Params:
    """Adapters of random numbers."""
    rng = np.random.default_rng(seed)
    config = lora.LoraConfig(targets, rank)
    shapes = partitioning.unbox(jax.eval_shape(lambda: lora.init(jax.random.key(0), base, config)))
    return jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), shapes)


def updates(base: Params, adapters: Params, config: lora.LoraConfig) -> dict[str, np.ndarray]:
    """scale * a b by path."""
    return {
        path: config.scale * np.asarray(f.a) @ np.asarray(f.b)
        for path, by_name in lora.sites(base, adapters).items()
        for f in by_name.values()
    }


def assert_same_updates(
    base: Params, one: tuple[Params, lora.LoraConfig], two: tuple[Params, lora.LoraConfig]
) -> None:
    """Equal products; 1e-5 is the rounding of fp32 sums of a dozen numbers of order 1."""
    expected = updates(base, *two)
    found = updates(base, *one)
    assert found.keys() == expected.keys()
    for path in expected:
        np.testing.assert_allclose(found[path], expected[path], atol=1e-5)


def write(folder: Path, name: str, tensors: dict[str, Any], metadata: Any = None) -> Path:
    folder.mkdir(exist_ok=True)
    lazies = {k: from_numpy(np.asarray(v), k) for k, v in tensors.items()}
    write_safetensors(folder / name, lazies, metadata=metadata)
    return folder / name


def pair(out: int, wide: int, rank: int = 2, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    draw = rng.normal(size=(rank, wide)), rng.normal(size=(out, rank))
    return draw[0].astype(np.float32), draw[1].astype(np.float32)


@pytest.mark.parametrize("dialect", ["peft", "diffusers", "kohya"])
def test_round_trip_is_bit_equal(base: Params, tmp_path: Path, dialect: lora.Dialect) -> None:
    config = lora.LoraConfig(TARGETS, rank=2, alpha=3.0)
    adapters = drawn(base)
    ranks = lora.save(tmp_path / "out", adapters, config, base, [APART], dialect=dialect)
    assert set(ranks.values()) == {2}
    assert len(ranks) == 3 * 5 + 1
    loaded = lora.load(tmp_path / "out", base, BOTH)
    assert (loaded.dialect, loaded.modules, loaded.ignored) == (dialect, 16, ())
    assert (
        loaded.alpha_from == {"peft": "config", "diffusers": "metadata", "kohya": "keys"}[dialect]
    )
    assert (loaded.config.rank, loaded.config.alpha) == (2, 3.0)
    assert set(loaded.config.targets) == set(lora.chosen(base, TARGETS))
    assert flatten(loaded.adapters).keys() == flatten(adapters).keys()
    for path, leaf in flatten(adapters).items():
        np.testing.assert_array_equal(flatten(loaded.adapters)[path], leaf)
    again = lora.save(
        tmp_path / "again", loaded.adapters, loaded.config, base, [APART], dialect=dialect
    )
    assert again == ranks
    for file in (tmp_path / "out").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_keys_and_statements_of_each_dialect(base: Params, tmp_path: Path) -> None:
    config = lora.LoraConfig(TARGETS, rank=2, alpha=3.0, dropout=0.1, init="gaussian")
    for dialect in ("peft", "diffusers", "kohya"):
        lora.save(
            tmp_path / dialect,
            drawn(base),
            config,
            base,
            [APART],
            dialect=dialect,
            base_model="owner/base",
            dtype="bfloat16",
        )
    peft = open_weights(tmp_path / "peft" / "adapter_model.safetensors")
    assert peft.tensors["base_model.model.blocks.2.attn.to_q.lora_A.weight"].shape == (2, 8)
    assert {t.dtype.name for t in peft.tensors.values()} == {"bfloat16"}
    stated = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert stated["r"] == 2
    assert stated["lora_alpha"] == 3
    assert stated["lora_dropout"] == 0.1
    assert stated["base_model_name_or_path"] == "owner/base"
    assert stated["init_lora_weights"] == "gaussian"
    # "proj_out" as a suffix would stand for blocks.i.proj_out and for the head, which is meant.
    assert stated["target_modules"] == ["attn.to_k", "attn.to_q", "attn.to_v", "mlp", "proj_out"]

    diffusers = open_weights(tmp_path / "diffusers")
    assert diffusers.tensors["transformer.proj_out.lora_B.weight"].shape == (5, 2)
    header = json.loads(diffusers.metadata["lora_adapter_metadata"])
    assert header["transformer.lora_alpha"] == 3
    assert header["transformer.r"] == 2
    assert diffusers.metadata["format"] == "pt"

    kohya = open_weights(tmp_path / "kohya")
    assert kohya.tensors["lora_unet_blocks_0_attn_to_q.lora_down.weight"].shape == (2, 8)
    assert float(kohya.tensors["lora_unet_blocks_0_attn_to_q.alpha"].all()) == 3.0
    assert kohya.metadata["ss_network_dim"] == "2"
    assert kohya.metadata["ss_network_alpha"] == "3.0"


def test_targets_that_a_suffix_would_overreach_become_one_expression(
    base: Params, tmp_path: Path
) -> None:
    config = lora.LoraConfig(("head/kernel",), rank=2)
    lora.save(tmp_path / "x", drawn(base, config.targets), config, base, [APART], dialect="peft")
    stated = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    assert stated["target_modules"] == r"proj_out"  # a string: fullmatch, so the head alone


@pytest.mark.parametrize("dialect", ["peft", "diffusers", "kohya"])
def test_fused_modules_keep_what_is_shared(
    base: Params, tmp_path: Path, dialect: lora.Dialect
) -> None:
    """One pair on a fused qkv+mlp module becomes four kernels' factors and comes back bit-equal;
    trained apart, the same module needs the ranks of all four."""
    A, B = pair(8 * 3 + 12, 8)
    A2, B2 = pair(8, 8 + 12, seed=1)
    stem = {
        "peft": "base_model.model.single_blocks.{}",
        "diffusers": "diffusion_model.single_blocks.{}",
        "kohya": "lora_unet_single_blocks_{}",
    }[dialect]
    dot, down, up = (
        ("_", "lora_down", "lora_up") if dialect == "kohya" else (".", "lora_A", "lora_B")
    )
    tensors: dict[str, Any] = {}
    for layer in range(3):
        for name, (a, b) in {"linear1": (A + layer, B - layer), "linear2": (A2, B2)}.items():
            key = stem.format(layer) + dot + name
            tensors |= {f"{key}.{down}.weight": a, f"{key}.{up}.weight": b}
            if dialect == "kohya":
                tensors[f"{key}.alpha"] = np.asarray(1.0, np.float32)
    file = write(tmp_path / "in", "x.safetensors", tensors)
    loaded = lora.load(file, base, BOTH)
    assert (loaded.dialect, loaded.modules, loaded.config.rank) == (dialect, 6, 2)
    assert loaded.config.scale == (0.5 if dialect == "kohya" else 1.0)
    assert loaded.alpha_from == ("keys" if dialect == "kohya" else "assumed")
    for layer in range(3):
        whole = loaded.config.scale * (A + layer).T @ (B - layer).T
        mine = updates(base, loaded.adapters, loaded.config)
        parts = [mine[f"blocks/{n}/kernel"][layer] for n in ("to_q", "to_k", "to_v", "mlp")]
        np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=1e-5)
        np.testing.assert_allclose(
            mine["blocks/out/kernel"][layer], loaded.config.scale * A2.T @ B2.T, atol=1e-5
        )
    ranks = lora.save(
        tmp_path / "out", loaded.adapters, loaded.config, base, [FUSED], dialect=dialect
    )
    assert set(ranks.values()) == {2}
    back = open_weights(next((tmp_path / "out").glob("*.safetensors"))).tensors
    for key, tensor in tensors.items():
        key = key.replace("diffusion_model.", "transformer.")
        np.testing.assert_array_equal(back[key].all(), tensor)

    apart = drawn(base, ("blocks/*/kernel",))
    ranks = lora.save(tmp_path / "apart", apart, loaded.config, base, [FUSED], dialect=dialect)
    assert ranks == {
        f"single_blocks.{i}.{n}": r for i in range(3) for n, r in (("linear1", 8), ("linear2", 2))
    }
    again = lora.load(tmp_path / "apart", base, BOTH)
    assert_same_updates(base, (again.adapters, again.config), (apart, loaded.config))


def test_several_modules_in_one_kernel() -> None:
    """A kernel that fuses q and v: the ranks stand side by side, and come apart again."""
    base = {"qv": {"kernel": jax.ShapeDtypeStruct((2, 4, 5 + 3), np.float32)}}
    names = Published(
        WeightMap(
            (
                Entry(
                    ("layers.{i}.q.weight", "layers.{i}.v.weight"),
                    "qv/kernel",
                    Linear() >> Fuse(axis=1, sizes=(5, 3)),
                ),
            )
        )
    )
    (Aq, Bq), (Av, Bv) = pair(5, 4), pair(3, 4, seed=1)
    tensors = {
        "transformer.layers.1.q.lora_A.weight": Aq,
        "transformer.layers.1.q.lora_B.weight": Bq,
        "transformer.layers.1.v.lora_A.weight": Av,
        "transformer.layers.1.v.lora_B.weight": Bv,
    }
    loaded = lora.load(memory_reader(tensors), base, [names])
    found = updates(base, loaded.adapters, loaded.config)["qv/kernel"]
    np.testing.assert_array_equal(found[0], 0.0)
    np.testing.assert_allclose(found[1], np.concatenate([Aq.T @ Bq.T, Av.T @ Bv.T], 1), atol=1e-6)
    with pytest.raises(ValueError, match="shares a kernel with a module that is targeted"):
        lora.targets_of(names, base, ["q"])
    assert lora.targets_of(names, base, ["q", "v"]) == ("qv/kernel",)


def test_several_modules_in_one_kernel_come_apart(tmp_path: Path) -> None:
    base = {"qv": {"kernel": jax.ShapeDtypeStruct((4, 8), np.float32)}}
    entry = Entry(("q.weight", "v.weight"), "qv/kernel", Linear() >> Fuse(axis=1))
    names = Published(WeightMap((entry,)))
    tensors = {}
    for seed, name in enumerate(("q", "v")):
        A, B = pair(4, 4, seed=seed)
        tensors |= {f"transformer.{name}.lora_A.weight": A, f"transformer.{name}.lora_B.weight": B}
    loaded = lora.load(memory_reader(tensors), base, [names])
    assert loaded.adapters["default"]["qv"]["a"].shape == (4, 4)
    lora.save(tmp_path / "x", loaded.adapters, loaded.config, base, [names], dialect="diffusers")
    back = open_weights(tmp_path / "x" / "pytorch_lora_weights.safetensors").tensors
    assert back.keys() == tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(back[key].all(), tensor)


def test_layers_ranks_and_scales_may_differ(base: Params, tmp_path: Path) -> None:
    """Two layers of three; rank 2 and 3; kohya's alpha per module."""
    tensors: dict[str, Any] = {}
    expected = {}
    for layer, rank, alpha in ((0, 2, 1.0), (2, 3, 6.0)):
        A, B = pair(8, 8, rank, seed=layer)
        stem = f"lora_unet_blocks_{layer}_attn_to_v"
        tensors |= {f"{stem}.lora_down.weight": A, f"{stem}.lora_up.weight": B}
        tensors[f"{stem}.alpha"] = np.asarray(alpha, np.float32)
        expected[layer] = alpha / rank * A.T @ B.T
    loaded = lora.load(write(tmp_path / "a", "x.safetensors", tensors), base, [APART])
    found = updates(base, loaded.adapters, loaded.config)["blocks/to_v/kernel"]
    for layer in range(3):
        np.testing.assert_allclose(found[layer], expected.get(layer, np.zeros((8, 8))), atol=1e-5)

    ranks = lora.save(tmp_path / "p", loaded.adapters, loaded.config, base, [APART], dialect="peft")
    assert ranks == {"blocks.0.attn.to_v": 2, "blocks.2.attn.to_v": 3}
    stated = json.loads((tmp_path / "p" / "adapter_config.json").read_text())
    assert stated["rank_pattern"] == {r"^blocks\.2\.attn\.to_v": 3}
    assert stated["target_modules"] == r"blocks\.0\.attn\.to_v|blocks\.2\.attn\.to_v"
    again = lora.load(tmp_path / "p", base, [APART])
    assert_same_updates(base, (again.adapters, again.config), (loaded.adapters, loaded.config))


def test_where_the_scale_is_stated(base: Params, tmp_path: Path) -> None:
    A, B = pair(8, 8)
    key = "transformer.blocks.1.attn.to_q"
    plain = {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B}

    def scale(**options: Any) -> tuple[float, str]:
        loaded = lora.load(file, base, [APART], **options)
        return loaded.config.scale, loaded.alpha_from

    file = write(tmp_path / "a", "x.safetensors", plain)
    assert scale() == (1.0, "assumed")
    assert scale(alpha=5.0) == (2.5, "given")
    file = write(tmp_path / "b", "x.safetensors", {**plain, f"{key}.alpha": np.float32(3)})
    assert scale() == (1.5, "keys")
    header = {"transformer.r": 2, "transformer.lora_alpha": 8, "transformer.use_rslora": True}
    metadata = {"lora_adapter_metadata": json.dumps(header)}
    file = write(
        tmp_path / "c", "x.safetensors", {**plain, f"{key}.alpha": np.float32(3)}, metadata
    )
    assert scale() == (pytest.approx(8 / 2**0.5), "metadata")
    assert lora.load(file, base, [APART]).config.rslora
    assert scale(alpha=5.0) == (2.5, "given")
    pattern = {
        **header,
        "transformer.alpha_pattern": {"attn.to_q": 4},
        "transformer.use_rslora": False,
    }
    file = write(
        tmp_path / "d", "x.safetensors", plain, {"lora_adapter_metadata": json.dumps(pattern)}
    )
    assert scale() == (2.0, "metadata")
    text = json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4})
    file = write(tmp_path / "e", "adapter_model.safetensors", plain)
    (tmp_path / "e" / "adapter_config.json").write_text(text)
    assert scale() == (2.0, "config")


def test_old_and_wrapped_names_are_known(base: Params) -> None:
    A, B = pair(8, 8)
    for prefix, down, up in (
        ("transformer.", "lora.down.weight", "lora.up.weight"),
        ("", "lora_A.weight", "lora_B.weight"),
        ("model.diffusion_model.", "lora_A.default.weight", "lora_B.default.weight"),
        ("transformer.module.", "lora_down.weight", "lora_up.weight"),
    ):
        stem = f"{prefix}blocks.0.attn.to_q"
        reader = memory_reader({f"{stem}.{down}": A, f"{stem}.{up}": B})
        loaded = lora.load(reader, base, [APART], name="mine")
        np.testing.assert_array_equal(loaded.adapters["mine"]["blocks"]["to_q"]["a"][0], A.T)


def good() -> dict[str, np.ndarray]:
    A, B = pair(8, 8)
    key = "transformer.blocks.0.attn.to_q"
    return {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "expected the tensors of adapters, found none"),
        (
            {
                "unet.down.lora_A.weight": np.zeros((2, 8)),
                "unet.down.lora_B.weight": np.zeros((8, 2)),
            },
            r"none of its 2 keys belong to adapters of this model; unknown: unet.down\.\.\. \(2\)",
        ),
        (
            {**good(), "text_encoder.q.lora_A.weight": np.zeros((2, 8))},
            r"all but 1 of its 3 keys .* text_encoder.q\.\.\. \(1\)",
        ),
        (
            {**good(), "lora_te1_text_model.lora_down.weight": np.zeros((2, 8))},
            r"lora_te1\.\.\. \(1\)",
        ),
        (
            {**good(), "transformer.blocks.0.attn.to_q.dora_scale": np.zeros(8)},
            "look like DoRA, which is not supported",
        ),
        (
            {"transformer.blocks.0.attn.to_q.lora_A.weight": np.zeros((2, 8))},
            "blocks.0.attn.to_q has transformer.*lora_A.weight, but no up matrix",
        ),
        (
            {**good(), "transformer.blocks.0.attn.to_q.lora_A.weight": np.zeros((2, 9))},
            r"lora_A.weight: expected shape \[2, 8\], found \[2, 9\]; .* another size",
        ),
        (
            {**good(), "transformer.blocks.0.attn.to_q.lora_B.weight": np.zeros((8, 3))},
            r"lora_B.weight: expected shape \[8, 2\], found \[8, 3\]; .* ranks do not agree",
        ),
        (
            {**good(), "blocks.0.attn.to_q.lora_A.weight": np.zeros((2, 8))},
            "found two tensors for blocks.0.attn.to_q",
        ),
    ],
)
def test_files_that_do_not_fit(base: Params, tensors: dict[str, Any], message: str) -> None:
    with pytest.raises(WeightError, match=message):
        lora.load(memory_reader(tensors), base, BOTH)


def test_other_parts_are_ignored_only_when_named(base: Params) -> None:
    tensors = {**good(), "text_encoder.q.lora_A.weight": np.zeros((2, 8))}
    loaded = lora.load(memory_reader(tensors), base, [APART], ignore=("text_encoder.*",))
    assert loaded.ignored == ("text_encoder.q.lora_A.weight",)
    assert loaded.modules == 1
    with pytest.raises(WeightError, match="expected the tensors of adapters, found none"):
        lora.load(memory_reader(tensors), base, [APART], ignore=("t*",))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "LOHA"}, "expected peft_type LORA, found LOHA"),
        ({"use_dora": True}, "use_dora is set, which is not supported"),
        ({"bias": "all"}, "expected bias 'none', found 'all'"),
        ([1], "expected a JSON object, found list"),
    ],
)
def test_configs_that_are_no_plain_lora(
    base: Params, tmp_path: Path, config: Any, message: str
) -> None:
    write(tmp_path / "x", "adapter_model.safetensors", good())
    (tmp_path / "x" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(WeightError, match=message):
        lora.load(tmp_path / "x", base, [APART])
    (tmp_path / "x" / "adapter_config.json").write_text("{")
    with pytest.raises(WeightError, match="not valid JSON"):
        lora.load(tmp_path / "x", base, [APART])


def test_exports_that_cannot_be(base: Params, tmp_path: Path) -> None:
    config = lora.LoraConfig(TARGETS, rank=2)
    adapters = drawn(base)
    several = {"a": adapters["default"], "b": adapters["default"]}
    with pytest.raises(WeightError, match=r"expected one adapter, found \['a', 'b'\]"):
        lora.save(tmp_path / "x", several, config, base, [APART], dialect="peft")
    with pytest.raises(WeightError, match="PEFT files hold one model"):
        lora.save(tmp_path / "x", adapters, config, base, BOTH, dialect="peft")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(WeightError, match="exists already"):
        lora.save(tmp_path / "full", adapters, config, base, [APART], dialect="kohya")
    whole = {"net": base, "other": {"kernel": jax.ShapeDtypeStruct((2, 2), np.float32)}}
    part = Published(APART.weight_map, path="net")
    outside = drawn(whole, ("other/kernel",))
    with pytest.raises(WeightError, match=r"no published module covers .* other/kernel"):
        lora.save(tmp_path / "x", outside, config, whole, [part], dialect="peft")
    with pytest.raises(WeightError, match=r"expected a part 'nets', found \['net', 'other'\]"):
        lora.load(memory_reader(good()), whole, [Published(APART.weight_map, path="nets")])
    assert not (tmp_path / "x").exists()


def test_models_of_several_parts(base: Params, tmp_path: Path) -> None:
    """Two models in one tree and one file, each with its own names."""
    whole = {"unet": base, "text": base}
    parts = [
        Published(APART.weight_map, "unet", "lora_unet", path="unet"),
        Published(APART.weight_map, "text_encoder", "lora_te", path="text"),
    ]
    config = lora.LoraConfig(("*/head/kernel",), rank=2, alpha=1.0)
    adapters = drawn(whole, config.targets)
    for dialect in ("diffusers", "kohya"):
        lora.save(tmp_path / dialect, adapters, config, whole, parts, dialect=dialect)
        loaded = lora.load(tmp_path / dialect, whole, parts)
        assert loaded.modules == 2
        assert loaded.config.alpha == 1.0
        for path, leaf in flatten(adapters).items():
            np.testing.assert_array_equal(flatten(loaded.adapters)[path], leaf)


def test_targets_by_published_names(base: Params) -> None:
    paths = lora.targets_of(APART, base, ["attn.to_q", "mlp"])
    assert set(paths) == {"blocks/to_q/kernel", "blocks/mlp/kernel"}
    assert set(lora.targets_of(APART, base, ["proj_out"])) == {"head/kernel", "blocks/out/kernel"}
    assert lora.targets_of(APART, base, r"proj_out") == ("head/kernel",)
    assert set(lora.targets_of(APART, base, r"blocks\.\d\.attn\..*")) == {
        f"blocks/to_{n}/kernel" for n in "qkv"
    }
    with pytest.raises(ValueError, match=r"no match for attn.to_z, q; .* named like inp"):
        lora.targets_of(APART, base, ["attn.to_z", "mlp", "q"])
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp shares a kernel"):
        lora.targets_of(APART, base, r"blocks\.1\.mlp")


def test_one_map_for_base_and_adapters(base: Params) -> None:
    """A base checkpoint imports into a system with adapters; their keys are reported missing."""
    config = lora.LoraConfig(("blocks/*/kernel",), rank=2)
    adapters = drawn(base, config.targets)
    params = {"transformer": base, "lora": adapters}
    weight_map = APART.weight_map.under("transformer.", "transformer/") + WeightMap(
        lora.entries(APART, base, lora.chosen(base, config.targets))
    )
    rng = np.random.default_rng(0)
    state = {
        key: rng.normal(size=shape).astype(np.float32)
        for key, shape in weight_map.torch_shapes(params).items()
    }
    assert state["transformer.blocks.2.proj_out.lora_A.weight"].shape == (2, 20)
    only_base = {k: v for k, v in state.items() if "lora" not in k}
    imported, missing = import_params(memory_reader(only_base), weight_map, params)
    assert missing == state.keys() - only_base.keys()
    assert not np.any(imported["lora"]["default"]["blocks"]["out"]["a"])
    imported, missing = import_params(memory_reader(state), weight_map, params)
    assert not missing
    key = "transformer.blocks.1.attn.to_k.lora_B.weight"
    np.testing.assert_array_equal(
        imported["lora"]["default"]["blocks"]["to_k"]["b"][1], state[key].T
    )
    with pytest.raises(WeightError, match="to be one linear module, found Entry"):
        lora.entries(FUSED, base, lora.chosen(base, config.targets))
    with pytest.raises(WeightError, match="no kernels at a/kernel in this map"):
        lora.entries(APART, base, ("a/kernel",))


def test_headers_hold_texts_only(base: Params, tmp_path: Path) -> None:
    file = write(tmp_path / "x", "x.safetensors", good(), {"r": 2})
    with pytest.raises(WeightError, match="expected texts by name under __metadata__"):
        lora.load(file, base, [APART])
