"""The operators that lowering has emitted."""

from __future__ import annotations

from dataclasses import replace

from systole.sw.frontend.passes import finish
from systole.sw.frontend.passes.layout import Shape
from systole.sw.frontend.passes.tensors import TensorTable
from systole.sw.frontend.passes.values import Dequantised, Pending, Quant
from systole.sw.ir.graph import Op


class Emitter:
    """The graph's operators in order, and the operator that computes each tensor."""

    def __init__(self, tensors: TensorTable):
        self.ops: list[Op] = []
        self._tensors = tensors
        self._producers: dict[str, Op] = {}
        self._settled: dict[Op, str] = {}
        """Tensors of results in the quantisation of their operands, by operator."""

    def emit(
        self,
        op: Op,
        name: str,
        *,
        shape: Shape,
        quant: Quant,
        low: int = -128,
        high: int = 127,
    ) -> str:
        """Append ``op`` with its result, tensor ``name``, and its clamp; return ``name``."""
        self._tensors.add_result(name, quant, shape)
        self._producers[name] = replace(op, output=name, low=low, high=high)
        self.ops.append(self._producers[name])
        return name

    def producer(self, tensor: str) -> Op | None:
        """The operator that computes a tensor; None for inputs and constants."""
        return self._producers.get(tensor)

    def move_last_behind(self, tensor: str) -> None:
        """Move the last operator to right behind the producer of ``tensor``, where the array has
        other work meanwhile; nothing if ``tensor`` has no producer."""
        producer = self._producers.get(tensor)
        if producer is not None:
            self.ops.insert(self.ops.index(producer) + 1, self.ops.pop())

    def settle(self, value: Pending) -> Dequantised | None:
        """Emit a result that fits the scale and zero point of its operands in these; None if it
        does not fit them."""
        quants = {self._tensors.quant(name) for name in value.op.inputs if name != value.marks}
        if len(quants) != 1:
            return None
        (quant,) = quants
        op = finish.unscaled(value, quant)
        if op is None:
            return None
        if value.op not in self._settled:
            name = f"{op.name}:{len(self._settled)}"
            self._settled[value.op] = self.emit(op, name, shape=value.shape, quant=quant)
        return Dequantised(self._settled[value.op], value.view, quant.scale)
