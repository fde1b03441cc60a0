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


class _Graph:
    """A QDQ model in the making; every value is a dequantised activation (name, shape, scale,
    zero) of one element type."""

    def __init__(self, rng: np.random.Generator, values: int):
        self.rng = rng
        self.model = Model()
        self.dtype = np.dtype(rng.choice(["int8", "uint8"]))
        shape = (1, int(rng.integers(1, 20)), *rng.integers(3, 18, 2).tolist())
        scale, zero = self._quant(1.0)
        self.model.input("x", self.dtype, shape)
        self.values = [(self.model.dq("x", scale, zero), shape, scale, zero)]
        while len(self.values) < values:
            self.values.append(self._next())

    def _quant(self, reach: float, low: bool = False):
        """Scale and zero point such that about +-``reach`` fits; ``low``: 0 to ``reach``."""
        info = np.iinfo(self.dtype)
        scale = np.float32(reach / 127 * self.rng.uniform(0.7, 1.5))
        middle = (info.min + info.max) // 2 + self.rng.integers(-20, 20)
        return scale, np.array(info.min if low else middle, self.dtype)

    def _pick(self):
        """A value, the latest more often."""
        return self.values[self.rng.integers(len(self.values), size=3).max()]

    def _store(self, real: str, shape, quant=None):
        scale, zero = quant or self._quant(1.0)
        name = self.model.q(real, scale, zero, f"q{len(self.model.nodes)}")
        return self.model.dq(name, scale, zero), tuple(int(d) for d in shape), scale, zero

    def _node(self, op_type: str, inputs, **attributes) -> str:
        return self.model.node(op_type, inputs, f"v{len(self.model.nodes)}", **attributes)

    def _const(self, array) -> str:
        return self.model.const(f"c{len(self.model.constants)}", array)

    def _next(self):
        kinds = ["conv", "conv", "depthwise", "pool", "binary", "binary", "function", "function"]
        kinds += ["concat", "gate", "move", "transposed", "residual", "constant", "prelu", "linear"]
        kinds += ["turn", "join"]
        return getattr(self, f"_{self.rng.choice(kinds)}")(self._pick())

    def _weights(self, shape, x_scale, terms: int, axis: int):
        scale = np.float32(0.04 / np.sqrt(terms))
        w = self._const(random_array(self.rng, np.int8, shape))
        names = [self.model.dq(w, scale, np.int8(0))]
        if self.rng.integers(2):
            b = self._const(self.rng.integers(-2000, 2000, shape[axis]).astype(np.int32))
            names.append(self.model.dq(b, np.float32(x_scale) * scale, np.int32(0)))
        return names

    def _conv(self, x, depthwise=False):
        name, (n, c, h, w), scale, _ = x
        rng = self.rng
        kernel = np.minimum(rng.choice([1, 2, 3], 2), (h, w))
        stride = rng.choice([1, 1, 2], 2)
        pads = rng.integers(0, np.tile(kernel, 2))
        group = c if depthwise else 1
        outputs = c if depthwise or rng.integers(2) else int(rng.integers(1, 24))
        if not depthwise and rng.integers(3) == 0:  # same shape, for residuals
            kernel, stride, pads = np.array([1, 1]), np.array([1, 1]), np.zeros(4, int)
        size = (np.array([h, w]) + pads[:2] + pads[2:] - kernel) // stride + 1
        names = self._weights((outputs, c // group, *kernel), scale, c // group * kernel.prod(), 0)
        attributes = {"pads": pads.tolist(), "strides": stride.tolist(), "group": group}
        real = self._node("Conv", [name, *names], **attributes)
        if relu := bool(rng.integers(2)):
            real = self._node("Relu", [real])
        return self._store(real, (n, outputs, *size), self._quant(1.0, low=relu))

    def _depthwise(self, x):
        return self._conv(x, depthwise=True)

    def _transposed(self, x):
        name, (n, c, h, w), scale, _ = x
        if max(h, w) > 12:
            return self._pool(x)
        outputs = int(self.rng.integers(1, 9))
        kernel, stride = self.rng.integers(1, 4, 2), self.rng.integers(1, 3, 2)
        group = c if self.rng.integers(2) and outputs < 3 else 1
        names = self._weights((c, outputs, *kernel), scale, c // group * kernel.prod(), 1)
        if group > 1:
            names = names[:1]
        real = self._node("ConvTranspose", [name, *names], strides=stride.tolist(), group=group)
        size = (np.array([h, w]) - 1) * stride + kernel
        return self._store(real, (n, outputs * group, *size))

    def _pool(self, x):
        name, (n, c, h, w), scale, zero = x
        kernel = np.minimum(self.rng.integers(1, 4, 2), (h, w))
        stride = self.rng.integers(1, 3, 2)
        size = (np.array([h, w]) - kernel) // stride + 1
        attributes = {"kernel_shape": kernel.tolist(), "strides": stride.tolist()}
        if self.rng.integers(2):
            if self.rng.integers(2):  # padded, the padding not counted
                pads = self.rng.integers(0, np.tile(kernel, 2))
                attributes["pads"] = pads.tolist()
                size = (np.array([h, w]) + pads[:2] + pads[2:] - kernel) // stride + 1
            real = self._node("AveragePool", [name], **attributes)
            return self._store(real, (n, c, *size))
        return self._store(
            self._node("MaxPool", [name], **attributes), (n, c, *size), (scale, zero)
        )

    def _binary(self, x):
        same = [v for v in self.values if v[1] == x[1] and v is not x]
        if not same:
            other = self._store(self._node("Tanh", [x[0]]), x[1])
            self.values.append(other)
            same = [other]
        other = same[self.rng.integers(len(same))]
        kind = self.rng.choice(["Add", "Add", "Sub", "Mul"])
        quant = self._quant(0.3) if kind == "Mul" else None
        return self._store(self._node(kind, [x[0], other[0]]), x[1], quant)

    def _residual(self, x):
        name, (_, c, _, _), scale, _ = x
        sums = self._node("Conv", [name, *self._weights((c, c, 1, 1), scale, c, 0)])
        return self._store(self._node("Add", [self._store(sums, x[1])[0], name]), x[1])

    def _gate(self, x):
        mean = self._node("GlobalAveragePool", [x[0]])
        mean = self._store(mean, (*x[1][:2], 1, 1), self._quant(0.3))
        return self._store(self._node("Mul", [x[0], mean[0]]), x[1], self._quant(0.1))

    def _function(self, x):
        kind = self.rng.choice(["Sigmoid", "Tanh", "HardSwish", "LeakyRelu", "SiLU"])
        if kind == "SiLU":
            return self._store(self._node("Mul", [x[0], self._node("Sigmoid", [x[0]])]), x[1])
        return self._store(self._node(kind, [x[0]]), x[1])

    def _constant(self, x):
        """A constant per channel, of a float or a quantised kind, on either side."""
        shape = (x[1][1], 1, 1)
        kind = self.rng.choice(["Add", "Sub", "Mul"])
        if self.rng.integers(2):
            values = self.rng.uniform(-0.8, 0.8, shape).astype(np.float32)
            constant = self._const(values)
        else:
            values = random_array(self.rng, np.int8, shape)
            constant = self.model.dq(self._const(values), np.float32(0.006), np.int8(0))
        names = [x[0], constant] if self.rng.integers(2) else [constant, x[0]]
        return self._store(self._node(kind, names), x[1], self._quant(1.3))

    def _prelu(self, x):
        slope = self.rng.uniform(-0.5 * self.rng.integers(2), 1, (x[1][1], 1, 1))
        real = self._node("PRelu", [x[0], self._const(slope.astype(np.float32))])
        return self._store(real, x[1])

    def _linear(self, x):
        name, (n, c, h, w), *_ = x
        if max(h, w) > 16:
            return self._function(x)
        mode = self.rng.choice(["half_pixel", "asymmetric", "align_corners"])
        sizes = [n, c, *(s * self.rng.integers(1, 4) for s in (h, w))]
        if mode == "align_corners":
            sizes[2:] = [(s - 1) * int(self.rng.integers(1, 3)) + 1 for s in (h, w)]
        names = [name, "", "", self._const(np.array(sizes, np.int64))]
        modes = {"mode": "linear", "coordinate_transformation_mode": str(mode)}
        return self._store(self._node("Resize", names, **modes), sizes)

    def _turn(self, x):
        """Axes exchanged, then read in order."""
        name, shape, *quant = x
        if max(shape) > 16:
            return self._function(x)
        perm = [0, *(1 + self.rng.permutation(3)).tolist()]
        name, shape, *_ = self._store(self._node("Transpose", [name], perm=perm),
                                      [shape[p] for p in perm], quant)  # fmt: skip
        shape = (1, shape[1], shape[3], shape[2])
        return self._store(self._node("Reshape", [name, self._const(shape)]), shape, quant)

    def _join(self, x):
        """Put side by side in space."""
        axis = int(self.rng.integers(2, 4))
        rest = [s for i, s in enumerate(x[1]) if i != axis]
        fitting = [v for v in self.values if [s for i, s in enumerate(v[1]) if i != axis] == rest]
        other = fitting[self.rng.integers(len(fitting))]
        shape = list(x[1])
        shape[axis] += other[1][axis]
        if shape[axis] > 40:
            return self._function(x)
        return self._store(self._node("Concat", [x[0], other[0]], axis=axis), shape)

    def _concat(self, x):
        fitting = [v for v in self.values if v[1][2:] == x[1][2:]]
        other = fitting[self.rng.integers(len(fitting))]
        shape = (1, x[1][1] + other[1][1], *x[1][2:])
        return self._store(self._node("Concat", [x[0], other[0]], axis=1), shape)

    def _move(self, x):
        name, (n, c, h, w), *quant = x
        quant = quant if self.rng.integers(2) else None
        kind = self.rng.integers(4)
        if kind == 0 and max(h, w) < 16:
            scales = self._const(np.array([1, 1, 2, 2], np.float32))
            real = self._node("Resize", [name, "", scales], mode="nearest")
            return self._store(real, (n, c, 2 * h, 2 * w), quant)
        if kind == 1:
            pads = self.rng.integers(0, 3, 4).tolist()
            real = self._node("Pad", [name, self._const([0, 0, *pads[:2], 0, 0, *pads[2:]])])
            return self._store(real, (n, c, h + pads[0] + pads[2], w + pads[1] + pads[3]), quant)
        if kind == 2 and h % 2 == w % 2 == 0:
            real = self._node("SpaceToDepth", [name], blocksize=2)
            return self._store(real, (n, 4 * c, h // 2, w // 2), quant)
        first = int(self.rng.integers(c))
        ends = [self._const([v]) for v in (first, c, 1)]
        return self._store(self._node("Slice", [name, *ends]), (n, c - first, h, w), quant)


def random_graph_model(rng: np.random.Generator, values: int = 12) -> onnx.ModelProto:
    """A random QDQ graph of about ``values`` activations of up to some 20 rows, columns and
    channels and more behind concatenations: convolutions of all sorts, pools, arithmetic (also
    residual and gating), functions, concatenation, movement, of mixed scales. Its output is the
    last value."""
    graph = _Graph(rng, values)
    name, shape, _, _ = graph.values[-1]
    producer = next(n for n in graph.model.nodes if n.output[0] == name)
    return graph.model.done(producer.input[0], graph.dtype, shape)
