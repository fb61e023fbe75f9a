"""The one interface between a system (one paper) and everything else.

The training loop, evaluation, export, preflight and the tests know a paper only through `System`.
A system is a frozen dataclass of hyper-parameters whose methods are pure functions: no files, no
network, no hidden state. Randomness comes in as keys, shapes are static.

Vocabulary used here and in every implementation:

* *params*: nested dict of arrays, all that an optimiser may change or that is frozen by choice.
* *state*: nested dict of arrays carried from step to step but not differentiated (running
  statistics, spectral-norm vectors, synchronised thresholds). It is checkpointed with the rest.
* *batch*: flat dict of arrays whose leading dimension is the batch (or a group of it), exactly as
  `batch_spec` says.
* *logical axes*: one name (or None) per dimension; `jaxmods.partitioning` maps names to mesh axes.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from jaxmods.nn.lora import AdapterMap
    from jaxmods.weights import WeightMap
    from jaxmods.weights.pipeline import HubPipeline

Array = jax.Array
Params = dict[str, Any]
State = dict[str, Any]
Batch = Mapping[str, Array]
Metrics = dict[str, Array]

TRAIN = "train"
FROZEN = "frozen"


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """Shape, dtype and logical axes of one array of a batch.

    Attributes:
      shape: static shape, the batch dimension included.
      dtype: a NumPy/JAX dtype name, as `"uint8"` or `"float32"`.
      axes: one logical axis name or None per dimension.
    """

    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str | None, ...]

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.axes):
            raise ValueError(
                f"ArraySpec: expected one logical axis per dimension, found shape {self.shape} "
                f"and axes {self.axes}; give None for a dimension without a name"
            )

    def struct(self) -> jax.ShapeDtypeStruct:
        """The abstract array, for `jax.eval_shape` and ahead-of-time compilation."""
        return jax.ShapeDtypeStruct(self.shape, jnp.dtype(self.dtype))


@dataclasses.dataclass(frozen=True)
class LossOutput:
    """What a loss returns besides its scalar. `state` is the new state (same tree as given)."""

    loss: Array
    metrics: Metrics
    state: State


jax.tree_util.register_dataclass(
    LossOutput, data_fields=["loss", "metrics", "state"], meta_fields=[]
)

LossFn = Callable[[Params, State, Batch, Array, Array], LossOutput]


@dataclasses.dataclass(frozen=True)
class NamedLoss:
    """One scalar over some groups of parameters.

    Most systems have one. A generator/discriminator pair has two: each is differentiated with
    respect to the parameters of its own label groups only, and the loop adds the (disjoint)
    gradients up and applies them in one optimiser update. Gating by step happens inside `fn`
    (`jnp.where(step >= start, ...)`), so the compiled step is the same function throughout.

    Attributes:
      name: prefix of its metrics when there are several.
      labels: optimiser labels (see `System.labels`) that this loss trains; None means every label
        but "frozen".
      fn: `(params, state, batch, rng, step) -> LossOutput`.
    """

    name: str
    fn: LossFn
    labels: tuple[str, ...] | None = None


@dataclasses.dataclass(frozen=True)
class System(abc.ABC):
    """A published system: its sizes and options as fields, its mathematics as pure methods.

    `batch_negatives` is True where an example's loss depends on the other examples of the batch:
    such a loss over micro-batches is another loss, so the loop refuses to accumulate it.

    `sampling_fields` names fields that trained parameters do not depend on: `jaxmods sample` may
    give them other values than the run had (steps, guidance, the size of pictures).
    """

    batch_negatives: ClassVar[bool] = False
    sampling_fields: ClassVar[tuple[str, ...]] = ()

    @abc.abstractmethod
    def batch_spec(self, global_batch: int) -> dict[str, ArraySpec]:
        """Every array of a training batch of `global_batch` examples: shape, dtype, axes."""

    @abc.abstractmethod
    def init(self, rng: Array) -> Params:
        """Fresh parameters, boxed with logical axes (`flax.linen.LogicallyPartitioned` leaves).

        Must be usable under `jax.eval_shape` and outside any mesh. Callers unbox with
        `jaxmods.partitioning.unbox` and read axes with `jaxmods.partitioning.logical_axes`.
        """

    def init_state(self, params: Params) -> State:
        """Initial non-differentiated state for (unboxed) `params`; empty for most systems."""
        del params
        return {}

    def labels(self, params: Params) -> dict[str, Any]:
        """Tree like `params` of optimiser labels: "train", "frozen", or a named group."""
        return jax.tree.map(lambda _: TRAIN, params)

    def decay(self, params: Params) -> dict[str, Any]:
        """Tree like `params` of bools: whether weight decay applies (default: matrices only)."""
        return jax.tree.map(lambda p: len(p.shape) > 1, params)

    def check_constants(self, constants: Mapping[str, np.ndarray]) -> None:
        """Whether arrays from `Pipeline.constants` fit this system's sizes, shapes and values.

        Raises:
          ValueError: naming the fields that have to change, and to what.
        """
        del constants

    @abc.abstractmethod
    def loss(
        self, params: Params, state: State, batch: Batch, rng: Array, step: Array
    ) -> LossOutput:
        """The training loss of one global batch. Pure; differentiable in `params`."""

    def losses(self) -> tuple[NamedLoss, ...]:
        """All named losses; one over everything that trains unless a system says otherwise."""
        return (NamedLoss("loss", self.loss),)

    def functions(self) -> dict[str, Callable[..., Any]]:
        """Named pure inference functions `(params, *arrays) -> arrays`, each jit-able.

        Evaluation protocols, reports, `export --verify` and preflight use a model only through
        these, by name (for dual encoders: `image_features`, `text_features_short`, ...).
        """
        return {}

    def function_inputs(self, batch_size: int) -> dict[str, dict[str, ArraySpec]]:
        """What the named functions take besides params for `batch_size` rows, by function and
        argument, in order. Preflight compiles the functions that are listed here: with `--what
        sample` those called `sample` or `sample_...`, with `--what eval` all others, or by name.
        Outputs of `prefill_...` and `decode_...` stay split over the devices."""
        del batch_size
        return {}

    @abc.abstractmethod
    def weights(self) -> WeightMap:
        """The two-way map between the published PyTorch state dict and `params`."""

    def hub_config(self) -> dict[str, Any]:
        """The `config.json` that belongs beside exported weights."""
        return {}

    def hub_pipeline(self) -> HubPipeline | None:
        """The sub-folders that weights are exported to, for what is published as a folder of
        several models; None for a folder of one. The keys of `weights` begin with their names."""
        return None

    def adapter_map(self) -> AdapterMap | None:
        """Which parameters are low-rank adapters, on what and under which published names; None
        for none. From it follow `init.adapters`, and export and import of adapters alone."""
        return None

    def complete_import(self, params: Params, missing: frozenset[str]) -> Params:
        """Fill parameters absent from a known base checkpoint (see `WeightMap` `optional`).

        `missing` holds the PyTorch keys that the file lacked; they are zeros in `params`.
        """
        if missing:
            raise ValueError(f"{type(self).__name__}: no rule to fill missing keys {missing}")
        return params

    def verify_export(self, folder: Path, params: Params, rng: Array) -> dict[str, float]:
        """Relative errors, by output name, of PyTorch on the exported `folder` against us.

        Empty when the system has no PyTorch reference. Raises ImportError without torch.
        """
        del folder, params, rng
        return {}

    def flops_per_example(self) -> float | None:
        """Analytic forward+backward model FLOPs per example, for MFU; None when not known."""
        return None
