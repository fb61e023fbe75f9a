"""A small scanned network and two published layouts of it, for the tests of adapters."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax

from jaxmods.nn.layers import Linear, gelu_tanh
from jaxmods.nn.stack import run, stacked_param
from jaxmods.weights import Entry, Split, WeightMap
from jaxmods.weights import Linear as ToKernel

INPUT, WIDTH, HIDDEN, OUTPUT, LAYERS = 6, 8, 12, 5, 3
MODULES = ("attn.to_q", "attn.to_k", "attn.to_v", "mlp", "proj_out")  # of a block


class Block(nn.Module):
    """x + out(q * sigmoid(k) + v, gelu(mlp x))."""

    def setup(self) -> None:
        self.to_q = Linear(WIDTH, ("embed", "heads"))
        self.to_k = Linear(WIDTH, ("embed", "heads"))
        self.to_v = Linear(WIDTH, ("embed", "heads"))
        self.mlp = Linear(HIDDEN, ("embed", "mlp"))
        self.out = Linear(WIDTH, ("proj", "embed"))

    def __call__(self, x: jax.Array) -> jax.Array:
        mixed = self.to_q(x) * jax.nn.sigmoid(self.to_k(x)) + self.to_v(x)
        return x + self.out(mixed, gelu_tanh(self.mlp(x)))


class Net(nn.Module):
    """Linear, three equal blocks as one stack, linear."""

    unroll: bool = False

    def setup(self) -> None:
        self.inp = Linear(WIDTH, ("channels", "embed"))
        self.blocks = stacked_param(
            self,
            "blocks",
            lambda rng: Block(parent=None).init(rng, jax.numpy.zeros((1, WIDTH)))["params"],
            LAYERS,
        )
        self.head = Linear(OUTPUT, ("embed", "channels"))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., 6] -> [..., 5]."""
        block = Block(parent=None)
        x = run(
            lambda params, y: block.apply({"params": params}, y),
            self.blocks,
            self.inp(x),
            unroll=self.unroll,
        )
        return self.head(x)


def boxed(rng: jax.Array) -> Any:
    """Fresh parameters with logical axes."""
    return Net().init(rng, jax.numpy.zeros((1, INPUT)))["params"]


def _linear(torch: str, path: str) -> tuple[Entry, ...]:
    return (
        Entry(f"{torch}.weight", f"{path}/kernel", ToKernel()),
        Entry(f"{torch}.bias", f"{path}/bias"),
    )


def apart_map() -> WeightMap:
    """Every linear module by itself."""
    block = {"attn.to_q": "to_q", "attn.to_k": "to_k", "attn.to_v": "to_v", "mlp": "mlp"}
    return WeightMap(
        (
            *_linear("inp", "inp"),
            *(
                entry
                for theirs, ours in {**block, "proj_out": "out"}.items()
                for entry in _linear(f"blocks.{{i}}.{theirs}", f"blocks/{ours}")
            ),
            *_linear("proj_out", "head"),
        )
    )


def fused_map() -> WeightMap:
    """q, k, v and the MLP's first layer as one module."""
    parts = ("to_q", "to_k", "to_v", "mlp")
    return WeightMap(
        (
            *_linear("img_in", "inp"),
            Entry(
                "single_blocks.{i}.linear1.weight",
                tuple(f"blocks/{p}/kernel" for p in parts),
                ToKernel() >> Split(axis=1),
            ),
            Entry(
                "single_blocks.{i}.linear1.bias",
                tuple(f"blocks/{p}/bias" for p in parts),
                Split(axis=0),
            ),
            *_linear("single_blocks.{i}.linear2", "blocks/out"),
            *_linear("final", "head"),
        )
    )
