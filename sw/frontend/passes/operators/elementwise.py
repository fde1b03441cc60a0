"""Arithmetic on two operands, and clamps."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace

import numpy as np

from systole.sw.frontend.passes.layout import LayoutError, OnnxView
from systole.sw.frontend.passes.lower import GraphBuilder
from systole.sw.frontend.passes.operators.constants import with_constant
from systole.sw.frontend.passes.operators.functions import elementwise, function_of
from systole.sw.frontend.passes.operators.registry import operator
from systole.sw.frontend.passes.values import (
    Affine,
    Const,
    Dequantised,
    Function,
    Node,
    Pending,
    QuantConst,
    Quantised,
    Value,
)
from systole.sw.ir.graph import Binary, Conv, Shortcut

KINDS = {"Add": "add", "Sub": "sub", "Mul": "mul"}
MAX_FACTOR = 64 * 127
"""Of an activation added to a convolution's sums: a pass of the array for every 127."""


@operator("Add")
def add(state: GraphBuilder, node: Node) -> Value:
    """Of two activations, of equal shape or one of them the same for a whole image, (N, C, 1, 1);
    of an activation and a constant that does not exceed it in shape; of the result of a product or
    convolution and a constant (as its bias), one value or one per channel, or an activation (added
    to the sums of a convolution or product by a constant in whole units of these: 1 to 8128 to a
    step)."""
    return arithmetic_of(state, node, "Add", [state.operand(node, i) for i in (0, 1)])


@operator("Sub", "Mul")
def arithmetic(state: GraphBuilder, node: Node) -> Value:
    """Of two activations, of equal shape or one of them (Sub: the second) the same for a whole
    image, (N, C, 1, 1); of an activation and a constant that does not exceed it in shape (float
    factors that vary over the image: where the nearest int8 codes are off by half a step of the
    result at most); Mul of the result of a product or convolution and a constant, one value or one
    per channel."""
    operands = [state.operand(node, i) for i in (0, 1)]
    return arithmetic_of(state, node, node.op_type, operands)


@operator("BatchNormalization")
def batch_normalisation(state: GraphBuilder, node: Node) -> Value:
    """At inference, with constant parameters; of an activation, or of the result of a
    convolution."""
    if node.int("training_mode", 0):
        raise node.fail("training_mode = 1: it must be 0")
    names = ("scale", "bias", "mean", "variance")
    given = [state.const(node, i, name) for i, name in enumerate(names, 1)]
    if any(array is None or array.dtype != np.float32 for array in given):
        raise node.fail("its parameters must be float32")
    scale, shift, mean, variance = (array.astype(np.float64) for array in given)
    gain = scale / np.sqrt(variance + node.float("epsilon", 1e-5))
    value = state.operand(node, 0)
    if not isinstance(value, Dequantised | Affine | Pending):
        raise node.fail("its operand must be a dequantised activation or a convolution's result")
    rank = len(value.view.shape)
    for op_type, values in (("Mul", gain), ("Add", shift - mean * gain)):
        constant = Const(np.float32(values).reshape(-1, *(1,) * (rank - 2)))
        value = with_constant(state, node, op_type, value, constant, first=False)
    if isinstance(value, Affine):
        value = replace(value, op_types=value.op_types[:-1])
    return value


def arithmetic_of(
    state: GraphBuilder, node: Node, op_type: str, operands: list[Value | None]
) -> Value:
    """The node as ``op_type`` of ``operands``."""
    function = function_of(state, node, operands, op_type=op_type, domain="")
    if function is not None:
        return function
    constants = [isinstance(value, Const | QuantConst) for value in operands]
    if constants.count(True) == 1:
        return with_constant(
            state, node, op_type, operands[constants.index(False)], operands[constants.index(True)],
            first=constants[0],
        )  # fmt: skip
    if op_type == "Add":
        for x, other in (operands, operands[::-1]):
            if takes_shortcut(x) and isinstance(other, Dequantised):
                return _with_shortcut(state, node, x, other)
    a, b = (state.real(node, value, i) for i, value in enumerate(operands))
    return binary(state, node, KINDS[op_type], a, b)


def takes_shortcut(x: Value | None) -> bool:
    """It is the result of a convolution or product that has no scale and no clamp yet."""
    plain = isinstance(x, Pending) and (x.low, x.high) == (-math.inf, math.inf)
    return plain and isinstance(x.op, Conv) and x.op.shortcut is None


def _with_shortcut(state: GraphBuilder, node: Node, x: Pending, other: Dequantised) -> Pending:
    """``other`` added to the sums of ``x``, in whole units of these."""
    try:
        index = np.broadcast_to(state.positions(other), x.view.shape)
    except ValueError:
        raise node.fail(
            f"operands {list(x.view.shape)} and {list(other.view.shape)}: the convolution's may "
            "not be broadcast"
        ) from None
    number = np.float64(other.scale) / x.op.scale
    factors = np.rint(number).astype(np.int64)
    if not (factors.min() > 0 and factors.max() <= MAX_FACTOR):
        raise node.fail(
            f"its dequantised operand counts {number.min():.3g} to {number.max():.3g} units of the "
            f"convolution's sums: 1 to {MAX_FACTOR} are the limits"
        )
    stored = np.empty(math.prod(x.shape), np.int32)
    stored[x.view.indices().reshape(-1)] = index.reshape(-1)
    if state.tensors[other.tensor].shape != x.shape or (np.diff(stored) != 1).any():
        other = state.rearranged(node, other, stored.reshape(x.shape))
    zero = state.tensors[other.tensor].quant.zero
    off = np.abs(number - factors) * x.op.scale * max(zero + 128, 127 - zero)
    shortcut = Shortcut(other.tensor, factors.astype(np.int32))
    op = replace(x.op, op_type=f"{x.op.op_type}+{node.op_type}", shortcut=shortcut)
    return replace(x, op=op, off=x.off + float(off.max()))


def binary(state: GraphBuilder, node: Node, kind: str, a: Dequantised, b: Dequantised) -> Pending:
    """``kind`` of two activations; (N, C, 1, 1) is brought to the second place."""
    rank = max(len(a.view.shape), len(b.view.shape))
    a, b = (_of_rank(x, rank) for x in (a, b))
    shape = _broadcast(node, a, b)
    if a.view.shape == b.view.shape:
        a, b = _aligned(state, node, a, b)
    else:
        if a.view.shape != shape:
            a, b = b, a
            if kind == "sub" or a.view.shape != shape:
                raise node.fail(
                    f"operands {list(b.view.shape)} and {list(a.view.shape)}: only "
                    f"{'the second' if kind == 'sub' else 'one'} may be broadcast"
                )
        a = state.plain(node, a)
        b = _spread(state, node, a, b)
    view = state.bound(node, a, None)
    op = Binary(
        kind=kind,
        name=node.name,
        op_type=node.op_type,
        output="",
        low=-128,
        high=127,
        a=a.tensor,
        b=b.tensor,
        a_ratio=float(a.scale * b.scale if kind == "mul" else a.scale),
        b_ratio=float(b.scale),
    )
    return Pending(op, state.tensors[a.tensor].shape, view)


def _of_rank(x: Dequantised, rank: int) -> Dequantised:
    shape = (1,) * (rank - len(x.view.shape)) + x.view.shape
    return replace(x, view=x.view.reshape(shape))


def _broadcast(node: Node, a: Dequantised, b: Dequantised) -> tuple[int, ...]:
    try:
        return np.broadcast_shapes(a.view.shape, b.view.shape)
    except ValueError:
        raise node.fail(
            f"operands {list(a.view.shape)} and {list(b.view.shape)} differ in shape"
        ) from None


def _aligned(
    state: GraphBuilder, node: Node, a: Dequantised, b: Dequantised
) -> tuple[Dequantised, Dequantised]:
    """Two operands of equal shape in tensors of equal layout."""
    first, second = state.tensors[a.tensor], state.tensors[b.tensor]
    for x, y in ((a, b), (b, a)):
        mine, other = state.tensors[x.tensor], state.tensors[y.tensor]
        if mine.shape is None and other.shape is not None and other.layout is None:
            # A graph input follows the layout of the computed operand.
            with contextlib.suppress(LayoutError):
                state.bind(x, _inverse(x.view, y.view, other.shape))
    view_a, view_b = (state.bound(node, x, None) for x in (a, b))
    if first.shape == second.shape and view_a == view_b:
        return a, b
    return state.plain(node, a), state.plain(node, b)


def _spread(state: GraphBuilder, node: Node, a: Dequantised, b: Dequantised) -> Dequantised:
    """``b``, which is broadcast to ``a`` (in default layout), as a tensor (N, C, 1, 1), or else of
    the shape of ``a``."""
    n, c, h, w = state.tensors[a.tensor].shape
    view = state.bound(node, a, None)
    index = state.positions(b)
    # Where a's first row and column are is a (N, C) choice of the elements of b, if b is the same
    # all over the image.
    whole = np.broadcast_to(index, a.view.shape)
    stored = np.empty(n * c * h * w, np.int32)
    stored[view.indices().reshape(-1)] = whole.reshape(-1)
    stored = stored.reshape(n, c, h * w)
    if (stored == stored[:, :, :1]).all():
        wanted = np.ascontiguousarray(stored[:, :, :1]).reshape(n, c, 1, 1)
        other = state.tensors[b.tensor]
        if other.shape == (n, c, 1, 1) and np.array_equal(wanted.reshape(-1), np.arange(n * c)):
            return b
        return state.rearranged(node, b, wanted)
    return state.rearranged(node, b, stored.reshape(n, c, h, w))


def _inverse(value: OnnxView, like: OnnxView, shape: tuple[int, int, int, int]) -> OnnxView:
    """The (N, C, H, W) view of ``value``'s base that makes ``value`` stand as ``like`` stands on an
    array of ``shape``."""
    stored = OnnxView.contiguous(shape)
    dims = []
    for axis in stored.dims:
        found = [i for i, dim in enumerate(like.dims) if axis and dim == axis]
        if axis and not found:
            raise LayoutError("an axis joins or divides others")
        dims.append(value.dims[found[0]] if found else ())
    return OnnxView(shape, tuple(dims))


@operator("Relu")
def relu(state: GraphBuilder, node: Node) -> Value:
    """Fused as a clamp; of a function of an activation, part of its table."""
    if isinstance(state.operand(node, 0), Function):
        return elementwise(state, node)
    return clamp(state, node, 0.0, math.inf)


@operator("Clip")
def clip(state: GraphBuilder, node: Node) -> Value:
    """Fused as a clamp; of a function of an activation, part of its table; constant bounds, as
    inputs or attributes."""
    if isinstance(state.operand(node, 0), Function):
        return elementwise(state, node)
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


def clamp(state: GraphBuilder, node: Node, low: float, high: float) -> Value:
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
    if not isinstance(value, Pending | Affine):
        raise node.fail("its operand must be an activation")
    return replace(value, low=min(max(value.low, low), high), high=min(max(value.high, low), high))
