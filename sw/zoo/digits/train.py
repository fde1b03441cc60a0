"""Trains, quantises and writes the digits network: ``python -m systole.sw.zoo.digits.train``.

A residual network of three 3x3 convolutions and a Gemm on scikit-learn's 8x8 digits, trained in
numpy by Adam, quantised to int8 QDQ (weights per channel) by onnxruntime. The same seed gives the
same network on the same machine. Takes seconds; scikit-learn is needed for the data.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_static,
)

from systole.sw.zoo import write
from systole.sw.zoo.digits import MODEL, TEST_SET

SEED = 1
EPOCHS = 15
BATCH = 32
RATE = 2e-3
HELD_OUT = 360
CALIBRATION = 200

Parameters = dict[str, np.ndarray]


def split() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """x and y of the training set, x and y of the held-out set; x is (N, 1, 8, 8) in 0..1."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = (images.reshape(-1, 1, 8, 8) / 16).astype(np.float32)
    order = np.random.default_rng(SEED).permutation(len(x))
    train, test = order[HELD_OUT:], order[:HELD_OUT]
    return x[train], labels[train], x[test], labels[test]


def initial(rng: np.random.Generator) -> Parameters:
    """Random weights, and biases of zero."""
    shapes = {"w1": (8, 1, 3, 3), "w2": (16, 8, 3, 3), "w3": (16, 16, 3, 3), "w4": (256, 10)}
    parameters = {}
    for i, (name, shape) in enumerate(shapes.items(), 1):
        gain = np.sqrt(2 / (np.prod(shape[1:]) if len(shape) == 4 else shape[0]))
        parameters[name] = rng.normal(0, gain, shape).astype(np.float32)
        parameters[f"b{i}"] = np.zeros(shape[0] if len(shape) == 4 else shape[1], np.float32)
    return parameters


class Convolution:
    """3x3, padding 1, as a matrix product over unfolded windows; remembers what backward needs."""

    def __init__(self, stride: int):
        self.stride = stride

    def forward(self, x: np.ndarray, w: np.ndarray, b: np.ndarray) -> np.ndarray:
        """The convolution of x (N, C, H, W) by w (O, C, 3, 3), plus b."""
        padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
        windows = windows[:, :, :: self.stride, :: self.stride].transpose(0, 2, 3, 1, 4, 5)
        self.shape, self.w = x.shape, w
        self.columns = windows.reshape(*windows.shape[:3], -1)
        return (self.columns @ w.reshape(len(w), -1).T + b).transpose(0, 3, 1, 2)

    def backward(self, grad: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Gradients of x, w and b."""
        n, c, h, w = self.shape
        grad = grad.transpose(0, 2, 3, 1)
        flat = grad.reshape(-1, grad.shape[-1])
        gw = (flat.T @ self.columns.reshape(len(flat), -1)).reshape(self.w.shape)
        taps = (grad @ self.w.reshape(len(self.w), -1)).reshape(*grad.shape[:3], c, 3, 3)
        gx = np.zeros((n, c, h + 2, w + 2), grad.dtype)
        for ky in range(3):
            for kx in range(3):
                rows = slice(ky, ky + self.stride * grad.shape[1], self.stride)
                columns = slice(kx, kx + self.stride * grad.shape[2], self.stride)
                gx[:, :, rows, columns] += taps[..., ky, kx].transpose(0, 3, 1, 2)
        return gx[:, :, 1:-1, 1:-1], gw, flat.sum(axis=0)


def gradients(p: Parameters, x: np.ndarray, y: np.ndarray) -> tuple[float, Parameters]:
    """The mean cross entropy and its gradients."""
    first, second, third = Convolution(1), Convolution(2), Convolution(1)
    h1 = np.maximum(first.forward(x, p["w1"], p["b1"]), 0)
    h2 = np.maximum(second.forward(h1, p["w2"], p["b2"]), 0)
    h3 = np.maximum(third.forward(h2, p["w3"], p["b3"]) + h2, 0)
    flat = h3.reshape(len(x), -1)
    logits = flat @ p["w4"] + p["b4"]
    probability = np.exp(logits - logits.max(axis=1, keepdims=True))
    probability /= probability.sum(axis=1, keepdims=True)
    right = np.arange(len(y)), y
    loss = -float(np.log(probability[right]).mean())
    probability[right] -= 1
    g = probability / len(y)
    out = {"w4": flat.T @ g, "b4": g.sum(axis=0)}
    g3 = (g @ p["w4"].T).reshape(h3.shape) * (h3 > 0)
    g2, out["w3"], out["b3"] = third.backward(g3)
    g1, out["w2"], out["b2"] = second.backward((g2 + g3) * (h2 > 0))
    _, out["w1"], out["b1"] = first.backward(g1 * (h1 > 0))
    return loss, out


def train(x: np.ndarray, y: np.ndarray) -> Parameters:
    """The trained network's parameters."""
    rng = np.random.default_rng(SEED)
    return adam(initial(rng), gradients, x, y, epochs=EPOCHS, rate=RATE, rng=rng)


def adam(
    p: Parameters,
    gradients: Callable[[Parameters, np.ndarray, np.ndarray], tuple[float, Parameters]],
    x: np.ndarray,
    y: np.ndarray,
    *,
    epochs: int,
    rate: float,
    rng: np.random.Generator,
) -> Parameters:
    """``p`` after training by Adam with a cosine schedule, changed in place."""
    mean = {k: np.zeros_like(v) for k, v in p.items()}
    square = {k: np.zeros_like(v) for k, v in p.items()}
    batches = len(x) // BATCH
    for step in range(epochs * batches):
        if step % batches == 0:
            order = rng.permutation(len(x))
        at = (step % batches) * BATCH
        chosen = order[at : at + BATCH]
        now = rate * (1 + np.cos(np.pi * step / (epochs * batches))) / 2
        for k, g in gradients(p, x[chosen], y[chosen])[1].items():
            mean[k] += 0.1 * (g - mean[k])
            square[k] += 0.001 * (g * g - square[k])
            m = mean[k] / (1 - 0.9 ** (step + 1))
            s = square[k] / (1 - 0.999 ** (step + 1))
            p[k] -= (now * m / (np.sqrt(s) + 1e-8)).astype(np.float32)
    return p


def float_model(p: Parameters) -> onnx.ModelProto:
    """The trained network in float32."""

    def conv(x: str, i: int, stride: int, y: str) -> onnx.NodeProto:
        return helper.make_node(
            "Conv",
            [x, f"w{i}", f"b{i}"],
            [y],
            f"conv{i}",
            kernel_shape=[3, 3],
            strides=[stride, stride],
            pads=[1, 1, 1, 1],
        )

    nodes = [
        conv("image", 1, 1, "c1"),
        helper.make_node("Relu", ["c1"], ["h1"], "relu1"),
        conv("h1", 2, 2, "c2"),
        helper.make_node("Relu", ["c2"], ["h2"], "relu2"),
        conv("h2", 3, 1, "c3"),
        helper.make_node("Add", ["c3", "h2"], ["s3"], "add3"),
        helper.make_node("Relu", ["s3"], ["h3"], "relu3"),
        helper.make_node("Flatten", ["h3"], ["flat"], "flatten"),
        helper.make_node("Gemm", ["flat", "w4", "b4"], ["logits"], "gemm"),
    ]
    graph = helper.make_graph(
        nodes,
        "digits",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 1, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 10])],
        [numpy_helper.from_array(value, name) for name, value in p.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


class Calibration(CalibrationDataReader):
    """Feeds images one at a time."""

    def __init__(self, x: np.ndarray):
        self.images = iter(x[:, None])

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next image, None behind the last."""
        image = next(self.images, None)
        return None if image is None else {"image": image}


def quantise(model: onnx.ModelProto, x: np.ndarray) -> onnx.ModelProto:
    """QDQ, int8 activations (asymmetric) and weights (symmetric, per channel)."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "float.onnx"), Path(folder, "int8.onnx")
        onnx.save(model, source)
        quantize_static(
            source,
            target,
            Calibration(x),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
        )
        return onnx.load(target)


def accuracy(model: onnx.ModelProto, x: np.ndarray, y: np.ndarray) -> float:
    """Share of images classified as ``y`` by onnxruntime."""
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    guess = [np.argmax(np.asarray(session.run(None, {"image": i[None]})[0])) for i in x]
    return float((np.array(guess) == y).mean())


def write_test_set(x: np.ndarray, y: np.ndarray, path: Path) -> None:
    """Writes the file whole or not at all."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".npz")
    with os.fdopen(handle, "wb") as f:
        np.savez_compressed(f, x=x, y=y)
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)


def main() -> None:
    x, y, x_test, y_test = split()
    real = float_model(train(x, y))
    model = quantise(real, x[:CALIBRATION])
    for what, each in (("float", real), ("int8", model)):
        print(f"{what}: {100 * accuracy(each, x_test, y_test):.1f} % of {len(y_test)}")
    write(model, MODEL)
    write_test_set(x_test, y_test, TEST_SET)


if __name__ == "__main__":
    main()
