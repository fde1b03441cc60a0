"""Affine steps folded into the weights before them.

1. A MatMul of a matrix by a constant matrix becomes a Gemm (which has a bias); a Gemm's constant
   bias gets one number per column, where it broadcasts along them.
2. BatchNormalization, and Mul, Add, Sub, Div by a constant along the channels, after a Conv or Gemm
   that nothing else reads, go into its weights and bias; also past a Reshape that leaves the
   channels alone.
3. A BatchNormalization that finds none becomes a depthwise 1x1 Conv, in networks that normalise
   before they convolve, where its input has three or more dimensions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

Affine = tuple[np.ndarray, np.ndarray]
"""Factor and offset, one per channel, float64."""


class Weights:
    """A model's constants and who reads what. ``readers`` counts a graph output as a reader."""

    def __init__(self, model: onnx.ModelProto):
        self.graph = model.graph
        self.arrays = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
        self.readers = Counter(name for node in model.graph.node for name in node.input)
        self.readers.update(value.name for value in model.graph.output)

    def put(self, name: str, array: np.ndarray) -> str:
        """Adds ``array`` as a float32 initialiser; returns its name, made unique from ``name``."""
        while name in self.arrays or name in self.readers:
            name += "_"
        self.arrays[name] = array.astype(np.float32)
        self.graph.initializer.append(numpy_helper.from_array(self.arrays[name], name))
        return name

    def drop_unused(self) -> None:
        """Remove the initialisers that nothing reads."""
        read = {name for node in self.graph.node for name in node.input}
        read.update(value.name for value in self.graph.output)
        keep = [i for i in self.graph.initializer if i.name in read]
        del self.graph.initializer[:]
        self.graph.initializer.extend(keep)


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    """The value of a node's attribute, or ``default`` without it."""
    for a in node.attribute:
        if a.name == name:
            return helper.get_attribute_value(a)
    return default


def fold(model: onnx.ModelProto, kept: Collection[str] = ()) -> None:
    """Changes ``model`` in place, but for the nodes whose first outputs are ``kept``; its function
    stays the same up to rounding."""
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = {
        v.name: [d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in (*inferred.value_info, *inferred.input, *inferred.output)
        if v.type.tensor_type.HasField("shape")
    }
    weights = Weights(model)
    before: dict[str, tuple[onnx.NodeProto, onnx.NodeProto]] = {}
    # By tensor: the Conv or Gemm that its only reader may go into, and the node that makes it.
    gone = []
    for node in [n for n in model.graph.node if n.output[0] not in kept]:
        rank = len(shapes.get(node.input[0], ())) if node.input else 0
        if node.op_type == "MatMul" and rank == 2 and _is_matrix(weights, node):
            node.op_type = "Gemm"
        if node.op_type == "Gemm":
            _flatten_bias(weights, node)
        found = next((before[i] for i in node.input if i in before), None)
        layer = last = node
        if found and _fold_into(weights, found[0], node, found[1].output[0], shapes):
            layer, last = found
            last.output[0] = node.output[0]
            gone.append(node)
        elif found and node.op_type in ("Reshape", "Squeeze", "Unsqueeze", "Flatten"):
            if _keeps_channels(shapes, node):
                layer = found[0]
        elif node.op_type == "BatchNormalization" and rank >= 3:
            _as_convolution(weights, node, rank)
        if layer.op_type in ("Conv", "Gemm") and weights.readers[last.output[0]] == 1:
            before[last.output[0]] = layer, last
    for node in gone:
        model.graph.node.remove(node)
    weights.drop_unused()


def _keeps_channels(shapes: dict[str, list[int]], node: onnx.NodeProto) -> bool:
    first, second = (shapes.get(name, ())[:2] for name in (node.input[0], node.output[0]))
    return len(first) == 2 and first == second and 0 not in first


def _is_matrix(weights: Weights, node: onnx.NodeProto) -> bool:
    constant = weights.arrays.get(node.input[1])
    return constant is not None and constant.ndim == 2


def _flatten_bias(weights: Weights, node: onnx.NodeProto) -> None:
    w, b = (weights.arrays.get(name) for name in (*node.input[1:3], "")[:2])
    if w is None or b is None:
        return
    columns = w.shape[0 if attribute(node, "transB", 0) else 1]
    flat = along(b, 2, 1, columns)
    if flat is not None and b.shape != flat.shape:
        node.input[2] = weights.put(node.input[2], flat)


def _fold_into(
    weights: Weights,
    producer: onnx.NodeProto,
    node: onnx.NodeProto,
    x: str,
    shapes: dict[str, list[int]],
) -> bool:
    """Whether ``node``, whose operand ``x`` is ``producer``'s result, could be taken into it."""
    w = weights.arrays.get(producer.input[1])
    if w is None:
        return False
    gemm = producer.op_type == "Gemm"
    axis = 1 if gemm and not attribute(producer, "transB", 0) else 0
    channels, rank = w.shape[axis], w.ndim
    bias: np.ndarray | None = np.zeros(channels)
    if len(producer.input) > 2 and producer.input[2]:
        bias = weights.arrays.get(producer.input[2])
    if bias is None or bias.shape != (channels,):
        return False
    affine = _affine(weights, node, x, len(shapes.get(x, ())), channels)
    if affine is None:
        return False
    factor, offset = affine
    w = w.astype(np.float64)
    if gemm:
        w = w * attribute(producer, "alpha", 1.0)
        bias = bias * attribute(producer, "beta", 1.0)
        for name in ("alpha", "beta"):
            for a in [a for a in producer.attribute if a.name == name]:
                producer.attribute.remove(a)
    shape = [1] * rank
    shape[axis] = channels
    stem = node.output[0]
    names = [
        weights.put(f"{stem}_weight", w * factor.reshape(shape)),
        weights.put(f"{stem}_bias", bias * factor + offset),
    ]
    del producer.input[1:]
    producer.input.extend(names)
    return True


def along(constant: np.ndarray, rank: int, axis: int, channels: int) -> np.ndarray | None:
    """``constant`` as one float64 number per channel, if it broadcasts along ``axis`` only."""
    if constant.ndim > rank or constant.dtype != np.float32:
        return None
    shape = (1,) * (rank - constant.ndim) + constant.shape
    if shape[axis] not in (1, channels) or any(
        size != 1 for i, size in enumerate(shape) if i != axis
    ):
        return None
    return np.broadcast_to(constant.reshape(-1), channels).astype(np.float64)


def _affine(
    weights: Weights, node: onnx.NodeProto, x: str, rank: int, channels: int
) -> Affine | None:
    """What ``node`` does to its operand ``x``, of that rank with its channels on axis 1."""
    if node.op_type == "BatchNormalization":
        affine = _normalisation(weights, node)
        return affine if node.input[0] == x else None
    if node.op_type not in ("Add", "Sub", "Mul", "Div") or len(set(node.input)) != 2:
        return None
    first = node.input[0] == x
    constant = weights.arrays.get(node.input[1 if first else 0])
    c = None if constant is None else along(constant, rank, 1, channels)
    if c is None:
        return None
    one, zero = np.ones(channels), np.zeros(channels)
    if node.op_type == "Add":
        return one, c
    if node.op_type == "Sub":
        return (one, -c) if first else (-one, c)
    if node.op_type == "Mul":
        return c, zero
    return (1 / c, zero) if first and (c != 0).all() else None


def _normalisation(weights: Weights, node: onnx.NodeProto) -> Affine | None:
    names = list(node.input[1:5])
    if not weights.arrays.keys() >= {*names} or attribute(node, "training_mode", 0):
        return None
    gamma, beta, mean, variance = (weights.arrays[name].astype(np.float64) for name in names)
    factor = gamma / np.sqrt(variance + attribute(node, "epsilon", 1e-5))
    return factor, beta - mean * factor


def _as_convolution(weights: Weights, node: onnx.NodeProto, rank: int) -> None:
    affine = _normalisation(weights, node)
    if affine is None:
        return
    factor, offset = affine
    stem = node.output[0]
    names = [
        weights.put(f"{stem}_weight", factor.reshape(-1, *(1,) * (rank - 1))),
        weights.put(f"{stem}_bias", offset),
    ]
    node.op_type = "Conv"
    del node.attribute[:]
    node.attribute.append(helper.make_attribute("group", len(factor)))
    node.attribute.append(helper.make_attribute("kernel_shape", [1] * (rank - 2)))
    del node.input[1:]
    node.input.extend(names)
