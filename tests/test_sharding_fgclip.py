"""The FG-CLIP loss and gradients do not depend on the mesh."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmods import partitioning
from jaxmods.partitioning import MeshShape, make_mesh, sharding_for, tree_shardings, use_mesh
from jaxmods.systems.fgclip import FgClip
from tests.fgclip_tiny import TINY, assert_same_step, batch_of, loss_and_grads, params_of, tiny

MESHES = {
    "data": MeshShape(),
    "fsdp": MeshShape(data=1, fsdp=8),
    "tensor": MeshShape(data=1, tensor=8),
    "data x fsdp x tensor": MeshShape(data=2, fsdp=2, tensor=2),
    "data x context": MeshShape(data=4, context=2),
}


MIXED = "data x fsdp x tensor"


@functools.cache
def alone(system: FgClip) -> tuple[Any, Any]:
    """The step on one device."""
    return loss_and_grads(system, params_of(system), batch_of(system))


def on_mesh(system: FgClip, shape: MeshShape) -> tuple[Any, Any]:
    """The step with parameters, gradients and batch laid out by the logical axes."""
    mesh = make_mesh(shape)
    abstract = jax.eval_shape(system.init, jax.random.key(0))
    shardings = tree_shardings(
        partitioning.unbox(abstract), partitioning.logical_axes(abstract), mesh
    )
    batch = batch_of(system)
    spec = system.batch_spec(len(batch["image"]))
    assert {k: (v.shape, str(v.dtype)) for k, v in batch.items()} == {
        k: (s.shape, s.dtype) for k, s in spec.items()
    }
    batch_shardings = {k: sharding_for(s.shape, s.axes, mesh) for k, s in spec.items()}

    def loss(params: Any, batch: Any) -> Any:
        with use_mesh(mesh):
            out = system.loss(params, {}, batch, jax.random.key(0), jnp.zeros((), jnp.int32))
        return out.loss, out

    step = jax.jit(
        jax.value_and_grad(loss, has_aux=True),
        in_shardings=(shardings, batch_shardings),
        out_shardings=(None, shardings),
    )
    params = jax.device_put(params_of(system), shardings)
    (_, out), grads = step(params, jax.device_put(batch, batch_shardings))
    return out, grads


@pytest.mark.parametrize(
    "name",
    [name if name == MIXED else pytest.param(name, marks=pytest.mark.slow) for name in MESHES],
)
def test_same_step_on_every_mesh(name: str) -> None:
    assert jax.device_count() == 8
    assert_same_step(on_mesh(TINY, MESHES[name]), alone(TINY))


@pytest.mark.slow
def test_same_step_with_every_option() -> None:
    """Microbatches, recomputation and multi-positive targets under a mixed mesh."""
    system = tiny(same_text="positive", microbatch=8)
    assert_same_step(on_mesh(system, MESHES[MIXED]), alone(tiny(same_text="positive")))


def test_parameters_are_split() -> None:
    """fsdp and tensor meshes really divide the large parameters."""
    abstract = jax.eval_shape(TINY.init, jax.random.key(0))
    shapes, axes = partitioning.unbox(abstract), partitioning.logical_axes(abstract)
    for shape in (MESHES["fsdp"], MESHES["tensor"]):
        shardings = tree_shardings(shapes, axes, make_mesh(shape))
        split = whole = 0
        pairs = zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True)
        for leaf, sharding in pairs:
            size = int(np.prod(leaf.shape))
            whole += size
            split += int(np.prod(sharding.shard_shape(leaf.shape)))
        assert split < whole / 3  # small tables whose sides eight does not divide stay whole
