"""Elementwise functions of one activation, which become tables of 256 results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from systole.sw.frontend.passes.evaluate import evaluate
from systole.sw.frontend.passes.operators.constants import per_channel, with_constant
from systole.sw.frontend.passes.operators.registry import MICROSOFT, operator
from systole.sw.frontend.passes.state import LoweringState
from systole.sw.frontend.passes.values import Const, Function, Node, QuantConst, Value


@operator(
    *("Abs", "Ceil", "Celu", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid"),
    *("HardSwish", "LeakyRelu", "Log", "Mish", "Neg", "Reciprocal", "Round", "Selu", "Sigmoid"),
    *("Sign", "Softplus", "Softsign", "Sqrt", "Swish", "Tanh", "ThresholdedRelu"),
)
@operator("FastGelu", "Gelu", "QuickGelu", domain=MICROSOFT)
def elementwise(state: LoweringState, node: Node) -> Value:
    """Folds into a table of 256 results. Takes a dequantised activation.
    Chains and small graphs of such functions, and of arithmetic with constants of one value,
    between one DequantizeLinear and one QuantizeLinear become a single table."""
    return as_table(state, node)


@operator("Max", "Min", "Pow")
def with_constants(state: LoweringState, node: Node) -> Value:
    """Folds into a table of 256 results, as Sigmoid.
    The operands are functions of one dequantised activation and constants of one value each."""
    return as_table(state, node)


def as_table(state: LoweringState, node: Node) -> Function:
    """The node as a function of one activation, or a refusal."""
    function = of_one_activation(state, node)
    if function is None:
        state.operands.activation(node, 0)
        raise node.fail(
            "its operands are not one activation and constants of one value each: it cannot fold "
            "into a table"
        )
    return function


@operator("Div")
def div(state: LoweringState, node: Node) -> Value:
    """Divides an activation by a constant, or folds into a table of 256 results, as Sigmoid.
    The divisor follows the rules for a constant of Mul, and has no zeros.
    Any other division must be a function of one activation."""
    function = of_one_activation(state, node)
    a, b = state.results.operand(node, 0), state.results.operand(node, 1)
    if function is None and isinstance(b, Const | QuantConst):
        return with_constant(state, node, "Div", a, b, first=False)
    return function or as_table(state, node)


@operator("PRelu")
def prelu(state: LoweringState, node: Node) -> Value:
    """Takes a dequantised activation. The slope is constant and finite, one value or one per
    channel. One value folds into a table of 256 results, as Sigmoid."""
    function = of_one_activation(state, node)
    slope = state.results.operand(node, 1)
    if function is not None:
        return function
    if not isinstance(slope, Const | QuantConst):
        raise node.fail("its slope must be constant")
    x, below = per_channel(state, node, state.operands.activation(node, 0), slope)
    if not np.isfinite(below).all():
        raise node.fail("its slope has values that are not finite")
    return replace(x, below=below)


def of_one_activation(state: LoweringState, node: Node) -> Function | None:
    """The node's result if it is a function of the elements of one tensor; else None."""
    return function_of(state, node, state.results.operands(node))


def function_of(
    state: LoweringState, node: Node, operands: Sequence[Value | None], **changes: str
) -> Function | None:
    """As :func:`of_one_activation` for these operands; ``changes`` make the node another (see
    ``evaluate``)."""
    if not state.origins.may_be_one(operands) or not all(map(_uniform, operands)):
        return None
    functions = {i: state.origins.function(node, v) for i, v in enumerate(operands)}
    of_activations = {i: f for i, f in functions.items() if f is not None}
    common = _common(state, list(of_activations.values()))
    if common is None:
        return None
    arrays = [_scalar(value, common[0]) for value in operands]
    for i, f in zip(of_activations, common, strict=True):
        arrays[i] = f.values
    if any(a is None and v is not None for a, v in zip(arrays, operands, strict=True)):
        return None
    values = evaluate(node, arrays, state.opsets, **changes)[0]
    types = dict.fromkeys(t for f in common for t in f.op_types)
    own = changes.get("op_type", node.op_type)
    return Function(common[0].tensor, common[0].view, values, (*types, own))


def _common(state: LoweringState, functions: list[Function]) -> list[Function] | None:
    """The functions in terms of one tensor, or None."""
    if not functions:
        return None
    origins = [{f.tensor: f for f in state.origins.chain(each)} for each in functions]
    for name, first in origins[0].items():
        if all(name in o and o[name].view == first.view for o in origins):
            return [o[name] for o in origins]
    return None


def _uniform(value: Value | None) -> bool:
    """Whether it is anything but a constant of several values."""
    if not isinstance(value, Const | QuantConst) or value.array.size == 0:
        return True
    return bool((value.array == value.array.flat[0]).all())


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
def qlinear_function(state: LoweringState, node: Node) -> Value:
    """As the ONNX operator of the name behind ``QLinear``."""
    x = state.operands.fused(node, 0)
    op_type = node.op_type.removeprefix("QLinear")
    function = function_of(state, node, [x], op_type=op_type, domain="")
    return state.quantiser.quantise(node, function, state.results.quant(node, 3))
