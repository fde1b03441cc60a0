"""Row operations on the accelerator's RTL, against the command-level simulator."""

from __future__ import annotations

import random

import pytest

from systole.sim.device import RtlDevice
from tests.helpers.command_reference import tiny
from tests.helpers.random_commands import MEMORY, check_on_both

KINDS = ["SOFTMAX", "NORMALISE", "DEPTHWISE", "post", "NORMALISE", "SOFTMAX", "MAX", "IM2COL"]


@pytest.mark.parametrize("shape", [(4, 4), pytest.param((12, 20), marks=pytest.mark.long)])
def test_random_commands(shape: tuple[int, int]) -> None:
    """Row operations between others."""
    rng, config = random.Random(1), tiny(*shape, row_ops=True)
    with RtlDevice(config, memory_bytes=MEMORY) as device:
        for _ in range(4):
            check_on_both(rng, device, config, KINDS * 3)
