"""IAA as a system: order of layers, frozen base, what trains, caches, imports, merging."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import save_file

from configs import iaa as recipes
from jaxmods.backbones.clip import VisionConfig
from jaxmods.backbones.llama import Llama, LlamaConfig
from jaxmods.partitioning import logical_axes, unbox
from jaxmods.systems.iaa import IAA_14, Iaa, load_grounding
from jaxmods.systems.iaa.assemble import assemble
from jaxmods.systems.iaa.layers import Group, interleave, plan
from jaxmods.systems.iaa.weights import VISION
from jaxmods.weights import (
    WeightError,
    export_params,
    export_tensors,
    import_params,
    memory_reader,
    open_weights,
)

LLAMA = LlamaConfig(
    vocab_size=40, width=16, layers=4, heads=2, kv_heads=1, head_dim=8, mlp=24, bos_id=0,
    eos_ids=(1,),
)  # fmt: skip
SYSTEM = Iaa(
    llama=LLAMA,
    vision=VisionConfig(width=12, layers=2, heads=2, mlp=16, image_size=16, patch_size=8),
    insert_after=(0, 2, 5),  # the last one never runs
    max_tokens=10,
    prompt_tokens=8,
    new_tokens=5,
    stop_ids=(1,),
    pad_id=2,
)


@functools.cache
def params() -> dict[str, Any]:
    """Random everything, scaled up so that paths differ visibly."""
    tree = unbox(jax.jit(SYSTEM.init)(jax.random.key(0)))
    return jax.tree.map(lambda x: 5 * x if x.ndim > 1 else x, tree)


@functools.cache
def prompt() -> dict[str, np.ndarray]:
    """Three ragged prompts with a picture at different places."""
    rng = np.random.default_rng(0)
    positions, n = SYSTEM.positions(SYSTEM.prompt_tokens), SYSTEM.image_tokens
    ids = rng.integers(3, 40, (3, positions)).astype(np.int32)
    slot = np.full((3, positions), -1, np.int32)
    for row, first in enumerate((0, 2, 3)):
        slot[row, first : first + n] = np.arange(n)
    image = rng.integers(0, 255, (3, 1, 16, 16, 3)).astype(np.uint8)
    return {"image": image, "ids": ids, "slot": slot, "length": np.array([11, 7, 9], np.int32)}


def test_repeating_segments_are_found() -> None:
    assert plan(IAA_14, 32) == ((Group(2, (1,)), Group(6, (4, 1))), 0)
    assert plan((0, 4, 8, 12, 16, 20, 24, 28), 32) == ((Group(1, (1,)), Group(7, (4,))), 3)
    assert plan(IAA_14, 3) == ((Group(2, (1,)),), 1)
    assert plan((), 4) == ((), 4)
    # A deeper model of the same layout compiles no more.
    long = tuple(i for i in range(100) if i % 5 in (0, 1))
    assert sum(len(g.counts) for g in plan(long, 100)[0]) <= 4
    for wrong in ((3, 1), (2, 2), (-1, 4)):
        with pytest.raises(ValueError, match="expected rising layer numbers"):
            plan(wrong, 8)


@pytest.mark.parametrize("insert_after", [(0, 2, 5), (1, 3, 5, 7), (0, 1, 4, 5, 7), (6,), ()])
def test_layers_run_in_order(insert_after: tuple[int, ...]) -> None:
    """x -> 3 x + weight, which keeps the order apart; outputs come back by layer."""
    base = np.arange(1.0, 9.0)
    own = 100 * np.arange(1.0, len(insert_after) + 1)

    def layer(weight: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return (3 * x + weight) % 1009, weight

    x, of_base, of_own = interleave(
        jnp.asarray(base), jnp.asarray(own), jnp.ones(()), insert_after, layer, layer
    )
    expected = 1.0
    for number, weight in enumerate(base):
        expected = (3 * expected + weight) % 1009
        if number in insert_after:
            expected = (3 * expected + own[insert_after.index(number)]) % 1009
    assert x == expected
    np.testing.assert_array_equal(of_base, base)
    assert (of_own is None) == (not insert_after)
    if insert_after:
        np.testing.assert_array_equal(of_own, own)


def test_text_is_the_base_to_the_bit() -> None:
    """Also after a training step of the adaptor, whose gradients reach neither base nor the other
    branch."""
    tree, batch = params(), _batch()
    base = Llama(LLAMA)
    ids = jnp.asarray(prompt()["ids"])
    before = jax.jit(base.apply)({"params": tree["base"]}, ids)
    labels = SYSTEM.labels(tree)
    chosen = jax.tree.map(lambda label: label != "frozen", labels)
    adam = optax.masked(optax.sgd(0.1), chosen)

    @jax.jit
    def step(tree: Any) -> Any:
        def loss(tree: Any) -> Any:
            return SYSTEM.loss(tree, {}, batch, jax.random.key(0), jnp.int32(0)).loss

        grads = jax.grad(loss)(tree)
        grads = jax.tree.map(lambda g, on: g if on else jnp.zeros_like(g), grads, chosen)
        updates, _ = adam.update(grads, adam.init(tree), tree)
        return optax.apply_updates(tree, updates)

    after = step(tree)
    text = jax.jit(lambda p, x: SYSTEM.model.apply({"params": p}, x, method="text_states"))
    np.testing.assert_array_equal(text(after, ids), before)
    for part in ("base", "G", "vision_tower"):
        jax.tree.map(np.testing.assert_array_equal, after[part], tree[part])
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), after["MM"], tree["MM"])
    del moved["layers"]  # the third inserted layer never runs
    assert all(jax.tree.leaves(moved))


def _batch() -> dict[str, jax.Array]:
    given = prompt()
    valid = np.arange(given["ids"].shape[1]) < given["length"][:, None]
    labels = np.where(valid & (given["slot"] < 0), given["ids"], -100).astype(np.int32)
    arrays = {"labels": labels, "valid": valid, **{k: given[k] for k in ("image", "ids", "slot")}}
    return {k: jnp.asarray(v) for k, v in arrays.items()}


def test_what_trains_in_each_stage() -> None:
    def trained(system: Iaa) -> set[str]:
        tree = unbox(jax.eval_shape(system.init, jax.random.key(0)))
        labels = jax.tree_util.tree_leaves_with_path(system.labels(tree))
        return {"/".join(k.key for k in path[:2]) for path, label in labels if label != "frozen"}

    parts = {"projector", "embedding", "layers", "final_norm", "unembedding"}
    assert trained(SYSTEM) == {f"MM/{part}" for part in parts}
    ground = dataclasses.replace(SYSTEM, branch="G", trains=("projector",))
    assert trained(ground) == {"G/projector"}
    base = dataclasses.replace(recipes.TINY_BASE, llama=LLAMA)
    assert {name.split("/")[0] for name in trained(base)} == {"base"}
    seeing = dataclasses.replace(SYSTEM, trains=("vision",))
    assert "vision_tower/patch_embedding" in trained(seeing)
    assert "vision_tower/post_norm" not in trained(seeing)
    tree = abstract(seeing)
    for layer, label in ((-2, "frozen"), (-1, "vision")):
        labels = dataclasses.replace(seeing, select_layer=layer).labels(tree)
        assert set(jax.tree.leaves(labels["vision_tower"]["encoder"]["last"])) == {label}
    of_projector = SYSTEM.labels(tree)["MM"]["projector"]  # a group of its own, as "vision"
    assert set(jax.tree.leaves(of_projector)) == {"projector"}


def test_cached_decoding_is_the_whole_pass() -> None:
    """Ragged prompts, token by token, against one pass over prompt and answer; filling rows too."""
    tree, given = params(), {k: jnp.asarray(v) for k, v in prompt().items()}
    order = ("image", "ids", "slot", "length")
    tokens = np.asarray(jax.jit(SYSTEM.functions()["sample_g"])(tree, *(given[k] for k in order)))
    features = SYSTEM.model.apply({"params": tree}, given["image"], method="features")

    @jax.jit
    def whole(ids: jax.Array, slot: jax.Array, length: jax.Array) -> jax.Array:
        valid = jnp.arange(ids.shape[1]) < length[:, None]
        batch = {"ids": ids, "slot": slot, "valid": valid}
        states = SYSTEM.states(tree, batch, features, "G")
        return states @ SYSTEM.model.apply({"params": tree}, "G", method="head")

    rows, most = np.arange(3), SYSTEM.new_tokens
    ids = np.pad(prompt()["ids"], ((0, 0), (0, most)))
    slot = np.pad(prompt()["slot"], ((0, 0), (0, most)), constant_values=-1)
    length, ended = prompt()["length"].copy(), np.zeros(3, bool)
    for step in range(most):
        best = np.asarray(whole(ids, slot, length))[rows, length - 1].argmax(-1)
        expected = np.where(ended, SYSTEM.pad_id, best)
        np.testing.assert_array_equal(tokens[:, step], expected)
        ended |= expected == 1
        ids[rows, length] = expected
        length = length + 1
    empty = {k: np.zeros_like(v) for k, v in prompt().items()}
    found = jax.jit(SYSTEM.functions()["sample_g"])(tree, *(empty[k] for k in order))
    assert np.isfinite(np.asarray(found)).all()


def test_functions_take_what_is_stated() -> None:
    tree = abstract(SYSTEM)
    inputs = SYSTEM.function_inputs(2)
    assert set(inputs) == set(SYSTEM.functions())
    for name, function in SYSTEM.functions().items():
        out = jax.eval_shape(function, tree, *(s.struct() for s in inputs[name].values()))
        first = jax.tree.leaves(out)[0]
        assert first.shape[0] == 2, name
    axes = logical_axes(jax.eval_shape(SYSTEM.init, jax.random.key(0)))
    assert axes["MM"]["layers"]["q"]["kernel"] == ("layers", "embed", "heads")


def abstract(system: Iaa) -> Any:
    return unbox(jax.eval_shape(system.init, jax.random.key(0)))


def tensors(names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Exported tensors of some top-level parts."""
    whole = export_tensors(params(), SYSTEM.weights())
    bound = {k: b.paths[0] for b in SYSTEM.weights().bind(params()) for k, _ in b.tensors()}
    return {
        k: np.ascontiguousarray(t.all())
        for k, t in whole.items()
        if bound[k].split("/")[0] in names
    }


def imported(names: tuple[str, ...], system: Iaa = SYSTEM) -> Any:
    reader = memory_reader(tensors(names))
    found, missing = import_params(reader, system.weights(), abstract(system))
    return system.complete_import(found, missing)


def test_branches_start_from_the_base() -> None:
    tree = imported(("base", "vision_tower"))
    base, own = params()["base"], tree["MM"]
    for ours, theirs in (("embedding", "embedding"), ("unembedding", "unembedding")):
        np.testing.assert_array_equal(own[ours], base[theirs])
    for place, source in enumerate((0, 2, 3)):  # 5 lies beyond the base: its last layer
        np.testing.assert_array_equal(
            own["layers"]["q"]["kernel"][place], base["layers"]["q"]["kernel"][source]
        )
    jax.tree.map(np.testing.assert_array_equal, tree["G"], own)
    assert float(np.std(own["projector"]["linear_0"]["kernel"])) > 0


def test_grounding_starts_from_the_general_branch() -> None:
    tree = imported(("base", "vision_tower", "MM"))
    jax.tree.map(np.testing.assert_array_equal, tree["G"], params()["MM"])


def test_incomplete_checkpoints_are_refused() -> None:
    with pytest.raises(ValueError, match="vision tower is missing and does not train"):
        imported(("base", "MM", "G"))
    sighted = dataclasses.replace(SYSTEM, trains=("vision",))
    assert "patch_embedding" in imported(("base", "MM", "G"), sighted)["vision_tower"]
    parts = tensors(("base", "vision_tower", "MM", "G"))
    del parts["lm_head_condtion.weight"]
    found, missing = import_params(memory_reader(parts), SYSTEM.weights(), abstract(SYSTEM))
    with pytest.raises(ValueError, match=r"MM: 1 of its \d+ tensors are missing, as lm_head_cond"):
        SYSTEM.complete_import(found, missing)
    with pytest.raises(WeightError, match=r"lm_head\.weight"):
        import_params(memory_reader(tensors(("vision_tower",))), SYSTEM.weights(), abstract(SYSTEM))


def test_a_grounding_model_moves_into_its_slots(tmp_path: Path) -> None:
    """A model of one branch, as the published one was put together."""
    one = dataclasses.replace(SYSTEM, branches=("MM",))
    other = jax.tree.map(lambda x: x + 1, {k: params()[k] for k in abstract(one)})
    export_params(other, one.weights(), tmp_path / "one", one.hub_config())
    merged = load_grounding(LLAMA, SYSTEM.projector, params(), tmp_path / "one")
    jax.tree.map(np.testing.assert_array_equal, merged["G"], other["MM"])
    jax.tree.map(np.testing.assert_array_equal, merged["MM"], params()["MM"])
    with pytest.raises(WeightError, match="expected parameters with a branch G"):
        load_grounding(LLAMA, SYSTEM.projector, {"MM": {}}, tmp_path / "one")


def test_a_llama_and_a_clip_make_a_start(tmp_path: Path) -> None:
    """As two published folders, one of them with a text tower as well."""
    parts = {"llama": tensors(("base",)), "clip": tensors(("vision_tower",))}
    parts["clip"] = {k.removeprefix(VISION): v for k, v in parts["clip"].items()}
    parts["clip"]["text_model.final_layer_norm.weight"] = np.ones(3, np.float32)
    for name, arrays in parts.items():
        (tmp_path / name).mkdir()
        save_file(arrays, tmp_path / name / "model.safetensors")
    (tmp_path / "llama" / "tokenizer.json").write_text("{}")
    assemble(tmp_path / "llama", tmp_path / "clip", tmp_path / "start")
    assert (tmp_path / "start" / "tokenizer.json").read_text() == "{}"
    with open_weights(tmp_path / "start") as reader:
        tree, missing = import_params(reader, SYSTEM.weights(), abstract(SYSTEM))
    assert all("condition" in k or "condtion" in k or "mm_projector" in k for k in missing)
    for part in ("base", "vision_tower"):
        jax.tree.map(np.testing.assert_array_equal, tree[part], params()[part])
    with pytest.raises(WeightError, match="expected a LlamaForCausalLM"):
        assemble(tmp_path / "clip", tmp_path / "clip", tmp_path / "other")
    with pytest.raises(WeightError, match="expected a CLIP"):
        assemble(tmp_path / "llama", tmp_path / "llama", tmp_path / "other")


def test_a_base_without_branches_is_a_llama(tmp_path: Path) -> None:
    """What `iaa/tiny_base` exports, transformers' class loads with every key in its place."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    alone = dataclasses.replace(
        SYSTEM, branches=(), vision=None, insert_after=(), branch="Text", trains=("base",)
    )
    tree = {"base": params()["base"]}
    export_params(tree, alone.weights(), tmp_path / "hf", alone.hub_config())
    model, report = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ids = prompt()["ids"]
    with torch.no_grad():
        theirs = model(torch.tensor(ids.astype(np.int64))).logits.numpy()
    ours = Llama(LLAMA).apply({"params": tree["base"]}, jnp.asarray(ids))
    ours = np.asarray(ours @ tree["base"]["unembedding"])
    # float32 against torch; of the largest logit, since logits cross zero.
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"branch": "G", "branches": ("MM",)}, "found 'G'; add it to system.branches"),
        ({"vision": None}, "expected sizes of a tower"),
        ({"projector": "mlp0x_gelu"}, "expected identity, linear or mlp<n>x_gelu"),
        ({"projector": "identity"}, "as wide as the language model, found 12 and 16"),
        ({"insert_after": (2, 1)}, "rising"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SYSTEM, **changes)


@pytest.mark.parametrize("projector", ["linear", "identity", "mlp3x_gelu"])
def test_projectors(projector: str) -> None:
    """Keys of the official modules, and token by token."""
    width = 16 if projector == "identity" else 12
    vision = dataclasses.replace(SYSTEM.vision, width=width)
    system = dataclasses.replace(
        SYSTEM, projector=projector, vision=vision, select_feature="cls_patch", select_layer=-1
    )
    keys = [k for k in system.weights().torch_shapes(abstract(system)) if "mm_projector." in k]
    expected = {"linear": [""], "identity": [], "mlp3x_gelu": ["0.", "2.", "4."]}[projector]
    stems = [f"model.mm_projector.{n}" for n in expected]
    assert sorted(keys) == sorted(f"{s}{k}" for s in stems for k in ("weight", "bias"))
    assert system.image_tokens == 5


@pytest.mark.parametrize("name", ["tiny_base", "tiny"])
def test_recipes_make_the_batches_of_their_system(name: str) -> None:
    experiment = getattr(recipes, name)()
    spec = experiment.system.batch_spec(4)
    batch = next(iter(experiment.data.batches(global_batch=4, seed=0))).arrays
    assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
        k: (s.shape, s.dtype) for k, s in spec.items()
    }


def test_published_sizes() -> None:
    """16.28 B without CLIP, about 4.13 B of them trained, as the paper's model."""
    whole = dataclasses.replace(Iaa(), branches=("MM", "G"))
    shapes = abstract(whole)
    sizes = jax.tree.map(lambda leaf: leaf.size, shapes)
    count = {top: sum(jax.tree.leaves(tree)) for top, tree in sizes.items()}
    assert sum(n for top, n in count.items() if top != "vision_tower") == pytest.approx(
        16.28e9, rel=1e-3
    )
    assert count["MM"] == pytest.approx(4.13e9, rel=2e-3)
    keys = whole.weights().torch_shapes(shapes)
    assert keys["lm_head_condtion_grounding.weight"] == (128256, 4096)
    assert keys["model.condition_layers.13.mlp.down_proj.weight"] == (4096, 14336)
    assert keys["model.mm_projector_G.2.weight"] == (4096, 4096)
