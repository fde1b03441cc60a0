"""Elementwise functions of one activation, which become tables of 256 results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeGuard, TypeVar

import numpy as np

from systole.sw.frontend.passes.operators import elementary
from systole.sw.frontend.passes.operators.constants import per_channel, with_constant
from systole.sw.frontend.passes.operators.registry import MICROSOFT, operator
from systole.sw.frontend.passes.state import LoweringState
from systole.sw.frontend.passes.values import (
    Affine,
    Computed,
    Const,
    Function,
    Node,
    Pending,
    QuantConst,
    Value,
)
from systole.sw.ir.graph import ModelError, Pool, Select


@operator(
    *("Abs", "Ceil", "Celu", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid"),
    *("HardSwish", "LeakyRelu", "Log", "Mish", "Neg", "Reciprocal", "Round", "Selu", "Sigmoid"),
    *("Sign", "Softplus", "Softsign", "Sqrt", "Swish", "Tanh", "ThresholdedRelu"),
)
@operator("FastGelu", "Gelu", "QuickGelu", domain=MICROSOFT)
def elementwise(state: LoweringState, node: Node) -> Value:
    """Folds into a table of 256 results. Takes a dequantised activation.
    Chains and small graphs of such functions, and of arithmetic with constants of one value,
    between one DequantizeLinear and one QuantizeLinear become a single table.
    The unquantised result of a Conv, product, sum or average is requantised for its table; where
    one table is too coarse it is computed twice, for the numbers below and above zero. What is a
    line on either side, as LeakyRelu, is exact, anything else within one step of its result."""
    return as_table(state, node)


@operator("Max", "Min", "Pow")
def with_constants(state: LoweringState, node: Node) -> Value:
    """Folds into a table of 256 results, as Sigmoid.
    The operands are functions of one dequantised activation and constants of one value each, or of
    one unquantised result, as for Sigmoid. Max and Min are clamps of that."""
    return _bounded(state, node) or as_table(state, node)


def _bounded(state: LoweringState, node: Node) -> Pending | None:
    """A Max or Min of an unquantised result and constants of one value: a clamp."""
    if node.op_type not in ("Max", "Min"):
        return None
    operands = state.results.operands(node)
    results = [v for v in operands if _computes(v)]
    if len(results) != 1:
        return None
    (x,) = results
    given = [_scalar(v, x.view.shape) for v in operands if v is not x]
    bounds = [float(bound) for bound in given if bound is not None and not np.isnan(bound)]
    if len(bounds) < len(given):
        return None
    if node.op_type == "Max":
        return clamped(x, max(bounds, default=-math.inf), math.inf)
    return clamped(x, -math.inf, min(bounds, default=math.inf))


Clamped = TypeVar("Clamped", Pending, Affine)


def clamped(x: Clamped, low: float, high: float) -> Clamped:
    """``x`` clamped to ``low``..``high`` behind its own clamp."""
    return replace(x, low=min(max(x.low, low), high), high=min(max(x.high, low), high))


def _computes(x: Value | None) -> TypeGuard[Pending]:
    """Whether it is an unquantised result that is computed, not chosen among elements."""
    if not isinstance(x, Pending):
        return False
    chosen = isinstance(x.op, Select) or (isinstance(x.op, Pool) and x.op.kind == "max")
    return not chosen


def as_table(state: LoweringState, node: Node) -> Function | Computed:
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
    function = function_of(state, node, state.results.operands(node))
    a, b = state.results.operand(node, 0), state.results.operand(node, 1)
    if function is None and isinstance(b, Const | QuantConst):
        return by_constant(state, node, "Div", a, b, first=False)
    return function or as_table(state, node)


def by_constant(
    state: LoweringState,
    node: Node,
    op_type: str,
    x: Value | None,
    constant: Const | QuantConst,
    *,
    first: bool,
) -> Value:
    """As :func:`with_constant`; what that refuses of an unquantised result is a function of it."""
    try:
        return with_constant(state, node, op_type, x, constant, first=first)
    except ModelError:
        operands = [constant, x] if first else [x, constant]
        computed = computed_of(state, node, operands, op_type=op_type, domain="")
        if computed is None:
            raise
        return computed


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


def of_one_activation(state: LoweringState, node: Node) -> Function | Computed | None:
    """The node's result if it is a function of the elements of one tensor, or one unquantised
    result; else None."""
    operands = state.results.operands(node)
    return function_of(state, node, operands) or computed_of(state, node, operands)


def function_of(
    state: LoweringState, node: Node, operands: Sequence[Value | None], **changes: str
) -> Function | None:
    """As :func:`of_one_activation` for these operands; ``changes`` make the node another (see
    ``elementary.compute``)."""
    if not state.origins.may_be_one(operands) or not all(map(_uniform, operands)):
        return None
    functions = {i: state.origins.function(node, v) for i, v in enumerate(operands)}
    of_activations = {i: f for i, f in functions.items() if f is not None}
    common = _common(state, list(of_activations.values()))
    if common is None:
        return None
    arrays = [_scalar(value, common[0].view.shape) for value in operands]
    for i, f in zip(of_activations, common, strict=True):
        arrays[i] = f.values
    if any(a is None and v is not None for a, v in zip(arrays, operands, strict=True)):
        return None
    values = elementary.compute(node, arrays, state.opsets, **changes)
    types = dict.fromkeys(t for f in common for t in f.op_types)
    own = changes.get("op_type", node.op_type)
    return Function(common[0].tensor, common[0].view, values, (*types, own))


def computed_of(
    state: LoweringState, node: Node, operands: Sequence[Value | None], **changes: str
) -> Computed | None:
    """The node's result if its ``operands`` are functions of the elements of one unquantised result
    and constants of one value; else None. ``changes`` as for :func:`function_of`."""
    own = [v for v in operands if isinstance(v, Computed) or _computes(v)]
    if not own or not all(map(_uniform, operands)):
        return None
    for of_base in (False, True):
        functions = [_in_terms_of(v, of_base=of_base) for v in own]
        first = functions[0]
        if all(f.x.op is first.x.op and f.view == first.view for f in functions):
            break
    else:
        return None
    constants = [_scalar(value, first.view.shape) for value in operands]
    places = [next((i for i, v in enumerate(own) if v is value), None) for value in operands]
    for value, constant, place in zip(operands, constants, places, strict=True):
        if value is not None and constant is None and place is None:
            return None

    def compute(x: np.ndarray) -> np.ndarray:
        arrays = [
            constant if place is None else functions[place].compute(x)
            for constant, place in zip(constants, places, strict=True)
        ]
        return elementary.compute(node, arrays, state.opsets, **changes)

    types = dict.fromkeys(t for f in functions for t in f.op_types)
    return Computed(first.x, first.view, compute, (*types, changes.get("op_type", node.op_type)))


def _in_terms_of(value: Pending | Computed, *, of_base: bool) -> Computed:
    """``value`` as a function of its operator's result, or of the result which that is a multiple
    of."""
    result = value.x if isinstance(value, Computed) else value
    root = (result.base if of_base else None) or result
    gain, shift = (np.float32(v) for v in (result.gain, result.shift))

    def compute(x: np.ndarray) -> np.ndarray:
        own = x if root is result else x * gain + shift
        if isinstance(value, Computed):
            return value.compute(own)
        return np.clip(own, np.float32(value.low), np.float32(value.high))

    types = value.op_types if isinstance(value, Computed) else ()
    return Computed(replace(root, low=-math.inf, high=math.inf), value.view, compute, types)


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


def _scalar(value: Value | None, shape: tuple[int, ...]) -> np.ndarray | None:
    """A constant that is the same for all elements of a value of ``shape``."""
    if not isinstance(value, Const | QuantConst):
        return None
    array = value.array
    if array.ndim > len(shape) or array.size == 0 or not _uniform(value):
        return None
    fitting = zip(array.shape[::-1], shape[::-1], strict=False)
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
