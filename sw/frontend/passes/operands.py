"""Node inputs as activations in real numbers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from systole.sw.frontend.passes import codes
from systole.sw.frontend.passes.emitter import Emitter
from systole.sw.frontend.passes.layout import OnnxView
from systole.sw.frontend.passes.quantiser import Quantiser
from systole.sw.frontend.passes.results import ResultTable
from systole.sw.frontend.passes.tensors import TensorTable
from systole.sw.frontend.passes.values import (
    ADVICE,
    Affine,
    Computed,
    Const,
    Dequantised,
    Function,
    Node,
    Pending,
    Quant,
    QuantConst,
    Quantised,
    RealInput,
    Value,
)
from systole.sw.ir.graph import ModelError

CHOOSING = frozenset(
    ("Clip", "Concat", "DepthToSpace", "Dropout", "Expand", "Flatten", "Gather", "GlobalMaxPool")
    + ("Identity", "MaxPool", "Pad", "ReduceMax", "Relu", "Reshape", "Resize", "Slice")
    + ("SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze", "Upsample")
)
"""Operators whose results are elements of their operands, clamped or not, and constants."""


class Operands:
    """Reads node inputs as dequantised activations, whatever stands for them.

    A constant becomes a constant tensor. A result without a scale takes the quantisation of its
    operands, or one that follows in the model, where that changes nothing."""

    def __init__(
        self, results: ResultTable, tensors: TensorTable, emitter: Emitter, quantiser: Quantiser
    ):
        self._results = results
        self._tensors = tensors
        self._emitter = emitter
        self._quantiser = quantiser
        self._constants: dict[QuantConst, Dequantised] = {}
        """Constants that a node reads as they are."""

    def activation(self, node: Node, index: int) -> Dequantised:
        """Input ``index`` of the node, which must be a dequantised activation, or a constant that
        can be one."""
        return self.real(node, self._results.operand(node, index), index)

    def real(self, node: Node, value: Value | None, index: int) -> Dequantised:
        """As :meth:`activation` for ``value``, which stands for input ``index``."""
        if isinstance(value, Pending):
            value = self._emitter.settle(value) or value
        if isinstance(value, QuantConst):
            return self.constant(node, value)
        if isinstance(value, Dequantised):
            return value
        if isinstance(value, Pending | Computed | Function | Affine | RealInput):
            if (early := self.early(node, value, index)) is not None:
                return early
            raise node.fail(
                f"operand {node.input(index)!r} is float32: a QuantizeLinear and "
                f"DequantizeLinear are needed before it ({ADVICE})"
            )
        raise node.fail(f"operand {index} must be a dequantised activation")

    def dequantise(self, node: Node, value: Value | None, quant: Quant) -> Dequantised:
        """A quantised activation, or constant, in real numbers; gives a graph input its scale."""
        shift = 128 if quant.unsigned else 0
        if isinstance(value, Const):
            scale, zero = np.reshape(quant.scale, 1), np.reshape(quant.zero + shift, 1)
            return self.constant(node, QuantConst(value.array, scale, zero, 0))
        if not isinstance(value, Quantised):
            raise node.fail("its operand must be a quantised (int8 or uint8) activation")
        if quant.unsigned != self._tensors.is_unsigned(value.tensor):
            raise node.fail("the zero point's type differs from the activation's")
        own = self._tensors.quantise_as(value.tensor, quant)
        if own.zero != quant.zero:
            raise node.fail(
                f"zero point {quant.zero + shift} differs from the activation's own "
                f"{own.zero + shift}"
            )
        return Dequantised(value.tensor, value.view, quant.scale)

    def fused(self, node: Node, index: int) -> Dequantised:
        """Input ``index`` of an operator of fused form, an activation or a constant, with its scale
        and zero point in the next two inputs."""
        quant = self._results.quant(node, index + 1)
        return self.dequantise(node, self._results.operand(node, index), quant)

    def constant(self, node: Node, value: QuantConst) -> Dequantised:
        """A constant as an activation, which gets its layout where it is read."""
        if value not in self._constants:
            array, quant = codes.of_quantised(node, value)
            name = self._tensors.add_constant(node, array, quant)
            view = OnnxView.contiguous(array.shape)
            self._constants[value] = Dequantised(name, view, quant.scale)
        return self._constants[value]

    def early(self, node: Node, value: Value, index: int) -> Dequantised | None:
        """``value``, input ``index`` of a node that chooses among its elements, quantised in front
        of the node as all of the node's results are behind it. None if they are not, or not alike.

        Rounding keeps the order of numbers, so the results are the same."""
        quants = set(self._quants_behind(node.raw))
        if len(quants) != 1:
            return None
        (quant,) = quants
        if quant is None:
            return None
        name = self._tensors.free_name(node.input(index) or "")
        result = self._quantiser.quantise(node.with_output(name), value, quant)
        return Dequantised(result.tensor, result.view, quant.scale)

    def _quants_behind(self, raw: ir.Node) -> Iterator[Quant | None]:
        """How the results of a node that chooses among the elements of its first operands, or of
        all, are quantised, directly or behind more of these; None where they are not."""
        if not _chooses(raw):
            yield None
            return
        for output in raw.outputs:
            if output.is_graph_output():
                yield None
            for user, place in output.uses():
                if user.op_type == "QuantizeLinear" and place == 0:
                    try:
                        yield self._results.quantize_linear(Node(user))
                    except ModelError:
                        yield None
                else:
                    yield from self._quants_behind(user)


def _chooses(raw: ir.Node) -> bool:
    """Whether a node is one of CHOOSING (a Resize: of mode nearest)."""
    known = raw.op_type in CHOOSING and raw.domain in ("", "ai.onnx")
    return known and Node(raw).string("mode", "nearest") not in ("linear", "cubic")
