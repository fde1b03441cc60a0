"""The RTL from power on: before the reset nothing has a value that it could rely on.

Verilator starts every register and memory at random, by a seed; Icarus, with its four states,
starts them unknown, so that one run stands for all values wherever it ends with known ones."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from systole.isa import Config
from systole.isa.tools.assembler import assemble
from systole.sim.device import MemoryModel, RtlDevice
from systole.sw.compiler import compile_graph
from systole.sw.runtime.driver import Driver
from tests.helpers.layer_checks import Case, check_program, digits_case
from tests.helpers.marks import needs_icarus
from tests.helpers.random_graphs import random_graph

MEMORY = 1 << 20
LIMIT = 50_000
"""Cycles after which a program counts as hung; it takes some thousands."""
SMALL = Config.sized(4, 4)
OTHERS = {
    "fast": Config.sized(4, 4, inner_product="fast"),
    "bare": Config.sized(
        8, 8, window=False, trace=False, counters=False, queue_depth=2, axi_outstanding=1
    ),
    "wide-cols": Config.sized(4, 16, axi_data_bits=64, banks=16, cell=8, window_kernel=3),
}


def random_case(seed: int, config: Config) -> Case:
    """A random program."""
    sizes = {"ops": 5, "size": 8, "channels": 12, "work": 50_000}
    graph, inputs, expected = random_graph(seed, window=config.window, **sizes)
    return compile_graph(graph, config, dump=True), inputs, expected


def cycles_from_power_on(config: Config, cases: list[Case], **options) -> list[int]:
    with RtlDevice(config, memory_bytes=MEMORY, **options) as device:
        return [check_program(device, *case, limit=LIMIT) for case in cases]


@functools.cache
def usual_cycles(seed: int) -> list[int]:
    """Cycles of a seed's cases where everything starts at its reset value."""
    memory = MemoryModel.hostile(seed)
    return cycles_from_power_on(SMALL, cases_of(seed), memory=memory)


def cases_of(seed: int) -> list[Case]:
    """Digits first, or a random program first."""
    cases = [digits_case(SMALL), random_case(seed, SMALL)]
    return cases[:: -1 if seed % 2 else 1]


@pytest.mark.xdist_group("power-on")
@pytest.mark.parametrize(
    "seed", [1, 2, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(3, 19))]
)
def test_random_values_before_the_reset(seed):
    memory = MemoryModel.hostile(seed)
    cycles = cycles_from_power_on(SMALL, cases_of(seed), memory=memory, start_seed=seed)
    assert cycles == usual_cycles(seed)


@pytest.mark.xdist_group("power-on")
def test_memories_start_at_random():
    """What the tests above rely on: words that nobody wrote are others by the seed."""
    words = assemble("STORE dram=4096 count0=64 count1=1 count2=1\nEND")
    found = []
    for seed in (1, 2):
        with RtlDevice(SMALL, memory_bytes=MEMORY, start_seed=seed) as device:
            driver = Driver(device)
            image = np.array(words, "<u8").tobytes()
            driver.load(image, command_offset=0, command_words=len(words), memory_bytes=8192)
            driver.run(timeout_cycles=LIMIT)
            found.append(driver.read_data(4096, 64 * SMALL.vector_bytes))
    assert all(len(set(data)) > 2 for data in found) and found[0] != found[1]


@pytest.mark.xdist_group("power-on")
@needs_icarus
def test_unknown_values_before_the_reset():
    cases = [random_case(2, SMALL)]
    with RtlDevice(SMALL, memory_bytes=MEMORY) as device:
        usual = [check_program(device, *case) for case in cases]
    assert cycles_from_power_on(SMALL, cases, simulator="icarus", start_seed=1) == usual


@pytest.mark.long
@pytest.mark.xdist_group("power-on")
@pytest.mark.parametrize("name", OTHERS)
def test_random_values_in_other_configurations(name):
    config = OTHERS[name]
    for seed in range(1, 9):
        cycles_from_power_on(config, [random_case(seed, config)], start_seed=seed)


@pytest.mark.long
@pytest.mark.xdist_group("power-on")
@needs_icarus
@pytest.mark.parametrize("seed", range(3, 7))
def test_unknown_values_with_digits(seed):
    cycles_from_power_on(SMALL, cases_of(seed), simulator="icarus", start_seed=seed)
