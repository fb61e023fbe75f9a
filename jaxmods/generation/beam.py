"""Beam search, with the scores and the stopping of transformers' `generate(num_beams=n)`.

Shape legend:  B rows   W beams of a row   M = (1 + stop ids) W, at least 2 W, candidates per step
               V vocabulary   N new tokens at most
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, Self, TypeVar

import jax
import jax.numpy as jnp

from jaxmods.generation.loop import Limits, Step, is_stop

_NEVER = -1.0e9  # below the score of every real sequence


class Rows(Protocol):
    """State of a batch of which rows can be taken."""

    def take_rows(self, rows: jax.Array) -> Self:
        """Rows `rows` (int [N]) in that order, repeated ones allowed."""
        ...


State = TypeVar("State", bound=Rows)


class Beams(NamedTuple):
    """The beams of every row, best first.

    Attributes:
      tokens: int32 [B, W, N], filled up with `pad_id`.
      lengths: int32 [B, W], tokens of each, a stop token included.
      scores: float32 [B, W], sum of the log-probabilities over length ** `length_penalty`.
    """

    tokens: jax.Array
    lengths: jax.Array
    scores: jax.Array


class _Search(NamedTuple):
    tokens: jax.Array  # [B, W, N] of the running beams
    sums: jax.Array  # [B, W]
    ended: Beams  # scores `_NEVER` where there is none yet
    hopeful: jax.Array  # bool [B]: a running beam may still become better than an ended one
    any_runs: jax.Array  # bool: not every candidate of the last step has ended


def beam_search(
    step: Step[State],
    logits_BV: jax.Array,
    state: State,
    limits: Limits,
    *,
    beams: int,
    length_penalty: float = 1.0,
    early_stopping: bool = False,
) -> Beams:
    """Continues every row with the `beams` sequences of the greatest scores that are found.

    A sequence that reaches `limits.new_tokens` counts as ended there.

    Args:
      step: the model; it is called with B x W rows.
      logits_BV: what may follow the prompts. state: after the prompts, of B rows.
      length_penalty: exponent of the length; above 0 favours long sequences.
      early_stopping: a row is done as soon as it has `beams` ended sequences, instead of when no
        running one can become better.

    Raises:
      ValueError: fewer than two beams, or a vocabulary too small for the candidates.
    """
    rows, vocabulary = logits_BV.shape
    candidates = max(2, 1 + len(limits.stop_ids)) * beams
    if beams < 2 or candidates > vocabulary:
        raise ValueError(
            f"beam_search: expected at least 2 beams, and a vocabulary of at least {candidates} "
            f"for {beams} beams, found {vocabulary}"
        )
    most = limits.new_tokens

    def advance(t: Any, logits_BWV: jax.Array, s: _Search) -> tuple[jax.Array, _Search]:
        """One step of the search; also which row of the state each running beam goes on from."""
        scores = jax.nn.log_softmax(logits_BWV.astype(jnp.float32)) + s.sums[..., None]
        sums, flat = jax.lax.top_k(scores.reshape(rows, -1), candidates)
        origin, token = flat // vocabulary, (flat % vocabulary).astype(jnp.int32)
        tokens = _take(s.tokens, origin).at[:, :, t].set(token)
        ends = is_stop(token, limits) | (t + 1 == most)

        running, kept = jax.lax.top_k(sums + ends * _NEVER, beams)
        # Only the best `beams` candidates may end; the others are there to go on in their place.
        ending = ends & (jnp.arange(candidates) < beams)
        full = jnp.all(s.ended.scores > _NEVER / 2, axis=1) & early_stopping
        barred = ~ending | (full | ~s.hopeful)[:, None]
        final = sums / (t + 1.0) ** length_penalty + barred * _NEVER
        merged = jnp.concatenate([s.ended.scores, final], axis=1)
        best, which = jax.lax.top_k(merged, beams)
        lengths = jnp.full((rows, candidates), t + 1, jnp.int32)
        ended = Beams(
            _take(jnp.concatenate([s.ended.tokens, tokens], axis=1), which),
            _take(jnp.concatenate([s.ended.lengths, lengths], axis=1), which),
            best,
        )
        complete = jnp.all(best > _NEVER / 2, axis=1)
        reachable = running[:, 0] / (t + 1.0) ** length_penalty
        hopeful = s.hopeful & (reachable > jnp.where(complete, best[:, -1], _NEVER))
        source = jnp.arange(rows)[:, None] * beams + _take(origin, kept)
        return source, _Search(_take(tokens, kept), running, ended, hopeful, ~jnp.all(ends))

    def more(carry: Any) -> jax.Array:
        t, _, _, s = carry
        complete = jnp.all(s.ended.scores > _NEVER / 2)
        return (t < most) & jnp.any(s.hopeful) & s.any_runs & ~(complete & early_stopping)

    def body(carry: Any) -> Any:
        t, source, state, s = carry
        state = state.take_rows(source.reshape(-1))
        logits, state = step(s.tokens[:, :, t - 1].reshape(-1), state)
        source, s = advance(t, logits.reshape(rows, beams, -1), s)
        return t + 1, source, state, s

    empty = jnp.full((rows, beams, most), limits.pad_id, jnp.int32)
    none = jnp.full((rows, beams), _NEVER)
    search = _Search(
        empty,
        jnp.where(jnp.arange(beams) == 0, 0.0, none),
        Beams(empty, jnp.zeros((rows, beams), jnp.int32), none),
        jnp.ones((rows,), bool),
        jnp.bool_(True),
    )
    state = state.take_rows(jnp.repeat(jnp.arange(rows), beams))
    first = jnp.broadcast_to(logits_BV[:, None], (rows, beams, vocabulary))
    source, search = advance(0, first, search)
    return jax.lax.while_loop(more, body, (jnp.int32(1), source, state, search))[3].ended


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    """x [B, W, ...] at index [B, n] along axis 1."""
    return jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), axis=1)
