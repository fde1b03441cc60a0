"""QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

import numpy as np

from systole.sw.frontend.passes.lower import GraphBuilder
from systole.sw.frontend.passes.operators.registry import operator
from systole.sw.frontend.passes.values import Const, Node, QuantConst, Quantised, Value


@operator("QuantizeLinear")
def quantize_linear(state: GraphBuilder, node: Node) -> Value:
    """Per tensor, to int8 or uint8; of a float input, an activation, an operator's result, or a
    constant (weights, also per channel)."""
    value = state.operand(node, 0)
    if isinstance(value, Const):
        return _quantise_const(state, node, value.array)
    return state.quantise(node, value, state.quant_of(node))


@operator("DequantizeLinear")
def dequantize_linear(state: GraphBuilder, node: Node) -> Value:
    """Per tensor for int8 and uint8 activations; per tensor or per channel for constants."""
    value = state.operand(node, 0)
    if isinstance(value, Const):
        return quant_const(state, node, value.array, 1, node.int("axis", 1))
    unsigned = isinstance(value, Quantised) and state.tensors[value.tensor].unsigned
    return state.dequantise(node, value, state.quant(node, 1, unsigned=unsigned))


def quant_const(
    state: GraphBuilder, node: Node, array: np.ndarray, scale_index: int, axis: int
) -> QuantConst:
    scale = state.scale(node, scale_index)
    zero = state.const(node, scale_index + 1, "zero point")
    zero = np.zeros((), array.dtype) if zero is None else zero
    if array.dtype not in (np.int8, np.uint8, np.int32):
        raise node.fail(f"constant of type {array.dtype}; int8, uint8 or int32 is needed")
    if zero.dtype != array.dtype:
        raise node.fail(f"zero point is {zero.dtype}, its constant {array.dtype}")
    if node.int("block_size", 0):
        raise node.fail(f"block_size = {node.int('block_size', 0)}: blocks are not supported (0)")
    axis = axis % array.ndim if array.ndim else 0
    for what, values in (("scale", scale), ("zero point", zero)):
        if values.size != 1 and values.shape != array.shape[axis : axis + 1]:
            raise node.fail(
                f"{what} of shape {list(values.shape)} does not fit axis {axis} of "
                f"{list(array.shape)}"
            )
    return QuantConst(array, scale.reshape(-1), zero.reshape(-1), axis)


def _quantise_const(state: GraphBuilder, node: Node, array: np.ndarray) -> Const:
    scale = state.scale(node, 1)
    zero = state.const(node, 2, "zero point")
    zero = np.zeros((), np.uint8) if zero is None else zero
    if array.dtype != np.float32 or zero.dtype not in (np.int8, np.uint8):
        raise node.fail(f"constant {array.dtype} to {zero.dtype}; float32 to int8 or uint8")
    shape = [1] * array.ndim
    if scale.size > 1:
        axis = node.int("axis", 1) % array.ndim
        if scale.shape != array.shape[axis : axis + 1] or zero.size not in (1, scale.size):
            raise node.fail(f"scale of shape {list(scale.shape)} does not fit axis {axis}")
        shape[axis] = -1
    limits = np.iinfo(zero.dtype)
    number = np.rint(array / scale.reshape(shape)) + zero.reshape(shape if zero.size > 1 else ())
    return Const(np.clip(number, limits.min, limits.max).astype(zero.dtype))
