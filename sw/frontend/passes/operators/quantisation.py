"""QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

import numpy as np

from systole.sw.frontend.passes.operators.registry import operator
from systole.sw.frontend.passes.state import LoweringState
from systole.sw.frontend.passes.values import Const, Node, QuantConst, Quantised, Value


@operator("QuantizeLinear")
def quantize_linear(state: LoweringState, node: Node) -> Value:
    """Quantises a float input, an activation, an unquantised result or a constant to int8 or
    uint8. Activations are quantised per tensor, constants per tensor or per channel.
    The scale and the zero point are constant."""
    value = state.results.operand(node, 0)
    if isinstance(value, Const):
        return _quantise_const(state, node, value.array)
    return state.quantiser.quantise(node, value, state.results.quantize_linear(node))


@operator("DequantizeLinear")
def dequantize_linear(state: LoweringState, node: Node) -> Value:
    """Dequantises an int8 or uint8 activation, or an int4, uint4, int8, uint8 or int32 constant.
    Activations are quantised per tensor, constants per tensor or per channel.
    The scale and the zero point are constant. ``block_size`` is 0."""
    value = state.results.operand(node, 0)
    if isinstance(value, Const):
        return quant_const(state, node, value.array, 1, node.integer("axis", 1))
    unsigned = isinstance(value, Quantised) and state.tensors.is_unsigned(value.tensor)
    return state.operands.dequantise(node, value, state.results.quant(node, 1, unsigned=unsigned))


def quant_const(
    state: LoweringState, node: Node, array: np.ndarray, scale_index: int, axis: int
) -> QuantConst:
    """``array`` with the scale at input ``scale_index`` and the zero point behind it, one value or
    one for each element of ``axis``."""
    scale = state.results.scale(node, scale_index)
    zero = state.results.const(node, scale_index + 1, "zero point")
    zero = np.zeros((), array.dtype) if zero is None else zero
    array, zero = _in_bytes(array), _in_bytes(zero)
    if array.dtype not in (np.int8, np.uint8, np.int32):
        raise node.fail(f"its constant has type {array.dtype}; int8, uint8 or int32 is needed")
    if zero.dtype != array.dtype:
        raise node.fail(f"its zero point has type {zero.dtype}, its constant {array.dtype}")
    if block := node.integer("block_size", 0):
        raise node.fail(
            f"it has a scale for every {block} elements (block_size = {block}); one scale for all, "
            "or one per output channel, is needed"
        )
    axis = axis % array.ndim if array.ndim else 0
    for what, values in (("scale", scale), ("zero point", zero)):
        if values.size != 1 and values.shape != array.shape[axis : axis + 1]:
            raise node.fail(
                f"{what} of shape {list(values.shape)} does not fit axis {axis} of "
                f"{list(array.shape)}"
            )
    return QuantConst(array, scale.reshape(-1), zero.reshape(-1), axis)


def _in_bytes(array: np.ndarray) -> np.ndarray:
    """Numbers of 4 bits as the same numbers of 8."""
    wider = {"int4": np.int8, "uint4": np.uint8}.get(array.dtype.name)
    return array if wider is None else array.astype(wider)


def _quantise_const(state: LoweringState, node: Node, array: np.ndarray) -> Const:
    """What QuantizeLinear computes from a float constant."""
    scale = state.results.scale(node, 1)
    zero = state.results.const(node, 2, "zero point")
    zero = np.zeros((), np.uint8) if zero is None else zero
    if array.dtype != np.float32 or zero.dtype not in (np.int8, np.uint8):
        raise node.fail(
            f"its constant goes from {array.dtype} to {zero.dtype}; only from float32 to int8 or "
            "uint8 is supported"
        )
    shape = [1] * array.ndim
    if scale.size > 1:
        axis = node.integer("axis", 1) % array.ndim
        if scale.shape != array.shape[axis : axis + 1] or zero.size not in (1, scale.size):
            raise node.fail(f"scale of shape {list(scale.shape)} does not fit axis {axis}")
        shape[axis] = -1
    limits = np.iinfo(zero.dtype)
    number = np.rint(array / scale.reshape(shape)) + zero.reshape(shape if zero.size > 1 else ())
    return Const(np.clip(number, limits.min, limits.max).astype(zero.dtype))
