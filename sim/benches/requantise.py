"""cocotb bench of ``Requantise`` against ``isa.numerics``: parameters change as often as allowed,
``en`` and ``i_valid`` fall at random, and all kinds of rounding and clamping occur."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass

import cocotb
import numpy as np

from systole.isa.numerics import requantise
from systole.sim.benches.common import Agent, Bench, pack, pack_params
from systole.sim.benches.environment import CONFIG, Handle

VECTORS = 1500
LANES = CONFIG.lanes


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Requantisation parameters of all lanes."""

    bias: np.ndarray
    multiplier: np.ndarray
    shift: np.ndarray
    zero: int
    low: int
    high: int


class Requantiser(Agent):
    """Driver, monitors, model and scoreboard in one, because all of them move with ``en``."""

    def __init__(self, bench: Bench):
        names = "en i_valid acc load loading params zero low high o_valid o"
        super().__init__(bench, "requantise", names)
        self.enabled = False
        self.loaded: Parameters | None = None
        """Parameters that the next vector uses."""
        self.new: Parameters | None = None
        """Parameters offered in this cycle."""
        self.vector: np.ndarray | None = None
        """Accumulators offered in this cycle."""
        self.expected: deque[np.ndarray] = deque()
        self.compared = 0
        self.coverage: Counter[str] = Counter()

    def _parameters(self) -> Parameters:
        rng = self.rng
        # Powers of two give exact ties.
        power = rng.random(LANES) < 0.5
        multiplier = np.where(power, 1 << 23, rng.integers(1 << 23, 1 << 24, LANES))
        multiplier[rng.random(LANES) < 0.05] = 0
        bias = rng.integers(-(1 << 31), 1 << 31, LANES) >> rng.integers(0, 32, LANES)
        low, high = sorted(rng.integers(-128, 128, 2)) if rng.random() < 0.3 else (-128, 127)
        shift = rng.integers(0, 64, LANES) if rng.random() < 0.2 else rng.integers(23, 50, LANES)
        return Parameters(
            bias=bias,
            multiplier=multiplier,
            shift=shift,
            zero=int(rng.integers(-20, 20)),
            low=int(low),
            high=int(high),
        )

    def drive(self) -> None:
        rng = self.rng
        self.enabled = bool(rng.random() < 0.8)
        self.en.value = self.enabled
        # ``loading`` is a register's: it has settled.
        self.new = self._parameters() if not self.loading.value and rng.random() < 0.5 else None
        self.load.value = self.new is not None
        if self.new is not None:
            new = self.new
            self.params.value = pack(pack_params(new.bias, new.multiplier, new.shift))
            for name in ("zero", "low", "high"):
                getattr(self, name).value = getattr(new, name) & 0xFF
        self.vector = None
        if self.loaded is not None and rng.random() < 0.8:
            loaded = self.loaded
            # Sums around the multiples of a half in the range of the result, or any.
            scale = np.maximum(loaded.multiplier, 1)
            half = np.clip(np.ldexp(0.5, loaded.shift) / scale, 0, 1 << 23)
            near = np.rint(rng.integers(-400, 400, LANES) * half) + rng.integers(-1, 2, LANES)
            any_ = rng.integers(-(1 << 31), 1 << 31, LANES)
            chosen = np.where(rng.random(LANES) < 0.8, near.astype(np.int64), any_)
            self.vector = (chosen - loaded.bias).astype(np.uint32).view(np.int32)
            self.acc.value = pack(self.vector)
        self.i_valid.value = self.vector is not None

    def sample(self) -> None:
        if not self.enabled:
            self.coverage["held a result"] += int(self.o_valid.value)
            return
        if self.o_valid.value:
            actual = int(self.o.value).to_bytes(LANES, "little")
            expected = self.expected.popleft().tobytes()
            assert actual == expected, (
                f"vector {self.compared}: {actual.hex(' ')}, not {expected.hex(' ')}"
            )
            self.compared += 1
        if self.vector is not None:
            assert self.loaded is not None
            p = self.loaded
            out = requantise(
                self.vector,
                p.bias,
                p.multiplier,
                p.shift,
                zero=p.zero,
                low=p.low,
                high=p.high,
            )
            self.expected.append(out)
            total = (self.vector.astype(np.int64) + p.bias).astype(np.uint32).view(np.int32)
            exact = np.ldexp(total.astype(np.float64) * p.multiplier, -p.shift)
            ties = (exact % 1 == 0.5) & (out > p.low) & (out < p.high)
            self.coverage["tie"] += int(ties.sum())
            self.coverage["low"] += int((exact + p.zero < p.low).sum())
            self.coverage["high"] += int((exact + p.zero > p.high).sum())
            self.coverage["new parameters with a vector"] += self.new is not None
        if self.new is not None:
            self.loaded = self.new


@cocotb.test()
async def requantise_random(dut: Handle) -> None:
    """Compares every vector's result; results come in order, and nothing else comes."""
    bench = await Bench.started(dut)
    block = Requantiser(bench)
    await bench.run(block, until=lambda: block.compared == VECTORS)
    names = ("held a result", "tie", "low", "high", "new parameters with a vector")
    assert all(block.coverage[name] > 50 for name in names), block.coverage
