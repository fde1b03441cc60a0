"""Functions of one activation, and the tensors that an activation is itself a function of."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from systole.sw.frontend.passes import moves
from systole.sw.frontend.passes.emitter import Emitter
from systole.sw.frontend.passes.quantiser import Quantiser
from systole.sw.frontend.passes.tensors import TensorTable
from systole.sw.frontend.passes.values import Dequantised, Function, Node, Pending, Value
from systole.sw.ir.graph import Pool, Select, Table


class Origins:
    """Expresses values as elementwise functions of stored tensors, through tables and clamps
    already emitted, so that functions of several values of one tensor become one table."""

    def __init__(self, tensors: TensorTable, emitter: Emitter, quantiser: Quantiser):
        self._tensors = tensors
        self._emitter = emitter
        self._quantiser = quantiser

    def function(self, node: Node, value: Value | None) -> Function | None:
        """An activation, clamped or not, as a function of its elements; None if it is none."""
        if isinstance(value, Dequantised):
            value = self._quantiser.pointwise(node, value)
        if isinstance(value, Pending) and isinstance(value.op, Select):
            (name, *others), shape = value.op.inputs, value.shape
            source = self._tensors.shape(name)
            if not others and moves.is_identity(value.op, shape, source):
                scale = np.float32(value.op.phases[0][0].scale)
                number = np.arange(-128, 128) - self._tensors.quant(name).zero
                real = np.clip(number.astype(np.float32) * scale, value.low, value.high)
                return Function(name, value.view, real)
        return value if isinstance(value, Function) else None

    def chain(self, f: Function) -> list[Function]:
        """``f`` itself, and as a function of each tensor that its own is a function of."""
        out = [f]
        for op in self._functions_behind(f.tensor):
            codes = op.values if isinstance(op, Table) else np.arange(-128, 128)
            inner = np.clip(codes.astype(np.int16), op.low, op.high)
            types = (*op.op_type.split("+"), *out[-1].op_types)
            out.append(Function(op.x, f.view, out[-1].values[inner + 128], types))
        return out

    def may_be_one(self, values: Sequence[Value | None]) -> bool:
        """Whether the activations among ``values`` come from one tensor by functions alone."""
        tensors = []
        for value in values:
            if isinstance(value, Dequantised | Function):
                name = value.tensor
            elif isinstance(value, Pending) and isinstance(value.op, Select):
                name = value.op.inputs[0]
            else:
                continue
            tensors.append({name, *(op.x for op in self._functions_behind(name))})
        return bool(tensors) and bool(set.intersection(*tensors))

    def _functions_behind(self, tensor: str) -> list[Table | Pool]:
        """The tables and clamps that ``tensor`` comes from, the last one first."""
        out: list[Table | Pool] = []
        op = self._emitter.producer(tensor)
        while isinstance(op, Table) or (isinstance(op, Pool) and op.is_clamp):
            out.append(op)
            op = self._emitter.producer(op.x)
        return out
