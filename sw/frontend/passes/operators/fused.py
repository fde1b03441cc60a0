"""Operators of fused form: dequantise, operator, quantise in one node."""

from __future__ import annotations

import numpy as np

from systole.sw.frontend.passes.operators.elementwise import arithmetic_of
from systole.sw.frontend.passes.operators.matrices import activation_product
from systole.sw.frontend.passes.operators.pools import over_image, pool
from systole.sw.frontend.passes.operators.products import convolution, general_product, product
from systole.sw.frontend.passes.operators.quantisation import quant_const
from systole.sw.frontend.passes.operators.registry import MICROSOFT, operator
from systole.sw.frontend.passes.state import LoweringState
from systole.sw.frontend.passes.values import Const, Node, QuantConst, Value


def _weights(state: LoweringState, node: Node, index: int, axis: int) -> QuantConst:
    """The constant at ``index`` with its scale and zero point in the next two inputs."""
    array = state.results.const(node, index, "weights")
    if array is None:
        raise node.fail("weights are missing")
    return quant_const(state, node, array, index + 1, axis)


def _bias(state: LoweringState, node: Node, index: int, scale: np.ndarray) -> QuantConst | None:
    """The int32 bias at ``index``, in units of ``scale``."""
    array = state.results.const(node, index, "bias")
    if array is None:
        return None
    if array.dtype != np.int32:
        raise node.fail(f"bias has type {array.dtype}; int32 is needed")
    return QuantConst(array, scale, np.zeros(1, np.int32), 0)


@operator("QLinearConv")
def qlinear_conv(state: LoweringState, node: Node) -> Value:
    """As Conv. The bias is int32."""
    x, w = state.operands.fused(node, 0), _weights(state, node, 3, 0)
    pending = convolution(state, node, x, w, _bias(state, node, 8, x.scale * w.scale))
    return state.quantiser.quantise(node, pending, state.results.quant(node, 6))


@operator("QLinearMatMul")
@operator("QLinearMatMul", domain=MICROSOFT)
def qlinear_matmul(state: LoweringState, node: Node) -> Value:
    """As MatMul."""
    x = state.operands.fused(node, 0)
    if isinstance(state.results.operand(node, 3), Const):
        pending = product(state, node, x, _weights(state, node, 3, -1))
    else:
        pending = activation_product(state, node, x, state.operands.fused(node, 3))
    return state.quantiser.quantise(node, pending, state.results.quant(node, 6))


@operator("QGemm", domain=MICROSOFT)
def qgemm(state: LoweringState, node: Node) -> Value:
    """As Gemm. The bias is int32. The result is quantised: ``y_scale`` is given."""
    if state.results.operand(node, 7) is None:
        raise node.fail("it has no y_scale: a float32 result is not supported")
    x = state.operands.fused(node, 0)
    w = _weights(state, node, 3, 0 if node.integer("transB", 0) else 1)
    scale = np.float32(node.real("alpha", 1.0)) * x.scale * w.scale
    pending = general_product(state, node, x, w, _bias(state, node, 6, scale))
    return state.quantiser.quantise(node, pending, state.results.quant(node, 7))


@operator("QLinearAdd", "QLinearMul", domain=MICROSOFT)
def qlinear_arithmetic(state: LoweringState, node: Node) -> Value:
    """As the ONNX operator of the name behind ``QLinear``, of two activations, or of an activation
    and a constant."""
    operands: list[Value | None] = [
        _weights(state, node, i, 0)
        if isinstance(state.results.operand(node, i), Const)
        else state.operands.fused(node, i)
        for i in (0, 3)
    ]
    op_type = node.op_type.removeprefix("QLinear")
    pending = arithmetic_of(state, node, op_type, operands)
    return state.quantiser.quantise(node, pending, state.results.quant(node, 6))


def _channels_first(node: Node) -> None:
    if node.integer("channels_last", 0):
        raise node.fail("channels_last = 1: it must be 0")


@operator("QLinearAveragePool", domain=MICROSOFT)
def qlinear_average_pool(state: LoweringState, node: Node) -> Value:
    """As AveragePool. ``channels_last`` is 0."""
    _channels_first(node)
    pending = pool(state, node, state.operands.fused(node, 0), "average")
    return state.quantiser.quantise(node, pending, state.results.quant(node, 3))


@operator("QLinearGlobalAveragePool", domain=MICROSOFT)
def qlinear_global_average_pool(state: LoweringState, node: Node) -> Value:
    """As GlobalAveragePool. ``channels_last`` is 0."""
    _channels_first(node)
    pending = over_image(state, node, state.operands.fused(node, 0), "average")
    return state.quantiser.quantise(node, pending, state.results.quant(node, 3))
