"""A small scanned network, two published layouts of it and a system that adapts it, for the tests
of adapters."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmods.nn import lora
from jaxmods.nn.layers import Linear, gelu_tanh
from jaxmods.nn.stack import run, stacked_param
from jaxmods.partitioning import unbox
from jaxmods.system import FROZEN, TRAIN, Batch, LossOutput, Params, State
from jaxmods.weights import Entry, Split, WeightMap
from jaxmods.weights import Linear as ToKernel
from jaxmods.weights.pipeline import Component, HubPipeline
from tests.train.toy import Numbers, Regression
from train.experiment import Checkpointing, Experiment, Logging, Optim, Precision

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


# The system -------------------------------------------------------------------------------------

APART = lora.Published(apart_map(), "net", "lora_net")
FUSED = lora.Published(fused_map(), "net", "lora_net")


@functools.cache
def abstract_base() -> Params:
    """Shapes of the network's parameters."""
    return unbox(jax.eval_shape(boxed, jax.random.key(0)))


@dataclasses.dataclass(frozen=True)
class Adapters:
    """What trains; targets are ends of published names."""

    rank: int = 2
    alpha: float = 3.0
    targets: tuple[str, ...] = ("attn.to_q", "attn.to_v", "mlp", "proj_out")
    dropout: float = 0.0


@dataclasses.dataclass(frozen=True)
class Adapted(Regression):
    """The network frozen, with adapters that train; all of it trains where there are none."""

    adapters: Adapters | None = Adapters()

    @property
    def config(self) -> lora.LoraConfig | None:
        """The adapters on paths of kernels."""
        if self.adapters is None:
            return None
        a = self.adapters
        paths = lora.targets_of(APART, abstract_base(), a.targets)
        return lora.LoraConfig(paths, a.rank, a.alpha, a.dropout)

    def init(self, rng: jax.Array) -> Params:
        first, second = jax.random.split(rng)
        base, config = boxed(first), self.config
        added = {} if config is None else {"lora": lora.init(second, base, config)}
        return {"net": base, **added}

    def init_state(self, params: Params) -> State:
        return {}

    def labels(self, params: Params) -> dict[str, Any]:
        trained = "net" if self.adapters is None else "lora"
        return {
            name: jax.tree.map(lambda _, label=TRAIN if name == trained else FROZEN: label, tree)
            for name, tree in params.items()
        }

    def predict(self, params: Params, x: jax.Array, rng: jax.Array | None = None) -> jax.Array:
        """[B, 8] -> [B, 4]; two inputs and an output are not used."""
        tree, config = params["net"], self.config
        if config is not None:
            tree = lora.attach(tree, params["lora"], config, rng=rng)
        return Net().apply({"params": tree}, x[:, :INPUT])[:, :4]

    def loss(
        self, params: Params, state: State, batch: Batch, rng: jax.Array, step: jax.Array
    ) -> LossOutput:
        error = self.predict(params, batch["x"], rng) - batch["y"]
        return LossOutput(jnp.mean(jnp.square(error.astype(jnp.float32))), {}, state)

    def functions(self) -> dict[str, Callable[..., Any]]:
        return {"predict": self.predict}

    def weights(self) -> WeightMap:
        total, config = apart_map().under("net.", "net/"), self.config
        if config is not None:
            total += WeightMap(lora.entries(APART, abstract_base(), config.targets))
        return total

    def hub_config(self) -> dict[str, Any]:
        return {"net": {"layers": LAYERS}}

    def hub_pipeline(self) -> HubPipeline | None:
        if self.adapters is not None:
            return None
        component = Component("net", ("tests", "TorchNet"), self.hub_config()["net"])
        return HubPipeline((component,), {"_class_name": "Toy"})

    def complete_import(self, params: Params, missing: frozenset[str]) -> Params:
        config = self.config
        assert config is not None
        return {**params, "lora": unbox(lora.init(jax.random.key(1), abstract_base(), config))}

    def adapter_map(self) -> lora.AdapterMap | None:
        if (config := self.config) is None:
            return None
        merged = dataclasses.replace(self, adapters=None)
        return lora.AdapterMap(
            config, (APART,), merged, base="net", kohya=(FUSED,), base_model="owner/toy"
        )


def adapted() -> Experiment:
    """Adapters in float32 on a frozen base in bfloat16."""
    return Experiment(
        system=Adapted(),
        data=Numbers(),
        steps=4,
        batch_size=8,
        optim=Optim(lr=2e-2, schedule="constant", weight_decay=1e-4, clip_norm=1.0),
        precision=Precision(frozen="bfloat16"),
        checkpoint=Checkpointing(every=2),
        logging=Logging(every=2, tensorboard=False),
    )
