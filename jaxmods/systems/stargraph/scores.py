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

from typing import Literal

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


def factors(
    score: Score, relation: jax.Array, offset: float
) -> tuple[jax.Array, jax.Array, jax.Array | float]:
    """H, T and m of relation vectors [..., 3D or 2D]; `offset` is u (TripleRE' only)."""
    relation = relation.astype(jnp.float32)
    if score == "triplere":
        head, middle, tail = jnp.split(relation, 3, axis=-1)
        return offset * head + 1, offset * tail + 1, middle
    head, tail = jnp.split(relation, 2, axis=-1)
    return head + 1, tail + 1, 0.0


def queries(
    score: Score, known_BD: jax.Array, relation_BR: jax.Array, mode_B: jax.Array, offset: float
) -> tuple[jax.Array, jax.Array]:
    """C [B, D] and f [B, D] of queries.

    Args:
      known_BD: normalised vectors of the known entity (head where the tail is asked for).
      mode_B: `TAIL` or `HEAD`, the side that is asked for.
    """
    head, tail, middle = factors(score, relation_BR, offset)
    asks_head = (mode_B == HEAD)[:, None]
    factor = jnp.where(asks_head, head, tail)
    fixed = jnp.where(asks_head, known_BD * tail - middle, known_BD * head + middle)
    return factor, fixed


def score_candidates(
    gamma: jax.Array, factor_BD: jax.Array, fixed_BD: jax.Array, candidates_BND: jax.Array
) -> jax.Array:
    """Scores [B, N] of each query's own candidates (normalised vectors)."""
    gap = candidates_BND * factor_BD[:, None] - fixed_BD[:, None]
    return gamma - jnp.sum(jnp.abs(gap), -1)


def score_table(
    gamma: jax.Array, factor_BD: jax.Array, fixed_BD: jax.Array, table_ND: jax.Array
) -> jax.Array:
    """Scores [B, N] of every row of one table for each query.

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

    parts = tuple(x.T.reshape(-1, group, x.shape[0]) for x in (table_ND, factor_BD, fixed_BD))
    zeros = jnp.zeros((factor_BD.shape[0], table_ND.shape[0]), jnp.float32)
    return gamma - jax.lax.scan(add, zeros, parts)[0]
