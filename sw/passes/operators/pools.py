"""Pooling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from sw.graph import Pool
from sw.passes.lower import Lowering
from sw.passes.operators.registry import operator
from sw.passes.operators.window import counts, image_result, pair, window
from sw.passes.values import Dequantised, Node, Pending, Quantised, Value


@operator("MaxPool")
def max_pool(state: Lowering, node: Node) -> Value:
    """1-D and 2-D, any stride, dilation, padding, ``auto_pad``, ``ceil_mode``; of a dequantised or
    an int8/uint8 activation."""
    if node.int("storage_order", 0):
        raise node.fail("storage_order = 1: it must be 0")
    return maximum(state, node, lambda x: pool(state, node, x, "max"))


def maximum(state: Lowering, node: Node, of: Callable[[Dequantised], Pending]) -> Value:
    """A maximum ``of`` the first operand, which may be int8 or uint8 itself."""
    value = state.operand(node, 0)
    if not isinstance(value, Quantised):
        return of(state.activation(node, 0))
    quant = state.known_quant(node, value)
    pending = of(Dequantised(value.tensor, value.view, quant.scale))
    return state.quantise(node, pending, quant)


@operator("AveragePool")
def average_pool(state: Lowering, node: Node) -> Value:
    """1-D and 2-D, any stride, dilation, padding, ``auto_pad``, ``count_include_pad``;
    ``ceil_mode``, without windows that overhang counted padding."""
    return pool(state, node, state.activation(node, 0), "average")


def pool(state: Lowering, node: Node, x: Dequantised, kind: str) -> Pending:
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
def global_average_pool(state: Lowering, node: Node) -> Value:
    """Of (N, C, H, W) and (N, C, W)."""
    return over_image(state, node, state.activation(node, 0), "average", keep=True)


@operator("GlobalMaxPool")
def global_max_pool(state: Lowering, node: Node) -> Value:
    """Of (N, C, H, W) and (N, C, W); of a dequantised or an int8/uint8 activation."""
    return maximum(state, node, lambda x: over_image(state, node, x, "max", keep=True))


@operator("ReduceMean")
def reduce_mean(state: Lowering, node: Node) -> Value:
    """Over exactly the spatial dimensions of (N, C, H, W) or (N, C, W)."""
    x = state.activation(node, 0)
    return over_image(state, node, x, "average", keep=_reduced(state, node, x))


@operator("ReduceMax")
def reduce_max(state: Lowering, node: Node) -> Value:
    """As ReduceMean; of a dequantised or an int8/uint8 activation."""
    return maximum(
        state, node, lambda x: over_image(state, node, x, "max", keep=_reduced(state, node, x))
    )


def _reduced(state: Lowering, node: Node, x: Dequantised) -> bool:
    """Whether reduced dimensions stay, as 1; checks them."""
    rank = len(x.view.shape)
    axes = node.ints("axes", None)
    if axes is None:
        given = state.const(node, 1, "axes")
        axes = () if given is None else tuple(int(a) for a in given.reshape(-1))
    if rank not in (3, 4) or sorted(a % rank for a in axes) != list(range(2, rank)):
        raise node.fail(f"axes = {list(axes)}: only all spatial dimensions, 2 and up of 3 or 4")
    keep = node.int("keepdims", 1)
    if keep not in (0, 1):
        raise node.fail(f"keepdims = {keep}: it must be 0 or 1")
    return bool(keep)


def over_image(state: Lowering, node: Node, x: Dequantised, kind: str, keep: bool) -> Pending:
    x, (n, c, h, w) = state.image(node, x)
    op = _pool(node, x, kind, (h, w), (1, 1), (0, 0, 0, 0), (1, 1))
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
