"""A small FG-CLIP and a batch with every kind of padding, shared by several tests."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmods import partitioning
from jaxmods.systems.fgclip import FgClip, TextConfig, VisionConfig

TINY = FgClip(
    vision=VisionConfig(width=16, layers=3, heads=4, mlp=32, image_size=16, patch_size=4),
    text=TextConfig(
        width=16,
        layers=2,
        heads=4,
        mlp=32,
        vocab_size=32,
        context_short=8,
        context_long=20,
        keep=4,
        bos_id=30,
        eos_id=31,
        pad_id=31,
    ),
    projection_dim=8,
    max_boxes=3,
    negatives=2,
    hard_pack_images=2,
    hard_pack_slots=3,
    local_groups=2,
    chunk=5,
)


def tiny(**options: Any) -> FgClip:
    """`TINY` with other fields."""
    return dataclasses.replace(TINY, **options)


def params_of(system: FgClip, seed: int = 0) -> Any:
    """Unboxed parameters; biases and norms are random too, so that each of them matters."""
    params = partitioning.unbox(jax.jit(system.init)(jax.random.key(seed)))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: p + jnp.asarray(rng.normal(0, 0.1, p.shape), p.dtype), params)


def batch_of(system: FgClip, size: int = 16, seed: int = 0) -> dict[str, np.ndarray]:
    """A random batch: images without boxes, pack groups without hard boxes, missing negatives,
    and some equal texts."""
    rng = np.random.default_rng(seed)
    text, words = system.text, min(system.text.bos_id, system.text.eos_id)

    def texts(*shape: int) -> np.ndarray:
        ids = rng.integers(0, words, shape)
        end = rng.integers(2, shape[-1], shape[:-1])[..., None]
        at = np.arange(shape[-1])
        ids = np.where(at == 0, text.bos_id, np.where(at < end, ids, text.pad_id))
        return np.where(at == end, text.eos_id, ids).astype(np.int32)

    def boxes(*shape: int) -> np.ndarray:
        corners = np.sort(rng.random((*shape, 2, 2)), axis=-2)
        return corners.reshape(*shape, 4).astype(np.float32)

    n, groups = system.max_boxes, size // system.hard_pack_images
    k, m, side = system.hard_pack_slots, 1 + system.negatives, system.vision.image_size
    count, hard_count = rng.integers(0, n + 1, size), rng.integers(0, k + 1, groups)
    hard_count[0] = 0
    box_mask, hard_mask = np.arange(n) < count[:, None], np.arange(k) < hard_count[:, None]
    exists = rng.random((groups, k, m)) < 0.8
    exists[..., 0] = True
    batch = {
        "image": rng.integers(0, 256, (size, side, side, 3)).astype(np.uint8),
        "text_short": texts(size, text.context_short),
        "text_long": texts(size, text.context_long),
        "box": boxes(size, n) * box_mask[..., None],
        "box_text": texts(size, n, text.context_short),
        "box_mask": box_mask,
        "hard_box": boxes(groups, k) * hard_mask[..., None],
        "hard_image": rng.integers(0, system.hard_pack_images, (groups, k)).astype(np.int32),
        "hard_text": texts(groups, k, m, text.context_short),
        "hard_text_mask": exists & hard_mask[..., None],
        "hard_mask": hard_mask,
    }
    batch["text_short"][3] = batch["text_short"][1]
    batch["text_long"][5] = batch["text_long"][2]
    batch["box_text"][1] = batch["box_text"][0]
    return batch


def loss_and_grads(system: FgClip, params: Any, batch: Any) -> tuple[Any, Any]:
    """(LossOutput, gradients), jitted."""

    def loss(params: Any, batch: Any) -> Any:
        out = system.loss(params, {}, batch, jax.random.key(0), jnp.zeros((), jnp.int32))
        return out.loss, out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, batch)
    return out, grads


def assert_same_step(found: tuple[Any, Any], expected: tuple[Any, Any]) -> None:
    """Equal loss, metrics and gradients within float32 noise.

    The noise of a gradient is measured against its own largest entry, and against 1e-6 of the
    largest of all: a key bias has exactly no gradient, so that all of it is noise.
    """
    assert found[0].metrics.keys() == expected[0].metrics.keys()
    for name, value in expected[0].metrics.items():
        np.testing.assert_allclose(
            found[0].metrics[name], value, rtol=2e-5, atol=1e-6, err_msg=name
        )
    np.testing.assert_allclose(found[0].loss, expected[0].loss, rtol=1e-5)
    largest = max(float(np.max(np.abs(g))) for g in jax.tree.leaves(expected[1]))
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(found[1]), jax.tree.leaves(expected[1]), strict=True
    )
    for (path, grad), wanted in pairs:
        limit = 2e-5 * float(np.max(np.abs(wanted))) + 1e-6 * largest
        np.testing.assert_allclose(
            grad, wanted, rtol=1e-4, atol=limit, err_msg=jax.tree_util.keystr(path)
        )
