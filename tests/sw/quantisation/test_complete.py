"""Partly quantised models: what is quantised stays, what is float is quantised."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import systole
from systole.sw.compiler.partition import place
from systole.sw.frontend.inputs import InputError
from systole.sw.frontend.passes.values import ADVICE
from systole.sw.ir.graph import ModelError
from systole.sw.quantisation.pipeline import QuantisationOptions, quantise_model
from systole.sw.quantisation.prepare import exposed

X = np.random.default_rng(4).normal(size=(24, 1, 4, 8, 8)).astype(np.float32)


class Net:
    """A float network; ``float_names`` are the nodes to be left in float at first."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(3)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.float_names: list[str] = []
        self.leave = False

    def constant(self, *shape: int, gain: float = 0.3) -> str:
        spread = np.geomspace(0.2, 3, shape[0]).reshape(-1, *(1,) * (len(shape) - 1))
        array = gain * self.rng.normal(size=shape) * spread
        return self.given(array.astype(np.float32))

    def given(self, array: np.ndarray) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def add(self, op_type: str, *operands: str, **attributes) -> str:
        name = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, operands, [name], name=name, **attributes))
        if self.leave:
            self.float_names.append(name)
        return name

    def save(self, path: Path, *results: str) -> Path:
        graph = helper.make_graph(
            self.nodes,
            "net",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, X.shape[1:])],
            [helper.make_empty_tensor_value_info(name) for name in results],
            self.constants,
        )
        opset = [helper.make_opsetid("", 20)]
        onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), path)
        return path


def gemm(net: Net, x: str, across: bool = False) -> str:
    x = net.add("Flatten", x)
    w = net.constant(10, 512) if across else net.constant(512, 10)
    return net.add("Gemm", x, w, net.constant(10, gain=1), transB=int(across))


def several(net: Net, x: str) -> str:
    """Layers that share a bias, a clamp and a function between them, and a sum."""
    bias = net.constant(8, gain=1)
    a = net.add("Relu", net.add("Conv", x, net.constant(8, 8, 1, 1), bias))
    b = net.add("Sigmoid", net.add("Conv", x, net.constant(8, 8, 1, 1), bias))
    pooled = net.add("MaxPool", net.add("Add", a, b), kernel_shape=[2, 2], strides=[2, 2])
    return net.add("Conv", pooled, net.constant(4, 8, 3, 3), bias_of(net))


def bias_of(net: Net) -> str:
    return net.constant(4, gain=1)


TAILS = {
    "gemm": gemm,
    "gemm across": lambda net, x: gemm(net, x, across=True),
    "matmul": lambda net, x: net.add("MatMul", net.add("Flatten", x), net.constant(512, 10)),
    "product of rank 4": lambda net, x: net.add("MatMul", x, net.constant(8, 6)),
    "conv": lambda net, x: net.add("Conv", x, net.constant(5, 8, 3, 3), net.constant(5)),
    "depthwise": lambda net, x: net.add("Conv", x, net.constant(8, 1, 3, 3), group=8),
    "transposed": lambda net, x: net.add(
        *("ConvTranspose", x, net.constant(8, 6, 2, 2), net.constant(6)), strides=[2, 2]
    ),
    "transposed in groups": lambda net, x: net.add(
        *("ConvTranspose", x, net.constant(8, 3, 2, 2), net.constant(6)), strides=[2, 2], group=2
    ),
    "leaky": lambda net, x: net.add(
        "LeakyRelu", net.add("Conv", x, net.constant(5, 8, 3, 3), net.constant(5)), alpha=0.1
    ),
    "pooled": lambda net, x: net.add("GlobalAveragePool", x),
    "several": several,
}


def partly(path: Path, tail: str) -> Path:
    """A network whose first two layers are quantised, and whose last are not."""
    net = Net()
    first = net.add("Conv", "x", net.constant(8, 4, 3, 3), net.constant(8), pads=[1] * 4)
    second = net.add("Conv", net.add("Relu", first), net.constant(8, 8, 3, 3), pads=[1] * 4)
    x = net.add("HardSwish", second)
    net.leave = True
    file = net.save(path / "float.onnx", TAILS[tail](net, x))
    model = quantise_model(file, {"x": X}, QuantisationOptions(exclude=net.float_names))
    onnx.save(model, path / "partly.onnx")
    return path / "partly.onnx"


def constants(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}


def on_host(path: Path) -> list[str]:
    return [str(p) for p in place(path) if p.host]


def snr(real: np.ndarray, other: np.ndarray) -> float:
    return 10 * np.log10((real**2).sum() / ((real - other) ** 2).sum())


@pytest.mark.parametrize("tail", TAILS)
def test_float_layers_behind_quantised_ones(tail, tmp_path):
    path = partly(tmp_path, tail)
    assert on_host(path)
    whole = quantise_model(path, {"x": X})
    onnx.save(whole, tmp_path / "whole.onnx")
    assert not on_host(tmp_path / "whole.onnx")
    before, after = onnx.load(path), constants(whole)
    for node in before.graph.node:
        if node.op_type == "QuantizeLinear":
            for name in node.input[1:]:
                np.testing.assert_array_equal(after[name], constants(before)[name])
    kept = [node.output[0] for node in before.graph.node if node.op_type == "QuantizeLinear"]
    run, reference = exposed(whole, kept), exposed(before, kept)
    name = before.graph.output[0].name
    real, ours = exposed(before, [name]), exposed(whole, [name])
    results = []
    for x in X:
        for mine, theirs in zip(run({"x": x}), reference({"x": x}), strict=True):
            np.testing.assert_array_equal(mine, theirs)
        results.append((real({"x": x})[0], ours({"x": x})[0]))
    assert snr(*(np.stack(r) for r in zip(*results, strict=True))) > 28
    report = systole.run(whole, X[0], simulator="commands").report
    assert report.golden_mismatches == 0


class Converted(Net):
    """A network with quantisation written out, as PyTorch exports it: uint8 activations."""

    def pair(self, x: str, scale: float, zero: int) -> str:
        names = [self.given(np.array(scale, np.float32)), self.given(np.array(zero, np.uint8))]
        return self.add("DequantizeLinear", self.add("QuantizeLinear", x, *names), *names)

    def weights(self, *shape: int) -> str:
        codes = self.given(self.rng.integers(-127, 128, shape).astype(np.int8))
        scale = self.given(self.rng.uniform(0.001, 0.004, shape[0]).astype(np.float32))
        zero = self.given(np.zeros(shape[0], np.int8))
        return self.add("DequantizeLinear", codes, scale, zero, axis=0)


def test_results_left_unquantised_by_an_export(tmp_path):
    """Weights are int8, but nothing stands between Relu and mean, or behind the last layer."""
    net = Converted()
    x = net.pair("x", 0.03, 120)
    conv = net.add("Conv", x, net.weights(8, 4, 3, 3), net.constant(8))
    middle = net.add("ReduceMean", net.add("Relu", conv), net.given(np.array([2, 3])), keepdims=0)
    last = net.add("Gemm", net.pair(middle, 0.003, 0), net.weights(5, 8), net.constant(5), transB=1)
    path = net.save(tmp_path / "net.onnx", last)
    assert len(on_host(path)) > 3
    whole = quantise_model(path, {"x": X})
    onnx.save(whole, path)
    assert not on_host(path)
    before, after = {i.name: i for i in net.constants}, {i.name: i for i in whole.graph.initializer}
    changed = {name for name in before if name not in after or before[name] != after[name]}
    biases = {node.input[2] for node in net.nodes if node.op_type in ("Conv", "Gemm")}
    assert changed == biases  # float, now int32
    added = [i for name, i in after.items() if name not in before]
    zeros = [i for i in added if i.name.startswith((conv, last, "t")) and "zero" in i.name]
    assert zeros
    assert {i.data_type for i in zeros} == {TensorProto.UINT8}
    report = systole.run(whole, X[0], simulator="commands").report
    assert (report.golden_mismatches, report.host_reasons) == (0, [])


def test_a_result_that_is_quantised_elsewhere_has_that_scale(tmp_path):
    net = Converted()
    conv = net.add("Conv", net.pair("x", 0.03, 120), net.weights(8, 4, 1, 1))
    one = net.add("Flatten", net.pair(conv, 0.021, 130))
    other = net.add("Sigmoid", conv)
    path = net.save(tmp_path / "net.onnx", one, other)
    whole = quantise_model(path, {"x": X})
    scales = [numpy_helper.to_array(i).item() for i in whole.graph.initializer if not i.dims]
    sigmoid = next(node for node in whole.graph.node if node.op_type == "Sigmoid")
    source = next(node for node in whole.graph.node if sigmoid.input[0] in node.output)
    assert constants(whole)[source.input[1]] == np.float32(0.021)
    assert len([s for s in scales if isinstance(s, float)]) == 3  # x, the result, the sigmoid
    onnx.save(whole, path)
    assert not on_host(path)


def test_normalisation_is_folded_into_float_layers_only(tmp_path):
    net = Converted()
    norm = [net.given(np.linspace(0.5, 1.5, 4).astype(np.float32)) for _ in range(4)]
    x = net.pair(net.add("BatchNormalization", net.pair("x", 0.03, 120), *norm), 0.04, 120)
    conv = net.add("Conv", x, net.constant(8, 4, 3, 3))
    more = [net.given(np.linspace(0.5, 1.5, 8).astype(np.float32)) for _ in range(4)]
    path = net.save(tmp_path / "net.onnx", net.add("BatchNormalization", conv, *more))
    whole = quantise_model(path, {"x": X})
    assert [n.op_type for n in whole.graph.node].count("BatchNormalization") == 1
    kept, real = exposed(whole, [x]), exposed(onnx.load(path), [x])
    np.testing.assert_array_equal(kept({"x": X[0]}), real({"x": X[0]}))
    onnx.save(whole, path)
    assert not on_host(path)


def test_what_is_kept_cannot_be_equalised(tmp_path):
    path = partly(tmp_path, "conv")
    for options, option in (
        (QuantisationOptions(equalise=True), "--equalise"),
        (QuantisationOptions(bias_correction=True), "--bias-correction"),
    ):
        message = f"{option} changes weights and biases"
        with pytest.raises(InputError, match=message):
            quantise_model(path, {"x": X}, options)


def test_nothing_left_to_quantise(tmp_path):
    path = partly(tmp_path, "conv")
    onnx.save(quantise_model(path, {"x": X}), path)
    with pytest.raises(
        ModelError, match=r"is quantised already: it holds .* and no float operator"
    ):
        quantise_model(path, {"x": X})


@pytest.mark.parametrize("tail", ["gemm", "leaky", "pooled", "several"])
def test_the_advice_of_a_report_is_true(tail, tmp_path):
    """A report that says to quantise what is still float says so where that helps."""
    path = partly(tmp_path, tail)
    causes = [p.rule for p in place(path) if p.host and p.because is None and not p.converts]
    assert causes
    assert all(ADVICE in cause for cause in causes), causes
