"""Models with products of two activations for the tests: one product, the attention of a
transformer, a whole encoder block."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.helpers.random_models import Model, random_array


def _zero(zero: int, dtype) -> np.ndarray:
    """An int8 zero point in a model of ``dtype``."""
    return np.array(zero + (128 if np.dtype(dtype) == np.uint8 else 0), dtype)


def product_model(
    a: tuple[int, ...],
    b: tuple[int, ...],
    zeros: tuple[int, int] = (3, -5),
    types: tuple = (np.int8, np.int8),
    form: str = "qdq",
) -> onnx.ModelProto:
    """``a`` times ``b``; the result has the type of ``a``."""
    model = Model()
    # The zero points' distance from the codes' mean comes on top of the codes' spread.
    reach = abs(zeros[0] * zeros[1]) * a[-1] / 90 + 70 * a[-1] ** 0.5
    scales, last = (0.0371, 0.0213), np.float32(0.0371 * 0.0213 * reach)
    out = _zero(-9, types[0])
    names = [model.input(n, t, s) for n, t, s in zip("ab", types, (a, b))]
    zero = [_zero(z, t) for z, t in zip(zeros, types)]
    if form == "qdq":
        names = [model.dq(n, s, z) for n, s, z in zip(names, scales, zero)]
        return model.done(model.q(model.node("MatMul", names, "p"), last, out, "y"), types[0])
    pairs = [[n, *model.pair(n, s, z)] for n, s, z in zip(names, scales, zero)]
    names = [*pairs[0], *pairs[1], *model.pair("y", last, out)]
    return model.done(model.node("QLinearMatMul", names, "y"), types[0])


def attention_model(
    dtype, length: int, heads: int, size: int, batch: int = 1, seed: int = 0
) -> onnx.ModelProto:
    """Projections, Q times K transposed, a scale, times V, projection, residual; what the softmax
    would do is left out. ``size``: features of one head."""
    rng, model, depth = np.random.default_rng(seed), Model(), heads * size

    def again(value: str, scale: float, zero: int) -> str:
        zero = _zero(zero, dtype)
        return model.dq(model.q(value, scale, zero, f"{value}_q"), scale, zero)

    def linear(value: str, name: str, zero: int) -> str:
        w = model.const(f"{name}_w", random_array(rng, np.int8, (depth, depth)))
        product = model.node("MatMul", [value, model.dq(w, 0.005, np.int8(0))], f"{name}_product")
        b = model.const(f"{name}_b", rng.normal(0, 0.5, depth).astype(np.float32))
        return again(model.node("Add", [product, b], name), 0.009 * depth**0.5, zero)

    def reshaped(value: str, shape: list[int], perm: list[int] | None) -> str:
        name = model.const(f"{value}_shape", np.array(shape))
        value = model.node("Reshape", [value, name], f"{value}_r")
        return model.node("Transpose", [value], f"{value}_t", perm=perm) if perm else value

    split = [batch, length, heads, size]
    x = model.dq(model.input("x", dtype, (batch, length, depth)), 0.0371, _zero(3, dtype))
    q = reshaped(linear(x, "q", 3), split, [0, 2, 1, 3])
    k = reshaped(linear(x, "k", -11), split, [0, 2, 3, 1])
    v = reshaped(linear(x, "v", 20), split, [0, 2, 1, 3])
    scores = again(model.node("MatMul", [q, k], "scores"), 0.2 * depth**0.5, -3)
    scaled = model.node("Div", [scores, model.const("root", np.float32(3))], "scaled")
    scaled = again(scaled, 0.07 * depth**0.5, -10)
    mixed = again(model.node("MatMul", [scaled, v], "mixed"), 0.25 * depth, 5)
    mixed = model.node("Transpose", [mixed], "mixed_t", perm=[0, 2, 1, 3])
    out = linear(reshaped(mixed, [batch, length, depth], None), "out", 2)
    total = model.node("Add", [out, x], "total")
    return model.done(model.q(total, 0.0231 * depth**0.5, _zero(-7, dtype), "y"), dtype)


def nonlocal_block(dtype, channels: int, size: int, image: tuple[int, int, int]) -> onnx.ModelProto:
    """Attention between the pixels of an image (batch, height, width), as after Wang et al., 2018:
    convolutions make queries, keys and values of ``size`` features."""
    rng, model, (batch, h, w) = np.random.default_rng(0), Model(), image

    def again(value: str, scale: float, zero: int) -> str:
        zero = _zero(zero, dtype)
        return model.dq(model.q(value, scale, zero, f"{value}_q"), scale, zero)

    def conv(value: str, name: str, outputs: int, inputs: int) -> str:
        weights = model.const(f"{name}_w", random_array(rng, np.int8, (outputs, inputs, 3, 3)))
        weights = model.dq(weights, 0.005, np.int8(0))
        value = model.node("Conv", [value, weights], name, pads=[1] * 4)
        return again(value, 0.03 * inputs**0.5, 7)

    def matrix(value: str, name: str, perm: list[int] | None) -> str:
        shape = model.const(f"{name}_shape", np.array([batch, -1, h * w]))
        value = model.node("Reshape", [value, shape], f"{name}_r")
        return model.node("Transpose", [value], f"{name}_t", perm=perm) if perm else value

    x = model.dq(model.input("x", dtype, (batch, channels, h, w)), 0.0371, _zero(3, dtype))
    q, k, v = (
        matrix(conv(x, name, size, channels), name, [0, 2, 1] if name == "q" else None)
        for name in "qkv"
    )
    scores = again(model.node("MatMul", [q, k], "scores"), 0.8 * size**0.5, -128)
    scores = model.node("Transpose", [scores], "scores_t", perm=[0, 2, 1])
    mixed = again(model.node("MatMul", [v, scores], "mixed"), 1.5 * h * w, 3)
    shape = model.const("image", np.array([batch, size, h, w]))
    mixed = model.node("Reshape", [mixed, shape], "mixed_r")
    total = model.node("Add", [conv(mixed, "out", channels, size), x], "total")
    return model.done(model.q(total, 0.3, _zero(-7, dtype), "y"), dtype)


def encoder_block(
    length: int = 12, depth: int = 16, heads: int = 2, hidden: int = 24, seed: int = 0
) -> onnx.ModelProto:
    """A transformer's encoder block in float32, as exporters write it, with random weights."""
    rng = np.random.default_rng(seed)
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []

    def const(name: str, array) -> str:
        array = np.asarray(array)
        array = array.astype(np.float32 if array.dtype.kind == "f" else np.int64)
        constants.append(numpy_helper.from_array(array, name))
        return name

    def node(op_type: str, inputs: list[str], name: str, **attributes) -> str:
        nodes.append(helper.make_node(op_type, inputs, [name], name=f"{name}_node", **attributes))
        return name

    def linear(x: str, rows: int, columns: int, name: str) -> str:
        w = const(f"{name}_w", rng.normal(0, rows**-0.5, (rows, columns)))
        x = node("MatMul", [x, w], f"{name}_product")
        return node("Add", [x, const(f"{name}_b", rng.normal(0, 0.1, columns))], name)

    def split(x: str, perm: list[int]) -> str:
        shape = const(f"{x}_shape", [1, length, heads, depth // heads])
        return node("Transpose", [node("Reshape", [x, shape], f"{x}_r")], f"{x}_t", perm=perm)

    def norm(x: str, name: str) -> str:
        gain = const(f"{name}_gain", rng.normal(1, 0.1, depth))
        shift = const(f"{name}_shift", rng.normal(0, 0.1, depth))
        return node("LayerNormalization", [x, gain, shift], name, axis=-1)

    q = split(linear("x", depth, depth, "q"), [0, 2, 1, 3])
    k = split(linear("x", depth, depth, "k"), [0, 2, 3, 1])
    v = split(linear("x", depth, depth, "v"), [0, 2, 1, 3])
    scores = node("MatMul", [q, k], "scores")
    scores = node("Div", [scores, const("root", (depth / heads) ** 0.5)], "scaled")
    mixed = node("MatMul", [node("Softmax", [scores], "weights", axis=-1), v], "mixed")
    mixed = node("Transpose", [mixed], "mixed_t", perm=[0, 2, 1, 3])
    mixed = node("Reshape", [mixed, const("together", [1, length, depth])], "merged")
    x = norm(node("Add", ["x", linear(mixed, depth, depth, "out")], "residual"), "norm")
    inner = linear(x, depth, hidden, "up")
    gate = node("Erf", [node("Div", [inner, const("root2", 2**0.5)], "g1")], "g2")
    gate = node("Mul", [inner, node("Add", [gate, const("one", 1.0)], "g3")], "g4")
    inner = node("Mul", [gate, const("half", 0.5)], "gelu")
    x = norm(node("Add", [x, linear(inner, hidden, depth, "down")], "residual2"), "norm2")
    shape = [1, length, depth]
    graph = helper.make_graph(
        nodes,
        "encoder",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(x, TensorProto.FLOAT, shape)],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def uint8_convolution(
    rng: np.random.Generator,
    zeros: tuple[int, int],
    *,
    channels: int = 20,
    outputs: int | None = None,
    kernel: tuple[int, int] = (3, 3),
    extreme: bool = False,
    **attributes,
) -> onnx.ModelProto:
    """A convolution with uint8 weights. ``zeros``: of input and weights. Depthwise unless the
    number of ``outputs`` is given. ``extreme``: all weights are 0 or 255."""
    group = channels if outputs is None else 1
    outputs = outputs or channels
    shape = (outputs, channels // group, *kernel)
    weights = rng.choice([0, 255], shape) if extreme else rng.integers(0, 256, shape)
    # The largest zero point and the smallest put all weights on one side.
    reach = 128 * (abs(zeros[1] - 128) + 90) * np.prod(shape[1:]) ** 0.75
    model = Model()
    names = [model.input("x", np.uint8, (1, channels, 14, 12))]
    names += model.pair("x", 0.05, np.uint8(zeros[0]))
    names += [
        model.const("w", weights.astype(np.uint8)),
        *model.pair("w", 0.01, np.uint8(zeros[1])),
    ]
    names += model.pair("y", 0.05 * 0.01 * reach / 128, np.uint8(121))
    same = {"pads": [k // 2 for k in (*kernel, *kernel)], "kernel_shape": list(kernel)}
    y = model.node("QLinearConv", names, "y", group=group, **same | attributes)
    return model.done(y, np.uint8)
