"""Pooling."""

from __future__ import annotations

from dataclasses import replace

from sw.graph import Pool
from sw.passes.lower import Lowering
from sw.passes.operators.registry import operator
from sw.passes.operators.window import image_result, pair, window
from sw.passes.values import Dequantised, Node, Pending, Quantised, Value


@operator("MaxPool")
def max_pool(state: Lowering, node: Node) -> Value:
    """1-D and 2-D, any stride, dilation, padding, ``auto_pad``, ``ceil_mode``; of a dequantised or
    an int8/uint8 activation."""
    if node.int("storage_order", 0):
        raise node.fail("storage_order = 1: it must be 0")
    value = state.operand(node, 0)
    if isinstance(value, Quantised):
        quant = state.known_quant(node, value)
        pending = pool(state, node, Dequantised(value.tensor, value.view, quant.scale), "max")
        return state.quantise(node, pending, quant)
    return pool(state, node, state.activation(node, 0), "max")


@operator("AveragePool")
def average_pool(state: Lowering, node: Node) -> Value:
    """1-D and 2-D; padding only with ``count_include_pad`` 1, without ``ceil_mode``'s overhang."""
    return pool(state, node, state.activation(node, 0), "average")


def pool(state: Lowering, node: Node, x: Dequantised, kind: str) -> Pending:
    x, (n, c, *image) = state.image(node, x)
    rank = len(x.view.shape) - 2
    kernel = node.ints("kernel_shape", None, 1, rank)
    if kernel is None:
        raise node.fail("kernel_shape is missing")
    strides, pads, dilations, out = window(node, kernel, tuple(image), kind == "average")
    if kind == "average" and any(pads) and not node.int("count_include_pad", 0):
        raise node.fail(
            f"count_include_pad = 0 with pads = {list(pads)}: only without padding, or 1"
        )
    op = _pool(node, x, kind, pair(kernel), strides, pads, dilations)
    return image_result(op, (n, c, *out), rank)


@operator("GlobalAveragePool")
def global_average_pool(state: Lowering, node: Node) -> Value:
    """Of (N, C, H, W) and (N, C, W)."""
    return mean(state, node, state.activation(node, 0), keep=True)


@operator("ReduceMean")
def reduce_mean(state: Lowering, node: Node) -> Value:
    """Over exactly the spatial dimensions of (N, C, H, W) or (N, C, W)."""
    x = state.activation(node, 0)
    rank = len(x.view.shape)
    axes = node.ints("axes", None)
    if axes is None:
        given = state.const(node, 1, "axes")
        axes = () if given is None else tuple(int(a) for a in given.reshape(-1))
    if sorted(a % rank for a in axes) != list(range(2, rank)):
        raise node.fail(f"axes = {list(axes)}: only all spatial dimensions 2..{rank - 1}")
    return mean(state, node, x, keep=bool(node.int("keepdims", 1)))


def mean(state: Lowering, node: Node, x: Dequantised, keep: bool) -> Pending:
    x, (n, c, h, w) = state.image(node, x)
    op = _pool(node, x, "average", (h, w), (1, 1), (0, 0, 0, 0), (1, 1))
    pending = image_result(op, (n, c, 1, 1), len(x.view.shape) - 2)
    return pending if keep else replace(pending, view=pending.view.reshape((n, c)))


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
