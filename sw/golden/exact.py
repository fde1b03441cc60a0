"""Rewrites an ONNX model so that onnxruntime multiplies integers exactly on any processor.

On x86 processors without VNNI instructions onnxruntime's kernels for uint8 by int8 add pairs of
products in 16 bits, which saturate. Its kernels for uint8 by uint8, int8 by int8 and int8 by uint8
are exact everywhere. So the second operand of every product of uint8 by int8 becomes uint8: adding
128 to its codes and to its zero point leaves its meaning as it was.
"""

from __future__ import annotations

import itertools
from collections import ChainMap
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

MICROSOFT = "com.microsoft"
OFFSET = 128
"""From an int8 code to the uint8 code of the same meaning."""


@dataclass(frozen=True)
class _Operands:
    """Where a product of integers has its operands among its inputs."""

    second: int
    second_zero: int
    first: int = 0
    first_zero: int | None = None
    """None: the operator quantises its first operand itself, to uint8."""


_QLINEAR = _Operands(3, 5, 0, 2)
_PRODUCTS: dict[tuple[str, str], tuple[_Operands, ...]] = {
    ("", "MatMulInteger"): (_Operands(1, 3, 0, 2),),
    ("", "ConvInteger"): (_Operands(1, 3, 0, 2),),
    ("", "QLinearMatMul"): (_QLINEAR,),
    ("", "QLinearConv"): (_QLINEAR,),
    (MICROSOFT, "QLinearConv"): (_QLINEAR,),
    (MICROSOFT, "QGemm"): (_QLINEAR,),
    (MICROSOFT, "MatMulIntegerToFloat"): (_Operands(1, 5, 0, 4),),
    (MICROSOFT, "QAttention"): (_Operands(1, 7, 0, 6),),
    (MICROSOFT, "DynamicQuantizeMatMul"): (_Operands(1, 3),),
    (MICROSOFT, "DynamicQuantizeLSTM"): (_Operands(1, 9), _Operands(2, 11)),
}
"""The operators of the CPU's that multiply 8-bit integers."""


def with_plain_softmax(model: ModelProto) -> ModelProto:
    """The model, changed in place: a Softmax that the optimiser fused with the conversions around
    it is three nodes again. The fused kernel divides by a whole number of steps, so that up to a
    tenth of its results are one off what the three mean."""
    _unfuse(model.graph)
    return model


def _unfuse(graph: GraphProto) -> None:
    nodes: list[NodeProto] = []
    for node in graph.node:
        for body in _bodies(node):
            _unfuse(body)
        if (node.domain, node.op_type) != (MICROSOFT, "QLinearSoftmax"):
            nodes.append(node)
            continue
        x, x_scale, x_zero, y_scale, y_zero = node.input
        (y,) = node.output
        real, share = f"{y}/real", f"{y}/share"
        softmax = helper.make_node("Softmax", [real], [share], name=node.name)
        softmax.attribute.extend(a for a in node.attribute if a.name == "axis")
        nodes += [
            helper.make_node("DequantizeLinear", [x, x_scale, x_zero], [real]),
            softmax,
            helper.make_node("QuantizeLinear", [share, y_scale, y_zero], [y]),
        ]
    del graph.node[:]
    graph.node.extend(nodes)


def saturating_products(model: ModelProto) -> list[NodeProto]:
    """The nodes of a model, bodies included, that multiply uint8 by int8."""
    scope = _Scope.of(model.graph)
    return [node for node, _ in _saturating(model.graph, scope)]


def without_saturation(model: ModelProto) -> ModelProto:
    """The model, changed in place: no product of it multiplies uint8 by int8."""
    _rewrite(model.graph, _Scope.of(model.graph))
    return model


@dataclass
class _Scope:
    """The constants and element types that nodes of a graph see, by value name."""

    constants: ChainMap[str, TensorProto]
    types: ChainMap[str, int]
    numbers: Iterator[int]
    """Tell the values apart that are added to the model."""

    @classmethod
    def of(cls, graph: GraphProto, outer: _Scope | None = None) -> _Scope:
        constants = {each.name: each for each in graph.initializer}
        types = {
            info.name: info.type.tensor_type.elem_type
            for info in (*graph.value_info, *graph.output, *graph.input)
        }
        types |= {name: each.data_type for name, each in constants.items()}
        if outer is None:
            return cls(ChainMap(constants), ChainMap(types), itertools.count())
        return cls(
            ChainMap(constants, *outer.constants.maps),
            ChainMap(types, *outer.types.maps),
            outer.numbers,
        )

    def type_of(self, node: NodeProto, *indices: int) -> int | None:
        """The element type of the first of these inputs that is given and known."""
        for index in indices:
            known = self.types.get(_input(node, index))
            if known:
                return known
        return None


def _input(node: NodeProto, index: int) -> str:
    return node.input[index] if index < len(node.input) else ""


def _bodies(node: NodeProto) -> Iterator[GraphProto]:
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == onnx.AttributeProto.GRAPHS:
            yield from attribute.graphs


def _saturating(graph: GraphProto, scope: _Scope) -> Iterator[tuple[NodeProto, list[_Operands]]]:
    for node in graph.node:
        for body in _bodies(node):
            yield from _saturating(body, _Scope.of(body, scope))
        products = _own(node, scope)
        if products:
            yield node, products


def _own(node: NodeProto, scope: _Scope) -> list[_Operands]:
    """The products of a node itself that multiply uint8 by int8."""
    domain = "" if node.domain == "ai.onnx" else node.domain
    return [
        each
        for each in _PRODUCTS.get((domain, node.op_type), ())
        if scope.type_of(node, each.second, each.second_zero) == TensorProto.INT8
        and (
            each.first_zero is None
            or scope.type_of(node, each.first_zero, each.first) == TensorProto.UINT8
        )
    ]


def _rewrite(graph: GraphProto, scope: _Scope) -> None:
    nodes: list[NodeProto] = []
    shifted: dict[str, str] = {}
    for node in graph.node:
        for body in _bodies(node):
            _rewrite(body, _Scope.of(body, scope))
        for each in _own(node, scope):
            for index in (each.second, each.second_zero):
                name = _input(node, index)
                if name not in shifted:
                    shifted[name], added = _shifted(graph, name, scope)
                    nodes += added
                node.input.extend([""] * (index + 1 - len(node.input)))
                node.input[index] = shifted[name]
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def _shifted(graph: GraphProto, name: str, scope: _Scope) -> tuple[str, list[NodeProto]]:
    """An int8 value as uint8, ``OFFSET`` more: its name and the nodes that make it. Without a
    ``name``, the zero point 0."""
    new = f"{name}/uint8/{next(scope.numbers)}"
    if not name or name in scope.constants:
        codes = numpy_helper.to_array(scope.constants[name]) if name else np.int8(0)
        array = np.asarray(codes.astype(np.int16) + OFFSET, np.uint8)
        graph.initializer.append(numpy_helper.from_array(array, new))
        return new, []
    wide, offset, total = (f"{new}/{part}" for part in ("wide", "offset", "sum"))
    graph.initializer.append(numpy_helper.from_array(np.array(OFFSET, np.int32), offset))
    return new, [
        helper.make_node("Cast", [name], [wide], to=TensorProto.INT32),
        helper.make_node("Add", [wide, offset], [total]),
        helper.make_node("Cast", [total], [new], to=TensorProto.UINT8),
    ]
