"""What is still float in a partly quantised model, quantised. Exporters of quantisation-aware
training and PyTorch's pt2e leave the last layers so, or results between two operators.

Whatever the accelerator runs already stays as it is, to the bit; so does every scale and zero
point in the file. The rest is looked at in two steps.

1. Float weights of the layers on the host become int8, one scale for each output channel.
2. Float activations around the operators that are still on the host get a QuantizeLinear and a
   DequantizeLinear, with the ranges that the model has over the samples as it is. One that is
   quantised elsewhere gets that scale, and so does one whose elements are chosen from another's.
   Nothing is added in front of a clamp, which the operator before it does itself. Biases become
   int32.
"""

from __future__ import annotations

import tempfile
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnxruntime.quantization.quant_utils import compute_scale_zp

from systole.sw.compiler.partition import place
from systole.sw.frontend.dataflow import CONVERSIONS
from systole.sw.ir.graph import ModelError
from systole.sw.quantisation.calibrate import MOVES, QUANTISED, channel_peaks, without_dead
from systole.sw.quantisation.fold import attribute, fold
from systole.sw.quantisation.measure import DEQUANTISED
from systole.sw.quantisation.prepare import BIASED, exposed, first_quantised
from systole.sw.quantisation.samples import Feeds, Ranges

CLAMPS = ("Relu", "Clip")
CHOOSING = ("MaxPool", "GlobalMaxPool", "DepthToSpace", "SpaceToDepth", "Split")
"""Operators whose results are elements of their operand, and have its scale."""
PASSING = (*(move for move in MOVES if move != "Split"), "Identity", "Dropout")
"""Operators behind which a dequantised value is as good as in front of them. Not so a Split: what
reads one of its results may come behind what reads another, as in the steps of a sequence."""
INT32_MAX = np.iinfo(np.int32).max


class Scaling(NamedTuple):
    """Names of the constants that are a scale and a zero point (empty: none, so 0)."""

    scale: str
    zero: str


def host_results(model: onnx.ModelProto) -> set[str]:
    """First outputs of the nodes that run on the host as the model is."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(model, path)
        return {p.value for p in place(path) if p.host}


def fold_rest(model: onnx.ModelProto) -> None:
    """As :func:`~sw.quantisation.fold.fold` for the nodes on the host, in place."""
    host = host_results(model)
    fold(model, {node.output[0] for node in model.graph.node} - host)


def complete(
    model: onnx.ModelProto, ranges: Ranges, sample: Feeds, excluded: Collection[str]
) -> onnx.ModelProto:
    """A partly quantised model from :func:`~sw.quantisation.prepare.prepare` with the rest of it
    quantised, but for the nodes named in ``excluded``. ``ranges``: lowest and highest value of its
    activations. Raises :class:`ModelError` if nothing in it is left to quantise."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    names = {node.name for node in copy.graph.node if node.op_type in QUANTISED}
    for step in (_quantise_weights, _quantise_activations):
        parts = _Parts(copy, sample, names - set(excluded))
        step(parts, ranges)
        parts.write()
    if len(copy.graph.node) == len(model.graph.node):
        first = first_quantised(model)
        assert first is not None, "a float model is quantised as a whole"
        raise ModelError(
            f"the model is quantised already: it holds {first.op_type} {first.name!r}, and no "
            "float operator on the host that has a meaning in integers"
        )
    return copy


class _Parts:
    """A model's nodes and constants, and where nodes run, while Q/DQ pairs are added."""

    def __init__(self, model: onnx.ModelProto, sample: Feeds, included: Collection[str]):
        self.graph = model.graph
        self.host = host_results(model)
        self.included = included
        """Names of the nodes that may be quantised."""
        self.initialisers = {i.name: i for i in self.graph.initializer}
        self.producer = {name: node for node in self.graph.node for name in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in self.graph.node:
            for name in node.input:
                self.readers[name].append(node)
        self.first: list[onnx.NodeProto] = []
        """Nodes to put in front of all others, which dequantise constants."""
        self.behind: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        """Nodes to put behind the one that computes a value, or in front where none does."""
        self._taken = {*self.initialisers, *self.producer, *self.readers}
        self._sample = sample
        self._constant, self._dequantised = self._constants()
        self._model = model

    def _constants(self) -> tuple[set[str], set[str]]:
        """Names of the constant values, and of those that a DequantizeLinear makes."""
        constant, dequantised = set(self.initialisers), set[str]()
        for node in self.graph.node:
            if any(name and name not in constant for name in node.input):
                continue
            constant.update(node.output)
            passed = node.op_type in PASSING and node.input[0] in dequantised
            if passed or node.op_type == "DequantizeLinear":
                dequantised.update(node.output)
        return constant, dequantised

    def is_constant(self, name: str) -> bool:
        return name in self._constant

    def real(self, node: onnx.NodeProto, index: int) -> np.ndarray | None:
        """The float constant at an input of ``node``; None if it is something else."""
        name = node.input[index] if index < len(node.input) else ""
        if name not in self._constant or name in self._dequantised:
            return None
        if name in self.initialisers:
            array = numpy_helper.to_array(self.initialisers[name])
        else:
            (array,) = exposed(self._model, [name])(self._sample)
        return array if array.dtype == np.float32 else None

    def array(self, name: str) -> np.ndarray:
        """The initialiser of that name."""
        return numpy_helper.to_array(self.initialisers[name])

    def layers(self, *op_types: str) -> Iterator[onnx.NodeProto]:
        """The nodes of these types that run on the host and may be quantised."""
        for node in self.graph.node:
            if node.op_type in op_types and self.computes(node) and node.output[0] in self.host:
                yield node

    def computes(self, node: onnx.NodeProto | None) -> bool:
        """Whether a node may be quantised and does more than move its operand."""
        return node is not None and node.name in self.included and node.op_type not in PASSING

    def put(self, name: str, array: np.ndarray) -> str:
        """Adds an initialiser; returns its name, made unique from ``name``."""
        name = self.unused(name)
        self.initialisers[name] = numpy_helper.from_array(array, name)
        self.graph.initializer.append(self.initialisers[name])
        return name

    def unused(self, name: str) -> str:
        """A name for a new value, made unique from ``name``."""
        while name in self._taken:
            name += "_"
        self._taken.add(name)
        return name

    def dequantise(self, name: str, codes: np.ndarray, scale: np.ndarray, axis: int = 0) -> str:
        """Adds a constant of these codes; returns the name of its real value."""
        stored = self.put(f"{name}_quantized", codes)
        zero = np.zeros(scale.shape, codes.dtype)
        inputs = [stored, self.put(f"{name}_scale", scale), self.put(f"{name}_zero_point", zero)]
        result = self.unused(name + DEQUANTISED)
        node = helper.make_node("DequantizeLinear", inputs, [result], result)
        if scale.size > 1:
            node.attribute.append(helper.make_attribute("axis", axis))
        self.first.append(node)
        return result

    def write(self) -> None:
        """The added nodes into the graph; initialisers that nothing reads out of it."""
        inputs = [n for value in self.graph.input for n in self.behind.get(value.name, ())]
        nodes = self.first + inputs
        for node in self.graph.node:
            nodes.append(node)
            nodes += [n for name in node.output for n in self.behind.get(name, ())]
        nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del self.graph.node[:]
        self.graph.node.extend(nodes)
        read = {name for node in nodes for name in node.input}
        read.update(value.name for value in self.graph.output)
        kept = [i for i in self.graph.initializer if i.name in read]
        del self.graph.initializer[:]
        self.graph.initializer.extend(kept)


def _quantise_weights(parts: _Parts, _: Ranges) -> None:
    done: dict[tuple[str, int | None], str] = {}
    for node in parts.layers("Conv", "ConvTranspose", "Gemm", "MatMul"):
        for index in (0, 1) if node.op_type == "MatMul" else (1,):
            w = parts.real(node, index)
            if w is None:
                continue
            axis = _channel_axis(node, w) if index else None
            key = (node.input[index], axis)
            if key not in done:
                done[key] = parts.dequantise(node.input[index], *_codes(w, axis), axis or 0)
            node.input[index] = done[key]


def _channel_axis(node: onnx.NodeProto, w: np.ndarray) -> int | None:
    """The axis of the output channels of weights; None: they have one scale."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1 if attribute(node, "group", 1) == 1 else None
    if w.ndim != 2:
        return None
    return 0 if node.op_type == "Gemm" and attribute(node, "transB", 0) else 1


def _codes(w: np.ndarray, axis: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Weights as int8, and their scale or scales."""
    if axis is None:
        codes, scale = _codes(w[None], 0)
        return codes[0], scale.reshape(())
    scale = (without_dead(channel_peaks(w, axis)) / 127).astype(np.float32)
    steps = w / np.expand_dims(scale.astype(np.float64), [i for i in range(w.ndim) if i != axis])
    return np.clip(np.rint(steps), -127, 127).astype(np.int8), scale


def _quantise_activations(parts: _Parts, ranges: Ranges) -> None:
    grid = _Grid(parts, ranges)
    layers = list(parts.layers(*BIASED))
    for value in parts.graph.input:
        grid.visit(value.name)
    for node in parts.graph.node:
        grid.follow(node)
        for name in list(node.output):
            grid.visit(name)
    for node in layers:
        _quantise_bias(parts, node, grid)


class _Grid:
    """The activations that are quantised, in order of the graph."""

    def __init__(self, parts: _Parts, ranges: Ranges):
        self._parts, self._ranges = parts, ranges
        self.scalings: dict[str, Scaling] = {}
        """Of dequantised activations, and what moves their elements, by name."""
        self._results = {value.name for value in parts.graph.output}
        self._type = _usual_type(parts)

    def follow(self, node: onnx.NodeProto) -> None:
        """Take note of what ``node`` dequantises, or moves."""
        if node.op_type == "DequantizeLinear" and not self._parts.is_constant(node.input[0]):
            self.scalings[node.output[0]] = _scaling(node)
        elif node.op_type in PASSING and node.input[0] in self.scalings:
            for name in node.output:
                self.scalings[name] = self.scalings[node.input[0]]

    def visit(self, name: str) -> None:
        """Quantise activation ``name``, unless it need not be."""
        node, readers = self._parts.producer.get(name), self._parts.readers[name]
        at_host = [n for n in (node, *readers) if n is not None and n.output[0] in self._parts.host]
        if not at_host or name in self.scalings or self._parts.is_constant(name):
            return
        if name not in self._ranges or not any(map(self._parts.computes, (node, *readers))):
            return
        if name not in self._results:
            if all(reader.op_type == "QuantizeLinear" for reader in readers):
                return
            clamped = all(r.op_type in CLAMPS and self._parts.computes(r) for r in readers)
            if clamped and self._parts.computes(node):
                return
        self._insert(name, node, readers)

    def _insert(
        self, name: str, node: onnx.NodeProto | None, readers: list[onnx.NodeProto]
    ) -> None:
        raw, real = name, self._parts.unused(name + DEQUANTISED)
        if node is not None and name in self._results:
            raw, real = self._parts.unused(f"{name}_QuantizeLinear_Input"), name
            node.output[[*node.output].index(name)] = raw
        scaling = self._scaling_of(name, node, readers)
        code = self._parts.unused(f"{name}_quantized")
        self._parts.behind[raw] += [
            helper.make_node("QuantizeLinear", [raw, *scaling], [code], code),
            helper.make_node("DequantizeLinear", [code, *scaling], [real], f"{code}/real"),
        ]
        self.scalings[real] = scaling
        for reader in readers:
            wanted = raw if reader.op_type == "QuantizeLinear" else real
            for i, each in enumerate(reader.input):
                if each == name:
                    reader.input[i] = wanted

    def _scaling_of(
        self, name: str, node: onnx.NodeProto | None, readers: list[onnx.NodeProto]
    ) -> Scaling:
        """The scale of an activation: the one that a reader quantises it by already, or its
        operand's, or by its range."""
        for reader in readers:
            if reader.op_type == "QuantizeLinear":
                return _scaling(reader)
        if node is not None and node.op_type in CHOOSING and node.input[0] in self.scalings:
            return self.scalings[node.input[0]]
        low, high = (np.array(v, np.float32) for v in self._ranges[name])
        limits = np.iinfo(self._type)
        least, most = (np.array(end, self._type) for end in (limits.min, limits.max))
        zero, scale = compute_scale_zp(low, high, least, most)
        return Scaling(
            self._parts.put(f"{name}_scale", np.array(scale, np.float32)),
            self._parts.put(f"{name}_zero_point", np.array(zero, self._type)),
        )


def _scaling(node: onnx.NodeProto) -> Scaling:
    """The scale and the zero point of a QuantizeLinear or DequantizeLinear."""
    return Scaling(node.input[1], node.input[2] if len(node.input) > 2 else "")


def _usual_type(parts: _Parts) -> np.dtype:
    """int8 or uint8: what most quantised activations of the model are."""
    zeros = [
        parts.initialisers[node.input[2]]
        for node in parts.graph.node
        if node.op_type in CONVERSIONS
        and not parts.is_constant(node.input[0])
        and len(node.input) > 2
        and node.input[2] in parts.initialisers
    ]
    count = Counter(zero.data_type for zero in zeros)
    unsigned = count[onnx.TensorProto.UINT8] > count[onnx.TensorProto.INT8]
    return np.dtype(np.uint8 if unsigned else np.int8)


def _quantise_bias(parts: _Parts, node: onnx.NodeProto, grid: _Grid) -> None:
    """The float bias of a layer whose operands are quantised as int32, unless it does not fit."""
    b, weights = parts.real(node, 2), parts.producer.get(node.input[1])
    scaling = grid.scalings.get(node.input[0])
    if b is None or scaling is None or weights is None or weights.op_type != "DequantizeLinear":
        return
    factors = [attribute(node, name, 1.0) for name in ("alpha", "beta")]
    names = (scaling.scale, weights.input[1])
    if factors != [1.0, 1.0] or not all(name in parts.initialisers for name in names):
        return
    if b.shape not in ((), (b.size,), (1, b.size)):  # a sum of matrices
        return
    x_scale, w_scale = (parts.array(name).reshape(-1) for name in names)
    channels = max(b.size, w_scale.size)
    scale = np.broadcast_to((x_scale * w_scale).astype(np.float32), channels)
    codes = np.rint(np.broadcast_to(b.reshape(-1), channels) / scale.astype(np.float64))
    if np.abs(codes).max(initial=0) <= INT32_MAX:
        name = f"{node.input[2]}/{node.name}"
        node.input[2] = parts.dequantise(name, codes.astype(np.int32), scale)
