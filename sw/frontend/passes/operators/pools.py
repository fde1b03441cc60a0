"""Pooling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from systole.sw.frontend.passes.layout import OnnxView
from systole.sw.frontend.passes.lower import GraphBuilder
from systole.sw.frontend.passes.operators.registry import operator
from systole.sw.frontend.passes.operators.window import counts, image_result, pair, window
from systole.sw.frontend.passes.values import Dequantised, Node, Pending, Quantised, Value
from systole.sw.ir.graph import Conv, Pool


@operator("MaxPool")
def max_pool(state: GraphBuilder, node: Node) -> Value:
    """1-D and 2-D, any stride, dilation, padding, ``auto_pad``, ``ceil_mode``; of a dequantised or
    an int8/uint8 activation."""
    if node.int("storage_order", 0):
        raise node.fail("storage_order = 1: it must be 0")
    return maximum(state, node, lambda x: pool(state, node, x, "max"))


def maximum(state: GraphBuilder, node: Node, of: Callable[[Dequantised], Pending]) -> Value:
    """A maximum ``of`` the first operand, which may be int8 or uint8 itself."""
    value = state.operand(node, 0)
    if not isinstance(value, Quantised):
        return of(state.activation(node, 0))
    quant = state.known_quant(node, value)
    pending = of(Dequantised(value.tensor, value.view, quant.scale))
    return state.quantise(node, pending, quant)


@operator("AveragePool")
def average_pool(state: GraphBuilder, node: Node) -> Value:
    """1-D and 2-D, any stride, dilation, padding, ``auto_pad``, ``count_include_pad``;
    ``ceil_mode``, without windows that overhang counted padding."""
    return pool(state, node, state.activation(node, 0), "average")


def pool(state: GraphBuilder, node: Node, x: Dequantised, kind: str) -> Pending:
    x, (n, c, *image) = state.image(node, x)
    rank = len(x.view.shape) - 2
    kernel = node.ints("kernel_shape", None, 1, rank)
    if kernel is None:
        raise node.fail("kernel_shape is missing")
    given = node.ints("pads", (), 0)
    if any(p >= k for p, k in zip(given, kernel * 2, strict=False)):
        raise node.fail(f"pads = {list(given)}: each must be less than kernel_shape {list(kernel)}")
    auto = node.string("auto_pad", "NOTSET")
    if auto.startswith("SAME") and max(node.ints("dilations", (1,))) > 1:
        raise node.fail(f"auto_pad = {auto!r} with dilations: they must be 1")
    strides, pads, dilations, out = window(node, kernel, tuple(image))
    op = _pool(node, x, kind, pair(kernel), strides, pads, dilations)
    if kind == "average" and any(pads):
        if not node.int("count_include_pad", 0):
            op = replace(op, counts=counts(node, op, tuple(image), out))
        elif auto == "NOTSET" and sum(pads) > sum(given):
            raise node.fail(
                "ceil_mode = 1 with a window overhanging the padding, which count_include_pad = 1 "
                "is not defined alike for: one of them must be 0"
            )
    return image_result(op, (n, c, *out), rank)


@operator("GlobalAveragePool")
def global_average_pool(state: GraphBuilder, node: Node) -> Value:
    """Of (N, C, H, W) and (N, C, W): of up to 63 rows and columns, or of as many elements as such
    an image has."""
    return over_image(state, node, state.activation(node, 0), "average")


@operator("GlobalMaxPool")
def global_max_pool(state: GraphBuilder, node: Node) -> Value:
    """Of (N, C, H, W) and (N, C, W); of a dequantised or an int8/uint8 activation."""
    return maximum(state, node, lambda x: over_image(state, node, x, "max"))


@operator("ReduceMean")
def reduce_mean(state: GraphBuilder, node: Node) -> Value:
    """Of 3 or 4 dimensions, over any of (N, C, H, W) but N and C, over those between the first and
    the last, or over C alone."""
    x = state.activation(node, 0)
    axes = _axes(state, node, x)
    if axes == (1,) and _channel_axis(state, node, x) == 1:
        return _kept(node, _channel_mean(state, node, x), axes)
    return _reduced(state, node, x, "average", axes)


@operator("ReduceMax")
def reduce_max(state: GraphBuilder, node: Node) -> Value:
    """As ReduceMean, but not over C alone; of a dequantised or an int8/uint8 activation."""
    return maximum(state, node, lambda x: _reduced(state, node, x, "max", _axes(state, node, x)))


def _axes(state: GraphBuilder, node: Node, x: Dequantised) -> tuple[int, ...]:
    """The dimensions of ``x`` that are reduced."""
    axes = node.ints("axes", None)
    if axes is None:
        given = state.const(node, 1, "axes")
        axes = () if given is None else tuple(int(a) for a in given.reshape(-1))
    rank = len(x.view.shape)
    if any(not -rank <= a < rank for a in axes):
        raise node.fail(f"axes = {list(axes)} outside {-rank}..{rank - 1}")
    made = tuple(sorted({a % rank for a in axes}))
    if rank not in (3, 4) or not made or made[0] == 0 or len(made) > 2:
        raise node.fail(
            f"axes = {list(axes)} of {rank} dimensions: one or two of the last of 3 or 4"
        )
    if node.int("keepdims", 1) not in (0, 1):
        raise node.fail(f"keepdims = {node.int('keepdims', 1)}: it must be 0 or 1")
    return made


def _channel_axis(state: GraphBuilder, node: Node, x: Dequantised) -> int | None:
    """The dimension of ``x`` that is stored as channels, if one is."""
    view = state.bound(node, x, None)
    channels = OnnxView.contiguous(state.tensors[x.tensor].shape).dims[1]
    return next((i for i, dim in enumerate(view.dims) if dim and dim == channels), None)


def _channel_mean(state: GraphBuilder, node: Node, x: Dequantised) -> Pending:
    """The mean over all channels, a convolution with weights of one."""
    x, (n, c, h, w) = state.image(node, x)
    op = Conv(
        name=node.name,
        op_type=node.op_type,
        output="",
        low=-128,
        high=127,
        x=x.tensor,
        weights=np.ones((1, c, 1, 1), np.int8),
        bias=np.zeros(1, np.int32),
        scale=np.full(1, x.scale / np.float32(c)),
        strides=(1, 1),
        pads=(0, 0, 0, 0),
        dilations=(1, 1),
    )
    return image_result(op, (n, 1, h, w), len(x.view.shape) - 2)


def _reduced(
    state: GraphBuilder, node: Node, x: Dequantised, kind: str, axes: tuple[int, ...]
) -> Pending:
    rank = len(x.view.shape)
    perm = tuple(range(rank))
    if 1 in axes:  # channels last
        if rank - 1 in axes:
            raise node.fail(f"axes = {list(axes)}: of channels and positions one must stay")
        perm = (0, rank - 1, *range(1, rank - 1))
    x, (n, c, *image) = state.image(node, replace(x, view=x.view.transpose(perm)))
    window = tuple(perm.index(a) + 2 - rank for a in axes)
    kernel = tuple(size if i in window else 1 for i, size in enumerate(image))
    op = _pool(node, x, kind, kernel, (1, 1), (0, 0, 0, 0), (1, 1))
    out = (size - k + 1 for size, k in zip(image, kernel, strict=True))
    pending = image_result(op, (n, c, *out), rank - 2)
    back = tuple(perm.index(i) for i in range(rank))
    return _kept(node, replace(pending, view=pending.view.transpose(back)), axes)


def _kept(node: Node, pending: Pending, axes: tuple[int, ...]) -> Pending:
    """With the reduced dimensions as 1, or without them."""
    if node.int("keepdims", 1):
        return pending
    shape = [d for i, d in enumerate(pending.view.shape) if i not in axes]
    return replace(pending, view=pending.view.reshape(shape))


def over_image(state: GraphBuilder, node: Node, x: Dequantised, kind: str) -> Pending:
    x, (n, c, h, w) = state.image(node, x)
    op = _pool(node, x, kind, (h, w), (1, 1), (0, 0, 0, 0), (1, 1))
    return image_result(op, (n, c, 1, 1), len(x.view.shape) - 2)


def _pool(node: Node, x: Dequantised, kind, kernel, strides, pads, dilations) -> Pool:
    return Pool(
        name=node.name,
        op_type=node.op_type,
        output="",
        low=-128,
        high=127,
        x=x.tensor,
        kind=kind,
        kernel=kernel,
        strides=strides,
        pads=pads,
        dilations=dilations,
        scale=x.scale,
    )
