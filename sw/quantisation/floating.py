"""Nodes that stay in float, because int8 cannot hold what passes between them.

* The inside of a normalisation written as single operators, as exporters do below opset 17: mean,
  difference, square, mean of squares, root, quotient; and the factor and offset behind it. A square
  has twice the range of its operand in bits, and the quotient needs its small values exactly.
* The sum of squares under a square root, such as the magnitude of a spectrum.
* The inside of a softmax written as single operators: exponential, sum, quotient.
* The addition of a mask to attention scores. A mask of -10,000 or minus infinity and scores of a
  few units share no scale in 8 bits.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

import numpy as np
import onnx
import onnx_ir as ir
from onnx import numpy_helper

from systole.sw.frontend.passes.masks import MASKED, computed_masks

LOWEST = -1e9
"""What masks are raised to for calibration; the exponential of it is 0 all the same."""
PASSED = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Cast", "Slice")
"""Operators that scores may pass on their way to the Softmax."""


class _Nodes:
    """A model's nodes by what they produce and what they read."""

    def __init__(self, model: onnx.ModelProto):
        self.all = list(model.graph.node)
        self.constants = {i.name: i for i in model.graph.initializer}
        self.producer = {name: node for node in self.all for name in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in self.all:
            for name in node.input:
                self.readers[name].append(node)

    def source(self, node: onnx.NodeProto, *op_types: str) -> onnx.NodeProto | None:
        """The node of one of these types that an operand of ``node`` comes from."""
        sources = (self.producer.get(name) for name in node.input)
        return next((s for s in sources if s is not None and s.op_type in op_types), None)

    def reader(self, node: onnx.NodeProto, *op_types: str) -> onnx.NodeProto | None:
        """The node of one of these types that reads the result of ``node``."""
        return next((r for r in self.readers[node.output[0]] if r.op_type in op_types), None)

    def is_constant(self, name: str) -> bool:
        source = self.producer.get(name)
        return name in self.constants or (source is not None and source.op_type == "Constant")


def floating_nodes(model: onnx.ModelProto) -> set[str]:
    """Names of the nodes inside normalisations and softmaxes."""
    nodes = _Nodes(model)
    names: set[str] = set()
    for node in nodes.all:
        if node.op_type == "Sqrt":
            names.update(n.name for n in _normalisation(nodes, node))
            names.update(n.name for n in _magnitude(nodes, node))
        elif node.op_type == "Exp":
            names.update(n.name for n in _softmax(nodes, node))
    return names


def _normalisation(nodes: _Nodes, root: onnx.NodeProto) -> list[onnx.NodeProto]:
    """The nodes of the normalisation that takes this square root; none if it is something else."""
    offset = nodes.source(root, "Add")
    mean = nodes.source(offset or root, "ReduceMean")
    square = nodes.source(mean, "Pow", "Mul") if mean is not None else None
    if mean is None or square is None or (square.op_type == "Mul" and len({*square.input}) > 1):
        return []
    inside = [root, mean, square, *([offset] if offset is not None else [])]
    difference = nodes.producer.get(square.input[0])
    if difference is not None and difference.op_type == "Sub":
        inside.append(difference)
        average = nodes.source(difference, "ReduceMean")
        inside += [average] if average is not None else []
    inverse = nodes.reader(root, "Reciprocal", "Div")
    if inverse is None:
        return []
    inside.append(inverse)
    last = inverse
    if inverse.op_type == "Reciprocal" or nodes.is_constant(inverse.input[0]):
        last = nodes.reader(inverse, "Mul") or inverse
        inside.append(last)
    for op_type in ("Mul", "Add"):
        affine = nodes.reader(last, op_type)
        if affine is not None and any(map(nodes.is_constant, affine.input)):
            inside.append(affine)
            last = affine
    return inside


def _magnitude(nodes: _Nodes, root: onnx.NodeProto) -> list[onnx.NodeProto]:
    """The nodes between the components of a vector and its length; none if it is something else."""
    total = nodes.producer.get(root.input[0])
    if total is None or total.op_type != "Add":
        return []
    squares = [nodes.producer.get(name) for name in total.input]
    inside = [n for n in squares if n is not None and _is_square(nodes, n)]
    return [root, total, *inside] if len(inside) == 2 else []


def _is_square(nodes: _Nodes, node: onnx.NodeProto) -> bool:
    if node.op_type == "Mul":
        return node.input[0] == node.input[1]
    exponent = nodes.constants.get(node.input[1]) if node.op_type == "Pow" else None
    return exponent is not None and bool((numpy_helper.to_array(exponent) == 2).all())


def _softmax(nodes: _Nodes, exponential: onnx.NodeProto) -> list[onnx.NodeProto]:
    """The nodes of the softmax that takes this exponential; none if it is something else."""
    total, quotient = nodes.reader(exponential, "ReduceSum"), nodes.reader(exponential, "Div")
    if total is None or quotient is None or total.output[0] not in quotient.input:
        return []
    inside = [exponential, total, quotient]
    difference = nodes.source(exponential, "Sub")
    highest = nodes.source(difference, "ReduceMax") if difference is not None else None
    if difference is not None and highest is not None:
        inside += [difference, highest]
    return inside


def masking_nodes(
    model: onnx.ModelProto, ranges: Mapping[str, tuple[float, float]]
) -> Iterator[onnx.NodeProto]:
    """The nodes that add a mask to the operand of a Softmax, and those that compute masks.
    ``ranges``: lowest and highest value of activations."""
    nodes = _Nodes(model)
    yield from _before(nodes, [*computed_masks(ir.from_proto(model).graph)])
    for node in nodes.all:
        if node.op_type == "Softmax" or _softmax(nodes, node):
            yield from _masks_before(nodes, node.input[0], ranges)


def _masks_before(
    nodes: _Nodes, name: str, ranges: Mapping[str, tuple[float, float]]
) -> Iterator[onnx.NodeProto]:
    node = nodes.producer.get(name)
    if node is None:
        return
    if node.op_type in PASSED:
        yield from _masks_before(nodes, node.input[0], ranges)
    elif node.op_type in ("Add", "Sub", "Where", "Max"):
        operands = node.input[1:] if node.op_type == "Where" else node.input
        if any(_is_mask(nodes, operand, ranges) for operand in operands):
            yield node
        for operand in operands:
            yield from _masks_before(nodes, operand, ranges)


def _before(nodes: _Nodes, names: list[str]) -> Iterator[onnx.NodeProto]:
    """All nodes that compute these values."""
    todo, seen = list(names), set(names)
    for name in todo:
        node = nodes.producer.get(name)
        if node is not None:
            yield node
            todo += [other for other in node.input if other not in seen]
            seen.update(node.input)


def _is_mask(nodes: _Nodes, name: str, ranges: Mapping[str, tuple[float, float]]) -> bool:
    constant = nodes.constants.get(name)
    if constant is not None:
        array = numpy_helper.to_array(constant)
        return bool(array.size and array.dtype.kind == "f" and array.min() <= MASKED)
    return name in ranges and ranges[name][0] <= MASKED


def finite_masks(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose constants hold no number below ``LOWEST``, minus infinity least of all, so that
    ranges and histograms can be taken."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            array = numpy_helper.to_array(tensor)
            if array.size and array.min() < LOWEST:
                raised = np.maximum(array, np.float32(LOWEST))
                tensor.CopyFrom(numpy_helper.from_array(raised, tensor.name))
    return copy
