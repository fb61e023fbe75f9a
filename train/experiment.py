"""A recipe: one frozen, typed tree that is the whole experiment.

`configs/<system>.py` holds functions without arguments that return an `Experiment`; the name of a
recipe is `system/function`. Everything a run depends on is in the tree, everything in the tree can
be overridden by dotted path (`--set optim.lr=1e-5`), and the resolved tree is saved with the run.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from data_pipelines.batch import Pipeline
from data_pipelines.protocols.base import Protocol
from data_pipelines.samplers.base import Sampler
from jaxmods.partitioning import DEFAULT_RULES, MeshShape, Rules
from jaxmods.system import System


@dataclasses.dataclass(frozen=True)
class GroupOptim:
    """Overrides for one optimiser label; None inherits from `Optim`.

    `start_step` holds the group still (no update, no optimiser statistics) before that step.
    """

    label: str
    lr: float | None = None
    weight_decay: float | None = None
    b1: float | None = None
    b2: float | None = None
    start_step: int = 0


@dataclasses.dataclass(frozen=True)
class Optim:
    """Optimiser and schedule.

    Attributes:
      name: "adamw", "adam", "lion", "sgd" or "adafactor" (optax).
      lr: peak learning rate.
      schedule: "cosine" (to `lr * end_factor`), "constant", "linear", or "step_drop" (constant,
        divided by 10 once at `drop_at`).
      warmup_steps: linear warm-up from 0.
      weight_decay: decoupled, where `System.decay` says so.
      b1, b2, eps: moments. clip_norm: global gradient norm, None for off.
      accumulate: micro-batches per optimiser step (gradients averaged). Refused for objectives
        whose negatives come from the batch, see `System`-specific docs.
      ema_decay: exponential moving average of parameters, None for off.
      groups: per-label overrides.
    """

    name: Literal["adamw", "adam", "lion", "sgd", "adafactor"] = "adamw"
    lr: float = 1e-3
    schedule: Literal["cosine", "constant", "linear", "step_drop"] = "cosine"
    warmup_steps: int = 0
    end_factor: float = 0.0
    drop_at: int | None = None
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip_norm: float | None = None
    accumulate: int = 1
    ema_decay: float | None = None
    groups: tuple[GroupOptim, ...] = ()


@dataclasses.dataclass(frozen=True)
class Precision:
    """Dtypes: masters, frozen parameters, and the copy that the forward pass computes in."""

    params: Literal["float32", "bfloat16"] = "float32"
    frozen: Literal["float32", "bfloat16"] = "float32"
    compute: Literal["float32", "bfloat16"] = "float32"


@dataclasses.dataclass(frozen=True)
class Checkpointing:
    """When to save and what to keep.

    Attributes:
      every: steps between checkpoints (the last step is always saved).
      keep: newest checkpoints kept. keep_period: those at its multiples are kept for good.
      keep_best: metric name (`protocol/metric`) whose best checkpoint is kept as well.
      best: whether the best value of `keep_best` is the largest or the smallest.
    """

    every: int = 1000
    keep: int = 3
    keep_period: int | None = None
    keep_best: str | None = None
    best: Literal["max", "min"] = "max"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Protocols run every `every` steps (0: only at the end) and by `jaxmods eval`.

    Attributes:
      every: steps between evaluations; the last step is always evaluated.
      at_start: evaluate before the first step too, so that learning shows against its beginning.
      batch_size: rows per call of a system's function; shorter calls are padded to it.
      protocols: what is run, in order.
    """

    every: int = 0
    at_start: bool = False
    batch_size: int = 64
    protocols: tuple[Protocol, ...] = ()


@dataclasses.dataclass(frozen=True)
class Logging:
    """Steps between log lines; NaN or infinity in the loss or gradients stops the run."""

    every: int = 50
    tensorboard: bool = True


@dataclasses.dataclass(frozen=True)
class Init:
    """Where parameters come from: drawn from the seed, or local files.

    Attributes:
      weights: a folder of PyTorch weights, or one of `jaxmods import`.
      adapters: a file of adapters (or its folder) to go on from, in a format of PEFT, diffusers or
        kohya; needs the base in `weights`.
    """

    weights: str | None = None
    adapters: str | None = None


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The whole experiment. `batch_size` is global; `steps` counts optimiser updates.

    `sampler` is what `jaxmods sample` makes of it; None for a recipe without.

    `shorthands` are settings that stand for several places: `(("data.root", ("data.source.root",
    "evaluation.protocols.0.source.root")),)` lets `--set data.root=/x` fill both.
    """

    system: System
    data: Pipeline
    steps: int
    batch_size: int
    seed: int = 0
    optim: Optim = Optim()
    mesh: MeshShape = MeshShape()  # noqa: RUF009 - frozen, so one instance serves all
    rules: Rules = DEFAULT_RULES
    precision: Precision = Precision()
    checkpoint: Checkpointing = Checkpointing()
    evaluation: Evaluation = Evaluation()
    logging: Logging = Logging()
    init: Init = Init()
    sampler: Sampler | None = None
    notes: str = ""
    shorthands: tuple[tuple[str, tuple[str, ...]], ...] = ()
