"""Convolution and matrix multiplication, by constants or of activations."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np

from systole.sw.frontend.passes.layout import OnnxView, merge
from systole.sw.frontend.passes.lower import GraphBuilder
from systole.sw.frontend.passes.operators.matrices import activation_product
from systole.sw.frontend.passes.operators.registry import operator
from systole.sw.frontend.passes.operators.window import (
    image_result,
    pair,
    transposed_window,
    window,
)
from systole.sw.frontend.passes.values import Const, Dequantised, Node, Pending, QuantConst, Value
from systole.sw.ir.graph import Conv, ConvTranspose

BIAS_TOLERANCE = 1e-4
"""Relative difference up to which a bias' scale counts as x_scale * w_scale."""


def weights(node: Node, value: Value | None, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights less their zero points, int8 or (where that does not suffice) int16, and their
    float32 scales along axis ``channels``."""
    if not isinstance(value, QuantConst):
        raise node.fail("its weights must be a quantised constant (quantise the model first)")
    array = value.array
    if array.dtype not in (np.int8, np.uint8):
        raise node.fail(f"weights of type {array.dtype}; int8 or uint8 is needed")
    if max(value.scale.size, value.zero.size) > 1 and value.axis != channels % array.ndim:
        raise node.fail(
            f"weight scales along axis {value.axis}; output channels are axis {channels}"
        )
    zero = value.zero.astype(np.int16)
    if zero.size > 1:
        zero = zero.reshape([-1 if i == value.axis else 1 for i in range(array.ndim)])
    array = array.astype(np.int16) - zero
    if array.min(initial=0) >= -128 and array.max(initial=0) <= 127:
        array = array.astype(np.int8)
    return array, np.broadcast_to(value.scale, (array.shape[channels],))


def bias(node: Node, value: Value | None, scale: np.ndarray) -> np.ndarray:
    """A bias as int32 in units of ``scale`` (x_scale * w_scale). int32 of that scale is taken as it
    is, any other constant is rounded to it, as onnxruntime does with float32."""
    channels = scale.shape[0]
    if value is None:
        return np.zeros(channels, np.int32)
    if isinstance(value, QuantConst):
        array = value.array.reshape(-1)
        same = np.allclose(value.scale, scale, rtol=BIAS_TOLERANCE, atol=0)
        if array.dtype == np.int32 and same and not value.zero.any():
            return np.ascontiguousarray(np.broadcast_to(array, (channels,)))
        real = value.real.reshape(-1)
    elif isinstance(value, Const) and value.array.dtype == np.float32:
        real = value.array.reshape(-1).astype(np.float64)
    else:
        raise node.fail("its bias must be a constant: float32 or quantised")
    if real.size not in (1, channels):
        raise node.fail(f"bias of {real.size} values for {channels} output channels")
    number = np.rint(real / scale)
    if not (np.abs(number) < 2.0**31).all():
        raise node.fail(f"bias {np.abs(number).max()} accumulator units; int32 is the limit")
    return np.ascontiguousarray(np.broadcast_to(number.astype(np.int32), (channels,)))


def convolution(
    state: GraphBuilder, node: Node, x: Dequantised, w: Value | None, b: Value | None
) -> Pending:
    array, w_scale = weights(node, w, 0)
    x, (n, c, *image) = state.image(node, x)
    rank = len(x.view.shape) - 2
    if array.ndim != rank + 2:
        raise node.fail(f"weights of rank {array.ndim}; {rank + 2} is needed")
    group = node.int("group", 1)
    outputs = array.shape[0]
    if group < 1 or c % group or outputs % group or array.shape[1] != c // group:
        raise node.fail(
            f"group = {group}, weights {list(array.shape)} do not fit {c} input channels"
        )
    kernel = node.ints("kernel_shape", array.shape[2:], 1, rank)
    if kernel != array.shape[2:]:
        raise node.fail(f"kernel_shape = {list(kernel)} but weights {list(array.shape)}")
    strides, pads, dilations, out = window(node, kernel, tuple(image))
    scale = np.float32(x.scale) * w_scale
    op = Conv(
        name=node.name,
        op_type=node.op_type,
        output="",
        low=-128,
        high=127,
        x=x.tensor,
        weights=np.ascontiguousarray(array.reshape(outputs, c // group, *pair(kernel))),
        bias=bias(node, b, scale),
        scale=scale,
        strides=strides,
        pads=pads,
        dilations=dilations,
        group=group,
    )
    return image_result(op, (n, outputs, *out), rank)


def matrix_product(
    state: GraphBuilder,
    node: Node,
    x: Dequantised,
    array: np.ndarray,
    scale: np.ndarray,
    b: np.ndarray,
    rows: tuple[int, ...] | None = None,
) -> Pending:
    """``x`` (..., K) times ``array`` (K, O): a 1x1 convolution where the K features are the stored
    channels; a convolution over the whole image where they are the flattened image; else they are
    moved first. ``rows`` is the leading shape of the result, if not that of ``x``."""
    features, outputs = array.shape
    lead = x.view.shape[:-1]
    if x.view.shape[-1] != features:
        raise node.fail(f"operand has {x.view.shape[-1]} columns, the constant {features} rows")
    flat = OnnxView(lead, x.view.dims[:-1]).reshape((math.prod(lead),)).dims
    layout = OnnxView((1, features, 1, math.prod(lead)), ((), x.view.dims[-1], (), flat[0]))
    view = state.bound(node, x, layout)
    n, _, h, w = stored = state.tensors[x.tensor].shape
    axes = OnnxView.contiguous(stored).dims
    across, along = merge(*view.dims[:-1]), view.dims[-1]
    if along == axes[1] and across == merge(axes[0], axes[2], axes[3]):
        kernel = array.T.reshape(outputs, features, 1, 1)
        shape = (n, outputs, h, w)
    else:
        for order in itertools.permutations((1, 2, 3)):
            if across == axes[0] and along == merge(*(axes[i] for i in order)):
                break
        else:
            index = state.positions(x).reshape(math.prod(lead), features)
            return matrix_product(
                state, node, state.rearranged(node, x, index), array, scale, b, lead
            )
        split = array.T.reshape(outputs, *(stored[i] for i in order))
        kernel = split.transpose(0, *(1 + order.index(i) for i in (1, 2, 3)))
        shape = (n, outputs, 1, 1)
    op = Conv(
        name=node.name,
        op_type=node.op_type,
        output="",
        low=-128,
        high=127,
        x=x.tensor,
        weights=np.ascontiguousarray(kernel),
        bias=b,
        scale=scale,
        strides=(1, 1),
        pads=(0, 0, 0, 0),
        dilations=(1, 1),
    )
    result = OnnxView.contiguous(shape).transpose((0, 2, 3, 1)).reshape((*(rows or lead), outputs))
    return Pending(op, shape, result)


@operator("Conv")
def conv(state: GraphBuilder, node: Node) -> Value:
    """1-D and 2-D, any group, stride, dilation, padding, ``auto_pad``; constant weights."""
    x = state.activation(node, 0)
    return convolution(state, node, x, state.operand(node, 1), state.operand(node, 2))


@operator("MatMul")
def matmul(state: GraphBuilder, node: Node) -> Value:
    """Activation (..., K) times a constant (K, N), or times an activation (..., K, N), batches
    broadcast; the latter on square arrays (rows = cols). A constant quantised per tensor may stand
    for the first activation."""
    x, w = state.activation(node, 0), state.operand(node, 1)
    if isinstance(w, Const | QuantConst):
        return product(state, node, x, w)
    return activation_product(state, node, x, state.real(node, w, 1))


def product(state: GraphBuilder, node: Node, x: Dequantised, w: Value | None) -> Pending:
    array, w_scale = weights(node, w, -1)
    if array.ndim != 2:
        raise node.fail(f"constant of rank {array.ndim}; 2 is needed")
    scale = np.float32(x.scale) * w_scale
    return matrix_product(state, node, x, array, scale, np.zeros(array.shape[1], np.int32))


@operator("Gemm")
def gemm(state: GraphBuilder, node: Node) -> Value:
    """Activation times a constant plus a constant; transA, transB; any alpha > 0; beta 0 or 1."""
    return general_product(
        state, node, state.activation(node, 0), state.operand(node, 1), state.operand(node, 2)
    )


def general_product(
    state: GraphBuilder, node: Node, x: Dequantised, w: Value | None, c: Value | None
) -> Pending:
    alpha, beta = np.float32(node.float("alpha", 1.0)), node.float("beta", 1.0)
    if not (np.isfinite(alpha) and alpha > 0):
        raise node.fail(f"alpha = {alpha}: it must be positive")
    if beta not in (0.0, 1.0):
        raise node.fail(f"beta = {beta}: it must be 0 or 1")
    across = bool(node.int("transB", 0))
    array, w_scale = weights(node, w, 0 if across else 1)
    if array.ndim != 2 or len(x.view.shape) != 2:
        raise node.fail("both operands must be of rank 2")
    if node.int("transA", 0):
        x = replace(x, view=x.view.transpose((1, 0)))
    scale = alpha * x.scale * w_scale
    b = bias(node, c if beta else None, scale)
    return matrix_product(state, node, x, array.T if across else array, scale, b)


@operator("ConvTranspose")
def conv_transpose(state: GraphBuilder, node: Node) -> Value:
    """1-D and 2-D, any group, stride, dilation, padding, ``output_padding``, ``output_shape``,
    ``auto_pad``; constant weights."""
    array, w_scale = weights(node, state.operand(node, 1), 1)
    x, (n, c, *image) = state.image(node, state.activation(node, 0))
    rank = len(x.view.shape) - 2
    if array.ndim != rank + 2:
        raise node.fail(f"weights of rank {array.ndim}; {rank + 2} is needed")
    group = node.int("group", 1)
    if group < 1 or c % group or array.shape[0] != c:
        raise node.fail(
            f"group = {group}, weights {list(array.shape)} do not fit {c} input channels"
        )
    kernel = node.ints("kernel_shape", array.shape[2:], 1, rank)
    if kernel != array.shape[2:]:
        raise node.fail(f"kernel_shape = {list(kernel)} but weights {list(array.shape)}")
    strides, pads, dilations, out, missing = transposed_window(node, kernel, tuple(image))
    outputs = array.shape[1] * group
    array = _spread(array.reshape(*array.shape[:2], *pair(kernel)), group)
    array = np.pad(array, ((0, 0), (0, 0), *((0, m) for m in missing)))
    scale = np.float32(x.scale) * np.tile(w_scale, group)
    op = ConvTranspose(
        name=node.name,
        op_type=node.op_type,
        output="",
        low=-128,
        high=127,
        x=x.tensor,
        weights=np.ascontiguousarray(array),
        bias=bias(node, state.operand(node, 2), scale),
        scale=scale,
        strides=strides,
        pads=pads,
        dilations=dilations,
        group=group,
    )
    return image_result(op, (n, outputs, *out), rank)


def _spread(array: np.ndarray, group: int) -> np.ndarray:
    """(C, O / group, kh, kw) as (O, C, kh, kw), zeros between groups."""
    c, per = array.shape[:2]
    out = np.zeros((group, per, group, c // group, *array.shape[2:]), array.dtype)
    for g, part in enumerate(array.reshape(group, c // group, *array.shape[1:])):
        out[g, :, g] = part.swapaxes(0, 1)
    return out.reshape(group * per, c, *array.shape[2:])
