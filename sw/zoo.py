"""Networks built in code: seeded weights, calibrated scales, QDQ int8 per channel.

    python -m sw.zoo resnet8 -o resnet8.onnx

Each network carries a random sample through its own integer arithmetic while it is built, so that
every output scale fits what the layer really produces.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import onnx
import typer
from onnx import TensorProto, helper, numpy_helper

from sw import golden, numerics
from sw.graph import Conv

OPSET = 21
IR_VERSION = 10
SPREAD = 5.0
"""Standard deviations of a layer's sums that its output range covers on either side."""


@dataclass(frozen=True)
class Activation:
    """A quantised value of the network under construction, with a sample in int8."""

    name: str
    sample: np.ndarray
    scale: np.float32
    zero: int


class Builder:
    """Builds a QDQ model layer by layer. Images are (N, C, H, W), matrices (M, K)."""

    def __init__(self, name: str, seed: int):
        self.name = name
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.count = 0

    def _name(self, stem: str) -> str:
        self.count += 1
        return f"{stem}_{self.count}"

    def _const(self, name: str, array: np.ndarray) -> str:
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def _node(self, op_type: str, inputs: list[str], output: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(op_type, inputs, [output], output, **attributes))
        return output

    def _quantised(
        self, value: str, sample: np.ndarray, scale: np.float32, zero: int
    ) -> Activation:
        """QuantizeLinear behind ``value``."""
        name = f"{value}_q"
        parameters = [
            self._const(f"{name}_scale", np.float32(scale)),
            self._const(f"{name}_zero", np.int8(zero)),
        ]
        self._node("QuantizeLinear", [value, *parameters], name)
        return Activation(name, sample, np.float32(scale), zero)

    def _real(self, x: Activation) -> str:
        """DequantizeLinear of ``x``, one for each consumer, as onnxruntime's fusions want it."""
        parameters = [f"{x.name}_scale", f"{x.name}_zero"]
        return self._node("DequantizeLinear", [x.name, *parameters], self._name(f"{x.name}_dq"))

    def input(self, shape: tuple[int, ...], scale: float = 1 / 64, zero: int = 0) -> Activation:
        """The network's float32 input."""
        self.input_info = helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)
        sample = self.rng.integers(-128, 128, shape).astype(np.int8)
        return self._quantised("input", sample, np.float32(scale), zero)

    def _weights(self, stem: str, shape: tuple[int, ...], channel: int, x_scale: np.float32):
        """Random int8 weights, their scales by channel, a random bias; the name of each as
        dequantised constants."""
        w = np.clip(np.rint(self.rng.normal(0, 40, shape)), -127, 127).astype(np.int8)
        outputs = shape[channel]
        spread = self.rng.uniform(0.5, 1.5, outputs) / (40 * np.sqrt(w.size / outputs))
        w_scale = spread.astype(np.float32)
        reach = 40 * 64 * np.sqrt(w.size / outputs)
        b = np.rint(self.rng.normal(0, 0.2 * reach, outputs)).astype(np.int32)
        names = []
        for part, array, scale, axis in (
            ("weights", w, w_scale, channel),
            ("bias", b, x_scale * w_scale, 0),
        ):
            name = self._const(f"{stem}_{part}", array)
            scale_name = self._const(f"{name}_scale", scale)
            zero = self._const(f"{name}_zero", np.zeros(outputs, array.dtype))
            dq = self._node("DequantizeLinear", [name, scale_name, zero], f"{name}_dq", axis=axis)
            names.append(dq)
        return w, w_scale, b, names

    def _finish(self, value: str, op: Conv, x: Activation, relu: bool) -> Activation:
        """Calibrates and quantises the result of a convolution."""
        image = x.sample if x.sample.ndim == 4 else x.sample.T[None, :, None]
        pieces = [acc for _, _, acc in golden.accumulate(op, image, x.zero)]
        acc = np.concatenate(pieces) + op.bias
        real = acc * op.scale.astype(np.float64)
        high = SPREAD * np.sqrt(np.mean(real**2))
        low = 0.0 if relu else -high
        y_scale = np.float32((high - low) / 255)
        zero = -128 if relu else 0
        if relu:
            value = self._node("Relu", [value], f"{value}_relu")
        y = numerics.requantise(
            acc, np.int64(0), *numerics.split_scale(op.scale / y_scale), zero, -128, 127
        )
        sample = np.moveaxis(y, -1, 0)[None] if x.sample.ndim == 4 else y[0]
        return self._quantised(value, np.ascontiguousarray(sample), y_scale, zero)

    def conv(
        self, x: Activation, outputs: int, kernel: int = 3, stride: int = 1, relu: bool = True
    ) -> Activation:
        """A square convolution that keeps (stride 1) or divides the image's size."""
        stem = self._name("conv")
        depth, size = x.sample.shape[1:3]
        # "Same" padding: an odd remainder goes to the end.
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        before = total // 2
        pads = (before, before, total - before, total - before)
        w, w_scale, b, names = self._weights(stem, (outputs, depth, kernel, kernel), 0, x.scale)
        node = self._node(
            "Conv",
            [self._real(x), *names],
            stem,
            kernel_shape=[kernel, kernel],
            strides=[stride, stride],
            pads=list(pads),
        )
        op = _operator(w, b, x.scale * w_scale, (stride, stride), pads)
        return self._finish(node, op, x, relu)

    def gemm(self, x: Activation, outputs: int, relu: bool = False) -> Activation:
        """A matrix (M, K) times a constant (K, N)."""
        stem = self._name("gemm")
        w, w_scale, b, names = self._weights(stem, (x.sample.shape[1], outputs), 1, x.scale)
        node = self._node("Gemm", [self._real(x), *names], stem)
        op = _operator(w.T[:, :, None, None], b, x.scale * w_scale, (1, 1), (0, 0, 0, 0))
        return self._finish(node, op, x, relu)

    def add(self, a: Activation, b: Activation) -> Activation:
        """a + b, then Relu."""
        node = self._node("Add", [self._real(a), self._real(b)], self._name("add"))
        node = self._node("Relu", [node], f"{node}_relu")
        real = sum((v.sample.astype(np.float64) - v.zero) * v.scale for v in (a, b))
        scale = np.float32(SPREAD * np.sqrt(np.mean(real**2)) / 255)
        sample = np.clip(np.rint(real / scale) - 128, -128, 127).astype(np.int8)
        return self._quantised(node, sample, scale, -128)

    def max_pool(self, x: Activation) -> Activation:
        """2x2, stride 2."""
        node = self._node(
            "MaxPool", [self._real(x)], self._name("pool"), kernel_shape=[2, 2], strides=[2, 2]
        )
        n, c, h, w = x.sample.shape
        sample = x.sample.reshape(n, c, h // 2, 2, w // 2, 2).max(axis=(3, 5))
        return self._quantised(node, sample, x.scale, x.zero)

    def global_average(self, x: Activation) -> Activation:
        """Global average pool and flatten, with a scale of its own."""
        node = self._node("GlobalAveragePool", [self._real(x)], self._name("pool"))
        real = ((x.sample.astype(np.float64) - x.zero) * x.scale).mean(axis=(2, 3))
        scale = np.float32(1.25 * np.abs(real).max() / 255)
        sample = np.clip(np.rint(real / scale) - 128, -128, 127).astype(np.int8)
        pooled = self._quantised(node, sample, scale, -128)
        flat = self._node("Flatten", [self._real(pooled)], f"{node}_flat")
        return self._quantised(flat, sample, scale, -128)

    def model(self, y: Activation) -> onnx.ModelProto:
        """The model that returns ``y`` as float32."""
        output = helper.make_tensor_value_info(self._real(y), TensorProto.FLOAT, y.sample.shape)
        graph = helper.make_graph(
            self.nodes, self.name, [self.input_info], [output], self.constants
        )
        opset = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION)
        onnx.checker.check_model(model, full_check=True)
        return model


def _operator(weights, bias, scale, strides, pads) -> Conv:
    """A convolution as the golden model takes it; names do not matter."""
    return Conv("", "Conv", "", -128, 127, "", weights, bias, scale, strides, pads, (1, 1))


def resnet8(seed: int = 0) -> onnx.ModelProto:
    """MLPerf Tiny's ResNet-8 for 32x32x3 (NCHW): 12,501,632 multiply-accumulates."""
    net = Builder("resnet8", seed)
    x = net.conv(net.input((1, 3, 32, 32)), 16)
    for outputs, stride in ((16, 1), (32, 2), (64, 2)):
        y = net.conv(x, outputs, stride=stride)
        y = net.conv(y, outputs, relu=False)
        skip = x if stride == 1 else net.conv(x, outputs, kernel=1, stride=stride, relu=False)
        x = net.add(skip, y)
    return net.model(net.gemm(net.global_average(x), 10))


def gemm(seed: int = 0, m: int = 16, k: int = 256, n: int = 256) -> onnx.ModelProto:
    """One product: activations (m, k) by a constant (k, n)."""
    net = Builder("gemm", seed)
    return net.model(net.gemm(net.input((m, k)), n))


def vgg_block(seed: int = 0) -> onnx.ModelProto:
    """Two 3x3 convolutions of 64 channels on 56x56 with Relu, and a 2x2 maximum pool."""
    net = Builder("vgg-block", seed)
    x = net.conv(net.conv(net.input((1, 64, 56, 56)), 64), 64)
    return net.model(net.max_pool(x))


NETWORKS: dict[str, Callable[..., onnx.ModelProto]] = {
    "resnet8": resnet8,
    "gemm": gemm,
    "vgg-block": vgg_block,
}


def build(name: str, **parameters: int) -> onnx.ModelProto:
    """The network ``name``; ``parameters`` are its function's. Raises ``ValueError`` on an unknown
    name."""
    if name not in NETWORKS:
        raise ValueError(f"no network {name!r}; there are {', '.join(NETWORKS)}")
    return NETWORKS[name](**parameters)


def write(model: onnx.ModelProto, path: str | os.PathLike) -> None:
    """Writes the file whole or not at all."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(model.SerializeToString())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def main(
    name: Annotated[str, typer.Argument(help=f"one of {', '.join(NETWORKS)}")],
    output: Annotated[Path, typer.Option("--output", "-o", help="ONNX file to write")],
    m: Annotated[int | None, typer.Option(min=1, help="gemm: rows of activations")] = None,
    k: Annotated[int | None, typer.Option(min=1, help="gemm: reduction length")] = None,
    n: Annotated[int | None, typer.Option(min=1, help="gemm: columns of the constant")] = None,
    seed: Annotated[int, typer.Option(min=0, help="of weights and calibration")] = 0,
) -> None:
    """Write a network built in code, in QDQ int8 per-channel form."""
    sizes = {key: value for key, value in (("m", m), ("k", k), ("n", n)) if value is not None}
    if name not in NETWORKS:
        raise typer.BadParameter(f"no network {name!r}; there are {', '.join(NETWORKS)}")
    if sizes and name != "gemm":
        raise typer.BadParameter(f"--{next(iter(sizes))} belongs to gemm, not to {name}")
    try:
        write(build(name, seed=seed, **sizes), output)
    except OSError as e:
        raise typer.BadParameter(f"cannot write {output}: {e.strerror}") from None


if __name__ == "__main__":
    typer.run(main)
