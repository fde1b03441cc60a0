"""The systolic array against numpy, at the tightest spacing of captures and swaps it promises."""

from __future__ import annotations

import numpy as np
import pytest
from amaranth.sim import Simulator

from systole.hw.conv.array import SystolicArray
from systole.hw.conv.fast_array import FastSystolicArray, array_of
from systole.isa import Config

SHAPES = [
    *((4, 4, 1), (4, 4, 4), (6, 4, 4), (8, 4, 2), (8, 4, 4), (7, 5, 8), (12, 20, 4), (12, 20, 6)),
    (32, 4, 1),
]
CONFIGS = [
    pytest.param(
        Config.sized(rows, cols, cell=cell, inner_product=kind), id=f"{rows}x{cols}c{cell} {kind}"
    )
    for kind in ("plain", "fast")
    for rows, cols, cell in SHAPES
    if kind == "plain" or rows % 2 == 0
]


def packed(values) -> int:
    return int.from_bytes(np.asarray(values, np.int8).tobytes(), "little")


def schedule(dut: SystolicArray, tiles: int, rng: np.random.Generator, slack: bool):
    """Cycles of each tile's capture and swap: each as early as the array's contract allows, or
    (``slack``) a few cycles later at random."""
    captures, swaps = [], []
    for t in range(tiles):
        capture = 0 if t == 0 else max(swaps[-1], captures[-1] + dut.config.rows)
        capture += int(rng.integers(0, 4)) if slack else 0
        captures.append(capture)
        swap = capture + dut.capture_lead
        swaps.append(swap + (int(rng.integers(0, 2 * dut.config.rows)) if slack else 0))
    return captures, swaps


@pytest.mark.parametrize("slack", [False, True])
@pytest.mark.parametrize("config", CONFIGS)
def test_array(config: Config, slack: bool):
    rows, cols = config.rows, config.cols
    rng = np.random.default_rng([rows, cols, config.cell, slack])
    dut = array_of(config)
    assert isinstance(dut, FastSystolicArray) == (config.inner_product == "fast")
    tiles = 12
    captures, swaps = schedule(dut, tiles, rng, slack)
    if not slack:
        periods = np.diff(captures)
        assert periods.min() == rows, "tiles follow each other without a gap"
    weights = rng.integers(-128, 128, (tiles, rows, cols))
    weights[0], weights[1] = -128, 127
    bus = {captures[t] + 1 + r: packed(weights[t, r]) for t in range(tiles) for r in range(rows)}
    first = swaps[0] + dut.SWAP_LEAD
    last = swaps[-1] + dut.SWAP_LEAD + rows
    end = last + dut.latency(cols - 1)
    vectors = {}
    expected = {}
    tile_seen = set()
    for cycle in range(first, last):
        tile = int(np.searchsorted(np.array(swaps) + dut.SWAP_LEAD, cycle, side="right")) - 1
        # The first vector a tile serves and the last one are those that a wrong wave would hit.
        if rng.random() < 0.8 or cycle - dut.SWAP_LEAD in swaps:
            x = rng.integers(-128, 128, rows)
            if rng.random() < 0.1:
                x[:] = -128
            vectors[cycle] = packed(x)
            for c in range(cols):
                expected[cycle + dut.latency(c), c] = int(x @ weights[tile, :, c])
            tile_seen.add(tile)
    assert tile_seen == set(range(tiles))

    async def bench(ctx):
        for cycle in range(end):
            ctx.set(dut.capture, cycle in captures)
            ctx.set(dut.swap, cycle in swaps)
            ctx.set(dut.weights, bus.get(cycle, packed(rng.integers(-128, 128, cols))))
            ctx.set(dut.valid, cycle in vectors)
            ctx.set(dut.x, vectors.get(cycle, packed(rng.integers(-128, 128, rows))))
            for c in range(cols):
                if (cycle, c) in expected:
                    assert ctx.get(dut.sums[c]) == expected.pop((cycle, c)), (cycle, c)
            await ctx.tick()
        assert not expected

    sim = Simulator(dut)
    sim.add_clock(1e-6)
    sim.add_testbench(bench)
    sim.run()


@pytest.mark.parametrize("kind", ["plain", "fast"])
def test_sums_hold_between_vectors(kind: str):
    """Invalid inputs do not disturb the last sums: nothing toggles while the array is idle."""
    dut = array_of(Config.sized(4, 4, cell=2, inner_product=kind))

    async def bench(ctx):
        ctx.set(dut.capture, 1)
        await ctx.tick()
        ctx.set(dut.capture, 0)
        ctx.set(dut.weights, packed([1, 2, 3, 4]))
        await ctx.tick().repeat(dut.capture_lead)
        ctx.set(dut.swap, 1)
        await ctx.tick().repeat(4)
        ctx.set(dut.swap, 0)
        ctx.set(dut.x, packed([1, 1, 1, 1]))
        ctx.set(dut.valid, 1)
        await ctx.tick()
        ctx.set(dut.valid, 0)
        for i in range(20):
            ctx.set(dut.x, packed([i, -i, i, i]))
            await ctx.tick()
            if i >= dut.latency(3):
                assert [ctx.get(s) for s in dut.sums] == [4, 8, 12, 16]

    sim = Simulator(dut)
    sim.add_clock(1e-6)
    sim.add_testbench(bench)
    sim.run()
