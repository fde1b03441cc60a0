"""Operators that move elements."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from systole.sw.frontend.passes.evaluate import evaluate
from systole.sw.frontend.passes.lower import GraphBuilder
from systole.sw.frontend.passes.operators.interpolate import linear
from systole.sw.frontend.passes.operators.registry import MICROSOFT, operator
from systole.sw.frontend.passes.values import (
    Const,
    Dequantised,
    Node,
    Pending,
    QuantConst,
    Quantised,
    Value,
)
from systole.sw.ir.graph import ModelError


@operator("Slice", "Gather", "Expand", "Tile")
@operator("DepthToSpace", "SpaceToDepth")
def move(state: GraphBuilder, node: Node) -> Value:
    """Along any axis, where elements move in a regular order (up to 64 phases, 256 picks; between
    images of up to 4096 channels together), and of constants quantised per tensor; other operands
    constant."""
    return _moved(state, node, [0])[0]


@operator("Split")
def split(state: GraphBuilder, node: Node) -> tuple[Value, ...]:
    """Along any axis; constant sizes."""
    return tuple(_moved(state, node, [0]))


@operator("Concat")
def concat(state: GraphBuilder, node: Node) -> Value:
    """Of activations, and constants quantised per tensor, of any scales if dequantised; along any
    axis. It may cost nothing, as may Split and Slice: where convolutions, or pools in front of
    these, can read the parts."""
    return _moved(state, node, range(len(node.raw.inputs)))[0]


@operator("Resize", "Upsample")
def resize(state: GraphBuilder, node: Node) -> Value:
    """``mode`` nearest or linear, constant scales or sizes, any rounding and coordinates but
    ``tf_crop_and_resize``: factors of whole numbers, and others where the result repeats itself
    regularly; linear along rows and columns, without ``antialias``."""
    mode = node.string("mode", "nearest")
    if mode == "linear":
        value = state.operand(node, 0)
        if not isinstance(value, Quantised):
            return linear(state, node, state.activation(node, 0))
        quant = state.known_quant(node, value)
        x = Dequantised(value.tensor, value.view, quant.scale)
        return state.quantise(node, linear(state, node, x), quant)
    if mode != "nearest":
        raise node.fail(f"mode = {mode!r}: it must be 'nearest' or 'linear'")
    if node.string("coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize":
        raise node.fail("coordinate_transformation_mode = 'tf_crop_and_resize'")
    return _moved(state, node, [0])[0]


@operator("Pad")
def pad(state: GraphBuilder, node: Node) -> Value:
    """Any axis; mode constant: zero, or another constant (in space only of up to 64
    rows and columns); the other modes where elements move in a regular order; negative pads."""
    value = state.operand(node, 0)
    if node.string("mode", "constant") != "constant":
        return _moved(state, node, [0])[0]
    fill = _pad_value(node, state.operand(node, 2))
    if isinstance(value, Quantised):
        quant = state.known_quant(node, value)
        fill = (fill - quant.zero - (128 if quant.unsigned else 0)) * float(quant.scale)
    return _moved(state, node, [0], fill)[0]


def _pad_value(node: Node, given: Value | None) -> float:
    """The number to pad with."""
    if given is None:
        return node.float("value", 0.0)
    if isinstance(given, Const) and given.array.size == 1:
        return float(given.array.reshape(()))
    if isinstance(given, QuantConst) and given.array.size == given.scale.size == 1:
        return float((given.array.reshape(-1) - given.zero.astype(np.float32))[0] * given.scale[0])
    raise node.fail("its constant must be one constant number")


def _moved(
    state: GraphBuilder, node: Node, moving: Iterable[int], fill: float = 0.0
) -> list[Pending | Dequantised | Quantised]:
    """The node's results; ``moving`` are the inputs whose elements it moves, the others
    constants."""
    parts, quant = [], None
    moving = list(moving)
    for i in moving:
        value = state.operand(node, i)
        if not isinstance(value, Quantised):
            value = state.activation(node, i)
        elif quant not in (None, state.known_quant(node, value)):
            raise node.fail("its int8 or uint8 operands differ in scale or zero point")
        else:
            quant = state.known_quant(node, value)
            value = Dequantised(value.tensor, value.view, quant.scale)
        parts.append(value)
    pending = arrange(state, node, parts, moving, fill)
    if quant is None:
        return pending
    names = [output.name or "" for output in node.raw.outputs]
    return [
        state.quantise(node.making(name), p, quant) for name, p in zip(names, pending, strict=True)
    ]


def arrange(
    state: GraphBuilder, node: Node, parts: list[Dequantised], moving: list[int], fill: float = 0.0
) -> list[Pending | Dequantised]:
    """The results of ``node``, whose inputs ``moving`` stand for ``parts``, and ``fill`` for what
    is none of their elements. Of one constant alone constants. Parts stored in an order that
    cannot be moved at once are brought to the usual one first."""
    try:
        return _arranged(state, node, parts, moving, fill)
    except ModelError:
        plain = [state.plain(node, part) for part in parts]
        if all(a.tensor == b.tensor for a, b in zip(plain, parts, strict=True)):
            raise
        return _arranged(state, node, plain, moving, fill)


def _arranged(
    state: GraphBuilder, node: Node, parts: list[Dequantised], moving: list[int], fill: float
) -> list[Pending | Dequantised]:
    """As ``arrange``: the node runs on positions."""
    others = [p for p in parts if p.tensor not in state.constants]
    for part in parts:
        if others and part.tensor in state.constants:
            state.positions(others[0])
            state.lay_alike(part, others[0])
    kind = np.int32 if node.op_type in ("Resize", "Upsample") else np.float64
    arrays: list[np.ndarray | None] = [None] * len(node.raw.inputs)
    start = 0
    for i, part in zip(moving, parts, strict=True):
        arrays[i] = (state.positions(part) + start).astype(kind)
        start += math.prod(state.tensors[part.tensor].shape)
    for i in set(range(len(arrays))) - set(moving):
        arrays[i] = state.const(node, i, f"operand {i}")
    changes = {}
    if node.op_type == "Pad":
        if len(arrays) > 1:
            arrays[2:3] = [np.array(-1, kind)]
        else:
            changes["value"] = -1.0
    if node.op_type == "QLinearConcat":
        arrays, changes = [arrays[i] for i in moving], {"op_type": "Concat", "domain": ""}
    made = [a.astype(np.int32) for a in evaluate(node, arrays, state.opsets, **changes)]
    if not others and len(parts) == 1 and all((index >= 0).all() for index in made):
        return [state.chosen(node, parts[0].tensor, index) for index in made]
    return [state.moved(node, parts, index, fill) for index in made]


@operator("QLinearConcat", domain=MICROSOFT)
def qlinear_concat(state: GraphBuilder, node: Node) -> Value:
    """As Concat."""
    moving = list(range(2, len(node.raw.inputs), 3))
    parts = [
        state.dequantise(node, state.operand(node, i), state.quant(node, i + 1)) for i in moving
    ]
    return state.quantise(node, arrange(state, node, parts, moving)[0], state.quant(node, 0))
