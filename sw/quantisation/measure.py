"""How good a quantised model is: noise of each layer, accuracy on labelled samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from systole.sw.frontend.dataflow import CONVERSIONS
from systole.sw.frontend.inputs import InputError
from systole.sw.quantisation.prepare import exposed
from systole.sw.quantisation.recurrent import is_inner, is_rest
from systole.sw.quantisation.samples import Feeds

DEQUANTISED = "_DequantizeLinear_Output"
"""What onnxruntime's quantiser appends to a tensor's name."""
UNMASKED = 1e30
"""Attention masks put scores beyond this, to float32's lowest number or infinity; such elements
count neither as signal nor as noise."""


@dataclass(frozen=True)
class LayerNoise:
    """The noise of one layer. ``snr_db``: signal to quantisation noise of what the layer's readers
    see; infinite without noise, None if the layer's result is zero in float but not quantised."""

    layer: str
    op_type: str
    tensor: str
    snr_db: float | None


def layer_noise(
    model: onnx.ModelProto, quantised: onnx.ModelProto, samples: Sequence[Feeds]
) -> list[LayerNoise]:
    """The noise of every layer, the worst first. ``model`` is the float one, ``samples`` are its
    inputs by name."""
    producers = {name: node for node in quantised.graph.node for name in node.output}
    pairs = {}
    for node in model.graph.node:
        if node.op_type in CONVERSIONS:
            continue
        for tensor in node.output:
            seen = tensor + DEQUANTISED
            seen = seen if seen in producers else tensor
            if seen in producers and not is_rest(tensor):
                pairs[tensor] = seen
    result = []
    for tensor, ratio in _ratios(model, quantised, pairs, samples).items():
        node = producers[pairs[tensor]]
        while node.op_type in CONVERSIONS and node.input[0] in producers:
            node = producers[node.input[0]]
        result.append(LayerNoise(node.name, node.op_type, tensor, ratio))
    return sorted(result, key=lambda row: -math.inf if row.snr_db is None else row.snr_db)


def block_ends(model: onnx.ModelProto) -> list[str]:
    """Tensors at which blocks end, in order: sums of a tensor and of what was computed from it."""
    before: dict[str, int] = {}  # of each tensor a bit for each that it was computed from, or is
    ends = []
    known = {i.name for i in model.graph.initializer}
    for node in model.graph.node:
        operands = [name for name in node.input if name and name not in known]
        sources = 0
        for name in operands:
            if name not in before:
                before[name] = 1 << len(before)
            sources |= before[name]
        adds = node.op_type in ("Add", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization")
        if adds and len(operands) == 2 and not is_inner(node.output[0]):
            a, b = (before[name] for name in operands)
            if a != b and a & b in (a, b):
                ends.append(node.output[0])
        for name in node.output:
            before[name] = sources | 1 << len(before)
    return ends


def output_noise(
    model: onnx.ModelProto, quantised: onnx.ModelProto, samples: Sequence[Feeds]
) -> dict[str, float | None]:
    """Signal to noise in dB of the model's outputs of real numbers, by name; as those of layers."""
    kind = onnx.TensorProto.FLOAT
    names = [v.name for v in model.graph.output if v.type.tensor_type.elem_type == kind]
    return _ratios(model, quantised, {name: name for name in names}, samples)


def _ratios(
    model: onnx.ModelProto,
    quantised: onnx.ModelProto,
    pairs: Mapping[str, str],
    samples: Sequence[Feeds],
) -> dict[str, float | None]:
    """Signal to noise of tensors; ``pairs``: their names in ``quantised`` by those in ``model``."""
    expected, actual = exposed(model, list(pairs)), exposed(quantised, list(pairs.values()))
    signal, noise = dict.fromkeys(pairs, 0.0), dict.fromkeys(pairs, 0.0)
    for feeds in samples if pairs else ():
        for tensor, array, other in zip(pairs, expected(feeds), actual(feeds), strict=True):
            unmasked = np.abs(array) < UNMASKED
            true = np.where(unmasked, array, 0).astype(np.float64)
            signal[tensor] += float((true**2).sum())
            noise[tensor] += float(((true - np.where(unmasked, other, 0)) ** 2).sum())
    return {tensor: _decibels(signal[tensor], noise[tensor]) for tensor in pairs}


def _decibels(signal: float, noise: float) -> float | None:
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else None


def classes(model: onnx.ModelProto, samples: Sequence[Feeds]) -> np.ndarray:
    """The class with the largest number in the model's first output, for each sample. Raises
    :class:`InputError` if that output is no single number per class."""
    name = model.graph.output[0].name
    run = exposed(model, [name])
    numbers = []
    for feeds in samples:
        (output,) = run(feeds)
        if output.size != max(output.shape, default=1) or output.size < 2:
            raise InputError(
                f"accuracy: output {name} of shape {output.shape} is not one number per class"
            )
        numbers.append(int(output.argmax()))
    return np.array(numbers)
