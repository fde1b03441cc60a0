"""Quantising float models: the steps on small networks, the whole on trained ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import typer
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from typer.testing import CliRunner

from systole.sw.cli.quantize import main
from systole.sw.frontend.inputs import InputError
from systole.sw.frontend.load import load
from systole.sw.ir.graph import ModelError
from systole.sw.quantisation.calibrate import activation_ranges
from systole.sw.quantisation.measure import layer_noise
from systole.sw.quantisation.pipeline import QuantisationOptions, quantise, quantise_model
from systole.sw.quantisation.prepare import input_shapes, prepare, session
from systole.sw.quantisation.samples import ArraySamples, Preprocessing, read_samples
from tests.helpers.marks import fewer_unless_long

SHARED = Path(__file__).resolve().parents[4] / "shared" / "models"
IMAGENET = (np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225]))
app = typer.Typer()
app.command()(main)


class Builder:
    """A float network, node by node; every weight drawn from one seed."""

    def __init__(self, shape: tuple[int | str, ...], seed: int = 1, opset: int = 13):
        self.rng = np.random.default_rng(seed)
        self.shape, self.opset = shape, opset
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.last = "x"

    def constant(self, array: np.ndarray) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def add(self, op_type: str, *others: np.ndarray | str, **attributes) -> Builder:
        """On the last result; ``others``: further operands."""
        names = [o if isinstance(o, str) else self.constant(o) for o in others]
        output = f"t{len(self.nodes)}"
        self.nodes.append(
            helper.make_node(op_type, [self.last, *names], [output], name=output, **attributes)
        )
        self.last = output
        return self

    def normal(self, *shape: int, gain: float = 1.0) -> np.ndarray:
        return (gain * self.rng.normal(size=shape)).astype(np.float32)

    def conv(self, outputs: int, inputs: int, size: int = 3, group: int = 1) -> Builder:
        w = self.normal(outputs, inputs // group, size, size)
        w *= np.float32(1 / np.sqrt(w[0].size))
        pad = size // 2
        return self.add("Conv", w, self.normal(outputs, gain=0.2), pads=[pad] * 4, group=group)

    def norm(self, channels: int) -> Builder:
        variance = self.rng.uniform(0.5, 2, channels).astype(np.float32)
        return self.add("BatchNormalization", *(self.normal(channels) for _ in range(3)), variance)

    def save(self, path: Path, outputs: tuple[str, ...] = (), element=TensorProto.FLOAT) -> Path:
        graph = helper.make_graph(
            self.nodes,
            "net",
            [helper.make_tensor_value_info("x", element, self.shape)],
            [helper.make_tensor_value_info(o, element, None) for o in outputs or (self.last,)],
            self.constants,
        )
        opsets = [helper.make_opsetid("", self.opset)]
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
        return path


def outputs(model: onnx.ModelProto | Path, x: np.ndarray) -> np.ndarray:
    """Of each row of ``x``, a batch of 1."""
    if isinstance(model, Path):
        model = onnx.load(model)
    run = session(model)
    name = run.get_inputs()[0].name
    return np.concatenate([run.run(None, {name: row[None]})[0] for row in x])


def snr(expected: np.ndarray, actual: np.ndarray) -> float:
    noise = ((expected - actual) ** 2).sum(dtype=float)
    return float(10 * np.log10((expected**2).sum(dtype=float) / max(noise, 1e-30)))


def kinds(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


@pytest.fixture
def small(tmp_path) -> Path:
    """Conv, BatchNormalization, Relu, pool, Gemm, Softmax; an open batch."""
    net = Builder(("N", 3, 8, 8)).conv(8, 3).norm(8).add("Relu").add("GlobalAveragePool")
    net.add("Flatten").add("Gemm", net.normal(8, 5), net.normal(5)).add("Softmax", axis=1)
    return net.save(tmp_path / "small.onnx")


@pytest.fixture
def pictures() -> np.ndarray:
    return np.random.default_rng(5).normal(size=(40, 3, 8, 8)).astype(np.float32)


# Preparing


def test_batch_norm_and_constants_fold(tmp_path, pictures):
    net = Builder(("N", 3, 8, 8)).conv(8, 3).norm(8).add("Identity").add("Dropout")
    net.add("Mul", net.normal(8, 1, 1)).add("Sub", net.normal(1, 8, 1, 1)).add("Relu")
    net.conv(4, 8, 1).add("Div", np.array([2, -4, 1, 3], np.float32).reshape(4, 1, 1))
    path = (
        net.add("Flatten")
        .add("MatMul", net.normal(256, 6, gain=0.1))
        .norm(6)
        .save(tmp_path / "net.onnx")
    )
    model = prepare(path)
    assert kinds(model) == ["Conv", "Relu", "Conv", "Flatten", "Gemm"]
    assert input_shapes(model) == {"x": (1, 3, 8, 8)}
    np.testing.assert_allclose(outputs(model, pictures), outputs(path, pictures), atol=1e-4)


def test_random_results_are_refused(tmp_path):
    """onnxruntime's optimiser would leave the Dropout out, whatever its mode."""
    net = Builder((1, 3, 8, 8)).conv(8, 3)
    net.add("Dropout", np.array(0.5, np.float32), np.array(True))
    with pytest.raises(ModelError, match=r"Dropout .*: training_mode is not false: its result is"):
        prepare(net.save(tmp_path / "net.onnx"))


def test_batch_norm_folds_past_reshape_and_gemm_factors(tmp_path):
    net = Builder((1, 4, 6, 1)).conv(5, 4, 1)
    net.add("Reshape", np.array([1, 5, 6])).norm(5).add("Reshape", np.array([1, 30]))
    net.add("Gemm", net.normal(7, 30), net.normal(1, 7), transB=1, alpha=0.5, beta=2.0)
    path = net.add("Mul", net.normal(7)).add("Add", net.normal(1, 7)).save(tmp_path / "net.onnx")
    model = prepare(path)
    assert kinds(model) == ["Conv", "Reshape", "Reshape", "Gemm"]
    x = np.random.default_rng(2).normal(size=(3, 4, 6, 1)).astype(np.float32)
    np.testing.assert_allclose(outputs(model, x), outputs(path, x), atol=1e-4)


def test_lone_batch_norm_becomes_depthwise(tmp_path, pictures):
    net = Builder((1, 3, 8, 8)).norm(3).add("Relu").conv(4, 3)
    path = net.save(tmp_path / "net.onnx")
    model = prepare(path)
    assert kinds(model) == ["Conv", "Relu", "Conv"]
    np.testing.assert_allclose(outputs(model, pictures), outputs(path, pictures), atol=1e-4)


def test_shared_results_are_not_folded(tmp_path, pictures):
    net = Builder((1, 3, 8, 8)).conv(4, 3)
    kept = net.last
    net.add("Mul", net.normal(4, 1, 1)).add("Add", kept)
    path = net.save(tmp_path / "net.onnx")
    model = prepare(path)
    np.testing.assert_allclose(outputs(model, pictures), outputs(path, pictures), atol=1e-4)


def test_opset_and_dims(tmp_path):
    net = Builder(("batch", 3, "height", "width"), opset=9).conv(4, 3).add("Relu")
    path = net.save(tmp_path / "net.onnx")
    model = prepare(path, {"height": 6, "x:3": 10})
    assert model.opset_import[0].version >= 13
    assert input_shapes(model) == {"x": (1, 3, 6, 10)}
    assert input_shapes(prepare(path, {"batch": 2}, (4, 5))) == {"x": (2, 3, 4, 5)}
    with pytest.raises(ModelError, match=r"dimension 2 is height; .* --dim height=N"):
        prepare(path)
    with pytest.raises(ModelError, match=r"no open dimension depth: the model's are .*height"):
        prepare(path, {"depth": 3})


# Quantising


def test_small_network(small, pictures):
    quantised = quantise_model(small, {"x": pictures})
    onnx.checker.check_model(quantised)
    assert snr(outputs(small, pictures), outputs(quantised, pictures)) > 25
    constants = {i.name: i for i in quantised.graph.initializer}
    producers = {name: n for n in quantised.graph.node for name in n.output}
    for node in quantised.graph.node:
        if node.op_type in ("Conv", "Gemm"):
            weights, bias = (producers[name] for name in node.input[1:3])
            assert constants[weights.input[0]].data_type == TensorProto.INT8
            assert list(constants[weights.input[1]].dims) == [8 if node.op_type == "Conv" else 5]
            assert constants[bias.input[0]].data_type == TensorProto.INT32
        elif node.op_type == "QuantizeLinear":
            assert constants[node.input[2]].data_type == TensorProto.INT8
    # Softmax works on, and gives, float numbers.
    assert kinds(quantised)[-2:] == ["DequantizeLinear", "Softmax"]
    assert quantised.graph.node[-1].output[0] == quantised.graph.output[0].name


@pytest.mark.parametrize("method", ["minmax", "entropy", "percentile"])
def test_methods(small, pictures, method):
    quantised = quantise_model(small, {"x": pictures}, QuantisationOptions(method=method))
    assert snr(outputs(small, pictures), outputs(quantised, pictures)) > 15


def test_percentile_cuts_outliers(small, pictures):
    pictures = pictures.copy()
    pictures[0, 0, 0, 0] = 1000
    model = prepare(small)
    samples = ArraySamples({"x": pictures}, input_shapes(model))
    assert activation_ranges(model, samples, "minmax", 99)["x"][1] == 1000
    assert activation_ranges(model, samples, "percentile", 99)["x"][1] < 30


def test_exclude(small, pictures):
    for exclude in ("Conv", "t0", "t2"):
        quantised = quantise_model(small, {"x": pictures}, QuantisationOptions(exclude=[exclude]))
        node = next(n for n in quantised.graph.node if n.op_type == "Conv")
        floats = {i.name for i in quantised.graph.initializer if i.data_type == TensorProto.FLOAT}
        assert (node.input[1] in floats) == (exclude != "t2")
    with pytest.raises(ModelError, match="--exclude nothing: no such node"):
        quantise_model(small, {"x": pictures}, QuantisationOptions(exclude=["nothing"]))


def test_dead_channels_keep_their_bias(tmp_path):
    """All-zero weights with a bias, and an input of large scale."""
    net = Builder((1, 2, 4, 4))
    w = net.normal(3, 2, 1, 1, gain=0.01)
    w[1] = 0
    path = net.add("Conv", w, np.array([0.1, 0.37, -0.2], np.float32)).save(tmp_path / "net.onnx")
    x = np.random.default_rng(3).uniform(0, 255, (8, 2, 4, 4)).astype(np.float32)
    expected, actual = outputs(path, x), outputs(quantise_model(path, {"x": x}), x)
    step = (expected.max() - expected.min()) / 255
    assert np.abs(expected[:, 1] - actual[:, 1]).max() <= step


@pytest.mark.parametrize("method", ["minmax", "entropy", "percentile"])
def test_zero_range(tmp_path, method):
    """A Relu that is never active on the samples stays a Relu on others."""
    net = Builder((1, 2, 4, 4))
    net.add("Conv", np.ones((3, 2, 1, 1), np.float32), np.zeros(3, np.float32)).add("Relu")
    path = net.conv(2, 3, 1).save(tmp_path / "net.onnx")
    x = np.random.default_rng(3).uniform(-1, 0, (8, 2, 4, 4)).astype(np.float32)
    quantised = quantise_model(path, {"x": x}, QuantisationOptions(method=method))
    np.testing.assert_allclose(outputs(quantised, x), outputs(path, x), atol=0.01)
    silent = quantise_model(path, {"x": 0 * x}, QuantisationOptions(method=method))
    np.testing.assert_allclose(outputs(silent, 0 * x), outputs(path, 0 * x), atol=0.01)


@pytest.mark.parametrize("first", ["Pad", "MaxPool", "AveragePool"])
def test_computing_on_the_input(tmp_path, pictures, first):
    net = Builder((1, 3, 8, 8))
    if first == "Pad":
        net.add("Pad", np.array([0, 0, 1, 1, 0, 0, 1, 1])).add("Relu")
    else:
        net.add(first, kernel_shape=[2, 2])
    quantised = quantise_model(net.conv(4, 3).save(tmp_path / "net.onnx"), {"x": pictures})
    producers = {name: n.op_type for n in quantised.graph.node for name in n.output}
    for node in quantised.graph.node:
        if node.op_type in (first, "Conv"):
            assert producers[node.input[0]] == "DequantizeLinear"


def test_result_loads(tmp_path, pictures):
    net = Builder(("N", 8, 8, 3)).add("Transpose", perm=[0, 3, 1, 2]).conv(8, 3).norm(8)
    net.add("Relu")
    kept = net.last
    net.conv(8, 8).add("Add", kept).add("Relu").add("MaxPool", kernel_shape=[2, 2], strides=[2, 2])
    net.conv(8, 8, group=8).add("Clip", np.float32(0), np.float32(6)).add("GlobalAveragePool")
    net.add("Flatten").add("MatMul", net.normal(8, 5)).add("Add", net.normal(5))
    path = net.save(tmp_path / "net.onnx")
    file = tmp_path / "int8.onnx"
    onnx.save(quantise_model(path, {"x": pictures.transpose(0, 2, 3, 1)}), file)
    graph = load(file)
    assert [type(op).__name__ for op in graph.ops].count("Conv") == 4


# Equalisation and bias correction


def badly_scaled(path: Path) -> Path:
    """Conv, depthwise, Conv whose channels differ in range by up to 1:1000, compensated after."""
    net = Builder((1, 3, 8, 8), seed=8)
    spread = (10.0 ** np.linspace(-3, 0, 16)).astype(np.float32)
    net.conv(16, 3).add("Relu").conv(16, 16, group=16).add("Relu").conv(8, 16, 1)
    first, first_bias, middle, middle_bias, last = (
        numpy_helper.to_array(c).copy() for c in net.constants[:5]
    )
    first *= spread.reshape(-1, 1, 1, 1)
    first_bias *= spread
    middle_bias *= spread
    last /= spread.reshape(1, -1, 1, 1)
    for i, array in enumerate((first, first_bias, middle, middle_bias, last)):
        net.constants[i].CopyFrom(numpy_helper.from_array(array, f"c{i}"))
    return net.save(path)


def test_equalisation(tmp_path, pictures):
    path = badly_scaled(tmp_path / "net.onnx")
    plain = quantise_model(path, {"x": pictures})
    model = prepare(path)
    samples = ArraySamples({"x": pictures}, input_shapes(model))
    reference, equalised = quantise(model, samples, QuantisationOptions(equalise=True))
    expected = outputs(path, pictures)
    np.testing.assert_allclose(outputs(reference, pictures), expected, rtol=1e-3, atol=1e-3)
    before = snr(expected, outputs(plain, pictures))
    after = snr(expected, outputs(equalised, pictures))
    assert before < 10
    assert after > 25


def test_equalisation_of_dense_layers_and_leaky_relu(tmp_path):
    net = Builder((1, 12), seed=4)
    spread = (10.0 ** np.linspace(-2, 0, 10)).astype(np.float32)
    net.add("Gemm", net.normal(12, 10) * spread, net.normal(10) * spread)
    net.add("LeakyRelu", alpha=0.1)
    net.add("Gemm", net.normal(6, 10) / spread, net.normal(6), transB=1)
    path = net.save(tmp_path / "net.onnx")
    x = np.random.default_rng(6).normal(size=(30, 12)).astype(np.float32)
    expected = outputs(path, x)
    plain = outputs(quantise_model(path, {"x": x}), x)
    equalised = outputs(quantise_model(path, {"x": x}, QuantisationOptions(equalise=True)), x)
    assert snr(expected, equalised) > snr(expected, plain) + 6


def test_bias_correction(tmp_path, pictures):
    """Depthwise layers of few, coarse weights: their mean error goes."""
    net = Builder((1, 3, 8, 8), seed=2).conv(16, 3).add("Relu")
    w = net.normal(16, 1, 3, 3, gain=0.01)
    w[:, 0, 0, 0] = 1
    net.add("Conv", w, group=16, pads=[1] * 4).add("Relu").conv(8, 16, 1)
    path = net.save(tmp_path / "net.onnx")
    shifted = pictures + 2
    expected = outputs(path, shifted)
    errors = {
        correct: outputs(
            quantise_model(path, {"x": shifted}, QuantisationOptions(bias_correction=correct)),
            shifted,
        )
        - expected
        for correct in (False, True)
    }
    means = {k: np.abs(e.mean(axis=(0, 2, 3))).max() for k, e in errors.items()}
    assert means[True] < means[False] / 3
    assert (errors[True] ** 2).sum() < (errors[False] ** 2).sum()


# Measuring


def test_report_order(tmp_path, pictures):
    path = badly_scaled(tmp_path / "net.onnx")
    model = prepare(path)
    samples = ArraySamples({"x": pictures}, input_shapes(model))
    reference, quantised = quantise(model, samples, QuantisationOptions())
    rows = layer_noise(reference, quantised, samples)
    assert [r.snr_db for r in rows] == sorted(r.snr_db for r in rows)
    # One row for each Conv, its Relu included; the last one suffers from those before.
    assert [r.op_type for r in rows] == ["Conv"] * 3
    assert rows[0].layer == "t4"
    assert rows[0].snr_db == pytest.approx(
        snr(outputs(path, pictures), outputs(quantised, pictures)), abs=1e-3
    )


# Samples


def test_pictures(tmp_path):
    colour = np.array([[[10, 20, 30], [40, 50, 60]]], np.uint8)
    (tmp_path / "b").mkdir()
    Image.fromarray(colour).save(tmp_path / "b" / "2.png")
    Image.fromarray(colour // 10).save(tmp_path / "a.png")
    (tmp_path / "notes.txt").write_text("no picture")

    def first(shape, **options):
        samples, labels = read_samples(tmp_path, {"x": shape}, Preprocessing(**options))
        assert labels is None
        assert len(samples) == 2
        return samples[1]["x"]

    nhwc = first((1, 1, 2, 3), layout="nhwc")
    np.testing.assert_allclose(nhwc, colour[None] / 255, rtol=1e-6)
    assert nhwc.dtype == np.float32
    nchw = first((1, 3, 1, 2), layout="nchw", scale=1.0, mean=(1.0, 2.0, 3.0), std=(1.0, 2.0, 4.0))
    np.testing.assert_allclose(nchw[0, :, 0, 0], [9, 9, 6.75])
    bgr = first((1, 3, 1, 2), layout="nchw", scale=1.0, channels="bgr")
    np.testing.assert_allclose(bgr[0, :, 0, 1], [60, 50, 40])
    gray = first((1, 1, 1, 2), layout="nchw", scale=1.0)
    assert gray.shape == (1, 1, 1, 2)
    assert 10 < gray[0, 0, 0, 0] < 30


def test_arrays(tmp_path):
    file = tmp_path / "data.npz"
    x = np.arange(48, dtype=np.uint8).reshape(4, 2, 6)
    np.savez(file, x_uint8=x, index=np.arange(4), y=np.arange(4))
    samples, labels = read_samples(file, {"in": (1, 1, 2, 6)}, Preprocessing(scale=0.5))
    np.testing.assert_array_equal(samples[3]["in"], x[3].reshape(1, 1, 2, 6) / 2)
    np.testing.assert_array_equal(labels, np.arange(4))


# The command


def test_command(small, pictures, tmp_path):
    labels = outputs(small, pictures).argmax(axis=1)
    np.savez(tmp_path / "data.npz", x=pictures, y=labels)
    output, report = tmp_path / "int8.onnx", tmp_path / "report.json"
    result = CliRunner().invoke(
        app,
        [str(small), "--calibrate", str(tmp_path / "data.npz"), "-o", str(output)]
        + ["--samples", "10", "--dim", "N=1", "--equalise", "--bias-correction"]
        + ["--json", str(report)],
    )
    assert result.exit_code == 0, result.output
    assert "float 100.00 %" in result.output
    read = json.loads(report.read_text())
    assert read["calibration_samples"] == 10
    assert read["labelled_samples"] == 40
    assert read["int8_accuracy"] == read["agreement"] > 0.9
    assert read["int8_bytes"] == output.stat().st_size
    onnxruntime.InferenceSession(output, providers=["CPUExecutionProvider"])


def write_npz(folder: Path, **arrays: np.ndarray) -> list[str]:
    np.savez(folder / "bad.npz", **arrays)
    return ["--calibrate", str(folder / "bad.npz")]


def other_model(folder: Path, kind: str) -> list[str]:
    path = folder / "other.onnx"
    if kind == "integer":
        net = Builder((1, 3, 8, 8)).add("Abs")
        net.save(path, element=TensorProto.INT8)
    elif kind == "double":
        net = Builder((1, 3, 8, 8))
        net.add("Add", np.ones(1, np.float64)).save(path, element=TensorProto.DOUBLE)
    elif kind == "broken":
        path.write_bytes(b"no model")
    elif kind == "softmax":
        Builder((1, 3, 8, 8)).add("Softmax").save(path)
    else:
        net = Builder((1, 3, 8, 8)).conv(2, 3)
        x = np.zeros((2, 3, 8, 8), np.float32)
        onnx.save(quantise_model(net.save(path), {"x": x}), path)
    return [str(path)]


ERRORS = {
    "model missing": (lambda f: [str(f / "none.onnx")], "none.onnx: no such file"),
    "model broken": (lambda f: other_model(f, "broken"), "not a readable ONNX model"),
    "quantised": (lambda f: other_model(f, "quantised"), "is quantised already: it holds"),
    "integer": (lambda f: other_model(f, "integer"), "input 'x' is int8; it must be one of float,"),
    "double": (lambda f: other_model(f, "double"), "input 'x' is double; it must be one of"),
    "nothing to do": (lambda f: other_model(f, "softmax"), "no operator that is quantised"),
    "data missing": (lambda f: ["--calibrate", str(f / "none.npz")], "no such file or folder"),
    "no pictures": (lambda f: ["--calibrate", str(f / "empty")], "holds no pictures"),
    "empty": (lambda f: write_npz(f, x=np.zeros((0, 3, 8, 8))), "no calibration data"),
    "no arrays": (lambda f: write_npz(f), "no calibration data"),
    "not npz": (lambda f: ["--calibrate", str(f / "text.npz")], "not a readable .npz file"),
    "shape": (lambda f: write_npz(f, x=np.zeros((5, 3, 8, 9))), r"x has shape \(5, 3, 8, 9\)"),
    "names": (
        lambda f: write_npz(f, a=np.zeros((5, 2)), b=np.zeros(5)),
        r"no array for input x \(there are: a, b\)",
    ),
    "not finite": (
        lambda f: write_npz(f, x=np.full((5, 3, 8, 8), np.nan)),
        "values that are not finite",
    ),
    "overflow": (
        lambda f: write_npz(f, x=np.full((5, 3, 8, 8), 3e38, np.float32)),
        "values that are not finite",
    ),
    "labels": (
        lambda f: write_npz(f, x=np.zeros((5, 3, 8, 8)), y=np.zeros(4, int)),
        "5 class numbers are needed",
    ),
    "dim": (lambda f: ["--dim", "M=1"], "no open dimension M: the model's are N"),
    "dim text": (lambda f: ["--dim", "N"], "--dim N: must be NAME=NUMBER"),
    "dim zero": (lambda f: ["--dim", "N=0"], "dimension N = 0: it must be positive"),
    "exclude": (lambda f: ["--exclude", "Foo"], "--exclude Foo: no such node"),
    "method": (lambda f: ["--method", "best"], "--method best: must be one of"),
    "percentile": (lambda f: ["--percentile", "0"], "--percentile 0.0: must be above 50"),
    "mean": (lambda f: ["--mean", "a"], "--mean a: must be numbers"),
    "mean count": (lambda f: ["--mean", "1,2"], "--mean has 2 numbers, the input 3 channels"),
    "std": (lambda f: ["--std", "0"], "--std and --scale not 0"),
    "layout": (lambda f: ["--layout", "chw"], "--layout chw: must be one of"),
    "size": (lambda f: ["--size", "8"], "--size 8: must be HEIGHTxWIDTH"),
    "folder": (lambda f: ["-o", str(f / "none" / "x.onnx")], "its folder does not exist"),
    "output device": (lambda f: ["-o", "/dev/full"], "cannot be written: No space left on device"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(small, tmp_path, pictures, case):
    arguments, message = ERRORS[case]
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.npz").write_text("no archive")
    np.savez(tmp_path / "good.npz", x=pictures[:3])
    extra = arguments(tmp_path)
    words = [] if extra[0].endswith(".onnx") else [str(small)]
    words += ["--calibrate", str(tmp_path / "good.npz"), "-o", str(tmp_path / "out.onnx"), *extra]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1
    with pytest.raises(InputError, match=message):
        raise InputError(lines[0])
    assert not (tmp_path / "out.onnx").exists()


# Trained models


def _stored(file: str, name: str) -> tuple[np.ndarray, np.ndarray | None]:
    with np.load(SHARED / "data" / file) as data:
        return data[name].astype(np.float32), data.get("y")


def _arm_labels(y: np.ndarray) -> np.ndarray:
    """The keyword data's classes in the order of Arm's models."""
    stored = ("down", "go", "left", "no", "off", "on", "right", "stop", "up", "yes")
    stored += ("silence", "unknown")
    wanted = ("silence", "unknown", "yes", "no", "up", "down", "left", "right", "on", "off")
    wanted += ("stop", "go")
    return np.array([wanted.index(stored[i]) for i in y])


def _keywords(flat: bool) -> tuple[np.ndarray, np.ndarray]:
    x, y = _stored("kws01_1000.npz", "x_int8")
    x = (x - 83) * np.float32(0.5847029)
    return (x.reshape(len(x), 490), _arm_labels(y)) if flat else (x, y)


def _cifar(mean, std) -> tuple[np.ndarray, np.ndarray]:
    x, y = _stored("cifar10_test500_lossless.npz", "x_uint8")
    return ((x / 255 - mean) / std).transpose(0, 3, 1, 2).astype(np.float32), y


# Of each kind of network, the smaller first.
TRAINED = {
    "mlperf_tiny/kws_float": lambda: _keywords(False),
    "mlperf_tiny/vww_float": lambda: (
        _stored("vww01_1000.npz", "x_uint8")[0] / 255,
        _stored("vww01_1000.npz", "x_uint8")[1],
    ),
    "mlperf_tiny/ic_float": lambda: _stored("cifar10_test500_lossless.npz", "x_uint8"),
    "mlperf_tiny/sww_float": lambda: _stored("sww_calib45.npz", "x"),
    "other/mnist_cntk_float": lambda: tuple(a[:300] for a in _stored("mnist_t10k.npz", "x_uint8")),
    "other/winml_cifar_float": lambda: _cifar(0.5, 0.5),
    "other/ml_kws_cnn_s_float": lambda: _keywords(True),
    "other/resnet20_cifar_float": lambda: _cifar(*IMAGENET),
    "other/ml_kws_ds_cnn_s_float": lambda: _keywords(True),
}


@pytest.mark.parametrize("name", fewer_unless_long([*TRAINED], fast=7))
def test_trained(name):
    """Classes after quantisation: nearly all as before, about as many right."""
    path = SHARED / f"{name}.onnx"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    x, y = TRAINED[name]()
    model = prepare(path)
    samples = ArraySamples(dict.fromkeys(input_shapes(model), x), input_shapes(model))
    _, quantised = quantise(
        model, [samples[i] for i in range(0, len(x), len(x) // 45)], QuantisationOptions()
    )
    runs = session(model), session(quantised)
    before, after = (
        np.array([int(r.run(None, samples[i])[0].argmax()) for i in range(len(x))]) for r in runs
    )
    assert (before == after).mean() > 0.94
    assert (after == y).mean() > (before == y).mean() - 0.025
    assert (after == y).mean() > 0.6


@pytest.mark.parametrize(
    "name, file, array",
    [("mlperf_tiny/ad_float", "data/ad01_one_clip.npz", "windows")]
    + [("other/ultraface_slim_float", "samples/ultraface_slim_float.npz", "x0")],
)
def test_trained_without_labels(name, file, array):
    path = SHARED / f"{name}.onnx"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    with np.load(SHARED / file) as data:
        x = data[array][:20]
    model = prepare(path)
    samples = ArraySamples(dict.fromkeys(input_shapes(model), x), input_shapes(model))
    _, quantised = quantise(model, samples, QuantisationOptions())
    assert snr(outputs(model, x), outputs(quantised, x)) > 15


@pytest.mark.parametrize(
    "op_type, bounds, reader, left",
    [("Relu", [], "Abs", 0), ("Clip", [-9, 9], "Abs", 0), ("Relu", [], "Softmax", 1)],
)
def test_clamp_behind_a_float_operator(op_type, bounds, reader, left, tmp_path):
    """Quantising clamps as Relu does; in front of another float operator it stays."""
    rng = np.random.default_rng(0)
    arrays = {"w": rng.normal(size=(6, 3, 3, 3)), "gain": np.ones(6), "shift": np.zeros(6)}
    arrays |= {f"b{i}": np.array(bound) for i, bound in enumerate(bounds)}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("InstanceNormalization", ["c", "gain", "shift"], ["n"]),
        helper.make_node(op_type, ["n", *(f"b{i}" for i in range(len(bounds)))], ["r"]),
        helper.make_node(reader, ["r"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 3, 10, 10))
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    constants = [numpy_helper.from_array(np.float32(a), name) for name, a in arrays.items()]
    graph = helper.make_graph(nodes, "g", [x], [y], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, tmp_path / "model.onnx")
    samples = rng.normal(size=(8, 3, 10, 10)).astype(np.float32)
    quantised = quantise_model(tmp_path / "model.onnx", {"x": samples})
    assert kinds(quantised).count(op_type) == left
    expected, actual = (outputs(m, samples[:1]) for m in (model, quantised))
    assert snr(expected, actual) > 25
