"""Filters that the patches of a picture can be read through."""

from __future__ import annotations

import numpy as np

# Along which colours of pictures vary: light, and two without it, which vary about a third as much.
_COLOURS = np.array([[1, 1, 1], [1, -1, 0], [1, 1, -2]]) / np.sqrt([[3], [2], [6]])
_AMPLITUDE = (1.0, 0.3, 0.3)
_STEADY = 6.0  # amplitude of the mean of a patch, in that of one half wave per patch


def cosine_filters(side: int, width: int) -> np.ndarray:
    """Two-dimensional cosines of light and colour, the weak ones made as loud as the strong ones.

    Amplitudes in pictures fall as one over the frequency (Field 1987, "Relations between the
    statistics of natural images and the response properties of cortical cells"), so that filters
    drawn at random give the brightness of a patch, and hardly what distinguishes stripes from
    checks. These are the `width` cosines of the largest amplitude, each divided by it.

    Args:
      side: pixels per side of a patch. width: number of filters, at most 3 * side^2.

    Returns:
      float32 [side, side, 3, width], orthogonal to each other.

    Raises:
      ValueError: more filters than values in a patch.
    """
    if not 1 <= width <= 3 * side**2:
        raise ValueError(
            f"cosine_filters: expected 1 to {3 * side**2} filters for patches of {side} x {side}, "
            f"found {width}"
        )
    waves = np.arange(side)
    table = np.cos(np.pi * (waves[None] + 0.5) * waves[:, None] / side)
    table /= np.linalg.norm(table, axis=1, keepdims=True)
    distance = np.hypot(waves[:, None], waves[None])
    falling = 1 / np.maximum(distance, 1 / _STEADY)
    amplitude = np.stack([strength * falling for strength in _AMPLITUDE], axis=-1)
    chosen = np.argsort(-amplitude.ravel(), kind="stable")[:width]
    v, u, colour = np.unravel_index(chosen, amplitude.shape)
    filters = np.einsum("ky,kx,kc->yxck", table[v], table[u], _COLOURS[colour])
    return (filters / amplitude.ravel()[chosen]).astype(np.float32)
