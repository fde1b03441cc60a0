"""Operators of fused form: dequantise, operator, quantise in one node."""

from __future__ import annotations

import numpy as np

from systole.sw.frontend.passes.lower import GraphBuilder
from systole.sw.frontend.passes.operators.elementwise import arithmetic_of
from systole.sw.frontend.passes.operators.matrices import activation_product
from systole.sw.frontend.passes.operators.pools import over_image, pool
from systole.sw.frontend.passes.operators.products import convolution, general_product, product
from systole.sw.frontend.passes.operators.quantisation import quant_const
from systole.sw.frontend.passes.operators.registry import MICROSOFT, operator
from systole.sw.frontend.passes.values import Const, Dequantised, Node, QuantConst, Value


def _activation(state: GraphBuilder, node: Node, index: int) -> Dequantised:
    """The activation, or constant, at ``index`` with scale and zero point in the next two
    inputs."""
    return state.dequantise(node, state.operand(node, index), state.quant(node, index + 1))


def _weights(state: GraphBuilder, node: Node, index: int, axis: int) -> QuantConst:
    array = state.const(node, index, "weights")
    if array is None:
        raise node.fail("weights are missing")
    return quant_const(state, node, array, index + 1, axis)


def _bias(state: GraphBuilder, node: Node, index: int, scale: np.ndarray) -> QuantConst | None:
    """The int32 bias at ``index``, in units of ``scale``."""
    array = state.const(node, index, "bias")
    if array is None:
        return None
    if array.dtype != np.int32:
        raise node.fail(f"bias of type {array.dtype}; int32 is needed")
    return QuantConst(array, scale, np.zeros(1, np.int32), 0)


@operator("QLinearConv")
def qlinear_conv(state: GraphBuilder, node: Node) -> Value:
    """As Conv, with an int32 bias."""
    x, w = _activation(state, node, 0), _weights(state, node, 3, 0)
    pending = convolution(state, node, x, w, _bias(state, node, 8, x.scale * w.scale))
    return state.quantise(node, pending, state.quant(node, 6))


@operator("QLinearMatMul")
@operator("QLinearMatMul", domain=MICROSOFT)
def qlinear_matmul(state: GraphBuilder, node: Node) -> Value:
    """As MatMul."""
    x = _activation(state, node, 0)
    if isinstance(state.operand(node, 3), Const):
        pending = product(state, node, x, _weights(state, node, 3, -1))
    else:
        pending = activation_product(state, node, x, _activation(state, node, 3))
    return state.quantise(node, pending, state.quant(node, 6))


@operator("QGemm", domain=MICROSOFT)
def qgemm(state: GraphBuilder, node: Node) -> Value:
    """As Gemm, with an int32 bias and a quantised result."""
    if state.operand(node, 7) is None:
        raise node.fail("it has no y_scale: a float32 result is not supported")
    x = _activation(state, node, 0)
    w = _weights(state, node, 3, 0 if node.int("transB", 0) else 1)
    scale = np.float32(node.float("alpha", 1.0)) * x.scale * w.scale
    pending = general_product(state, node, x, w, _bias(state, node, 6, scale))
    return state.quantise(node, pending, state.quant(node, 7))


@operator("QLinearAdd", "QLinearMul", domain=MICROSOFT)
def qlinear_arithmetic(state: GraphBuilder, node: Node) -> Value:
    """As Add and Mul of two activations, or of an activation and a constant."""
    operands = [
        _weights(state, node, i, 0)
        if isinstance(state.operand(node, i), Const)
        else _activation(state, node, i)
        for i in (0, 3)
    ]
    op_type = node.op_type.removeprefix("QLinear")
    pending = arithmetic_of(state, node, op_type, operands)
    return state.quantise(node, pending, state.quant(node, 6))


def _channels_first(node: Node) -> None:
    if node.int("channels_last", 0):
        raise node.fail("channels_last = 1: it must be 0")


@operator("QLinearAveragePool", domain=MICROSOFT)
def qlinear_average_pool(state: GraphBuilder, node: Node) -> Value:
    """As AveragePool; ``channels_last`` 0."""
    _channels_first(node)
    pending = pool(state, node, _activation(state, node, 0), "average")
    return state.quantise(node, pending, state.quant(node, 3))


@operator("QLinearGlobalAveragePool", domain=MICROSOFT)
def qlinear_global_average_pool(state: GraphBuilder, node: Node) -> Value:
    """As GlobalAveragePool; ``channels_last`` 0."""
    _channels_first(node)
    pending = over_image(state, node, _activation(state, node, 0), "average")
    return state.quantise(node, pending, state.quant(node, 3))
