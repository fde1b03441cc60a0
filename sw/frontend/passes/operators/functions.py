"""Elementwise functions of one activation, which become tables of 256 results."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from systole.sw.frontend.passes.evaluate import evaluate
from systole.sw.frontend.passes.lower import GraphBuilder
from systole.sw.frontend.passes.operators.constants import per_channel, with_constant
from systole.sw.frontend.passes.operators.registry import MICROSOFT, operator
from systole.sw.frontend.passes.values import Const, Function, Node, QuantConst, Value


@operator(
    *("Abs", "Ceil", "Celu", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid"),
    *("HardSwish", "LeakyRelu", "Log", "Max", "Min", "Mish", "Neg", "Pow", "Reciprocal"),
    *("Round", "Selu", "Sigmoid", "Sign", "Softplus", "Softsign", "Sqrt", "Swish", "Tanh"),
    "ThresholdedRelu",
)
@operator("FastGelu", "Gelu", "QuickGelu", domain=MICROSOFT)
def elementwise(state: GraphBuilder, node: Node) -> Value:
    """Of one dequantised activation and constants of one value; chains and small graphs of these
    between one DequantizeLinear and one QuantizeLinear become a single table."""
    function = of_one_activation(state, node)
    if function is None:
        state.activation(node, 0)
        raise node.fail("only of one activation, others constants of one value each")
    return function


@operator("Div")
def div(state: GraphBuilder, node: Node) -> Value:
    """As Sigmoid and others; of an activation by a constant, as Mul."""
    function = of_one_activation(state, node)
    a, b = state.operand(node, 0), state.operand(node, 1)
    if function is None and isinstance(b, Const | QuantConst):
        return with_constant(state, node, "Div", a, b, first=False)
    return function or elementwise(state, node)


@operator("PRelu")
def prelu(state: GraphBuilder, node: Node) -> Value:
    """Of a dequantised activation; a constant slope, one value (as Sigmoid and others) or one per
    channel."""
    function = of_one_activation(state, node)
    slope = state.operand(node, 1)
    if function is not None:
        return function
    if not isinstance(slope, Const | QuantConst):
        raise node.fail("its slope must be constant")
    x, below = per_channel(state, node, state.activation(node, 0), slope)
    if not np.isfinite(below).all():
        raise node.fail("its slope has values that are not finite")
    return replace(x, below=below)


def of_one_activation(state: GraphBuilder, node: Node) -> Function | None:
    """The node's result if it is a function of the elements of one tensor; else None."""
    return function_of(state, node, [state.operand(node, i) for i in range(len(node.raw.inputs))])


def function_of(
    state: GraphBuilder, node: Node, operands: list[Value | None], **changes: str
) -> Function | None:
    """Of these operands; ``changes`` make the node another (see ``evaluate``)."""
    if not state.may_be_one_function(operands) or not all(map(_uniform, operands)):
        return None
    functions = {i: state.function(node, v) for i, v in enumerate(operands)}
    functions = {i: f for i, f in functions.items() if f is not None}
    common = _common(state, list(functions.values()))
    if common is None:
        return None
    arrays = [_scalar(value, common[0]) for value in operands]
    for i, f in zip(functions, common, strict=True):
        arrays[i] = f.values
    if any(a is None and v is not None for a, v in zip(arrays, operands, strict=True)):
        return None
    values = evaluate(node, arrays, state.opsets, **changes)[0]
    types = dict.fromkeys(t for f in common for t in f.op_types)
    own = changes.get("op_type", node.op_type)
    return Function(common[0].tensor, common[0].view, values, (*types, own))


def _common(state: GraphBuilder, functions: list[Function]) -> list[Function] | None:
    """The functions in terms of one tensor, or None."""
    if not functions:
        return None
    origins = [{f.tensor: f for f in state.origins(each)} for each in functions]
    for name, first in origins[0].items():
        if all(name in o and o[name].view == first.view for o in origins):
            return [o[name] for o in origins]
    return None


def _uniform(value: Value | None) -> bool:
    """Anything but a constant of several values."""
    constant = isinstance(value, Const | QuantConst) and value.array.size > 0
    return not constant or bool((value.array == value.array.flat[0]).all())


def _scalar(value: Value | None, like: Function) -> np.ndarray | None:
    """A constant that is the same for all elements."""
    if not isinstance(value, Const | QuantConst):
        return None
    array = value.array
    if array.ndim > len(like.view.shape) or array.size == 0 or not _uniform(value):
        return None
    fitting = zip(array.shape[::-1], like.view.shape[::-1], strict=False)
    if any(size not in (1, whole) for size, whole in fitting):
        return None
    if isinstance(value, Const):
        return array.reshape(-1)[:1].reshape(())
    if value.scale.size > 1 or value.zero.size > 1:
        return None
    number = array.reshape(-1)[:1].astype(np.int32) - value.zero
    return (number.astype(np.float32) * value.scale).reshape(())


@operator("QLinearSigmoid", "QLinearLeakyRelu", domain=MICROSOFT)
def qlinear_function(state: GraphBuilder, node: Node) -> Value:
    """As Sigmoid and LeakyRelu."""
    x = state.dequantise(node, state.operand(node, 0), state.quant(node, 1))
    op_type = node.op_type.removeprefix("QLinear")
    function = function_of(state, node, [x], op_type=op_type, domain="")
    return state.quantise(node, function, state.quant(node, 3))
