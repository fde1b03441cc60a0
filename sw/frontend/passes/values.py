"""Symbolic values that pass 2 interprets the nodes with, and the nodes themselves.

* ``Const``       a constant array;
* ``QuantConst``  a dequantised constant: weights or a bias;
* ``Quantised``   an int8/uint8 activation, as a view of a stored tensor;
* ``Dequantised`` the same in real numbers: what arithmetic operators take;
* ``Function``    a real function of one stored tensor's elements, by its 256 values;
* ``Affine``      a real function of the channels of one stored tensor: a gain and a shift for each;
* ``RealInput``   a float graph input, not quantised yet;
* ``Pending``     an operator's real result, waiting for the QuantizeLinear that gives it a scale;
* ``Computed``    a real function of each element of such a result.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, overload

import numpy as np
import onnx_ir as ir

from systole.sw.frontend.passes.layout import OnnxView, Shape
from systole.sw.ir.graph import ModelError, Op

ADVICE = "python -m sw.quantize quantises float operators that int8 serves"
"""What to do about a float value that int8 could stand for."""


@dataclass(frozen=True, eq=False)
class Const:
    array: np.ndarray


@dataclass(frozen=True, eq=False)
class QuantConst:
    """``(array - zero) * scale``; ``scale`` and ``zero`` are scalars or run along ``axis``."""

    array: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    axis: int

    @property
    def real(self) -> np.ndarray:
        """float64."""
        shape = [1] * self.array.ndim
        if max(self.scale.size, self.zero.size) > 1:
            shape[self.axis] = -1
        zero, scale = (
            v.astype(np.float64).reshape(shape if v.size > 1 else ())
            for v in (self.zero, self.scale)
        )
        return (self.array - zero) * scale


@dataclass(frozen=True)
class Quantised:
    tensor: str
    view: OnnxView


@dataclass(frozen=True)
class Dequantised:
    tensor: str
    view: OnnxView
    scale: np.float32


@dataclass(frozen=True, eq=False)
class Function:
    """A function of each element of ``tensor``: ``values[q + 128]`` is its result, not yet
    quantised, for the stored int8 q. ``view`` stands on the stored array."""

    tensor: str
    view: OnnxView
    values: np.ndarray
    op_types: tuple[str, ...] = ()
    """ONNX types of the nodes that it consists of, in order."""


@dataclass(frozen=True, eq=False)
class Affine:
    """``gain * x + shift`` channel by channel, clamped, where x is ``tensor`` in real numbers of
    ``scale``; with ``below`` instead of ``gain`` where x < 0. ``view`` stands on the stored
    array."""

    name: str
    """Name of the first node that it consists of."""
    op_types: tuple[str, ...]
    tensor: str
    view: OnnxView
    scale: np.float32
    gain: np.ndarray
    """float64 (channels,)."""
    shift: np.ndarray
    """float64 (channels,), 0 if there is ``below``."""
    below: np.ndarray | None = None
    low: float = -math.inf
    high: float = math.inf


@dataclass(frozen=True)
class RealInput:
    name: str
    shape: tuple[int, ...]
    """The graph input's shape, however ``view`` reshapes it."""
    view: OnnxView


@dataclass(frozen=True, eq=False)
class Pending:
    """``op`` with the scale of its result taken as 1 and no clamp; ``shape`` is the stored shape of
    the result, ``view`` its model form, ``low``/``high`` the clamps met so far."""

    op: Op
    shape: Shape
    view: OnnxView
    low: float = -math.inf
    high: float = math.inf
    off: float = 0.0
    """By how much, in real numbers, rounding an operand or its factor may falsify it."""
    fill: float = 0.0
    """The real number of what a Select takes from no element: whole channels, or the places that
    ``marks`` marks."""
    marks: str | None = None
    """Constant tensor of a Select that pads channels in places: -1 or 1 there, 0 elsewhere. Its
    picks get scale and weight with the result's quantisation."""
    base: Pending | None = None
    """The result that this one is ``gain`` times and ``shift`` more than, clamps aside."""
    gain: float = 1.0
    shift: float = 0.0


@dataclass(frozen=True, eq=False)
class Computed:
    """A function of each element of an operator's result, which has no scale and no clamp."""

    x: Pending
    view: OnnxView
    compute: Callable[[np.ndarray], np.ndarray]
    """Of float32 numbers."""
    op_types: tuple[str, ...] = ()
    """As of a :class:`Function`."""


Variable = Quantised | Dequantised | Function | Affine | RealInput | Pending | Computed
"""What is not constant."""
Value = Const | QuantConst | Variable


@dataclass(frozen=True)
class Quant:
    """Quantisation of an activation; ``zero`` in the int8 domain."""

    scale: np.float32
    zero: int
    unsigned: bool

    def value(self, x: float) -> int:
        """The int8 of a real number (a clamp's bound)."""
        if math.isinf(x):
            return -128 if x < 0 else 127
        return int(np.clip(np.rint(np.float32(x) / self.scale) + self.zero, -128, 127))


class OpFields(TypedDict):
    """The fields that all operators of the graph have."""

    name: str
    op_type: str
    output: str
    low: int
    high: int


class Node:
    """An ONNX node with checked access to its attributes, and errors that name it."""

    def __init__(self, raw: ir.Node):
        self.raw = raw
        self.op_type = raw.op_type
        self.name = raw.name or (raw.outputs[0].name if raw.outputs else "") or ""
        self.output = raw.outputs[0].name or "" if raw.outputs else ""
        """Name of the output that a result is for: the first, if :meth:`with_output` named no
        other."""

    def with_output(self, output: str) -> Node:
        """The same node, its result being for ``output``."""
        node = copy.copy(self)
        node.output = output
        return node

    def input(self, index: int) -> str | None:
        """The name of input ``index``; None where the node leaves it out."""
        value = self.raw.inputs[index] if index < self.input_count else None
        return None if value is None else value.name

    @property
    def input_count(self) -> int:
        return len(self.raw.inputs)

    def fields(self, op_type: str | None = None, *, name: str | None = None) -> OpFields:
        """The common fields of an operator that computes the node, not yet named or clamped."""
        return {
            "name": self.name if name is None else name,
            "op_type": self.op_type if op_type is None else op_type,
            "output": "",
            "low": -128,
            "high": 127,
        }

    def fail(self, why: str) -> ModelError:
        """The error of a node that is not supported for the reason ``why``."""
        return ModelError(f"{self.op_type} {self.name!r}: {why}")

    def integer(self, name: str, default: int) -> int:
        return self._attribute(name, (ir.AttributeType.INT,), default)

    def real(self, name: str, default: float) -> float:
        return float(self._attribute(name, (ir.AttributeType.FLOAT, ir.AttributeType.INT), default))

    def string(self, name: str, default: str) -> str:
        return self._attribute(name, (ir.AttributeType.STRING,), default)

    @overload
    def integers(
        self, name: str, default: Sequence[int], *, low: int | None = None, count: int = 0
    ) -> tuple[int, ...]: ...
    @overload
    def integers(
        self, name: str, default: None, *, low: int | None = None, count: int = 0
    ) -> tuple[int, ...] | None: ...
    def integers(
        self, name: str, default: Sequence[int] | None, *, low: int | None = None, count: int = 0
    ) -> tuple[int, ...] | None:
        """``count`` (0: any number of) integers, each at least ``low``."""
        values = self._attribute(name, (ir.AttributeType.INTS,), default)
        if values is None:
            return None
        values = tuple(values)
        if count and len(values) != count:
            raise self.fail(f"{name} = {list(values)} has {len(values)} values, {count} needed")
        if low is not None and any(v < low for v in values):
            raise self.fail(f"{name} = {list(values)}: each must be at least {low}")
        return values

    def _attribute(self, name: str, types: tuple[ir.AttributeType, ...], default: Any) -> Any:
        attribute = self.raw.attributes.get(name)
        if attribute is None:
            return default
        if attribute.type not in types:
            raise self.fail(f"attribute {name} has type {attribute.type.name}")
        return attribute.value
