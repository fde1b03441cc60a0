"""How good a quantised model is: noise of each layer, accuracy on labelled samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from systole.sw.frontend.inputs import InputError
from systole.sw.quantisation.calibrate import Feeds
from systole.sw.quantisation.prepare import session

DEQUANTISED = "_DequantizeLinear_Output"
"""What onnxruntime's quantiser appends to a tensor's name."""
UNMASKED = 1e30
"""Attention masks put scores beyond this, to float32's lowest number or infinity; such elements
count neither as signal nor as noise."""


@dataclass(frozen=True)
class LayerNoise:
    """``snr_db``: signal to quantisation noise of what the layer's readers see; infinite if they
    see what they see in float, None if the layer's result is zero in float but not quantised."""

    layer: str
    op_type: str
    tensor: str
    snr_db: float | None


def layer_noise(
    model: onnx.ModelProto, quantised: onnx.ModelProto, samples: Sequence[Feeds]
) -> list[LayerNoise]:
    """Of all layers, the worst first."""
    producers = {name: node for node in quantised.graph.node for name in node.output}
    pairs = {}
    for node in model.graph.node:
        for tensor in node.output:
            seen = tensor + DEQUANTISED
            seen = seen if seen in producers else tensor
            if seen in producers:
                pairs[tensor] = seen
    expected, actual = _exposed(model, list(pairs)), _exposed(quantised, list(pairs.values()))
    signal, noise = dict.fromkeys(pairs, 0.0), dict.fromkeys(pairs, 0.0)
    for feeds in samples:
        for tensor, a, b in zip(
            pairs,
            expected.run(list(pairs), dict(feeds)),
            actual.run(list(pairs.values()), dict(feeds)),
        ):
            a, b = (np.asarray(x, np.float64) for x in (a, b))
            masked = ~(np.abs(a) < UNMASKED)
            a, b = np.where(masked, 0.0, a), np.where(masked, 0.0, b)
            signal[tensor] += float((a**2).sum())
            noise[tensor] += float(((a - b) ** 2).sum())
    result = []
    for tensor, seen in pairs.items():
        node = producers[seen]
        while node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.input[0] in producers:
            node = producers[node.input[0]]
        ratio = _decibels(signal[tensor], noise[tensor])
        result.append(LayerNoise(node.name, node.op_type, tensor, ratio))
    return sorted(result, key=lambda row: -math.inf if row.snr_db is None else row.snr_db)


def _decibels(signal: float, noise: float) -> float | None:
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else None


def _exposed(model: onnx.ModelProto, tensors: list[str]):
    exposed = onnx.ModelProto()
    exposed.CopyFrom(model)
    del exposed.graph.output[:]
    exposed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors)
    return session(exposed)


def classes(model: onnx.ModelProto, samples: Sequence[Feeds]) -> np.ndarray:
    """The class with the largest number in the model's first output, for each sample. Raises
    :class:`InputError` if that output is no single number per class."""
    run = session(model)
    name = run.get_outputs()[0].name
    found = []
    for feeds in samples:
        output = run.run([name], dict(feeds))[0]
        if output.size != max(output.shape, default=1) or output.size < 2:
            raise InputError(
                f"accuracy: output {name} of shape {output.shape} is no number per class"
            )
        found.append(int(output.argmax()))
    return np.array(found)
