"""Models as the tools of others write them, in miniature: all of them on the accelerator, but for
what it has no operator for. Against onnxruntime, by the command line."""

import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from onnxruntime import quantization

from systole.sw.compiler.partition import place
from systole.sw.frontend.dataflow import CONVERSIONS
from tests.helpers.random_models import Model, random_array
from tests.sw.cli.test_run import cli


def on_host(path) -> list[str]:
    """The operators that the host has, conversions excepted."""
    return [p.op_type for p in place(path) if p.host and p.op_type not in CONVERSIONS]


def run(model: onnx.ModelProto, tmp_path, least=0.98, host=()) -> None:
    path, out = tmp_path / "model.onnx", tmp_path / "report.json"
    onnx.save(model, path)
    assert on_host(path) == list(host)
    result = cli(path, "--sim", "commands", "--rows", 8, "--cols", 8, "--json", out)
    assert result.exit_code == 0, result.stderr
    report = json.loads(out.read_text())
    assert report["golden_mismatches"] == 0
    ort = report["ort"]
    assert ort["max_abs_diff"] <= 2 and ort["equal"] >= least * ort["elements"] - 1, ort


class Net(Model):
    """Layers by call; weights of a fixed seed."""

    def __init__(self, opset: int):
        super().__init__(opset)
        self.rng = np.random.default_rng(0)

    def __call__(self, op_type: str, *inputs: str, **attributes) -> str:
        return self.node(op_type, list(inputs), f"v{len(self.nodes)}", **attributes)

    def constant(self, array, dtype=None) -> str:
        return self.const(f"c{len(self.constants)}", np.asarray(array, dtype))

    def ints(self, *values: int) -> str:
        return self.constant(values, np.int64)

    def normal(self, *shape: int, scale: float = 1.0) -> str:
        return self.constant(self.rng.normal(0, scale, shape), np.float32)

    def quantised(self, x: str, scale: float, zero: int, dtype=np.int8) -> str:
        pair = [self.constant(scale, np.float32), self.constant(zero, dtype)]
        return self("DequantizeLinear", self("QuantizeLinear", x, *pair), *pair)

    def float_output(self, y: str) -> onnx.ModelProto:
        return self.done(self("Identity", y), np.float32)


# PyTorch ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [11, 13, 21])
@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_fake_quantised(opset, dtype, tmp_path):
    """Float weights quantised in the graph, per channel where the opset has it; scales in Constant
    nodes; Identity, Dropout, Cast; a shape computed."""
    net = Net(opset)
    middle, low = (128, 0) if dtype == np.uint8 else (0, -128)

    def scale(values) -> str:
        value = numpy_helper.from_array(np.asarray(values, np.float32))
        return net("Constant", value=value)

    def quantised(x, step, zero):
        pair = [scale(step), net.constant(zero, dtype)]
        return net("DequantizeLinear", net("QuantizeLinear", x, *pair), *pair)

    def weights(*shape):
        array = net.rng.normal(0, 0.5 / np.sqrt(np.prod(shape[1:])), shape).astype(np.float32)
        channelwise = opset >= 13
        reach = np.abs(array).max(tuple(range(1, len(shape))) if channelwise else None)
        pair = [scale(reach / 127), net.constant(np.zeros(reach.shape), np.int8)]
        axis = {"axis": 0} if channelwise else {}
        made = net("QuantizeLinear", net.constant(array), *pair, **axis)
        return net("DequantizeLinear", made, *pair, **axis)

    x = quantised(net.input("x", np.float32, (1, 3, 16, 16)), 0.0303, middle)
    x = net("Relu", net("Conv", x, weights(16, 3, 3, 3), net.normal(16), pads=[1] * 4))
    x = net("Identity", quantised(x, 0.0217, low))
    y = net("Conv", x, weights(16, 1, 3, 3), net.normal(16), pads=[1] * 4, group=16)
    y = quantised(net("Relu", y), 0.0231, low)
    y = quantised(net("Conv", y, weights(16, 16, 1, 1)), 0.0229, middle)
    x = quantised(net("Relu", net("Add", x, y)), 0.0307, low)
    x = net("Dropout", net("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2]))
    x = quantised(net("GlobalAveragePool", x), 0.0203, low)
    batch = net("Gather", net("Shape", x), net.constant(0, np.int64), axis=0)
    if opset >= 13:
        batch = net("Unsqueeze", batch, net.ints(0))
    else:
        batch = net("Unsqueeze", batch, axes=[0])
    x = net("Reshape", x, net("Concat", batch, net.ints(-1), axis=0))
    x = net("Gemm", net("Cast", x, to=TensorProto.FLOAT), weights(10, 16), net.normal(10), transB=1)
    run(net.float_output(quantised(x, 0.0503, middle)), tmp_path, least=0.9)


def test_without_zero_points(tmp_path):
    """Opset 21: ``output_dtype`` instead, which onnxruntime's own optimisations do not take."""
    net = Net(21)

    def quantised(x, scale):
        scale = net.constant(scale, np.float32)
        made = net("QuantizeLinear", x, scale, output_dtype=TensorProto.INT8)
        return net("DequantizeLinear", made, scale)

    x = quantised(net.input("x", np.float32, (1, 3, 16, 16)), 0.0303)
    w = net.constant(random_array(net.rng, np.int8, (16, 3, 3, 3)))
    w = net("DequantizeLinear", w, net.constant(np.full(16, 0.003), np.float32), axis=0)
    x = quantised(net("Conv", x, w), [0.0217])
    run(net.float_output(quantised(net("Mul", x, net("Sigmoid", x)), [0.0207])), tmp_path)


# TensorFlow Lite by tf2onnx -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_channels_last(dtype, tmp_path):
    """Transpositions around convolutions, biases of int32, a hard swish in pieces, Pad, Concat and
    mean channels last, a softmax that is quantised."""
    net, shift = Net(13), 128 if dtype == np.uint8 else 0

    def quantised(x, scale, zero):
        return net.quantised(x, scale, zero + shift, dtype)

    def fixed(array, scale, **attributes):
        zeros = np.zeros(np.shape(scale), array.dtype)
        pair = [net.constant(scale, np.float32), net.constant(zeros)]
        return net("DequantizeLinear", net.constant(array), *pair, **attributes)

    def conv(x, outputs, inputs, size, scale, step, zero, group=1, **attributes):
        own = net.rng.uniform(0.5, 1, outputs) / np.sqrt(inputs * size * size) / 64
        w = random_array(net.rng, np.int8, (outputs, inputs // group, size, size))
        b = net.rng.integers(-500, 500, outputs).astype(np.int32)
        operands = [net("Transpose", x, perm=[0, 3, 1, 2]), fixed(w, own, axis=0)]
        operands.append(fixed(b, np.float32(scale) * own.astype(np.float32), axis=0))
        x = net("Conv", *operands, auto_pad="SAME_UPPER", group=group, **attributes)
        return quantised(net("Transpose", x, perm=[0, 2, 3, 1]), step, zero)

    zero, six = net.constant(0, np.float32), net.constant(6, np.float32)
    x = quantised(net.input("x", np.float32, (1, 16, 16, 3)), 0.0303, -3)
    x = conv(x, 8, 3, 3, 0.0303, 0.0231, -128, strides=[2, 2])
    x = conv(x, 8, 8, 3, 0.0231, 0.0217, 2, group=8)
    y = quantised(net("Add", x, net.constant(3, np.float32)), 0.0313, -20)
    y = quantised(net("Clip", y, zero, six), 0.0235, -128)
    y = quantised(net("Mul", x, y), 0.0517, -100)
    y = quantised(net("Mul", y, net.constant(1 / 6, np.float32)), 0.0117, -100)
    x = quantised(net("Concat", x, y, axis=3), 0.0217, 2)
    x = quantised(net("Pad", x, net.ints(0, 0, 0, 0, 0, 1, 1, 0)), 0.0217, 2)
    x = conv(x, 12, 16, 1, 0.0217, 0.0313, 4)
    x = quantised(net("ReduceMean", x, axes=[1, 2], keepdims=0), 0.0203, 3)
    w = random_array(net.rng, np.int8, (12, 10))
    x = quantised(net("MatMul", x, fixed(w, np.float32(0.004))), 0.0503, 4)
    x = quantised(net("Softmax", x, axis=-1), 1 / 256, -128)
    run(net.float_output(x), tmp_path, least=0.9, host=["Softmax"])


# TensorRT -----------------------------------------------------------------------------------------


def test_quantised_in_front_of_products_only(tmp_path):
    """Normalisation and clamp behind the convolution, a maximum, a residual branch that alone has a
    scale."""
    net = Net(17)

    def conv(x, outputs, inputs, size):
        w = net.constant(random_array(net.rng, np.int8, (outputs, inputs, size, size)))
        pair = [net.constant(np.full(outputs, 0.004), np.float32), net.constant([0] * outputs)]
        pair[1] = net.constant(np.zeros(outputs), np.int8)
        w = net("DequantizeLinear", w, *pair, axis=0)
        return net("Conv", x, w, pads=[size // 2] * 4)

    x = conv(net.quantised(net.input("x", np.float32, (1, 3, 16, 16)), 0.0303, 0), 16, 3, 3)
    ranges = ((0.5, 1.5), (-0.2, 0.2), (-0.2, 0.2), (0.5, 1.5))
    given = [net.constant(net.rng.uniform(*r, 16), np.float32) for r in ranges]
    x = net("Relu", net("BatchNormalization", x, *given))
    x = net("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    a, b = (net.quantised(x, 0.0231, 0) for _ in range(2))
    y = net.quantised(net("Relu", conv(a, 16, 16, 3)), 0.0313, 0)
    y = net.quantised(net("Relu", net("Add", conv(y, 16, 16, 1), b)), 0.0513, 0)
    run(net.float_output(y), tmp_path, least=0.9)


# onnxruntime --------------------------------------------------------------------------------------


def vision_model() -> onnx.ModelProto:
    """Float: convolutions, SiLU, a branch, tokens with class token and positional embedding, a
    mixing product, their mean."""
    net = Net(17)
    x = net.input("x", np.float32, (1, 3, 16, 16))
    x = net("Conv", x, net.normal(16, 3, 3, 3, scale=0.2), net.normal(16), pads=[1] * 4)
    x = net("Mul", x, net("Sigmoid", x))
    a, b = net("Split", x, net.ints(8, 8), axis=1), "half"
    net.nodes[-1].output.append(b)
    a = net("Conv", a, net.normal(8, 8, 3, 3, scale=0.1), net.normal(8), pads=[1] * 4)
    x = net("Concat", net("Relu", a), b, axis=1)
    x = net("Conv", x, net.normal(24, 16, 4, 4, scale=0.06), net.normal(24), strides=[4, 4])
    x = net("Transpose", net("Reshape", x, net.ints(0, 24, 16)), perm=[0, 2, 1])
    x = net("Add", net("Concat", net.normal(1, 1, 24), x, axis=1), net.normal(1, 17, 24))
    y = net("Relu", net("Add", net("MatMul", x, net.normal(24, 24, scale=0.2)), net.normal(24)))
    x = net("ReduceMean", net("Add", x, y), axes=[1], keepdims=0)
    x = net("Gemm", x, net.normal(10, 24, scale=0.2), net.normal(10), transB=1)
    return net.float_output(x)


class Samples(quantization.CalibrationDataReader):
    def __init__(self):
        rng = np.random.default_rng(0)
        self.left = [rng.normal(size=(1, 3, 16, 16)).astype(np.float32) for _ in range(4)]

    def get_next(self):
        return {"x": self.left.pop()} if self.left else None


TYPES = {"int8": quantization.QuantType.QInt8, "uint8": quantization.QuantType.QUInt8}
PAIRS = {"AddQDQPairToWeight": True, "DedicatedQDQPair": True}


@pytest.mark.parametrize("form", ["QDQ", "QOperator"])
@pytest.mark.parametrize(
    "activations, weights, channelwise, options",
    [
        ("uint8", "int8", False, {}),
        ("uint8", "uint8", False, {}),
        ("int8", "int8", True, {}),
        ("int8", "int8", True, PAIRS),
    ],
)
def test_quantize_static(form, activations, weights, channelwise, options, tmp_path):
    onnx.save(vision_model(), tmp_path / "float.onnx")
    quantization.quantize_static(
        tmp_path / "float.onnx",
        tmp_path / "int8.onnx",
        Samples(),
        quant_format=getattr(quantization.QuantFormat, form),
        activation_type=TYPES[activations],
        weight_type=TYPES[weights],
        per_channel=channelwise,
        extra_options=options,
    )
    run(onnx.load(tmp_path / "int8.onnx"), tmp_path, least=0.7)
