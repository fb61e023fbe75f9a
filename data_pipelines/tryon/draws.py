"""Which conditions a training step uses (spec section 3; official `process_latent_cond`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Probabilities:
    """Attributes: probability of the person photo (else the agnostic one), and of *including* mask,
    DensePose picture and reference."""

    person: float = 0.5
    mask: float = 0.0
    dense: float = 0.0
    reference: float = 0.5

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not 0 <= value <= 1:
                raise ValueError(
                    f"data.{field.name}_prob: expected a probability 0..1, found {value}"
                )


@dataclasses.dataclass(frozen=True)
class Conditions:
    """What was drawn: whether the subject is the person photo, and what else is included."""

    person: bool
    mask: bool
    dense: bool
    reference: bool


def draw_conditions(uniform: Sequence[float], probabilities: Probabilities) -> Conditions:
    """Conditions from four numbers in [0, 1), in the order person, mask, dense, reference.

    A condition is taken where its number is *below* the probability, so 0 means never and 1 always.
    """
    u, p = uniform, probabilities
    return Conditions(
        person=bool(u[0] < p.person),
        mask=bool(u[1] < p.mask),
        dense=bool(u[2] < p.dense),
        reference=bool(u[3] < p.reference),
    )


def pick(count: int, shares: Sequence[float], rng: np.random.Generator) -> int:
    """Index of a variant, one number drawn in any case; without shares all are equally likely."""
    u = float(rng.random())
    if count == 0:
        return 0
    ends = np.cumsum(shares or [1.0] * count)
    return min(int(np.searchsorted(ends, u * ends[-1], side="right")), count - 1)
