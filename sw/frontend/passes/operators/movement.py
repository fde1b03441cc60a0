"""Operators that move elements."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from systole.sw.frontend.passes.evaluate import evaluate
from systole.sw.frontend.passes.layout import LayoutError
from systole.sw.frontend.passes.operators.interpolate import linear
from systole.sw.frontend.passes.operators.registry import MICROSOFT, operator
from systole.sw.frontend.passes.state import LoweringState
from systole.sw.frontend.passes.values import (
    Const,
    Dequantised,
    Node,
    Quant,
    QuantConst,
    Quantised,
    Value,
)
from systole.sw.ir.graph import ModelError


@operator("Slice", "Gather", "Expand", "Tile")
@operator("DepthToSpace", "SpaceToDepth")
def move(state: LoweringState, node: Node) -> Value:
    """Moves elements of a dequantised, int8 or uint8 activation, or of a constant quantised per
    tensor, along any axes. The other operands are constant.
    The elements must move in a regular order: the result has at most 64 interleaved phases, and
    consists of at most 256 strided copies. Where rows and columns move independently, or only one
    of them, at most 1024 may move in any order. Where elements move between images, these have at
    most 4096 channels together.
    An Expand or Tile that repeats axes of size 1 in front of an Add, Sub or Mul of two activations
    moves nothing."""
    return _moved(state, node, [0])[0]


@operator("Split")
def split(state: LoweringState, node: Node) -> tuple[Value, ...]:
    """Splits a dequantised, int8 or uint8 activation along any axis. The sizes are constant.
    It costs no pass over memory where convolutions, or pools in front of these, can read the
    parts."""
    return tuple(_moved(state, node, [0]))


@operator("Concat")
def concat(state: LoweringState, node: Node) -> Value:
    """Concatenates activations, and constants quantised per tensor, along any axis.
    Dequantised operands may have any scales. int8 and uint8 operands have the same scale and zero
    point.
    It costs no pass over memory where convolutions, or pools in front of these, can read the
    parts."""
    return _moved(state, node, range(node.input_count))[0]


@operator("Resize", "Upsample")
def resize(state: LoweringState, node: Node) -> Value:
    """Takes a dequantised, int8 or uint8 activation. The scales or sizes are constant.
    ``mode`` is nearest or linear. ``coordinate_transformation_mode`` is not tf_crop_and_resize.
    In mode nearest, elements must move as those of a Slice: the result has any number of rows and
    columns up to 1024, or factors that are whole numbers; from one row and column in front of an
    Add, Sub or Mul of two activations nothing moves.
    In mode linear, only rows and columns are resized, ``antialias`` and ``exclude_outside`` are 0,
    and the interpolation takes at most 64 phases and weights of 254. One that takes more is done
    along columns and then along rows, rounded after each; either takes at most 255 phases."""
    mode = node.string("mode", "nearest")
    if mode == "linear":
        value = state.results.operand(node, 0)
        if not isinstance(value, Quantised):
            return linear(state, node, state.operands.activation(node, 0))
        quant = state.tensors.known_quant(node, value.tensor)
        x = Dequantised(value.tensor, value.view, quant.scale)
        return state.quantiser.quantise(node, linear(state, node, x), quant)
    if mode != "nearest":
        raise node.fail(f"mode = {mode!r}: it must be 'nearest' or 'linear'")
    if node.string("coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize":
        raise node.fail(
            "coordinate_transformation_mode = 'tf_crop_and_resize': any other is supported"
        )
    return _moved(state, node, [0])[0]


@operator("Pad")
def pad(state: LoweringState, node: Node) -> Value:
    """Pads a dequantised, int8 or uint8 activation along any axes; pads may be negative.
    The pads are constant. In ``mode`` constant, the value is one constant number.
    In the other modes elements must move as those of a Slice."""
    value = state.results.operand(node, 0)
    if node.string("mode", "constant") != "constant":
        return _moved(state, node, [0])[0]
    fill = _pad_value(node, state.results.operand(node, 2))
    if isinstance(value, Quantised):
        quant = state.tensors.known_quant(node, value.tensor)
        fill = (fill - quant.zero - (128 if quant.unsigned else 0)) * float(quant.scale)
    return _moved(state, node, [0], fill)[0]


def _pad_value(node: Node, given: Value | None) -> float:
    """The number to pad with."""
    if given is None:
        return node.real("value", 0.0)
    if isinstance(given, Const) and given.array.size == 1:
        return float(given.array.reshape(()))
    if isinstance(given, QuantConst) and given.array.size == given.scale.size == 1:
        return float((given.array.reshape(-1) - given.zero.astype(np.float32))[0] * given.scale[0])
    raise node.fail("its value must be one constant number")


def _moved(
    state: LoweringState, node: Node, moving: Iterable[int], fill: float = 0.0
) -> list[Value]:
    """The node's results; ``moving`` are the inputs whose elements it moves, the others
    constants."""
    parts: list[Dequantised] = []
    quant: Quant | None = None
    moving = list(moving)
    for i in moving:
        value = state.results.operand(node, i)
        if not isinstance(value, Quantised):
            parts.append(state.operands.activation(node, i))
            continue
        own = state.tensors.known_quant(node, value.tensor)
        if quant not in (None, own):
            raise node.fail("its int8 or uint8 operands differ in scale or zero point")
        quant = own
        parts.append(Dequantised(value.tensor, value.view, own.scale))
    results = arrange(state, node, parts, moving, fill)
    if quant is None:
        return results
    names = [output.name or "" for output in node.raw.outputs]
    return [
        state.quantiser.quantise(node.with_output(name), result, quant)
        for name, result in zip(names, results, strict=True)
    ]


def arrange(
    state: LoweringState,
    node: Node,
    parts: list[Dequantised],
    moving: list[int],
    fill: float = 0.0,
) -> list[Value]:
    """The results of ``node``, whose inputs ``moving`` stand for ``parts``, with ``fill`` for what
    is none of their elements.

    Results of one constant alone are constants. Parts stored in an order that cannot be moved at
    once are brought to the usual one first."""
    try:
        return _arranged(state, node, parts, moving, fill)
    except ModelError:
        plain = [state.mover.plain(node, part) for part in parts]
        if all(a.tensor == b.tensor for a, b in zip(plain, parts, strict=True)):
            raise
        return _arranged(state, node, plain, moving, fill)


def _arranged(
    state: LoweringState, node: Node, parts: list[Dequantised], moving: list[int], fill: float
) -> list[Value]:
    """As :func:`arrange`, of parts as they are stored."""
    others = [p for p in parts if not state.tensors.is_constant(p.tensor)]
    for part in parts:
        if others and state.tensors.is_constant(part.tensor):
            state.tensors.lay_out(others[0])
            state.tensors.lay_out_like(part, others[0])
    orders = _orders(state, node, parts, moving)
    if len(others) == len(parts) == len(orders) == 1:
        repeated = _repeated(state, node, parts[0], orders[0])
        if repeated is not None:
            return [repeated]
    if len(others) == len(parts) == 1:
        cut = [state.mover.channels(node, parts[0], index) for index in orders]
        if all(each is not None for each in cut):
            return [each for each in cut if each is not None]
    if not others and len(parts) == 1 and all((index >= 0).all() for index in orders):
        return [state.mover.chosen(node, parts[0].tensor, index) for index in orders]
    return [state.mover.moved(node, parts, index, fill=fill) for index in orders]


def _repeated(
    state: LoweringState, node: Node, part: Dequantised, order: np.ndarray
) -> Dequantised | None:
    """``part`` seen as its elements in ``order``, without moving any, if it is only broadcast, and
    only for arithmetic on two activations, which broadcasts by itself."""
    if state.tensors.relaid(part.tensor) or not _only_combined(node.raw):
        return None
    try:
        view = part.view.repeated(order.shape)
    except LayoutError:
        return None
    same = view.repeats and np.array_equal(view.indices(), order)
    return replace(part, view=view) if same else None


def _only_combined(raw: ir.Node) -> bool:
    """Whether the results of a node, quantised and dequantised or not, are only operands of
    arithmetic on two activations."""
    users = [use for output in raw.outputs for use in output.uses()]
    if not users or any(output.is_graph_output() for output in raw.outputs):
        return False
    for user, _ in users:
        if user.op_type in ("QuantizeLinear", "DequantizeLinear"):
            if not _only_combined(user):
                return False
        elif user.op_type not in ("Add", "Sub", "Mul") or any(
            value is None or value.const_value is not None for value in user.inputs
        ):
            return False
    return True


def _orders(
    state: LoweringState, node: Node, parts: list[Dequantised], moving: list[int]
) -> list[np.ndarray]:
    """For each result the places of its elements in the tensors of ``parts`` put end to end, -1
    where it has none of them: the node computed on places instead of values."""
    kind = np.int32 if node.op_type in ("Resize", "Upsample") else np.float64
    arrays: list[np.ndarray | None] = [None] * node.input_count
    start = 0
    for i, part in zip(moving, parts, strict=True):
        arrays[i] = (state.tensors.positions(part) + start).astype(kind)
        start += math.prod(state.tensors.shape(part.tensor))
    for i in set(range(len(arrays))) - set(moving):
        arrays[i] = state.results.const(node, i, f"operand {i}")
    changes: dict[str, Any] = {}
    if node.op_type == "Pad":
        if len(arrays) > 1:
            arrays[2:3] = [np.array(-1, kind)]
        else:
            changes["value"] = -1.0
    if node.op_type == "QLinearConcat":
        arrays, changes = [arrays[i] for i in moving], {"op_type": "Concat", "domain": ""}
    return [a.astype(np.int32) for a in evaluate(node, arrays, state.opsets, **changes)]


@operator("QLinearConcat", domain=MICROSOFT)
def qlinear_concat(state: LoweringState, node: Node) -> Value:
    """As Concat. The operands may have any scales."""
    moving = list(range(2, node.input_count, 3))
    parts = [state.operands.fused(node, i) for i in moving]
    return state.quantiser.quantise(
        node, arrange(state, node, parts, moving)[0], state.results.quant(node, 0)
    )
