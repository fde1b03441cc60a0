"""Arithmetic of an activation and a constant, which runs along the channels or over the image, and
of a convolution's result and a constant per channel."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace

import numpy as np

from systole.sw.frontend.passes import codes, moves
from systole.sw.frontend.passes.layout import LayoutError, OnnxView, default_layout
from systole.sw.frontend.passes.lower import GraphBuilder
from systole.sw.frontend.passes.operators.products import bias
from systole.sw.frontend.passes.values import (
    Affine,
    Const,
    Dequantised,
    Node,
    Pending,
    Quant,
    QuantConst,
    Value,
)
from systole.sw.ir.graph import Binary, Conv, ConvTranspose, ModelError, Select


def with_constant(
    state: GraphBuilder,
    node: Node,
    op_type: str,
    x: Value | None,
    constant: Const | QuantConst,
    first: bool,
) -> Value:
    """Add, Sub, Mul, Div of ``x`` and a constant, which is the ``first`` operand or the second."""
    if op_type == "Div" and not _real(node, constant).all():
        raise node.fail("its divisor has zeros")
    if isinstance(x, Pending) and not isinstance(x.op, Select):
        return _pending(node, op_type, x, constant, first)
    if isinstance(x, Affine):
        return _by_constant(node, op_type, *per_channel(state, node, x, constant), first)
    x = state.real(node, x, 0)
    try:
        found = _as_it_lies(state, node, x, constant)
    except ModelError as e:
        try:
            np.broadcast_to(_real(node, constant), x.view.shape)
        except ValueError:
            raise e from None
        return over_image(state, node, op_type, x, constant, first)
    return _by_constant(node, op_type, *found, first)


def _pending(
    node: Node, op_type: str, x: Pending, constant: Const | QuantConst, first: bool
) -> Pending:
    """A result that has no scale yet and a constant."""
    if op_type == "Add":
        return _add_bias(node, x, constant)
    real = _real(node, constant)
    if op_type == "Sub" and not first:
        return _add_bias(node, x, Const(np.float32(-real)))
    if op_type == "Sub":
        raise node.fail("its operand is float32: a QuantizeLinear and DequantizeLinear are needed")
    factor = real if op_type == "Mul" else 1 / real
    return _times(x, factor) or _scaled(node, x, Const(np.float32(factor)))


def _times(x: Pending, factor: np.ndarray) -> Pending | None:
    """A result times one positive number: its scale; None if there are more, or others."""
    number = float(factor.flat[0]) if factor.size else 0.0
    fits = factor.ndim <= len(x.view.shape) and factor.size == 1
    if not (fits and 0 < number < math.inf):
        return None
    op = x.op
    if isinstance(op, Binary):
        other = op.b_ratio if op.kind == "mul" else op.b_ratio * number
        op = replace(op, a_ratio=op.a_ratio * number, b_ratio=other)
    else:
        op = replace(op, scale=op.scale * np.float32(number))
    return replace(x, op=op, low=x.low * number, high=x.high * number, off=x.off * number)


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
    state: GraphBuilder, node: Node, x: Value | None, constant: Const | QuantConst
) -> tuple[Affine, np.ndarray]:
    """``x`` as a function of its channels, this node the last, and the constant's value for
    each."""
    array = _real(node, constant)
    if isinstance(x, Affine):
        if x.below is not None or (x.low, x.high) != (-math.inf, math.inf):
            raise node.fail("a QuantizeLinear and DequantizeLinear are needed before it")
        x = replace(x, op_types=(*x.op_types, node.op_type))
        return x, _by_channel(state, node, x, array)
    x = state.real(node, x, 0)
    try:
        return _as_it_lies(state, node, x, constant)
    except ModelError as e:
        try:
            np.broadcast_to(array, x.view.shape)
        except ValueError:
            raise e from None
    made = _affine(state, node, state.plain(node, x), None)  # stored in another order till now
    return made, _by_channel(state, node, made, array)


def _as_it_lies(
    state: GraphBuilder, node: Node, x: Dequantised, constant: Const | QuantConst
) -> tuple[Affine, np.ndarray]:
    """As ``per_channel``, of the channels of the tensor of ``x``."""
    array = _real(node, constant)
    made = _affine(state, node, x, _rows(state, x, array))
    return made, _by_channel(state, node, made, array)


def over_image(
    state: GraphBuilder,
    node: Node,
    op_type: str,
    x: Dequantised,
    constant: Const | QuantConst,
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
        constant = None
    if isinstance(constant, QuantConst) and constant.scale.size == constant.zero.size == 1:
        (array, quant), off = codes.of_quantised(node, constant), 0.0
    else:
        array, quant, off = codes.of_real(real)
    if off > codes.EXACT * quant.scale:
        try:
            made = _affine(state, node, state.plain(node, x), None)
            return _by_constant(node, op_type, made, _by_channel(state, node, made, real), first)
        except ModelError:
            if op_type != "Mul":
                return _sum(state, node, op_type, x, real, first)
    view = state.bound(node, x, None)
    shape = state.tensors[x.tensor].shape
    name = state.keep(node, _laid_out(x, view, shape, array), quant, stored=True)
    operands = [(x.tensor, x.scale), (name, quant.scale)]
    (a, a_scale), (b, b_scale) = operands[::-1] if first else operands
    product = op_type == "Mul"
    op = Binary(
        kind=op_type.lower(),
        **_fields(node),
        a=a,
        b=b,
        a_ratio=float(a_scale * b_scale if product else a_scale),
        b_ratio=float(b_scale),
    )
    own = state.tensors[x.tensor].quant
    reach = max(own.zero + 128, 127 - own.zero) * float(x.scale)
    return Pending(op, shape, view, off=off * reach if product else 0.0)


def _sum(
    state: GraphBuilder, node: Node, op_type: str, x: Dequantised, real: np.ndarray, first: bool
) -> Pending:
    """``x`` plus or minus real numbers (or these minus ``x``) with one rounding."""
    view = state.bound(node, x, None)
    shape = state.tensors[x.tensor].shape
    # The finest unit of which x is a whole number, and the constant not too many.
    most = np.abs(real).max() / (127 * codes.FINE)
    weight = int(min(127, max(1, float(x.scale) / most)))
    unit = float(x.scale) / weight
    if most > unit:
        raise node.fail(
            f"its constant of up to {np.abs(real).max():g} varies over the image, where its "
            f"operand's steps are {x.scale:g}: {127 * codes.FINE} of these are the limit"
        )
    sign = -1 if op_type == "Sub" else 1
    own, other = (sign, 1) if first else (1, sign)
    terms = [(x.tensor, own * weight)]
    for part, factor in zip(codes.fine(real, unit), (codes.FINE, 1), strict=True):
        quant = Quant(np.float32(unit * factor), 0, False)
        array = _laid_out(x, view, shape, part)
        terms.append((state.keep(node, array, quant, stored=True), other * factor))
    picks = [replace(moves.identity(name, shape, unit), weight=w) for name, w in terms]
    return Pending(Select(**_fields(node), phases=[picks]), shape, view)


def _fields(node: Node) -> dict:
    fields = {"name": node.name, "op_type": node.op_type, "output": ""}
    return fields | {"low": -128, "high": 127}


def _laid_out(
    x: Dequantised, view: OnnxView, shape: tuple[int, int, int, int], array: np.ndarray
) -> np.ndarray:
    """``array``, broadcast to ``x``, as the tensor of ``x`` lies, of ``shape``."""
    out = np.empty(math.prod(shape), array.dtype)
    out[view.indices().reshape(-1)] = np.broadcast_to(array, x.view.shape).reshape(-1)
    return out.reshape(shape)


def _affine(state: GraphBuilder, node: Node, x: Dequantised, layout: OnnxView | None) -> Affine:
    """``x`` itself; ``layout``: see ``GraphBuilder.bound``."""
    view = state.bound(node, x, layout)
    channels = state.tensors[x.tensor].shape[1]
    gain, shift = np.ones(channels), np.zeros(channels)
    return Affine(node.name, (node.op_type,), x.tensor, view, x.scale, gain, shift)


def _by_channel(state: GraphBuilder, node: Node, x: Affine, array: np.ndarray) -> np.ndarray:
    """The value of a constant for each stored channel of ``x``."""
    shape, (n, c, h, w) = x.view.shape, state.tensors[x.tensor].shape
    try:
        whole = np.broadcast_to(array, shape)
    except ValueError:
        raise node.fail(
            f"constant {list(array.shape)} does not fit operand {list(shape)}"
        ) from None
    stored = np.empty(n * c * h * w)
    stored[x.view.indices().reshape(-1)] = whole.reshape(-1)
    stored = stored.reshape(n, c, h * w).transpose(1, 0, 2).reshape(c, -1)
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


def _rows(state: GraphBuilder, x: Dequantised, array: np.ndarray) -> OnnxView | None:
    """The layout of rows and features for a graph input of three dimensions not yet laid out, where
    a constant runs along the last alone, or the last two; else None."""
    lead, features = x.view.shape[:-1], x.view.shape[-1:]
    if len(lead) != 2 or array.shape[-1:] != features:
        return None
    if array.size != features[0] and array.shape[-2:] != x.view.shape[-2:]:
        return None
    if state.tensors[x.tensor].shape is not None:
        return None
    with contextlib.suppress(LayoutError):
        return default_layout(x.view.reshape((math.prod(lead), *features)))
    return None


def _check_channels(node: Node, x: Pending, value: Const | QuantConst) -> None:
    if not isinstance(x.op, Conv | ConvTranspose) or (x.low, x.high) != (-math.inf, math.inf):
        raise node.fail(
            "of unquantised results only a convolution's or product's can meet a constant; a "
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


def _scaled(node: Node, x: Pending, value: Const | QuantConst) -> Pending:
    """A convolution times a constant: its scale, and the sign in its weights."""
    _check_channels(node, x, value)
    if isinstance(x.op, Conv) and x.op.shortcut:
        raise node.fail("behind an addition without a scale: only one positive number for all")
    gain = np.broadcast_to(_real(node, value).reshape(-1), x.shape[1:2]).astype(np.float32)
    if not np.isfinite(gain).all():
        raise node.fail("its constant has values that are not finite")
    sign = np.sign(gain).astype(np.int16)
    weights = x.op.weights * sign[:, None, None, None]
    if np.abs(weights).max(initial=0) <= 127:
        weights = weights.astype(np.int8)
    scale = np.where(gain == 0, x.op.scale, x.op.scale * np.abs(gain))
    changes = {"weights": weights, "bias": x.op.bias * sign, "scale": scale.astype(np.float32)}
    return replace(x, op=replace(x.op, **changes))


def _add_bias(node: Node, x: Pending, value: Const | QuantConst) -> Pending:
    _check_channels(node, x, value)
    total = x.op.bias.astype(np.int64) + bias(node, value, x.op.scale)
    if (np.abs(total) >= 2**31).any():
        raise node.fail("the sum of its biases exceeds int32")
    return replace(x, op=replace(x.op, bias=total.astype(np.int32)))
