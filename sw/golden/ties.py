"""Ties: where float32 may round the golden model's results either way.

A real number halfway between two steps is a tie. The golden model decides it exactly; what computes
in float32 (onnxruntime's QLinearAdd, and every operator that it cannot fuse) comes close to the tie
on either side. So do constants that the accelerator has in whole units. Two right results may be
one step apart, and this module says where: it computes the real number in float64, with a bound on
what float32 and such constants may add or take away, and rounds both ends.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from systole.isa import numerics
from systole.sw.golden.model import (
    accumulate,
    add_pick,
    channel_scales,
    counted,
    evaluate,
    own_zero,
    pool_scales,
    products,
    spread,
    window_taps,
)
from systole.sw.ir.graph import (
    Activation,
    Binary,
    Conv,
    ConvTranspose,
    Graph,
    MatMul,
    Normalise,
    Op,
    Pool,
    Select,
    Softmax,
    Table,
    Transpose,
)

UNIT = 2.0**-24
"""Largest relative error of one float32 operation."""
CONVERSIONS = 4
"""Operations on the way of each term beside its product and sum: a dequantised operand, a
dequantised factor, the division by the result's scale, and that scale's own rounding."""
ROW_NOISE = 2 * UNIT
"""The same of row operations, whose own arithmetic is about as fine as float32."""
MOST_NOISE = 2.0**-6
"""Steps that count as float32's error at most: bounds for long sums are far above what happens."""
WHOLE = 1e-9
"""Steps by which float64 may be off a whole number."""

Steps = Callable[[str], np.ndarray]
"""A tensor's int8 (N, C, H, W) less its zero point, float64, by the tensor's name."""


class Ends(NamedTuple):
    """The lowest and the highest of the results that are right, element by element: int8 (N, C, H,
    W)."""

    low: np.ndarray
    high: np.ndarray

    def contain(self, array: np.ndarray) -> np.ndarray:
        """Whether each element of ``array`` is one of them."""
        return (self.low <= array) & (array <= self.high)


def near(op: Op, graph: Graph, tensors: Mapping[str, np.ndarray]) -> dict[str, Ends]:
    """The results that float32 may round to, for each tensor that ``op`` computes from
    ``tensors``. Empty for an operator that computes no sums or products."""
    if _real(op, graph, tensors) is None:
        return {}
    return between(op, graph, {name: Ends(tensors[name], tensors[name]) for name in op.inputs})


def between(
    op: Op, graph: Graph, operands: Mapping[str, Ends], added: Collection[str] = ()
) -> dict[str, Ends]:
    """The results of ``op`` for ``operands`` between two ends, by tensor. Those of tensors that are
    ``added`` to the model, which does not round them to int8, reach to the steps on both sides.
    Empty where it is not known: of a convolution or a product of operands with two ends."""
    if isinstance(op, Table):
        found = _looked_up(operands[op.x], op.values)
        return {op.output: Ends(*(np.clip(end, op.low, op.high) for end in found))}
    real = _real_ends(op, graph, operands)
    if real is None:
        return _of_both(op, graph, operands)
    activation: Activation | None = getattr(op, "activation", None)
    results: dict[str, Ends] = {}
    if isinstance(op, Conv) and op.residual is not None:
        mid = op.residual
        middle = _rounded(
            real,
            zero=mid.mid_zero,
            low=mid.mid_low,
            high=mid.mid_high,
            outwards=mid.mid_name in added,
        )
        results[mid.mid_name] = middle
        zero = graph.tensors[mid.other].zero
        low, high = (
            _total([_steps(mine, mid.mid_zero) * mid.conv_ratio, _steps(x, zero) * mid.other_ratio])
            for mine, x in zip(middle, operands[mid.other], strict=True)
        )
        real = _RealEnds(low.low, high.high, np.maximum(low.noise, high.noise))
    name = activation.mid_name if activation else op.output
    own = _rounded(
        real,
        zero=own_zero(op, activation, graph),
        low=op.low,
        high=op.high,
        outwards=name in added,
    )
    results[name] = own
    if activation is not None:
        results[op.output] = _looked_up(own, activation.values)
    return results


def _looked_up(x: Ends, values: np.ndarray) -> Ends:
    """A table's results for all numbers between the ends."""
    found = [numerics.lookup(x.low, values)]
    for step in range(1, int((x.high.astype(np.int16) - x.low).max(initial=0)) + 1):
        found.append(numerics.lookup(np.minimum(x.low.astype(np.int16) + step, x.high), values))
    return Ends(np.min(found, axis=0), np.max(found, axis=0))


def _of_both(op: Op, graph: Graph, operands: Mapping[str, Ends]) -> dict[str, Ends]:
    """The results of an operator that only chooses among its operands' elements."""
    if not isinstance(op, Transpose | Pool):
        return {}
    ends = [evaluate(op, graph, {name: operands[name][i] for name in op.inputs}) for i in (0, 1)]
    return {op.output: Ends(*(end[op.output] for end in ends))}


class _RealEnds(NamedTuple):
    """The lowest and highest results in steps above the zero point, before they are rounded, and
    the bound on the errors of float32 and of constants in whole units."""

    low: np.ndarray
    high: np.ndarray
    noise: np.ndarray

    @staticmethod
    def of(real: np.ndarray, bound: np.ndarray) -> _RealEnds:
        """Those of one exact result, of which float32 is at most ``bound`` off."""
        return _RealEnds(real, real, np.minimum(bound, MOST_NOISE))


def _real_ends(op: Op, graph: Graph, operands: Mapping[str, Ends]) -> _RealEnds | None:
    """The ends of an operator's results in front of a residual addition; None where they are not
    known."""
    residual = op.residual if isinstance(op, Conv) else None
    names = [name for name in op.inputs if residual is None or name != residual.other]
    wide = {name for name in names if operands[name].low is not operands[name].high}
    choices = [dict(zip(names, arrays, strict=True)) for arrays in _choices(op, names, operands)]
    if not wide:
        choices = choices[:1]
    elif isinstance(op, Select):
        if any(p.weight < 0 and p.x in wide for picks in op.phases for p in picks):
            return None
    elif not isinstance(op, Binary | Pool):
        return None
    found = [_real(op, graph, tensors) for tensors in choices]
    known = [ends for ends in found if ends is not None]
    if not known:
        return None
    lows, highs, noises = zip(*known, strict=True)
    return _RealEnds(np.min(lows, axis=0), np.max(highs, axis=0), np.max(noises, axis=0))


def _choices(
    op: Op, names: list[str], operands: Mapping[str, Ends]
) -> Iterator[tuple[np.ndarray, ...]]:
    """Ends of the operands that the ends of the result come from."""
    if isinstance(op, Binary) and op.kind != "add":
        return itertools.product(*(operands[name] for name in names))
    return zip(*(operands[name] for name in names), strict=True)


def _rounded(real: _RealEnds, *, zero: int, low: int, high: int, outwards: bool) -> Ends:
    """Both ends rounded and clamped: to the nearest steps, or ``outwards`` to the next, but for
    those that are whole."""
    ends = (real.low - real.noise, real.high + real.noise)
    steps = [np.rint(end) for end in ends]
    if outwards:
        for i, (own, to_step) in enumerate(((real.low, np.floor), (real.high, np.ceil))):
            whole = np.abs(own - np.rint(own)) < WHOLE
            steps[i] = np.where(whole, np.rint(own), to_step(ends[i]))
    return Ends(*(np.clip(step + zero, low, high).astype(np.int8) for step in steps))


def _steps(array: np.ndarray, zero: int) -> np.ndarray:
    return array.astype(np.float64) - zero


def _total(terms: list[np.ndarray]) -> _RealEnds:
    """The sum of a few terms."""
    bound = (len(terms) + CONVERSIONS) * UNIT
    magnitude: np.ndarray = sum((np.abs(t) for t in terms), np.zeros(()))
    return _RealEnds.of(sum(terms, np.zeros(())), bound * magnitude)


def _real(op: Op, graph: Graph, tensors: Mapping[str, np.ndarray]) -> _RealEnds | None:
    """The ends of an operator's results for these operands, in front of a residual addition; None
    of an operator without sums or products."""

    def steps(name: str) -> np.ndarray:
        return _steps(tensors[name], graph.tensors[name].zero)

    if isinstance(op, Binary):
        a, b = steps(op.a), steps(op.b)
        if op.kind == "mul":
            return _total([a * b * op.a_ratio])
        sign = 1 if op.kind == "add" else -1
        return _total([a * op.a_ratio, sign * b * op.b_ratio])
    if isinstance(op, Softmax):
        return _share(op, tensors)
    if isinstance(op, Normalise):
        return _normal(op, steps(op.x))
    shape, zero = graph.tensors[op.output].shape, graph.tensors[op.output].zero
    if isinstance(op, Conv | ConvTranspose | MatMul | Select) or (
        isinstance(op, Pool) and op.kind == "average"
    ):
        real = _sums(op, shape, steps, zero)
        magnitude = _sums(_magnitudes(op), shape, lambda name: np.abs(steps(name)), zero)
        ends = _RealEnds.of(real, (_terms(op) + CONVERSIONS) * UNIT * np.abs(magnitude))
        if isinstance(op, Conv | ConvTranspose) and op.off is not None:
            return ends._replace(noise=ends.noise + (op.off * op.scale)[:, None, None])
        return ends
    return None


def _share(op: Softmax, tensors: Mapping[str, np.ndarray]) -> _RealEnds:
    """A Softmax' results; 0 in a row without any that counts."""
    x, inside = tensors[op.x], counted(op, tensors)
    largest = np.where(inside, x, -128).max(axis=1, keepdims=True)
    powers = inside * np.exp((x.astype(np.float64) - largest) * np.float64(op.x_scale))
    total = powers.sum(axis=1, keepdims=True)
    real = powers / np.where(total, total, 1) / np.float64(op.y_scale)
    return _RealEnds.of(real, (x.shape[1] + CONVERSIONS) * ROW_NOISE * real)


def _normal(op: Normalise, x: np.ndarray) -> _RealEnds:
    """A normalisation's results."""
    real = x * np.float64(op.x_scale)
    mean = real.mean(axis=1, keepdims=True) if op.centred else np.zeros(())
    spread_out = np.sqrt(((real - mean) ** 2).mean(axis=1, keepdims=True) + op.epsilon)
    gain, shift = (v[:, None, None] / np.float64(op.y_scale) for v in (op.gain, op.shift))
    magnitude = (np.abs(real) + np.abs(mean)) / spread_out * np.abs(gain) + np.abs(shift)
    bound = (x.shape[1] + CONVERSIONS) * ROW_NOISE * magnitude
    return _RealEnds.of((real - mean) / spread_out * gain + shift, bound)


def _terms(op: Op) -> int:
    """Terms of each sum."""
    if isinstance(op, Conv):
        return math.prod(op.weights.shape[1:]) + 2
    if isinstance(op, ConvTranspose):
        return math.prod(op.weights.shape[1:]) + 1
    if isinstance(op, MatMul):
        return op.depth
    if isinstance(op, Pool):
        return math.prod(op.kernel)
    assert isinstance(op, Select)
    return max(len(picks) for picks in op.phases)


def _magnitudes(op: Op) -> Op:
    """The operator with its factors' magnitudes."""
    if isinstance(op, Conv | ConvTranspose):
        weights = np.abs(op.weights.astype(np.int16))
        return replace(op, weights=weights, bias=np.abs(op.bias.astype(np.int64)))
    if isinstance(op, Select):
        phases = [[replace(p, weight=abs(p.weight)) for p in picks] for picks in op.phases]
        return replace(op, phases=phases)
    return op


def _sums(op: Op, shape: tuple[int, int, int, int], steps: Steps, zero: int) -> np.ndarray:
    """The sums of an operator's products times their scale, float64 of ``shape``. ``zero``: the
    result's zero point."""
    out = np.zeros(shape)
    if isinstance(op, Conv):
        for n, rows, acc in accumulate(op, steps(op.x), 0):
            if op.shortcut:
                other = np.moveaxis(steps(op.shortcut.other)[n, :, rows], 0, -1)
                acc = acc + other * op.shortcut.factors
            out[n, :, rows] = np.moveaxis((acc + op.bias) * op.scale.astype(np.float64), -1, 0)
    elif isinstance(op, ConvTranspose):
        for n, image in enumerate(steps(op.x)):
            acc = np.moveaxis(spread(op, image, shape), 0, -1) + op.bias
            out[n] = np.moveaxis(acc * op.scale.astype(np.float64), -1, 0)
    elif isinstance(op, MatMul):
        sums = products(op, steps(op.a.tensor), steps(op.b.tensor), shape)
        out = sums * np.float64(op.scale)
    elif isinstance(op, Pool):
        for n, image in enumerate(steps(op.x)):
            taps = window_taps(
                image,
                kernel=op.kernel,
                strides=op.strides,
                pads=op.pads,
                dilations=op.dilations,
                zero=0,
                pad=0,
            )
            out[n] = taps.sum(axis=(1, 2), dtype=np.int64) * pool_scales(op).astype(np.float64)
    elif isinstance(op, Select):
        out = _selected(op, shape, steps, op.fill - zero)
    return out


def _selected(op: Select, shape: tuple[int, int, int, int], steps: Steps, fill: int) -> np.ndarray:
    """As :func:`_sums`; channels that take nothing are ``fill`` steps above the zero point."""
    out = np.zeros(shape)
    seen = out.reshape(op.seen(shape))
    for at, picks in enumerate(op.phases):
        part = seen[:, :, at // op.steps[1] :: op.steps[0], at % op.steps[1] :: op.steps[1]]
        total = np.zeros(part.shape, np.int64)
        for pick in picks:
            source = steps(pick.x)
            add_pick(total, pick, source.reshape(op.seen(source.shape)), 0)
        scales = channel_scales(op, picks, part.shape[1]).astype(np.float64)
        part[:] = np.where(scales > 0, np.moveaxis(total, 1, -1) * scales, fill).transpose(
            0, 3, 1, 2
        )
    return out
