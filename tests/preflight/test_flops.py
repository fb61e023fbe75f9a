"""FLOPs counted from the traced program equal counts by hand."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jaxmods.backbones.clip import TextConfig, VisionConfig
from jaxmods.backbones.llama import LlamaConfig
from jaxmods.nn.stack import Execution
from jaxmods.partitioning import MeshShape, make_mesh
from jaxmods.system import FROZEN, TRAIN
from jaxmods.systems.fgclip.system import FgClip
from jaxmods.systems.flux.base import FluxBase
from jaxmods.systems.iaa import Iaa
from jaxmods.systems.refton.system import RefTon
from tests.preflight.toy import Toy, experiment
from train.preflight import program
from train.preflight.flops import Flops, attention_work, count
from train.state import make_plan
from train.step import trace_step


def step_flops(toy: Toy) -> tuple[Flops, float, float]:
    """Counted operations of a step, and those by hand of its forward pass."""
    recipe = experiment(toy, batch_size=16)
    plan = make_plan(recipe, make_mesh(recipe.mesh))
    counted = count(trace_step(plan).traced.jaxpr)
    b = recipe.batch_size
    return counted, b * toy.forward_matmul_flops(), b * toy.forward_attention_flops()


def test_nothing_recomputed_is_three_forward_passes():
    counted, matmul, attention = step_flops(Toy(remat="none"))
    assert counted.matmul == 3 * matmul
    assert counted.attention == 3 * attention
    assert counted.unknown_loops == 0


def test_recomputation_counts():
    toy = Toy(remat="full")
    counted, matmul, attention = step_flops(toy)
    # All but the last product of a block is computed again.
    last = toy.mlp / (4 * toy.width + 2 * toy.mlp)
    assert counted.matmul == pytest.approx((4 - last) * matmul)
    assert counted.attention == 4 * attention


def test_the_flash_kernel_counts_by_its_shapes():
    counted, _, attention = step_flops(Toy(remat="full", attention="flash"))
    # Twice forward (2 products), dq (3) and dkv (4 products): (2 + 2 + 3 + 4) / 2; and the
    # products of output and its gradient, summed over the width: 1 / (2 T) of a forward pass.
    assert counted.attention == pytest.approx((5.5 + 1 / (2 * 128)) * attention)


@pytest.mark.parametrize("implementation", ["auto", "flash"])
def test_what_is_needed_knows_no_kernels(implementation):
    """130 tokens, which the kernel pads to a tile of 256."""
    toy = Toy(remat="full", tokens=130, attention=implementation)
    recipe = experiment(toy, batch_size=16)
    plan = make_plan(recipe, make_mesh(recipe.mesh))
    batch = {k: s.struct() for k, s in toy.batch_spec(16).items()}
    needed = program._needed(plan, batch, Flops(matmul=float("inf")))
    assert needed.total == 16 * toy.flops_per_example()


class Partly(Toy):
    """A toy of which only the last product of every block trains."""

    def labels(self, params):
        return {name: TRAIN if name == "down" else FROZEN for name in params}


def test_frozen_parts_need_no_gradients_of_their_own():
    toy = Partly(remat="full", attention="flash")
    recipe = experiment(toy, batch_size=16)
    plan = make_plan(recipe, make_mesh(recipe.mesh))
    batch = {k: s.struct() for k, s in toy.batch_spec(16).items()}
    needed = program._needed(plan, batch, Flops(matmul=float("inf")))
    down = toy.layers * toy.tokens * 2 * toy.mlp * toy.width
    assert needed.matmul == 16 * (2 * toy.forward_matmul_flops() + down)
    assert needed.attention == 16 * 3 * toy.forward_attention_flops()


def test_plain_is_without_kernels_and_recomputation_at_any_depth():
    base = FluxBase(execution=Execution(remat="dots", attention="flash", unroll=True))
    system = RefTon(base=base)
    assert program.plain(system).base.execution == Execution(unroll=True, attention="xla")
    assert program.plain(Toy()) == Toy(remat="none")
    assert program.plain(RefTon()) == RefTon()


def test_accumulation_does_not_change_the_count():
    recipe = experiment(Toy(remat="none"), batch_size=32)
    accumulated = dataclasses.replace(recipe, optim=dataclasses.replace(recipe.optim, accumulate=2))
    mesh = make_mesh(recipe.mesh)
    one, two = (count(trace_step(make_plan(r, mesh)).traced.jaxpr) for r in (recipe, accumulated))
    assert one == two


def small_fgclip(**options: float) -> FgClip:
    """Small, with the proportions of the published sizes."""
    return FgClip(
        vision=VisionConfig(width=192, layers=4, heads=3, mlp=768, image_size=64, patch_size=8),
        text=TextConfig(width=128, layers=4, heads=2, mlp=512, vocab_size=512),
        projection_dim=64,
        **options,
    )


@pytest.mark.parametrize("weights", [(1.0, 1.0, 0.0, 0.0), (1.0, 1.0, 0.1, 0.5)])
def test_fgclip_agrees_with_its_own_analysis(weights):
    """Within 5 % of `System.flops_per_example`, which counts by hand (towers only)."""
    short, long, region, hard = weights
    system = small_fgclip(
        weight_short=short, weight_long=long, weight_region=region, weight_hard=hard
    )
    recipe = experiment(system, batch_size=64, mesh=MeshShape())
    plan = make_plan(recipe, make_mesh(recipe.mesh))
    batch = {k: s.struct() for k, s in system.batch_spec(64).items()}
    counted = program._needed(plan, batch, Flops(matmul=float("inf")))
    assert counted.total / 64 == pytest.approx(system.flops_per_example(), rel=0.05)


def test_iaa_agrees_with_its_own_analysis():
    """Within 1 %: the projector is left out by hand."""
    system = Iaa(
        llama=LlamaConfig(
            vocab_size=2048, width=256, layers=3, heads=8, kv_heads=2, head_dim=32, mlp=768
        ),
        vision=VisionConfig(width=64, layers=2, heads=2, mlp=256, image_size=64, patch_size=8),
        insert_after=(0,),
        branches=("MM",),
        max_tokens=256,
        pack=2,
        execution=Execution(remat="full"),
    )
    recipe = experiment(system, batch_size=4, mesh=MeshShape())
    plan = make_plan(recipe, make_mesh(recipe.mesh, jax.devices()[:1]))
    batch = {k: s.struct() for k, s in system.batch_spec(4).items()}
    counted = program._needed(plan, batch, Flops(matmul=float("inf")))
    assert counted.total / 4 == pytest.approx(system.flops_per_example(), rel=0.01)


def test_primitives():
    a, b = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((5, 7), (7, 3)))
    assert count(jax.make_jaxpr(jnp.matmul)(a, b)) == Flops(matmul=2.0 * 5 * 7 * 3)

    image = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    kernel = jax.ShapeDtypeStruct((4, 4, 3, 6), jnp.float32)

    def patches(x, k):
        return jax.lax.conv_general_dilated(
            x, k, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    forward = 2.0 * 2 * 2 * 2 * 6 * 4 * 4 * 3
    assert count(jax.make_jaxpr(patches)(image, kernel)) == Flops(matmul=forward)

    def branches(i, a, b):
        return jax.lax.switch(i, [lambda: 0.0, lambda: jnp.sum(a @ b)])

    index = jax.ShapeDtypeStruct((), jnp.int32)
    assert count(jax.make_jaxpr(branches)(index, a, b)).total == 2.0 * 5 * 7 * 3

    def open_loop(n, x):
        return jax.lax.while_loop(lambda c: c[0] < n, lambda c: (c[0] + 1, c[1] @ c[1]), (0, x))

    square = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    assert count(jax.make_jaxpr(open_loop)(index, square)) == Flops(128.0, 0.0, 1)


def test_work_of_a_kernel():
    assert attention_work((2, 3, 5, 7), (2, 3, 11, 7), 2) == 4 * 2 * 3 * 5 * 11 * 7
