"""Published networks as their exporters write them, float and with seeded random weights, for what
depends on structure alone: how long they take to load, place and compile."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from systole.sw.zoo.classifiers import MOBILENETV2

OPSET = 17
END = np.iinfo(np.int64).max


class Net:
    """A float network in the making; values are known by name."""

    def __init__(self, shape: Sequence[int], seed: int = 0):
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]

    def const(self, array: np.ndarray | float | list[int]) -> str:
        name = f"c{len(self.constants)}"
        array = np.asarray(array)
        if array.dtype == np.float64:
            array = array.astype(np.float32)
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def random(self, *shape: int, deviation: float = 1.0, mean: float = 0.0) -> str:
        return self.const(self.rng.normal(mean, deviation, shape))

    def op(self, op_type: str, *inputs: str, outputs: int = 1, **attributes) -> list[str]:
        at = len(self.nodes)
        names = [f"{op_type}_{at}_{i}" for i in range(outputs)]
        node = helper.make_node(op_type, inputs, names, name=f"{op_type}_{at}", **attributes)
        self.nodes.append(node)
        return names

    def __call__(self, op_type: str, *inputs: str, **attributes) -> str:
        (result,) = self.op(op_type, *inputs, **attributes)
        return result

    def conv(
        self, x: str, into: int, outputs: int, kernel: int = 1, stride: int = 1, group: int = 1
    ) -> str:
        """A convolution with a bias, padded as PyTorch has it."""
        fan_in = into // group * kernel * kernel
        weights = self.random(outputs, into // group, kernel, kernel, deviation=fan_in**-0.5)
        return self(
            "Conv",
            x,
            weights,
            self.random(outputs, deviation=0.1),
            kernel_shape=[kernel] * 2,
            strides=[stride] * 2,
            pads=[kernel // 2] * 4,
            group=group,
        )

    def norm(self, x: str, width: int) -> str:
        """LayerNormalization over the last axis."""
        gain, offset = self.random(width, mean=1, deviation=0.1), self.random(width, deviation=0.1)
        return self("LayerNormalization", x, gain, offset, axis=-1, epsilon=1e-5)

    def dense(self, x: str, into: int, outputs: int, bias: bool = True) -> str:
        """A product with a constant matrix, as PyTorch exports a Linear of three dimensions."""
        y = self("MatMul", x, self.random(into, outputs, deviation=into**-0.5))
        return self("Add", self.random(outputs, deviation=0.1), y) if bias else y

    def reshape(self, x: str, *shape: int) -> str:
        return self("Reshape", x, self.const(list(shape)))

    def slice(self, x: str, axis: int, start: int, end: int, step: int = 1) -> str:
        return self("Slice", x, *(self.const([v]) for v in (start, end, axis, step)))

    def model(self, *outputs: str) -> onnx.ModelProto:
        infos = [helper.make_empty_tensor_value_info(name) for name in outputs]
        graph = helper.make_graph(self.nodes, "net", self.inputs, infos, self.constants)
        opset = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(graph, opset_imports=opset, ir_version=8)
        return onnx.shape_inference.infer_shapes(model, data_prop=True)


def densenet121(size: int = 224) -> onnx.ModelProto:
    """DenseNet-121 (arXiv 1608.06993) as PyTorch exports it: normalisation in front of the first
    convolution of each layer, folded into the first where it is behind one."""
    net = Net((1, 3, size, size))
    x = net("Relu", net.conv("x", 3, 64, kernel=7, stride=2))
    x = net("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    width = 64
    for block, depth in enumerate((6, 12, 24, 16)):
        if block:
            x = net.conv(_normalised(net, x, width), width, width // 2)
            x = net("AveragePool", x, kernel_shape=[2, 2], strides=[2, 2])
            width //= 2
        parts = [x]
        for _ in range(depth):
            together = net("Concat", *parts, axis=1)
            y = net("Relu", net.conv(_normalised(net, together, width), width, 128))
            parts.append(net.conv(y, 128, 32, kernel=3))
            width += 32
        x = net("Concat", *parts, axis=1)
    x = net("GlobalAveragePool", _normalised(net, x, width))
    x = net("Flatten", x, axis=1)
    weights = net.random(1000, width, deviation=width**-0.5)
    return net.model(net("Gemm", x, weights, net.random(1000), transB=1))


def _normalised(net: Net, x: str, width: int) -> str:
    """BatchNormalization and Relu."""
    gain, offset = net.random(width, mean=1, deviation=0.1), net.random(width, deviation=0.1)
    mean, variance = net.random(width, deviation=0.1), net.const(net.rng.uniform(0.5, 1.5, width))
    return net("Relu", net("BatchNormalization", x, gain, offset, mean, variance))


WINDOW = 7


def swin(
    size: int = 224, width: int = 96, depths: Sequence[int] = (2, 2, 6, 2), heads: int = 3
) -> onnx.ModelProto:
    """Swin (arXiv 2103.14030), by default Swin-T, as PyTorch exports it: every other block attends
    in windows shifted by half of one. ``heads`` of the first stage, twice as many in each next."""
    net = Net((1, 3, size, size))
    weights = net.random(width, 3, 4, 4, deviation=48**-0.5)
    x = net("Conv", "x", weights, net.random(width), kernel_shape=[4, 4], strides=[4, 4])
    x = net.norm(net("Transpose", x, perm=[0, 2, 3, 1]), width)
    side = size // 4
    for stage, depth in enumerate(depths):
        if stage:
            x = _merged(net, x, side, width)
            side, width, heads = side // 2, 2 * width, 2 * heads
        for number in range(depth):
            shift = WINDOW // 2 if number % 2 and side > WINDOW else 0
            x = _swin_block(net, x, side, width, heads, shift)
    x = net.norm(x, width)
    x = net("ReduceMean", x, axes=[1, 2], keepdims=0)
    weights = net.random(1000, width, deviation=width**-0.5)
    return net.model(net("Gemm", x, weights, net.random(1000), transB=1))


def _merged(net: Net, x: str, side: int, width: int) -> str:
    """Every four neighbours as one of twice the width."""
    x = net.reshape(x, 1, side // 2, 2, side // 2, 2, width)
    x = net.reshape(
        net("Transpose", x, perm=[0, 1, 3, 4, 2, 5]), 1, side // 2, side // 2, 4 * width
    )
    return net.dense(net.norm(x, 4 * width), 4 * width, 2 * width, bias=False)


def _swin_block(net: Net, x: str, side: int, width: int, heads: int, shift: int) -> str:
    """Attention in windows and a perceptron, each with a residual sum."""
    windows, places = side // WINDOW, WINDOW * WINDOW
    y = _rolled(net, net.norm(x, width), shift)
    y = net.reshape(y, 1, windows, WINDOW, windows, WINDOW, width)
    y = net.reshape(net("Transpose", y, perm=[0, 1, 3, 2, 4, 5]), -1, WINDOW, WINDOW, width)
    y = _window_attention(net, net.reshape(y, -1, places, width), windows, width, heads, shift)
    y = net.reshape(
        net.reshape(y, -1, WINDOW, WINDOW, width), -1, windows, windows, WINDOW, WINDOW, width
    )
    y = net.reshape(net("Transpose", y, perm=[0, 1, 3, 2, 4, 5]), -1, side, side, width)
    y = net.slice(net.slice(y, 1, 0, side), 2, 0, side)
    x = net.reshape(net("Add", x, _rolled(net, y, -shift)), 1, -1, width)
    y = net.dense(net.norm(x, width), width, 4 * width)
    y = net.dense(_gelu(net, y), 4 * width, width)
    return net.reshape(net("Add", x, y), 1, side, side, width)


def _rolled(net: Net, x: str, shift: int) -> str:
    """Rows and columns moved up by ``shift``, around the edge."""
    for axis in (1, 2) if shift else ():
        x = net("Concat", net.slice(x, axis, shift, END), net.slice(x, axis, 0, shift), axis=axis)
    return x


def _window_attention(net: Net, x: str, windows: int, width: int, heads: int, shift: int) -> str:
    """Attention among the places of each window of ``x`` (windows, places, width)."""
    count, places, size = windows * windows, WINDOW * WINDOW, width // heads
    qkv = net.reshape(net.dense(x, width, 3 * width), count, places, 3, heads, size)
    qkv = net("Transpose", qkv, perm=[2, 0, 3, 1, 4])
    parts = net.op("Split", qkv, net.const([1, 1, 1]), outputs=3, axis=0)
    q, k, v = (net("Squeeze", part, net.const([0])) for part in parts)
    q = net("Mul", q, net.const(size**-0.5))
    scores = net("MatMul", q, net("Transpose", k, perm=[0, 1, 3, 2]))
    scores = net("Add", scores, net.random(1, heads, places, places))
    if shift:
        scores = net.reshape(scores, -1, count, heads, places, places)
        scores = net("Add", scores, net.const(_shift_mask(windows, shift)))
        scores = net.reshape(scores, -1, heads, places, places)
    y = net("MatMul", net("Softmax", scores, axis=-1), v)
    y = net.reshape(net("Transpose", y, perm=[0, 2, 1, 3]), count, places, -1)
    return net.dense(y, width, width)


def _shift_mask(windows: int, shift: int) -> np.ndarray:
    """-100 for places of a window (1, windows, 1, places, places) that are no neighbours in the
    picture."""
    side = windows * WINDOW
    bands = (slice(0, side - WINDOW), slice(side - WINDOW, side - shift), slice(side - shift, side))
    region = np.zeros((side, side))
    for i, rows in enumerate(bands):
        for j, columns in enumerate(bands):
            region[rows, columns] = 3 * i + j
    by_window = region.reshape(windows, WINDOW, windows, WINDOW).transpose(0, 2, 1, 3)
    places = by_window.reshape(windows * windows, 1, WINDOW * WINDOW)
    mask = np.where(places != places.transpose(0, 2, 1), -100.0, 0.0)
    return mask[None, :, None]


def _gelu(net: Net, x: str) -> str:
    one = net("Add", net("Erf", net("Div", x, net.const(math.sqrt(2)))), net.const(1.0))
    return net("Mul", net("Mul", x, one), net.const(0.5))


KEYPOINTS = 17


def movenet(size: int = 192) -> onnx.ModelProto:
    """Like MoveNet Lightning: MobileNetV2 with a feature pyramid to a quarter of the picture, four
    heads, and the search for the keypoints of the person nearest to the middle, by gathers."""
    net = Net((1, 3, size, size))
    x, width, levels = net("Clip", net.conv("x", 3, 32, 3, 2), *_six(net)), 32, {}
    for expansion, outputs, depth, stride in MOBILENETV2[:-1]:
        for i in range(depth):
            y = _inverted(net, x, width, outputs, expansion, 1 if i else stride)
            x, width = (net("Add", x, y) if i else y), outputs
        levels[outputs] = x
    x = net.conv(levels[160], 160, 64)
    for channels in (64, 32, 24):
        x = net(
            "Resize", x, "", net.const(np.array([1, 1, 2, 2], np.float32)), mode="linear",
            coordinate_transformation_mode="half_pixel",
        )  # fmt: skip
        x = net("Add", x, net.conv(levels[channels], channels, 64))
        x = net("Relu", net.conv(net.conv(x, 64, 64, 3, group=64), 64, 64 if channels > 24 else 24))
    heads = {}
    for name, outputs in (("heat", KEYPOINTS), ("centre", 1), ("regress", 34), ("offset", 34)):
        y = net("Relu", net.conv(net.conv(x, 24, 24, 3, group=24), 24, 96))
        heads[name] = net("Transpose", net.conv(y, 96, outputs), perm=[0, 2, 3, 1])
    return net.model(_keypoints(net, heads, size // 4))


def _six(net: Net) -> tuple[str, str]:
    return net.const(0.0), net.const(6.0)


def _inverted(net: Net, x: str, width: int, outputs: int, expansion: int, stride: int) -> str:
    """An inverted residual without its sum."""
    if expansion > 1:
        x = net("Clip", net.conv(x, width, expansion * width), *_six(net))
    inner = expansion * width
    x = net("Clip", net.conv(x, inner, inner, 3, stride, group=inner), *_six(net))
    return net.conv(x, inner, outputs)


def _keypoints(net: Net, heads: dict[str, str], side: int) -> str:
    """Rows, columns and scores (1, 1, KEYPOINTS, 3): the person's middle, the keypoints regressed
    from there, and near each of these the best of its heat map, with its offset."""
    rows, columns = np.mgrid[:side, :side].astype(np.float32)
    near = 1 / (np.hypot(rows - side / 2, columns - side / 2) + 1)
    middle = net("Mul", net("Sigmoid", heads["centre"]), net.const(near[None, :, :, None]))
    y, x = _best(net, middle, side, 1)
    place = net("Concat", net.const(np.zeros((1, 1), np.int64)), y, x, axis=1)
    coordinates = net.reshape(net("GatherND", heads["regress"], place), 1, 2, KEYPOINTS)
    distances = []
    for axis, (start, grid) in enumerate(((y, rows), (x, columns))):
        own = net("Squeeze", net.slice(coordinates, 1, axis, axis + 1), net.const([1]))
        own = net("Add", own, net("Cast", start, to=TensorProto.FLOAT))
        own = net.reshape(own, 1, 1, 1, KEYPOINTS)
        far = net("Sub", net.const(grid[None, :, :, None]), own)
        distances.append(net("Mul", far, far))
    far = net("Add", net("Sqrt", net("Add", *distances)), net.const(1.8))
    heat = net("Sigmoid", heads["heat"])
    y, x = _best(net, net("Div", heat, far), side, KEYPOINTS)
    zero = net.const(np.zeros((KEYPOINTS, 1), np.int64))
    which = net.const(np.arange(KEYPOINTS)[:, None])
    y, x = (net.reshape(v, KEYPOINTS, 1) for v in (y, x))
    offsets = net.reshape(heads["offset"], 1, side, side, KEYPOINTS, 2)
    moved = net("GatherND", offsets, net("Concat", zero, y, x, which, axis=1))
    places = net("Cast", net("Concat", y, x, axis=1), to=TensorProto.FLOAT)
    found = net("Mul", net("Add", places, moved), net.const(1 / side))
    score = net("GatherND", heat, net("Concat", zero, y, x, which, axis=1))
    found = net("Concat", found, net.reshape(score, KEYPOINTS, 1), axis=1)
    return net.reshape(found, 1, 1, KEYPOINTS, 3)


def _best(net: Net, heat: str, side: int, maps: int) -> tuple[str, str]:
    """Row and column of the greatest element of each of the ``maps`` of ``heat``, int64 (1,
    maps)."""
    best = net("ArgMax", net.reshape(heat, 1, side * side, maps), axis=1, keepdims=0)
    row = net("Div", best, net.const(np.array(side)))
    return row, net("Sub", best, net("Mul", row, net.const(np.array(side))))
