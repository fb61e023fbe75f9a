"""Optimiser of a recipe: optax transformations by label, schedules, weight-decay masks, EMA.

Each label of `System.labels` but "frozen" is a group with its own schedule and moments. Every
optimiser below ends in `- lr * (direction + weight_decay * parameter)`: decay is decoupled and
scaled by the learning rate, as in PyTorch's AdamW.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxmods.system import FROZEN
from train.exits import UserError
from train.experiment import GroupOptim, Optim

Schedule = Callable[[Any], jax.Array]


def make_schedule(optim: Optim, peak: float, steps: int) -> Schedule:
    """Learning rate at a 0-based step, float32.

    Linear warm-up `peak * step / warmup_steps`, then over p = (step - warmup) / (steps - warmup):
    cosine `peak * (e + (1-e) * (1+cos(pi p))/2)`, linear `peak * (1 + (e-1) p)` with
    e = `end_factor`; constant; or step_drop: `peak`, divided by 10 from `drop_at` on. A run that
    is shorter than its warm-up ends inside it.
    """
    warmup = optim.warmup_steps
    if warmup < 0:
        raise UserError(f"optim.warmup_steps: expected 0 or more, found {warmup}")
    if optim.schedule == "step_drop" and optim.drop_at is None:
        raise UserError("optim.drop_at: step_drop needs the step of the drop; set optim.drop_at")

    def schedule(step: Any) -> jax.Array:
        at = jnp.asarray(step, jnp.float32)
        p = jnp.clip((at - warmup) / max(steps - warmup, 1), 0.0, 1.0)
        end = optim.end_factor
        if optim.schedule == "cosine":
            factor = end + (1.0 - end) * 0.5 * (1.0 + jnp.cos(jnp.pi * p))
        elif optim.schedule == "linear":
            factor = 1.0 + (end - 1.0) * p
        elif optim.schedule == "step_drop":
            factor = jnp.where(at >= (optim.drop_at or 0), 0.1, 1.0)
        else:
            factor = jnp.ones_like(at)
        if warmup:
            factor = jnp.where(at < warmup, at / warmup, factor)
        return jnp.asarray(peak, jnp.float32) * factor

    return schedule


@dataclasses.dataclass(frozen=True)
class Group:
    """One optimiser group with everything inherited resolved.

    `schedule` counts the group's own updates: a group that starts at step s warms up from s on.
    """

    label: str
    lr: float
    weight_decay: float
    b1: float
    b2: float
    start_step: int
    schedule: Schedule

    def rate(self, step: Any) -> jax.Array:
        """Learning rate at a step of the run; 0 before `start_step`."""
        at = jnp.asarray(step)
        own = self.schedule(jnp.maximum(at - self.start_step, 0))
        return jnp.where(at >= self.start_step, own, 0.0)


def make_groups(optim: Optim, labels: Any, steps: int) -> dict[str, Group]:
    """Groups for the labels that occur in a label tree, "frozen" left out.

    Raises:
      UserError: a `GroupOptim` for a label that no parameter has, or given twice.
    """
    present = sorted(set(jax.tree.leaves(labels)) - {FROZEN})
    given: dict[str, GroupOptim] = {}
    for group in optim.groups:
        if group.label in given:
            raise UserError(f"optim.groups: label {group.label!r} is given twice")
        if group.label not in present:
            raise UserError(
                f"optim.groups: no parameter is labelled {group.label!r}; "
                f"labels of this system: {', '.join(present) or 'none'}"
            )
        given[group.label] = group
    result = {}
    for label in present:
        own = given.get(label, GroupOptim(label))
        lr = optim.lr if own.lr is None else own.lr
        if not 0 <= own.start_step < steps:
            raise UserError(
                f"optim.groups: start_step of {label!r}: expected 0..{steps - 1}, "
                f"found {own.start_step}"
            )
        result[label] = Group(
            label=label,
            lr=lr,
            weight_decay=optim.weight_decay if own.weight_decay is None else own.weight_decay,
            b1=optim.b1 if own.b1 is None else own.b1,
            b2=optim.b2 if own.b2 is None else own.b2,
            start_step=own.start_step,
            schedule=make_schedule(optim, lr, steps - own.start_step),
        )
    return result


def make_optimizer(
    optim: Optim, groups: Mapping[str, Group], labels: Any, decay: Any
) -> optax.GradientTransformation:
    """The optimiser over the trained parameters.

    Args:
      labels: tree like the trained parameters of label names.
      decay: tree like the trained parameters of bools.
    """
    by_label = {label: _one(optim, group, decay) for label, group in groups.items()}
    transform = optax.multi_transform(by_label, labels)
    return optax.GradientTransformation(transform.init, transform.update)


def _one(optim: Optim, group: Group, decay: Any) -> optax.GradientTransformation:
    if optim.name == "adam" and group.weight_decay:
        raise UserError(
            "optim.weight_decay: adam has no decoupled decay; use optim.name=adamw, or 0"
        )
    chain: list[optax.GradientTransformation]
    if optim.name in ("adamw", "adam"):
        chain = [optax.scale_by_adam(b1=group.b1, b2=group.b2, eps=optim.eps)]
    elif optim.name == "lion":
        chain = [optax.scale_by_lion(b1=group.b1, b2=group.b2)]
    elif optim.name == "sgd":
        chain = [optax.trace(decay=group.b1)] if group.b1 else []
    else:  # adafactor, without momentum: factored second moments, update clipping, relative size
        chain = [
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(1.0),
            optax.scale_by_param_block_rms(),
        ]
    if group.weight_decay:
        # multi_transform hands each group a tree with the others masked out; the mask must match.
        chain.append(optax.add_decayed_weights(group.weight_decay, _masked_like(decay)))
    chain.append(optax.scale_by_learning_rate(group.schedule))
    transform = optax.chain(*chain)
    return start_at(transform, group.start_step) if group.start_step else transform


def _masked_like(decay: Any) -> Callable[[Any], Any]:
    def hidden(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    def mask(params: Any) -> Any:
        return jax.tree.map(lambda p, d: p if hidden(p) else d, params, decay, is_leaf=hidden)

    return mask


class StartState(NamedTuple):
    """State of `start_at`: updates asked for so far, and the inner state."""

    calls: jax.Array
    inner: Any


def start_at(inner: optax.GradientTransformation, start: int) -> optax.GradientTransformation:
    """`inner`, held still for the first `start` calls: zero updates, no statistics, no schedule."""

    def init(params: Any) -> StartState:
        return StartState(jnp.zeros((), jnp.int32), inner.init(params))

    def update(updates: Any, state: StartState, params: Any = None) -> tuple[Any, StartState]:
        active = state.calls >= start
        new_updates, new_inner = inner.update(updates, state.inner, params)
        new_updates = jax.tree.map(lambda u: jnp.where(active, u, jnp.zeros_like(u)), new_updates)
        kept = jax.tree.map(lambda n, o: jnp.where(active, n, o), new_inner, state.inner)
        return new_updates, StartState(optax.safe_increment(state.calls), kept)

    return optax.GradientTransformation(init, update)
