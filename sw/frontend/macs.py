"""Multiply-accumulates of a model's nodes, wherever they run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import onnx_ir as ir

from systole.sw.frontend.dataflow import static_shape

Shape = Sequence[int]
Count = Callable[[Sequence[Shape | None], Shape], int]
"""The count of a node, from the shapes of its inputs (None where left out or not known) and of its
first output. Raises ``TypeError`` where one that it needs is None."""


def _windows(weights: int) -> Count:
    """A convolution whose weights are input ``weights``."""
    return lambda inputs, output: math.prod(output) * math.prod(_known(inputs[weights])[1:])


def _products(left: int) -> Count:
    """A matrix product whose first operand, (..., M, K), is input ``left``."""
    return lambda inputs, output: math.prod(output) * _known(inputs[left])[-1]


def _general(inputs: Sequence[Shape | None], output: Shape) -> int:
    """A Gemm: both axes of its first operand, either way round, times its columns."""
    return math.prod(_known(inputs[0])) * output[-1]


def _transposed(inputs: Sequence[Shape | None], output: Shape) -> int:
    return math.prod(_known(inputs[0])) * math.prod(_known(inputs[1])[1:])


def _recurrent(inputs: Sequence[Shape | None], output: Shape) -> int:
    """LSTM, GRU and RNN: at every step, the input and the state times their weights."""
    steps = math.prod(_known(inputs[0])[:2])
    return steps * sum(math.prod(_known(shape)) for shape in inputs[1:3])


def _known(shape: Shape | None) -> Shape:
    if shape is None:
        raise TypeError
    return shape


COUNTS: dict[str, Count] = {
    "Conv": _windows(1),
    "ConvInteger": _windows(1),
    "FusedConv": _windows(1),
    "QLinearConv": _windows(3),
    "ConvTranspose": _transposed,
    "MatMul": _products(0),
    "FusedMatMul": _products(0),
    "MatMulInteger": _products(0),
    "MatMulIntegerToFloat": _products(0),
    "DynamicQuantizeMatMul": _products(0),
    "QLinearMatMul": _products(0),
    "Gemm": _general,
    "FusedGemm": _general,
    "QGemm": _general,
    "LSTM": _recurrent,
    "GRU": _recurrent,
    "RNN": _recurrent,
}
"""The operators that multiply and accumulate, by type."""
UNCOUNTED = (
    *("If", "Loop", "Scan", "Einsum", "DeformConv"),
    *("Attention", "MultiHeadAttention", "GroupQueryAttention", "QAttention"),
)
"""Operators whose count is not known: it depends on values, or on more than shapes."""


def node_macs(node: ir.Node) -> int | None:
    """Multiply-accumulates of a node, padding counted as published figures do; None where they are
    not known: of control flow, or of shapes known only when the model runs."""
    if node.op_type in UNCOUNTED:
        return None
    count = COUNTS.get(node.op_type)
    if count is None:
        return 0
    inputs = [None if value is None else static_shape(value) for value in node.inputs]
    output = next((static_shape(value) for value in node.outputs if value.name), None)
    try:
        return count(inputs, _known(output))
    except (TypeError, IndexError):
        return None
