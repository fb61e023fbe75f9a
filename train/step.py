"""The training step: one jitted, donated function for every system.

    gradients   each named loss, with respect to the parameters of its own labels
    clip        each loss's gradients by their global norm
    update      optax, by label; moving average
    guard       nothing is written when a loss or a gradient norm is not finite, nor in any step
                after that: a step only applies to the state whose number is its own

A loss sees parameters in `Precision.compute`; gradients, optimiser and masters keep theirs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from jaxmods.partitioning import sharding_for, use_mesh
from jaxmods.system import FROZEN, ArraySpec, LossOutput, NamedLoss, Params
from train.exits import UserError
from train.state import Plan, TrainState, cast_floating, flatten, merge, select


@dataclasses.dataclass(frozen=True)
class StepOutput:
    """What a step returns besides the state, as two small vectors (one transfer each).

    Attributes:
      scalars: float32 [n], in the order of `Step.metric_names`; the first is 1 for "applied".
      changes: float32 [leaves], squared L2 norm of the change of each trained tensor, in the
        order of `Step.trained_names`.
    """

    scalars: Any
    changes: Any


jax.tree_util.register_dataclass(StepOutput, data_fields=["scalars", "changes"], meta_fields=[])

StepFn = Callable[[TrainState, dict[str, jax.Array], Any], tuple[TrainState, StepOutput]]


@dataclasses.dataclass(frozen=True)
class Step:
    """The compiled step of a run and the names of what it returns."""

    run: StepFn
    metric_names: tuple[str, ...]
    trained_names: tuple[str, ...]
    trained_labels: tuple[str, ...]
    batch_shardings: dict[str, NamedSharding]

    def metrics(self, scalars: np.ndarray) -> dict[str, float]:
        """Named metrics of a fetched vector, the "applied" flag left out."""
        return {n: float(v) for n, v in zip(self.metric_names, scalars[1:], strict=True)}


def batch_shardings(plan: Plan, spec: dict[str, ArraySpec]) -> dict[str, NamedSharding]:
    """Where the arrays of a batch live."""
    rules = plan.experiment.rules
    return {k: sharding_for(s.shape, s.axes, plan.mesh, rules) for k, s in spec.items()}


@dataclasses.dataclass(frozen=True)
class TracedStep:
    """The step traced for its shapes and shardings, not yet compiled.

    Attributes:
      traced: `.jaxpr` is the program, `.lower().compile()` makes it.
      metric_names: order of `StepOutput.scalars[1:]`.
    """

    traced: jax.stages.Traced
    metric_names: tuple[str, ...]
    batch_shardings: dict[str, NamedSharding]


def trace_step(plan: Plan) -> TracedStep:
    """Trace the step for the shapes of the recipe. Needs no data, no weights and no device.

    Raises:
      UserError: settings that this system's step cannot honour.
    """
    experiment = plan.experiment
    losses = _checked_losses(plan)
    spec = experiment.system.batch_spec(experiment.batch_size)
    accumulate = _checked_accumulate(plan, spec)
    shardings = batch_shardings(plan, spec)
    names: list[str] = []

    def step(
        state: TrainState, batch: dict[str, jax.Array], index: jax.Array
    ) -> tuple[TrainState, StepOutput]:
        with use_mesh(plan.mesh, experiment.rules):
            rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
            grads, metrics, carried = _gradients(plan, losses, accumulate, state, batch, rng)
            new, metrics, changes, finite = _update(plan, losses, state, grads, metrics, carried)
        applied = finite & (state.step == index)
        kept = jax.tree.map(lambda n, o: jnp.where(applied, n, o), new, state)
        kept = dataclasses.replace(kept, frozen=state.frozen)
        names[:] = sorted(metrics)
        scalars = [applied.astype(jnp.float32), *(metrics[n] for n in names)]
        return kept, StepOutput(jnp.stack(scalars), jnp.where(applied, changes, 0.0))

    replicated = NamedSharding(plan.mesh, PartitionSpec())
    jitted = jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(plan.shardings, shardings, replicated),
        out_shardings=(plan.shardings, StepOutput(replicated, replicated)),
    )
    traced = jitted.trace(
        plan.abstract,
        {k: s.struct() for k, s in spec.items()},
        jax.ShapeDtypeStruct((), jnp.int32),
    )
    return TracedStep(traced, tuple(names), shardings)


def compile_step(plan: Plan) -> Step:
    """Trace, lower and compile the step for the shapes of the recipe. Needs no data.

    Raises:
      UserError: settings that this system's step cannot honour.
    """
    step = trace_step(plan)
    flat_labels = flatten(plan.labels)
    leaves = leaf_paths(plan.abstract.trained)
    return Step(
        run=step.traced.lower().compile(),
        metric_names=step.metric_names,
        trained_names=tuple("/".join(p) for p in leaves),
        trained_labels=tuple(flat_labels[p] for p in leaves),
        batch_shardings=step.batch_shardings,
    )


def leaf_paths(tree: Params) -> list[tuple[str, ...]]:
    """Paths of the leaves, in the order of `jax.tree.leaves`."""
    return [tuple(k.key for k in keys) for keys, _ in jax.tree_util.tree_leaves_with_path(tree)]


def _checked_losses(plan: Plan) -> tuple[NamedLoss, ...]:
    """The system's losses with `labels` filled in. Every trained label belongs to exactly one."""
    losses = plan.experiment.system.losses()
    owner: dict[str, str] = {}
    result = []
    for loss in losses:
        labels = tuple(plan.groups) if loss.labels is None else loss.labels
        for label in labels:
            if label == FROZEN or label not in plan.groups:
                raise UserError(
                    f"loss {loss.name!r}: no parameter is labelled {label!r}; "
                    f"trained labels: {', '.join(plan.groups)}"
                )
            if label in owner:
                raise UserError(
                    f"label {label!r} is trained by two losses, {owner[label]!r} and "
                    f"{loss.name!r}; give every label one loss"
                )
            owner[label] = loss.name
        result.append(dataclasses.replace(loss, labels=labels))
    orphans = [label for label in plan.groups if label not in owner]
    if orphans:
        raise UserError(f"no loss trains label {', '.join(orphans)}; freeze it or name it in one")
    return tuple(result)


def _checked_accumulate(plan: Plan, spec: dict[str, ArraySpec]) -> int:
    experiment = plan.experiment
    parts = experiment.optim.accumulate
    if parts < 1:
        raise UserError(f"optim.accumulate: expected 1 or more, found {parts}")
    if parts == 1:
        return 1
    if experiment.system.batch_negatives:
        raise UserError(
            f"optim.accumulate: expected 1 for {type(experiment.system).__name__}, found {parts}; "
            "its negatives come from the batch, so micro-batches would be another objective"
        )
    if experiment.batch_size % parts:
        raise UserError(
            f"optim.accumulate: batch_size {experiment.batch_size} cannot be split into {parts}"
        )
    small = experiment.system.batch_spec(experiment.batch_size // parts)
    for name, array in spec.items():
        wanted = (array.shape[0] // parts, *array.shape[1:]) if array.shape else ()
        if small[name].shape != wanted:
            raise UserError(
                f"optim.accumulate: {name} {array.shape} cannot be split into {parts} equal parts"
            )
    return parts


def _gradients(
    plan: Plan,
    losses: Sequence[NamedLoss],
    accumulate: int,
    state: TrainState,
    batch: dict[str, jax.Array],
    rng: jax.Array,
) -> tuple[Params, dict[str, jax.Array], Any]:
    """Gradients of all losses (disjoint trees, merged), metrics, and the new carried state."""

    def once(carried: Any, part: dict[str, jax.Array], key: jax.Array) -> tuple[Any, Any, Any]:
        grads, metrics = [], {}
        for loss in losses:
            grad, output = _one_gradient(plan, loss, state, carried, part, key)
            carried = output.state
            grads.append(grad)
            prefix = f"{loss.name}/" if len(losses) > 1 else ""
            if prefix:
                metrics[f"loss/{loss.name}"] = output.loss
            metrics.update({f"{prefix}{k}": _scalar(k, v) for k, v in output.metrics.items()})
            metrics["loss"] = metrics.get("loss", 0.0) + output.loss.astype(jnp.float32)
        return merge(*grads), {k: v.astype(jnp.float32) for k, v in metrics.items()}, carried

    if accumulate == 1:
        return once(state.state, batch, rng)

    spec = plan.experiment.system.batch_spec(plan.experiment.batch_size // accumulate)
    shardings = batch_shardings(plan, spec)

    def body(carry: tuple[Any, Any, Any], xs: tuple[Any, jax.Array]) -> tuple[Any, None]:
        carried, grad_sum, metric_sum = carry
        part, number = xs
        part = jax.lax.with_sharding_constraint(part, shardings)
        grads, metrics, carried = once(carried, part, jax.random.fold_in(rng, number))
        return (
            carried,
            jax.tree.map(_add, grad_sum, grads),
            jax.tree.map(_add, metric_sum, metrics),
        ), None

    parts = {k: v.reshape(accumulate, -1, *v.shape[1:]) for k, v in batch.items()}
    shapes = jax.eval_shape(once, state.state, {k: v[0] for k, v in parts.items()}, rng)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), shapes[:2])
    (carried, grads, metrics), _ = jax.lax.scan(
        body, (state.state, *zeros), (parts, jnp.arange(accumulate))
    )
    grads, metrics = jax.tree.map(lambda x: x / accumulate, (grads, metrics))
    return grads, metrics, carried


def _add(total: jax.Array, part: jax.Array) -> jax.Array:
    return total + part.astype(jnp.float32)


def _one_gradient(
    plan: Plan,
    loss: NamedLoss,
    state: TrainState,
    carried: Any,
    batch: dict[str, jax.Array],
    rng: jax.Array,
) -> tuple[Params, LossOutput]:
    own = set(loss.labels or ())
    mine = select(state.trained, plan.labels, own)
    others = select(state.trained, plan.labels, set(plan.groups) - own)
    compute = plan.experiment.precision.compute

    def value(mine: Params) -> tuple[jax.Array, LossOutput]:
        params = cast_floating(merge(mine, others, state.frozen), compute)
        output = loss.fn(params, carried, batch, rng, state.step)
        return output.loss.astype(jnp.float32), output

    (_, output), grad = jax.value_and_grad(value, has_aux=True)(mine)
    return grad, output


def _scalar(name: str, value: Any) -> jax.Array:
    value = jnp.asarray(value)
    if value.shape:
        raise UserError(f"metric {name!r}: expected a scalar, found shape {value.shape}")
    return value


def _update(
    plan: Plan,
    losses: Sequence[NamedLoss],
    state: TrainState,
    grads: Params,
    metrics: dict[str, jax.Array],
    carried: Any,
) -> tuple[TrainState, dict[str, jax.Array], jax.Array, jax.Array]:
    """The new state, all metrics, the squared change of each trained tensor, and finiteness."""
    optim = plan.experiment.optim
    metrics = dict(metrics)
    squares = jax.tree.map(lambda g: jnp.sum(jnp.square(g.astype(jnp.float32))), grads)
    by_label = {label: _sum(select(squares, plan.labels, {label})) for label in plan.groups}
    metrics["grad_norm"] = jnp.sqrt(_sum(squares))
    if len(by_label) > 1:
        metrics.update({f"grad_norm/{k}": jnp.sqrt(v) for k, v in by_label.items()})
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])

    if optim.clip_norm is not None:
        parts = []
        for loss in losses:
            norm = jnp.sqrt(sum(by_label[label] for label in loss.labels or ()))
            scale = jnp.minimum(1.0, optim.clip_norm / jnp.maximum(norm, 1e-12))
            mine = select(grads, plan.labels, set(loss.labels or ()))
            parts.append(jax.tree.map(lambda g, s=scale: (g * s).astype(g.dtype), mine))
        grads = merge(*parts)

    updates, opt_state = plan.optimizer.update(grads, state.opt_state, state.trained)
    trained = optax.apply_updates(state.trained, updates)
    changes = jax.tree.map(
        lambda n, o: jnp.sum(jnp.square(n.astype(jnp.float32) - o.astype(jnp.float32))),
        trained,
        state.trained,
    )
    metrics["update_norm"] = jnp.sqrt(_sum(changes))
    for label, group in plan.groups.items():
        metrics[f"lr/{label}" if len(plan.groups) > 1 else "lr"] = group.rate(state.step)

    ema = state.ema
    if optim.ema_decay is not None:
        d = optim.ema_decay
        ema = jax.tree.map(lambda e, p: (d * e + (1 - d) * p).astype(e.dtype), ema, trained)
    new = TrainState(
        trained=trained,
        frozen=state.frozen,
        opt_state=opt_state,
        state=carried,
        step=state.step + 1,
        rng=state.rng,
        ema=ema,
    )
    return new, metrics, jnp.stack(jax.tree.leaves(changes)), finite


def _sum(tree: Any) -> jax.Array:
    return jnp.sum(jnp.stack(jax.tree.leaves(tree)))
