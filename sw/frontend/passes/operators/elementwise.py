"""Arithmetic on two operands, and clamps."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from typing import TypeGuard

import numpy as np

from systole.sw.frontend.passes import moves
from systole.sw.frontend.passes.layout import Atom, LayoutError, OnnxView
from systole.sw.frontend.passes.operators.constants import KINDS, rescaled, with_constant
from systole.sw.frontend.passes.operators.functions import (
    as_table,
    by_constant,
    clamped,
    computed_of,
    function_of,
)
from systole.sw.frontend.passes.operators.registry import operator
from systole.sw.frontend.passes.state import LoweringState
from systole.sw.frontend.passes.values import (
    Affine,
    Computed,
    Const,
    Dequantised,
    Function,
    Node,
    Pending,
    QuantConst,
    Quantised,
    Value,
)
from systole.sw.ir.graph import Binary, BinaryKind, Conv, ModelError, Shortcut

MAX_FACTOR = 64 * 127
"""Accumulator units that one step of an activation added to a convolution's sums may count: a pass
of the array for every 127."""


@operator("Add")
def add(state: LoweringState, node: Node) -> Value:
    """Adds two activations, or an activation and a constant.
    Either activation may be broadcast to the other, a constant to the activation.
    A float constant that varies over the image and has no exact int8 codes is at most 16129 steps
    of the activation large.
    The unquantised result of a Conv, a ConvTranspose, or a product by a constant takes a constant,
    one value or one per channel, which joins its bias.
    The unquantised result of a Conv or a product by a constant takes a dequantised activation, if
    one step of that is 1 to 8128 accumulator units."""
    return arithmetic_of(state, node, "Add", state.results.operands(node))


@operator("Sub")
def sub(state: LoweringState, node: Node) -> Value:
    """Subtracts two activations, or an activation and a constant, in either order.
    The second activation may be broadcast to the first, a constant to the activation.
    A float constant that varies over the image and has no exact int8 codes is at most 16129 steps
    of the activation large.
    From the unquantised result of a Conv, a ConvTranspose, or a product by a constant it subtracts
    a constant, one value or one per channel, which joins the bias."""
    return arithmetic_of(state, node, "Sub", state.results.operands(node))


@operator("Mul")
def mul(state: LoweringState, node: Node) -> Value:
    """Multiplies two activations, or an activation and a constant, or a quantised constant and one
    value or one for each of its scales.
    Either activation may be broadcast to the other, a constant to the activation.
    A float constant that varies over the image is rounded to int8; the error must be at most half
    a step of the result.
    The unquantised result of a Conv, a ConvTranspose, or a product by a constant takes a constant,
    one value or one per channel. That of any other operator takes one positive constant."""
    return arithmetic_of(state, node, "Mul", state.results.operands(node))


@operator("BatchNormalization")
def batch_normalisation(state: LoweringState, node: Node) -> Value:
    """Takes a dequantised activation or the unquantised result of a convolution.
    The parameters are float32 constants. ``training_mode`` is 0."""
    if node.integer("training_mode", 0):
        raise node.fail("training_mode = 1: it must be 0")
    scale, shift, mean, variance = (
        _parameter(state, node, i, name)
        for i, name in enumerate(("scale", "bias", "mean", "variance"), 1)
    )
    gain = scale / np.sqrt(variance + node.real("epsilon", 1e-5))
    value = state.results.operand(node, 0)
    if not isinstance(value, Dequantised | Affine | Pending):
        raise node.fail("its operand must be a dequantised activation or a convolution's result")
    rank = len(value.view.shape)
    result: Value = value
    for op_type, values in (("Mul", gain), ("Add", shift - mean * gain)):
        constant = Const(np.float32(values).reshape(-1, *(1,) * (rank - 2)))
        result = with_constant(state, node, op_type, result, constant, first=False)
    if isinstance(result, Affine):
        result = replace(result, op_types=result.op_types[:-1])
    return result


def _parameter(state: LoweringState, node: Node, index: int, name: str) -> np.ndarray:
    """A parameter of a BatchNormalization, as float64."""
    array = state.results.const(node, index, name)
    if array is None or array.dtype != np.float32:
        raise node.fail(
            f"{name} has type {None if array is None else array.dtype}; it must be float32"
        )
    return array.astype(np.float64)


def arithmetic_of(
    state: LoweringState, node: Node, op_type: str, operands: list[Value | None]
) -> Value:
    """The node as ``op_type`` of two ``operands``."""
    function = function_of(state, node, operands, op_type=op_type, domain="")
    if function is not None:
        return function
    first, second = operands
    if any(isinstance(v, Computed) for v in operands) or all(
        isinstance(v, Pending) for v in operands
    ):
        computed = computed_of(state, node, operands, op_type=op_type, domain="")
        if computed is not None:
            return computed
    if op_type == "Mul":
        for x, factor in ((first, second), (second, first)):
            if isinstance(x, QuantConst) and isinstance(factor, Const):
                return rescaled(node, x, factor)
    if isinstance(first, Const | QuantConst) and not isinstance(second, Const | QuantConst):
        return by_constant(state, node, op_type, second, first, first=True)
    if isinstance(second, Const | QuantConst) and not isinstance(first, Const | QuantConst):
        return by_constant(state, node, op_type, first, second, first=False)
    if op_type == "Add":
        for x, other in ((first, second), (second, first)):
            if takes_shortcut(x) and isinstance(other, Dequantised):
                return _with_shortcut(state, node, x, other)
    a, b = (state.operands.real(node, value, i) for i, value in enumerate(operands))
    return binary(state, node, KINDS[op_type], a, b)


def takes_shortcut(x: Value | None) -> TypeGuard[Pending]:
    """Whether it is the result of a convolution or product that has no scale, no clamp and no
    shortcut yet."""
    if not isinstance(x, Pending) or (x.low, x.high) != (-math.inf, math.inf):
        return False
    return isinstance(x.op, Conv) and x.op.shortcut is None


def _with_shortcut(state: LoweringState, node: Node, x: Pending, other: Dequantised) -> Pending:
    """``other`` added to the sums of ``x``, in whole units of these."""
    assert isinstance(x.op, Conv)
    try:
        index = np.broadcast_to(state.tensors.positions(other), x.view.shape)
    except ValueError:
        raise node.fail(
            f"operands {list(x.view.shape)} and {list(other.view.shape)}: the convolution's may "
            "not be broadcast"
        ) from None
    number = np.float64(other.scale) / x.op.scale
    factors = np.rint(number).astype(np.int64)
    if not (factors.min() > 0 and factors.max() <= MAX_FACTOR):
        raise node.fail(
            f"one step of its dequantised operand is {number.min():.3g} to {number.max():.3g} "
            f"accumulator units of the convolution; it must be 1 to {MAX_FACTOR}"
        )
    stored = np.empty(math.prod(x.shape), np.int32)
    stored[x.view.indices().reshape(-1)] = index.reshape(-1)
    if state.tensors.shape(other.tensor) != x.shape or (np.diff(stored) != 1).any():
        other = state.mover.rearranged(node, other, stored.reshape(x.shape))
    zero = state.tensors.quant(other.tensor).zero
    off = np.abs(number - factors) * x.op.scale * max(zero + 128, 127 - zero)
    shortcut = Shortcut(other.tensor, factors.astype(np.int32))
    op = replace(x.op, op_type=f"{x.op.op_type}+{node.op_type}", shortcut=shortcut)
    return replace(x, op=op, off=x.off + float(off.max()))


def binary(
    state: LoweringState, node: Node, kind: BinaryKind, a: Dequantised, b: Dequantised
) -> Pending:
    """``kind`` of two activations; (N, C, 1, 1) is brought to the second place."""
    rank = max(len(a.view.shape), len(b.view.shape))
    a, b = (_of_rank(x, rank) for x in (a, b))
    shape = _broadcast(node, a, b)
    a, b = _once(state, node, a, b, may_be_small=kind != "sub"), _once(state, node, b, a)
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
        a, b = _broadcast_to(state, node, a, b)
    view = state.tensors.checked_view(node, a)
    op = Binary(
        **node.fields(),
        kind=kind,
        a=a.tensor,
        b=b.tensor,
        a_ratio=float(a.scale * b.scale if kind == "mul" else a.scale),
        b_ratio=float(b.scale),
    )
    return Pending(op, state.tensors.shape(a.tensor), view)


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


def _once(
    state: LoweringState,
    node: Node,
    x: Dequantised,
    other: Dequantised,
    *,
    may_be_small: bool = True,
) -> Dequantised:
    """``x`` without repetition, if it is broadcast to the shape of ``other`` and ``may_be_small``
    in its place; else with its elements repeated in memory."""
    if not x.view.repeats:
        return x
    if may_be_small and other.view.shape == x.view.shape and not other.view.repeats:
        return replace(x, view=x.view.once())
    return state.mover.plain(node, x)


def _aligned(
    state: LoweringState, node: Node, a: Dequantised, b: Dequantised
) -> tuple[Dequantised, Dequantised]:
    """Two operands of equal shape in tensors of equal layout."""
    tensors = state.tensors
    for x, y in ((a, b), (b, a)):
        computed = tensors.has_layout(y.tensor) and not tensors.relaid(y.tensor)
        if computed and not tensors.has_layout(x.tensor):
            # A graph input follows the layout of the computed operand.
            with contextlib.suppress(LayoutError):
                tensors.stored_view(x, _inverse(x.view, y.view, tensors.shape(y.tensor)))
    view_a, view_b = (state.tensors.checked_view(node, x) for x in (a, b))
    if tensors.shape(a.tensor) == tensors.shape(b.tensor) and view_a == view_b:
        return a, b
    moved = _moved_to(state, node, a, b)
    return moved or (state.mover.plain(node, a), state.mover.plain(node, b))


def _moved_to(
    state: LoweringState, node: Node, a: Dequantised, b: Dequantised
) -> tuple[Dequantised, Dequantised] | None:
    """The operands with one of them moved to the layout of the other: of the two layouts, the one
    that fills its words better, and then the default one. None if neither can be moved."""

    def preference(x: Dequantised) -> tuple[int, bool]:
        least = moves.least_cost(state.tensors.shape(x.tensor))
        return least, not state.mover.is_plain(x)

    for kept in sorted((a, b), key=preference):
        other = b if kept is a else a
        view = state.tensors.checked_view(node, kept)
        if math.prod(view.shape) != math.prod(state.tensors.shape(kept.tensor)):
            continue
        with contextlib.suppress(LayoutError, ModelError):
            places = _spread(state, kept, other)
            moved = replace(state.mover.rearranged(node, other, places), view=view)
            return (kept, moved) if kept is a else (moved, kept)
    return None


def _broadcast_to(
    state: LoweringState, node: Node, a: Dequantised, b: Dequantised
) -> tuple[Dequantised, Dequantised]:
    """``a``, and ``b``, which is broadcast to it, as a tensor (N, C, 1, 1) if it is the same all
    over the images in which ``a`` is stored, or else in the default layout. Failing that, ``b``
    gets the shape of ``a``."""
    try:
        places = _spread(state, a, b)
        if not _is_channels(places):
            raise LayoutError("it varies over the image")
    except LayoutError:
        a = state.mover.plain(node, a)
        state.tensors.checked_view(node, a)
        places = _spread(state, a, b)
    if not _is_channels(places):
        return a, state.mover.rearranged(node, b, places)
    wanted = np.ascontiguousarray(places[:, :, :1, :1])
    in_order = np.array_equal(wanted.reshape(-1), np.arange(wanted.size))
    if in_order and state.tensors.shape(b.tensor) == wanted.shape:
        return a, b
    return a, state.mover.rearranged(node, b, wanted)


def _spread(state: LoweringState, a: Dequantised, b: Dequantised) -> np.ndarray:
    """Where the elements of ``b`` lie that meet those of ``a``, as ``a`` is stored (N, C, H, W).
    Raises :class:`LayoutError` if the view of ``a`` has no strides as stored."""
    view = state.tensors.stored_view(a)
    whole = np.broadcast_to(state.tensors.positions(b), a.view.shape)
    places = np.empty(whole.size, np.int32)
    places[view.indices().reshape(-1)] = whole.reshape(-1)
    return places.reshape(state.tensors.shape(a.tensor))


def _is_channels(places: np.ndarray) -> bool:
    """Whether all rows and columns have the same places."""
    return bool((places == places[:, :, :1, :1]).all())


def _inverse(value: OnnxView, like: OnnxView, shape: tuple[int, int, int, int]) -> OnnxView:
    """The (N, C, H, W) view of ``value``'s base that makes ``value`` stand as ``like`` stands on an
    array of ``shape``."""
    stored = OnnxView.contiguous(shape)
    dims: list[tuple[Atom, ...]] = []
    for axis in stored.dims:
        alike = [i for i, dim in enumerate(like.dims) if axis and dim == axis]
        if axis and not alike:
            raise LayoutError("an axis joins or divides others")
        dims.append(value.dims[alike[0]] if alike else ())
    return OnnxView(shape, tuple(dims))


@operator("Relu")
def relu(state: LoweringState, node: Node) -> Value:
    """Fused as a clamp into the operator that computes its operand, an activation or an
    unquantised result. Behind an elementwise function it folds into the function's table."""
    if isinstance(state.results.operand(node, 0), Function | Computed):
        return as_table(state, node)
    return clamp(state, node, 0.0, math.inf)


@operator("Clip")
def clip(state: LoweringState, node: Node) -> Value:
    """Fused as a clamp into the operator that computes its operand, an activation or an
    unquantised result. Behind an elementwise function it folds into the function's table.
    The bounds are constant, one value each, given as inputs or attributes."""
    if isinstance(state.results.operand(node, 0), Function | Computed):
        return as_table(state, node)
    low = _bound(state, node, 1, "min", -math.inf)
    high = _bound(state, node, 2, "max", math.inf)
    return clamp(state, node, low, high)


def _bound(state: LoweringState, node: Node, index: int, name: str, default: float) -> float:
    """A bound of a Clip: input ``index``, else attribute ``name``."""
    given = state.results.const(node, index, name)
    if given is not None and given.size != 1:
        raise node.fail(f"{name} has {given.size} values; 1 is needed")
    bound = node.real(name, default) if given is None else float(given.reshape(-1)[0])
    if math.isnan(bound):
        raise node.fail(f"{name} is not a number")
    return bound


def clamp(state: LoweringState, node: Node, low: float, high: float) -> Value:
    """The first operand clamped to ``low``..``high``; of integers, these are of its type."""
    value = state.results.operand(node, 0)
    if isinstance(value, Quantised):
        quant = state.tensors.known_quant(node, value.tensor)
        shift = 128 if quant.unsigned else 0
        real = [(b - shift - quant.zero) * float(quant.scale) for b in (low, high)]
        x = Dequantised(value.tensor, value.view, quant.scale)
        pending = replace(state.quantiser.pointwise(node, x), low=real[0], high=real[1])
        return state.quantiser.quantise(node, pending, quant)
    if isinstance(value, Dequantised):
        value = state.quantiser.pointwise(node, value)
    if not isinstance(value, Pending | Affine):
        raise node.fail("its operand must be an activation")
    if isinstance(value, Affine):
        return clamped(value, low, high)
    return clamped(value, low, high)
