"""RowScalar against ``isa.rows``: the numbers of random rows, and of the largest and smallest."""

from __future__ import annotations

import numpy as np
import pytest

from systole.hw.window.row_scalar import RowScalar
from systole.isa.commands import MAX_FEATURES
from systole.isa.rows import EXP_BITS, NormaliseParameters, reciprocal, statistics
from tests.helpers.simulation import simulation

INTERVAL = {True: 29, False: 42}
"""Cycles from a row to the next, at most; by whether it is of SOFTMAX."""


def run(rows: list[dict[str, int]], **command: int) -> tuple[list[tuple[int, int]], int]:
    """``early`` and ``late`` of each row, and the cycles that all take."""
    design = simulation(RowScalar)
    dut, out, now = design.dut, [], 0

    async def bench(ctx):
        nonlocal now
        for name, value in command.items():
            ctx.set(getattr(dut, name), value)
        waiting, pending = list(rows), False
        edge = ctx.tick().sample(dut.taken, dut.o_valid, dut.early, dut.late)
        while len(out) < len(rows):
            comes = bool(waiting) and not pending
            ctx.set(dut.valid, comes)
            if comes:
                for name, value in waiting.pop(0).items():
                    ctx.set(getattr(dut, name), value)
                pending = True
            _, _, taken, valid, early, late = await edge
            pending = pending and not taken
            now += 1
            assert now < 100 * len(rows) + 100, "timeout"
            if valid:
                out.append((early, late))

    design.run(bench)
    return out, now


@pytest.mark.parametrize("numerator", [1 << 23, (1 << 24) - 1, 12345678])
def test_multipliers(numerator: int) -> None:
    """Multiplier and shift of SOFTMAX's rows."""
    rng = np.random.default_rng(numerator)
    sums = [1, 2, 3, (1 << 24) - 1, 4096 * ((1 << EXP_BITS) - 1), numerator]
    sums += [int(rng.integers(1, 1 << bits)) for bits in rng.integers(1, 36, 60)]
    for own in (-20, 11, 40):
        found, cycles = run(
            [{"sums": s, "total": 0} for s in sums], softmax=1, numerator=numerator, own_shift=own
        )
        multiplier, shift = reciprocal(numerator, np.array(sums))
        shift = np.clip(shift + own, 0, 63)
        assert [(0, int(m) | int(s) << 24) for m, s in zip(multiplier, shift)] == found
        assert cycles <= INTERVAL[True] * len(sums) + 30


@pytest.mark.parametrize("features", [1, 3, 16, 384, MAX_FEATURES])
@pytest.mark.parametrize("epsilon", [0, 5, 1 << 30, (1 << 55) - 1])
def test_factors(features: int, epsilon: int) -> None:
    """Factor and offset of NORMALISE's rows."""
    rng = np.random.default_rng(features)
    rows = [np.full(features, n) for n in (0, 1, -255, 255)]
    rows += [np.where(np.arange(features) < n, -1, 2) for n in (1, features // 2)]
    rows += [np.where(np.arange(features) % 2, -255, 255)]
    for _ in range(12):
        low, high = sorted(rng.integers(-255, 256, 2))
        rows.append(rng.integers(low, high + 1, features))
    for centred in (True, False):
        none = np.zeros(0, np.int64)
        p = NormaliseParameters(features, epsilon, centred, none, none, none, none, none)
        totals = [int(row.sum()) * centred for row in rows]
        squares = [int((row.astype(np.int64) ** 2).sum()) for row in rows]
        found, cycles = run(
            [{"sums": s, "total": t} for s, t in zip(squares, totals)],
            softmax=0,
            features=features,
            epsilon=epsilon,
        )
        for row, (early, late) in zip(rows, found, strict=True):
            factor, offset = statistics(row, p)
            low, high = ((early >> at & 0x3FFFF ^ 0x20000) - 0x20000 for at in (0, 18))
            assert low - (high << 18) == factor
            assert (128 - offset) % (1 << 36) == late
        assert cycles <= INTERVAL[False] * len(rows) + 70
