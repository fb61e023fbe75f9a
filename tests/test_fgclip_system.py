"""FG-CLIP as a System: options that must not change numbers, and those that must."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines.scenes import Scenes
from jaxmods import partitioning
from jaxmods.nn.filters import cosine_filters
from jaxmods.nn.positions import sincos_grid
from jaxmods.systems.fgclip import BASE, LARGE, Execution, FgClip
from jaxmods.systems.fgclip.objective import hard_negative_loss, normalise
from jaxmods.systems.fgclip.weights import ADDED, LONG_PROJECTION
from jaxmods.weights import export_params, export_tensors, import_params, memory_reader
from tests.fgclip_tiny import (
    TINY,
    assert_same_step,
    batch_of,
    loss_and_grads,
    params_of,
    tiny,
)


@pytest.fixture(scope="module")
def params() -> Any:
    return params_of(TINY)


@pytest.fixture(scope="module")
def step(params: Any) -> tuple[Any, Any]:
    return loss_and_grads(TINY, params, batch_of(TINY))


@pytest.mark.parametrize(
    "options",
    [
        {"microbatch": 4},
        pytest.param(
            {"microbatch": 2, "execution": Execution(remat="dots")}, marks=pytest.mark.slow
        ),
        pytest.param({"execution": Execution(remat="full", unroll=True)}, marks=pytest.mark.slow),
        pytest.param({"chunk": 1000}, marks=pytest.mark.slow),
    ],
    ids=["microbatch", "microbatch and dots", "remat unrolled", "one chunk"],
)
def test_exact_options(options: dict[str, Any], params: Any, step: tuple[Any, Any]) -> None:
    """Cached-embedding microbatches, recomputation, unrolling, chunks: same loss and gradients."""
    assert_same_step(loss_and_grads(tiny(**options), params, batch_of(TINY)), step)


@pytest.mark.slow
def test_microbatch_holds_fewer_activations() -> None:
    """The compiled step needs less memory for temporaries."""
    batch = batch_of(TINY, 64)

    def temporaries(system: FgClip) -> int:
        def loss(params: Any) -> jax.Array:
            return system.loss(params, {}, batch, jax.random.key(0), jnp.zeros(())).loss

        compiled = jax.jit(jax.grad(loss)).lower(params_of(system)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(tiny(microbatch=4)) < temporaries(TINY) / 2


def test_loss_of_weight_zero_is_not_computed(params: Any, step: tuple[Any, Any]) -> None:
    out, grads = loss_and_grads(tiny(weight_region=0.0, weight_hard=0.0), params, batch_of(TINY))
    assert "loss_region" not in out.metrics
    assert "loss_hard" not in out.metrics
    np.testing.assert_allclose(out.metrics["loss_long"], step[0].metrics["loss_long"], rtol=1e-5)
    assert not np.asarray(grads["logit_scale_hard"]).any()


def test_padding_does_not_matter(params: Any, step: tuple[Any, Any]) -> None:
    """Whatever stands in masked slots, boxes without area included: same step, no NaN."""
    batch = batch_of(TINY)
    box, hard, text = ~batch["box_mask"], ~batch["hard_mask"], ~batch["hard_text_mask"]
    batch["box"][box] = 0.7
    batch["box_text"][box] = 5
    batch["hard_box"][hard] = np.array([0.1, 0.2, 0.9, 0.8])
    batch["hard_image"][hard] = 1
    batch["hard_text"][text] = 7
    assert box.any()
    assert hard.any()
    assert_same_step(loss_and_grads(TINY, params, batch), step)


@pytest.mark.parametrize("empty", ["box_mask", "hard_mask"])
def test_no_boxes_at_all(empty: str, params: Any) -> None:
    batch = batch_of(TINY)
    batch[empty] = np.zeros_like(batch[empty])
    out, grads = loss_and_grads(TINY, params, batch)
    name = "loss_region" if empty == "box_mask" else "loss_hard"
    assert float(out.metrics[name]) == 0.0
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


@pytest.mark.slow
def test_valid_box_without_area_gives_no_nan(params: Any) -> None:
    batch = batch_of(TINY)
    batch["box"][batch["box_mask"]] = 0.5
    out, grads = loss_and_grads(TINY, params, batch)
    assert np.isfinite(out.loss)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


@pytest.mark.slow
def test_same_text_changes_what_it_should(params: Any, step: tuple[Any, Any]) -> None:
    """The batch has equal captions: masking them lowers the loss, for texts without twins it
    changes nothing."""
    batch = batch_of(TINY)
    out, _ = loss_and_grads(tiny(same_text="mask"), params, batch)
    for term in ("short", "long", "region"):
        assert out.metrics[f"loss_{term}"] < step[0].metrics[f"loss_{term}"]
    for name in ("text_short", "text_long", "box_text"):
        ids = batch[name].reshape(-1, batch[name].shape[-1])
        words = min(TINY.text.bos_id, TINY.text.eos_id)
        ids[:, 1] = np.arange(len(ids)) % words
        ids[:, 2] = np.arange(len(ids)) // words
    plain, _ = loss_and_grads(TINY, params, batch)
    for mode in ("mask", "positive"):
        out, _ = loss_and_grads(tiny(same_text=mode), params, batch)
        np.testing.assert_allclose(out.loss, plain.loss, rtol=1e-6)


def test_logit_scale_bound(params: Any) -> None:
    high = {**params, "logit_scale": jnp.float32(6.0)}
    out, grads = loss_and_grads(tiny(max_logit_scale=100.0), high, batch_of(TINY))
    assert float(out.metrics["logit_scale"]) == 100.0
    assert float(grads["logit_scale"]) == 0.0
    free, _ = loss_and_grads(TINY, high, batch_of(TINY))
    assert float(free.metrics["logit_scale"]) == pytest.approx(np.exp(6.0), rel=1e-6)


@pytest.mark.slow
def test_roi_bfloat16_rounds_boxes_only(params: Any, step: tuple[Any, Any]) -> None:
    out, _ = loss_and_grads(tiny(roi_bfloat16=True), params, batch_of(TINY))
    for term in ("long", "short"):
        np.testing.assert_allclose(
            out.metrics[f"loss_{term}"], step[0].metrics[f"loss_{term}"], rtol=1e-6
        )
    difference = abs(float(out.metrics["loss_region"] - step[0].metrics["loss_region"]))
    assert 0 < difference < 0.05


def test_half_precision_step(params: Any, step: tuple[Any, Any]) -> None:
    """bfloat16 parameters: losses near those of float32, gradients in bfloat16, all finite."""
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    out, grads = loss_and_grads(TINY, half, batch_of(TINY))
    assert out.loss.dtype == jnp.float32
    np.testing.assert_allclose(out.loss, step[0].loss, rtol=0.05)
    assert all(g.dtype == jnp.bfloat16 for g in jax.tree.leaves(grads))
    assert all(np.isfinite(np.asarray(g, np.float32)).all() for g in jax.tree.leaves(grads))


def test_places_of_a_picture_start_apart() -> None:
    """ "sincos" moves the table of places and nothing else, by vectors from which row and column
    can be read off linearly."""
    drawn = partitioning.unbox(TINY.init(jax.random.key(3)))
    apart = partitioning.unbox(
        dataclasses.replace(TINY, position_start="sincos").init(jax.random.key(3))
    )
    changed = jax.tree_util.tree_leaves_with_path(
        jax.tree.map(lambda a, b: np.asarray(a - b), apart, drawn)
    )
    moved = {jax.tree_util.keystr(path): leaf for path, leaf in changed if leaf.any()}
    ((name, leaf),) = moved.items()
    assert name == "['vision_tower']['position_embedding']"
    assert not leaf[0].any()  # the class token
    # Means of 64 float32 values below 0.4, each rounded by up to 3e-8 where they were added.
    np.testing.assert_allclose(leaf[1:].mean(axis=0), 0, atol=1e-7)

    side, width = 8, 96
    table = np.concatenate([sincos_grid(side, width), np.ones((side**2, 1))], axis=1)
    places = np.stack(np.divmod(np.arange(side**2), side), axis=1)
    found, *_ = np.linalg.lstsq(table, places, rcond=None)
    # Sines and cosines at 24 frequencies span any function of 8 places; the rest is the rounding
    # of float64: 97 products of up to 4, each rounded by 1e-16 of it, come to 4e-14 (measured:
    # 8e-15). 1e-12 leaves 25 times that for the least squares of other LAPACKs.
    np.testing.assert_allclose(table @ found, places, atol=1e-12)
    with pytest.raises(ValueError, match="multiple of 4"):
        sincos_grid(side, 90)


def test_patches_start_as_cosines_of_equal_strength() -> None:
    """ "cosines" moves the filters of the patches and nothing else. They are orthogonal, and hear
    the high notes of a picture as well as the low ones."""
    drawn = partitioning.unbox(TINY.init(jax.random.key(3)))
    cosines = partitioning.unbox(
        dataclasses.replace(TINY, patch_start="cosines").init(jax.random.key(3))
    )
    changed = jax.tree_util.tree_leaves_with_path(
        jax.tree.map(lambda a, b: np.asarray(a - b), cosines, drawn)
    )
    ((name, _),) = [(jax.tree_util.keystr(p), leaf) for p, leaf in changed if leaf.any()]
    assert name == "['vision_tower']['patch_embedding']"

    filters = cosine_filters(8, 96)
    assert filters.shape == (8, 8, 3, 96)
    exact = filters.astype(np.float64)
    gram = np.einsum("yxck,yxcl->kl", exact, exact)
    lengths = np.sqrt(np.diag(gram))
    # Each value was rounded to float32 once, by up to eps / 2 of itself, so a product by up to eps
    # of its size; the sizes add up to no more than the two lengths' product (Cauchy and Schwarz).
    rounding = np.finfo(np.float32).eps
    np.testing.assert_allclose(gram / np.outer(lengths, lengths), np.eye(96), atol=rounding)
    pictures = np.stack([r.image for r in Scenes(count=32)]) / 255.0
    patches = pictures.reshape(32, 8, 8, 8, 8, 3).transpose(0, 1, 3, 2, 4, 5)
    heard = np.einsum("bghyxc,yxck->bghk", patches, filters).std(axis=(0, 1, 2))
    assert heard.max() / heard.min() < 5
    flat = np.einsum("bghyxc,yxck->bghk", patches, filters / lengths).std(axis=(0, 1, 2))
    assert flat.max() / flat.min() > 20  # what drawn filters of one length would hear
    with pytest.raises(ValueError, match="expected 1 to 12 filters for patches of 2 x 2, found 13"):
        cosine_filters(2, 13)


def test_labels(params: Any) -> None:
    assert set(jax.tree.leaves(TINY.labels(params))) == {"train"}
    labels = tiny(text_group=True).labels(params)
    assert jax.tree.structure(labels) == jax.tree.structure(params)
    assert set(jax.tree.leaves(labels["text_tower"])) == {"text"}
    assert labels["position_embedding_res"] == "text"
    for name in ("vision_tower", "text_projection", "text_long_projection", "logit_scale"):
        assert set(jax.tree.leaves(labels[name])) == {"train"}


def test_batches_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match=r"batch 15 .*hard_pack_images=2"):
        TINY.batch_spec(15)
    with pytest.raises(ValueError, match=r"3 pack groups .*local_groups=2"):
        TINY.batch_spec(6)
    with pytest.raises(ValueError, match=r"microbatch 3 must divide"):
        tiny(microbatch=3).batch_spec(12)


def test_hard_negative_loss_equals_numpy() -> None:
    rng = np.random.default_rng(0)
    boxes, texts = rng.normal(size=(2, 5, 4)), rng.normal(size=(2, 5, 3, 4))
    exists, valid = rng.random((2, 5, 3)) < 0.7, rng.random((2, 5)) < 0.6
    exists[..., 0] = True
    found = hard_negative_loss(
        *(jnp.asarray(a, jnp.float32) for a in (boxes, texts)), jnp.float32(3.0), exists, valid
    )
    logits = np.where(exists, 3.0 * np.einsum("wnp,wnmp->wnm", boxes, texts), -np.inf)
    each = np.log(np.exp(logits).sum(-1)) - logits[..., 0]
    expected = np.mean([each[w][valid[w]].mean() for w in range(2)])
    np.testing.assert_allclose(found.loss, expected, rtol=1e-5)
    hits = logits[..., 0] >= logits.max(-1)
    np.testing.assert_allclose(found.accuracy, hits[valid].mean(), rtol=1e-6)


def test_normalise_has_no_gradient_at_zero() -> None:
    x = jnp.array([[3.0, 4.0], [0.0, 0.0], [1.0, 1.0]])
    valid = jnp.array([True, True, False])
    np.testing.assert_allclose(normalise(x, valid), [[0.6, 0.8], [0.0, 0.0], [0.0, 0.0]], rtol=1e-6)
    grad = jax.grad(lambda x: normalise(x, valid).sum())(x)
    assert np.isfinite(grad).all()
    assert not np.asarray(grad[1:]).any()


# Weights -----------------------------------------------------------------------------------------


def test_plain_clip_is_completed(params: Any) -> None:
    """A file without FG-CLIP's additions gets them from CLIP's own tensors."""
    tensors = {k: v.all() for k, v in export_tensors(params, TINY.weights()).items()}
    clip = {k: v for k, v in tensors.items() if k not in ADDED}
    system = tiny(text=dataclasses.replace(TINY.text, context_long=4 * 8 - 3 * 4))
    abstract = partitioning.unbox(jax.eval_shape(system.init, jax.random.key(0)))
    with memory_reader(clip) as reader:
        imported = import_params(reader, system.weights(), abstract)
    done = system.complete_import(imported.params, imported.missing)
    np.testing.assert_array_equal(done["logit_scale_hard"], params["logit_scale"])
    np.testing.assert_array_equal(
        done["text_long_projection"]["kernel"], params["text_projection"]["kernel"]
    )
    table = np.asarray(params["text_tower"]["position_embedding"])
    long = np.asarray(done["position_embedding_res"])
    np.testing.assert_array_equal(long[:4], table[:4])
    np.testing.assert_array_equal(long[4::4], table[4:])
    np.testing.assert_allclose(long[5], 0.75 * table[4] + 0.25 * table[5], rtol=1e-6)


def test_damaged_file_is_not_completed(params: Any) -> None:
    with pytest.raises(ValueError, match=rf"missing {LONG_PROJECTION}, while .* are there"):
        TINY.complete_import(params, frozenset({LONG_PROJECTION}))


def test_config_round_trip() -> None:
    assert FgClip.from_hub_config(TINY.hub_config()) == FgClip(
        vision=TINY.vision, text=TINY.text, projection_dim=TINY.projection_dim
    )
    for vision, text, projection in (BASE, LARGE):
        config = FgClip(vision=vision, text=text, projection_dim=projection).hub_config()
        read = FgClip.from_hub_config(config)
        assert (read.vision, read.text, read.projection_dim) == (vision, text, projection)


def test_config_of_openai() -> None:
    """Absent fields are Hugging Face's defaults, and the special tokens are the published ones."""
    read = FgClip.from_hub_config(
        {"projection_dim": 512, "text_config": {"eos_token_id": 2}, "vision_config": {}}
    )
    assert read.vision.patch_size == 32
    assert (read.text.bos_id, read.text.eos_id, read.text.pad_id) == (49406, 49407, 49407)
    with pytest.raises(ValueError, match=r"hidden_act: expected 'quick_gelu', found 'gelu'"):
        FgClip.from_hub_config({"text_config": {"hidden_act": "gelu"}})


def test_verify_export(params: Any, tmp_path: Path) -> None:
    """PyTorch on the exported folder agrees, and notices weights that are not the same."""
    pytest.importorskip("torch")
    folder = tmp_path / "export"
    export_params(params, TINY.weights(), folder, TINY.hub_config())
    errors = TINY.verify_export(folder, params, jax.random.key(1))
    assert errors.keys() == TINY.functions().keys()
    assert max(errors.values()) < 1e-5
    kernel = params["visual_projection"]["kernel"]
    other = {**params, "visual_projection": {"kernel": kernel * 1.01}}
    errors = TINY.verify_export(folder, other, jax.random.key(1))
    assert errors["image_features"] == pytest.approx(0.01, rel=0.01)
    assert errors["text_features_short"] < 1e-5


def test_published_sizes() -> None:
    """Number of tensors and of parameters of the two hub models."""
    counts = []
    for vision, text, projection in (BASE, LARGE):
        system = FgClip(vision=vision, text=text, projection_dim=projection)
        shapes = partitioning.unbox(jax.eval_shape(system.init, jax.random.key(0)))
        counts.append(sum(int(np.prod(s.shape)) for s in jax.tree.leaves(shapes)))
        # 16 per block; temperatures, projections, text and vision tables, norms outside blocks.
        expected = 16 * (vision.layers + text.layers) + 3 + 3 + 4 + 3 + 6
        assert len(system.weights().torch_shapes(shapes)) == expected
    # CLIP's own 149.62 M and 427.94 M, two tables and a projection more.
    assert counts == [
        149_620_737 + 2 * 248 * 512 + 512 * 512 + 2,
        427_944_193 + 2 * 248 * 768 + 768 * 768 + 2,
    ]


def test_flops_against_the_compiler() -> None:
    """The analytic figure against XLA's count of the forward pass, unrolled."""
    system = tiny(execution=Execution(unroll=True), hard_pack_slots=4)
    batch = batch_of(system, 8)

    def loss(params: Any, batch: Any) -> jax.Array:
        return system.loss(params, {}, batch, jax.random.key(0), jnp.zeros(())).loss

    cost = jax.jit(jax.grad(loss)).lower(params_of(system), batch).compile().cost_analysis()
    assert system.flops_per_example() * 8 == pytest.approx(cost["flops"], rel=0.35)
