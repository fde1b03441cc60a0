"""cocotb bench of ``Requantise`` against ``isa.numerics``: parameters change as often as allowed,
``en`` and ``i_valid`` fall at random; all kinds of rounding and clamping occur."""

from __future__ import annotations

from collections import Counter, deque
from typing import Any

import cocotb
import numpy as np

from systole.isa.numerics import requantise
from systole.isa.params import PARAM_BYTES
from systole.sim.benches.common import CONFIG, Agent, Bench, pack

VECTORS = 1500
LANES = CONFIG.lanes


class Requantiser(Agent):
    """Driver, monitors, model and scoreboard in one: all of them move with ``en``."""

    def __init__(self, bench: Bench):
        names = ("en", "i_valid", "acc", "load", "loading", "params", "zero", "low", "high")
        super().__init__(bench, "requantise", *names, "o_valid", "o")
        self.loaded: tuple[Any, ...] | None = None
        self.expected: deque[np.ndarray] = deque()
        self.compared = 0
        self.coverage: Counter[str] = Counter()

    def _parameters(self) -> tuple[Any, ...]:
        """Bias, multiplier, shift, zero, low, high."""
        rng = self.rng
        # Powers of two give exact ties.
        power = rng.random(LANES) < 0.5
        multiplier = np.where(power, 1 << 23, rng.integers(1 << 23, 1 << 24, LANES))
        multiplier[rng.random(LANES) < 0.05] = 0
        bias = rng.integers(-(1 << 31), 1 << 31, LANES) >> rng.integers(0, 32, LANES)
        low, high = sorted(rng.integers(-128, 128, 2)) if rng.random() < 0.3 else (-128, 127)
        shift = rng.integers(0, 64, LANES) if rng.random() < 0.2 else rng.integers(23, 50, LANES)
        return bias, multiplier, shift, int(rng.integers(-20, 20)), int(low), int(high)

    def drive(self) -> None:
        rng = self.rng
        self.enabled = bool(rng.random() < 0.8)
        self.en.value = self.enabled
        # ``loading`` is a register's: it has settled.
        self.new = self._parameters() if not self.loading.value and rng.random() < 0.5 else None
        self.load.value = self.new is not None
        if self.new is not None:
            bias, multiplier, shift, zero, low, high = self.new
            words = bias & 0xFFFF_FFFF | multiplier << 32 | shift << 56
            assert words.itemsize == PARAM_BYTES
            self.params.value = pack(words)
            for port, value in ((self.zero, zero), (self.low, low), (self.high, high)):
                port.value = value & 0xFF
        self.vector = None
        if self.loaded is not None and rng.random() < 0.8:
            bias, multiplier, shift, *_ = self.loaded
            # Sums around the multiples of a half in the range of the result, or any.
            half = np.clip(np.ldexp(0.5, shift) / np.maximum(multiplier, 1), 0, 1 << 23)
            near = np.rint(rng.integers(-400, 400, LANES) * half) + rng.integers(-1, 2, LANES)
            any_ = rng.integers(-(1 << 31), 1 << 31, LANES)
            chosen = np.where(rng.random(LANES) < 0.8, near.astype(np.int64), any_)
            self.vector = (chosen - bias).astype(np.uint32).view(np.int32)
            self.acc.value = pack(self.vector)
        self.i_valid.value = self.vector is not None

    def sample(self) -> None:
        if not self.enabled:
            self.coverage["held a result"] += int(self.o_valid.value)
            return
        if self.o_valid.value:
            got = int(self.o.value).to_bytes(LANES, "little")
            expected = self.expected.popleft()
            assert got == expected.tobytes(), f"vector {self.compared}: {got}, not {expected}"
            self.compared += 1
        if self.vector is not None:
            assert self.loaded is not None
            bias, multiplier, shift, zero, low, high = self.loaded
            out = requantise(self.vector, bias, multiplier, shift, zero, low, high)
            self.expected.append(out)
            total = (self.vector.astype(np.int64) + bias).astype(np.uint32).view(np.int32)
            exact = np.ldexp(total.astype(np.float64) * multiplier, -shift)
            ties = (exact % 1 == 0.5) & (out > low) & (out < high)
            self.coverage["tie"] += int(ties.sum())
            self.coverage["low"] += int((exact + zero < low).sum())
            self.coverage["high"] += int((exact + zero > high).sum())
            self.coverage["new parameters with a vector"] += self.new is not None
        if self.new is not None:
            self.loaded = self.new


@cocotb.test()
async def requantise_random(dut: Any) -> None:
    """Every vector's result, in order, and nothing else."""
    bench = Bench(dut)
    await bench.reset()
    block = Requantiser(bench)
    await bench.run(block, until=lambda: block.compared == VECTORS)
    names = ("held a result", "tie", "low", "high", "new parameters with a vector")
    assert all(block.coverage[name] > 50 for name in names), block.coverage
