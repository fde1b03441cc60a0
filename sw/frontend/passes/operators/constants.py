"""Arithmetic of an activation and a constant, which runs along the channels or over the image, and
of a convolution's result and a constant per channel."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace

import numpy as np

from systole.sw.frontend.passes import codes, moves
from systole.sw.frontend.passes.layout import LayoutError, OnnxView, default_layout
from systole.sw.frontend.passes.operators.products import bias
from systole.sw.frontend.passes.state import LoweringState
from systole.sw.frontend.passes.values import (
    ADVICE,
    Affine,
    Const,
    Dequantised,
    Node,
    Pending,
    Quant,
    QuantConst,
    Value,
)
from systole.sw.ir.graph import (
    Binary,
    BinaryKind,
    Conv,
    ConvTranspose,
    MatMul,
    ModelError,
    Op,
    Pool,
    Select,
)

KINDS: dict[str, BinaryKind] = {"Add": "add", "Sub": "sub", "Mul": "mul"}
"""Kinds of the graph's Binary, by ONNX operator."""


def with_constant(
    state: LoweringState,
    node: Node,
    op_type: str,
    x: Value | None,
    constant: Const | QuantConst,
    *,
    first: bool,
) -> Value:
    """Add, Sub, Mul or Div of ``x`` and a constant, which is the ``first`` operand or the
    second."""
    if op_type == "Div" and not _real(node, constant).all():
        raise node.fail("its divisor has zeros; each value must be other than 0")
    if isinstance(x, Pending) and not isinstance(x.op, Select):
        return _noted(node, op_type, x, constant, _pending(node, op_type, x, constant, first))
    if isinstance(x, Affine):
        affine, values = per_channel(state, node, x, constant)
        return _by_constant(node, op_type, affine, values, first)
    x = state.operands.real(node, x, 0)
    try:
        affine, values = _as_it_lies(state, node, x, constant)
    except ModelError as e:
        _check_broadcast(node, x, constant, e)
        return over_image(state, node, op_type, x, constant, first=first)
    return _by_constant(node, op_type, affine, values, first)


def _check_broadcast(
    node: Node, x: Dequantised, constant: Const | QuantConst, error: ModelError
) -> None:
    """Raise ``error`` if the constant cannot be broadcast to ``x``."""
    try:
        np.broadcast_to(_real(node, constant), x.view.shape)
    except ValueError:
        raise error from None


def rescaled(node: Node, x: QuantConst, factor: Const | QuantConst) -> QuantConst:
    """A quantised constant times a constant along one of its axes, as weights times a gamma: the
    same codes with other scales, reflected where the factor is negative. Raises
    :class:`ModelError` for other factors."""
    real = _real(node, factor)
    shape = (*(1,) * (x.array.ndim - real.ndim), *real.shape)
    along = [i for i, size in enumerate(shape) if size > 1]
    own = [x.axis] if max(x.scale.size, x.zero.size) > 1 else []
    if len(shape) != x.array.ndim or len({*along, *own}) > 1 or not np.isfinite(real).all():
        raise node.fail(
            f"constant {list(real.shape)} does not run along the axis that the scales of constant "
            f"{list(x.array.shape)} run along"
        )
    (axis,) = {*along, *own} or {x.axis}
    values = np.broadcast_to(real.reshape(-1), x.array.shape[axis : axis + 1])
    if not along:
        values = values[:1] if not own else values
    column = [-1 if i == axis else 1 for i in range(x.array.ndim)]
    zero = np.broadcast_to(x.zero, values.shape)
    # -(q - z) is (m - q) - (m - z) whatever m is: the type's lowest and highest together.
    limits = np.iinfo(x.array.dtype)
    middle = int(limits.min) + int(limits.max)
    down = (values < 0).reshape(column)
    array = np.where(down, middle - x.array.astype(np.int64), x.array)
    array = np.where((values == 0).reshape(column), zero.reshape(column), array)
    zero = np.where(values < 0, middle - zero.astype(np.int64), zero)
    scale = np.where(values == 0, x.scale, x.scale * np.abs(values)).astype(np.float32)
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        raise node.fail("its constants give scales that are not positive and finite")
    dtype = x.array.dtype
    return QuantConst(array.astype(dtype), scale, zero.astype(dtype), axis)


def _noted(
    node: Node, op_type: str, x: Pending, constant: Const | QuantConst, result: Pending
) -> Pending:
    """``result``, of ``x`` and a constant, with how it comes from ``x`` if the constant is one
    value: functions of both are functions of one result."""
    values = np.unique(_real(node, constant))
    if len(values) != 1:
        return result
    number = float(values[0])
    gain = {"Mul": number, "Div": 1 / number if number else 1.0}.get(op_type, 1.0)
    shift = {"Add": number, "Sub": -number}.get(op_type, 0.0)
    base = x.base or replace(x, low=-math.inf, high=math.inf)
    return replace(result, base=base, gain=x.gain * gain, shift=x.shift * gain + shift)


def _pending(
    node: Node, op_type: str, x: Pending, constant: Const | QuantConst, first: bool
) -> Pending:
    """A result that has no scale yet and a constant."""
    if op_type == "Add":
        return _add_bias(node, x, constant)
    real = _real(node, constant)
    if op_type == "Sub" and not first:
        return _add_bias(node, x, Const(np.asarray(-real, np.float32)))
    if op_type == "Sub":
        raise node.fail(
            f"its operand is float32: a QuantizeLinear and DequantizeLinear are needed ({ADVICE})"
        )
    factor = real if op_type == "Mul" else 1 / real
    return _times(x, factor) or _scaled(node, x, Const(np.asarray(factor, np.float32)))


def _times(x: Pending, factor: np.ndarray) -> Pending | None:
    """A result times one positive number: its scale; None if there are more, or others."""
    number = float(factor.flat[0]) if factor.size else 0.0
    fits = factor.ndim <= len(x.view.shape) and factor.size == 1
    if not (fits and 0 < number < math.inf):
        return None
    op = _rescaled(x.op, number)
    if op is None:
        return None
    return replace(x, op=op, low=x.low * number, high=x.high * number, off=x.off * number)


def _rescaled(op: Op, number: float) -> Op | None:
    """``op`` with its result multiplied by a positive number; None if it has no scale."""
    if isinstance(op, Binary):
        other = op.b_ratio if op.kind == "mul" else op.b_ratio * number
        return replace(op, a_ratio=op.a_ratio * number, b_ratio=other)
    if isinstance(op, Conv | ConvTranspose):
        return replace(op, scale=op.scale * np.float32(number))
    if isinstance(op, Pool | MatMul):
        return replace(op, scale=op.scale * np.float32(number))
    return None


def _by_constant(node: Node, op_type: str, x: Affine, values: np.ndarray, first: bool) -> Affine:
    """``x`` and a value for each of its channels."""
    with np.errstate(over="ignore"):
        gain = {"Mul": values, "Div": 1 / values if values.all() else values}.get(op_type, 1.0)
        gain = -gain if op_type == "Sub" and first else gain
        shift = {"Add": values, "Sub": values if first else -values}.get(op_type, 0.0)
        gain, shift = x.gain * gain, x.shift * gain + shift
    if not (np.isfinite(gain).all() and np.isfinite(shift).all()):
        raise node.fail("its constant gives numbers that are not finite")
    return replace(x, gain=gain, shift=shift)


def per_channel(
    state: LoweringState, node: Node, x: Value | None, constant: Const | QuantConst
) -> tuple[Affine, np.ndarray]:
    """``x`` as a function of its channels, this node the last, and the constant's value for
    each."""
    array = _real(node, constant)
    if isinstance(x, Affine):
        if x.below is not None or (x.low, x.high) != (-math.inf, math.inf):
            raise node.fail("a QuantizeLinear and DequantizeLinear are needed before it")
        x = replace(x, op_types=(*x.op_types, node.op_type))
        return x, _by_channel(state, node, x, array)
    x = state.operands.real(node, x, 0)
    try:
        return _as_it_lies(state, node, x, constant)
    except ModelError as e:
        _check_broadcast(node, x, constant, e)
    # Stored in another order till now.
    affine = _affine(state, node, state.mover.plain(node, x), None)
    return affine, _by_channel(state, node, affine, array)


def _as_it_lies(
    state: LoweringState, node: Node, x: Dequantised, constant: Const | QuantConst
) -> tuple[Affine, np.ndarray]:
    """As :func:`per_channel`, for the channels that the tensor of ``x`` is stored with."""
    array = _real(node, constant)
    affine = _affine(state, node, x, _rows(state, x, array))
    return affine, _by_channel(state, node, affine, array)


def over_image(
    state: LoweringState,
    node: Node,
    op_type: str,
    x: Dequantised,
    constant: Const | QuantConst,
    *,
    first: bool,
) -> Value:
    """``x`` and a constant that varies over the image, which becomes a tensor of its own: the
    second operand of a Binary where int8 codes give it exactly. Else channels stored in another
    order are tried, then a sum of ``x`` and the constant's coarse and fine codes, or for products
    the nearest codes, whose error the result's scale must outweigh."""
    real = _real(node, constant)
    if not np.isfinite(real).all():
        raise node.fail("its constant gives numbers that are not finite")
    if op_type == "Div":
        op_type, real = "Mul", 1 / real
        array, quant, off = codes.of_real(real)
    elif isinstance(constant, QuantConst) and constant.scale.size == constant.zero.size == 1:
        (array, quant), off = codes.of_quantised(node, constant), 0.0
    else:
        array, quant, off = codes.of_real(real)
    if off > codes.EXACT * quant.scale:
        try:
            affine = _affine(state, node, state.mover.plain(node, x), None)
            values = _by_channel(state, node, affine, real)
            return _by_constant(node, op_type, affine, values, first)
        except ModelError:
            if op_type != "Mul":
                return _sum(state, node, op_type, x, real, first=first)
    view = state.tensors.checked_view(node, x)
    shape = state.tensors.shape(x.tensor)
    laid_out = _laid_out(x, view, shape, array)
    name = state.tensors.add_constant(node, laid_out, quant, stored=True)
    operands = [(x.tensor, x.scale), (name, quant.scale)]
    (a, a_scale), (b, b_scale) = operands[::-1] if first else operands
    product = op_type == "Mul"
    op = Binary(
        **node.fields(),
        kind=KINDS[op_type],
        a=a,
        b=b,
        a_ratio=float(a_scale * b_scale if product else a_scale),
        b_ratio=float(b_scale),
    )
    own = state.tensors.quant(x.tensor)
    reach = max(own.zero + 128, 127 - own.zero) * float(x.scale)
    return Pending(op, shape, view, off=off * reach if product else 0.0)


def _sum(
    state: LoweringState,
    node: Node,
    op_type: str,
    x: Dequantised,
    real: np.ndarray,
    *,
    first: bool,
) -> Pending:
    """``x`` plus or minus real numbers (or these minus ``x``) with one rounding."""
    view = state.tensors.checked_view(node, x)
    shape = state.tensors.shape(x.tensor)
    # The finest unit of which x is a whole number, and the constant not too many.
    most = np.abs(real).max() / (127 * codes.FINE)
    weight = int(min(127, max(1, float(x.scale) / most)))
    unit = float(x.scale) / weight
    if most > unit:
        raise node.fail(
            f"its constant varies over the image and reaches {np.abs(real).max():g}, "
            f"{np.abs(real).max() / x.scale:.3g} steps of its operand; "
            f"{127 * codes.FINE} steps are the limit"
        )
    sign = -1 if op_type == "Sub" else 1
    own, other = (sign, 1) if first else (1, sign)
    terms = [(x.tensor, own * weight)]
    for part, factor in zip(codes.fine(real, unit), (codes.FINE, 1), strict=True):
        quant = Quant(np.float32(unit * factor), 0, False)
        array = _laid_out(x, view, shape, part)
        terms.append((state.tensors.add_constant(node, array, quant, stored=True), other * factor))
    picks = [replace(moves.identity(name, shape, unit), weight=w) for name, w in terms]
    return Pending(Select(**node.fields(), phases=[picks]), shape, view)


def _laid_out(
    x: Dequantised, view: OnnxView, shape: tuple[int, int, int, int], array: np.ndarray
) -> np.ndarray:
    """``array``, broadcast to ``x``, as the tensor of ``x`` lies, of ``shape``."""
    out = np.empty(math.prod(shape), array.dtype)
    out[view.indices().reshape(-1)] = np.broadcast_to(array, x.view.shape).reshape(-1)
    return out.reshape(shape)


def _affine(state: LoweringState, node: Node, x: Dequantised, layout: OnnxView | None) -> Affine:
    """``x`` itself as a function of its channels; ``layout`` as for
    :meth:`TensorTable.stored_view`."""
    view = state.tensors.checked_view(node, x, layout)
    channels = state.tensors.shape(x.tensor)[1]
    gain, shift = np.ones(channels), np.zeros(channels)
    return Affine(
        name=node.name,
        op_types=(node.op_type,),
        tensor=x.tensor,
        view=view,
        scale=x.scale,
        gain=gain,
        shift=shift,
    )


def _by_channel(state: LoweringState, node: Node, x: Affine, array: np.ndarray) -> np.ndarray:
    """The value of a constant for each stored channel of ``x``."""
    shape, (n, c, h, w) = x.view.shape, state.tensors.shape(x.tensor)
    try:
        whole = np.broadcast_to(array, shape)
    except ValueError:
        raise node.fail(
            f"constant {list(array.shape)} does not fit operand {list(shape)}"
        ) from None
    places = np.empty(n * c * h * w)
    places[x.view.indices().reshape(-1)] = whole.reshape(-1)
    stored = places.reshape(n, c, h * w).transpose(1, 0, 2).reshape(c, -1)
    if (stored != stored[:, :1]).any():
        raise node.fail(
            f"constant {list(array.shape)} does not run along the {c} channels only: one value "
            "for all or one per channel is needed"
        )
    return stored[:, 0]


def _real(node: Node, constant: Const | QuantConst) -> np.ndarray:
    if isinstance(constant, QuantConst):
        return constant.real
    if constant.array.dtype != np.float32:
        raise node.fail(f"constant of type {constant.array.dtype}; float32 is needed")
    return constant.array.astype(np.float64)


def _rows(state: LoweringState, x: Dequantised, array: np.ndarray) -> OnnxView | None:
    """The layout of rows and features for a graph input of three dimensions not yet laid out, where
    a constant runs along the last alone, or the last two; else None."""
    lead, features = x.view.shape[:-1], x.view.shape[-1:]
    if len(lead) != 2 or array.shape[-1:] != features:
        return None
    if array.size != features[0] and array.shape[-2:] != x.view.shape[-2:]:
        return None
    if state.tensors.has_layout(x.tensor):
        return None
    with contextlib.suppress(LayoutError):
        return default_layout(x.view.reshape((math.prod(lead), *features)))
    return None


def _convolution(node: Node, x: Pending, value: Const | QuantConst) -> Conv | ConvTranspose:
    """The operator of ``x``, a convolution not clamped yet whose channels the constant runs
    along."""
    if not isinstance(x.op, Conv | ConvTranspose) or (x.low, x.high) != (-math.inf, math.inf):
        raise node.fail(
            f"its operand is the unquantised result of {x.op.op_type} {x.op.name!r}; only that of "
            "a convolution or of a product by a constant can meet a constant, unclamped: a "
            "QuantizeLinear and DequantizeLinear are needed before it"
        )
    outputs = x.shape[1]
    channel = OnnxView.contiguous(x.shape).dims[1]
    shape = (1,) * (len(x.view.shape) - value.array.ndim) + value.array.shape
    for i, size in enumerate(shape):
        fits = i < len(x.view.dims) and size == outputs and x.view.dims[i] == channel
        if size != 1 and not fits:
            raise node.fail(
                f"constant {list(value.array.shape)} does not run along the {outputs} channels only"
            )
    return x.op


def _scaled(node: Node, x: Pending, value: Const | QuantConst) -> Pending:
    """A convolution times a constant: its scale, and the sign in its weights."""
    op = _convolution(node, x, value)
    if isinstance(op, Conv) and op.shortcut:
        raise node.fail(
            "its operand is an unquantised sum with an activation; its factor must be one positive "
            "number"
        )
    gain = np.broadcast_to(_real(node, value).reshape(-1), x.shape[1:2]).astype(np.float32)
    if not np.isfinite(gain).all():
        raise node.fail("its constant has values that are not finite")
    sign = np.sign(gain).astype(np.int16)
    weights = op.weights * sign[:, None, None, None]
    if np.abs(weights).max(initial=0) <= 127:
        weights = weights.astype(np.int8)
    scale = np.where(gain == 0, op.scale, op.scale * np.abs(gain)).astype(np.float32)
    scaled: Op = replace(op, weights=weights, bias=op.bias * sign, scale=scale)
    return replace(x, op=scaled)


def _add_bias(node: Node, x: Pending, value: Const | QuantConst) -> Pending:
    """A convolution plus a constant: its bias."""
    op = _convolution(node, x, value)
    added = bias(node, value, op.scale)
    total = op.bias.astype(np.int64) + added.number
    if (np.abs(total) >= 2**31).any():
        raise node.fail(
            f"the sum of its biases is {np.abs(total).max()} accumulator units; it must fit int32"
        )
    off = added.off if op.off is None else op.off + added.off
    biased: Op = replace(op, bias=total.astype(np.int32), off=off)
    return replace(x, op=biased)
