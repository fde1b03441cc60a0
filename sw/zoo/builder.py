"""Builds QDQ int8 models layer by layer, each calibrated while it is added.

A random sample runs through the network's own integer arithmetic during the build. Convolutions
take their weight scales and biases from it as a folded batch normalisation would have them, so that
deep networks neither saturate nor vanish, and every output scale fits what its layer produces.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from systole.isa import numerics
from systole.sw.frontend.passes.operators import elementary
from systole.sw.golden import model as golden
from systole.sw.ir.graph import Conv

OPSET = 21
IR_VERSION = 10
SPREAD = 8.0
"""A range covers at most this many root mean squares on either side of zero."""
MARGIN = 1.25
"""Room beyond the sample's own extremes, within ``SPREAD``."""
SAMPLE = 600_000
"""Input elements to calibrate with, in whole inputs (at least 1, at most ``MOST``): one alone says
little of channels that have shrunk to a few places."""
MOST = 8
FEW = 32
"""Values below which extremes, or a channel's own mean and deviation, say nothing."""
WEIGHT_SPREAD = 40
"""Standard deviation of the int8 weights."""

Function = Literal["relu", "relu6", "LeakyRelu", "HardSigmoid", "HardSwish", "Gelu"]
"""What may follow a product: the first two become clamps of it."""
FUNCTIONS: dict[str, tuple[dict[str, float], Callable[[np.ndarray], np.ndarray]]] = {
    "LeakyRelu": ({"alpha": 0.1}, lambda x: np.where(x < 0, 0.1 * x, x)),
    "HardSigmoid": ({"alpha": 1 / 6, "beta": 0.5}, lambda x: np.clip(x / 6 + 0.5, 0, 1)),
    "HardSwish": ({}, lambda x: x * np.clip(x / 6 + 0.5, 0, 1)),
    "Gelu": ({}, elementary.gelu),
}
"""Operators quantised on either side: ONNX attributes, and the function on real numbers."""


@dataclass(frozen=True)
class ZooActivation:
    """A quantised value of the network under construction, with its int8 values for a sample of
    inputs, one after another along the first axis: images (N, C, H, W) or matrices (M, K)."""

    name: str
    sample: np.ndarray
    scale: np.float32
    zero: int

    @property
    def real(self) -> np.ndarray:
        """The sample in real numbers, float64."""
        return (self.sample.astype(np.float64) - self.zero) * np.float64(self.scale)

    @property
    def positive(self) -> bool:
        """No value below zero can be held."""
        return self.zero == -128

    @property
    def channels(self) -> int:
        """Size of axis 1."""
        return self.sample.shape[1]


class Builder:
    """A network in the making. ``padding`` of windows wider than one is ``same`` (the output is
    ceil(input / stride); what is odd goes to the end, as TensorFlow has it) or ``symmetric``
    (kernel // 2 on every side, as PyTorch has it)."""

    def __init__(self, name: str, seed: int, padding: Literal["same", "symmetric"] = "same"):
        self.name = name
        self.padding = padding
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.count = 0
        self.input_infos: list[onnx.ValueInfoProto] = []
        self.inputs = MOST
        """Inputs that calibrate, at most until there is one."""

    # Nodes ---------------------------------------------------------------------------------------

    def _name(self, stem: str) -> str:
        self.count += 1
        return f"{stem}_{self.count}"

    def _const(self, name: str, array: np.ndarray) -> str:
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def _scalar(self, name: str, value: np.generic) -> str:
        self.constants.append(numpy_helper.from_array(np.array(value), name))
        return name

    def _node(self, op_type: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op_type, inputs, [output], output, **attributes))
        return output

    def _quantised(
        self, value: str, sample: np.ndarray, scale: np.float32, zero: int
    ) -> ZooActivation:
        """QuantizeLinear behind ``value``."""
        name = f"{value}_q"
        parameters = [
            self._scalar(f"{name}_scale", np.float32(scale)),
            self._scalar(f"{name}_zero", np.int8(zero)),
        ]
        self._node("QuantizeLinear", [value, *parameters], name)
        return ZooActivation(name, np.ascontiguousarray(sample), np.float32(scale), zero)

    def _calibrated(self, value: str, real: np.ndarray, positive: bool) -> ZooActivation:
        """QuantizeLinear behind ``value`` with the range of its sample, given in real numbers."""
        scale, zero = _quantisation(real, positive)
        sample = np.clip(np.rint(real / scale) + zero, -128, 127).astype(np.int8)
        return self._quantised(value, sample, scale, zero)

    def _real(self, x: ZooActivation) -> str:
        """DequantizeLinear of ``x``, one for each consumer, as onnxruntime's fusions want it."""
        parameters = [f"{x.name}_scale", f"{x.name}_zero"]
        return self._node("DequantizeLinear", [x.name, *parameters], self._name(f"{x.name}_dq"))

    def input(
        self, shape: tuple[int, ...], scale: float = 1 / 64, zero: int = 0, name: str = "input"
    ) -> ZooActivation:
        """A float32 input of the network."""
        self.input_infos.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        self.inputs = min(max(SAMPLE // math.prod(shape), 1), self.inputs)
        many = (self.inputs * shape[0], *shape[1:])
        sample = self.rng.integers(-128, 128, many).astype(np.int8)
        return self._quantised(name, sample, np.float32(scale), zero)

    def picture(self, size: int, multiple: int = 32) -> ZooActivation:
        """An input (1, 3, size, size); ``ValueError`` where the network cannot halve ``size``."""
        if size < multiple or size % multiple:
            raise ValueError(f"size {size} of {self.name} is not a positive multiple of {multiple}")
        return self.input((1, 3, size, size))

    # Products ------------------------------------------------------------------------------------

    def _weights(self, shape: tuple[int, ...]) -> np.ndarray:
        draw = self.rng.standard_normal(shape, np.float32) * WEIGHT_SPREAD
        return np.clip(np.rint(draw), -127, 127).astype(np.int8)

    def _normalised(
        self, acc: np.ndarray, x_scale: np.float32, *, together: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Weight scales (float32) and biases (int32) of the output channels, the last axis of
        ``acc``, that give each channel a deviation and mean near 1 and 0: batch normalisation,
        folded. Few samples are normalised all ``together``, not by channel, and so are tokens, as
        the means of an attention's results are those of its input."""
        outputs = acc.shape[-1]
        sums = acc.reshape(-1, outputs)
        overall = max(np.sqrt(np.mean(np.square(sums, dtype=np.float64))), 1.0)
        if together or len(sums) < FEW:
            mean, deviation = 0.0, overall
        else:
            # A channel that hardly moves must not be blown up.
            mean, deviation = sums.mean(axis=0), np.maximum(sums.std(axis=0), overall / 4)
        gain = self.rng.uniform(0.5, 1.5, outputs) / deviation
        centre = self.rng.normal(0, 0.2, outputs)
        w_scale = (gain / x_scale).astype(np.float32)
        return w_scale, np.rint(centre / gain - mean).astype(np.int32)

    def _product(
        self,
        op_type: str,
        x: ZooActivation,
        weights: np.ndarray,
        acc: np.ndarray,
        *,
        channel: int,
        activation: Function | None,
        **attributes: Any,
    ) -> ZooActivation:
        """A product of ``x`` and constant ``weights``, whose output channels are axis ``channel``;
        ``acc``, its sums, has them last: (N, H, W, O), (M, O), or of a MatMul (N, M, O)."""
        stem = self._name(op_type.lower())
        w_scale, bias = self._normalised(acc, x.scale, together=op_type == "MatMul")
        sum_scale = x.scale * w_scale
        names = []
        for part, array, scale, axis in (
            ("weights", weights, w_scale, channel),
            ("bias", bias, sum_scale, 0),
        ):
            name = self._const(f"{stem}_{part}", array)
            scale_name = self._const(f"{name}_scale", scale)
            zeros = self._const(f"{name}_zero", np.zeros(len(scale), array.dtype))
            dq = self._node("DequantizeLinear", [name, scale_name, zeros], f"{name}_dq", axis=axis)
            names.append(dq)
        if op_type == "MatMul":
            value = self._node(op_type, [self._real(x), names[0]], stem)
            value = self._node("Add", [value, names[1]], f"{stem}_add")
        else:
            value = self._node(op_type, [self._real(x), *names], stem, **attributes)
        acc = acc + bias
        real = acc * sum_scale.astype(np.float64)
        if activation == "relu6":
            bounds = [
                self._scalar(f"{stem}_{k}", np.float32(v)) for k, v in (("low", 0), ("six", 6))
            ]
            value = self._node("Clip", [value, *bounds], f"{stem}_clip")
            # Rounded down: the range must imply the clip, or onnxruntime cannot fuse it.
            y_scale, zero = np.nextafter(np.float32(6 / 255), np.float32(0)), -128
        elif activation == "relu":
            value = self._node("Relu", [value], f"{stem}_relu")
            y_scale, zero = _quantisation(np.maximum(real, 0), True)
        else:
            y_scale, zero = _quantisation(real, False)
        multiplier, shift = numerics.split_scale(sum_scale / y_scale)
        y = numerics.requantise(acc, np.array(0), multiplier, shift, zero=zero, low=-128, high=127)
        y = y if op_type == "MatMul" else np.moveaxis(y, -1, 1)
        result = self._quantised(value, y, y_scale, zero)
        return self.function(result, activation) if activation in FUNCTIONS else result

    def conv(
        self,
        x: ZooActivation,
        outputs: int,
        kernel: int | tuple[int, int] = 3,
        stride: int = 1,
        activation: Function | None = "relu",
        *,
        depthwise: bool = False,
        padded: bool = True,
    ) -> ZooActivation:
        """A convolution, padded as the network's are or not at all."""
        kernel = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        pads = self._pads(x, kernel, stride) if padded else (0, 0, 0, 0)
        group = x.channels if depthwise else 1
        w = self._weights((outputs, x.channels // group, *kernel))
        attributes = {
            "kernel_shape": list(kernel),
            "strides": [stride, stride],
            "pads": list(pads),
            "group": group,
        }
        acc = _sums(x.sample, x.zero, w, stride=stride, pads=pads, group=group)
        return self._product("Conv", x, w, acc, channel=0, activation=activation, **attributes)

    def _pads(
        self, x: ZooActivation, kernel: tuple[int, int], stride: int
    ) -> tuple[int, int, int, int]:
        """Top, left, bottom, right."""
        if self.padding == "symmetric":
            return kernel[0] // 2, kernel[1] // 2, kernel[0] // 2, kernel[1] // 2
        totals = [
            max((-(-size // stride) - 1) * stride + k - size, 0)
            for size, k in zip(x.sample.shape[2:], kernel)
        ]
        height, width = totals
        return height // 2, width // 2, height - height // 2, width - width // 2

    def conv_transpose(self, x: ZooActivation, outputs: int) -> ZooActivation:
        """A transposed convolution, 2x2 with stride 2: twice the size."""
        w = self._weights((x.channels, outputs, 2, 2))
        n, c, height, width = x.sample.shape
        centred = (x.sample.astype(np.float64) - x.zero).reshape(n, c, -1)
        acc = (w.reshape(c, -1).T.astype(np.float64) @ centred).astype(np.int64)
        acc = acc.reshape(n, outputs, 2, 2, height, width).transpose(0, 4, 2, 5, 3, 1)
        acc = acc.reshape(n, 2 * height, 2 * width, outputs)
        sizes = {"kernel_shape": [2, 2], "strides": [2, 2]}
        return self._product("ConvTranspose", x, w, acc, channel=1, activation=None, **sizes)

    def gemm(
        self, x: ZooActivation, outputs: int, activation: Function | None = None
    ) -> ZooActivation:
        """A matrix (M, K) times a constant (K, N)."""
        w = self._weights((x.channels, outputs))
        image = x.sample.T[None, :, None]
        acc = _sums(image, x.zero, w.T[:, :, None, None])[0, 0]
        return self._product("Gemm", x, w, acc, channel=1, activation=activation)

    # Element by element --------------------------------------------------------------------------

    def function(self, x: ZooActivation, op_type: str) -> ZooActivation:
        """One of ``FUNCTIONS``."""
        attributes, compute = FUNCTIONS[op_type]
        node = self._node(op_type, [self._real(x)], self._name(op_type.lower()), **attributes)
        return self._calibrated(node, compute(x.real), op_type == "HardSigmoid")

    def add(self, a: ZooActivation, b: ZooActivation, relu: bool = True) -> ZooActivation:
        """a + b, then Relu if wanted."""
        node = self._node("Add", [self._real(a), self._real(b)], self._name("add"))
        real = a.real + b.real
        if relu:
            node, real = self._node("Relu", [node], f"{node}_relu"), np.maximum(real, 0)
        return self._calibrated(node, real, relu or (a.positive and b.positive))

    def mul(self, a: ZooActivation, b: ZooActivation) -> ZooActivation:
        """a * b; ``b`` may be one row and column that stand for all."""
        node = self._node("Mul", [self._real(a), self._real(b)], self._name("mul"))
        return self._calibrated(node, a.real * b.real, a.positive and b.positive)

    # Moves and pools -----------------------------------------------------------------------------

    def concat(self, *parts: ZooActivation, axis: int = 1) -> ZooActivation:
        """Along the channels, or another axis."""
        node = self._node("Concat", [self._real(p) for p in parts], self._name("concat"), axis=axis)
        real = np.concatenate([p.real for p in parts], axis=axis)
        return self._calibrated(node, real, all(p.positive for p in parts))

    def upsample(self, x: ZooActivation) -> ZooActivation:
        """Twice the size, each element repeated."""
        stem = self._name("resize")
        scales = self._const(f"{stem}_scales", np.array([1, 1, 2, 2], np.float32))
        node = self._node(
            "Resize",
            [self._real(x), "", scales],
            stem,
            mode="nearest",
            coordinate_transformation_mode="asymmetric",
            nearest_mode="floor",
        )
        sample = x.sample.repeat(2, axis=2).repeat(2, axis=3)
        return self._quantised(node, sample, x.scale, x.zero)

    def max_pool(
        self, x: ZooActivation, kernel: int = 2, stride: int = 2, padded: bool = True
    ) -> ZooActivation:
        """A max pool, padded as the network's convolutions are or not at all."""
        pads = self._pads(x, (kernel, kernel), stride) if padded else (0, 0, 0, 0)
        node = self._node(
            "MaxPool",
            [self._real(x)],
            self._name("pool"),
            kernel_shape=[kernel, kernel],
            strides=[stride, stride],
            pads=list(pads),
        )
        top, left, bottom, right = pads
        borders = ((0, 0), (0, 0), (top, bottom), (left, right))
        image = np.pad(x.sample, borders, constant_values=-128)
        windows = np.lib.stride_tricks.sliding_window_view(image, (kernel, kernel), axis=(2, 3))
        sample = windows[:, :, ::stride, ::stride].max(axis=(4, 5))
        return self._quantised(node, sample, x.scale, x.zero)

    def global_average(self, x: ZooActivation) -> ZooActivation:
        """Global average pool, (N, C, 1, 1), with a scale of its own."""
        node = self._node("GlobalAveragePool", [self._real(x)], self._name("pool"))
        return self._calibrated(node, x.real.mean(axis=(2, 3), keepdims=True), x.positive)

    def flatten(self, x: ZooActivation) -> ZooActivation:
        """(N, C, 1, 1) as a matrix (N, C)."""
        node = self._node("Flatten", [self._real(x)], self._name("flatten"))
        return self._quantised(node, x.sample.reshape(len(x.sample), -1), x.scale, x.zero)

    def classify(self, x: ZooActivation, classes: int) -> onnx.ModelProto:
        """The model that ends in a global average pool and a Gemm, which gives the logits."""
        return self.model(self.gemm(self.flatten(self.global_average(x)), classes))

    def model(self, *results: ZooActivation) -> onnx.ModelProto:
        """The model that returns ``results`` as float32."""
        outputs = []
        for y in results:
            shape = (len(y.sample) // self.inputs, *y.sample.shape[1:])
            outputs.append(helper.make_tensor_value_info(self._real(y), TensorProto.FLOAT, shape))
        graph = helper.make_graph(self.nodes, self.name, self.input_infos, outputs, self.constants)
        opset = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION)
        onnx.checker.check_model(model, full_check=True)
        return model


def _quantisation(real: np.ndarray, positive: bool) -> tuple[np.float32, int]:
    """Scale and zero point for values like those of ``real``; ``positive`` ones have no others."""
    reach = SPREAD * np.sqrt(np.mean(np.square(real))) or 1.0
    low, high = -reach, reach
    if real.size >= FEW and real.any():
        low, high = max(low, MARGIN * real.min()), min(high, MARGIN * real.max())
    low = 0.0 if positive else min(low, 0.0)
    scale = np.float32((max(high, 0.0) - low) / 255)
    return scale, int(np.rint(-128 - low / scale))


def _sums(
    x: np.ndarray,
    zero: int,
    weights: np.ndarray,
    *,
    stride: int = 1,
    pads: tuple[int, int, int, int] = (0, 0, 0, 0),
    group: int = 1,
) -> np.ndarray:
    """A convolution's exact sums of (x - zero) * weights: int64 (N, H, W, O)."""
    op = Conv(
        name="",
        op_type="Conv",
        output="",
        low=-128,
        high=127,
        x="",
        weights=weights,
        bias=np.zeros(len(weights), np.int32),
        scale=np.ones(len(weights), np.float32),
        strides=(stride, stride),
        pads=pads,
        dilations=(1, 1),
        group=group,
    )
    images: list[list[np.ndarray]] = [[] for _ in x]
    for n, _, acc in golden.accumulate(op, x, zero):
        images[n].append(acc)
    return np.stack([np.concatenate(pieces) for pieces in images])
