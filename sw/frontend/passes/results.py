"""The result table: the symbolic value of every ONNX value, and what nodes read of it."""

from __future__ import annotations

import numpy as np

from systole.sw.frontend.passes.values import Const, Node, Quant, Value


class ResultTable:
    """The symbolic values computed so far, by the names of the ONNX values.

    Its methods read one input of a node. Each raises :class:`~sw.ir.graph.ModelError`, in the name
    of the node, for an input that is not what the method returns."""

    def __init__(self) -> None:
        self._values: dict[str, Value] = {}

    def set(self, name: str, value: Value) -> None:
        """Note the value of an initialiser, a graph input or a node's output."""
        self._values[name] = value

    def get(self, name: str) -> Value | None:
        return self._values.get(name)

    def operand(self, node: Node, index: int) -> Value | None:
        """The value of input ``index``; None where the node leaves it out."""
        name = node.input(index)
        if name is None:
            return None
        if name not in self._values:
            raise node.fail(f"input {name!r} is an output that its node does not give here")
        return self._values[name]

    def operands(self, node: Node) -> list[Value | None]:
        """The values of all inputs."""
        return [self.operand(node, i) for i in range(node.input_count)]

    def const(self, node: Node, index: int, what: str) -> np.ndarray | None:
        """The constant at input ``index``, called ``what`` in errors; None where left out."""
        value = self.operand(node, index)
        if value is None:
            return None
        if not isinstance(value, Const):
            raise node.fail(f"{what} must be constant")
        return value.array

    def scale(self, node: Node, index: int, what: str = "scale") -> np.ndarray:
        """The float32 scales at input ``index``, all positive and finite."""
        array = self.const(node, index, what)
        if array is None:
            raise node.fail(f"{what} is missing")
        if array.dtype != np.float32:
            raise node.fail(f"{what} has type {array.dtype}; float32 is needed")
        valid = np.isfinite(array) & (array > 0)
        if not valid.all():
            raise node.fail(f"{what} = {array[~valid].flat[0]}: it must be positive and finite")
        return array

    def quant(self, node: Node, index: int, *, unsigned: bool | None = None) -> Quant:
        """The per-tensor quantisation from the scale at input ``index`` and the zero point behind
        it. Without a zero point the type is uint8 if ``unsigned``, else int8."""
        scale = self.scale(node, index)
        if scale.size != 1:
            raise node.fail(
                f"scale has {scale.size} values; activations are quantised per tensor (1)"
            )
        zero = self.const(node, index + 1, "zero point")
        if zero is None:
            zero = np.zeros((), np.uint8 if unsigned else np.int8)
        if zero.dtype not in (np.int8, np.uint8) or zero.size != 1:
            raise node.fail(
                f"zero point is {zero.dtype} {list(zero.shape)}; one int8 or uint8 is needed"
            )
        is_unsigned = zero.dtype == np.uint8
        number = int(zero.reshape(())) - (128 if is_unsigned else 0)
        return Quant(np.float32(scale.reshape(())), number, is_unsigned)

    def quantize_linear(self, node: Node) -> Quant:
        """The quantisation that a QuantizeLinear gives."""
        return self.quant(node, 1, unsigned=node.integer("output_dtype", 2) == 2)
