"""Small random ONNX models for the tests: one convolution or product, seeded."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

ELEMENT = {
    np.dtype(np.int8): TensorProto.INT8,
    np.dtype(np.uint8): TensorProto.UINT8,
    np.dtype(np.float32): TensorProto.FLOAT,
}


class Model:
    """Collects nodes and constants; ``done`` makes a checked model of them."""

    def __init__(self, opset: int = 21):
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, dtype, shape) -> str:
        element = ELEMENT[np.dtype(dtype)]
        self.inputs.append(helper.make_tensor_value_info(name, element, shape))
        return name

    def const(self, name: str, array) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def node(self, op_type: str, inputs, output: str, domain: str = "", **attributes) -> str:
        node = helper.make_node(op_type, inputs, [output], name=f"{output}_node", domain=domain)
        node.attribute.extend(helper.make_attribute(k, v) for k, v in attributes.items())
        self.nodes.append(node)
        return output

    def pair(self, name: str, scale, zero) -> list[str]:
        """Scale and zero point constants."""
        zero_name = self.const(f"{name}_zero", zero)
        return [self.const(f"{name}_scale", np.float32(scale)), zero_name]

    def dq(self, value: str, scale, zero, **attributes) -> str:
        pair = self.pair(f"{value}_dq", scale, zero)
        return self.node("DequantizeLinear", [value, *pair], f"{value}_real", **attributes)

    def q(self, value: str, scale, zero, output: str) -> str:
        return self.node("QuantizeLinear", [value, *self.pair(output, scale, zero)], output)

    def done(self, output: str, dtype, shape=None) -> onnx.ModelProto:
        info = helper.make_tensor_value_info(output, ELEMENT[np.dtype(dtype)], shape)
        graph = helper.make_graph(self.nodes, "test", self.inputs, [info], self.constants)
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def random_array(rng: np.random.Generator, dtype, shape) -> np.ndarray:
    """Of all values of the type, or (one time in four) of its extremes alone."""
    limits = np.iinfo(dtype)
    if rng.integers(4) == 0:
        return rng.choice(np.array([limits.min, limits.max], dtype), shape)
    return rng.integers(limits.min, limits.max + 1, shape).astype(dtype)


def random_inputs(rng: np.random.Generator, model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Arrays for the int8 and uint8 inputs of a model."""
    out = {}
    for value in model.graph.input:
        kind = value.type.tensor_type
        shape = [d.dim_value for d in kind.shape.dim]
        dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
        out[value.name] = random_array(rng, dtype, shape)
    return out


def _scales(rng, terms: int, outputs: int) -> tuple[np.float32, np.ndarray, np.float32]:
    """x, w (scalar or per channel) and y scale such that results mostly fit the type. One time in
    four all are powers of two, so that many results are ties."""
    per_channel = rng.integers(2)
    w = np.exp(rng.uniform(-7, -4, outputs if per_channel else 1))
    x = np.exp(rng.uniform(-6, 0))
    y = x * w.mean() * 74 * 74 * np.sqrt(terms) / rng.uniform(20, 150)
    if rng.integers(4) == 0:
        x, w, y = (np.exp2(np.rint(np.log2(v))) for v in (x, w, y))
    w = np.asarray(w, np.float32)
    return np.float32(x), w if per_channel else w.reshape(()), np.float32(y)


def _zero(rng, dtype) -> np.ndarray:
    limits = np.iinfo(dtype)
    zero = [limits.min, limits.max, rng.integers(limits.min, limits.max + 1)][rng.integers(3)]
    return np.array(zero, dtype)


def _common(rng, terms: int, outputs: int, weight_shape):
    """Type, quantisation, weights and bias of a random product."""
    dtype = np.dtype(rng.choice(["int8", "uint8"]))
    scales = _scales(rng, terms, outputs)
    zeros = _zero(rng, dtype), _zero(rng, dtype)
    weights = random_array(rng, np.int8, weight_shape)
    reach = int(74 * 74 * np.sqrt(terms))
    bias = rng.integers(-reach, reach + 1, outputs).astype(np.int32) if rng.integers(3) else None
    return dtype, scales, zeros, weights, bias


def _dq_parameters(model: Model, weights, bias, x_scale, w_scale, axis: int) -> list[str]:
    model.const("w", weights)
    names = [model.dq("w", w_scale, np.zeros(w_scale.shape, np.int8), axis=axis)]
    if bias is not None:
        model.const("b", bias)
        scale = x_scale * w_scale
        names.append(model.dq("b", scale, np.zeros(scale.shape, np.int32), axis=0))
    return names


def random_conv_model(
    rng: np.random.Generator,
    *,
    form: str = "qdq",
    channels: int = 300,
    size: int = 60,
    kernel: int = 11,
    work: int = 20_000_000,
    group: str = "one",
) -> onnx.ModelProto:
    """One convolution: kernel up to ``kernel``, stride 1..4, dilation 1..3, any padding, up to
    ``channels`` channels and ``size`` rows and columns, at most ``work`` multiply-accumulates; int8
    or uint8 with any zero points; scales per tensor or channel. ``form`` is ``qdq`` or ``qlinear``;
    ``group`` ``one``, ``depthwise`` or ``any``."""
    while True:
        k = rng.integers(1, kernel + 1, 2) if rng.integers(3) else np.repeat(rng.choice([1, 3]), 2)
        strides, dilations = rng.integers(1, 5, 2), rng.integers(1, 4, 2)
        reach = (k - 1) * dilations + 1
        pads = rng.integers(0, np.tile(reach, 2))
        h, w = rng.integers(1, size + 1, 2)
        c, o = (int(np.exp(rng.uniform(0, np.log(channels + 1)))) for _ in range(2))
        groups = 1
        if group == "depthwise":
            groups, o = c, c * int(rng.choice([1, 1, 2]))
        elif group == "any":
            groups = int(rng.integers(1, 5))
            c, o = (-(-v // groups) * groups for v in (c, o))
        room = np.array([h, w]) + pads[:2] + pads[2:] - reach
        if (room < 0).any():
            continue
        out = room // strides + 1
        terms = c // groups * int(k.prod())
        if terms * o * int(out.prod()) <= work:
            break
    dtype, (xs, ws, ys), (xz, yz), weights, bias = _common(rng, terms, o, (o, c // groups, *k))
    attributes = {
        "kernel_shape": k.tolist(),
        "strides": strides.tolist(),
        "dilations": dilations.tolist(),
        "pads": pads.tolist(),
        "group": groups,
    }
    model = Model()
    x = model.input("x", dtype, [1, c, int(h), int(w)])
    if form == "qlinear":
        model.const("w", weights)
        names = [x, *model.pair("x", xs, xz)]
        names += ["w", *model.pair("w", ws, np.zeros(ws.shape, np.int8)), *model.pair("y", ys, yz)]
        if bias is not None:
            names.append(model.const("b", bias))
        y = model.node("QLinearConv", names, "y", **attributes)
    else:
        parameters = _dq_parameters(model, weights, bias, xs, ws, 0)
        real = model.node("Conv", [model.dq(x, xs, xz), *parameters], "sum", **attributes)
        # onnxruntime fuses a Relu only where the zero point is the lowest value.
        if yz == np.iinfo(dtype).min and rng.integers(2):
            real = model.node("Relu", [real], "relu")
        y = model.q(real, ys, yz, "y")
    return model.done(y, dtype, [1, o, *out.tolist()])


def random_gemm_model(
    rng: np.random.Generator, *, form: str = "qdq", depth: int = 4000, size: int = 200
) -> onnx.ModelProto:
    """One product (M, K) x (K, N). ``form``: ``qdq``, ``qlinear`` (QLinearMatMul) or ``qgemm``."""
    m, n = (int(np.exp(rng.uniform(0, np.log(size)))) for _ in range(2))
    k = int(np.exp(rng.uniform(0, np.log(depth))))
    across = bool(rng.integers(2)) and form != "qlinear"
    shape = (n, k) if across else (k, n)
    dtype, (xs, ws, ys), (xz, yz), weights, bias = _common(rng, k, n, shape)
    wz = np.zeros(ws.shape, np.int8)
    model = Model()
    x = model.input("x", dtype, [m, k])
    if form == "qdq":
        parameters = _dq_parameters(model, weights, bias, xs, ws, 0 if across else 1)
        real = model.node("Gemm", [model.dq(x, xs, xz), *parameters], "sum", transB=int(across))
        y = model.q(real, ys, yz, "y")
    else:
        names = [x, *model.pair("x", xs, xz), model.const("w", weights), *model.pair("w", ws, wz)]
        if form == "qlinear":
            y = model.node("QLinearMatMul", [*names, *model.pair("y", ys, yz)], "y")
        else:
            names.append(model.const("b", bias) if bias is not None else "")
            names += model.pair("y", ys, yz)
            attributes = {"transB": int(across), "alpha": float(rng.choice([1.0, 0.5]))}
            y = model.node("QGemm", names, "y", domain="com.microsoft", **attributes)
    return model.done(y, dtype, [m, n])
