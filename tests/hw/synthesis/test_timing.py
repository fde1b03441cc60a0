"""The estimate of the longest paths, on netlists small enough to add up by hand."""

from __future__ import annotations

from typing import Any

import pytest

from systole.hw.synthesis.timing import (
    CLOCK_TO_Q,
    FAN_OUT,
    FAR_WIRE,
    INTO_FLIP_FLOP,
    LUT,
    MULTIPLY,
    WIRE,
    estimate,
    signal_of,
)

ONE = WIRE + FAN_OUT
"""The wire to a single sink."""


def cell(kind: str, outputs: dict[str, list], **inputs: list) -> dict[str, Any]:
    directions = dict.fromkeys(inputs, "input") | dict.fromkeys(outputs, "output")
    return {"type": kind, "port_directions": directions, "connections": inputs | outputs}


def module(cells: dict[str, Any], **nets: int) -> dict[str, Any]:
    return {
        "cells": cells,
        "ports": {"a": {"direction": "input", "bits": [2]}},
        "netnames": {name: {"bits": [bit]} for name, bit in nets.items()},
    }


def test_a_path_from_register_to_register():
    cells = {
        "first": cell("TRELLIS_FF", {"Q": [10]}, CLK=[1], DI=[2]),
        "one": cell("LUT4", {"Z": [11]}, A=[10]),
        "two": cell("LUT4", {"Z": [12]}, A=[11]),
        "last": cell("TRELLIS_FF", {"Q": [13]}, CLK=[1], DI=[12]),
    }
    found = estimate(module(cells, start=10, middle=11))
    assert found.registers is not None and found.inputs is not None
    assert found.registers.delay == pytest.approx(
        CLOCK_TO_Q + 2 * (ONE + LUT) + INTO_FLIP_FLOP, abs=0.01
    )
    assert found.registers.levels == 2
    assert found.registers.nets == ("start", "middle", "last")
    assert found.inputs.delay == pytest.approx(CLOCK_TO_Q + ONE, abs=0.01)
    assert found.outputs is None and found.through is None


def test_multipliers_are_slow_and_far():
    cells = {
        "first": cell("TRELLIS_FF", {"Q": [10]}, CLK=[1], DI=["0"]),
        "product": cell("MULT18X18D", {"P0": [11]}, A0=[10]),
        "last": cell("TRELLIS_FF", {"Q": [13]}, CLK=[1], DI=[11]),
    }
    found = estimate(module(cells)).registers
    assert found is not None
    assert found.delay == pytest.approx(CLOCK_TO_Q + 2 * (FAR_WIRE + FAN_OUT) + MULTIPLY, abs=0.01)


def test_cells_are_told_by_the_signal_they_are_named_after():
    assert signal_of("post.total_0_TRELLIS_FF_Q_9_DI_CCU2C_S1") == "post.total_0"
    assert signal_of("array.sums__1[3]") == "array.sums__1"
