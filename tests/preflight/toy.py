"""A small system for preflight's tests: a scanned transformer over float vectors, squared error.

Its sizes are chosen so that every figure can be counted by hand.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from data_pipelines.batch import Pipeline
from jaxmods.nn.attention import Implementation, attention
from jaxmods.nn.stack import Remat, run
from jaxmods.partitioning import MeshShape, constrain
from jaxmods.system import ArraySpec, Batch, LossOutput, Params, State, System
from jaxmods.weights import WeightMap
from train.experiment import Experiment, Optim, Precision


@dataclasses.dataclass(frozen=True)
class Toy(System):
    width: int = 256
    heads: int = 4
    layers: int = 5
    mlp: int = 512
    tokens: int = 128
    remat: Remat = "full"
    attention: Implementation = "auto"

    def batch_spec(self, global_batch: int) -> dict[str, ArraySpec]:
        shape = (global_batch, self.tokens, self.width)
        axes = ("batch", "seq", None)
        return {"x": ArraySpec(shape, "float32", axes), "y": ArraySpec(shape, "float32", axes)}

    def init(self, rng: jax.Array) -> Params:
        d, f, n = self.width, self.mlp, self.layers

        def box(shape: tuple[int, ...], axes: tuple[str, ...], key: int) -> Any:
            value = jax.random.normal(jax.random.fold_in(rng, key), shape) * shape[-2] ** -0.5
            return nn.LogicallyPartitioned(value, axes)

        return {
            "qkv": box((n, 3, d, d), ("layers", "norm", "embed", "heads"), 0),
            "out": box((n, d, d), ("layers", "heads", "embed"), 1),
            "up": box((n, d, f), ("layers", "embed", "mlp"), 2),
            "down": box((n, f, d), ("layers", "mlp", "embed"), 3),
        }

    def loss(
        self, params: Params, state: State, batch: Batch, rng: jax.Array, step: jax.Array
    ) -> LossOutput:
        x = self.encode(params, batch["x"])
        loss = jnp.mean(jnp.square(x.astype(jnp.float32) - batch["y"]))
        return LossOutput(loss, {}, state)

    def encode(self, params: Params, x: jax.Array) -> jax.Array:
        """[B, T, D] through all blocks, in the dtype of the parameters."""
        x = x.astype(params["up"].dtype)

        def block(p: Params, x: jax.Array) -> jax.Array:
            q, k, v = (
                (x @ p["qkv"][i])
                .reshape(*x.shape[:2], self.heads, self.width // self.heads)
                .transpose(0, 2, 1, 3)
                for i in range(3)
            )
            y = attention(q, k, v, implementation=self.attention)
            x = x + y.transpose(0, 2, 1, 3).reshape(x.shape) @ p["out"]
            return constrain(x + jax.nn.relu(x @ p["up"]) @ p["down"], ("batch", "seq", None))

        return run(block, params, x, policy=self.remat)

    def functions(self) -> dict[str, Any]:
        return {
            "encode": self.encode,
            "widen": lambda params, x: x @ params["up"][0],
            "prefill_kept": self.encode,
        }

    def function_inputs(self, batch_size: int) -> dict[str, dict[str, ArraySpec]]:
        x = self.batch_spec(batch_size)["x"]
        return {"encode": {"x": x}, "widen": {"x": x}, "prefill_kept": {"x": x}}

    def weights(self) -> WeightMap:
        raise ValueError("the toy has no published weights")

    def forward_matmul_flops(self) -> float:
        """Products with weights of one example's forward pass."""
        return self.layers * self.tokens * 2 * (4 * self.width**2 + 2 * self.width * self.mlp)

    def forward_attention_flops(self) -> float:
        """Scores and weighted values of one example's forward pass."""
        return self.layers * 4 * self.tokens**2 * self.width

    def flops_per_example(self) -> float:
        return 3 * (self.forward_matmul_flops() + self.forward_attention_flops())


def experiment(system: Toy | None = None, **changes: Any) -> Experiment:
    return dataclasses.replace(
        Experiment(
            system=system or Toy(),
            data=cast(Pipeline, None),  # preflight never reads data
            steps=100,
            batch_size=256,
            optim=Optim(name="adamw", weight_decay=0.01, clip_norm=1.0),
            mesh=MeshShape(data=1, fsdp=-1, tensor=1),
            precision=Precision(compute="bfloat16"),
        ),
        **changes,
    )


def small() -> Experiment:
    """Compiles in seconds."""
    return experiment()


def large() -> Experiment:
    """Fits into a v5e-4 only when activations are recomputed."""
    toy = Toy(width=1024, heads=8, mlp=4096, layers=48, tokens=384, remat="none")
    return experiment(toy, batch_size=128)
