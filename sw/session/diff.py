"""Layer-by-layer comparison of the golden model with onnxruntime.

onnxruntime runs the same model with its quantised intermediate values as further outputs. That can
change what it fuses: a value that is an output must exist, so what would have been computed without
it no longer is. Only int8 and uint8 values are compared; operators on the host are onnxruntime's
anyway.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir

from systole.sw.compiler.partition import QUANTISED, Partition
from systole.sw.frontend.dataflow import Dataflow
from systole.sw.golden import model as golden
from systole.sw.golden import oracle
from systole.sw.ir.graph import Graph, ModelError, Op, Tensor, first_line
from systole.sw.session.segments import follow


@dataclass(frozen=True)
class Difference:
    """How far a tensor is from onnxruntime's, in quantised units."""

    elements: int
    equal: int
    largest: int
    mean: float
    """Mean absolute difference."""


@dataclass(frozen=True)
class TensorDiff:
    """One tensor of the golden model against onnxruntime's."""

    layer: str
    op_type: str
    tensor: str
    difference: Difference | None
    """Computed from the model's inputs, so it includes errors of earlier layers. None: the model
    has no such value, or none of this shape."""
    alone: Difference | None
    """Computed from onnxruntime's own operands of this layer. None if one of them is not known."""


class Exposed:
    """onnxruntime on the model in ``path`` with more of its values as outputs: those of ``names``
    that exist as int8 or uint8. Raises :class:`ModelError` for a malformed model."""

    def __init__(
        self, path: str | os.PathLike, names: Iterable[str], dims: Mapping[str, int] | None = None
    ):
        flow = Dataflow(path, dims)
        proto = ir.to_proto(flow.model)
        known = {info.name for info in (*proto.graph.output, *proto.graph.input)}
        proto.graph.output.extend(
            onnx.ValueInfoProto(name=name)
            for name in dict.fromkeys(names)
            if flow.types.get(name) in QUANTISED and name not in known
        )
        self.path = path
        self.outputs = [info.name for info in proto.graph.output]
        self.session = oracle.session(proto)

    def run(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All outputs by name. Raises :class:`ModelError` if onnxruntime fails."""
        try:
            results = self.session.run(self.outputs, dict(arrays))
        except Exception as e:  # onnxruntime's errors have no class of their own in common
            why = first_line(e)
            raise ModelError(f"{self.path}: onnxruntime cannot run the model: {why}") from None
        return {name: np.asarray(array) for name, array in zip(self.outputs, results, strict=True)}


def compare_layers(
    plan: Partition, arrays: Mapping[str, np.ndarray], dims: Mapping[str, int] | None = None
) -> tuple[list[TensorDiff], dict[str, np.ndarray]]:
    """A row per tensor in the order of execution, and onnxruntime's values, exposed ones included.

    ``arrays``: the model's inputs by name. Raises :class:`ModelError` if onnxruntime fails."""
    trail = follow(plan, arrays)
    names = [name for _, tensors in trail.segments for name in tensors]
    values = Exposed(plan.path, names, dims).run(arrays)
    rows: list[TensorDiff] = []
    for graph, tensors in trail.segments:
        theirs = {
            name: aligned
            for name, ours in tensors.items()
            if name in values
            and (aligned := _align(ours, values[name], graph.tensors.get(name))) is not None
        }
        # What the accelerator reads is the model's own input, or onnxruntime's where it made it.
        for port in graph.inputs:
            tensor = graph.tensors[port.tensor]
            source = arrays.get(port.name, values.get(port.name))
            if source is not None:
                theirs[port.tensor] = golden.quantise_input(port, tensor, source)
        for op in graph.ops:
            rows += _rows(op, graph, tensors, theirs)
    return rows, values


def _rows(
    op: Op, graph: Graph, ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]
) -> Iterator[TensorDiff]:
    """The rows of an operator's results."""
    alone = golden.evaluate(op, graph, theirs) if theirs.keys() >= set(op.inputs) else {}
    names = alone.keys() or golden.evaluate(op, graph, ours).keys()
    for name in names:
        reference = theirs.get(name)
        difference, by_itself = (
            _difference(arrays[name], reference)
            if name in arrays and reference is not None
            else None
            for arrays in (ours, alone)
        )
        yield TensorDiff(op.name, op.op_type, name, difference, by_itself)


def _difference(ours: np.ndarray, reference: np.ndarray) -> Difference:
    distance = np.abs(ours.astype(np.int16) - reference)
    equal = int((distance == 0).sum())
    return Difference(distance.size, equal, int(distance.max()), float(distance.mean()))


def _align(ours: np.ndarray, array: np.ndarray, tensor: Tensor | None) -> np.ndarray | None:
    """onnxruntime's array as int8 (N, C, H, W) like ``ours``; None if it does not fit. A tensor
    inside the graph does not say how it stands in the model: of the layouts that a model may have
    (channels second or last, a matrix) the one in which most elements agree."""
    if array.size != ours.size:
        return None
    if array.dtype == np.uint8:
        array = (array.astype(np.int16) - 128).astype(np.int8)
    forms = [array]
    if tensor is not None and tensor.onnx_shape == array.shape:
        forms.append(array.transpose(tensor.perm))
    if array.ndim > 1:
        forms += [np.moveaxis(array, -1, 1), np.moveaxis(array, -1, 0)]
    candidates = [form.reshape(ours.shape) for form in forms]
    return max(candidates, key=lambda form: int((form == ours).sum()))


def first_offender(rows: list[TensorDiff]) -> int | None:
    """Index of the first row with a difference."""
    for i, row in enumerate(rows):
        if row.difference is not None and row.difference.equal < row.difference.elements:
            return i
    return None
