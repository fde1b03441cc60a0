"""Zero points with which weights wider than int8 fit into int8."""

from __future__ import annotations

import numpy as np

from systole.isa import Config

INT8 = np.iinfo(np.int8)


def fitting_zero(weights: np.ndarray, config: Config) -> int | None:
    """The zero point nearest to 0 such that ``weights`` plus it are int8: 0 for weights that are
    int8 as they are. None: there is none that the configuration has."""
    if weights.dtype == np.int8:
        return 0
    # The kernel is padded with zeros, which must fit, too.
    low, high = int(weights.min(initial=0)), int(weights.max(initial=0))
    zero = max(INT8.min - low, 0) or min(INT8.max - high, 0)
    fits = INT8.min <= low + zero and high + zero <= INT8.max
    held = config.least_zero_point <= zero <= config.most_zero_point
    return zero if fits and held else None
