"""Row operations on the accelerator's RTL, against the command-level simulator."""

from __future__ import annotations

import random

import pytest

from systole.isa import Engine, Opcode
from systole.sim.device import RtlDevice
from systole.sw.runtime.driver import Driver
from systole.sw.simulate.commands import CommandDevice
from tests.helpers.command_reference import image, tiny
from tests.helpers.random_commands import first_values, random_command, serialised

STORED = 1 << 17
MEMORY = 4 << 20
KINDS = ["SOFTMAX", "NORMALISE", "DEPTHWISE", "post", "NORMALISE", "SOFTMAX", "MAX", "IM2COL"]


@pytest.mark.parametrize("shape", [(4, 4), pytest.param((12, 20), marks=pytest.mark.long)])
def test_random_commands(shape: tuple[int, int]) -> None:
    """Row operations between others."""
    rng, config = random.Random(1), tiny(*shape, row_ops=True)
    with RtlDevice(config, memory_bytes=MEMORY) as device:
        for _ in range(4):
            commands, data = first_values(rng, config)
            for kind in KINDS * 3:
                opcode, values = random_command(rng, config, kind)
                commands.append((opcode, Engine[opcode.name], values))
            stored = {"dram": STORED, "count0": 1024, "count1": 1, "count2": 1}
            commands.append((Opcode.STORE, Engine.STORE, stored))
            words = serialised(commands)
            results = []
            for each in (CommandDevice(config, MEMORY), device):
                driver = Driver(each)
                place = dict(command_offset=0, command_words=len(words), memory_bytes=2 * STORED)
                driver.load(image(words, data, STORED).tobytes(), **place)
                driver.run()
                results.append(driver.read_data(STORED, 1024 * config.vector_bytes))
            assert results[0] == results[1]
