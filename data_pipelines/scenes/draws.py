"""Counter-based random draws: every (seed, index, stream) is its own reproducible sequence.

Philox is a counter-based generator, so a scene costs no state and no jumping: the key is
(seed, index), the high counter word names the stream. Only raw 64-bit words are taken from NumPy
(their sequence is fixed by the algorithm); the conversion to floats and choices is ours, so the
draws are the same on every machine and NumPy version.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")

_BLOCK = 128


class Draws:
    """A sequence of draws for `(seed, index)`; `stream` separates uses (layout, words, ...)."""

    __slots__ = ("_bits", "_words")

    def __init__(self, seed: int, index: int, stream: int = 0) -> None:
        if index < 0 or seed < 0:
            raise ValueError(
                f"scene: expected seed and index >= 0, found seed={seed}, index={index}; "
                "number scenes from 0"
            )
        self._bits = np.random.Philox(
            key=np.array([seed, index], np.uint64), counter=[0, 0, 0, stream]
        )
        self._words: list[int] = []

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """Float in [low, high), 53 random bits."""
        if not self._words:
            self._words = self._bits.random_raw(_BLOCK)[::-1].tolist()
        return low + (high - low) * ((self._words.pop() >> 11) * 2.0**-53)

    def below(self, n: int) -> int:
        """Integer in [0, n)."""
        return int(self.uniform() * n)

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return self.uniform() < probability

    def choice(self, items: Sequence[T]) -> T:
        """One of `items`."""
        return items[int(self.uniform() * len(items))]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """`items` in random order (Fisher-Yates)."""
        out = list(items)
        for i in range(len(out) - 1, 0, -1):
            j = self.below(i + 1)
            out[i], out[j] = out[j], out[i]
        return out
