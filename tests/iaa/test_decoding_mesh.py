"""One step of serving over a mesh: the answer of one device, with caches that stay split."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import PartitionSpec

from jaxmods.partitioning import (
    MeshShape,
    logical_axes,
    make_mesh,
    sharding_for,
    tree_shardings,
    unbox,
    use_mesh,
)
from tests.iaa.test_packing import ALONE, params_of


def test_a_decoding_step_over_a_mesh() -> None:
    inputs = ALONE.function_inputs(4)["decode_mm"]
    rng = np.random.default_rng(0)
    arrays = {
        name: rng.integers(1, 9, spec.shape).astype(spec.dtype)
        if spec.dtype == "int32"
        else rng.standard_normal(spec.shape).astype(spec.dtype)
        for name, spec in inputs.items()
    }
    step = ALONE.functions()["decode_mm"]
    params = params_of(ALONE)
    alone = jax.jit(step)(params, *arrays.values())

    mesh = make_mesh(MeshShape(data=2, fsdp=2, tensor=2))
    abstract = jax.eval_shape(ALONE.init, jax.random.key(0))
    placed = tree_shardings(unbox(abstract), logical_axes(abstract), mesh)
    specs = [sharding_for(spec.shape, spec.axes, mesh) for spec in inputs.values()]

    def call(params: object, *given: object) -> object:
        with use_mesh(mesh):
            return step(params, *given)

    compiled = (
        jax.jit(call, in_shardings=(placed, *specs)).lower(params, *arrays.values()).compile()
    )
    given = [jax.device_put(a, s) for a, s in zip(arrays.values(), specs, strict=True)]
    found = compiled(jax.device_put(params, placed), *given)
    for name, ours, theirs in zip(("logits", *list(inputs)[1:5]), found, alone, strict=True):
        a, b = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
        # float32 sums over devices; in the bfloat16 caches a new key may be rounded to either side.
        most = 2e-5 if name == "logits" else 2**-8
        np.testing.assert_allclose(a, b, atol=most * np.abs(b).max(), rtol=0, err_msg=name)
        if name != "logits":
            assert ours.sharding.spec == PartitionSpec(None, ("data", "fsdp"), "tensor")
            assert ours.addressable_shards[0].data.size * 8 == ours.size
