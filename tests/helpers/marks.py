"""Marks for tests that are too many for every run, or need what may not be installed."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import Any

import pytest

needs_icarus = pytest.mark.skipif(
    shutil.which("iverilog") is None, reason="Icarus Verilog is not installed"
)


def fewer_unless_long(values: Sequence[Any], *, fast: int) -> list[Any]:
    """``values`` as parameters of a test: the first ``fast`` of them for every run, the others for
    ``make test-long``."""
    return [
        *values[:fast],
        *(pytest.param(value, marks=pytest.mark.long) for value in values[fast:]),
    ]
