"""Windows of more than 63 rows or columns, against onnxruntime, and compiled."""

import numpy as np
import onnx
import pytest

from systole.isa import Config
from systole.sw.compiler.partition import place
from systole.sw.golden import model as golden
from systole.sw.ir.graph import Conv, MatMul, Pool, Select
from systole.sw.session.backends import open_device
from tests.helpers.layer_checks import check_on
from tests.helpers.operator_models import DTYPES, Build, check, ints, node
from tests.helpers.random_models import random_array


def _compiled(graph):
    """Runs the graph on the command-level simulator, which must give the golden model's bits."""
    rng = np.random.default_rng(1)
    inputs = {
        p.tensor: rng.integers(-128, 128, graph.tensors[p.tensor].shape).astype(np.int8)
        for p in graph.inputs
    }
    with open_device("commands", Config(), memory_bytes=64 << 20) as device:
        check_on(device, Config(), graph, inputs, golden.run(graph, inputs))


AVERAGES = {
    "image": ((2, 5, 80, 80), node("GlobalAveragePool")),
    "no factors": ((1, 20, 197), node("GlobalAveragePool")),
    "rows": ((1, 5, 70, 6), node("ReduceMean", ints(2))),
    "channels last": ((1, 80, 66, 5), node("ReduceMean", ints(1, 2), keepdims=0)),
    "strided": ((2, 5, 3, 100), node("AveragePool", kernel_shape=[1, 75], strides=[1, 15])),
    "padded": (
        (1, 5, 80, 9),
        node("AveragePool", kernel_shape=[70, 3], pads=[9, 1, 9, 1], count_include_pad=1),
    ),
    "dilated": (
        (1, 5, 140, 5),
        node("AveragePool", kernel_shape=[65, 2], dilations=[2, 1], strides=[3, 1]),
    ),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", AVERAGES)
def test_average_is_rounded_once(name, dtype, tmp_path):
    """Its result spreads over most of int8: an average of rounded averages is off by one in many
    elements, of which the check allows one in a thousand."""
    shape, step = AVERAGES[name]
    model = Build(dtype)
    graph = check(model.end(step(model, model.x("x", shape)), scale=0.0031), tmp_path)
    assert any(isinstance(op, MatMul) for op in graph.ops)
    _compiled(graph)


def test_average_whose_windows_count_differently(tmp_path):
    """Padding that does not count: the host averages it."""
    model = Build(np.int8)
    step = node("AveragePool", kernel_shape=[70, 1], pads=[9, 0, 9, 0])
    onnx.save(model.end(step(model, model.x("x", (1, 4, 80, 4)))), tmp_path / "model.onnx")
    (reason,) = {p.rule for p in place(tmp_path / "model.onnx") if p.op_type == "AveragePool"}
    assert reason == "kernel_shape = [70, 1] exceeds 63"


MAXIMA = {
    "image": ((2, 5, 80, 80), node("GlobalMaxPool")),
    "signal": ((1, 20, 197), node("GlobalMaxPool")),
    "rows": ((1, 5, 70, 6), node("ReduceMax", ints(2))),
    "strided": ((2, 5, 3, 300), node("MaxPool", kernel_shape=[1, 130], strides=[1, 15])),
    "dense": ((1, 5, 90, 80), node("MaxPool", kernel_shape=[67, 71], pads=[9, 1, 40, 70])),
    "dilated": (
        (1, 5, 200, 5),
        node("MaxPool", kernel_shape=[65, 2], dilations=[3, 1], strides=[2, 1]),
    ),
    "one window": ((1, 5, 150, 4), node("MaxPool", kernel_shape=[64, 1], strides=[90, 1])),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MAXIMA)
def test_maximum_in_two_steps(name, dtype, tmp_path):
    shape, step = MAXIMA[name]
    model = Build(dtype)
    graph = check(model.end(step(model, model.x("x", shape)), 0.0371, 3), tmp_path, exact=True)
    assert [type(op) for op in graph.ops] == [Pool, Pool]
    _compiled(graph)


CONVOLUTIONS = {
    "row": ((1, 5, 1, 100), (6, 5, 1, 80), {"strides": [1, 3]}),
    "padded": ((2, 5, 3, 90), (6, 5, 1, 80), {"pads": [0, 40, 0, 39]}),
    "image": ((1, 3, 70, 66), (4, 3, 68, 65), {}),
    "groups": ((1, 4, 2, 150), (6, 2, 1, 70), {"group": 2, "dilations": [1, 2]}),
    "depthwise": ((1, 5, 2, 150), (5, 1, 2, 129), {"group": 5}),
    "signal": ((1, 5, 300), (6, 5, 201), {"strides": [7]}),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_in_blocks(name, dtype, tmp_path):
    shape, kernel, attributes = CONVOLUTIONS[name]
    model = Build(dtype)
    w = random_array(np.random.default_rng(0), np.int8, kernel)
    w = model.dq(model.const("w", w), 0.0013, np.int8(0))
    model = model.end(model.node("Conv", [model.x("x", shape), w], "c", **attributes))
    graph = check(model, tmp_path)
    assert [type(op) for op in graph.ops] == [Select, Conv]
    _compiled(graph)
