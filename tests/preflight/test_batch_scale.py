"""131,072 pairs on a pod: the memory of the contrastive loss is linear in the local batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from jaxmods.objectives.contrastive import info_nce
from jaxmods.partitioning import MeshShape, make_mesh, sharding_for, use_mesh
from train.preflight import topologies

WIDTH = 768


def temporaries(batch: int) -> int:
    """Bytes per device of loss and gradient over v5e-256."""
    topology = topologies.parse("v5e-256")
    mesh = make_mesh(MeshShape(), topologies.devices(topology))

    def loss(x: jax.Array, y: jax.Array) -> jax.Array:
        with use_mesh(mesh):
            return info_nce(x, y, jnp.float32(10.0)).loss

    shape = (batch, WIDTH)
    vectors = jax.ShapeDtypeStruct(
        shape, jnp.float32, sharding=sharding_for(shape, ("batch", None), mesh)
    )
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(vectors, vectors).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_temporaries_of_the_loss_are_linear_in_the_local_batch(libtpu):
    sizes = (65_536, 131_072)  # (Of fewer a part is in VMEM, which does not count.)
    found = [temporaries(size) for size in sizes]
    # The gathered embeddings of one side and their gradient, nothing of size batch x batch: even
    # this device's 512 rows of the scores would be another 256 MiB of 770.
    for size, taken in zip(sizes, found, strict=True):
        assert taken < 2.1 * size * WIDTH * 4
    assert found[1] == pytest.approx(2 * found[0], rel=0.05)
