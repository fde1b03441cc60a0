"""Multiply-accumulates of a model's nodes, wherever they run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from systole.sw.frontend.dataflow import static_shape
from systole.sw.frontend.passes.values import Node

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
    *("DeformConv", "Attention", "MultiHeadAttention", "GroupQueryAttention", "QAttention"),
    *("PackedMultiHeadAttention", "DecoderMaskedMultiHeadAttention", "SparseAttention"),
    *("MatMulNBits", "MatMulBnb4", "MoE", "QMoE"),
)
"""Operators that multiply and accumulate too, whose count depends on more than shapes."""


def node_macs(node: ir.Node) -> int | None:
    """Multiply-accumulates of a node, those of its bodies included, padding counted as published
    figures do: of an If those of the larger branch, of a Loop those of all its rounds. None where
    they are not known: they depend on values, or on shapes known only when the model runs."""
    if node.op_type in UNCOUNTED:
        return None
    if node.op_type in ("If", "Loop", "Scan"):
        return _of_bodies(node)
    count = COUNTS.get(node.op_type)
    if count is None and node.op_type != "Einsum":
        return 0
    inputs = [None if value is None else static_shape(value) for value in node.inputs]
    output = next((static_shape(value) for value in node.outputs if value.name), None)
    try:
        if count is None:
            return _contracted(Node(node).string("equation", ""), [_known(x) for x in inputs])
        return count(inputs, _known(output))
    except (TypeError, IndexError):
        return None


def _of_bodies(node: ir.Node) -> int | None:
    """Multiply-accumulates of control flow."""
    bodies = [a.as_graph() for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH]
    counts = [[node_macs(inner) for inner in body] for body in bodies]
    most = max(sum(count or 0 for count in body) for body in counts)
    if any(count is None for body in counts for count in body):
        return None
    rounds = _rounds(node) if most else 0
    return None if rounds is None else most * rounds


def _rounds(node: ir.Node) -> int | None:
    """How often a body of control flow runs; None: it is known only when the model runs."""
    if node.op_type == "If":
        return 1
    if node.op_type == "Loop":
        most = _constant(node.inputs[0])
        return None if most is None or _may_end(node) else int(most.reshape(-1)[0])
    own = Node(node)
    count = own.integer("num_scan_inputs", 0)
    first = node.inputs[own.input_count - count]
    shape = None if first is None else static_shape(first)
    return None if shape is None else shape[own.integers("scan_input_axes", (0,))[0]]


def _may_end(loop: ir.Node) -> bool:
    """Whether the condition of a Loop may end it."""
    body = loop.attributes["body"].as_graph()
    given = _constant(loop.inputs[1]) if loop.inputs[1:] and loop.inputs[1] else np.array(True)
    value: ir.Value | None = body.outputs[0]
    while value is not None and (node := value.producer()) and node.op_type == "Identity":
        value = node.inputs[0]
    then = given if value is body.inputs[1] else _constant(value)
    return any(condition is None or not condition.all() for condition in (given, then))


def _constant(value: ir.Value | None) -> np.ndarray | None:
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def _contracted(equation: str, shapes: Sequence[Shape]) -> int:
    """Multiply-accumulates of an Einsum: a product of its operands for every combination of its
    indices; none if it sums nothing."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    sizes: dict[str, int] = {}
    used: Counter[str] = Counter()
    for term, shape in zip(left.split(","), shapes, strict=True):
        before, dots, after = term.partition("...")
        hidden = len(shape) - len(before) - len(after) if dots else 0
        indices = [*before, *(f".{i}" for i in range(hidden, 0, -1)), *after]
        used.update(indices)
        for index, size in zip(indices, shape, strict=True):
            sizes[index] = max(sizes.get(index, 1), size)
    kept = {*right} if arrow else {index for index, count in used.items() if count == 1}
    summed = [index for index in sizes if index not in kept and not index.startswith(".")]
    return math.prod(sizes.values()) * (len(shapes) - 1) if summed else 0
