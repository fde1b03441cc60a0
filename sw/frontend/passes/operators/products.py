"""Convolution and matrix multiplication, by constants or of activations."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from systole.sw.frontend.passes.layout import OnnxView, Shape, merge
from systole.sw.frontend.passes.operators import large
from systole.sw.frontend.passes.operators.matrices import activation_product
from systole.sw.frontend.passes.operators.registry import operator
from systole.sw.frontend.passes.operators.window import image_result, transposed_window, window
from systole.sw.frontend.passes.state import LoweringState
from systole.sw.frontend.passes.values import (
    ADVICE,
    Const,
    Dequantised,
    Node,
    Pending,
    QuantConst,
    Value,
)
from systole.sw.ir.graph import Conv, ConvTranspose, ModelError

BIAS_TOLERANCE = 1e-4
"""Relative difference up to which a bias' scale counts as x_scale * w_scale."""


def weights(node: Node, value: Value | None, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights less their zero points, int8 or (where that does not suffice) int16, and their
    float32 scales along axis ``channels``."""
    if not isinstance(value, QuantConst):
        raise node.fail(f"its weights must be a quantised constant ({ADVICE})")
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


class Bias(NamedTuple):
    """A bias in units of sums."""

    number: np.ndarray
    """int32 (channels,)."""
    off: np.ndarray
    """float64 (channels,): by how much it is off, as it is whole."""

    @staticmethod
    def none(channels: int) -> Bias:
        """That of an operator that has none."""
        return Bias(np.zeros(channels, np.int32), np.zeros(channels))


def bias(node: Node, value: Value | None, scale: np.ndarray) -> Bias:
    """A bias in units of ``scale`` (x_scale * w_scale). int32 of that scale is taken as it is, any
    other constant is rounded to it, as onnxruntime does with float32."""
    channels = scale.shape[0]
    if value is None:
        return Bias.none(channels)
    if not isinstance(value, QuantConst) and not (
        isinstance(value, Const) and value.array.dtype == np.float32
    ):
        raise node.fail("its bias must be a constant: float32 or quantised")
    array = value.array.reshape(-1)
    if array.size not in (1, channels):
        raise node.fail(f"bias of {array.size} values for {channels} output channels")
    real = value.real if isinstance(value, QuantConst) else array.astype(np.float64)
    units = np.broadcast_to(real.reshape(-1) / scale, (channels,))
    number = np.rint(units)
    if isinstance(value, QuantConst) and array.dtype == np.int32 and not value.zero.any():
        same = np.allclose(value.scale, scale, rtol=BIAS_TOLERANCE, atol=0)
        number = np.broadcast_to(array, (channels,)) if same else number
    if not (np.abs(number) < 2.0**31).all():
        raise node.fail(f"bias of {np.abs(number).max():g} accumulator units; it must fit int32")
    return Bias(np.ascontiguousarray(number, np.int32), np.abs(units - number))


def convolution(
    state: LoweringState, node: Node, x: Dequantised, w: Value | None, b: Value | None
) -> Pending:
    """The node as a convolution of ``x`` by weights ``w`` with bias ``b``."""
    array, w_scale = weights(node, w, 0)
    x, (n, c, *image) = state.mover.image(node, x)
    rank = len(x.view.shape) - 2
    kernel, group = _kernel(node, array, rank), node.integer("group", 1)
    outputs = array.shape[0]
    if group < 1 or c % group or outputs % group or array.shape[1] != c // group:
        raise _unfit(node, array, group, c)
    place = window(node, kernel, (image[0], image[1]))
    scale = np.float32(x.scale) * w_scale
    added = bias(node, b, scale)
    op = Conv(
        **node.fields(),
        x=x.tensor,
        weights=np.ascontiguousarray(array.reshape(outputs, c // group, *place.kernel)),
        bias=added.number,
        off=added.off,
        scale=scale,
        strides=place.strides,
        pads=place.pads,
        dilations=place.dilations,
        group=group,
    )
    op = large.in_blocks(state, node, op, place.out)
    return image_result(op, (n, outputs, *place.out), rank)


def _kernel(node: Node, array: np.ndarray, rank: int) -> tuple[int, ...]:
    """The spatial size of weights, which ``kernel_shape`` must repeat."""
    if array.ndim != rank + 2:
        raise node.fail(f"weights of rank {array.ndim}; {rank + 2} is needed")
    size = tuple(array.shape[2:])
    kernel = node.integers("kernel_shape", size, low=1, count=rank)
    if kernel != size:
        raise node.fail(f"kernel_shape = {list(kernel)} but weights {list(array.shape)}")
    return kernel


def _unfit(node: Node, array: np.ndarray, group: int, channels: int) -> ModelError:
    return node.fail(
        f"group = {group}, weights {list(array.shape)} do not fit {channels} input channels"
    )


def matrix_product(
    state: LoweringState,
    node: Node,
    x: Dequantised,
    *,
    array: np.ndarray,
    scale: np.ndarray,
    bias: Bias,
    rows: tuple[int, ...] | None = None,
) -> Pending:
    """``x`` (..., K) times ``array`` (K, O).

    It is a 1x1 convolution where the K features are the stored channels, and a convolution over the
    whole image where they are the flattened image; otherwise the elements are moved first.
    ``rows`` is the leading shape of the result, if not that of ``x``."""
    features, outputs = array.shape
    lead = x.view.shape[:-1]
    if x.view.shape[-1] != features:
        raise node.fail(f"operand has {x.view.shape[-1]} columns, the constant {features} rows")
    flat = OnnxView(lead, x.view.dims[:-1]).reshape((math.prod(lead),)).dims
    layout = OnnxView((1, features, 1, math.prod(lead)), ((), x.view.dims[-1], (), flat[0]))
    view = state.tensors.checked_view(node, x, layout)
    kernel, shape = _as_convolution(view, state.tensors.shape(x.tensor), array)
    if kernel is None:
        index = state.tensors.positions(x).reshape(math.prod(lead), features)
        moved = state.mover.rearranged(node, x, index)
        return matrix_product(state, node, moved, array=array, scale=scale, bias=bias, rows=lead)
    op = Conv(
        **node.fields(),
        x=x.tensor,
        weights=np.ascontiguousarray(kernel),
        bias=bias.number,
        off=bias.off,
        scale=scale,
        strides=(1, 1),
        pads=(0, 0, 0, 0),
        dilations=(1, 1),
    )
    result = OnnxView.contiguous(shape).transpose((0, 2, 3, 1)).reshape((*(rows or lead), outputs))
    return Pending(op, shape, result)


def _as_convolution(
    view: OnnxView, stored: Shape, array: np.ndarray
) -> tuple[np.ndarray | None, Shape]:
    """The kernel and the result's shape of a convolution that multiplies ``view`` (..., K), on an
    array of shape ``stored``, by ``array`` (K, O); no kernel if none does."""
    features, outputs = array.shape
    n, _, h, w = stored
    axes = OnnxView.contiguous(stored).dims
    across, along = merge(*view.dims[:-1]), view.dims[-1]
    if along == axes[1] and across == merge(axes[0], axes[2], axes[3]):
        return array.T.reshape(outputs, features, 1, 1), (n, outputs, h, w)
    for order in itertools.permutations((1, 2, 3)):
        if across == axes[0] and along == merge(*(axes[i] for i in order)):
            split = array.T.reshape(outputs, *(stored[i] for i in order))
            kernel = split.transpose(0, *(1 + order.index(i) for i in (1, 2, 3)))
            return kernel, (n, outputs, 1, 1)
    return None, stored


@operator("Conv")
def conv(state: LoweringState, node: Node) -> Value:
    """Takes a dequantised activation (N, C, H, W) or (N, C, W).
    The weights are constant, int8 or uint8, quantised per tensor or per output channel.
    The bias is constant, float32 or quantised.
    Any group, padding and ``auto_pad`` are supported. Larger kernels than 63 rows or columns are
    made of blocks. Strides and dilations are at most 255."""
    x = state.operands.activation(node, 0)
    w, b = state.results.operand(node, 1), state.results.operand(node, 2)
    return convolution(state, node, x, w, b)


@operator("MatMul")
def matmul(state: LoweringState, node: Node) -> Value:
    """Computes a dequantised activation (..., K) times a constant (K, N), or times a dequantised
    activation (..., K, N), batches broadcast.
    The constant is int8 or uint8, quantised per tensor or per column. One of more dimensions
    holds the same matrix throughout, or is quantised per tensor.
    Of a product of two activations, K is at most 33025; arrays take it whose rows are a power of
    two or no more than their columns. A constant quantised per tensor may stand for the first
    activation."""
    x, w = state.operands.activation(node, 0), state.results.operand(node, 1)
    if isinstance(w, QuantConst) and (single := _single_matrix(w, x.view.shape)) is not None:
        result = product(state, node, x, single)
        lead = (1,) * (w.array.ndim - len(x.view.shape))
        return replace(result, view=result.view.reshape((*lead, *result.view.shape)))
    if isinstance(w, Const) or (isinstance(w, QuantConst) and w.array.ndim < 3):
        return product(state, node, x, w)
    return activation_product(state, node, x, state.operands.real(node, w, 1))


def _single_matrix(w: QuantConst, shape: tuple[int, ...]) -> QuantConst | None:
    """A constant of more than two dimensions as the one matrix that it holds, for an operand of
    ``shape``; None if it holds several, or more of one than the operand has."""
    if w.array.ndim < 3:
        return None
    *lead, rows, columns = w.array.shape
    batches = (*(1,) * len(lead), *shape[:-2])[-len(lead) :]
    matrices = w.array.reshape(-1, rows, columns)
    several = max(w.scale.size, w.zero.size) > 1 and w.axis < len(lead)
    fits = len(shape) > 1 and all(d in (1, own) for d, own in zip(lead, batches, strict=True))
    if several or not fits or (matrices != matrices[0]).any():
        return None
    return QuantConst(matrices[0], w.scale, w.zero, max(w.axis - len(lead), 0))


def product(state: LoweringState, node: Node, x: Dequantised, w: Value | None) -> Pending:
    """``x`` times the constant matrix ``w``."""
    array, w_scale = weights(node, w, -1)
    if array.ndim != 2:
        raise node.fail(f"constant of rank {array.ndim}; 2 is needed")
    scale = np.float32(x.scale) * w_scale
    none = Bias.none(array.shape[1])
    return matrix_product(state, node, x, array=array, scale=scale, bias=none)


@operator("Gemm")
def gemm(state: LoweringState, node: Node) -> Value:
    """Multiplies a dequantised activation by a constant matrix and adds a constant.
    The matrix is int8 or uint8, quantised per tensor or per output.
    The constant added is float32 or quantised, one value or one per output.
    ``transA`` and ``transB`` may be set. ``alpha`` is positive. ``beta`` is 0 or 1."""
    x = state.operands.activation(node, 0)
    w, c = state.results.operand(node, 1), state.results.operand(node, 2)
    return general_product(state, node, x, w, c)


def general_product(
    state: LoweringState, node: Node, x: Dequantised, w: Value | None, c: Value | None
) -> Pending:
    """The node as a Gemm of ``x``, matrix ``w`` and bias ``c``."""
    alpha, beta = np.float32(node.real("alpha", 1.0)), node.real("beta", 1.0)
    if not (np.isfinite(alpha) and alpha > 0):
        raise node.fail(f"alpha = {alpha}: it must be positive")
    if beta not in (0.0, 1.0):
        raise node.fail(f"beta = {beta}: it must be 0 or 1")
    across = bool(node.integer("transB", 0))
    array, w_scale = weights(node, w, 0 if across else 1)
    if array.ndim != 2 or len(x.view.shape) != 2:
        raise node.fail(
            f"operands of rank {len(x.view.shape)} and {array.ndim}; both must be of rank 2"
        )
    if node.integer("transA", 0):
        x = replace(x, view=x.view.transpose((1, 0)))
    scale = alpha * x.scale * w_scale
    added = bias(node, c if beta else None, scale)
    matrix = array.T if across else array
    return matrix_product(state, node, x, array=matrix, scale=scale, bias=added)


@operator("ConvTranspose")
def conv_transpose(state: LoweringState, node: Node) -> Value:
    """Takes a dequantised activation (N, C, H, W) or (N, C, W).
    The weights are constant, int8 or uint8, quantised per tensor or per output channel.
    The bias is constant, float32 or quantised.
    Any group, padding, ``auto_pad``, ``output_padding`` and ``output_shape`` are supported.
    Kernels have at most 63 rows and columns. Strides and dilations are at most 255."""
    array, w_scale = weights(node, state.results.operand(node, 1), 1)
    x, (n, c, *image) = state.mover.image(node, state.operands.activation(node, 0))
    rank = len(x.view.shape) - 2
    kernel, group = _kernel(node, array, rank), node.integer("group", 1)
    if group < 1 or c % group or array.shape[0] != c:
        raise _unfit(node, array, group, c)
    place = transposed_window(node, kernel, (image[0], image[1]))
    outputs = array.shape[1] * group
    array = _spread(array.reshape(*array.shape[:2], *place.kernel), group)
    array = np.pad(array, ((0, 0), (0, 0), *((0, zeros) for zeros in place.extension)))
    scale = np.float32(x.scale) * np.tile(w_scale, group)
    added = bias(node, state.results.operand(node, 2), scale)
    op = ConvTranspose(
        **node.fields(),
        x=x.tensor,
        weights=np.ascontiguousarray(array),
        bias=added.number,
        off=added.off,
        scale=scale,
        strides=place.strides,
        pads=place.pads,
        dilations=place.dilations,
        group=group,
    )
    return image_result(op, (n, outputs, *place.out), rank)


def _spread(array: np.ndarray, group: int) -> np.ndarray:
    """(C, O / group, kh, kw) as (O, C, kh, kw), zeros between groups."""
    c, per = array.shape[:2]
    out = np.zeros((group, per, group, c // group, *array.shape[2:]), array.dtype)
    for g, part in enumerate(array.reshape(group, c // group, *array.shape[1:])):
        out[g, :, g] = part.swapaxes(0, 1)
    return out.reshape(group * per, c, *array.shape[2:])
