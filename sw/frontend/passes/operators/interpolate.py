"""Linear interpolation, as sums of weighted picks."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from systole.isa.commands import COMMANDS, Opcode
from systole.sw.frontend.passes import finish, moves
from systole.sw.frontend.passes.evaluate import evaluate
from systole.sw.frontend.passes.layout import OnnxView
from systole.sw.frontend.passes.state import LoweringState
from systole.sw.frontend.passes.values import Dequantised, Node, Pending
from systole.sw.ir.graph import Pick, Select

MOST = 254
"""Largest weight: two int8 kernels."""
MAX_STEP = COMMANDS[Opcode.POST].high("out_step")
"""Phases along one axis."""


@dataclass(frozen=True)
class Axis:
    """Output y of phase ``y % len(phases)`` is the sum of weight / denominator * input (y //
    len(phases) * stride + offset) over the phase's (offset, weight)."""

    size: int
    out: int
    stride: int
    phases: list[list[tuple[int, int]]]
    denominator: int

    def taps(self, y: int) -> list[tuple[int, int]]:
        """Input position, not clamped to the input, and weight."""
        i, phase = divmod(y, len(self.phases))
        return [(i * self.stride + offset, weight) for offset, weight in self.phases[phase]]

    def reach(self) -> tuple[int, int]:
        """Positions needed in front of the input and behind it."""
        places = [place for y in range(self.out) for place, _ in self.taps(y)]
        return max(-min(places), 0), max(max(places) - self.size + 1, 0)

    def matrix(self) -> np.ndarray:
        """(out, size), edges repeated."""
        out = np.zeros((self.out, self.size))
        for y in range(self.out):
            for place, weight in self.taps(y):
                out[y, min(max(place, 0), self.size - 1)] += weight / self.denominator
        return out


def _axis(node: Node, size: int, out: int, scale: Fraction, usual: str) -> Axis:
    """One axis of the node's interpolation, from ``size`` to ``out`` positions; ``usual`` is the
    coordinate mode if the node gives none."""
    mode = node.string("coordinate_transformation_mode", usual)
    step, first = 1 / scale, Fraction(0)
    if mode == "align_corners":
        step = Fraction(size - 1, max(out - 1, 1))
    elif mode in ("half_pixel", "pytorch_half_pixel", "half_pixel_symmetric"):
        first = (step - 1) / 2
        if mode == "half_pixel_symmetric":
            first += Fraction(size, 2) * (1 - out / (scale * size))
        elif mode == "pytorch_half_pixel" and out == 1:
            first = Fraction(0)
    elif mode != "asymmetric":
        raise node.fail(
            f"coordinate_transformation_mode = {mode!r}: it must be asymmetric, align_corners, "
            "half_pixel, half_pixel_symmetric or pytorch_half_pixel"
        )
    if out == 1:
        step = Fraction(1)
    if size == 1:  # one element, repeated like an edge
        step, first = Fraction(1), Fraction(0)
    count = min(step.denominator, out)
    places = [first + step * y for y in range(count)]
    common = math.lcm(*(place.denominator for place in places))
    phases = []
    for place in places:
        whole = math.floor(place)
        part = int((place - whole) * common)
        phases.append([(o, w) for o, w in ((whole, common - part), (whole + 1, part)) if w])
    if count == out:  # every output has its own phase
        phases = [_at_edges(taps, size) for taps in phases]
    stride = step.numerator if count == step.denominator else 1
    return Axis(size, out, stride, phases, common)


def _at_edges(taps: list[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """Taps with those outside of ``size`` positions on the first or the last."""
    out: Counter[int] = Counter()
    for place, weight in taps:
        out[min(max(place, 0), size - 1)] += weight
    return list(out.items())


def _scales(
    state: LoweringState, node: Node, shape: tuple[int, ...], out: tuple[int, ...]
) -> list[Fraction]:
    """The scale of every dimension, by which it grows from ``shape`` to ``out``."""
    old = node.input_count < 3  # Upsample, Resize of opset 10
    given = state.results.const(node, 1 if old else 2, "scales")
    axes = node.integers("axes", tuple(range(len(shape))))
    scales = [Fraction(o, s) for o, s in zip(out, shape, strict=True)]
    if given is not None and given.size:
        for axis, value in zip(axes, given.reshape(-1), strict=True):
            scales[axis] = Fraction(float(value)).limit_denominator(1 << 10)
    return scales


def linear(state: LoweringState, node: Node, x: Dequantised) -> Pending:
    """The node as an interpolation of ``x``, an image (N, C, H, W) or (N, C, W)."""
    for name in ("antialias", "exclude_outside"):
        if node.integer(name, 0):
            raise node.fail(f"{name} = 1: it must be 0 with mode = 'linear'")
    shape = x.view.shape
    x, (n, c, *image) = state.mover.image(node, x)
    operands = [state.results.const(node, i, "operand") for i in range(1, node.input_count)]
    sample = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    (wanted,) = evaluate(node, [sample, *operands], state.opsets)
    if wanted.ndim != len(shape) or wanted.shape[:2] != shape[:2]:
        raise node.fail(
            f"resizes {list(shape)} to {list(wanted.shape)}: only rows and columns can be resized"
        )
    scales = _scales(state, node, shape, wanted.shape)[2:]
    usual = "half_pixel" if state.opsets[""] > 10 else "asymmetric"
    axes = [
        _axis(node, size, out, scale, usual)
        for size, out, scale in zip(shape[2:], wanted.shape[2:], scales, strict=True)
    ]
    if len(axes) == 1:
        axes.insert(0, _unchanged(1))
    mine = axes[0].matrix() @ sample.reshape(n, c, *image) @ axes[1].matrix().T
    if np.abs(mine.reshape(wanted.shape) - wanted).max() > 1e-3:
        raise node.fail("onnxruntime computes something else than plain linear interpolation of it")
    if _excess(axes, moves.MAX_PHASES) is not None:
        x, axes = _along_columns(state, node, x, axes)
    return _interpolated(state, node, x, axes, wanted.shape)


def _unchanged(size: int) -> Axis:
    return Axis(size, size, 1, [[(0, 1)]], 1)


def _along_columns(
    state: LoweringState, node: Node, x: Dequantised, axes: list[Axis]
) -> tuple[Dequantised, list[Axis]]:
    """``x`` interpolated along its columns, in its own quantisation, and the ``axes`` that are left
    to do. One rounding more than both at once, which has as many phases as the product of both."""
    rows, columns = axes
    for axis in axes:
        excess = _excess([axis, _unchanged(1)], MAX_STEP)
        if excess is not None:
            what, value, limit = excess
            raise node.fail(f"its interpolation takes {value} {what}; {limit} is the limit")
    if _unchanged(rows.size) == rows or _unchanged(columns.size) == columns:
        return x, axes
    shape = state.tensors.shape(x.tensor)
    quant = replace(state.tensors.quant(x.tensor), scale=x.scale)
    own = [_unchanged(shape[2]), columns]
    wide = _interpolated(state, node, x, own, (*shape[:3], columns.out))
    assert isinstance(wide.op, Select)
    op = finish.scaled_select(node, wide.op, 0.0, quant)
    name = f"{node.output}:along columns"
    state.emitter.emit(op, name, shape=wide.shape, quant=quant)
    return Dequantised(name, wide.view, x.scale), [rows, _unchanged(columns.out)]


def _excess(axes: list[Axis], phases: int) -> tuple[str, int, int] | None:
    """What a Select along ``axes`` has too many of, if it may have so many ``phases``: what, how
    many, and the limit. None if it fits."""
    found = _phases(axes)
    largest = max(weight for taps, _ in found for _, _, weight in taps)
    for what, value, limit in (
        ("phases", len(found), phases),
        ("as largest weight", largest, MOST),
        ("as stride", max(a.stride for a in axes), moves.MAX_STRIDE),
    ):
        if value > limit:
            return what, value, limit
    return None


def _phases(axes: list[Axis]) -> list[tuple[list[tuple[int, int, int]], int]]:
    """The taps of every phase along rows and columns, offsets and weight, and what their weights
    are parts of, in lowest terms."""
    whole = math.prod(a.denominator for a in axes)
    phases = []
    for rows, columns in itertools.product(*(a.phases for a in axes)):
        taps = [(oy, ox, wy * wx) for (oy, wy), (ox, wx) in itertools.product(rows, columns)]
        unit = math.gcd(whole, *(weight for _, _, weight in taps))
        phases.append(([(oy, ox, weight // unit) for oy, ox, weight in taps], whole // unit))
    return phases


def _interpolated(
    state: LoweringState, node: Node, x: Dequantised, axes: list[Axis], shape: tuple[int, ...]
) -> Pending:
    """The Select that interpolates ``x`` along both ``axes``; edges are repeated first where the
    taps reach over them."""
    n, c, *image = state.tensors.shape(x.tensor)
    before = [0, 0]
    if any(any(a.reach()) for a in axes):
        rows, columns = (
            np.clip(np.arange(-first, a.size + last), 0, a.size - 1)
            for a in axes
            for first, last in [a.reach()]
        )
        before = [a.reach()[0] for a in axes]
        index = np.arange(n * c * math.prod(image), dtype=np.int32).reshape(n, c, *image)
        x = state.mover.rearranged(node, x, index[:, :, rows[:, None], columns])
    strides = (axes[0].stride, axes[1].stride)
    phases = [
        [
            Pick(
                x=x.tensor,
                channels=np.arange(c),
                strides=strides,
                offsets=(oy + before[0], ox + before[1]),
                scale=float(np.float32(x.scale) / np.float32(parts)),
                weight=weight,
            )
            for oy, ox, weight in taps
        ]
        for taps, parts in _phases(axes)
    ]
    stored = (n, c, axes[0].out, axes[1].out)
    op = Select(**node.fields(), phases=phases, steps=(len(axes[0].phases), len(axes[1].phases)))
    return Pending(op, stored, OnnxView.contiguous(stored).reshape(shape))
