"""Limits of configurations, and what follows from them."""

from __future__ import annotations

import re

import pytest

from systole.isa import Config, ConfigError


@pytest.mark.parametrize(
    "values, limit",
    [
        ({"rows": 3}, "rows = 3: must be 4..64"),
        ({"rows": 5, "inner_product": "fast"}, "rows must be even, not 5"),
        ({"banks": 3}, "banks = 3: must be 2, 4, 8 or 16"),
        ({"window_width": 100}, "window_width = 100: must be a power of two, 16..4096"),
        ({"window_kernel": 4}, "window_kernel = 4: must be 3, 5 or 7"),
        (
            {"rows": 12, "cols": 20, "post_lanes": 3},
            "post_lanes = 3: must be a divisor of gcd(rows, cols) = 4, or 0 for all of that",
        ),
        ({"post_lanes": -4}, "post_lanes = -4: must be a divisor of gcd(rows, cols) = 8"),
        (
            {"rows": 12, "cols": 20, "window_lanes": 4},
            "window_lanes = 4: must be rows = 12, its half, quarter or eighth, or 0 for all",
        ),
        ({"window_lanes": -4}, "window_lanes = -4: must be rows = 8, its half"),
        ({"window": 1}, "window = 1: must be of type bool"),
    ],
)
def test_an_illegal_value_is_refused_with_its_limit(values, limit):
    with pytest.raises(ConfigError, match=re.escape(limit)):
        Config.from_dict({**Config.sized(8, 8).to_dict(), **_sized(values)})


def _sized(values: dict) -> dict:
    """Memories for another shape, so that only the value in question is illegal."""
    if "cols" not in values:
        return values
    return {**Config.sized(values["rows"], values["cols"]).to_dict(), **values}


@pytest.mark.parametrize(
    "rows, cols, given, lanes, groups, word_groups",
    [(16, 16, 0, 16, 1, 1), (16, 16, 4, 4, 4, 4), (12, 20, 0, 4, 5, 3), (12, 20, 2, 2, 10, 6)],
)
def test_lanes_of_the_post_processing(rows, cols, given, lanes, groups, word_groups):
    config = Config.sized(rows, cols, post_lanes=given)
    assert (config.lanes, config.groups, config.word_groups) == (lanes, groups, word_groups)


@pytest.mark.parametrize(
    "lanes, post_lanes, passes, written",
    [(0, 0, 1, 4), (12, 2, 1, 2), (6, 0, 2, 2), (3, 2, 4, 1)],
)
def test_lanes_of_the_window_engine(lanes, post_lanes, passes, written):
    config = Config.sized(12, 20, window_lanes=lanes, post_lanes=post_lanes)
    assert (config.window_passes, config.written_lanes) == (passes, written)
    assert config.pass_param_words * passes == config.window_param_words
    assert config.word_parts * written == config.rows
