"""Ties: where float32 may round the golden model's results either way.

A real number halfway between two steps is a tie. The golden model decides it exactly; what computes
in float32 (onnxruntime's QLinearAdd, and every operator that it cannot fuse) comes close to the tie
on either side. So two right results may be one step apart, and this module says where: it computes
the real number in float64, with a bound on what float32 may add or take away, and rounds both ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from systole.isa import numerics
from systole.sw.golden.model import (
    accumulate,
    add_pick,
    channel_scales,
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
    Op,
    Pool,
    Select,
)

UNIT = 2.0**-24
"""Largest relative error of one float32 operation."""
CONVERSIONS = 4
"""Operations on the way of each term beside its product and sum: a dequantised operand, a
dequantised factor, the division by the result's scale, and that scale's own rounding."""
MOST_NOISE = 2.0**-6
"""Steps that count as float32's error at most: bounds for long sums are far above what happens."""

Steps = Callable[[str], np.ndarray]
"""A tensor's int8 (N, C, H, W) less its zero point, float64, by the tensor's name."""


def near(op: Op, graph: Graph, tensors: Mapping[str, np.ndarray]) -> dict[str, list[np.ndarray]]:
    """Every result that float32 may round to, int8 (N, C, H, W), for each tensor that ``op``
    computes from ``tensors``. Empty for an operator that computes no sums or products."""
    found = _real(op, graph, tensors)
    if found is None:
        return {}
    real, noise = found
    if not isinstance(op, Conv) or op.residual is None:
        activation: Activation | None = getattr(op, "activation", None)
        zero = own_zero(op, activation, graph)
        own = _rounded(real, noise, zero=zero, low=op.low, high=op.high)
        return _activated(op, activation, own)
    residual = op.residual
    middles = _rounded(
        *(real, noise), zero=residual.mid_zero, low=residual.mid_low, high=residual.mid_high
    )
    other = tensors[residual.other].astype(np.float64) - graph.tensors[residual.other].zero
    zero, own = own_zero(op, op.activation, graph), []
    for middle in middles:
        terms = (middle.astype(np.float64) - residual.mid_zero) * residual.conv_ratio
        real, noise = _total([terms, other * residual.other_ratio])
        own += _rounded(real, noise, zero=zero, low=op.low, high=op.high)
    return {residual.mid_name: middles} | _activated(op, op.activation, own)


def _activated(
    op: Op, activation: Activation | None, own: list[np.ndarray]
) -> dict[str, list[np.ndarray]]:
    if activation is None:
        return {op.output: own}
    after = [numerics.lookup(array, activation.values) for array in own]
    return {activation.mid_name: own, op.output: after}


def _rounded(
    real: np.ndarray, noise: np.ndarray, *, zero: int, low: int, high: int
) -> list[np.ndarray]:
    """Both ends of ``real`` +- ``noise``, rounded and clamped."""
    noise = np.minimum(noise, MOST_NOISE)
    ends = (real - noise, real + noise)
    return [np.clip(np.rint(end) + zero, low, high).astype(np.int8) for end in ends]


def _total(terms: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The sum of a few terms, and the bound on its error."""
    bound = (len(terms) + CONVERSIONS) * UNIT
    magnitude: np.ndarray = sum((np.abs(t) for t in terms), np.zeros(()))
    return sum(terms, np.zeros(())), bound * magnitude


def _real(
    op: Op, graph: Graph, tensors: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray] | None:
    """The real result in steps above its zero point, in front of a residual addition, and the bound
    on float32's error; None for an operator without sums or products."""

    def steps(name: str) -> np.ndarray:
        return tensors[name].astype(np.float64) - graph.tensors[name].zero

    if isinstance(op, Binary):
        a, b = steps(op.a), steps(op.b)
        if op.kind == "mul":
            return _total([a * b * op.a_ratio])
        sign = 1 if op.kind == "add" else -1
        return _total([a * op.a_ratio, sign * b * op.b_ratio])
    shape, zero = graph.tensors[op.output].shape, graph.tensors[op.output].zero
    if isinstance(op, Conv | ConvTranspose | MatMul | Select) or (
        isinstance(op, Pool) and op.kind == "average"
    ):
        real = _sums(op, shape, steps, zero)
        magnitude = _sums(_magnitudes(op), shape, lambda name: np.abs(steps(name)), zero)
        return real, (_terms(op) + CONVERSIONS) * UNIT * np.abs(magnitude)
    return None


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
