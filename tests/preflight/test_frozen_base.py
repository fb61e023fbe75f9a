"""A training step of adapters holds its frozen base once."""

from __future__ import annotations

import dataclasses

import jax
import pytest

from jaxmods.backbones.flux import FluxConfig
from jaxmods.partitioning import MeshShape, make_mesh
from jaxmods.systems.flux.base import FluxBase
from jaxmods.systems.flux.squares import Squares
from jaxmods.systems.refton.system import Adapters, RefTon
from tests.preflight.toy import experiment
from train.experiment import Precision
from train.preflight import memory
from train.state import Plan, make_plan
from train.step import trace_step

# Wide and with few tokens (pictures of two tokens), so that the base outweighs everything else.
WIDE = RefTon(
    base=FluxBase(
        transformer=FluxConfig(
            in_channels=192,
            out_channels=192,
            double_layers=4,
            single_layers=8,
            heads=2,
            head_dim=128,
            text_width=32,
            pooled_width=32,
            rope_axes=(16, 56, 56),
        ),
        vae=Squares(4),
        encoders=None,
        text_length=4,
    ),
    height=16,
    width=8,
    cond_scale=1.0,
    adapters=Adapters(rank=2, alpha=4.0, targets=("attn.to_q", "proj_mlp")),
)


def plan_for(system: RefTon) -> Plan:
    """On one device, all in float32: products of the CPU take nothing narrower, and would convert
    a narrower base."""
    precision = Precision(params="float32", frozen="float32", compute="float32")
    recipe = dataclasses.replace(experiment(), system=system, precision=precision, batch_size=1)
    return make_plan(recipe, make_mesh(MeshShape(), jax.devices()[:1]))


def beyond_arguments(plan: Plan) -> int:
    """Bytes that the compiled step takes besides what it is given."""
    stats = trace_step(plan).traced.lower().compile().memory_analysis()
    return stats.temp_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes


def base_bytes(plan: Plan) -> float:
    return memory.shard_bytes(plan.abstract.frozen, plan.shardings.frozen)


@pytest.mark.slow
def test_a_step_of_adapters_copies_nothing_of_its_base():
    plan = plan_for(WIDE)
    # The blocks that are being read, and next to no activations: about 0.15 of the base. (1.13
    # when the loss is given a copy of it.)
    assert beyond_arguments(plan) < base_bytes(plan) / 4
    # Nor do optimiser and gradients know of it.
    state = memory.state_bytes(plan)
    assert state.optimizer + state.gradients < base_bytes(plan) / 10
