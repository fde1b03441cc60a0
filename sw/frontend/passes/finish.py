"""The last step of lowering an operator: the scales that its quantised result gives it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from systole.sw.frontend.passes import moves
from systole.sw.frontend.passes.layout import Shape
from systole.sw.frontend.passes.values import Affine, Function, Node, Pending, Quant
from systole.sw.ir.graph import (
    Binary,
    Normalise,
    Op,
    Pick,
    Pool,
    Select,
    Softmax,
    Table,
    normalisation,
)

LEAST_SHARE = 2.0**-24
"""The smallest scale of a Softmax' result."""

Scale = TypeVar("Scale", np.ndarray, np.float32)


def checked(node: Node, scale: Scale) -> Scale:
    """``scale``, a requantisation's. Raises :class:`~sw.ir.graph.ModelError` if the hardware cannot
    hold it."""
    if not (np.isfinite(scale).all() and (scale > 0).all() and (scale < 2.0**24).all()):
        raise node.fail(f"requantisation scale {np.min(scale)}..{np.max(scale)} is outside 0..2^24")
    return scale


def scaled_binary(node: Node, op: Binary, quant: Quant) -> Binary:
    """``op`` with its operands' scales as ratios to the result's."""
    ratios = [np.float32(r) / quant.scale for r in (op.a_ratio, op.b_ratio)]
    if op.kind == "mul":
        ratios[1] = np.float32(1)
    if not all(2.0**-22 <= r < 2.0**22 for r in ratios):
        raise node.fail(f"scale ratios {ratios[0]}, {ratios[1]} outside 2^-22..2^22")
    return replace(op, a_ratio=float(ratios[0]), b_ratio=float(ratios[1]))


def scaled_row(node: Node, op: Softmax | Normalise, quant: Quant) -> Softmax | Normalise:
    """``op`` with the scale of its result."""
    scaled = replace(op, y_scale=quant.scale)
    if isinstance(scaled, Normalise):
        try:
            normalisation(scaled)
        except ValueError as e:
            raise node.fail(str(e)) from None
    elif not LEAST_SHARE <= quant.scale <= 1:
        raise node.fail(f"result's scale {quant.scale}: it must be in {LEAST_SHARE}..1")
    return scaled


def marked(value: Pending, op: Select, quant: Quant) -> Select:
    """``op``, the Select of ``value``, with the picks of its marks in the result's scale; their
    weights bring the zero point to the result's fill."""
    if value.marks is None:
        return op
    weight = -abs(quant.value(value.fill) - quant.zero)
    phases = [
        [
            replace(p, scale=float(quant.scale), weight=weight) if p.x == value.marks else p
            for p in picks
        ]
        for picks in op.phases
    ]
    return replace(op, phases=phases)


def scaled_select(node: Node, op: Select, fill: float, quant: Quant) -> Select:
    """``op`` with its operands' scales as ratios to the result's, and the real number ``fill``
    quantised."""
    phases = [
        [replace(p, scale=float(checked(node, np.float32(p.scale) / quant.scale))) for p in picks]
        for picks in op.phases
    ]
    return replace(op, phases=phases, fill=quant.value(fill))


def of_mixed_scales(picks: Sequence[Pick]) -> set[str]:
    """The tensors of picks that share a channel with a pick of another scale."""
    out: set[str] = set()
    for i, a in enumerate(picks):
        for b in picks[:i]:
            if a.scale != b.scale and ((a.channels >= 0) & (b.channels >= 0)).any():
                out |= {a.x, b.x}
    return out


def unscaled(value: Pending, quant: Quant) -> Op | None:
    """The operator with a result of the quantisation of its operands, ``quant``, if it can have
    it: one that chooses among their elements and does not clamp them."""
    op = value.op
    if (value.low, value.high) != (-math.inf, math.inf):
        return None
    if isinstance(op, Select):
        op = marked(value, op, quant)
        if any(p.scale != quant.scale for ps in op.phases for p in ps):
            return None
        phases = [[replace(p, scale=1.0) for p in picks] for picks in op.phases]
        return replace(op, phases=phases, fill=quant.value(value.fill))
    if isinstance(op, Pool) and op.kind == "max" and op.scale == quant.scale:
        return replace(op, scale=np.float32(1))
    return None


def in_units(x: Affine, gain: np.ndarray, quant: Quant) -> tuple[np.ndarray, np.ndarray]:
    """Gain and shift of a stored element's difference from zero, in units of the result."""
    return gain * np.float64(x.scale) / quant.scale, x.shift / np.float64(quant.scale)


def table(node: Node, f: Function, shape: Shape, quant: Quant) -> Pending:
    """A Table of the function's 256 results, quantised."""
    # What is not a number becomes the lowest value, as in onnxruntime.
    with np.errstate(over="ignore"):  # infinite saturates as well
        real = np.nan_to_num(f.values.astype(np.float32), nan=-np.inf) / quant.scale
    values = np.clip(np.rint(real) + np.float32(quant.zero), -128, 127).astype(np.int8)
    op = Table(**node.fields("+".join(f.op_types)), x=f.tensor, values=values)
    return Pending(op, shape, f.view)


def whole(node: Node, name: str, shape: Shape, scale: float) -> Select:
    """A Select that moves nothing."""
    return Select(**node.fields(), phases=[[moves.identity(name, shape, scale)]])


def clamp(op: Select) -> Pool:
    """A maximum of one element in the place of a Select that moves nothing."""
    return Pool(
        name=op.name,
        op_type=op.op_type,
        output="",
        low=-128,
        high=127,
        x=op.inputs[0],
        kind="max",
        kernel=(1, 1),
        strides=(1, 1),
        pads=(0, 0, 0, 0),
    )
