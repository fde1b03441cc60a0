"""Pass 2, lower: the folded model to a ``sw.ir.graph.Graph``.

The nodes are interpreted in topological order with the symbolic values of ``values``. So a QDQ
graph and a graph of fused operators (QLinearConv ...) come out the same: the latter is dequantise,
operator, quantise in one node. ``operators`` has the operators.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from systole.sw.frontend.passes import channels, codes, finish, moves
from systole.sw.frontend.passes.layout import (
    LayoutError,
    OnnxView,
    default_layout,
    input_perm,
    merge,
    output_perm,
)
from systole.sw.frontend.passes.values import (
    Affine,
    Const,
    Dequantised,
    Function,
    Node,
    Pending,
    Quant,
    QuantConst,
    Quantised,
    RealInput,
    Stored,
    Value,
)
from systole.sw.ir.graph import (
    Binary,
    Conv,
    ConvTranspose,
    Graph,
    MatMul,
    ModelError,
    Op,
    Pool,
    Port,
    Select,
    Table,
    Tensor,
    Transpose,
)

CHOOSING = frozenset(
    ("Clip", "Concat", "DepthToSpace", "Dropout", "Expand", "Flatten", "Gather", "GlobalMaxPool")
    + ("Identity", "MaxPool", "Pad", "ReduceMax", "Relu", "Reshape", "Resize", "Slice")
    + ("SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze", "Upsample")
)
"""Operators whose results are elements of their operands, clamped or not, and constants."""


def _chooses(raw: ir.Node) -> bool:
    """It is one of these (a Resize: of mode nearest)."""
    known = raw.op_type in CHOOSING and raw.domain in ("", "ai.onnx")
    return known and Node(raw).string("mode", "nearest") not in ("linear", "cubic")


class GraphBuilder:
    """State of the interpretation, and what several operators need of it."""

    def __init__(self, model: ir.Model):
        self.model = model
        self.values: dict[str, Value] = {}
        self.tensors: dict[str, Stored] = {}
        self.ops: list[Op] = []
        self.made: dict[str, Op] = {}
        """The operator that makes each tensor."""
        self.opsets: dict[str, int] = dict(model.graph.opset_imports)
        self.emitted: dict[tuple, str] = {}
        """Tensors of results quantised, by what was, and how."""
        self.settled: dict[Any, str] = {}
        """Tensors of results that got no scale of their own, by operator or by origin."""
        self.arranged: dict[tuple, Dequantised] = {}
        """Tensors with the elements of others in another order, by tensor and order."""
        self.input_types: dict[str, str] = {}
        self.constants: dict[str, np.ndarray] = {}
        """The tensors that nothing computes, int8 in the model's own shape."""
        self.fixed: dict[QuantConst, Dequantised] = {}
        """The constants among them that a node reads as they are."""
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
                names = ", ".join(sorted({name for _, name in operators}))
                raise node.fail(f"operator not supported; supported are {names}")
            made = handler(self, node)
            results = made if isinstance(made, tuple) else (made,)
            for output, value in zip(raw.outputs, results, strict=False):
                self.values[output.name] = value
        outputs = [self._output(value.name) for value in graph.outputs]
        return self._graph(outputs)

    # Graph inputs and outputs --------------------------------------------------------------------

    def _input(self, value: ir.Value) -> None:
        name = value.name
        if value.dtype is None or value.dtype.name not in ("FLOAT", "INT8", "UINT8"):
            kind = value.dtype.name.lower() if value.dtype else "unknown"
            raise ModelError(f"input {name!r} has type {kind}; it must be float32, int8 or uint8")
        shape = tuple(value.shape.dims)
        view = OnnxView.contiguous(shape)
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
        try:
            perm = output_perm(value.view)
        except LayoutError:
            producer = next(v for v in self.model.graph.outputs if v.name == name).producer()
            value = self.plain(Node(producer), value)
            perm = output_perm(value.view)
        if value.tensor in self.ports.values():
            raise ModelError(f"output {name!r} is a graph input passed through")
        if value.tensor in self.constants:
            raise ModelError(f"output {name!r} is a constant")
        stored = self.tensors[value.tensor]
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
            view = OnnxView.contiguous(stored.shape)
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
        constants = {
            name: np.ascontiguousarray(self._stored(name))
            for name in self.constants
            if name in tensors
        }
        name = self.model.graph.name or ""
        return Graph(name, tensors, self.ops, inputs, outputs, constants)

    # Operands ------------------------------------------------------------------------------------

    def operand(self, node: Node, index: int) -> Value | None:
        """The symbolic value of input ``index``; None where the node leaves it out."""
        inputs = node.raw.inputs
        if index >= len(inputs) or inputs[index] is None:
            return None
        name = inputs[index].name
        if name not in self.values:
            raise node.fail(f"input {name!r} is an output that its node does not give here")
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
        """A quantised activation, or constant, in real numbers; gives a graph input its scale."""
        if isinstance(value, Const):
            shift = 128 if quant.unsigned else 0
            scale, zero = np.reshape(quant.scale, 1), np.reshape(quant.zero + shift, 1)
            return self.constant(node, QuantConst(value.array, scale, zero, 0))
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
        return self.real(node, self.operand(node, index), index)

    def real(self, node: Node, value: Value | None, index: int) -> Dequantised:
        """``value``, input ``index`` of the node, which must be a dequantised activation, or a
        constant that can be one."""
        if isinstance(value, Pending):
            value = self._settle(value) or value
        if isinstance(value, QuantConst):
            return self.constant(node, value)
        if isinstance(value, Dequantised):
            return value
        if isinstance(value, Pending | Function | Affine | RealInput):
            if (early := self.early(node, value, index)) is not None:
                return early
            raise node.fail(
                f"operand {node.raw.inputs[index].name!r} is float32: a QuantizeLinear and "
                "DequantizeLinear are needed before it (quantise the model first)"
            )
        raise node.fail(f"operand {index} must be a dequantised activation")

    def early(
        self, node: Node, value: Pending | Function | Affine | RealInput, index: int
    ) -> Dequantised | None:
        """``value``, input ``index`` of a node that chooses among its elements, quantised in front
        of it as all that the node's results come to are behind it; None if they are not, alike.
        Rounding keeps the order of numbers, so the results are the same."""
        quants = set(self._quants_behind(node.raw))
        if len(quants) != 1 or None in quants:
            return None
        (quant,) = quants
        name = node.raw.inputs[index].name
        while name in self.tensors:
            name = f"{name}:quantised"
        made = self.quantise(node.making(name), value, quant)
        return Dequantised(made.tensor, made.view, quant.scale)

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
                        yield self.quant_of(Node(user))
                    except ModelError:
                        yield None
                else:
                    yield from self._quants_behind(user)

    def quant_of(self, node: Node) -> Quant:
        """Of a QuantizeLinear."""
        return self.quant(node, 1, unsigned=node.int("output_dtype", 2) == 2)

    def constant(self, node: Node, value: QuantConst) -> Dequantised:
        """A constant as an activation, which gets its layout where it is read."""
        if value not in self.fixed:
            array, quant = codes.of_quantised(node, value)
            name = self.keep(node, array, quant)
            self.fixed[value] = Dequantised(name, OnnxView.contiguous(array.shape), quant.scale)
        return self.fixed[value]

    def lay_alike(self, x: Dequantised, like: Dequantised) -> None:
        """Stores a constant tensor not yet laid out with its axes where those of ``like``, of the
        same rank, are, if they are whole."""
        if self.tensors[x.tensor].shape is not None:
            return
        with contextlib.suppress(LayoutError):
            view = self.bind(like, None)
            _, c, h, w = self.tensors[like.tensor].shape
            groups: list[list[tuple[int, int]]] = [[], [], []]
            for axis, dim in enumerate(view.dims):
                stride = dim[-1][1] if dim else 1
                group = 0 if stride >= c * h * w else 1 if stride >= h * w else 2
                groups[group].append((-stride, axis))
            n, c, p = ([axis for _, axis in sorted(group)] for group in groups)
            shape, dims = x.view.shape, x.view.dims
            sizes = [math.prod(shape[i] for i in axes) for axes in (n, c, p)]
            n, c, p = (merge(*(dims[i] for i in axes)) for axes in (n, c, p))
            self.bind(x, OnnxView((sizes[0], sizes[1], 1, sizes[2]), (n, c, (), p)))

    def keep(self, node: Node, array: np.ndarray, quant: Quant, stored: bool = False) -> str:
        """A new constant tensor of int8; ``stored``: (N, C, H, W) as it is to lie, else in the
        model's shape."""
        name = f"{node.name}:constant {len(self.constants)}"
        self.constants[name] = array
        self.tensors[name] = Stored(
            quant.unsigned,
            quant,
            array.shape if stored else None,
            array.shape,
            tuple(range(array.ndim)),
        )
        return name

    def _stored(self, name: str) -> np.ndarray:
        """A constant tensor that has a layout, as it lies."""
        stored = self.tensors[name]
        return self.constants[name].transpose(stored.perm).reshape(stored.shape)

    def _settle(self, value: Pending) -> Dequantised | None:
        """A result that fits the scale and zero point of its operands, in these; else None."""
        quants = {self.tensors[x].quant for x in value.op.inputs}
        op = finish.unscaled(value, *quants) if len(quants) == 1 else None
        if op is None:
            return None
        (quant,) = quants
        if value.op not in self.settled:
            name = f"{op.name}:{len(self.settled)}"
            self.settled[value.op] = self._emit(op, value, quant, -128, 127, name)
        return Dequantised(self.settled[value.op], value.view, quant.scale)

    def function(self, node: Node, value: Value | None) -> Function | None:
        """An activation, clamped or not, as a function of its elements; None if it is none."""
        if isinstance(value, Dequantised):
            value = self.pointwise(node, value)
        if isinstance(value, Pending) and isinstance(value.op, Select):
            (name, *others), shape = value.op.inputs, value.shape
            source = self.tensors[name].shape
            if not others and moves.is_identity(value.op, shape, source):
                scale = np.float32(value.op.phases[0][0].scale)
                real = np.arange(-128, 128) - self.tensors[name].quant.zero
                real = real.astype(np.float32) * scale
                return Function(name, value.view, np.clip(real, value.low, value.high))
        return value if isinstance(value, Function) else None

    def functions_behind(self, name: str) -> list[Table | Pool]:
        """The tables and clamps that tensor ``name`` comes from, the last one first."""
        out = []
        op = self.made.get(name)
        while isinstance(op, Table) or (isinstance(op, Pool) and op.kind == "max" and op.pointwise):
            out.append(op)
            op = self.made.get(op.x)
        return out

    def origins(self, f: Function) -> list[Function]:
        """``f`` itself and as a function of the tensors that its own is a function of."""
        out = [f]
        for op in self.functions_behind(f.tensor):
            codes = op.values if isinstance(op, Table) else np.arange(-128, 128)
            inner = np.clip(codes.astype(np.int16), op.low, op.high)
            types = (*op.op_type.split("+"), *out[-1].op_types)
            out.append(Function(op.x, f.view, out[-1].values[inner + 128], types))
        return out

    def may_be_one_function(self, values: Sequence[Value | None]) -> bool:
        """Whether the activations among ``values`` come from one tensor by functions alone."""
        origins = []
        for value in values:
            if isinstance(value, Dequantised | Function):
                name = value.tensor
            elif isinstance(value, Pending) and isinstance(value.op, Select):
                name = value.op.inputs[0]
            else:
                continue
            origins.append({name, *(op.x for op in self.functions_behind(name))})
        return bool(origins) and bool(set.intersection(*origins))

    def known_quant(self, node: Node, value: Quantised) -> Quant:
        """Of an operator on int8 or uint8 itself, which says nothing of scales."""
        quant = self.tensors[value.tensor].quant
        if quant is None:
            raise node.fail(f"the scale of input {value.tensor!r} is not known here")
        return quant

    # Layout --------------------------------------------------------------------------------------

    def bound(self, node: Node, x: Quantised | Dequantised, view: OnnxView | None) -> OnnxView:
        """``x.view`` over the stored (N, C, H, W) array. A graph input not yet laid out is stored
        as ``view``, an (N, C, H, W) view of it (None: ``x`` itself, or rows and features)."""
        try:
            if view is None:
                self._lay_out(x)
            return self.bind(x, view)
        except LayoutError as e:
            raise node.fail(f"the layout of {x.tensor!r} cannot be stored: {e}") from None

    def bind(self, x: Quantised | Dequantised, layout: OnnxView | None) -> OnnxView:
        """As ``bound``, but raises :class:`LayoutError`; None: it has its layout."""
        stored = self.tensors[x.tensor]
        if stored.shape is None:
            stored.perm = input_perm(stored.onnx_shape, layout)
            stored.shape, stored.layout = layout.shape, layout
        return x.view.rebase(stored.layout) if stored.layout else x.view

    def _unbound(self, node: Node, name: str, view: OnnxView) -> Quantised:
        """Tensor ``name`` by a view over its stored array."""
        stored = self.tensors[name]
        if stored.layout is not None:
            try:
                view = view.rebase(OnnxView.contiguous(stored.onnx_shape).rebase(stored.layout))
            except LayoutError as e:
                raise node.fail(f"the layout of {name!r} cannot be traced: {e}") from None
        return Quantised(name, view)

    def _lay_out(self, x: Quantised | Dequantised) -> None:
        """Stores a graph input not yet laid out in the default layout of ``x``, or where it has
        none in its own."""
        if self.tensors[x.tensor].shape is not None:
            return
        if len(x.view.shape) <= 4:
            with contextlib.suppress(LayoutError):
                self.bind(x, default_layout(x.view))
                return
        whole = OnnxView.contiguous(self.tensors[x.tensor].onnx_shape)
        self.bind(replace(x, view=whole), default_layout(whole))

    def image(
        self, node: Node, x: Quantised | Dequantised
    ) -> tuple[Quantised | Dequantised, tuple[int, int, int, int]]:
        """``x``, an image (N, C, H, W) or (N, C, W), in a tensor of that layout, and the tensor's
        shape."""
        if len(x.view.shape) not in (3, 4):
            raise node.fail(f"operand of rank {len(x.view.shape)}; 3 or 4 is needed")
        x = self.plain(node, x)
        return x, self.tensors[x.tensor].shape

    def plain(self, node: Node, x: Quantised | Dequantised) -> Quantised | Dequantised:
        """``x`` in a tensor stored in the default layout of ``x``: its own, or one that its
        elements are moved to."""
        wanted = default_layout(x.view)
        try:
            view = self.bind(x, wanted)
            layout = default_layout(view)
            stored = self.tensors[x.tensor].shape
            if stored == layout.shape and layout == OnnxView.contiguous(stored):
                return x
        except LayoutError:
            pass
        return self.rearranged(node, x, self.positions(x))

    def positions(self, x: Quantised | Dequantised) -> np.ndarray:
        """For each element of ``x``, in its shape, the place in the stored array."""
        stored = self.tensors[x.tensor]
        self._lay_out(x)
        if stored.layout is None:
            return x.view.indices()
        places = np.argsort(stored.layout.indices(), axis=None).astype(np.int32)
        return places[x.view.indices()]

    def rearranged(
        self, node: Node, x: Quantised | Dequantised, index: np.ndarray
    ) -> Quantised | Dequantised:
        """The elements of ``x``'s tensor at ``index``, in a tensor in default layout."""
        key = (x.tensor, index.shape, index.tobytes())
        if key not in self.arranged:
            quant = self.known_quant(node, x)
            if x.tensor in self.constants:
                fixed = self.chosen(node, x.tensor, index)
                self.bind(fixed, default_layout(fixed.view))
                self.arranged[key] = fixed
            else:
                self.arranged[key] = self._carried(node, x, quant, index)
        made = self.arranged[key]
        return made if isinstance(x, Dequantised) else Quantised(made.tensor, made.view)

    def chosen(self, node: Node, name: str, index: np.ndarray) -> Dequantised:
        """The elements at ``index`` of a constant tensor that is laid out, as another, not yet
        laid out."""
        quant = self.tensors[name].quant
        array = self._stored(name).reshape(-1)[index]
        made = self.keep(node, array, quant)
        return Dequantised(made, OnnxView.contiguous(array.shape), quant.scale)

    def _carried(
        self, node: Node, x: Quantised | Dequantised, quant: Quant, index: np.ndarray
    ) -> Dequantised:
        """The elements at ``index`` of the tensor of ``x``, brought there by operators."""
        source = Dequantised(x.tensor, x.view, quant.scale)
        try:
            moved = self.moved(node, [source], index, plain=True)
        except ModelError:
            n, c, h, w = self.tensors[x.tensor].shape
            places = np.arange(n * c * h * w, dtype=np.int32).reshape(n, h * w, c)
            other = places.transpose(0, 2, 1).reshape(-1)[index]
            source = replace(source, tensor=self.transposed(node, x))
            moved = self.moved(node, [source], other, plain=True)
        (origin,) = moved.op.inputs
        if moves.is_identity(moved.op, moved.shape, self.tensors[origin].shape):
            return Dequantised(origin, moved.view, quant.scale)
        return self._settle(moved)

    def transposed(self, node: Node, x: Quantised | Dequantised) -> str:
        """The tensor of ``x`` with channels and positions in each other's place."""
        key = (x.tensor, "transposed")
        if key not in self.settled:
            quant = self.known_quant(node, x)
            n, c, h, w = self.tensors[x.tensor].shape
            if x.tensor in self.constants:
                array = self._stored(x.tensor).reshape(n, c, h * w).transpose(0, 2, 1)
                array = np.ascontiguousarray(array).reshape(n, h * w, 1, c)
                self.settled[key] = self.keep(node, array, quant, stored=True)
                return self.settled[key]
            fields = {"name": node.name, "op_type": "Transpose", "output": ""}
            op = Transpose(**fields, low=-128, high=127, x=x.tensor)
            shape = (n, h * w, 1, c)
            pending = Pending(op, shape, OnnxView.contiguous(shape))
            name = f"{x.tensor}:transposed"
            self.settled[key] = self._emit(op, pending, quant, -128, 127, name)
            if x.tensor in self.made:
                # Right behind its operand, where the array has other work meanwhile.
                at = self.ops.index(self.made[x.tensor])
                self.ops.insert(at + 1, self.ops.pop())
        return self.settled[key]

    def moved(
        self,
        node: Node,
        parts: Sequence[Dequantised],
        index: np.ndarray,
        fill: float = 0.0,
        plain: bool = False,
    ) -> Pending:
        """The elements at ``index`` of the tensors of ``parts`` put end to end (-1: the real number
        ``fill``), as the result of an operator; ``plain``: in default layout."""
        if not (index >= 0).any():
            raise node.fail(f"its result {list(index.shape)} has no element of its operands")
        sources = [(p.tensor, float(p.scale), self.tensors[p.tensor].shape) for p in parts]
        whole = OnnxView.contiguous(index.shape)
        layouts = [default_layout(whole)]
        if index.ndim == 2:
            layouts.append(whole.reshape((*index.shape, 1, 1)))
        elif index.ndim == 4 and not plain:
            layouts.append(whole.transpose((0, 3, 1, 2)))
        elif index.ndim == 3 and not plain:
            rows = whole.reshape((math.prod(index.shape[:2]), index.shape[2]))
            layouts.append(default_layout(rows))
        found = []
        for layout in layouts:
            fit = moves.fit(index.reshape(-1)[layout.indices()], sources, fill == 0)
            if fit:
                found.append((moves.cost(fit, layout.shape), len(found), layout, fit))
        if found:
            _, _, layout, (steps, phases, flat, joined) = min(found)
            fields = {"name": node.name, "op_type": node.op_type, "output": ""}
            fields |= {"low": -128, "high": 127, "steps": steps, "fill": fill}
            op = Select(**fields, phases=phases, flat=flat, joined=joined)
            return Pending(op, layout.shape, whole.rebase(layout))
        raise node.fail(
            f"its result {list(index.shape)} takes elements of "
            f"{', '.join(f'{name!r} {list(shape)}' for name, _, shape in sources)} in no regular "
            f"order ({moves.MAX_PHASES} phases, {moves.MAX_PICKS} picks are the limit)"
        )

    # Results -------------------------------------------------------------------------------------

    def quantise(self, node: Node, value: Value | None, quant: Quant) -> Quantised:
        """What QuantizeLinear does: emits the pending operator with its scale and clamps, once for
        each of these."""
        if isinstance(value, Pending):
            key = (value.op, value.low, value.high, quant)
        elif isinstance(value, Function | Affine):
            key = (value, quant)
        else:
            return self._quantise(node, value, quant)
        if key in self.emitted:
            return Quantised(self.emitted[key], value.view)
        made = self._quantise(node, value, quant)
        if made.view is value.view:
            self.emitted[key] = made.tensor
        return made

    def _quantise(self, node: Node, value: Value | None, quant: Quant) -> Quantised:
        if isinstance(value, RealInput):
            return self._quantise_input(node, value, quant)
        if isinstance(value, Dequantised):
            stored = self.tensors[value.tensor].quant
            if replace(stored, scale=value.scale) == quant:
                return Quantised(value.tensor, value.view)
            value = self.pointwise(node, value)
        if isinstance(value, Affine):
            return self._quantise_channels(node, value, quant)
        if isinstance(value, Function):
            value = finish.table(node, value, self.tensors[value.tensor].shape, quant)
        if not isinstance(value, Pending):
            raise node.fail("its operand is neither an activation nor a float input")
        op, low, high = value.op, quant.value(value.low), quant.value(value.high)
        if value.off > quant.scale / 2:
            raise node.fail(
                f"int8 gives what stands for an operand of {op.op_type} {op.name!r} no better than "
                f"to {value.off / quant.scale:.2g} steps of the result: half a step is the limit"
            )
        if isinstance(op, Conv | ConvTranspose | MatMul):
            op = replace(op, scale=finish.checked(node, op.scale / quant.scale))
        elif isinstance(op, Binary):
            op = finish.scaled_binary(node, op, quant)
        elif isinstance(op, Select):
            op = self._finish_select(node, value, quant, (low, high) == (-128, 127))
            if op is None:
                return self._unbound(node, value.op.inputs[0], value.view)
        elif isinstance(op, Pool) and op.kind == "average":
            window = np.float32(1 if op.counts else math.prod(op.kernel))
            op = replace(op, scale=finish.checked(node, op.scale / (quant.scale * window)))
        elif isinstance(op, Pool):
            op = self._finish_maximum(node, value, quant)
        name = self._emit(op, value, quant, low, high, node.output)
        return Quantised(name, value.view)

    def _quantise_channels(self, node: Node, x: Affine, quant: Quant) -> Quantised:
        shape, own = self.tensors[x.tensor].shape, self.tensors[x.tensor].quant
        low, high = quant.value(x.low), quant.value(x.high)
        done = Pending(channels.affine(node, x, *finish.in_units(x, x.gain, quant)), shape, x.view)
        if x.below is None:
            return Quantised(self._emit(done.op, done, quant, low, high, node.output), x.view)
        # Above zero by a table, below by a gain for each channel; of the two one is always zero.
        real = np.maximum(np.arange(-128, 128) - own.zero, 0).astype(np.float32) * x.scale
        above = finish.table(node, Function(x.tensor, x.view, real, x.op_types), shape, quant)
        above = replace(above.op, name=x.name)
        above = self._emit(above, done, quant, -128, 127, f"{node.output}:above zero")
        limits = -128, 127
        if (x.below >= 0).all():
            limits = -128, quant.zero
        elif (x.below <= 0).all():
            limits = quant.zero, 127
        else:
            negative = replace(finish.clamp(finish.whole(node, x.tensor, shape, 1.0)), name=x.name)
            name = f"{node.output}:negative"
            x = replace(x, tensor=self._emit(negative, done, own, -128, own.zero, name))
        below = channels.affine(node, x, *finish.in_units(x, x.below, quant))
        below = self._emit(below, done, quant, *limits, f"{node.output}:below zero")
        fields = {"name": x.name, "op_type": "+".join(x.op_types), "output": ""}
        total = Binary(
            **fields, low=-128, high=127, kind="add", a=above, b=below, a_ratio=1.0, b_ratio=1.0
        )
        return Quantised(self._emit(total, done, quant, low, high, node.output), x.view)

    def _finish_select(
        self, node: Node, value: Pending, quant: Quant, unclamped: bool
    ) -> Select | Pool | None:
        """With scales and fill of the result; if it only clamps a maximum of one, if it does
        nothing None."""
        op = self._common_scales(node, value.op, quant)
        scaled = finish.scaled_select(node, op, quant)
        stored = self.tensors[op.inputs[0]]
        same = moves.is_identity(op, value.shape, stored.shape)
        if same and scaled.phases[0][0].scale == 1:
            source = stored.quant
            # The view of a graph input counts in the model's array, that of the result does not.
            same = stored.layout is None and unclamped
            if (source.zero, source.unsigned, same) == (quant.zero, quant.unsigned, True):
                return None
            if source.zero == quant.zero:
                return finish.clamp(op)
        return scaled

    def _common_scales(self, node: Node, op: Select, quant: Quant) -> Select:
        """With picks of one scale for every channel: tensors of another than the result's that
        share a channel are brought to it first."""
        mixed = {name for picks in op.phases for name in finish.of_mixed_scales(picks)}
        changed = {}
        for name in sorted(mixed):
            scale = next(p.scale for picks in op.phases for p in picks if p.x == name)
            own, shape = self.tensors[name].quant, self.tensors[name].shape
            if (scale, own.zero) == (float(quant.scale), quant.zero):
                continue
            key = (name, quant)
            if key not in self.settled:
                ratio = float(finish.checked(node, np.float32(scale) / quant.scale))
                whole = finish.whole(node, name, shape, ratio)
                pending = Pending(whole, shape, OnnxView.contiguous(shape))
                made = f"{name}:in the scale of {node.output}"
                self.settled[key] = self._emit(whole, pending, quant, -128, 127, made)
            changed[name] = self.settled[key]
        phases = [
            [
                replace(p, x=changed[p.x], scale=float(quant.scale)) if p.x in changed else p
                for p in picks
            ]
            for picks in op.phases
        ]
        return replace(op, phases=phases)

    def _finish_maximum(self, node: Node, value: Pending, quant: Quant) -> Op:
        """A maximum to another scale or zero point: first the maximum in its operand's, then the
        change of scale. (They commute.)"""
        op, own = value.op, self.tensors[value.op.x].quant
        source = Quant(op.scale, own.zero, own.unsigned)
        op = replace(op, scale=np.float32(1))
        if (source.scale, source.zero) == (quant.scale, quant.zero):
            return op
        inner = self._emit(op, value, source, -128, 127, f"{op.name}:before requantisation")
        scale = float(finish.checked(node, source.scale / quant.scale))
        return finish.whole(node, inner, value.shape, scale)

    def _emit(self, op: Op, pending: Pending, quant: Quant, low: int, high: int, name: str) -> str:
        self.tensors[name] = Stored(quant.unsigned, quant, pending.shape)
        self.made[name] = replace(op, output=name, low=low, high=high)
        self.ops.append(self.made[name])
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
        self._lay_out(x)
        try:
            view = self.bind(x, None)
        except LayoutError:  # stored in an order that its view does not go along with
            x = self.plain(node, x)
            view = self.bound(node, x, None)
        shape = self.tensors[x.tensor].shape
        return Pending(finish.whole(node, x.tensor, shape, float(x.scale)), shape, view)


def _array(value: ir.Value) -> np.ndarray:
    try:
        return value.const_value.numpy()
    except Exception as e:
        raise ModelError(f"initialiser {value.name!r} cannot be read: {e}") from None
