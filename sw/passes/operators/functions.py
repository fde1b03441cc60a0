"""Elementwise functions of one activation, which become tables of 256 results."""

from __future__ import annotations

import numpy as np

from sw.passes.evaluate import evaluate
from sw.passes.lower import Lowering
from sw.passes.operators.registry import MICROSOFT, operator
from sw.passes.values import Const, Function, Node, QuantConst, Value


@operator(
    *("Abs", "Ceil", "Celu", "Div", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid"),
    *("HardSwish", "LeakyRelu", "Log", "Max", "Min", "Mish", "Neg", "PRelu", "Pow", "Reciprocal"),
    *("Round", "Selu", "Sigmoid", "Sign", "Softplus", "Softsign", "Sqrt", "Swish", "Tanh"),
    "ThresholdedRelu",
)
@operator("FastGelu", "Gelu", "QuickGelu", domain=MICROSOFT)
def elementwise(state: Lowering, node: Node) -> Value:
    """Of one dequantised activation and constants of one value; chains and small graphs of these
    between one DequantizeLinear and one QuantizeLinear become a single table."""
    function = of_one_activation(state, node)
    if function is None:
        state.activation(node, 0)
        raise node.fail("only of one activation, others constants of one value each")
    return function


def of_one_activation(state: Lowering, node: Node) -> Function | None:
    """The node's result if it is a function of the elements of one tensor; else None."""
    return function_of(state, node, [state.operand(node, i) for i in range(len(node.raw.inputs))])


def function_of(
    state: Lowering, node: Node, operands: list[Value | None], **changes: str
) -> Function | None:
    """Of these operands; ``changes`` make the node another (see ``evaluate``)."""
    if not state.may_be_one_function(operands):
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


def _common(state: Lowering, functions: list[Function]) -> list[Function] | None:
    """The functions in terms of one tensor, or None."""
    if not functions:
        return None
    origins = [{f.tensor: f for f in state.origins(each)} for each in functions]
    for name, first in origins[0].items():
        if all(name in o and o[name].view == first.view for o in origins):
            return [o[name] for o in origins]
    return None


def _scalar(value: Value | None, like: Function) -> np.ndarray | None:
    """A constant that is the same for all elements."""
    if not isinstance(value, Const | QuantConst):
        return None
    array = value.array
    if array.ndim > len(like.view.shape) or array.size == 0 or (array != array.flat[0]).any():
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
def qlinear_function(state: Lowering, node: Node) -> Value:
    """As Sigmoid and LeakyRelu."""
    x = state.dequantise(node, state.operand(node, 0), state.quant(node, 1))
    op_type = node.op_type.removeprefix("QLinear")
    function = function_of(state, node, [x], op_type=op_type, domain="")
    return state.quantise(node, function, state.quant(node, 3))
