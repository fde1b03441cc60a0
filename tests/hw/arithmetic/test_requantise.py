"""Requantise against ``isa.numerics.requantise``: values, ties, parameter changes, stalls."""

from __future__ import annotations

import numpy as np
import pytest

from systole.hw.arithmetic.requantise import Requantise
from systole.isa.numerics import requantise, wrap_int32
from tests.helpers.simulation import Inputs, simulation

LANES = 24


def near_ties(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Triples ``(s, multiplier, shift)`` whose product lies within about one unit in the 24th
    significant bit of an integer and a half."""
    integer = rng.integers(0, 1 << rng.integers(0, 10, n))
    s = np.maximum(rng.integers(0, 1 << rng.integers(1, 32, n)), 1)
    scale = (integer + 0.5) / s
    shift = (23 - np.floor(np.log2(scale))).astype(np.int64)
    multiplier = np.rint(np.ldexp(scale, shift)).astype(np.int64) + rng.integers(-1, 2, n)
    ok = (shift >= 0) & (shift <= 63) & (multiplier < 1 << 24) & (multiplier >= 1 << 23)
    sign = rng.choice([-1, 1], n)
    return np.where(ok, s * sign, 0), np.where(ok, multiplier, 0), np.where(ok, shift, 0)


def cases(rng: np.random.Generator, sets: int, vectors: int) -> list[tuple]:
    """``sets`` of (multiplier, shift, bias, zero, low, high, sums[vectors])."""
    out = []
    for k in range(sets):
        s, multiplier, shift = near_ties(rng, LANES)
        sums = [s, -s, s + 1, s - 1, 3 * s]
        if k % 4 == 1:  # any parameters, among them multiplier 0, shift 0 and 63, scale >= 1
            multiplier = rng.integers(1 << 23, 1 << 24, LANES)
            multiplier[rng.random(LANES) < 0.1] = 0
            shift = rng.integers(0, 64, LANES)
            shift[:4] = (0, 63, 23, 24)
            sums = []
        elif k % 4 == 2:  # powers of two: exact ties, and ties in the sum's own rounding
            multiplier = np.full(LANES, 1 << 23)
            shift = rng.integers(20, 56, LANES)
            half = np.int64(1) << np.clip(shift - 24, 0, 30)
            sums = [(2 * rng.integers(-300, 300, LANES) + 1) * half + d for d in (-1, 0, 0, 1)]
        edge = (1 << rng.integers(24, 32, LANES)) + rng.integers(-3, 4, LANES)
        tie = (rng.integers(1 << 23, 1 << 24, LANES) * 2 + 1) << rng.integers(0, 7, LANES)
        sums += [edge, -edge, tie, np.full(LANES, -(1 << 31)), np.zeros(LANES, np.int64)]
        while len(sums) < vectors:
            sums.append(rng.integers(-(1 << 31), 1 << 31, LANES) >> rng.integers(0, 31, LANES))
        sums = np.stack([wrap_int32(x) for x in sums[:vectors]])
        zero = int(rng.integers(-128, 128))
        low, high = sorted(int(x) for x in rng.integers(-128, 128, 2))
        if k % 2:
            zero, low, high = 0, -128, 127
        bias = rng.integers(-(1 << 31), 1 << 31, LANES) * (k % 3 != 0)
        out.append((multiplier, shift, bias, zero, low, high, sums))
    return out


def pack(values: np.ndarray, bits: int) -> int:
    return sum((int(v) & ((1 << bits) - 1)) << (bits * i) for i, v in enumerate(values))


@pytest.mark.parametrize("stalls", [False, True])
def test_equals_numpy(stalls: bool):
    rng = np.random.default_rng(7 + stalls)
    vectors = 12
    sets = cases(rng, 90, vectors)
    design = simulation(Requantise, lanes=LANES)
    dut = design.dut
    expected: list[int] = []
    values = 0
    double = 0  # values that rounding once would get wrong
    for multiplier, shift, bias, zero, low, high, sums in sets:
        acc = wrap_int32(sums.astype(np.int64) - bias)
        ref = requantise(acc, bias, multiplier, shift, zero=zero, low=low, high=high)
        expected += [pack(row, 8) for row in ref]
        values += ref.size
        exact = np.ldexp(sums.astype(np.longdouble) * multiplier, -shift)
        once = np.clip(np.rint(np.clip(exact, -1024, 1024)) + zero, low, high)
        double += int((once != ref).sum())
    assert values > 20_000 and double > 200

    got: list[int] = []
    cycles = 0

    async def driver(ctx):
        nonlocal cycles

        parameters = Inputs(dut.load, dut.params, dut.zero, dut.low, dut.high)
        vector = Inputs(dut.en, dut.i_valid, dut.acc)

        async def step(acc: int | None = None):
            """One enabled cycle, with accumulators or without."""
            nonlocal cycles
            cycles += 1
            while True:
                en = not stalls or rng.random() < 0.7
                vector.set(ctx, en, acc is not None, acc or 0)
                if en and ctx.get(dut.o_valid):
                    got.append(ctx.get(dut.o))
                await ctx.tick()
                if en:
                    return

        def load(multiplier, shift, bias, zero, low, high, _):
            words = bias & 0xFFFF_FFFF | multiplier << 32
            packed = pack(words, 64) | pack(shift << 56, 64)
            parameters.set(ctx, 1, packed, zero, low, high)

        load(*sets[0])
        await step()
        for k, (_, _, bias, *_, sums) in enumerate(sets):
            acc = wrap_int32(sums.astype(np.int64) - bias)
            ctx.set(dut.load, 0)
            for i, row in enumerate(acc):
                while stalls and rng.random() < 0.2:
                    await step()
                # The next parameters come with the last vector that must not use them.
                if i == vectors - 1 and k + 1 < len(sets):
                    assert not ctx.get(dut.loading)
                    load(*sets[k + 1])
                await step(pack(row, 32))
        ctx.set(dut.load, 0)
        for _ in range(dut.LATENCY):
            await step()

    design.run(driver)
    assert len(got) == len(expected)
    wrong = [i for i, (g, e) in enumerate(zip(got, expected)) if g != e]
    assert not wrong, f"{len(wrong)} vectors differ, first {wrong[0]}"
    if not stalls:  # one vector a cycle, also across parameters
        assert cycles == 1 + len(expected) + dut.LATENCY


def ties(shift: int) -> list[int]:
    """Sums that ``2^23 / 2^shift`` takes to an integer and a half, of either sign and parity; of
    those longer than 24 bits also the sums half a unit away, which their own rounding takes there
    or not; and the neighbours of all."""
    half = 1 << (shift - 24)
    sums = [(2 * n + 1) * half for n in (*range(6), 14, 62, 63) if (2 * n + 1) * half < 1 << 31]
    for tie in list(sums):
        if (dropped := tie.bit_length() - 24) > 0:
            sums += [tie + (1 << (dropped - 1)), tie - (1 << (dropped - 1))]
    near = [s + d for s in sums for d in (-1, 0, 1)]
    return [s for v in near for s in (v, -v) if -(1 << 31) <= s < 1 << 31]


def test_ties_at_every_bit_of_the_mask():
    """Every shift for which there are ties, each in a lane of its own."""
    shifts = np.arange(24, 55)
    design = simulation(Requantise, lanes=len(shifts))
    dut = design.dut
    columns = [ties(int(shift)) for shift in shifts]
    count = max(map(len, columns))
    acc = np.array([[c[i % len(c)] for c in columns] for i in range(count)], np.int64)
    zeros = np.zeros(len(shifts), np.int64)
    multiplier = np.full(len(shifts), 1 << 23)
    expected = requantise(
        acc.astype(np.int32), zeros, multiplier, shifts, zero=0, low=-128, high=127
    )
    # By hand: half to even in 24 bits, then half to even.
    exact = [
        [round(float(np.float32(v)) / 2 ** int(s - 23)) for v, s in zip(r, shifts)] for r in acc
    ]
    assert np.array_equal(expected, np.clip(exact, -128, 127))
    got = []

    async def driver(ctx):
        parameters = Inputs(dut.load, dut.params, dut.zero, dut.low, dut.high)
        vector = Inputs(dut.en, dut.i_valid, dut.acc)
        packed = pack(multiplier << 32, 64) | pack(shifts << 56, 64)
        parameters.set(ctx, 1, packed, 0, -128, 127)
        vector.set(ctx, 1, 0, 0)
        await ctx.tick()
        ctx.set(dut.load, 0)
        for i in range(count + dut.LATENCY):
            if ctx.get(dut.o_valid):
                got.append(ctx.get(dut.o))
            row = acc[i] if i < count else zeros
            vector.set(ctx, 1, i < count, pack(row, 32))
            await ctx.tick()
        if ctx.get(dut.o_valid):
            got.append(ctx.get(dut.o))

    design.run(driver)
    wanted = [pack(row, 8) for row in expected]
    assert len(got) == count
    assert not [i for i in range(count) if got[i] != wanted[i]]


def test_loads_as_close_as_allowed():
    """Parameters may change again as soon as ``loading`` is low; ``en`` low freezes everything."""
    design = simulation(Requantise, lanes=1)
    dut = design.dut
    rng = np.random.default_rng(3)
    got, expected = [], []

    async def driver(ctx):
        bias, zero = 0, 0
        loads = 0
        inputs = Inputs(dut.en, dut.load, dut.params, dut.zero, dut.low, dut.high)
        vector = Inputs(dut.i_valid, dut.acc)
        for cycle in range(300):
            en = int(rng.random() < 0.8)
            load = not ctx.get(dut.loading)
            new = int(rng.integers(-20, 20)), int(rng.integers(-20, 20))
            params = new[0] & 0xFFFF_FFFF | 1 << (32 + 23) | 23 << 56
            inputs.set(ctx, en, load, params, new[1], *(-128, 127))
            vector.set(ctx, loads > 0, cycle % 64)
            if en:
                if ctx.get(dut.o_valid):
                    got.append(ctx.get(dut.o.as_signed()))
                if loads:
                    expected.append(cycle % 64 + bias + zero)
                if load:
                    bias, zero = new
                    loads += 1
            await ctx.tick()
        assert loads > 30

    design.run(driver)
    assert got == expected[: len(got)] and len(got) >= len(expected) - dut.LATENCY
