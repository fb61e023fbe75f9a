"""Cross-entropy of a language model without its logits ever being held at once.

    L = sum_t w_t (lse_v z_tv - z_{t, label_t}) / sum_t w_t,      z = states head, in float32

A scan goes over pieces of the texts; each piece's logits exist only inside it. Where a gradient is
wanted it is taken in the same pass, piece by piece, so that the logits are formed once, and three
matrix products are all there are. The gradient of the head is accumulated in float32, under a mesh
on every device for its own rows, and summed over devices once at the end. A head or states that
are not differentiated cost nothing.

Shape legend:  B rows   T positions   D width   V vocabulary
               N pieces   G groups of rows (devices along the batch)   R rows of a group
               C positions of a piece
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jaxmods import partitioning

IGNORE = -100  # the label of a position without a target, as in PyTorch


class TokenLoss(NamedTuple):
    """Mean loss over the counted positions, their total weight, and the share of them whose
    greatest logit is the label's (no gradient). float32 scalars; 0 where nothing is counted."""

    loss: jax.Array
    weight: jax.Array
    accuracy: jax.Array


def next_token_labels(labels_BT: jax.Array) -> jax.Array:
    """Targets of every position: labels moved to the left by one, the last one `IGNORE`."""
    return jnp.pad(labels_BT[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORE)


def token_cross_entropy(
    states_BTD: jax.Array,
    head_DV: jax.Array,
    labels_BT: jax.Array,
    *,
    weights_BT: jax.Array | None = None,
    piece: int = 1024,
) -> TokenLoss:
    """The loss of one batch.

    Args:
      states_BTD: states of which position t predicts `labels_BT[:, t]` (see `next_token_labels`).
      head_DV: matrix from states to logits.
      labels_BT: int, in [0, V), or `IGNORE`.
      weights_BT: float, weight of each position (no gradient); None: 1. Ignored positions have 0.
      piece: about so many tokens' logits exist at once on a device.

    Raises:
      ValueError: shapes that do not fit together.
    """
    rows, positions, width = states_BTD.shape
    for name, array in (("labels", labels_BT), ("weights", weights_BT)):
        if array is not None and array.shape != (rows, positions):
            raise ValueError(
                f"token_cross_entropy: expected {name} [B, T] = {(rows, positions)}, "
                f"found {array.shape}"
            )
    if head_DV.shape[0] != width:
        raise ValueError(
            f"token_cross_entropy: expected a head [D, V] with D = {width}, found {head_DV.shape}"
        )
    counted = labels_BT != IGNORE
    weights = counted.astype(jnp.float32)
    if weights_BT is not None:
        weights = weights * jax.lax.stop_gradient(weights_BT.astype(jnp.float32))
    total = jnp.sum(weights)
    groups = _groups(rows)
    length = max(1, piece // (rows // groups))
    pieces = math.ceil(positions / length)
    length = math.ceil(positions / pieces)
    summed, correct = _sums(
        _cut(states_BTD, groups, pieces, length),
        head_DV,
        _cut(jnp.where(counted, labels_BT, 0), groups, pieces, length),
        _cut(weights, groups, pieces, length),
    )
    positive = jnp.where(total > 0, total, 1.0)
    return TokenLoss(summed / positive, total, jax.lax.stop_gradient(correct) / positive)


def _groups(rows: int) -> int:
    """Devices along the batch axes of the active mesh."""
    active = partitioning.active()
    if active is None:
        return 1
    mesh, rules = active
    axes = partitioning.spec_for((rows,), ("batch",), mesh, rules)[0]
    names = () if axes is None else (axes,) if isinstance(axes, str) else axes
    return math.prod(mesh.shape[name] for name in names)


def _cut(x: jax.Array, groups: int, pieces: int, length: int) -> jax.Array:
    """[B, T, ...] -> [N, G, R, C, ...], padded with zeros.

    A piece takes every N-th position, so that a sequence that is split over devices stays split.
    """
    rows, positions, *rest = x.shape
    x = jnp.pad(x, ((0, 0), (0, pieces * length - positions), *((0, 0),) * len(rest)))
    x = x.reshape(groups, rows // groups, length, pieces, *rest)
    axes = (None, "batch", None, "seq", *(None,) * len(rest))
    return partitioning.constrain(jnp.moveaxis(x, 3, 0), axes)


class _Piece(NamedTuple):
    logits: jax.Array  # float32 [G, R, C, V]
    lse: jax.Array  # [G, R, C, 1]
    is_label: jax.Array  # bool [G, R, C, V]
    loss: jax.Array
    correct: jax.Array


def _piece(states: jax.Array, head: jax.Array, labels: jax.Array, weights: jax.Array) -> _Piece:
    logits = jnp.einsum("GRCD,DV->GRCV", states, head, preferred_element_type=jnp.float32)
    logits = partitioning.constrain(logits, ("batch", None, "seq", "vocab"))
    top = jnp.max(logits, axis=-1, keepdims=True)
    lse = top + jnp.log(jnp.sum(jnp.exp(logits - top), axis=-1, keepdims=True))
    is_label = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 3) == labels[..., None]
    chosen = jnp.sum(jnp.where(is_label, logits, 0.0), axis=-1)
    loss = jnp.sum(weights * (lse[..., 0] - chosen))
    correct = jnp.sum(weights * (chosen >= top[..., 0]))
    return _Piece(logits, lse, is_label, loss, correct)


@jax.custom_vjp
def _sums(
    states: jax.Array, head: jax.Array, labels: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(weighted sum of the losses, weighted number of hits) over pieces [N, G, R, C, ...]."""

    def step(carry: Any, one: Any) -> Any:
        states, labels, weights = one
        piece = _piece(states, head, labels, weights)
        return (carry[0] + piece.loss, carry[1] + piece.correct), None

    zero = jnp.zeros((), jnp.float32)
    return jax.lax.scan(step, (zero, zero), (states, labels, weights))[0]


def _forward(states: Any, head: Any, labels: Any, weights: Any) -> Any:
    """Sums, and the gradients of the first of them that will be asked for."""
    values = (states.value, labels.value, weights.value)
    matrix = head.value
    groups, (width, vocabulary) = values[0].shape[1], matrix.shape

    def step(carry: Any, one: Any) -> Any:
        x, labels, weights = one
        loss, correct, of_head = carry
        piece = _piece(x, matrix, labels, weights)
        slope = weights[..., None] * (jnp.exp(piece.logits - piece.lse) - piece.is_label)
        slope = slope.astype(matrix.dtype)
        of_states = None
        if states.perturbed:
            of_states = jnp.einsum("GRCV,DV->GRCD", slope, matrix).astype(x.dtype)
        if head.perturbed:
            of_head = of_head + jnp.einsum(
                "GRCD,GRCV->GDV", x, slope, preferred_element_type=jnp.float32
            )
            of_head = partitioning.constrain(of_head, ("batch", None, "vocab"))
        return (loss + piece.loss, correct + piece.correct, of_head), of_states

    zero = jnp.zeros((), jnp.float32)
    of_head = None
    if head.perturbed:
        of_head = jnp.zeros((groups, width, vocabulary), jnp.float32)
        of_head = partitioning.constrain(of_head, ("batch", None, "vocab"))
    (loss, correct, of_head), of_states = jax.lax.scan(step, (zero, zero, of_head), values)
    if of_head is not None:
        of_head = jnp.sum(of_head, axis=0)
    return (loss, correct), (of_states, of_head, jnp.zeros((0,), matrix.dtype))


def _backward(gradients: Any, slopes: Any) -> Any:
    of_states, of_head, like = gradients
    slope = slopes[0]
    if isinstance(slope, SymbolicZero):
        return None, None, None, None
    if of_states is not None:
        of_states = (of_states * slope).astype(of_states.dtype)
    if of_head is not None:
        of_head = (of_head * slope).astype(like.dtype)
    return of_states, of_head, None, None


_sums.defvjp(_forward, _backward, symbolic_zeros=True)
