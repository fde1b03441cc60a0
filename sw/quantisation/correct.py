"""Bias correction: the mean error that quantisation adds to each channel of a layer, taken off its
bias (Nagel et al., ICCV 2019, in the empirical form). It is largest where few weights share a
channel, so in depthwise layers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import numpy_helper

from systole.sw.quantisation.fold import Weights
from systole.sw.quantisation.prepare import exposed
from systole.sw.quantisation.samples import Feeds

LAYERS = ("Conv", "Gemm")
INT32 = np.iinfo(np.int32)


def add_biases(model: onnx.ModelProto) -> None:
    """A bias of zeros for every layer that has none, to be corrected later; in place."""
    weights = Weights(model)
    for node in model.graph.node:
        w = weights.arrays.get(node.input[1]) if node.op_type in LAYERS else None
        if w is None or (len(node.input) > 2 and node.input[2]):
            continue
        across = node.op_type == "Gemm" and not any(
            a.name == "transB" and a.i for a in node.attribute
        )
        del node.input[2:]
        zeros = np.zeros(w.shape[1 if across else 0])
        node.input.append(weights.put(f"{node.output[0]}_bias", zeros))


def correct_biases(
    model: onnx.ModelProto, quantised: onnx.ModelProto, samples: Sequence[Feeds]
) -> int:
    """Changes the int32 biases of ``quantised``, in place, layer after layer so that each is
    measured with those before it corrected. Returns the number of layers corrected."""
    originals = {n.name: n.output[0] for n in model.graph.node if n.op_type in LAYERS}
    biases = [
        (node, *quantised_bias)
        for node in quantised.graph.node
        if node.name in originals and (quantised_bias := _bias(quantised, node)) is not None
    ]
    if not biases:
        return 0
    wanted = _means(model, [originals[node.name] for node, _, _ in biases], samples)
    for node, bias, scale in biases:
        part = _up_to(quantised, node)
        error = _means(part, [node.output[0]], samples)[node.output[0]]
        error -= wanted[originals[node.name]]
        numbers = numpy_helper.to_array(bias).astype(np.float64)
        numbers = np.clip(np.rint(numbers - error / scale), INT32.min, INT32.max)
        bias.CopyFrom(numpy_helper.from_array(numbers.astype(np.int32), bias.name))
    return len(biases)


def _bias(
    model: onnx.ModelProto, node: onnx.NodeProto
) -> tuple[onnx.TensorProto, np.ndarray] | None:
    """The int32 initialiser and its scale; None if the node has no quantised bias of its own."""
    if len(node.input) < 3:
        return None
    constants = {i.name: i for i in model.graph.initializer}
    for other in model.graph.node:
        if node.input[2] in other.output:
            stored, scale = (constants.get(name) for name in other.input[:2])
            readers = sum(node.input[2] in n.input for n in model.graph.node)
            if stored is None or scale is None or readers != 1:
                continue
            if stored.data_type == onnx.TensorProto.INT32:
                return stored, numpy_helper.to_array(scale).astype(np.float64)
    return None


def _up_to(model: onnx.ModelProto, last: onnx.NodeProto) -> onnx.ModelProto:
    """The part of ``model`` that computes ``last``."""
    needed, nodes = set(last.output), []
    for node in reversed(model.graph.node):
        if needed.intersection(node.output):
            nodes.append(node)
            needed.update(node.input)
    part = onnx.ModelProto(ir_version=model.ir_version)
    part.opset_import.extend(model.opset_import)
    part.graph.name = model.graph.name
    part.graph.node.extend(reversed(nodes))
    part.graph.input.extend(model.graph.input)
    part.graph.initializer.extend(i for i in model.graph.initializer if i.name in needed)
    part.graph.output.append(onnx.ValueInfoProto(name=last.output[0]))
    return part


def _means(
    model: onnx.ModelProto, tensors: list[str], samples: Sequence[Feeds]
) -> dict[str, np.ndarray]:
    """Mean of each channel (axis 1) over ``samples``."""
    run = exposed(model, tensors)
    totals: dict[str, np.ndarray] = {}
    for feeds in samples:
        for name, array in zip(tensors, run(feeds), strict=True):
            mean = np.moveaxis(array, 1, 0).reshape(array.shape[1], -1).mean(axis=1, dtype=float)
            totals[name] = totals.get(name, 0.0) + mean
    return {name: total / len(samples) for name, total in totals.items()}
