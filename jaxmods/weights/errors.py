"""The one exception of this package."""

from __future__ import annotations


class WeightError(ValueError):
    """Weights that do not fit: a damaged file, or keys, shapes and dtypes other than expected.

    The message names the file or keys, what was expected, what was found, and what to do.
    """
