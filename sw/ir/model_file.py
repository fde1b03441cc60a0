"""An ONNX file as a protocol buffer that holds what the graph means, and no more.

Exporters leave notes of shapes in a file: ``value_info``, and the shapes of outputs. They may be
left over from another input size. Shapes follow from the inputs and the nodes, so the notes go.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

from systole.sw.ir.graph import ModelError, first_line

MAX_ELEMENTS = 1 << 28
"""Elements of the largest tensor; more would not fit into the memory of the simulated machine."""


def load_proto(path: str | os.PathLike, *, external_data: bool = True) -> ModelProto:
    """The model in ``path`` without notes of shapes; sparse constants are made dense. Without
    ``external_data`` constants in other files stay there. Raises :class:`ModelError`."""
    path = Path(path)
    try:
        if not path.is_file():
            raise ModelError(f"{path}: no such file")
    except OSError as e:  # a name that is too long
        raise ModelError(f"{path}: {e.strerror}") from None
    try:
        model = onnx.load(path, load_external_data=external_data)
    except Exception as e:  # protobuf's and onnx's errors have no class in common
        reason = first_line(e)
        raise ModelError(f"{path}: not a readable ONNX model: {reason}") from None
    if not model.graph.output:
        raise ModelError(f"{path}: not an ONNX model: its graph has no outputs")
    for graph in graphs(model.graph):
        _check_names(graph, path)
        _densify(graph)
    forget_shapes(model)
    return model


def graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """A graph and the bodies inside it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield from graphs(attribute.g)
            elif attribute.type == AttributeProto.GRAPHS:
                for body in attribute.graphs:
                    yield from graphs(body)


def forget_shapes(model: ModelProto) -> None:
    """Removes the notes of shapes, in place. Input dimensions below 0 count as open."""
    for graph in graphs(model.graph):
        del graph.value_info[:]
        for value in graph.output:
            if value.type.HasField("tensor_type"):
                value.type.tensor_type.ClearField("shape")
    inputs = {value.name: value for value in model.graph.input}
    for value in inputs.values():
        for dim in value.type.tensor_type.shape.dim:
            if dim.HasField("dim_value") and dim.dim_value < 0:
                dim.ClearField("dim_value")
    for value in model.graph.output:
        if value.name in inputs:
            value.CopyFrom(inputs[value.name])


def _check_names(graph: GraphProto, path: Path) -> None:
    """Protocol buffers hand out text that is not UTF-8 as bytes."""
    tensors = [*graph.initializer, *(s.values for s in graph.sparse_initializer)]
    names: list[tuple[str, object]] = [("graph", graph.name)]
    names += [("input", value.name) for value in graph.input]
    names += [("output", value.name) for value in graph.output]
    names += [("initialiser", tensor.name) for tensor in tensors]
    for node in graph.node:
        names += [("node", each) for each in _texts(node)]
    for kind, name in names:
        if isinstance(name, bytes):
            shown = name.decode(errors="replace")
            raise ModelError(f"{path}: {kind} name {shown!r} is not UTF-8 text")


def _texts(node: NodeProto) -> Iterator[object]:
    yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
    yield from (attribute.name for attribute in node.attribute)


def _densify(graph: GraphProto) -> None:
    """Sparse constants as dense ones, in place."""
    for sparse in graph.sparse_initializer:
        name, shape = sparse.values.name, tuple(sparse.dims)
        if not 0 <= int(np.prod(shape, dtype=np.float64)) <= MAX_ELEMENTS:
            raise ModelError(
                f"initialiser {name!r}: shape {shape}; at most {MAX_ELEMENTS:,} elements"
            )
        try:
            values = numpy_helper.to_array(sparse.values)
            places = numpy_helper.to_array(sparse.indices)
            dense = np.zeros(shape, values.dtype)
            if places.ndim == 1:
                dense.reshape(-1)[places] = values
            else:
                dense[tuple(places.T)] = values
        except (ValueError, IndexError, TypeError) as e:
            raise ModelError(f"initialiser {name!r}: not a sparse tensor: {e}") from None
        tensor: TensorProto = numpy_helper.from_array(dense, name)
        graph.initializer.append(tensor)
    del graph.sparse_initializer[:]
