"""What a model asks of a machine, and whether its scales fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper, shape_inference

from systole.sw.frontend.macs import node_macs
from systole.sw.golden import oracle


def macs(model: onnx.ModelProto) -> int:
    """Multiply-accumulates of its convolutions and products, padding counted as published figures
    do. Shapes must be fixed."""
    graph = ir.from_proto(shape_inference.infer_shapes(model)).graph
    counts = [node_macs(node) for node in graph]
    assert None not in counts, "shapes are fixed"
    return sum(count or 0 for count in counts)


@dataclass(frozen=True)
class Saturation:
    """How one quantised activation fills its range."""

    name: str
    elements: int
    saturated: int
    """At an end of int8 that does not stand for zero."""
    deviation: float
    """Standard deviation in quantised units."""


def activations(model: onnx.ModelProto, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The int8 output of every QuantizeLinear of a QDQ model, as onnxruntime computes it."""
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            value = helper.make_tensor_value_info(node.output[0], onnx.TensorProto.INT8, None)
            probe.graph.output.append(value)
    return oracle.run(probe, arrays)


def saturation(model: onnx.ModelProto, seed: int = 1) -> list[Saturation]:
    """How each activation fills its range, the inputs excepted, given random inputs that span the
    inputs' whole ranges. QDQ models; integer inputs are ones."""
    constants = {c.name: c for c in model.graph.initializer}
    nodes = [n for n in model.graph.node if n.op_type == "QuantizeLinear"]
    rng, arrays, sources = np.random.default_rng(seed), {}, []
    for port in model.graph.input:
        shape = [d.dim_value for d in port.type.tensor_type.shape.dim]
        if port.type.tensor_type.elem_type != onnx.TensorProto.FLOAT:
            arrays[port.name] = np.ones(shape, np.int64)
            continue
        (source,) = (n for n in nodes if n.input[0] == port.name)
        sources.append(source)
        scale, zero = (numpy_helper.to_array(constants[name]) for name in source.input[1:])
        numbers = rng.integers(-128, 128, shape)
        arrays[port.name] = ((numbers - zero) * scale).astype(np.float32)
    values = activations(model, arrays)
    results = []
    for node in nodes:
        if node in sources:
            continue
        y = values[node.output[0]]
        bottom = numpy_helper.to_array(constants[node.input[2]]) != -128
        ends = (y == 127) | ((y == -128) & bottom)
        results.append(Saturation(node.output[0], y.size, int(ends.sum()), float(y.std())))
    return results


def saturated_share(results: list[Saturation]) -> float:
    """The share of all activations' elements that saturate."""
    return sum(r.saturated for r in results) / sum(r.elements for r in results)
