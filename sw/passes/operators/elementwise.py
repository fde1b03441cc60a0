"""Addition and clamps."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from sw.graph import Binary, Conv
from sw.passes.layout import LayoutError, View
from sw.passes.lower import (
    Const,
    Dequantised,
    Lowering,
    Node,
    Pending,
    QuantConst,
    Quantised,
    Value,
)
from sw.passes.operators.products import bias
from sw.passes.operators.registry import operator


@operator("Add")
def add(state: Lowering, node: Node) -> Value:
    """Of two activations of equal shape, or of a constant per channel to a product or convolution
    (its bias)."""
    a, b = state.operand(node, 0), state.operand(node, 1)
    for x, y in ((a, b), (b, a)):
        if isinstance(x, Pending) and isinstance(y, Const | QuantConst):
            return _add_bias(node, x, y)
    return addition(state, node, state.activation(node, 0), state.activation(node, 1))


def addition(state: Lowering, node: Node, a: Dequantised, b: Dequantised) -> Pending:
    if a.view.shape != b.view.shape:
        raise node.fail(f"operands {list(a.view.shape)} and {list(b.view.shape)} differ in shape")
    first, second = state.tensors[a.tensor], state.tensors[b.tensor]
    if first.shape is None and second.shape is not None and second.layout is None:
        # A graph input follows the layout of the computed operand.
        try:
            stored = _inverse(a.view, b.view, second.shape)
        except LayoutError as e:
            raise node.fail(f"the layout of {a.tensor!r} cannot be stored: {e}") from None
        view_a, view_b = state.bound(node, a, stored), b.view
    elif second.shape is None and first.shape is not None and first.layout is None:
        return addition(state, node, b, a)
    else:
        view_a, view_b = state.bound(node, a, None), state.bound(node, b, None)
    if first.shape != second.shape or view_a != view_b:
        raise node.fail(
            f"{a.tensor!r} and {b.tensor!r} are stored in different layouts "
            f"({list(first.shape)} and {list(second.shape)})"
        )
    op = Binary(
        kind="add",
        name=node.name,
        op_type=node.op_type,
        output="",
        low=-128,
        high=127,
        a=a.tensor,
        b=b.tensor,
        a_ratio=float(a.scale),
        b_ratio=float(b.scale),
    )
    return Pending(op, first.shape, view_a)


def _inverse(value: View, like: View, shape: tuple[int, int, int, int]) -> View:
    """The (N, C, H, W) view of ``value``'s base that makes ``value`` stand as ``like`` stands on an
    array of ``shape``."""
    stored = View.contiguous(shape)
    dims = []
    for axis in stored.dims:
        found = [i for i, dim in enumerate(like.dims) if axis and dim == axis]
        if axis and not found:
            raise LayoutError("an axis joins or divides others")
        dims.append(value.dims[found[0]] if found else ())
    return View(shape, tuple(dims))


def _add_bias(node: Node, x: Pending, value: Const | QuantConst) -> Pending:
    if not isinstance(x.op, Conv) or (x.low, x.high) != (-math.inf, math.inf):
        raise node.fail("a constant can be added only to a convolution or product (its bias)")
    outputs = x.shape[1]
    channel = View.contiguous(x.shape).dims[1]
    shape = (1,) * (len(x.view.shape) - value.array.ndim) + value.array.shape
    for i, size in enumerate(shape):
        if size != 1 and not (size == outputs and x.view.dims[i] == channel):
            raise node.fail(
                f"constant {list(value.array.shape)} does not run along the {outputs} channels only"
            )
    total = x.op.bias.astype(np.int64) + bias(node, value, x.op.scale)
    if (np.abs(total) >= 2**31).any():
        raise node.fail("the sum of its biases exceeds int32")
    return replace(x, op=replace(x.op, bias=total.astype(np.int32)))


@operator("Relu")
def relu(state: Lowering, node: Node) -> Value:
    """Fused as a clamp."""
    return clamp(state, node, 0.0, math.inf)


@operator("Clip")
def clip(state: Lowering, node: Node) -> Value:
    """Fused as a clamp; constant bounds, as inputs or attributes."""
    bounds = []
    for index, name, default in ((1, "min", -math.inf), (2, "max", math.inf)):
        given = state.const(node, index, name)
        if given is not None and given.size != 1:
            raise node.fail(f"{name} has {given.size} values; 1 is needed")
        bound = node.float(name, default) if given is None else float(given.reshape(-1)[0])
        if math.isnan(bound):
            raise node.fail(f"{name} is not a number")
        bounds.append(bound)
    return clamp(state, node, *bounds)


def clamp(state: Lowering, node: Node, low: float, high: float) -> Value:
    value = state.operand(node, 0)
    if isinstance(value, Quantised):
        quant = state.known_quant(node, value)
        shift = 128 if quant.unsigned else 0
        real = [(b - shift - quant.zero) * float(quant.scale) for b in (low, high)]
        x = Dequantised(value.tensor, value.view, quant.scale)
        pending = replace(state.pointwise(node, x), low=real[0], high=real[1])
        return state.quantise(node, pending, quant)
    if isinstance(value, Dequantised):
        value = state.pointwise(node, value)
    if not isinstance(value, Pending):
        raise node.fail("its operand must be an activation")
    return replace(value, low=min(max(value.low, low), high), high=min(max(value.high, low), high))
