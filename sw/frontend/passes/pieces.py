"""A function of an operator's result that is not quantised in between: which int8 grids stand for
the result in front of it.

The operator requantises its sums to a grid, and a table of 256 values does the rest. Where one grid
is too coarse, two are taken, for the numbers below and above zero, whose parts are added: of a
function with a kink at zero, such as LeakyRelu, both are exact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from systole.isa.numerics import lookup
from systole.sw.frontend.passes.tensors import TensorTable
from systole.sw.frontend.passes.values import Quant
from systole.sw.ir.graph import Binary, Conv, ConvTranspose, MatMul, Op, Pool

Compute = Callable[[np.ndarray], np.ndarray]
"""A function of real numbers, float32, element by element."""

FINE = 0.5
"""Steps of the result that rounding in front of the function may falsify it by, for one grid."""
COARSE = 1.0
"""The same for two grids: results are off by one step at most."""
EXACT = 1e-4
"""Steps of the result that a function may be off a line."""
POINTS = 4096
"""Numbers at which a function is looked at: on each side of zero, and in each grid."""
BEYOND = 1 + 1e-6
"""A grid's length by that of its numbers: its ends lie behind theirs, however its scale is
rounded."""
OCTAVES = 32
SHARES = np.append(
    [
        2.0**-octave * (1 + np.arange(POINTS // OCTAVES) / (POINTS // OCTAVES)) / 2
        for octave in range(OCTAVES - 1, -1, -1)
    ],
    1.0,
)
"""Shares of a range at which a function is looked at first: dense about zero, and powers of two
times fractions, so that no library's logarithm takes part."""


@dataclass(frozen=True, eq=False)
class GridPiece:
    """A part of a function: the operator's result quantised as ``quant`` and clamped, then looked
    up in ``values``, or taken as it is if None."""

    quant: Quant
    low: int
    high: int
    values: np.ndarray | None
    error: float
    """By how many steps of the result it may be off before that is rounded."""


def pieces_of(compute: Compute, quant: Quant, reach: float) -> list[GridPiece]:
    """The pieces of a function whose result is quantised as ``quant``, of numbers within +-
    ``reach``: one, or those below and above zero, which add up less their value at zero. Empty if
    it takes more."""
    function = _Quantised(compute, quant)
    ends = [function.end(sign * reach) for sign in (-1, 1)]
    linear = [_linear(function, end) for end in ends if end]
    exact = [piece for piece in linear if piece]
    if len(exact) == len(linear) == 1:
        return exact
    if len(exact) == 2 and exact[0].quant == exact[1].quant:
        return [replace(exact[0], low=-128, high=127)]
    whole = _grid(function, *(ends if any(ends) else (-reach, reach)))
    if whole.error <= FINE and len(exact) < len(linear):
        return [whole]
    if len(linear) < 2:
        return [whole] if whole.error < COARSE else []
    parts = [
        own or _grid(function, min(end, 0.0), max(end, 0.0))
        for own, end in zip(linear, ends, strict=True)
    ]
    return parts if max(p.error for p in parts) < COARSE else []


class _Quantised:
    """A function with its result quantised."""

    def __init__(self, compute: Compute, quant: Quant):
        self._compute = compute
        self.quant = quant

    def steps(self, x: np.ndarray) -> np.ndarray:
        """The results in steps, not rounded, within int8."""
        # What is not a number becomes the lowest value, as in onnxruntime.
        with np.errstate(over="ignore"):  # infinite saturates as well
            real = np.nan_to_num(self._compute(x.astype(np.float32)), nan=-np.inf)
            steps = real.astype(np.float64) / self.quant.scale
        return np.clip(steps + self.quant.zero, -128, 127)

    def codes(self, x: np.ndarray) -> np.ndarray:
        return np.rint(self.steps(x)).astype(np.int8)

    def end(self, reach: float) -> float:
        """The number between zero and ``reach`` behind which the result is the same as there."""
        x = np.append(0.0, reach * SHARES)
        last = 0
        for _ in range(3):
            changes = np.flatnonzero(np.diff(self.codes(x)))
            if not len(changes):
                return 0.0
            last = changes[-1]
            x = np.linspace(x[last], x[last + 1], POINTS)
        return float(x[-1])


def _grid(function: _Quantised, low: float, high: float) -> GridPiece:
    """The numbers from ``low`` to ``high``, zero among them, in 254 steps or 255: the outer codes,
    which stand for all numbers behind them, are ends or lie behind these."""
    at_end = 0 in (low, high)
    scale = np.float32((high - low) / (255 if at_end else 254) * BEYOND)
    zero = 127 if high == 0 else int(np.clip(np.ceil(-128 - low / scale), -128, 127))
    steps = function.steps((np.arange(-128, 128) - zero) * np.float64(scale))
    x = np.linspace(low, high, POINTS)
    codes = np.clip(np.rint(x / scale) + zero, -128, 127).astype(np.int8)
    error = np.abs(function.steps(x) - lookup(codes, steps)).max()
    values = np.rint(steps).astype(np.int8)
    return GridPiece(Quant(scale, zero, False), -128, 127, values, float(error))


def _linear(function: _Quantised, end: float) -> GridPiece | None:
    """The numbers between zero and ``end``, if the function goes along a line there, and through a
    whole step at zero: with a grid of its result's steps it is exact."""
    x = np.linspace(0, end, POINTS)
    steps = function.steps(x)
    first = int(np.rint(steps[0]))
    slope = (steps[POINTS // 2] - steps[0]) / x[POINTS // 2]
    line = np.clip(first + slope * x, -128, 127)
    if slope == 0 or np.abs(steps - line).max() > EXACT:
        return None
    zero = first if slope > 0 else -1 - first
    values = np.clip(first + np.sign(slope) * (np.arange(-128, 128) - zero), -128, 127)
    low, high = (zero, 127) if end > 0 else (-128, zero)
    same = slope > 0 and first == function.quant.zero
    table = None if same else values.astype(np.int8)
    scale = function.quant.scale / _plain(abs(slope) * function.quant.scale)
    return GridPiece(Quant(scale, zero, False), low, high, table, 0.0)


def _plain(slope: float) -> np.float32:
    """A measured slope, which is that of few digits next to it if there is one."""
    short = float(f"{slope:.6g}")
    return np.float32(short if abs(short - slope) <= 1e-6 * slope else slope)


def reach_of(op: Op, tensors: TensorTable) -> float:
    """The largest magnitude that the real result of ``op``, its scale taken as 1, may have."""

    def codes(name: str) -> int:
        zero = tensors.quant(name).zero
        return max(zero + 128, 127 - zero)

    if isinstance(op, Conv | ConvTranspose):
        sums = np.abs(op.weights.astype(np.float64)).sum(axis=(1, 2, 3)) * codes(op.x)
        sums += np.abs(op.bias.astype(np.float64))
        if isinstance(op, Conv) and op.shortcut is not None:
            sums += op.shortcut.factors * float(codes(op.shortcut.other))
        return float((sums * op.scale).max())
    if isinstance(op, MatMul):
        return op.depth * codes(op.a.tensor) * codes(op.b.tensor) * float(op.scale)
    if isinstance(op, Binary) and op.kind == "mul":
        return codes(op.a) * codes(op.b) * op.a_ratio
    if isinstance(op, Binary):
        return codes(op.a) * op.a_ratio + codes(op.b) * op.b_ratio
    assert isinstance(op, Pool), f"{op.op_type} chooses: it is quantised in front of the function"
    return codes(op.x) * float(op.scale)
