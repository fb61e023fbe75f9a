"""The state of a training run, its abstract form and its shardings.

Parameters are held as two trees, trained and frozen, split by `System.labels`; frozen parameters
have no gradient, no optimiser state and no average, and are stored in `Precision.frozen`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxmods.partitioning import logical_axes, sharding_for, unbox
from jaxmods.system import FROZEN, Params, State
from train.exits import UserError
from train.experiment import Experiment
from train.optim import Group, make_groups, make_optimizer

Flat = dict[tuple[str, ...], Any]


@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything a step reads and writes; of arrays, or of their abstract forms or shardings.

    Attributes:
      trained, frozen: nested dicts; together they are the system's parameters.
      opt_state: optimiser state of `trained`.
      state: the system's own carried state.
      step: int32, updates done so far.
      rng: uint32 key data of the run; each step folds its number in.
      ema: averaged copy of `trained`, empty when off.
    """

    trained: Params
    frozen: Params
    opt_state: Any
    state: State
    step: Any
    rng: Any
    ema: Params

    @property
    def params(self) -> Params:
        """The system's parameters."""
        return merge(self.trained, self.frozen)

    @property
    def averaged(self) -> Params:
        """Parameters for evaluation and export: the moving average where there is one."""
        return merge(self.ema or self.trained, self.frozen)


jax.tree_util.register_dataclass(
    TrainState,
    data_fields=["trained", "frozen", "opt_state", "state", "step", "rng", "ema"],
    meta_fields=[],
)


def flatten(tree: Params) -> Flat:
    """Leaves of a nested dict by path."""
    return flax.traverse_util.flatten_dict(tree)


def unflatten(flat: Flat) -> Params:
    """The reverse of `flatten`."""
    return flax.traverse_util.unflatten_dict(flat)


def merge(*trees: Params) -> Params:
    """One nested dict of several with disjoint leaves."""
    flat: Flat = {}
    for tree in trees:
        flat.update(flatten(tree))
    return unflatten(flat)


def select(tree: Params, labels: Params, wanted: set[str]) -> Params:
    """The leaves of `tree` whose label is wanted, as a smaller nested dict."""
    flat_labels = flatten(labels)
    return unflatten({k: v for k, v in flatten(tree).items() if flat_labels[k] in wanted})


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that follows from a recipe without allocating anything.

    Attributes:
      axes: logical axes of every parameter. labels, decay: as the system gives them, whole tree.
      abstract: `TrainState` of ShapeDtypeStructs. shardings: `TrainState` of shardings.
      groups: optimiser groups by label. optimizer: over `trained`.
    """

    experiment: Experiment
    mesh: Mesh
    axes: Params
    labels: Params
    decay: Params
    abstract: TrainState
    shardings: TrainState
    groups: dict[str, Group]
    optimizer: optax.GradientTransformation

    def abstract_sharded(self) -> TrainState:
        """`abstract` with its shardings attached: the target of every restore."""
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            self.abstract,
            self.shardings,
        )


def make_plan(experiment: Experiment, mesh: Mesh) -> Plan:
    """Shapes, labels, optimiser and shardings of an experiment.

    Raises:
      UserError: labels that do not match the parameters, nothing to train, unknown groups.
    """
    system, precision = experiment.system, experiment.precision
    boxed = jax.eval_shape(system.init, jax.random.key(0))
    axes = logical_axes(boxed)
    params = unbox(boxed)
    labels, decay = system.labels(params), system.decay(params)
    for name, tree in (("labels", labels), ("decay", decay)):
        different = set(flatten(params)) ^ set(flatten(tree))
        if different:
            missing = sorted("/".join(p) for p in different)
            raise UserError(
                f"{type(system).__name__}.{name}: expected one entry per parameter, "
                f"differing at {', '.join(missing[:5])}"
            )
    groups = make_groups(experiment.optim, labels, experiment.steps)
    if not groups:
        raise UserError(f"{type(system).__name__}: every parameter is frozen, nothing to train")
    trained_labels = select(labels, labels, set(groups))
    trained_decay = select(decay, labels, set(groups))
    optimizer = make_optimizer(experiment.optim, groups, trained_labels, trained_decay)

    trained = cast_struct(select(params, labels, set(groups)), precision.params)
    frozen = cast_struct(select(params, labels, {FROZEN}), precision.frozen)
    abstract = TrainState(
        trained=trained,
        frozen=frozen,
        opt_state=jax.eval_shape(optimizer.init, trained),
        state=jax.eval_shape(system.init_state, params),
        step=jax.ShapeDtypeStruct((), jnp.int32),
        rng=jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))),
        ema=trained if experiment.optim.ema_decay is not None else {},
    )
    shardings = _state_shardings(experiment, mesh, axes, abstract)
    return Plan(experiment, mesh, axes, labels, decay, abstract, shardings, groups, optimizer)


def cast_struct(tree: Params, dtype: str) -> Params:
    """Abstract tree with floating leaves in another dtype."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, jnp.dtype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype
        ),
        tree,
    )


def cast_floating(tree: Any, dtype: str) -> Any:
    """Floating leaves of a tree of arrays in another dtype."""
    target = jnp.dtype(dtype)
    return jax.tree.map(
        lambda x: x.astype(target) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


def _state_shardings(
    experiment: Experiment, mesh: Mesh, axes: Params, abstract: TrainState
) -> TrainState:
    flat_axes = flatten_axes(axes)
    replicated = NamedSharding(mesh, PartitionSpec())

    def of_params(tree: Params) -> Params:
        return unflatten(
            {
                path: sharding_for(leaf.shape, flat_axes[path], mesh, experiment.rules)
                for path, leaf in flatten(tree).items()
            }
        )

    trained = of_params(abstract.trained)
    by_path = {
        path: (leaf.shape, sharding)
        for (path, leaf), sharding in zip(
            flatten(abstract.trained).items(), flatten(trained).values(), strict=True
        )
    }

    def of_optimizer(keys: tuple[Any, ...], leaf: Any) -> NamedSharding:
        """A leaf that mirrors a parameter (its path ends in the parameter's) is placed alike."""
        names = tuple(k.key for k in keys if isinstance(k, jax.tree_util.DictKey))
        for start in range(len(names)):
            shape, sharding = by_path.get(names[start:], (None, None))
            if sharding is not None and shape == leaf.shape:
                return sharding
        return replicated

    return TrainState(
        trained=trained,
        frozen=of_params(abstract.frozen),
        opt_state=jax.tree_util.tree_map_with_path(of_optimizer, abstract.opt_state),
        state=jax.tree.map(lambda _: replicated, abstract.state),
        step=replicated,
        rng=replicated,
        ema=trained if abstract.ema else {},
    )


def flatten_axes(axes: Params) -> dict[tuple[str, ...], tuple[str | None, ...]]:
    """Logical axes by path (the tuples of names are leaves)."""
    return flax.traverse_util.flatten_dict(axes)


def init_state(
    plan: Plan, params: Params | None = None, constants: Mapping[str, np.ndarray] | None = None
) -> TrainState:
    """A fresh state, created on the devices where it belongs.

    Args:
      params: parameters to start from (imported weights); None draws them from the seed.
      constants: arrays by path (`a/b`) that take the place of drawn ones, see
        `Pipeline.constants`.

    Raises:
      UserError: parameters or constants that do not fit the system.
    """
    experiment = plan.experiment
    system, precision = experiment.system, experiment.precision

    def build(params: Params, rng: jax.Array) -> TrainState:
        trained = cast_floating(select(params, plan.labels, set(plan.groups)), precision.params)
        frozen = cast_floating(select(params, plan.labels, {FROZEN}), precision.frozen)
        return TrainState(
            trained=trained,
            frozen=frozen,
            opt_state=plan.optimizer.init(trained),
            state=system.init_state(params),
            step=jnp.zeros((), jnp.int32),
            rng=jax.random.key_data(rng),
            ema=jax.tree.map(jnp.copy, trained) if plan.abstract.ema else {},
        )

    def from_seed(seed: jax.Array, given: Flat) -> TrainState:
        init_rng, run_rng = jax.random.split(jax.random.key(seed))
        drawn = flatten(unbox(system.init(init_rng)))
        given = {path: value.astype(drawn[path].dtype) for path, value in given.items()}
        return build(unflatten({**drawn, **given}), run_rng)

    def from_params(params: Params, seed: jax.Array) -> TrainState:
        return build(params, jax.random.split(jax.random.key(seed))[1])

    seed = np.uint32(experiment.seed)
    if params is None:
        given = _checked_constants(plan, constants or {})
        return jax.jit(from_seed, out_shardings=plan.shardings)(seed, given)
    check_params(params, plan.abstract.params, "initial weights")
    return jax.jit(from_params, out_shardings=plan.shardings)(params, seed)


def _checked_constants(plan: Plan, constants: Mapping[str, np.ndarray]) -> Flat:
    try:
        plan.experiment.system.check_constants(constants)
    except ValueError as error:
        raise UserError(str(error)) from error
    want, labels = flatten(plan.abstract.params), flatten(plan.labels)
    given = {tuple(name.split("/")): np.asarray(value) for name, value in constants.items()}
    for path, value in given.items():
        name = "/".join(path)
        if path not in want or want[path].shape != value.shape:
            expected = want[path].shape if path in want else "no such parameter"
            raise UserError(
                f"data constant {name}: expected {expected} in "
                f"{type(plan.experiment.system).__name__}, found shape {value.shape}; give the "
                "system the sizes of the data"
            )
        if labels[path] != FROZEN:
            raise UserError(
                f"data constant {name}: expected a frozen parameter, found one labelled "
                f"{labels[path]!r}"
            )
    return given


def check_params(params: Params, expected: Params, what: str) -> None:
    """Raise UserError naming the first differences in names or shapes."""
    have, want = flatten(params), flatten(expected)
    problems = [f"missing {'/'.join(p)}" for p in want if p not in have]
    problems += [f"unexpected {'/'.join(p)}" for p in have if p not in want]
    problems += [
        f"{'/'.join(p)}: expected shape {want[p].shape}, found {have[p].shape}"
        for p in want
        if p in have and tuple(have[p].shape) != tuple(want[p].shape)
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(f"{what}: {'; '.join(problems[:5])}{more}")
