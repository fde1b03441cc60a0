"""Cross-layer equalisation, for activations with one scale a tensor and weights with one a channel.

Between a Conv or Gemm and the Conv or Gemm that alone reads its result, through functions f with
f(sx) = s f(x) for s > 0 (Relu, pooling, none), each channel can be scaled by any s: the first
layer's output channel is divided by s, the second's input channel multiplied. Nagel et al., "Data-
Free Quantization Through Weight Equalization and Bias Correction" (ICCV 2019) choose s by the
weights' ranges per tensor. With weights quantised per output channel the first layer's scaling
costs nothing; what counts is the range of each channel of the activation, measured over samples:

* second layer depthwise: its scaling costs nothing either; s makes all channels of equal range;
* second layer dense: s balances the activation's range of a channel with the weights that read
  it (each relative to its output channel): s = sqrt(range / weight).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from systole.sw.quantisation.calibrate import channel_peaks
from systole.sw.quantisation.fold import Weights, attribute
from systole.sw.quantisation.prepare import exposed
from systole.sw.quantisation.samples import Feeds

HOMOGENEOUS = (
    *("Relu", "LeakyRelu", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"),
)
LIMIT = 256.0
"""Bounds a factor to 1/LIMIT..LIMIT, so that biases stay within int32 at the product's scale."""


@dataclass(frozen=True)
class EqualisedChain:
    """``tensor``: what is equalised, the first layer's result after its activation function."""

    first: onnx.NodeProto
    second: onnx.NodeProto
    tensor: str


def equalise(model: onnx.ModelProto, samples: Sequence[Feeds]) -> int:
    """Changes ``model`` in place; its function stays the same up to rounding. Returns how many
    pairs of layers were equalised."""
    weights = Weights(model)
    chains = list(_chains(model, weights))
    peaks = _channel_peaks(model, [c.tensor for c in chains], samples) if chains else {}
    done = 0
    for chain in chains:
        factors = _factors(weights, chain, peaks[chain.tensor])
        if factors is not None:
            _scale(weights, chain, factors)
            done += 1
    weights.drop_unused()
    return done


def _chains(model: onnx.ModelProto, weights: Weights) -> Iterator[EqualisedChain]:
    readers = {name: node for node in model.graph.node for name in node.input}
    for first in model.graph.node:
        if first.op_type not in ("Conv", "Gemm") or not _constant(first, weights):
            continue
        tensor = value = first.output[0]
        while weights.readers[value] == 1 and value in readers:
            node = readers[value]
            if node.input[0] != value:
                break
            if node.op_type in HOMOGENEOUS:
                value = node.output[0]
                if node.op_type in ("Relu", "LeakyRelu"):
                    tensor = value
                continue
            same = (node.op_type == "Gemm") == (first.op_type == "Gemm")
            if node.op_type in ("Conv", "Gemm") and same and _constant(node, weights):
                yield EqualisedChain(first, node, tensor)
            break


def _constant(node: onnx.NodeProto, weights: Weights) -> bool:
    return (
        all(name in weights.arrays for name in node.input[1:])
        and attribute(node, "transA", 0) == 0
        and (node.op_type == "Conv" or weights.arrays[node.input[1]].ndim == 2)
    )


def _channel_peaks(
    model: onnx.ModelProto, tensors: list[str], samples: Sequence[Feeds]
) -> dict[str, np.ndarray]:
    """Largest magnitude of each channel (axis 1)."""
    tensors = list(dict.fromkeys(tensors))
    run = exposed(model, tensors)
    peaks: dict[str, np.ndarray] = {}
    for feeds in samples:
        for name, array in zip(tensors, run(feeds), strict=True):
            peaks[name] = np.maximum(peaks.get(name, 0), channel_peaks(array, 1))
    return peaks


def _factors(weights: Weights, chain: EqualisedChain, peaks: np.ndarray) -> np.ndarray | None:
    """s of each channel; None where the second layer's groups fit neither case."""
    if not peaks.max() > 0:
        return None
    live = peaks > 0
    relative = np.where(live, peaks / peaks.max(), 1.0)
    w = weights.arrays[chain.second.input[1]]
    if chain.second.op_type == "Gemm":
        w = w if attribute(chain.second, "transB", 0) else w.T
    elif attribute(chain.second, "group", 1) == len(peaks) > 1:
        return np.maximum(relative, 1 / LIMIT)
    elif attribute(chain.second, "group", 1) != 1:
        return None
    rows = np.abs(w).reshape(w.shape[0], w.shape[1], -1).max(axis=2)
    largest = rows.max(axis=1, keepdims=True)
    columns = (rows / np.where(largest > 0, largest, 1)).max(axis=0)
    read = columns > 0
    columns = np.where(read, columns / max(columns.max(), np.finfo(np.float32).tiny), 1.0)
    factors = np.clip(np.sqrt(relative / columns), 1 / LIMIT, LIMIT)
    return np.where(live & read, factors, 1.0)


def _scale(weights: Weights, chain: EqualisedChain, factors: np.ndarray) -> None:
    """The first layer's output channels divided, the second's input channels multiplied."""
    first, second = chain.first, chain.second
    across = first.op_type == "Gemm" and not attribute(first, "transB", 0)
    _replace(weights, first, 1, _along_axis(weights, first, 1 / factors, 1 if across else 0))
    if len(first.input) > 2 and first.input[2]:
        bias = weights.arrays[first.input[2]].astype(np.float64)
        _replace(weights, first, 2, bias / factors)
    if second.op_type == "Gemm":
        axis = 1 if attribute(second, "transB", 0) else 0
    elif attribute(second, "group", 1) == 1:
        axis = 1
    else:
        axis = 0
        factors = np.repeat(factors, len(weights.arrays[second.input[1]]) // len(factors))
    _replace(weights, second, 1, _along_axis(weights, second, factors, axis))


def _along_axis(
    weights: Weights, node: onnx.NodeProto, factors: np.ndarray, axis: int
) -> np.ndarray:
    w = weights.arrays[node.input[1]].astype(np.float64)
    shape = [1] * w.ndim
    shape[axis] = len(factors)
    return w * factors.reshape(shape)


def _replace(weights: Weights, node: onnx.NodeProto, index: int, array: np.ndarray) -> None:
    node.input[index] = weights.put(f"{node.input[index]}_equalised", array)
