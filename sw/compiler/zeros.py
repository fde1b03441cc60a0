"""Zero points of weights that are wider than int8."""

from __future__ import annotations

import numpy as np

from systole.isa import Config

INT8 = np.iinfo(np.int8)


def fitting_zero(weights: np.ndarray, config: Config) -> int | None:
    """The zero point with which weights are int8: ``weights`` are int8 numbers less this one, which
    is the smallest there is. 0 for what is int8 as it is. None: there is none, or the configuration
    has no zero points."""
    if weights.dtype == np.int8:
        return 0
    # Zeros around the weights must fit, too.
    low, high = int(weights.min(initial=0)), int(weights.max(initial=0))
    zero = max(INT8.min - low, 0) or min(INT8.max - high, 0)
    fits = INT8.min <= low + zero and high + zero <= INT8.max
    held = config.least_zero_point <= zero <= config.most_zero_point
    return zero if fits and held else None
