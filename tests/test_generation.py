"""Choice of tokens, the loop, its limits, and streaming, on a model that is a table."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmods.generation import (
    Limits,
    Sampling,
    beam_search,
    choose,
    filtered,
    generate,
    stream,
)

VOCABULARY = 12
TABLE = np.random.default_rng(0).normal(0.0, 2.0, (VOCABULARY, VOCABULARY)).astype(np.float32)


class Last(NamedTuple):
    """State of the table model: how many tokens were read, and which one was last."""

    count: jax.Array
    token: jax.Array

    def take_rows(self, rows: jax.Array) -> Last:
        return Last(self.count[rows], self.token[rows])


def step(tokens: jax.Array, state: Last) -> tuple[jax.Array, Last]:
    """A Markov chain."""
    return jnp.asarray(TABLE)[tokens], Last(state.count + 1, tokens)


def beginning(tokens: list[int]) -> tuple[jax.Array, Last]:
    first = jnp.asarray(tokens)
    return step(first, Last(jnp.zeros_like(first), first))


def walk(token: int, length: int, stop: tuple[int, ...]) -> list[int]:
    """The greedy path after `token`."""
    path: list[int] = []
    while len(path) < length and not (path and path[-1] in stop):
        token = int(TABLE[token].argmax())
        path.append(token)
    return path


def drawable(logits: np.ndarray, **options: Any) -> np.ndarray:
    return np.isfinite(filtered(jnp.asarray(logits), Sampling(1.0, **options)))


def test_top_k_and_top_p_keep_what_they_should() -> None:
    """Against the definition, row by row: the smallest set of the most probable whose mass is at
    least p, and the k greatest with those equal to the least of them."""
    logits = np.random.default_rng(1).normal(0, 2, (50, 30)).astype(np.float32)
    logits[0, :20] = 1.5  # equal ones
    for k in (1, 5, 30, 99):
        least = np.sort(logits, axis=-1)[:, -min(k, 30)]
        np.testing.assert_array_equal(drawable(logits, top_k=k), logits >= least[:, None])
    exact = np.exp(logits.astype(np.float64))
    exact /= exact.sum(-1, keepdims=True)
    for p in (0.05, 0.5, 0.9, 1.0):
        kept = drawable(logits, top_p=p)
        assert kept.any(-1).all()
        for row, mass in zip(kept, exact, strict=True):
            assert mass[row].min() >= mass[~row].max(initial=0.0)  # the most probable ones
            # 1e-6: the sums of probabilities are in float32.
            assert mass[row].sum() >= p - 1e-6
            assert mass[row].sum() - mass[row].min() < p + 1e-6
    both = drawable(logits, top_k=5, top_p=0.9)
    assert (both.sum(-1) <= 5 + 15 * (np.arange(50) == 0)).all()
    assert both.any(-1).all()


def test_filters_equal_those_of_transformers() -> None:
    torch = pytest.importorskip("torch")
    from transformers import (
        LogitsProcessorList,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits = np.random.default_rng(2).normal(0, 2, (40, 30)).astype(np.float32)
    theirs = LogitsProcessorList(
        [TemperatureLogitsWarper(0.7), TopKLogitsWarper(12), TopPLogitsWarper(0.8)]
    )
    expected = theirs(torch.zeros(40, 1, dtype=torch.long), torch.tensor(logits)).numpy()
    ours = filtered(jnp.asarray(logits), Sampling(0.7, top_k=12, top_p=0.8))
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_drawn_frequencies() -> None:
    """20,000 draws follow the cut distribution: chi-squared below its 99.9 % point."""
    sampling = Sampling(2.0, top_k=6, top_p=0.95)
    logits = jnp.asarray(TABLE[:1])
    keys = jax.random.split(jax.random.key(0), 20_000)
    drawn = choose(jnp.broadcast_to(logits, (20_000, VOCABULARY)), keys, sampling)
    expected = 20_000 * np.asarray(jax.nn.softmax(filtered(logits, sampling)))[0]
    found = np.bincount(drawn, minlength=VOCABULARY)
    likely = expected > 0
    assert found[~likely].sum() == 0
    statistic = ((found - expected)[likely] ** 2 / expected[likely]).sum()
    assert statistic < {4: 16.3, 5: 18.5, 6: 20.5}[int(likely.sum())]


def test_greedy_paths_stops_and_limits() -> None:
    """Several stop tokens, limits per row, padding; a row that stops at once; the early end."""
    starts = list(range(VOCABULARY))
    third = walk(0, 3, ())[2]
    for stop in ((), (third,), (third, walk(1, 1, ())[0])):
        limits = Limits(8, stop, pad_id=-7)
        allowed = np.where(np.arange(VOCABULARY) % 3 == 0, 2, 8)
        out = generate(step, *beginning(starts), limits, row_limits=jnp.asarray(allowed))
        for row, token in enumerate(starts):
            expected = walk(token, allowed[row], stop)
            assert out.lengths[row] == len(expected)
            assert out.tokens[row].tolist() == expected + [-7] * (8 - len(expected))
            assert bool(out.stopped[row]) == (expected[-1] in stop)
        assert bool(out.stopped.any()) == bool(stop)


def test_loop_ends_with_its_rows() -> None:
    """No step is taken after the last row has ended, and none to read the last token."""
    calls: list[int] = []

    def counted(tokens: jax.Array, state: Last) -> tuple[jax.Array, Last]:
        jax.debug.callback(lambda: calls.append(1))
        return step(tokens, state)

    path = walk(0, 4, ())
    assert len(set(path)) == 4
    for stop, steps in (((), 19), ((path[3],), 3), ((path[0],), 0)):
        generate(counted, *beginning([0]), Limits(20, stop))
        jax.effects_barrier()
        assert len(calls) == steps
        calls.clear()


def test_a_row_depends_on_its_own_key_only() -> None:
    """Sampled rows: the same alone as in a batch; other keys, other tokens; streamed the same."""
    sampling = Sampling(1.0, top_p=0.95)
    limits = Limits(10, (3,), pad_id=0)
    keys = jax.random.split(jax.random.key(1), 4)
    run = functools.partial(generate, step, limits=limits, sampling=sampling)
    batch = run(*beginning([1, 1, 2, 5]), keys=keys)
    assert batch.tokens[0].tolist() != batch.tokens[1].tolist()
    alone = run(*beginning([2]), keys=keys[2:3])
    assert alone.tokens[0].tolist() == batch.tokens[2].tolist()
    streamed = list(
        stream(jax.jit(step), *beginning([1, 1, 2, 5]), limits, sampling=sampling, keys=keys)
    )
    length = int(batch.lengths.max())
    np.testing.assert_array_equal(np.stack(streamed, axis=1), batch.tokens[:, :length])


def test_beams_find_the_best_sequences() -> None:
    """With as many beams as there are sequences worth keeping, the search is exhaustive: all 12^2
    endings of three tokens, enumerated."""
    scores = np.asarray(jax.nn.log_softmax(jnp.asarray(TABLE)), np.float64)
    out = beam_search(step, *beginning([4]), Limits(3), beams=6, length_penalty=0.0)
    every = {
        (a, b, c): scores[4, a] + scores[a, b] + scores[b, c]
        for a in range(VOCABULARY)
        for b in range(VOCABULARY)
        for c in range(VOCABULARY)
    }
    best = sorted(every, key=lambda s: -every[s])[:6]
    assert tuple(out.tokens[0, 0].tolist()) == best[0]
    for tokens, score in zip(out.tokens[0], out.scores[0], strict=True):
        assert abs(every[tuple(tokens.tolist())] - float(score)) < 1e-4
    assert (np.diff(out.scores[0]) <= 0).all()


def test_bad_settings() -> None:
    for build, message in (
        (lambda: Sampling(-1.0), "temperature: expected 0 or more, found -1.0"),
        (lambda: Sampling(0.0, top_k=3), "temperature 0 takes the greatest logit"),
        (lambda: Sampling(1.0, top_k=0), "top_k: expected at least 1, found 0"),
        (lambda: Sampling(1.0, top_p=1.5), r"top_p: expected in \(0, 1\], found 1.5"),
        (lambda: Limits(0), "new_tokens: expected at least 1, found 0"),
        (lambda: choose(jnp.zeros((1, 3)), None, Sampling(1.0)), r"expected keys \[B\]"),
        (
            lambda: beam_search(step, *beginning([0]), Limits(2), beams=7),
            "vocabulary of at least 14 for 7 beams, found 12",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            build()
