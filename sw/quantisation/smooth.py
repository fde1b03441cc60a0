"""Smoothing, for the activations behind a normalisation, which have one scale a tensor.

A few channels behind a normalisation are often many times as large as the others, and take the
steps of the scale for themselves. Each channel can be divided by any factor if the rows of the
weights that read it are multiplied by it: the division goes into the normalisation's own gain and
offset.
Xiao et al., "SmoothQuant" (ICML 2023) choose the factor of a channel as

    (largest activation) ^ alpha / (largest weight) ^ (1 - alpha)

Here a weight counts relative to its output channel, which has a scale of its own. Alpha is given
or chosen for each normalisation: what of ``ALPHAS`` and none makes the least error in the products'
results over samples, weights and activations rounded to 8 bits.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from systole.sw.quantisation.calibrate import NORMALISATIONS
from systole.sw.quantisation.equalise import LIMIT
from systole.sw.quantisation.fold import Weights, attribute
from systole.sw.quantisation.prepare import exposed
from systole.sw.quantisation.samples import Chosen, Feeds

ALPHAS = (0.25, 0.5, 0.75)
WORTH = 0.8
"""An alpha is chosen if the error falls to this share of what it is without smoothing, by 1 dB."""
SAMPLES = 8
"""Samples on which alpha is chosen."""


@dataclass(frozen=True)
class SmoothedNorm:
    """A tensor that can be smoothed: the nodes and operands that gain and offset are, and the
    products by constant weights that alone read the tensor."""

    tensor: str
    affine: list[tuple[onnx.NodeProto, int]]
    readers: list[onnx.NodeProto]


def smooth(
    model: onnx.ModelProto, samples: Sequence[Feeds], alpha: float | None = None
) -> dict[str, float]:
    """Changes ``model`` in place; its function stays the same up to rounding. ``alpha``: 0 to 1;
    None: chosen. Returns alpha by the name of the tensors that were smoothed."""
    weights = Weights(model)
    norms = list(_norms(model, weights))
    if not norms:
        return {}
    chosen = {}
    few = Chosen(samples, SAMPLES)
    run = exposed(model, [norm.tensor for norm in norms])
    values = [np.concatenate(parts) for parts in zip(*(_rows(run(feeds)) for feeds in few))]
    peaks = _peaks(model, norms, samples)
    for norm, x in zip(norms, values, strict=True):
        matrices = [_matrix(weights, node) for node in norm.readers]
        alphas = ALPHAS if alpha is None else (alpha,)
        factors = {a: _factors(peaks[norm.tensor], matrices, a) for a in alphas}
        if alpha is None:
            errors = {a: _error(x, matrices, f) for a, f in factors.items()}
            best = min(errors, key=lambda a: errors[a])
            if errors[best] > WORTH * _error(x, matrices, np.ones(x.shape[1])):
                continue
        else:
            best = alpha
        _scale(weights, norm, factors[best])
        chosen[norm.tensor] = best
    weights.drop_unused()
    return chosen


def _norms(model: onnx.ModelProto, weights: Weights) -> Iterator[SmoothedNorm]:
    producer = {name: node for node in model.graph.node for name in node.output}
    readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in model.graph.node:
        for name in set(node.input):
            readers[name].append(node)
    values = (*model.graph.value_info, *model.graph.output)
    last = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim][-1:] for v in values}
    results = {value.name for value in model.graph.output}

    def products(tensor: str, channels: int) -> list[onnx.NodeProto] | None:
        """The products that read a tensor, also behind a Reshape of other axes than the last; None
        if something else does."""
        found: list[onnx.NodeProto] = []
        for node in readers[tensor]:
            if node.op_type == "Reshape" and last.get(node.output[0]) == [channels]:
                behind = products(node.output[0], channels)
            else:
                behind = [node] if _reads(node, tensor, weights, channels) else None
            if behind is None:
                return None
            found += behind
        return None if tensor in results else found

    for node in model.graph.node:
        affine = _affine(node, producer, readers, weights)
        if affine is None:
            continue
        gain, index = affine[0]
        channels = weights.arrays[gain.input[index]].size
        ends = products(node.output[0], channels) if channels > 1 else None
        if ends:
            yield SmoothedNorm(node.output[0], affine, ends)


def _affine(
    node: onnx.NodeProto,
    producer: dict[str, onnx.NodeProto],
    readers: dict[str, list[onnx.NodeProto]],
    weights: Weights,
) -> list[tuple[onnx.NodeProto, int]] | None:
    """Where gain and offset of a normalisation that ends in ``node`` are, the gain first."""

    def constant(each: onnx.NodeProto) -> int | None:
        """The operand that is one number for each channel, the last axis."""
        for i, name in enumerate(each.input):
            array = weights.arrays.get(name)
            if array is not None and array.ndim and array.size == array.shape[-1]:
                return i
        return None

    if node.op_type in NORMALISATIONS and len(node.output) == 1:
        places = [(node, i) for i in range(1, len(node.input)) if node.input[i]]
        whole = all(weights.arrays.get(n.input[i], np.ones(())).ndim == 1 for n, i in places)
        return places if places and whole else None
    if node.op_type != "Add" or (offset := constant(node)) is None:
        return None
    gain = producer.get(node.input[1 - offset])
    if gain is None or gain.op_type != "Mul" or (factor := constant(gain)) is None:
        return None
    if len(readers[gain.output[0]]) > 1:
        return None
    return [(gain, factor), (node, offset)]


def _reads(node: onnx.NodeProto, tensor: str, weights: Weights, channels: int) -> bool:
    """Whether a node multiplies the tensor, channels last, by constant weights."""
    if node.op_type not in ("MatMul", "Gemm") or node.input[0] != tensor:
        return False
    w = weights.arrays.get(node.input[1])
    if w is None or w.ndim != 2 or attribute(node, "transA", 0) or tensor in node.input[1:]:
        return False
    return w.shape[1 if attribute(node, "transB", 0) else 0] == channels


def _rows(arrays: list[np.ndarray]) -> list[np.ndarray]:
    """Each with its channels as columns."""
    return [a.reshape(-1, a.shape[-1]).astype(np.float64) for a in arrays]


def _peaks(
    model: onnx.ModelProto, norms: Sequence[SmoothedNorm], samples: Sequence[Feeds]
) -> dict[str, np.ndarray]:
    """The largest magnitude of each channel, by tensor."""
    run = exposed(model, [norm.tensor for norm in norms])
    peaks: dict[str, np.ndarray] = {}
    for feeds in samples:
        for norm, rows in zip(norms, _rows(run(feeds)), strict=True):
            peaks[norm.tensor] = np.maximum(peaks.get(norm.tensor, 0), np.abs(rows).max(axis=0))
    return peaks


def _matrix(weights: Weights, node: onnx.NodeProto) -> np.ndarray:
    """The weights, a row for each channel that they read."""
    w = weights.arrays[node.input[1]].astype(np.float64)
    return w.T if attribute(node, "transB", 0) else w


def _factors(peaks: np.ndarray, matrices: Sequence[np.ndarray], alpha: float) -> np.ndarray:
    """What each channel is divided by; 1 where nothing is known, in the middle of the others."""
    w = np.concatenate(matrices, axis=1)
    largest = np.abs(w).max(axis=0)
    rows = (np.abs(w) / np.where(largest > 0, largest, 1)).max(axis=1)
    known = (peaks > 0) & (rows > 0)
    if not known.any():
        return np.ones(len(peaks))
    x, r = (np.where(known, v, 1.0) for v in (peaks, rows))
    factors = np.where(known, x**alpha / r ** (1 - alpha), 1.0)
    factors = np.where(known, factors / np.median(factors[known]), 1.0)
    return np.clip(factors, 1 / LIMIT, LIMIT)


def _error(x: np.ndarray, matrices: Sequence[np.ndarray], factors: np.ndarray) -> float:
    """The error of the products in 8 bits, squared and summed, relative to each product."""
    scaled = x / factors
    low, high = min(scaled.min(), 0.0), max(scaled.max(), 0.0)
    scale = (high - low) / 255 or 1.0
    zero = np.rint(-128 - low / scale)
    rounded = (np.clip(np.rint(scaled / scale) + zero, -128, 127) - zero) * scale
    total = 0.0
    for w in matrices:
        wide = w * factors[:, None]
        steps = np.abs(wide).max(axis=0) / 127
        steps = np.where(steps > 0, steps, 1.0)
        exact = x @ w
        wrong = rounded @ (np.rint(wide / steps) * steps) - exact
        total += float((wrong**2).sum() / max((exact**2).sum(), 1e-30))
    return total


def _scale(weights: Weights, norm: SmoothedNorm, factors: np.ndarray) -> None:
    for node, i in norm.affine:
        array = weights.arrays[node.input[i]]
        divided = array.astype(np.float64) / factors.reshape(array.shape)
        node.input[i] = weights.put(f"{node.input[i]}_smoothed", divided)
    for node in norm.readers:
        across = np.ones(2, int)
        across[1 if attribute(node, "transB", 0) else 0] = len(factors)
        scaled = weights.arrays[node.input[1]].astype(np.float64) * factors.reshape(across)
        node.input[1] = weights.put(f"{node.input[1]}_smoothed", scaled)
