"""A small regression, a pair of competing networks, and data that is a function of its number.

The recipes at the end are what the tests train: `tests.train.toy:regression` on a command line.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.batch import BatchInfo, DataError, HostBatch, Pipeline, Quarantined
from data_pipelines.protocols.base import EvalResult, Functions, Metric, Panel, Protocol
from jaxmods.system import (
    FROZEN,
    TRAIN,
    ArraySpec,
    Batch,
    LossOutput,
    NamedLoss,
    Params,
    State,
    System,
)
from jaxmods.weights import WeightMap
from train.experiment import (
    Checkpointing,
    Evaluation,
    Experiment,
    GroupOptim,
    Logging,
    Optim,
)

_X = ("batch", None)


def _matrix(rng: jax.Array, shape: tuple[int, int], axes: tuple[str | None, ...]) -> Any:
    value = jax.random.normal(rng, shape) / np.sqrt(shape[0])
    return nn.LogicallyPartitioned(value, axes)


@dataclasses.dataclass(frozen=True)
class Regression(System):
    """y = w2 tanh(stem x W1); the stem is frozen. Carries a running mean of the loss and adds
    noise of its own to the input, so that state and random numbers matter to the result."""

    width: int = 16
    noise: float = 0.01
    idle: bool = False

    def batch_spec(self, global_batch: int) -> dict[str, ArraySpec]:
        return {
            "x": ArraySpec((global_batch, 8), "float32", _X),
            "y": ArraySpec((global_batch, 4), "float32", _X),
        }

    def init(self, rng: jax.Array) -> Params:
        a, b, c = jax.random.split(rng, 3)
        params: Params = {
            "stem": {"kernel": _matrix(a, (8, 8), ("embed", None))},
            "hidden": {
                "kernel": _matrix(b, (8, self.width), ("embed", "mlp")),
                "bias": nn.LogicallyPartitioned(jnp.zeros(self.width), ("mlp",)),
            },
            "out": {"kernel": _matrix(c, (self.width, 4), ("mlp", "embed"))},
        }
        if self.idle:
            params["idle"] = {"scale": nn.LogicallyPartitioned(jnp.ones(3), (None,))}
        return params

    def init_state(self, params: Params) -> State:
        return {"mean": {"loss": jnp.zeros(())}}

    def labels(self, params: Params) -> dict[str, Any]:
        labels = jax.tree.map(lambda _: TRAIN, params)
        labels["stem"] = {"kernel": FROZEN}
        labels["out"] = {"kernel": "head"}
        return labels

    def predict(self, params: Params, x: jax.Array) -> jax.Array:
        hidden = x @ params["stem"]["kernel"] @ params["hidden"]["kernel"]
        return jnp.tanh(hidden + params["hidden"]["bias"]) @ params["out"]["kernel"]

    def loss(
        self, params: Params, state: State, batch: Batch, rng: jax.Array, step: jax.Array
    ) -> LossOutput:
        x = batch["x"] + self.noise * jax.random.normal(rng, batch["x"].shape)
        error = jnp.mean(jnp.square(self.predict(params, x) - batch["y"]).astype(jnp.float32))
        mean = 0.9 * state["mean"]["loss"] + 0.1 * error
        return LossOutput(error, {"running": mean}, {"mean": {"loss": mean}})

    def functions(self) -> dict[str, Callable[..., Any]]:
        return {"predict": self.predict}

    def weights(self) -> WeightMap:
        return WeightMap(())

    def flops_per_example(self) -> float | None:
        return 6.0 * (8 * 8 + 8 * self.width + self.width * 4)


@dataclasses.dataclass(frozen=True)
class Pair(Regression):
    """A generator that maps noise to pictures of x, and a critic that tells them apart."""

    gate: int = 2

    def init(self, rng: jax.Array) -> Params:
        a, b = jax.random.split(rng)
        return {
            "generator": {"kernel": _matrix(a, (8, 8), ("embed", None))},
            "critic": {"kernel": _matrix(b, (8, 1), ("embed", None))},
        }

    def init_state(self, params: Params) -> State:
        return {"turns": jnp.zeros((), jnp.int32)}

    def labels(self, params: Params) -> dict[str, Any]:
        return {"generator": {"kernel": "generator"}, "critic": {"kernel": "critic"}}

    def _scores(self, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        fake = batch["x"] @ params["generator"]["kernel"]
        real = jnp.concatenate([batch["y"], batch["y"]], axis=1)
        return fake @ params["critic"]["kernel"], real @ params["critic"]["kernel"]

    def _generator(
        self, params: Params, state: State, batch: Batch, rng: jax.Array, step: jax.Array
    ) -> LossOutput:
        fake, _ = self._scores(params, batch)
        loss = jnp.where(step >= self.gate, -jnp.mean(fake), 0.0)
        return LossOutput(loss, {"fake": jnp.mean(fake)}, {"turns": state["turns"] + 1})

    def _critic(
        self, params: Params, state: State, batch: Batch, rng: jax.Array, step: jax.Array
    ) -> LossOutput:
        fake, real = self._scores(params, batch)
        loss = jnp.mean(jax.nn.relu(1 + fake)) + jnp.mean(jax.nn.relu(1 - real))
        return LossOutput(loss, {}, {"turns": state["turns"] + 1})

    def losses(self) -> tuple[NamedLoss, ...]:
        return (
            NamedLoss("generator", self._generator, ("generator",)),
            NamedLoss("critic", self._critic, ("critic",)),
        )


@dataclasses.dataclass(frozen=True)
class Contrastive(Regression):
    """Declares that its loss depends on the whole batch."""

    batch_negatives = True


@dataclasses.dataclass(frozen=True)
class Numbers(Pipeline):
    """Record n of `records` is drawn from a generator seeded with (seed, n); each epoch visits
    them in another order. Every `damaged`-th record cannot be used, the next one takes its place.

    `poison` puts NaN into the batch of one step, `fail_at` ends the data there (`fail_share`: only
    for that share of the batch), `pause` makes every batch take that many seconds.
    """

    records: int = 64
    damaged: int = 0
    poison: int | None = None
    fail_at: int | None = None
    fail_share: int | None = None
    pause: float = 0.0
    dtype: str = "float32"

    def _record(self, seed: int, n: int) -> tuple[np.ndarray, np.ndarray]:
        draw = np.random.default_rng((seed, n))
        x = draw.standard_normal(8)
        return x, np.tanh(x[:4] - x[4:])

    def batches(
        self,
        *,
        global_batch: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        start_step: int = 0,
    ) -> Iterator[HostBatch]:
        step = start_step
        while True:
            time.sleep(self.pause)
            if step == self.fail_at and self.fail_share in (None, process_index):
                raise DataError("2 of 3 records are damaged (allowed: 0.1)")
            yield self._batch(global_batch, seed, step, process_index, process_count)
            step += 1

    def _batch(self, size: int, seed: int, step: int, process: int, processes: int) -> HostBatch:
        share = size // processes
        bad, ids, rows = [], [], []
        for slot in range(process * share, (process + 1) * share):
            epoch, place = divmod(step * size + slot, self.records)
            n = int(np.random.default_rng((seed, epoch)).permutation(self.records)[place])
            if self.damaged and n % self.damaged == 0:
                bad.append(Quarantined("numbers", str(n), "truncated_image", "made so"))
                n = (n + 1) % self.records
            ids.append(f"numbers:{n}")
            rows.append(self._record(seed, n))
        x, y = (np.stack(part).astype(self.dtype) for part in zip(*rows, strict=True))
        if step == self.poison:
            x[0] = np.nan
        info = BatchInfo(tuple(ids), tuple(bad), {"boxes": share}, share + len(bad))
        return HostBatch({"x": x, "y": y}, info)

    def fingerprint(self) -> str:
        return f"numbers-{self.records}-{self.damaged}"


@dataclasses.dataclass(frozen=True)
class Fit(Protocol):
    """Mean squared error on records that training does not use."""

    limit: int = 10
    published: float | None = None

    @property
    def name(self) -> str:
        return "fit"

    def requires(self) -> tuple[str, ...]:
        return ("predict",)

    def run(self, functions: Functions, *, panels: bool = False) -> EvalResult:
        pairs = [Numbers()._record(123, n) for n in range(self.limit)]
        x, y = (np.stack(part).astype(np.float32) for part in zip(*pairs, strict=True))
        error = float(np.mean(np.square(functions["predict"](x) - y)))
        metrics = {"error": Metric(error, chance=float(np.mean(y**2)), published=self.published)}
        shown = (Panel("Numbers", "A table.", html="<p>none</p>"),) if panels else ()
        return EvalResult(self.name, metrics, {"limit": self.limit}, self.limit, 0.0, shown)


def regression() -> Experiment:
    """Regression with a frozen stem, damaged records and an evaluation."""
    return Experiment(
        system=Regression(),
        data=Numbers(damaged=9),
        steps=20,
        batch_size=8,
        seed=3,
        optim=Optim(
            lr=1e-2,
            warmup_steps=4,
            weight_decay=0.1,
            clip_norm=1.0,
            ema_decay=0.9,
            groups=(GroupOptim("head", lr=2e-2, start_step=3),),
        ),
        checkpoint=Checkpointing(every=5, keep=2, keep_best="fit/error", best="min"),
        evaluation=Evaluation(every=10, at_start=True, batch_size=4, protocols=(Fit(),)),
        logging=Logging(every=4),
    )


def pair() -> Experiment:
    """Two losses over two groups; the critic starts later."""
    return Experiment(
        system=Pair(),
        data=Numbers(),
        steps=6,
        batch_size=8,
        optim=Optim(lr=1e-2, groups=(GroupOptim("critic", lr=1e-3, start_step=3),)),
        logging=Logging(every=1, tensorboard=False),
    )
