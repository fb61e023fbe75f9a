"""Symmetric softmax contrastive loss (InfoNCE) in memory linear in the batch.

    S_ij = exp(t) <x_i, y_j>
    L = mean_i (lse_j S_ij - S_ii) / 2  +  mean_j (lse_i S_ij - S_jj) / 2

The B x B scores exist only as [rows of this device, chunk] pieces: a scan over column chunks keeps
running log-sum-exps of rows and columns, and the backward pass forms each piece again. Gradients
are exact. Under a mesh the rows are split over the batch axes and the columns are gathered, so a
device holds B x P embeddings and one piece.

Shape legend:  B pairs   R rows   C columns   P embedding width
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxmods import partitioning

SameText = Literal["negative", "mask", "positive"]


class Contrast(NamedTuple):
    """Loss (scalar) and in-batch accuracies in both directions (scalars, no gradient)."""

    loss: jax.Array
    accuracy_rows: jax.Array
    accuracy_columns: jax.Array


class Side(NamedTuple):
    """What is known of the items of one side of the score matrix.

    valid: bool [B]. pair: int32 [B], equal for what belongs together. text: uint32 [B, 2], equal
    for equal texts.
    """

    valid: jax.Array
    pair: jax.Array
    text: jax.Array


class Stats(NamedTuple):
    """Per row (or column): running maximum and sum of exp(S - maximum) over the counted entries,
    sum and number of the positives, best negative."""

    top: jax.Array
    total: jax.Array
    positive: jax.Array
    positives: jax.Array
    negative: jax.Array


@dataclasses.dataclass(frozen=True)
class _Plan:
    chunk: int
    same_text: SameText
    axes: tuple[str, ...] = ()


def info_nce(
    x: jax.Array,
    y: jax.Array,
    scale: jax.Array,
    *,
    same_text: SameText = "negative",
    text: jax.Array | None = None,
    valid: jax.Array | None = None,
    chunk: int = 1024,
) -> Contrast:
    """The loss over one global batch of pairs.

    Args:
      x, y: [B, P] unit vectors; row i of both belongs together.
      scale: scalar, exp(t).
      same_text: what a pair (i, j != i) with equal texts is. "negative": like any other pair (the
        published behaviour). "mask": not counted in either direction. "positive": the target of a
        row (column) is uniform over all pairs with its text.
      text: uint32 [B, 2], see `hash_texts`; needed unless `same_text` is "negative".
      valid: bool [B], pairs that exist; None for all. Without any, the loss is 0.
      chunk: columns of a piece. Memory is O(rows of a device * chunk).

    Returns:
      Contrast, in float32.
    """
    size = x.shape[0]
    side = _side(size, same_text, text, valid)
    x, y, scale = (a.astype(jnp.float32) for a in (x, y, scale))
    active = partitioning.active()
    if active is not None and active[0].size > 1:
        mesh, rules = active
        rows = partitioning.spec_for((size,), ("batch",), mesh, rules)[0]
        if rows is not None:
            axes = (rows,) if isinstance(rows, str) else tuple(rows)
            plan = _Plan(chunk, same_text, axes)
            return _contrast(_sharded_statistics(plan, mesh, x, y, scale, side), side.valid)
    return _contrast(_statistics(_Plan(chunk, same_text), x, y, scale, side), side.valid)


def local_info_nce(
    x: jax.Array,
    y: jax.Array,
    scale: jax.Array,
    *,
    same_text: SameText = "negative",
    text: jax.Array | None = None,
    valid: jax.Array | None = None,
    chunk: int = 1024,
) -> Contrast:
    """`info_nce` within each of W groups, averaged over the groups (an empty group counts as 0).

    Args as `info_nce` with a leading W axis: x, y [W, B, P], text [W, B, 2], valid [W, B].
    """
    size = x.shape[1]

    def one(
        x: jax.Array, y: jax.Array, text: jax.Array | None, valid: jax.Array | None
    ) -> Contrast:
        side = _side(size, same_text, text, valid)
        plan = _Plan(chunk, same_text)
        return _contrast(_statistics(plan, x, y, scale.astype(jnp.float32), side), side.valid)

    x, y, text, valid = jax.tree.map(jnp.asarray, (x, y, text, valid))
    each = jax.vmap(one)(x.astype(jnp.float32), y.astype(jnp.float32), text, valid)
    return Contrast(*(jnp.mean(v) for v in each))


def hash_texts(ids: jax.Array) -> jax.Array:
    """Two independent 32-bit hashes of token ids: int [..., L] -> uint32 [..., 2].

    Different texts agree in both with probability about 2^-64 per pair (under 1e-9 for any
    collision among 131,072 texts).
    """
    position = jnp.arange(ids.shape[-1], dtype=jnp.uint32)
    hashes = []
    for seed in (0x243F6A88, 0x85A308D3):
        salt = _mix(position * jnp.uint32(0x9E3779B9) + jnp.uint32(seed))
        terms = _mix(ids.astype(jnp.uint32) * jnp.uint32(0x85EBCA6B) ^ salt)
        hashes.append(_mix(jnp.sum(terms, axis=-1, dtype=jnp.uint32)))
    return jnp.stack(hashes, axis=-1)


def _mix(h: jax.Array) -> jax.Array:
    """The 32-bit finaliser of MurmurHash3: every input bit reaches every output bit."""
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)


def _side(size: int, same_text: SameText, text: jax.Array | None, valid: jax.Array | None) -> Side:
    if same_text != "negative" and text is None:
        raise ValueError(
            f"info_nce: same_text={same_text!r} needs `text`, the hashes of the texts; "
            "give text=hash_texts(ids)"
        )
    return Side(
        jnp.ones((size,), bool) if valid is None else jnp.asarray(valid),
        jnp.arange(size, dtype=jnp.int32),
        jnp.zeros((size, 2), jnp.uint32) if text is None else text,
    )


class _Statistics(NamedTuple):
    """lse, sum of positives, number of positives, best negative: of rows, then of columns."""

    row: tuple[jax.Array, jax.Array, jax.Array, jax.Array]
    column: tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def _contrast(statistics: _Statistics, valid: jax.Array) -> Contrast:
    pairs = jnp.maximum(jnp.sum(valid), 1)
    losses, accuracies = [], []
    for lse, positive, count, negative in statistics:
        count, negative = jax.lax.stop_gradient((count, negative))
        mean_positive = positive / jnp.maximum(count, 1.0)
        losses.append(jnp.sum(jnp.where(valid, lse - mean_positive, 0.0)) / pairs)
        hit = valid & (jax.lax.stop_gradient(mean_positive) > negative)
        accuracies.append(jnp.sum(hit) / pairs)
    return Contrast((losses[0] + losses[1]) / 2, accuracies[0], accuracies[1])


# One piece of the score matrix ---------------------------------------------------------------


def _relations(plan: _Plan, row: Side, column: Side) -> tuple[jax.Array, jax.Array]:
    """bool [R, C]: entries that are counted, and those among them that are positives."""
    counted = row.valid[:, None] & column.valid[None, :]
    pair = row.pair[:, None] == column.pair[None, :]
    if plan.same_text == "negative":
        return counted, counted & pair
    same = pair | jnp.all(row.text[:, None, :] == column.text[None, :, :], axis=-1)
    if plan.same_text == "mask":
        counted = counted & (pair | ~same)
        return counted, counted & pair
    return counted, counted & same


def _scores(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum("rp,cp->rc", x, y, precision=jax.lax.Precision.HIGHEST)


_LOW = float(jnp.finfo(jnp.float32).min)


def _piece_stats(scores: jax.Array, counted: jax.Array, positive: jax.Array, axis: int) -> Stats:
    """Statistics of one piece along `axis`."""
    masked = jnp.where(counted, scores, _LOW)
    top = jnp.max(masked, axis=axis)
    shifted = jnp.where(counted, masked - jnp.expand_dims(top, axis), 0.0)
    return Stats(
        top,
        jnp.sum(jnp.where(counted, jnp.exp(shifted), 0.0), axis=axis),
        jnp.sum(jnp.where(positive, scores, 0.0), axis=axis),
        jnp.sum(positive, axis=axis, dtype=jnp.float32),
        jnp.max(jnp.where(counted & ~positive, scores, _LOW), axis=axis),
    )


def _merge(a: Stats, b: Stats) -> Stats:
    top = jnp.maximum(a.top, b.top)
    return Stats(
        top,
        a.total * jnp.exp(a.top - top) + b.total * jnp.exp(b.top - top),
        a.positive + b.positive,
        a.positives + b.positives,
        jnp.maximum(a.negative, b.negative),
    )


def _finish(stats: Stats) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Log-sum-exp and the rest; a row without counted entries gets 0."""
    some = stats.total > 0
    lse = jnp.where(some, stats.top + jnp.log(jnp.where(some, stats.total, 1.0)), 0.0)
    return lse, stats.positive, stats.positives, stats.negative


def _chunks(plan: _Plan, y: jax.Array, column: Side, *more: jax.Array) -> tuple[Any, int]:
    """Columns cut into pieces of `plan.chunk` (padded with invalid ones), and their number."""
    width = y.shape[0]
    size = min(plan.chunk, width)
    pad = -width % size
    pieces = (width + pad) // size

    def cut(a: jax.Array) -> jax.Array:
        a = jnp.pad(a, ((0, pad),) + ((0, 0),) * (a.ndim - 1))
        return a.reshape(pieces, size, *a.shape[1:])

    return jax.tree.map(cut, (y, column, *more)), pieces


def _forward(
    plan: _Plan, x: jax.Array, row: Side, y: jax.Array, column: Side, scale: jax.Array
) -> tuple[Stats, Stats]:
    """Statistics of the rows [R] and of the columns [C] (over these rows)."""

    def piece(carry: Stats, columns: tuple[jax.Array, Side]) -> tuple[Stats, Stats]:
        y_piece, side = columns
        counted, positive = _relations(plan, row, side)
        scores = scale * _scores(x, y_piece)
        merged = _merge(carry, _piece_stats(scores, counted, positive, 1))
        return merged, _piece_stats(scores, counted, positive, 0)

    pieces, _ = _chunks(plan, y, column)
    zero = jnp.zeros(x.shape[0], jnp.float32)
    empty = Stats(zero + _LOW, zero, zero, zero, zero + _LOW)
    rows, columns = jax.lax.scan(piece, empty, pieces)
    return rows, Stats(*(c.reshape(-1)[: y.shape[0]] for c in columns))


def _backward(
    plan: _Plan,
    x: jax.Array,
    row: Side,
    y: jax.Array,
    column: Side,
    scale: jax.Array,
    row_terms: tuple[jax.Array, jax.Array, jax.Array],
    column_terms: tuple[jax.Array, jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(dx [R, P], dy [C, P], dscale) from (lse, d lse, d positive) of rows and of columns."""
    row_lse, row_weight, row_positive = (t[:, None] for t in row_terms)

    def piece(carry: tuple[jax.Array, jax.Array], columns: Any) -> tuple[Any, jax.Array]:
        dx, dscale = carry
        y_piece, side, lse, weight, positive_weight = columns
        counted, positive = _relations(plan, row, side)
        products = _scores(x, y_piece)
        scores = scale * products
        by_row = row_weight * jnp.exp(jnp.where(counted, scores - row_lse, _LOW))
        by_column = weight[None] * jnp.exp(jnp.where(counted, scores - lse[None], _LOW))
        d_scores = by_row + by_column
        d_scores = d_scores + jnp.where(positive, row_positive + positive_weight[None], 0.0)
        dx = dx + jnp.einsum("rc,cp->rp", d_scores, y_piece, precision=jax.lax.Precision.HIGHEST)
        dy = jnp.einsum("rc,rp->cp", d_scores, x, precision=jax.lax.Precision.HIGHEST)
        return (dx, dscale + jnp.sum(d_scores * products)), dy

    pieces, _ = _chunks(plan, y, column, *column_terms)
    (dx, dscale), dy = jax.lax.scan(piece, (jnp.zeros_like(x), jnp.zeros(())), pieces)
    dy = dy.reshape(-1, y.shape[1])[: y.shape[0]]
    return scale * dx, scale * dy, dscale


# On one device (or left to the partitioner, or under vmap) -------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _statistics(
    plan: _Plan, x: jax.Array, y: jax.Array, scale: jax.Array, side: Side
) -> _Statistics:
    rows, columns = _forward(plan, x, side, y, side, scale)
    return _Statistics(_finish(rows), _finish(columns))


def _statistics_forward(
    plan: _Plan, x: jax.Array, y: jax.Array, scale: jax.Array, side: Side
) -> tuple[_Statistics, Any]:
    out = _statistics(plan, x, y, scale, side)
    return out, (x, y, scale, side, out.row[0], out.column[0])


def _statistics_backward(plan: _Plan, saved: Any, grads: _Statistics) -> tuple[Any, ...]:
    x, y, scale, side, row_lse, column_lse = saved
    dx, dy, dscale = _backward(
        plan,
        x,
        side,
        y,
        side,
        scale,
        (row_lse, grads.row[0], grads.row[1]),
        (column_lse, grads.column[0], grads.column[1]),
    )
    return dx, dy, dscale, None


_statistics.defvjp(_statistics_forward, _statistics_backward)


# Over a mesh -----------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sharded_statistics(
    plan: _Plan,
    mesh: jax.sharding.Mesh,
    x: jax.Array,
    y: jax.Array,
    scale: jax.Array,
    side: Side,
) -> _Statistics:
    rows, whole = PartitionSpec(plan.axes), PartitionSpec()
    specs: Any = ((rows,) * 4, (whole,) * 4)

    def local(x: jax.Array, y: jax.Array, scale: jax.Array, side: Side) -> _Statistics:
        y_all, side_all = jax.lax.all_gather((y, side), plan.axes, tiled=True)
        by_row, by_column = _forward(plan, x, side, y_all, side_all, scale)
        top = jax.lax.pmax(by_column.top, plan.axes)
        total = jax.lax.psum(by_column.total * jnp.exp(by_column.top - top), plan.axes)
        positive, positives = jax.lax.psum((by_column.positive, by_column.positives), plan.axes)
        negative = jax.lax.pmax(by_column.negative, plan.axes)
        joined = Stats(top, total, positive, positives, negative)
        return _Statistics(_finish(by_row), _finish(joined))

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(rows, rows, whole, rows),
        out_specs=_Statistics(*specs),
        check_vma=False,
    )(x, y, scale, side)


def _sharded_forward(
    plan: _Plan,
    mesh: jax.sharding.Mesh,
    x: jax.Array,
    y: jax.Array,
    scale: jax.Array,
    side: Side,
) -> tuple[_Statistics, Any]:
    out = _sharded_statistics(plan, mesh, x, y, scale, side)
    return out, (x, y, scale, side, out.row[0], out.column[0])


def _sharded_backward(
    plan: _Plan, mesh: jax.sharding.Mesh, saved: Any, grads: _Statistics
) -> tuple[Any, ...]:
    x, y, scale, side, row_lse, column_lse = saved
    rows, whole = PartitionSpec(plan.axes), PartitionSpec()

    def local(
        x: jax.Array,
        y: jax.Array,
        scale: jax.Array,
        side: Side,
        row_terms: tuple[jax.Array, jax.Array, jax.Array],
        column_terms: tuple[jax.Array, jax.Array, jax.Array],
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        y_all, side_all = jax.lax.all_gather((y, side), plan.axes, tiled=True)
        dx, dy, dscale = _backward(plan, x, side, y_all, side_all, scale, row_terms, column_terms)
        dy = jax.lax.psum_scatter(dy, plan.axes, tiled=True)
        return dx, dy, jax.lax.psum(dscale, plan.axes)

    dx, dy, dscale = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(rows, rows, whole, rows, (rows,) * 3, (whole,) * 3),
        out_specs=(rows, rows, whole),
        check_vma=False,
    )(
        x,
        y,
        scale,
        side,
        (row_lse, grads.row[0], grads.row[1]),
        (column_lse, grads.column[0], grads.column[1]),
    )
    return dx, dy, dscale, None


_sharded_statistics.defvjp(_sharded_forward, _sharded_backward)
