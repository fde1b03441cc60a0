"""The registers between the giver and the taker of a stream."""

from __future__ import annotations

import random

import pytest
from amaranth.lib import data

from systole.hw.bus.registers import StreamRegisters
from tests.helpers.simulation import simulation

LAYOUT = data.StructLayout({"number": 16})
CYCLES = 400


def run(give: float, take: float, flush: float = 0.0) -> list[tuple[int, list[int], list[int]]]:
    """What is given and what is taken between flushes, with the cycles of each such stretch."""
    design, rng = simulation(StreamRegisters, LAYOUT), random.Random(f"{give} {take} {flush}")
    stretches: list[tuple[int, list[int], list[int]]] = []

    async def bench(ctx):
        dut, number, begin = design.dut, 0, 0
        given: list[int] = []
        taken: list[int] = []
        for cycle in range(CYCLES):
            ctx.set(dut.input.valid, rng.random() < give)
            ctx.set(dut.input.payload.number, number)
            ready = ctx.get(dut.input.ready)
            ctx.set(dut.output.ready, rng.random() < take)
            # The giver does not feel in the same cycle what the taker does.
            assert ctx.get(dut.input.ready) == ready
            flushes = rng.random() < flush
            ctx.set(dut.flush, flushes)
            if ctx.get(dut.output.valid) and ctx.get(dut.output.ready):
                taken.append(ctx.get(dut.output.payload.number))
            if ctx.get(dut.input.valid) and ready:
                given.append(number)
                number += 1
            if flushes:
                stretches.append((cycle - begin, given, taken))
                given, taken, begin = [], [], cycle
            await ctx.tick()
        stretches.append((CYCLES - begin, given, taken))

    design.run(bench)
    return stretches


@pytest.mark.parametrize("give, take", [(1, 1), (1, 0.5), (0.5, 1), (0.7, 0.6)])
def test_all_arrives_in_order(give, take):
    ((_, given, taken),) = run(give, take)
    assert taken == given[: len(taken)]
    assert len(given) - len(taken) <= 2
    assert len(taken) > 0.3 * CYCLES


def test_nothing_is_lost_at_full_rate():
    ((cycles, given, taken),) = run(1, 1)
    assert len(given) == cycles and len(taken) == cycles - 1


def test_a_flush_forgets_what_waits():
    stretches = run(0.8, 0.5, flush=0.1)
    assert len(stretches) > 10
    for _, given, taken in stretches:
        assert taken == given[: len(taken)]
