"""Ranges of the activations over samples, and the QDQ model made of them: onnxruntime's quantiser,
int8 activations per tensor, int8 symmetric weights per output channel, int32 biases."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType
from onnxruntime.quantization.calibrate import TensorData, TensorsData, create_calibrator
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.quant_utils import compute_scale_zp

from systole.sw.frontend.inputs import InputError
from systole.sw.ir.graph import ModelError, first_line
from systole.sw.quantisation.fold import attribute
from systole.sw.quantisation.prepare import exposed
from systole.sw.quantisation.samples import Feeds, Ranges

METHODS = {
    "minmax": CalibrationMethod.MinMax,
    "entropy": CalibrationMethod.Entropy,
    "percentile": CalibrationMethod.Percentile,
}

MOVES = ("Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Gather")
"""Operators that only move data: their result has the scale of their operand."""

QUANTISED = (
    *("Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Sub", "Mul", "Div", "Max", "Min"),
    *("Relu", "Clip", "LeakyRelu", "PRelu", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh"),
    *("Abs", "Neg", "Sign", "Ceil", "Floor", "Round", "ThresholdedRelu"),
    *("Elu", "Celu", "Selu", "Gelu", "FastGelu", "QuickGelu", "Swish", "Erf", "Mish"),
    *("Softplus", "Softsign"),
    *("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "ReduceMean"),
    *("Concat", "Pad", "Resize", "DepthToSpace", "SpaceToDepth"),
    *MOVES,
)
"""Operators that are quantised: those with a meaning in integers. Softmax and the rest stay float;
the accelerator leaves them to the host. So do Exp, Log, Pow, Reciprocal and Sqrt, which are as good
as always inside of a normalisation, softmax or decoded box: near a pole, or over many octaves, no
scale of int8 is fine enough."""

NORMALISATIONS = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
"""Operators that compute in float; what they give the model's user is quantised nevertheless. Their
second operand is a gain, the third, if there is one, an offset."""

CALIBRATED = (*QUANTISED, *NORMALISATIONS)
"""Operators whose operands' and results' ranges are found."""

HISTOGRAM_CHUNK = 8
"""Samples whose intermediate results are held at a time."""


class _Reader(CalibrationDataReader):
    def __init__(self, samples: Sequence[Feeds]):
        self._feeds = iter(samples)

    def get_next(self) -> dict | None:
        """The next sample, None behind the last."""
        feeds = next(self._feeds, None)
        return None if feeds is None else dict(feeds)


def activation_ranges(
    model: onnx.ModelProto, samples: Sequence[Feeds], method: str, percentile: float
) -> Ranges:
    """Lowest and highest value of every activation around the quantised operators; a tensor that
    is zero in all ``samples`` gets 0..1, so that a Relu whose clamp is left to the range still
    clamps. Raises :class:`InputError` where values are not finite."""
    if method == "minmax":
        measured = _extremes(model, samples)
    else:
        measured = _histogram_ranges(model, samples, method, percentile)
    ranges = {}
    for name, (low, high) in measured.items():
        if not (np.isfinite(low) and np.isfinite(high)):
            raise InputError(f"tensor {name!r} takes values that are not finite on these samples")
        ranges[name] = (low, high) if min(low, 0.0) < max(high, 0.0) else (0.0, 1.0)
    return ranges


def _extremes(model: onnx.ModelProto, samples: Sequence[Feeds]) -> Ranges:
    """Lowest and highest value of the activations around the quantised operators. onnxruntime's
    calibrator says the same, but takes time by the square of the number of nodes."""
    constants = {i.name for i in model.graph.initializer}
    values = (*model.graph.input, *model.graph.value_info, *model.graph.output)
    real = {v.name for v in values if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}
    names = dict.fromkeys(
        name
        for node in model.graph.node
        if node.op_type in CALIBRATED
        for name in (*node.input, *node.output)
        if name in real and name not in constants
    )
    inputs = {value.name for value in model.graph.input}
    inner = [name for name in names if name not in inputs]
    run = exposed(model, inner) if inner else lambda _: []
    ranges: Ranges = {}
    for feeds in samples:
        arrays = {**feeds, **dict(zip(inner, run(feeds), strict=True))}
        for name in names:
            low, high = (float(pick(arrays[name], initial=0)) for pick in (np.min, np.max))
            least, most = ranges.get(name, (low, high))
            ranges[name] = float(np.minimum(least, low)), float(np.maximum(most, high))
    return ranges


def _histogram_ranges(
    model: onnx.ModelProto, samples: Sequence[Feeds], method: str, percentile: float
) -> Ranges:
    """The ranges that onnxruntime's calibrator makes of histograms."""
    extra: dict[str, bool | float] = {"symmetric": False}
    if method == "percentile":
        extra["percentile"] = percentile
    with tempfile.TemporaryDirectory() as folder, _quiet():
        file = Path(folder) / "model.onnx"
        onnx.save(model, file)
        calibrator = create_calibrator(
            file,
            list(CALIBRATED),
            augmented_model_path=str(Path(folder) / "augmented.onnx"),
            calibrate_method=METHODS[method],
            extra_options=extra,
        )
        try:
            for start in range(0, len(samples), HISTOGRAM_CHUNK):
                chunk = [
                    samples[i] for i in range(start, min(start + HISTOGRAM_CHUNK, len(samples)))
                ]
                calibrator.collect_data(_Reader(chunk))
            measured = calibrator.compute_data()
        except ValueError as e:
            raise InputError(f"calibration failed, on values that are not finite?: {e}") from None
    return {
        name: (float(np.min(data.range_value[0])), float(np.max(data.range_value[1])))
        for name, data in measured.items()
    }


def to_qdq(model: onnx.ModelProto, ranges: Ranges, excluded: Collection[str]) -> onnx.ModelProto:
    """``model`` quantised, without the nodes named in ``excluded``."""
    data: dict[str, TensorData | tuple] = {
        name: TensorData(lowest=np.float32(low), highest=np.float32(high))
        for name, (low, high) in ranges.items()
    }
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    try:
        with _quiet():
            quantiser = QDQQuantizer(
                copy,
                per_channel=True,
                reduce_range=False,
                weight_qType=QuantType.QInt8,
                activation_qType=QuantType.QInt8,
                tensors_range=TensorsData(CalibrationMethod.MinMax, data),
                nodes_to_quantize=[],
                nodes_to_exclude=sorted(set(excluded) | _floating_moves(model, excluded)),
                op_types_to_quantize=list(QUANTISED),
                extra_options={
                    "ForceQuantizeNoInputCheck": True,
                    "TensorQuantOverrides": _dead_channels(model),
                },
            )
            quantiser.quantize_model()
            quantiser.model.topological_sort()
    except Exception as e:
        reason = first_line(e)
        raise ModelError(f"onnxruntime cannot quantise the model: {reason}") from None
    result = quantiser.model.model
    _drop_clamps(result)
    _quantise_normalised(result, ranges, excluded)
    if not any(node.op_type == "QuantizeLinear" for node in result.graph.node):
        raise ModelError("the model holds no operator that is quantised")
    return result


def _quantise_normalised(model: onnx.ModelProto, ranges: Ranges, excluded: Collection[str]) -> None:
    """Quantises outputs that normalisations compute, which nothing else reads quantised."""
    results = {value.name for value in model.graph.output}
    for node in list(model.graph.node):
        name = node.output[0]
        if node.op_type not in NORMALISATIONS or name not in results & ranges.keys():
            continue
        if node.name in excluded:
            continue
        low, high = (np.array(v, np.float32) for v in ranges[name])
        least, most = (np.array(end, np.int8) for end in (-128, 127))
        zero, scale = compute_scale_zp(low, high, least, most)
        real, code, given = (f"{name}/{part}" for part in ("real", "quantised", "scale"))
        arrays = ((given, np.array(scale, np.float32)), (f"{given}/zero", np.array(zero, np.int8)))
        model.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in arrays)
        scaling = [n for n, _ in arrays]
        for reader in model.graph.node:
            for i, each in enumerate(reader.input):
                if each == name:
                    reader.input[i] = real
        node.output[0] = real
        model.graph.node.append(helper.make_node("QuantizeLinear", [real, *scaling], [code], code))
        model.graph.node.append(
            helper.make_node("DequantizeLinear", [code, *scaling], [name], f"{code}/real")
        )


def _drop_clamps(model: onnx.ModelProto) -> None:
    """Removes clamps of what a float operator made, such as a normalisation, where quantising does
    the same: onnxruntime's quantiser does so only behind operators that are quantised."""
    constants = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    producer = {name: node for node in model.graph.node for name in node.output}
    results = {value.name for value in model.graph.output}
    for node in [n for n in model.graph.node if n.op_type in ("Relu", "Clip")]:
        source = producer.get(node.input[0])
        if source is None or source.op_type == "DequantizeLinear" or node.output[0] in results:
            continue
        bounds = [0.0, np.inf] if node.op_type == "Relu" else [-np.inf, np.inf]
        for i, name in enumerate(node.input[1:]):
            bounds[i] = constants.get(name, np.float32(np.nan)).item() if name else bounds[i]
        readers = [n for n in model.graph.node if node.output[0] in n.input]
        if all(_saturates(reader, bounds, constants) for reader in readers):
            for reader in readers:
                reader.input[0] = node.input[0]
            model.graph.node.remove(node)


def _saturates(
    reader: onnx.NodeProto, bounds: Sequence[float], constants: Mapping[str, np.ndarray]
) -> bool:
    """Whether ``reader`` quantises, and clamps to these bounds or within by that alone."""
    if reader.op_type != "QuantizeLinear":
        return False
    scale, zero = (float(constants[name]) for name in reader.input[1:3])
    low, high = (np.rint(bound / scale) + zero for bound in bounds)
    return bool(low <= -128 and high >= 127)


def _floating_moves(model: onnx.ModelProto, excluded: Collection[str]) -> set[str]:
    """Nodes that only move an input, a constant (a table of tokens) or what a float operator made:
    the results are quantised where an operator that computes reads them."""
    floating, names = {value.name for value in model.graph.input}, set()
    floating |= {value.name for value in model.graph.initializer}
    for node in model.graph.node:
        moved = node.op_type in MOVES and node.input[0] in floating
        if moved:
            names.add(node.name)
        if moved or node.op_type not in QUANTISED or node.name in excluded:
            floating.update(node.output)
    return names


def _dead_channels(model: onnx.ModelProto) -> dict[str, list[dict]]:
    """Ranges for output channels whose weights are all zero. They have a bias nevertheless, and
    onnxruntime's scale of 1 would round it to whole multiples of the input's scale: they take the
    median scale of the layer instead."""
    arrays = {i.name: i for i in model.graph.initializer}
    uses = Counter(name for node in model.graph.node for name in node.input)
    overrides = {}
    for node in model.graph.node:
        if node.op_type not in ("Conv", "Gemm") or node.input[1] not in arrays:
            continue
        name = node.input[1]
        w = numpy_helper.to_array(arrays[name])
        axis = 1 if node.op_type == "Gemm" and not attribute(node, "transB", 0) else 0
        peaks = channel_peaks(w, axis)
        if uses[name] > 1 or (peaks > 0).all():
            continue
        # Shape () as onnxruntime's own ranges have.
        overrides[name] = [
            {"axis": axis, "rmin": -peak, "rmax": peak}
            for peak in (np.array(p, np.float32) for p in without_dead(peaks))
        ]
    return overrides


def channel_peaks(w: np.ndarray, axis: int) -> np.ndarray:
    """The largest magnitude of each channel along ``axis``."""
    return np.abs(np.moveaxis(w, axis, 0)).reshape(w.shape[axis], -1).max(axis=1)


def without_dead(peaks: np.ndarray) -> np.ndarray:
    """Peaks of channels, those of zeros replaced by the median of the others; 1 if all are."""
    usual = np.median(peaks[peaks > 0]) if peaks.any() else 1.0
    return np.where(peaks > 0, peaks, peaks.dtype.type(usual))


@contextmanager
def _quiet() -> Iterator[None]:
    """onnxruntime's quantiser logs advice on steps that are done here, prints its progress,
    and lets numpy warn of the values that are refused here."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            yield
    finally:
        logging.disable(previous)
