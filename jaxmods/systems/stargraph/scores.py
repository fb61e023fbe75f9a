"""How true a triple looks: TripleRE' and PairRE' (spec `stargraph`, section 2.3).

Both are `gamma - || h * H - t * T + m ||_1` of L2-normalised entities, where H, T and m come from
the relation:

    TripleRE' (relation 3D: r_h, r_m, r_t)   H = u r_h + 1, T = u r_t + 1, m = r_m
    PairRE'   (relation 2D: r_h, r_t)        H = r_h + 1,   T = r_t + 1,   m = 0

Asking for all answers of one side, the known side collapses into one vector, `f = h * H + m` for a
missing tail or `f = t * T - m` for a missing head, and a candidate c costs one pass over D:
`gamma - || c * C - f ||_1` with C the factor of the missing side.

Shape legend: B queries, N candidates, D width.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

Score = Literal["triplere", "pairre"]

TAIL, HEAD = 0, 1  # which side of the triple is asked for ("tail-batch", "head-batch")


def relation_width(score: Score, width: int) -> int:
    """Width of the relation table."""
    return {"triplere": 3, "pairre": 2}[score] * width


def normalise(x: jax.Array) -> jax.Array:
    """x / max(||x||_2, 1e-12) over the last axis, in fp32."""
    x = x.astype(jnp.float32)
    squared = jnp.sum(jnp.square(x), -1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(squared, 1e-24))


class Terms(NamedTuple):
    """What a relation contributes, fp32: factors and shift [B, D], margin gamma [B]."""

    head: jax.Array
    tail: jax.Array
    middle: jax.Array
    margin: jax.Array


class Query(NamedTuple):
    """A question with one side missing, fp32: score(c) = margin - || c * factor - fixed ||_1."""

    factor: jax.Array
    fixed: jax.Array
    margin: jax.Array


def terms(score: Score, relation_BR: jax.Array, offset: float, gamma: jax.Array) -> Terms:
    """H, T, m and gamma of relation vectors [B, 3D or 2D]; `offset` is u (TripleRE' only)."""
    relation_BR = relation_BR.astype(jnp.float32)
    margin = jnp.broadcast_to(gamma.astype(jnp.float32), relation_BR.shape[:1])
    if score == "triplere":
        head, middle, tail = jnp.split(relation_BR, 3, axis=-1)
        return Terms(offset * head + 1, offset * tail + 1, middle, margin)
    head, tail = jnp.split(relation_BR, 2, axis=-1)
    return Terms(head + 1, tail + 1, jnp.zeros_like(head), margin)


def query(terms: Terms, known_BD: jax.Array, mode_B: jax.Array) -> Query:
    """Questions from the known side.

    Args:
      known_BD: normalised vectors of the known entity (the head where the tail is asked for).
      mode_B: `TAIL` or `HEAD`, the side that is asked for.
    """
    asks_head = (mode_B == HEAD)[:, None]
    factor = jnp.where(asks_head, terms.head, terms.tail)
    fixed = jnp.where(
        asks_head, known_BD * terms.tail - terms.middle, known_BD * terms.head + terms.middle
    )
    return Query(factor, fixed, terms.margin)


def score_candidates(query: Query, candidates_BND: jax.Array) -> jax.Array:
    """Scores [B, N] of each query's own candidates (normalised vectors)."""
    gap = candidates_BND * query.factor[:, None] - query.fixed[:, None]
    return query.margin[:, None] - jnp.sum(jnp.abs(gap), -1)


def score_table(query: Query, table_ND: jax.Array) -> jax.Array:
    """Scores [B, N] of every row of one table (normalised vectors) for each query.

    Runs over D with the candidates in the fast dimension, a few of D at a time, so that no
    [B, N, D] array exists and every addition is a vector operation.
    """
    width = table_ND.shape[1]
    group = next(g for g in (16, 8, 4, 2, 1) if width % g == 0)

    def add(total_BN: jax.Array, part: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        for k in range(group):
            table_N, factor_B, fixed_B = (x[k] for x in part)
            gap = table_N[None] * factor_B[:, None] - fixed_B[:, None]
            total_BN = total_BN + jnp.abs(gap)
        return total_BN, None

    columns = (table_ND, query.factor, query.fixed)
    parts = tuple(x.T.reshape(-1, group, x.shape[0]) for x in columns)
    zeros = jnp.zeros((query.fixed.shape[0], table_ND.shape[0]), jnp.float32)
    return query.margin[:, None] - jax.lax.scan(add, zeros, parts)[0]


def rank_counts(
    table_ND: jax.Array, terms: Terms, triples_B3: jax.Array, mode_B: jax.Array, skip_BS: jax.Array
) -> jax.Array:
    """How many entities score above, and equal to, the true answer of each query.

    Args:
      table_ND: normalised vectors of all entities.
      terms: of the triples' relations.
      mode_B: which side is asked for.
      skip_BS: entities that the filtered rank leaves out (true answers; the answer itself may be
        among them), distinct within a row, -1 for padding.

    Returns:
      int32 [B, 4]: raw greater, raw equal (without the answer itself), filtered greater, filtered
      equal.
    """
    asks_head = mode_B == HEAD
    known = jnp.where(asks_head, triples_B3[:, 2], triples_B3[:, 0])
    answer = jnp.where(asks_head, triples_B3[:, 0], triples_B3[:, 2])[:, None]
    score_BN = score_table(query(terms, table_ND[known], mode_B), table_ND)
    true_B1 = jnp.take_along_axis(score_BN, answer, 1)
    greater, equal = (score_BN > true_B1).sum(1), (score_BN == true_B1).sum(1) - 1
    skipped = jnp.take_along_axis(score_BN, jnp.maximum(skip_BS, 0), 1)
    other = (skip_BS >= 0) & (skip_BS != answer)
    skipped_greater = (other & (skipped > true_B1)).sum(1)
    skipped_equal = (other & (skipped == true_B1)).sum(1)
    columns = [greater, equal, greater - skipped_greater, equal - skipped_equal]
    return jnp.stack(columns, 1).astype(jnp.int32)


def given_counts(score_BC: jax.Array) -> jax.Array:
    """int32 [B, 2]: how many of columns 1.. score above, and equal to, column 0."""
    true, wrong = score_BC[:, :1], score_BC[:, 1:]
    return jnp.stack([(wrong > true).sum(1), (wrong == true).sum(1)], 1).astype(jnp.int32)
