"""Trains, quantises and writes the transformer: run as ``systole.sw.zoo.digits.train_transformer``.

A vision transformer on the same digits as :mod:`.train`: 16 patches of 2x2 pixels, two blocks of
attention with two heads and a perceptron, layer normalisation in front of each. Trained in numpy by
Adam on pixels with noise, quantised by :mod:`systole.sw.quantisation`. Takes minutes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from systole.sw.quantisation.pipeline import quantise_model
from systole.sw.zoo import write
from systole.sw.zoo.digits import TRANSFORMER
from systole.sw.zoo.digits.train import CALIBRATION, SEED, Parameters, accuracy, adam, split

EPOCHS = 60
RATE = 3e-3
NOISE = 0.2
"""Deviation of the noise on the pixels in training; they are within 0..1. Without it the network
learns its 1,437 pictures by heart."""
BLOCKS, HEADS, WIDTH, HIDDEN = 2, 2, 32, 64
PATCH, TOKENS = 2, 16
EPSILON = 1e-5
DEPTH = WIDTH // HEADS
"""Features of a head."""

Backward = Callable[[np.ndarray], np.ndarray]
"""From the gradient of a step's result to that of its operand."""


def initial(rng: np.random.Generator) -> Parameters:
    """Random weights, biases of zero, gains of one."""
    shapes = {"patch": (PATCH * PATCH, WIDTH), "position": (TOKENS, WIDTH), "head": (WIDTH, 10)}
    for i in range(BLOCKS):
        shapes |= {f"qkv{i}": (WIDTH, 3 * WIDTH), f"merge{i}": (WIDTH, WIDTH)}
        shapes |= {f"up{i}": (WIDTH, HIDDEN), f"down{i}": (HIDDEN, WIDTH)}
    p = {k: rng.normal(0, 1 / np.sqrt(s[0]), s).astype(np.float32) for k, s in shapes.items()}
    for name in [name for name in p if name != "position"]:
        p[f"{name}_b"] = np.zeros(p[name].shape[1], np.float32)
    for name in [*(f"{kind}{i}" for kind in ("norm_a", "norm_m") for i in range(BLOCKS)), "norm"]:
        p[name], p[f"{name}_b"] = np.ones(WIDTH, np.float32), np.zeros(WIDTH, np.float32)
    return p


class Tape:
    """The network's steps forward, each with its way back; gradients of the parameters by name."""

    def __init__(self, p: Parameters):
        self.p = p
        self.gradients: Parameters = {}

    def linear(self, x: np.ndarray, name: str) -> tuple[np.ndarray, Backward]:
        """The last axis of ``x`` by a matrix, plus its bias."""
        w = self.p[name]

        def back(grad: np.ndarray) -> np.ndarray:
            flat = grad.reshape(-1, grad.shape[-1])
            self.gradients[name] = x.reshape(len(flat), -1).T @ flat
            self.gradients[f"{name}_b"] = flat.sum(axis=0)
            return grad @ w.T

        return x @ w + self.p[f"{name}_b"], back

    def norm(self, x: np.ndarray, name: str) -> tuple[np.ndarray, Backward]:
        """Layer normalisation over the last axis."""
        centred = x - x.mean(axis=-1, keepdims=True)
        inverse = 1 / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + EPSILON)
        unit, gain = centred * inverse, self.p[name]

        def back(grad: np.ndarray) -> np.ndarray:
            self.gradients[name] = (grad * unit).reshape(-1, WIDTH).sum(axis=0)
            self.gradients[f"{name}_b"] = grad.reshape(-1, WIDTH).sum(axis=0)
            g = grad * gain
            along = (g * unit).mean(axis=-1, keepdims=True)
            return inverse * (g - g.mean(axis=-1, keepdims=True) - unit * along)

        return unit * gain + self.p[f"{name}_b"], back

    def attention(self, x: np.ndarray, i: int) -> tuple[np.ndarray, Backward]:
        """Every head's tokens averaged by the softmax of queries by keys."""
        qkv, back_qkv = self.linear(x, f"qkv{i}")
        n = len(x)
        q, k, v = qkv.reshape(n, TOKENS, 3, HEADS, DEPTH).transpose(2, 0, 3, 1, 4)
        weights = softmax(q @ k.swapaxes(2, 3) / np.float32(np.sqrt(DEPTH)))
        merged = (weights @ v).transpose(0, 2, 1, 3).reshape(n, TOKENS, WIDTH)
        y, back_merge = self.linear(merged, f"merge{i}")

        def back(grad: np.ndarray) -> np.ndarray:
            g = back_merge(grad).reshape(n, TOKENS, HEADS, DEPTH).transpose(0, 2, 1, 3)
            to_weights = g @ v.swapaxes(2, 3)
            average = (to_weights * weights).sum(axis=-1, keepdims=True)
            scores = weights * (to_weights - average) / np.float32(np.sqrt(DEPTH))
            parts = (scores @ k, scores.swapaxes(2, 3) @ q, weights.swapaxes(2, 3) @ g)
            return back_qkv(np.stack(parts).transpose(1, 3, 0, 2, 4).reshape(qkv.shape))

        return y, back

    def perceptron(self, x: np.ndarray, i: int) -> tuple[np.ndarray, Backward]:
        """Two layers with Gelu, in its form with tanh, between them."""
        up, back_up = self.linear(x, f"up{i}")
        c = np.float32(np.sqrt(2 / np.pi))
        t = np.tanh(c * (up + np.float32(0.044715) * up**3))
        y, back_down = self.linear(up * (1 + t) / 2, f"down{i}")

        def back(grad: np.ndarray) -> np.ndarray:
            inner = c * (1 + np.float32(3 * 0.044715) * up**2)
            return back_up(back_down(grad) * ((1 + t) / 2 + up * (1 - t * t) * inner / 2))

        return y, back


def softmax(x: np.ndarray) -> np.ndarray:
    """Along the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def gradients(p: Parameters, x: np.ndarray, y: np.ndarray) -> tuple[float, Parameters]:
    """The mean cross entropy and its gradients."""
    tape = Tape(p)
    side = 8 // PATCH
    patches = x.reshape(-1, side, PATCH, side, PATCH).transpose(0, 1, 3, 2, 4)
    h, back_patch = tape.linear(patches.reshape(len(x), TOKENS, -1), "patch")
    h = h + p["position"]
    steps = []
    for i in range(BLOCKS):
        for kind, step in (("norm_a", tape.attention), ("norm_m", tape.perceptron)):
            unit, back_norm = tape.norm(h, f"{kind}{i}")
            change, back_step = step(unit, i)
            h = h + change
            steps.append((back_norm, back_step))
    unit, back_norm = tape.norm(h, "norm")
    logits, back_head = tape.linear(unit.mean(axis=1), "head")
    probability = softmax(logits)
    right = np.arange(len(y)), y
    loss = -float(np.log(probability[right]).mean())
    probability[right] -= 1
    g = back_head(probability / len(y))
    g = back_norm(np.repeat(g[:, None] / TOKENS, TOKENS, axis=1))
    for back_norm, back_step in reversed(steps):
        g = g + back_norm(back_step(g))
    tape.gradients["position"] = g.sum(axis=0)
    back_patch(g)
    return loss, tape.gradients


class TransformerNodes:
    """The trained network as ONNX nodes."""

    def __init__(self, p: Parameters):
        self.nodes: list[onnx.NodeProto] = []
        self.constants = dict(p)

    def add(self, op_type: str, name: str, *operands: str | np.ndarray, **attributes) -> str:
        """Adds the node ``name``, and returns the name of its result, the same."""
        names = []
        for k, operand in enumerate(operands):
            if not isinstance(operand, str):
                self.constants[f"{name}/{k}"] = operand
                operand = f"{name}/{k}"
            names.append(operand)
        self.nodes.append(helper.make_node(op_type, names, [f"{name}_out"], name, **attributes))
        return f"{name}_out"

    def linear(self, x: str, name: str) -> str:
        product = self.add("MatMul", f"{name}_product", x, name)
        return self.add("Add", f"{name}_sum", product, f"{name}_b")

    def norm(self, x: str, name: str) -> str:
        operands = (x, name, f"{name}_b")
        return self.add("LayerNormalization", f"{name}_norm", *operands, epsilon=EPSILON)

    def attention(self, x: str, i: int) -> str:
        """Attention with the heads beside each other, as exporters write it."""
        qkv = self.linear(x, f"qkv{i}")
        sizes = np.full(3, WIDTH, np.int64)
        parts = [f"{kind}{i}" for kind in "qkv"]
        self.constants[f"split{i}/1"] = sizes
        self.nodes.append(
            helper.make_node("Split", [qkv, f"split{i}/1"], parts, f"split{i}", axis=2)
        )
        shape = np.array([1, TOKENS, HEADS, DEPTH])
        heads = []
        for part, order in zip(parts, ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]), strict=True):
            split = self.add("Reshape", f"{part}_heads", part, shape)
            heads.append(self.add("Transpose", f"{part}_moved", split, perm=order))
        scores = self.add("MatMul", f"scores{i}", heads[0], heads[1])
        root = np.array(1 / np.sqrt(DEPTH), np.float32)
        scaled = self.add("Mul", f"scaled{i}", scores, root)
        weights = self.add("Softmax", f"softmax{i}", scaled, axis=-1)
        mixed = self.add("MatMul", f"mixed{i}", weights, heads[2])
        moved = self.add("Transpose", f"merged{i}", mixed, perm=[0, 2, 1, 3])
        merged = self.add("Reshape", f"tokens{i}", moved, np.array([1, TOKENS, WIDTH]))
        return self.linear(merged, f"merge{i}")

    def perceptron(self, x: str, i: int) -> str:
        up = self.linear(x, f"up{i}")
        return self.linear(self.add("Gelu", f"gelu{i}", up, approximate="tanh"), f"down{i}")


def float_model(p: Parameters) -> onnx.ModelProto:
    """The trained network in float32, in opset 20."""
    graph = TransformerNodes(p)
    w = graph.constants.pop("patch").T.reshape(WIDTH, 1, PATCH, PATCH)
    stride = {"kernel_shape": [PATCH, PATCH], "strides": [PATCH, PATCH]}
    x = graph.add("Conv", "embed", "image", w, "patch_b", **stride)
    x = graph.add("Reshape", "flatten", x, np.array([1, WIDTH, TOKENS]))
    x = graph.add("Transpose", "to_tokens", x, perm=[0, 2, 1])
    x = graph.add("Add", "positions", x, "position")
    for i in range(BLOCKS):
        for kind, step in (("norm_a", graph.attention), ("norm_m", graph.perceptron)):
            x = graph.add("Add", f"block{i}_{kind}", x, step(graph.norm(x, f"{kind}{i}"), i))
    x = graph.add("ReduceMean", "pool", graph.norm(x, "norm"), np.array([1]), keepdims=0)
    graph.nodes.append(helper.make_node("Gemm", [x, "head", "head_b"], ["logits"], "classify"))
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "digits-vit",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 1, 8, 8])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 10])],
            [numpy_helper.from_array(value, name) for name, value in graph.constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=9,
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def main() -> None:
    x, y, x_test, y_test = split()
    rng = np.random.default_rng(SEED)

    def noisy(p: Parameters, x: np.ndarray, y: np.ndarray) -> tuple[float, Parameters]:
        return gradients(p, (x + NOISE * rng.normal(size=x.shape)).astype(np.float32), y)

    p = adam(initial(rng), noisy, x, y, epochs=EPOCHS, rate=RATE, rng=rng)
    real = float_model(p)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "float.onnx"
        onnx.save(real, path)
        model = quantise_model(path, {"image": x[:CALIBRATION, None]})
    for what, each in (("float", real), ("int8", model)):
        print(f"{what}: {100 * accuracy(each, x_test, y_test):.1f} % of {len(y_test)}")
    write(model, TRANSFORMER)


if __name__ == "__main__":
    main()
