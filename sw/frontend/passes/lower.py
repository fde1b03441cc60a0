"""Pass 2, lower: the folded model to a ``sw.ir.graph.Graph``.

The nodes are interpreted in topological order with the symbolic values of ``values``. So a QDQ
graph and a graph of fused operators (QLinearConv ...) come out the same: the latter is dequantise,
operator, quantise in one node. ``operators`` has the operators, ``state`` what they work with.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Literal

import numpy as np
import onnx_ir as ir

from systole.sw.frontend.passes.layout import LayoutError, OnnxView, output_perm
from systole.sw.frontend.passes.masks import find_masked
from systole.sw.frontend.passes.norms import find_norms
from systole.sw.frontend.passes.operators import OPERATORS
from systole.sw.frontend.passes.operators.rows import masked_softmax, written_out
from systole.sw.frontend.passes.readers import order_of_axes
from systole.sw.frontend.passes.state import LoweringState
from systole.sw.frontend.passes.values import ADVICE, Const, Dequantised, Node, Quantised, RealInput
from systole.sw.ir.graph import Graph, ModelError, Port

PortType = Literal["float32", "int8", "uint8"]
INPUT_TYPES: dict[str, PortType] = {"FLOAT": "float32", "INT8": "int8", "UINT8": "uint8"}
"""Element types of graph inputs, by onnx-ir's names."""


def lower(model: ir.Model) -> Graph:
    """The graph of a model that :func:`~sw.frontend.passes.read.read` returned, for a machine with
    row operations.

    Raises :class:`~sw.ir.graph.ModelError`; its ``node`` is the first output of the node at fault,
    or the name of the graph output at fault."""
    return Walker(model).walk()


class Walker:
    """Walks over inputs, nodes and outputs of one model and builds its graph."""

    def __init__(
        self,
        model: ir.Model,
        *,
        row_ops: bool = True,
        masks: Mapping[str, float] | None = None,
    ):
        """``row_ops``: the machine has row operations, which take normalisations of several nodes,
        and masks. ``masks``: inputs that are masks, and the highest number of each that masks."""
        self._graph, self._masks = model.graph, masks or {}
        norms = find_norms(model.graph) if row_ops else []
        softmaxes = find_masked(model.graph, self._masks) if row_ops else []
        self._norms = {norm.nodes[-1]: norm for norm in norms}
        self._softmaxes = {softmax.nodes[-1]: softmax for softmax in softmaxes}
        several = [each.nodes for each in norms] + [each.nodes for each in softmaxes]
        self._inside = {node for nodes in several for node in nodes[:-1]}
        """Nodes that are parts of these."""
        self._state = LoweringState(model.graph.opset_imports)
        self._input_types: dict[str, PortType] = {}
        self.views: dict[str, OnnxView] = {}
        """How the model's values that operators of the graph compute stand on their stored arrays,
        by the name of value and tensor; filled by :meth:`walk`."""

    def walk(self) -> Graph:
        for value in self._graph.initializers.values():
            self._state.results.set(_name(value), Const(_array(value)))
        for value in self._graph.inputs:
            self._input(value)
        for raw in self._graph:
            if raw in self._inside:
                continue
            node = Node(raw)
            with _located(node.output):
                self._node(node)
        outputs = []
        for value in self._graph.outputs:
            with _located(_name(value)):
                outputs.append(self._output(value))
        return self._finished(outputs)

    def _input(self, value: ir.Value) -> None:
        name = _name(value)
        if (why := type_refusal(value)) is not None:
            raise ModelError(why)
        assert value.dtype is not None, "its type is known"
        dtype = value.dtype.name
        self._input_types[name] = INPUT_TYPES[dtype]
        assert value.shape is not None, "pass 1 refuses inputs without a shape"
        shape = value.shape.numpy()
        view = OnnxView.contiguous(shape)
        order = order_of_axes(value, len(shape))
        if order is not None:
            self._state.tensors.set_order(name, order)
        if dtype == "FLOAT":
            self._state.results.set(name, RealInput(name, shape, view))
        else:
            self._state.tensors.add_input(name, shape, tensor=name, unsigned=dtype == "UINT8")
            self._state.results.set(name, Quantised(name, view))

    def _node(self, node: Node) -> None:
        norm = self._norms.get(node.raw)
        if norm is not None:
            self._state.results.set(node.output, written_out(self._state, node, norm))
            return
        softmax = self._softmaxes.get(node.raw)
        if softmax is not None:
            result = masked_softmax(self._state, node, softmax, self._masks)
            self._state.results.set(node.output, result)
            return
        handler = OPERATORS.get((node.raw.domain, node.op_type))
        if handler is None:
            names = ", ".join(sorted({name for _, name in OPERATORS}))
            raise node.fail(f"operator not supported; supported are {names}")
        given = handler(self._state, node)
        values = given if isinstance(given, tuple) else (given,)
        for output, value in zip(node.raw.outputs, values, strict=False):
            name = _name(output)
            self._state.results.set(name, value)
            computed = self._state.emitter.producer(name) is not None
            if computed and isinstance(value, Quantised) and value.tensor == name:
                self.views[name] = value.view

    def _output(self, output: ir.Value) -> Port:
        name, tensors = _name(output), self._state.tensors
        value = self._state.results.get(name)
        if not isinstance(value, Quantised | Dequantised):
            raise ModelError(
                f"output {name!r} is not quantised: only an int8 or uint8 tensor or the "
                f"DequantizeLinear of one can be returned ({ADVICE})"
            )
        try:
            perm = output_perm(value.view)
        except LayoutError:
            producer = output.producer()
            assert producer is not None, "a graph input's view has a permutation"
            value = self._state.mover.plain(Node(producer), value)
            perm = output_perm(value.view)
        if tensors.is_input(value.tensor):
            raise ModelError(f"output {name!r} is a graph input passed through")
        if tensors.is_constant(value.tensor):
            raise ModelError(f"output {name!r} is a constant")
        if not tensors.set_model_form(value.tensor, value.view.shape, perm):
            raise ModelError(f"output {name!r} is returned in two shapes")
        if isinstance(value, Quantised):
            unsigned = tensors.is_unsigned(value.tensor)
            return Port(name, value.tensor, "uint8" if unsigned else "int8")
        own = tensors.quant(value.tensor).scale
        if value.scale != own:
            raise ModelError(
                f"output {name!r} is dequantised with scale {value.scale}, quantised with {own}"
            )
        return Port(name, value.tensor, "float32")

    def _finished(self, outputs: list[Port]) -> Graph:
        ops, table = self._state.emitter.ops, self._state.tensors
        used = {x for op in ops for x in op.inputs} | {op.output for op in ops}
        tensors = table.graph_tensors(used)
        inputs = []
        for name, kind in self._input_types.items():
            tensor = table.input_tensor(name)
            if tensor in tensors:
                inputs.append(Port(name, tensor, kind))
        if not ops:
            raise ModelError("the model has no operator to compute")
        return Graph(
            name=self._graph.name or "",
            tensors=tensors,
            ops=ops,
            inputs=inputs,
            outputs=outputs,
            constants=table.graph_constants(used),
        )


def type_refusal(value: ir.Value) -> str | None:
    """Why a graph cannot read ``value``, if its type is none of INPUT_TYPES."""
    dtype = value.dtype.name if value.dtype else "unknown"
    if dtype in INPUT_TYPES:
        return None
    return f"input {value.name!r} has type {dtype.lower()}; it must be float32, int8 or uint8"


@contextlib.contextmanager
def _located(name: str) -> Iterator[None]:
    """Notes in a ModelError which value it is about."""
    try:
        yield
    except ModelError as e:
        e.node = name
        raise


def _name(value: ir.Value) -> str:
    return value.name or ""


def _array(value: ir.Value) -> np.ndarray:
    try:
        assert value.const_value is not None
        return value.const_value.numpy()
    except Exception as e:
        raise ModelError(f"initialiser {value.name!r} cannot be read: {e}") from None
