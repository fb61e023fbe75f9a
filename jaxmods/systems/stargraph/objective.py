"""StarGraph's training loss: encode, score, compare with sampled wrong answers.

Spec `stargraph`, sections 2.3 and 3. Per triple the official code encodes head, tail and every
negative afresh, each with its own dropout. Where dropout is off, or may be shared by all
occurrences of an entity in a step, each distinct entity is encoded once instead.

Shape legend: B triples, N negatives per triple, U distinct entities, D width.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxmods.partitioning import constrain
from jaxmods.systems.stargraph import scores
from jaxmods.systems.stargraph.scores import HEAD, Terms

Encode = Callable[[jax.Array], jax.Array]


def occurrence_vectors(
    encode: Encode, positive_B3: jax.Array, negative_BN: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Vectors of heads [B, D], tails [B, D], negatives [B, N, D]; every occurrence encoded."""
    b, n = negative_BN.shape
    ids = jnp.concatenate([positive_B3[:, 0:1], positive_B3[:, 2:3], negative_BN], 1)
    vectors = encode(ids.reshape(-1)).reshape(b, n + 2, -1)
    return vectors[:, 0], vectors[:, 1], vectors[:, 2:]


def triple_scores(
    terms: Terms,
    head_BD: jax.Array,
    tail_BD: jax.Array,
    negative_BND: jax.Array,
    mode_B: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Scores of the triples [B] and of their negatives [B, N], fp32.

    Args:
      terms: of the triples' relations.
      head_BD, tail_BD, negative_BND: entity vectors as encoded.
      mode_B: which side the negatives replace (`scores.TAIL`, `scores.HEAD`).
    """
    head, tail = scores.normalise(head_BD), scores.normalise(tail_BD)
    asks_head = (mode_B == HEAD)[:, None]
    known = jnp.where(asks_head, tail, head)
    answer = jnp.where(asks_head, head, tail)
    query = scores.query(terms, known, mode_B)
    positive = scores.score_candidates(query, answer[:, None])[:, 0]
    negative_BND = constrain(negative_BND, ("batch", None, None))
    return positive, scores.score_candidates(query, scores.normalise(negative_BND))
