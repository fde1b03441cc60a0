"""Pass 2, lower: the folded model to a ``sw.graph.Graph``.

The nodes are interpreted in topological order with symbolic values:

* ``Const``       a constant array;
* ``QuantConst``  a dequantised constant: weights or a bias;
* ``Quantised``   an int8/uint8 activation, as a view of a stored tensor;
* ``Dequantised`` the same in real numbers: what arithmetic operators take;
* ``RealInput``   a float graph input, not quantised yet;
* ``Pending``     an operator's real result, waiting for the QuantizeLinear that gives it a scale.

So a QDQ graph and a graph of fused operators (QLinearConv ...) come out the same: the latter is
dequantise, operator, quantise in one node. ``sw.passes.operators`` has the operators.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from sw.graph import Binary, Conv, Graph, ModelError, Op, Pool, Port, Tensor
from sw.passes.layout import LayoutError, View, input_perm, output_perm


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


@dataclass(frozen=True)
class Quantised:
    tensor: str
    view: View


@dataclass(frozen=True)
class Dequantised:
    tensor: str
    view: View
    scale: np.float32


@dataclass(frozen=True)
class RealInput:
    name: str
    view: View


@dataclass(frozen=True, eq=False)
class Pending:
    """``op`` with the scale of its result taken as 1 and no clamp; ``shape`` is the stored shape of
    the result, ``view`` its model form, ``low``/``high`` the clamps met so far."""

    op: Op
    shape: tuple[int, int, int, int]
    view: View
    low: float = -math.inf
    high: float = math.inf


Value = Const | QuantConst | Quantised | Dequantised | RealInput | Pending


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


@dataclass
class Stored:
    """A tensor in the making. Graph inputs get scale and layout from their first consumers."""

    unsigned: bool
    quant: Quant | None
    shape: tuple[int, int, int, int] | None
    onnx_shape: tuple[int, ...] | None = None
    perm: tuple[int, ...] | None = None
    layout: View | None = None
    """Graph inputs: the stored form as a view of the model's array, once bound."""


class Node:
    """An ONNX node with checked attribute access and errors that name it."""

    def __init__(self, raw: ir.Node):
        self.raw = raw
        self.op_type = raw.op_type
        self.name = raw.name or (raw.outputs[0].name if raw.outputs else "") or ""
        self.output = raw.outputs[0].name or "" if raw.outputs else ""

    def fail(self, why: str) -> ModelError:
        return ModelError(f"{self.op_type} {self.name!r}: {why}")

    def _attribute(self, name: str, types: tuple[ir.AttributeType, ...], default: Any) -> Any:
        attribute = self.raw.attributes.get(name)
        if attribute is None:
            return default
        if attribute.type not in types:
            raise self.fail(f"attribute {name} has type {attribute.type.name}")
        return attribute.value

    def int(self, name: str, default: int | None) -> int | None:
        return self._attribute(name, (ir.AttributeType.INT,), default)

    def float(self, name: str, default: float) -> float:
        return float(self._attribute(name, (ir.AttributeType.FLOAT, ir.AttributeType.INT), default))

    def string(self, name: str, default: str) -> str:
        return self._attribute(name, (ir.AttributeType.STRING,), default)

    def ints(
        self, name: str, default: Sequence[int] | None, low: int | None = None, count: int = 0
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


class Lowering:
    """State of the interpretation, and what several operators need of it."""

    def __init__(self, model: ir.Model):
        self.model = model
        self.values: dict[str, Value] = {}
        self.tensors: dict[str, Stored] = {}
        self.ops: list[Op] = []
        self.input_types: dict[str, str] = {}
        self.ports: dict[str, str] = {}
        """Tensor of each float input once quantised, of each int8/uint8 input from the start."""

    def run(self, operators: dict[tuple[str, str], Any]) -> Graph:
        graph = self.model.graph
        for value in graph.initializers.values():
            self.values[value.name] = Const(_array(value))
        for value in graph.inputs:
            self._input(value)
        for raw in graph:
            node = Node(raw)
            handler = operators.get((raw.domain, raw.op_type))
            if handler is None:
                names = ", ".join(sorted(name for _, name in operators))
                raise node.fail(f"operator not supported; supported are {names}")
            self.values[node.output] = handler(self, node)
        outputs = [self._output(value.name) for value in graph.outputs]
        return self._graph(outputs)

    # Graph inputs and outputs --------------------------------------------------------------------

    def _input(self, value: ir.Value) -> None:
        name = value.name
        if value.dtype is None or value.dtype.name not in ("FLOAT", "INT8", "UINT8"):
            kind = value.dtype.name.lower() if value.dtype else "unknown"
            raise ModelError(f"input {name!r} has type {kind}; it must be float32, int8 or uint8")
        shape = tuple(value.shape.dims)
        view = View.contiguous(shape)
        if value.dtype.name == "FLOAT":
            self.input_types[name] = "float32"
            self.values[name] = RealInput(name, view)
        else:
            self.input_types[name] = value.dtype.name.lower()
            unsigned = value.dtype.name == "UINT8"
            self.tensors[name] = Stored(unsigned, None, None, shape)
            self.values[name] = Quantised(name, view)
            self.ports[name] = name

    def _output(self, name: str) -> Port:
        value = self.values.get(name)
        if not isinstance(value, Quantised | Dequantised):
            raise ModelError(
                f"output {name!r} is not quantised: only an int8 or uint8 tensor or the "
                "DequantizeLinear of one can be returned"
            )
        stored = self.tensors[value.tensor]
        if value.tensor in self.ports.values():
            raise ModelError(f"output {name!r} is a graph input passed through")
        try:
            perm = output_perm(value.view)
        except LayoutError as e:
            raise ModelError(f"output {name!r}: layout cannot be stored: {e}") from None
        form = (value.view.shape, perm)
        if stored.onnx_shape is not None and (stored.onnx_shape, stored.perm) != form:
            raise ModelError(f"output {name!r} is returned in two shapes")
        stored.onnx_shape, stored.perm = form
        if isinstance(value, Quantised):
            return Port(name, value.tensor, "uint8" if stored.unsigned else "int8")
        if value.scale != stored.quant.scale:
            raise ModelError(
                f"output {name!r} is dequantised with scale {value.scale}, "
                f"quantised with {stored.quant.scale}"
            )
        return Port(name, value.tensor, "float32")

    def _graph(self, outputs: list[Port]) -> Graph:
        tensors = {}
        used = {x for op in self.ops for x in op.inputs} | {op.output for op in self.ops}
        for name, stored in self.tensors.items():
            if name not in used:
                continue
            view = View.contiguous(stored.shape)
            if stored.onnx_shape is None:
                stored.onnx_shape, stored.perm = stored.shape, output_perm(view)
            q = stored.quant
            tensors[name] = Tensor(
                name, stored.shape, q.scale, q.zero, q.unsigned, stored.onnx_shape, stored.perm
            )
        inputs = [
            Port(name, self.ports[name], kind)
            for name, kind in self.input_types.items()
            if self.ports.get(name) in tensors
        ]
        if not self.ops:
            raise ModelError("the model has no operator to compute")
        return Graph(self.model.graph.name or "", tensors, self.ops, inputs, outputs)

    # Operands ------------------------------------------------------------------------------------

    def operand(self, node: Node, index: int) -> Value | None:
        """The symbolic value of input ``index``; None where the node leaves it out."""
        inputs = node.raw.inputs
        if index >= len(inputs) or inputs[index] is None:
            return None
        name = inputs[index].name
        if name not in self.values:
            raise node.fail(f"input {name!r} is an output other than a node's first")
        return self.values[name]

    def const(self, node: Node, index: int, what: str) -> np.ndarray | None:
        value = self.operand(node, index)
        if value is None:
            return None
        if not isinstance(value, Const):
            raise node.fail(f"{what} must be constant")
        return value.array

    def scale(self, node: Node, index: int, what: str = "scale") -> np.ndarray:
        array = self.const(node, index, what)
        if array is None:
            raise node.fail(f"{what} is missing")
        if array.dtype != np.float32:
            raise node.fail(f"{what} has type {array.dtype}; float32 is needed")
        if not (np.isfinite(array).all() and (array > 0).all()):
            bad = array[~(np.isfinite(array) & (array > 0))].flat[0]
            raise node.fail(f"{what} = {bad}: it must be positive and finite")
        return array

    def quant(self, node: Node, index: int, unsigned: bool | None = None) -> Quant:
        """Per-tensor quantisation from the scale at input ``index`` and the zero point behind it;
        without a zero point the type is ``unsigned``."""
        scale = self.scale(node, index)
        if scale.size != 1:
            raise node.fail(
                f"scale has {scale.size} values; activations are quantised per tensor (1)"
            )
        zero = self.const(node, index + 1, "zero point")
        if zero is None:
            zero = np.zeros((), np.uint8 if unsigned else np.int8)
        if zero.dtype not in (np.int8, np.uint8) or zero.size != 1:
            raise node.fail(f"zero point is {zero.dtype} {list(zero.shape)}; one int8 or uint8")
        is_unsigned = zero.dtype == np.uint8
        number = int(zero.reshape(())) - (128 if is_unsigned else 0)
        return Quant(np.float32(scale.reshape(())), number, is_unsigned)

    def dequantise(self, node: Node, value: Value | None, quant: Quant) -> Dequantised:
        """A quantised activation in real numbers; gives a graph input its scale."""
        if not isinstance(value, Quantised):
            raise node.fail("its operand must be a quantised (int8 or uint8) activation")
        stored = self.tensors[value.tensor]
        if quant.unsigned != stored.unsigned:
            raise node.fail("the zero point's type differs from the activation's")
        if stored.quant is None:
            stored.quant = quant
        if stored.quant.zero != quant.zero:
            shift = 128 if quant.unsigned else 0
            raise node.fail(
                f"zero point {quant.zero + shift} differs from the activation's own "
                f"{stored.quant.zero + shift}"
            )
        return Dequantised(value.tensor, value.view, quant.scale)

    def activation(self, node: Node, index: int) -> Dequantised:
        value = self.operand(node, index)
        if isinstance(value, Dequantised):
            return value
        if isinstance(value, Pending | RealInput):
            raise node.fail(
                f"operand {node.raw.inputs[index].name!r} is float32: a QuantizeLinear and "
                "DequantizeLinear are needed before it (quantise the model first)"
            )
        raise node.fail(f"operand {index} must be a dequantised activation")

    def known_quant(self, node: Node, value: Quantised) -> Quant:
        """Of an operator on int8 or uint8 itself, which says nothing of scales."""
        quant = self.tensors[value.tensor].quant
        if quant is None:
            raise node.fail(f"the scale of input {value.tensor!r} is not known here")
        return quant

    # Layout --------------------------------------------------------------------------------------

    def bound(self, node: Node, x: Quantised | Dequantised, view: View | None) -> View:
        """``x.view`` over the stored (N, C, H, W) array. A graph input not yet laid out is stored
        as ``view``, an (N, C, H, W) view of it (None: ``x`` itself, or rows and features)."""
        stored = self.tensors[x.tensor]
        try:
            if stored.shape is None:
                layout = view or default_layout(x.view)
                stored.perm = input_perm(stored.onnx_shape, layout)
                stored.shape, stored.layout = layout.shape, layout
            return x.view.rebase(stored.layout) if stored.layout else x.view
        except LayoutError as e:
            raise node.fail(f"the layout of {x.tensor!r} cannot be stored: {e}") from None

    def spatial(self, node: Node, x: Quantised | Dequantised) -> tuple[int, int, int, int]:
        """The stored shape of ``x``, which must be an image (N, C, H, W) or (N, C, W)."""
        if len(x.view.shape) not in (3, 4):
            raise node.fail(f"operand of rank {len(x.view.shape)}; 3 or 4 is needed")
        image = default_layout(x.view)
        view = self.bound(node, x, image)
        stored = self.tensors[x.tensor].shape
        if stored != image.shape or default_layout(view) != View.contiguous(stored):
            raise node.fail(
                f"{x.tensor!r} is stored as {list(stored)} and cannot be read as "
                f"{list(image.shape)} without moving data"
            )
        return stored

    # Results -------------------------------------------------------------------------------------

    def quantise(self, node: Node, value: Value | None, quant: Quant) -> Quantised:
        """What QuantizeLinear does: emits the pending operator with its scale and clamps."""
        if isinstance(value, RealInput):
            return self._quantise_input(node, value, quant)
        if isinstance(value, Dequantised):
            self.bound(node, value, None)
            value = self.pointwise(node, value)
        if not isinstance(value, Pending):
            raise node.fail("its operand is neither an activation nor a float input")
        op, low, high = value.op, quant.value(value.low), quant.value(value.high)
        if isinstance(op, Conv):
            op = replace(op, scale=self._checked(node, op.scale / quant.scale))
        elif isinstance(op, Binary):
            ratios = [np.float32(r) / quant.scale for r in (op.a_ratio, op.b_ratio)]
            if not all(2.0**-22 <= r < 2.0**22 for r in ratios):
                raise node.fail(f"scale ratios {ratios[0]}, {ratios[1]} outside 2^-22..2^22")
            op = replace(op, a_ratio=float(ratios[0]), b_ratio=float(ratios[1]))
        elif op.kind == "average":
            window = np.float32(math.prod(op.kernel))
            op = replace(op, scale=self._checked(node, op.scale / (quant.scale * window)))
        else:
            source = self.tensors[op.x].quant
            kept = Quant(op.scale, source.zero, source.unsigned)
            if quant == kept and (low, high) == (-128, 127) and op.pointwise:
                return Quantised(op.x, value.view)
            op = self._finish_maximum(node, value, kept, quant)
        name = self._emit(op, value, quant, low, high, node.output)
        return Quantised(name, value.view)

    def _finish_maximum(self, node: Node, value: Pending, source: Quant, quant: Quant) -> Op:
        """A maximum to another scale or zero point: first the maximum in its operand's, ``source``,
        then an average over one element, which changes the scale. (They commute.)"""
        op = value.op
        if (source.scale, source.zero) == (quant.scale, quant.zero):
            return replace(op, scale=np.float32(1))
        scale = self._checked(node, op.scale / quant.scale)
        if not op.pointwise:
            inner = self._emit(replace(op, scale=np.float32(1)), value, source, -128, 127)
            ones = {"kernel": (1, 1), "strides": (1, 1), "dilations": (1, 1)}
            op = replace(op, x=inner, pads=(0, 0, 0, 0), **ones)
        return replace(op, kind="average", scale=scale)

    def _checked(self, node: Node, scale: np.ndarray) -> np.ndarray:
        if not (np.isfinite(scale).all() and (scale > 0).all() and (scale < 2.0**24).all()):
            raise node.fail(
                f"requantisation scale {np.min(scale)}..{np.max(scale)} is outside 0..2^24"
            )
        return scale

    def _emit(
        self, op: Op, pending: Pending, quant: Quant, low: int, high: int, name: str = ""
    ) -> str:
        name = name or f"{op.name}:before requantisation"
        self.tensors[name] = Stored(quant.unsigned, quant, pending.shape)
        self.ops.append(replace(op, output=name, low=low, high=high))
        return name

    def _quantise_input(self, node: Node, value: RealInput, quant: Quant) -> Quantised:
        known = self.ports.get(value.name)
        if known is None:
            known = self.ports[value.name] = node.output
            shape = next(v for v in self.model.graph.inputs if v.name == value.name).shape
            self.tensors[known] = Stored(quant.unsigned, quant, None, tuple(shape.dims))
        elif self.tensors[known].quant != quant:
            raise node.fail(f"input {value.name!r} is quantised in two ways")
        return Quantised(known, value.view)

    def pointwise(self, node: Node, x: Dequantised) -> Pending:
        """``x`` as the result of an operator that changes nothing, to clamp or requantise it."""
        view = self.bound(node, x, None)
        op = Pool(
            name=node.name,
            op_type=node.op_type,
            output="",
            low=-128,
            high=127,
            x=x.tensor,
            kind="max",
            kernel=(1, 1),
            strides=(1, 1),
            pads=(0, 0, 0, 0),
            scale=x.scale,
        )
        return Pending(op, self.tensors[x.tensor].shape, view)


def default_layout(view: View) -> View:
    """The (N, C, H, W) form of a value by its rank: (N, C, H, W) itself, (N, C, W) with H = 1, a
    matrix of rows and features as (1, features, 1, rows)."""
    d, s = view.dims, view.shape
    if len(s) == 4:
        return view
    if len(s) == 3:
        return View((s[0], s[1], 1, s[2]), (d[0], d[1], (), d[2]))
    rows = View(s[:-1], d[:-1]).reshape((math.prod(s[:-1]),)) if len(s) > 1 else View((1,), ((),))
    features = s[-1] if s else 1
    return View((1, features, 1, rows.shape[0]), ((), d[-1] if s else (), (), rows.dims[0]))


def _array(value: ir.Value) -> np.ndarray:
    try:
        return value.const_value.numpy()
    except Exception as e:
        raise ModelError(f"initialiser {value.name!r} cannot be read: {e}") from None
