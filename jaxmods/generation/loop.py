"""Generation of token sequences by a model that keeps its own state.

A model is a function `step(tokens, state) -> (logits, state)`: it reads one token per row and says
what may follow. Where the first logits come from (a prompt, a picture), and what a token is, is not
known here. Everything has static shapes and can be jitted as a whole; `stream` drives the same step
from the host for those who want tokens as they come.

Shape legend:  B rows   V vocabulary   N new tokens at most
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxmods.generation.sampling import GREEDY, Sampling, choose

State = TypeVar("State")
Step = Callable[[jax.Array, State], tuple[jax.Array, State]]  # (int32 [B], state) -> ([B, V], …)


@dataclasses.dataclass(frozen=True)
class Limits:
    """When a sequence ends.

    Attributes:
      new_tokens: at most so many are generated.
      stop_ids: a sequence ends with the first of these, which belongs to it.
      pad_id: fills what is not generated.
    """

    new_tokens: int
    stop_ids: tuple[int, ...] = ()
    pad_id: int = 0

    def __post_init__(self) -> None:
        if self.new_tokens < 1:
            raise ValueError(f"Limits.new_tokens: expected at least 1, found {self.new_tokens}")


class Generated(NamedTuple):
    """What was generated.

    Attributes:
      tokens: int32 [B, N], filled up with `pad_id`.
      lengths: int32 [B], tokens of each row, a stop token included.
      stopped: bool [B], whether the row ended with a stop token.
    """

    tokens: jax.Array
    lengths: jax.Array
    stopped: jax.Array


def generate(
    step: Step[State],
    logits_BV: jax.Array,
    state: State,
    limits: Limits,
    *,
    sampling: Sampling = GREEDY,
    keys: jax.Array | None = None,
    row_limits: jax.Array | None = None,
) -> Generated:
    """Continues every row until it stops or reaches its limit; ends when all rows have.

    Args:
      step: the model.
      logits_BV: what may follow the prompts. state: after the prompts.
      sampling: how tokens are drawn. keys: one random key per row [B], None for temperature 0. The
        t-th token of a row is drawn with its key folded with t, so a row's tokens do not depend on
        the other rows.
      row_limits: int [B], a limit per row, at least 1, beside `limits.new_tokens`.
    """
    rows = logits_BV.shape[0]
    most = limits.new_tokens
    allowed = jnp.full((rows,), most) if row_limits is None else jnp.minimum(row_limits, most)

    def note(t: Any, logits: jax.Array, out: Generated) -> tuple[jax.Array, Generated]:
        running = _running(out, allowed)
        token = choose(logits, _folded(keys, t), sampling)
        token = jnp.where(running, token, limits.pad_id)
        return token, Generated(
            jax.lax.dynamic_update_index_in_dim(out.tokens, token, t, 1),
            out.lengths + running,
            out.stopped | (running & is_stop(token, limits)),
        )

    def more(carry: Any) -> jax.Array:
        t, _, _, out = carry
        return (t < most) & jnp.any(_running(out, allowed))

    def body(carry: Any) -> Any:
        t, token, state, out = carry
        logits, state = step(token, state)
        token, out = note(t, logits, out)
        return t + 1, token, state, out

    empty = Generated(
        jnp.full((rows, most), limits.pad_id, jnp.int32),
        jnp.zeros((rows,), jnp.int32),
        jnp.zeros((rows,), bool),
    )
    token, out = note(0, logits_BV, empty)
    return jax.lax.while_loop(more, body, (jnp.int32(1), token, state, out))[3]


def _running(out: Generated, allowed: jax.Array) -> jax.Array:
    return ~out.stopped & (out.lengths < allowed)


def is_stop(tokens: jax.Array, limits: Limits) -> jax.Array:
    """bool, where a token (int, any shape) is one of the stop ids."""
    stop = jnp.asarray(limits.stop_ids, jnp.int32)
    return jnp.any(tokens[..., None] == stop, axis=-1)


def _folded(keys: jax.Array | None, t: Any) -> jax.Array | None:
    return None if keys is None else jax.vmap(lambda key: jax.random.fold_in(key, t))(keys)


@functools.partial(jax.jit, static_argnames="sampling")
def _next(
    logits_BV: jax.Array, keys: jax.Array | None, t: jax.Array, sampling: Sampling
) -> jax.Array:
    return choose(logits_BV, _folded(keys, t), sampling)


def stream(
    step: Step[State],
    logits_BV: jax.Array,
    state: State,
    limits: Limits,
    *,
    sampling: Sampling = GREEDY,
    keys: jax.Array | None = None,
) -> Iterator[np.ndarray]:
    """The tokens of `generate` one position at a time, on the host.

    Args:
      step: jitted; it may take the memory of its state over (`donate_argnums`), as the state given
        is not used again.

    Yields:
      int32 [B]; `pad_id` in rows that have ended.
    """
    ended = np.zeros(logits_BV.shape[0], bool)
    for t in range(limits.new_tokens):
        tokens = np.where(
            ended, limits.pad_id, np.asarray(_next(logits_BV, keys, jnp.int32(t), sampling))
        ).astype(np.int32)
        yield tokens
        ended |= np.isin(tokens, limits.stop_ids)
        if ended.all() or t + 1 == limits.new_tokens:
            return
        logits_BV, state = step(jnp.asarray(tokens), state)
