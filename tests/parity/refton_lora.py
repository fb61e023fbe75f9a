"""RefTON's recorded LoRA layer: one linear layer with an adapter, applied and merged."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jaxmods.nn import lora
from jaxmods.nn.layers import dense
from jaxmods.weights import Entry, Linear, WeightMap, memory_reader
from tests.parity.registry import Case, Kind, assert_close

LORA = Kind(
    "refton", "lora", lambda case: {"lora_A", "lora_B", "merged_weight"} <= set(case.shapes)
)


@LORA.check
def attached_and_merged(case: Case) -> None:
    """Output of the layer and its merged weight, the adapter read as a PEFT file."""
    base = {
        "layer": {
            "kernel": jnp.asarray(case.io["weight"].T),
            "bias": jnp.asarray(case.io["bias"]),
        }
    }
    weight_map = WeightMap(
        (Entry("layer.weight", "layer/kernel", Linear()), Entry("layer.bias", "layer/bias"))
    )
    tensors = {f"transformer.layer.lora_{h}.weight": case.io[f"lora_{h}"] for h in "AB"}
    loaded = lora.load(
        memory_reader(tensors), base, [lora.Published(weight_map)], alpha=case.meta["alpha"]
    )
    assert loaded.config.rank == case.meta["r"]
    attached = lora.attach(base, loaded.adapters, loaded.config)
    x, tolerance = jnp.asarray(case.io["x"]), case.tolerance()
    assert_close("output", dense(attached["layer"], x), case.io["y"], tolerance)
    merged = lora.merge(base, loaded.adapters, loaded.config)["layer"]
    assert_close("merged", np.asarray(merged["kernel"]).T, case.io["merged_weight"], tolerance)
    assert_close("output of the merged", dense(merged, x), case.io["y"], tolerance)
