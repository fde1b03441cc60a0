"""Pooling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import numpy as np

from systole.sw.frontend.passes.layout import OnnxView, Shape
from systole.sw.frontend.passes.operators import large
from systole.sw.frontend.passes.operators.registry import operator
from systole.sw.frontend.passes.operators.window import (
    Pair,
    Window,
    counts,
    image_result,
    pair,
    window,
)
from systole.sw.frontend.passes.state import LoweringState
from systole.sw.frontend.passes.values import Dequantised, Node, Pending, Quantised, Value
from systole.sw.ir.graph import Conv, Pool

PoolKind = Literal["max", "average"]


@operator("MaxPool")
def max_pool(state: LoweringState, node: Node) -> Value:
    """Takes a dequantised, int8 or uint8 activation (N, C, H, W) or (N, C, W).
    Larger kernels than 63 rows or columns are made of parts, up to 3969. Strides and dilations are
    at most 255.
    Any padding, ``auto_pad`` and ``ceil_mode`` are supported, but no dilations with ``auto_pad``
    SAME_UPPER or SAME_LOWER. ``storage_order`` is 0."""
    if node.integer("storage_order", 0):
        raise node.fail("storage_order = 1: it must be 0")
    return maximum(state, node, lambda x: pool(state, node, x, "max"))


def maximum(state: LoweringState, node: Node, of: Callable[[Dequantised], Pending]) -> Value:
    """A maximum ``of`` the first operand, which may be int8 or uint8 itself."""
    value = state.results.operand(node, 0)
    if not isinstance(value, Quantised):
        return of(state.operands.activation(node, 0))
    quant = state.tensors.known_quant(node, value.tensor)
    pending = of(Dequantised(value.tensor, value.view, quant.scale))
    return state.quantiser.quantise(node, pending, quant)


@operator("AveragePool")
def average_pool(state: LoweringState, node: Node) -> Value:
    """Takes a dequantised activation (N, C, H, W) or (N, C, W).
    Kernels with more than 63 rows or columns are a product by a constant, as MatMul's of two
    activations; padding, if there is any, counts. Strides and dilations are at most 255.
    Any padding, ``auto_pad``, ``ceil_mode`` and ``count_include_pad`` are supported, but no
    dilations with ``auto_pad`` SAME_UPPER or SAME_LOWER. With ``ceil_mode`` 1 and
    ``count_include_pad`` 1 no window may overhang the padding."""
    return pool(state, node, state.operands.activation(node, 0), "average")


def pool(state: LoweringState, node: Node, x: Dequantised, kind: PoolKind) -> Pending:
    """A pool of ``x`` with the node's window."""
    x, (n, c, *image) = state.mover.image(node, x)
    rank = len(x.view.shape) - 2
    size = (image[0], image[1])
    place, given = _window(node, rank, size)
    op = _pool(node, x, kind, place)
    if kind == "average" and any(place.pads):
        if not node.integer("count_include_pad", 0):
            op = replace(op, counts=counts(node, op, size, place.out))
        elif node.string("auto_pad", "NOTSET") == "NOTSET" and sum(place.pads) > sum(given):
            raise node.fail(
                "ceil_mode = 1 with a window overhanging the padding, which count_include_pad = 1 "
                "is not defined alike for: one of them must be 0"
            )
    return _result(state, node, op, (n, c, *place.out), rank)


def _window(node: Node, rank: int, image: Pair) -> tuple[Window, tuple[int, ...]]:
    """The node's window, and its attribute ``pads``."""
    kernel = node.integers("kernel_shape", None, low=1, count=rank)
    if kernel is None:
        raise node.fail("kernel_shape is missing")
    given = node.integers("pads", (), low=0)
    if any(p >= k for p, k in zip(given, kernel * 2, strict=False)):
        raise node.fail(f"pads = {list(given)}: each must be less than kernel_shape {list(kernel)}")
    auto = node.string("auto_pad", "NOTSET")
    dilations = node.integers("dilations", (1,))
    if auto.startswith("SAME") and max(dilations) > 1:
        raise node.fail(f"auto_pad = {auto!r} with dilations = {list(dilations)}: each must be 1")
    return window(node, kernel, image), given


@operator("GlobalAveragePool")
def global_average_pool(state: LoweringState, node: Node) -> Value:
    """Takes a dequantised activation (N, C, H, W) or (N, C, W).
    An image of more elements than 63 rows and 63 columns is a product by a constant, as MatMul's of
    two activations."""
    return over_image(state, node, state.operands.activation(node, 0), "average")


@operator("GlobalMaxPool")
def global_max_pool(state: LoweringState, node: Node) -> Value:
    """Takes a dequantised, int8 or uint8 activation (N, C, H, W) or (N, C, W).
    The image has at most 3969 rows and columns."""
    return maximum(state, node, lambda x: over_image(state, node, x, "max"))


@operator("ReduceMean")
def reduce_mean(state: LoweringState, node: Node) -> Value:
    """Takes a dequantised activation of 3 or 4 dimensions.
    ``axes`` is constant, one or two dimensions, and not the first. It does not hold both the second
    and the last dimension. Reduced dimensions of more than 63 elements, or of a whole image more
    than 63 rows and 63 columns hold, are a product by a constant, as MatMul's of two
    activations."""
    x = state.operands.activation(node, 0)
    axes = _axes(state, node, x)
    if axes == (1,) and _channel_axis(state, node, x) == 1:
        return _kept(node, _channel_mean(state, node, x), axes)
    return _reduced(state, node, x, "average", axes)


@operator("ReduceMax")
def reduce_max(state: LoweringState, node: Node) -> Value:
    """Takes a dequantised, int8 or uint8 activation of 3 or 4 dimensions.
    ``axes`` is constant, one or two dimensions, and not the first. It does not hold both the second
    and the last dimension. Each reduced dimension has at most 3969 elements."""
    return maximum(state, node, lambda x: _reduced(state, node, x, "max", _axes(state, node, x)))


def _axes(state: LoweringState, node: Node, x: Dequantised) -> tuple[int, ...]:
    """The dimensions of ``x`` that are reduced."""
    axes = node.integers("axes", None)
    if axes is None:
        given = state.results.const(node, 1, "axes")
        axes = () if given is None else tuple(int(a) for a in given.reshape(-1))
    rank = len(x.view.shape)
    if any(not -rank <= a < rank for a in axes):
        raise node.fail(f"axes = {list(axes)}: each must be in {-rank}..{rank - 1}")
    reduced = tuple(sorted({a % rank for a in axes}))
    if rank not in (3, 4):
        raise node.fail(f"operand of {rank} dimensions; 3 or 4 are needed")
    if not reduced or reduced[0] == 0 or len(reduced) > 2:
        raise node.fail(
            f"axes = {list(axes)}: it must be one or two of the last {rank - 1} dimensions"
        )
    if node.integer("keepdims", 1) not in (0, 1):
        raise node.fail(f"keepdims = {node.integer('keepdims', 1)}: it must be 0 or 1")
    return reduced


def _channel_axis(state: LoweringState, node: Node, x: Dequantised) -> int | None:
    """The dimension of ``x`` that is stored as channels, if one is."""
    view = state.tensors.checked_view(node, x)
    channels = OnnxView.contiguous(state.tensors.shape(x.tensor)).dims[1]
    return next((i for i, dim in enumerate(view.dims) if dim and dim == channels), None)


def _channel_mean(state: LoweringState, node: Node, x: Dequantised) -> Pending:
    """The mean over all channels, a convolution with weights of one."""
    x, (n, c, h, w) = state.mover.image(node, x)
    op = Conv(
        **node.fields(),
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
    state: LoweringState, node: Node, x: Dequantised, kind: PoolKind, axes: tuple[int, ...]
) -> Pending:
    """A pool of ``x`` over the dimensions ``axes``."""
    rank = len(x.view.shape)
    perm = tuple(range(rank))
    if 1 in axes:  # channels last
        if rank - 1 in axes:
            raise node.fail(
                f"axes = {list(axes)}: the second and the last dimension cannot both be reduced"
            )
        perm = (0, rank - 1, *range(1, rank - 1))
    x, (n, c, *image) = state.mover.image(node, replace(x, view=x.view.transpose(perm)))
    reduced = [perm.index(a) + 2 - rank for a in axes]
    kernel = pair([size if i in reduced else 1 for i, size in enumerate(image)])
    out = pair([1 if i in reduced else size for i, size in enumerate(image)])
    op = _pool(node, x, kind, _plain_window(kernel, out))
    pending = _result(state, node, op, (n, c, *out), rank - 2)
    back = tuple(perm.index(i) for i in range(rank))
    return _kept(node, replace(pending, view=pending.view.transpose(back)), axes)


def _kept(node: Node, pending: Pending, axes: tuple[int, ...]) -> Pending:
    """With the reduced dimensions as 1, or without them."""
    if node.integer("keepdims", 1):
        return pending
    shape = [d for i, d in enumerate(pending.view.shape) if i not in axes]
    return replace(pending, view=pending.view.reshape(shape))


def over_image(state: LoweringState, node: Node, x: Dequantised, kind: PoolKind) -> Pending:
    """A pool of each whole image of ``x``."""
    x, (n, c, h, w) = state.mover.image(node, x)
    op = _pool(node, x, kind, _plain_window((h, w), (1, 1)))
    return _result(state, node, op, (n, c, 1, 1), len(x.view.shape) - 2)


def _result(state: LoweringState, node: Node, op: Pool, shape: Shape, rank: int) -> Pending:
    """The result of ``op``, an image of ``rank`` spatial dimensions, whatever its window's size."""
    source, out = state.tensors.shape(op.x), (shape[2], shape[3])
    if not large.exceeds(op, source):
        return image_result(op, shape, rank)
    if op.kind == "max":
        return image_result(large.in_two_steps(state, node, op, source, out), shape, rank)
    return image_result(large.as_product(state, node, op, source, out), shape, rank)


def _pool(node: Node, x: Dequantised, kind: PoolKind, place: Window) -> Pool:
    return Pool(
        **node.fields(),
        x=x.tensor,
        kind=kind,
        kernel=place.kernel,
        strides=place.strides,
        pads=place.pads,
        dilations=place.dilations,
        scale=x.scale,
    )


def _plain_window(kernel: Pair, out: Pair) -> Window:
    """A window without strides, padding and dilations."""
    return Window(kernel=kernel, strides=(1, 1), pads=(0, 0, 0, 0), dilations=(1, 1), out=out)
