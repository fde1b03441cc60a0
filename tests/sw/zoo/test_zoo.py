"""Networks built in code, and the trained digits network."""

import functools
import importlib.util
import subprocess
import sys

import numpy as np
import onnx
import pytest
import typer
from onnx import numpy_helper
from typer.testing import CliRunner

import systole
from systole.isa import Config
from systole.sw import zoo
from systole.sw.cli import zoo as command
from systole.sw.compiler.partition import partition
from systole.sw.frontend.load import load
from systole.sw.golden import model as golden
from systole.sw.golden import oracle
from systole.sw.ir.graph import macs
from systole.sw.session.run import RunOptions, run_model
from systole.sw.zoo import measure
from systole.sw.zoo.digits import MODEL, TEST_SET, TRANSFORMER

PUBLISHED = {
    "resnet8": 12_501_632,
    "dscnn-kws": 2_656_768,
    "mobilenetv1-0.25-vww": 7_489_664,
    "autoencoder-ad": 264_192,
    "resnet18": 1_814_073_344,
    "resnet50": 4_089_184_256,
    "mobilenetv1": 568_740_352,
    "mobilenetv2": 300_774_272,
    "mobilenetv3-small": 56_510_400,
    "squeezenet": 349_151_936,
    "yolov3-tiny": 2_782_480_896,
    "yolov3": 32_932_037_632,
    "unet-small": 326_320_128,
    "vgg-block": 2 * 56 * 56 * 64 * 64 * 9,
    "gemm": 16 * 256 * 256,
    "deit-tiny": 1_253_683_200,
    "mobilevit-xxs": 407_364_096,
    "bert-tiny": 58_720_256,
    "bert-base": 11_173_625_856,
    "whisper-tiny-encoder": 18_468_864_000,
    "gpt2-step": 125_891_328,
}
"""Multiply-accumulates at the default size."""
TRANSFORMERS = {
    "deit-tiny": ({"size": 32, "layers": 1}, 3_003_264),
    "mobilevit-xxs": ({"size": 64}, 21_179_136),
    "bert-tiny": ({"tokens": 20, "layers": 1}, 4_034_560),
    "whisper-tiny-encoder": ({"frames": 40, "layers": 1}, 97_075_200),
}
"""Sizes for a test, and multiply-accumulates at these."""
LONG = ("resnet18", "resnet50", "yolov3", "bert-base", "whisper-tiny-encoder", "gpt2-step")
EXACT = [
    ("resnet8", {}, PUBLISHED["resnet8"]),
    ("vgg-block", {}, PUBLISHED["vgg-block"]),
    ("dscnn-kws", {}, PUBLISHED["dscnn-kws"]),
    ("mobilenetv1-0.25-vww", {}, PUBLISHED["mobilenetv1-0.25-vww"]),
    ("autoencoder-ad", {}, PUBLISHED["autoencoder-ad"]),
    ("resnet18", {"size": 32}, 37_523_456),
    pytest.param("resnet50", {"size": 32}, 85_458_944, marks=pytest.mark.long),
    ("mobilenetv2", {"size": 64}, 25_728_512),
    ("gemm", {}, PUBLISHED["gemm"]),
    ("gemm", {"m": 3, "k": 1000, "n": 77}, 231_000),
    ("gemm", {"m": 1, "k": 5, "n": 1, "seed": 4}, 5),
]
"""Of operators that the golden model shares with onnxruntime bit for bit."""
CLOSE = [
    ("mobilenetv3-small", {"size": 64}, 6_516_480),
    ("squeezenet", {"size": 64}, 21_584_576),
    ("yolov3-tiny", {"size": 64}, 65_857_536),
    pytest.param("yolov3", {"size": 32}, 194_864_128, marks=pytest.mark.long),
    ("unet-small", {"size": 32}, 36_257_792),
]
"""Of others too, where an operator may differ by one unit in an element of a thousand."""


@functools.cache
def built(name: str) -> onnx.ModelProto:
    return zoo.build(name)


def compare(path, arrays):
    """Golden against onnxruntime over arrays for the only float input: a result for every array and
    output."""
    graph = load(path)
    (port,) = graph.inputs
    tensor = graph.tensors[port.tensor]
    results = []
    for array in arrays:
        ours = golden.run(graph, {port.tensor: golden.quantise_input(port, tensor, array)})
        theirs = oracle.run(path, {port.name: array})
        for out in graph.outputs:
            mine, reference = ours[out.tensor], theirs[out.name]
            results.append(oracle.compare(out, graph.tensors[out.tensor], mine, reference))
    return graph, results


def shapes(values) -> list[list[int]]:
    return [[d.dim_value for d in v.type.tensor_type.shape.dim] for v in values]


def random_array(graph) -> np.ndarray:
    shape = graph.tensors[graph.inputs[0].tensor].onnx_shape
    return np.random.default_rng(7).uniform(-2, 2, shape).astype(np.float32)


@pytest.mark.parametrize("name, sizes, work", EXACT)
def test_network_is_exact(name, sizes, work, tmp_path):
    path = tmp_path / "net.onnx"
    zoo.write(zoo.build(name, **sizes), path)
    graph, (result,) = compare(path, [random_array(load(path))])
    assert sum(macs(op, graph) for op in graph.ops) == work
    assert result.exact


@pytest.mark.parametrize("name, sizes, work", CLOSE)
def test_operators_are_close(name, sizes, work, tmp_path):
    """Each operator on onnxruntime's inputs to it: one unit may grow in what follows."""
    model = zoo.build(name, **sizes)
    zoo.write(model, tmp_path / "net.onnx")
    graph = load(tmp_path / "net.onnx")
    assert sum(macs(op, graph) for op in graph.ops) == work
    theirs = measure.activations(model, {"input": random_array(graph)})
    (port,) = graph.inputs
    tensors = {port.tensor: theirs[port.tensor].reshape(graph.tensors[port.tensor].shape)}
    compared = 0
    for op in graph.ops:
        for tensor, ours in golden.evaluate(op, graph, tensors).items():
            tensors[tensor] = ours
            if tensor in theirs and tensor in graph.tensors:
                tensors[tensor] = theirs[tensor].reshape(ours.shape)
                gap = np.abs(ours.astype(int) - tensors[tensor])
                compared += gap.size
                assert gap.max() <= 1, tensor
                assert (gap > 0).sum() <= max(0.001 * gap.size, 1), tensor
    assert compared > 0.5 * sum(y.size for y in theirs.values())


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.long] * (n in LONG)) for n in zoo.NETWORKS]
)
def test_published_work_and_ranges(name):
    model = built(name)
    assert measure.macs(model) == PUBLISHED[name]
    results = measure.saturation(model)
    assert measure.saturated_share(results) < 0.003
    for r in results:
        if r.elements >= 1000:
            assert r.saturated < 0.02 * r.elements, f"{r.name} saturates"
            # A share of many is small.
            shares = r.name.startswith("softmax")
            assert r.deviation > 10 or shares, f"{r.name} uses little of its range"


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_run_in_one_segment(name, tmp_path):
    sizes, work = TRANSFORMERS[name]
    zoo.write(zoo.build(name, **sizes), path := tmp_path / "net.onnx")
    config = Config(row_ops=True, zero_points=True, scratchpad_bytes=524288)
    plan = partition(path, config)
    assert sum(p.macs or 0 for p in plan.placements) == work
    assert {p.op_type for p in plan.placements if p.host} <= {"Cast", "Unsqueeze", "Sub", "Mul"}
    rng, feeds = np.random.default_rng(3), {}
    for port in plan.inputs.inputs:
        shape = plan.inputs.tensors[port.tensor].onnx_shape
        values = rng.uniform(-2, 2, shape) if port.dtype == "float32" else rng.integers(0, 2, shape)
        feeds[port.name] = values.astype(port.dtype)
    report = run_model(plan, feeds, RunOptions(config, simulator="commands")).report
    assert report.golden_mismatches == 0
    assert report.crossings.to_accelerator == report.crossings.to_host == 1


@pytest.mark.parametrize("name", ["dscnn-kws", "mobilenetv3-small", "squeezenet", "unet-small"])
def test_results_depend_on_the_input(name):
    model = built(name)
    session = oracle.session(model)
    shape = session.get_inputs()[0].shape
    rng = np.random.default_rng(1)
    arrays = (rng.uniform(-2, 2, shape).astype(np.float32) for _ in range(2))
    first, second = (session.run(None, {"input": a})[0] for a in arrays)
    assert (first != second).mean() > 0.5


def test_saturation_is_seen():
    model = onnx.ModelProto()
    model.CopyFrom(built("dscnn-kws"))
    name = next(
        n.output[0]
        for n in model.graph.node
        if n.op_type == "QuantizeLinear" and "pool" in n.output[0]
    )
    (scale,) = (c for c in model.graph.initializer if c.name == f"{name}_scale")
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) / 64, scale.name))
    (pool,) = (r for r in measure.saturation(model) if r.name == name)
    assert pool.elements == 64 and pool.saturated > 32
    assert measure.saturated_share([pool]) == pool.saturated / 64


@pytest.mark.parametrize(
    "name, size, inputs, outputs",
    [
        ("resnet18", 64, 64, [[1, 1000]]),
        ("mobilenetv1", 32, 32, [[1, 1000]]),
        ("mobilenetv3-small", 96, 96, [[1, 1000]]),
        ("squeezenet", 32, 32, [[1, 1000]]),
        ("yolov3-tiny", 96, 96, [[1, 255, 3, 3], [1, 255, 6, 6]]),
        pytest.param(
            "yolov3",
            64,
            64,
            [[1, 255, 2, 2], [1, 255, 4, 4], [1, 255, 8, 8]],
            marks=pytest.mark.long,
        ),
        ("unet-small", 40, 40, [[1, 2, 40, 40]]),
    ],
)
def test_sizes(name, size, inputs, outputs):
    model = zoo.build(name, size=size)
    assert shapes(model.graph.input) == [[1, 3, inputs, inputs]]
    assert shapes(model.graph.output) == outputs
    results = oracle.run(model, {"input": np.ones((1, 3, size, size), np.float32)})
    assert [list(r.shape) for r in results.values()] == outputs
    assert measure.saturated_share(measure.saturation(model)) < 0.01


def operators(model) -> dict[str, int]:
    counts: dict[str, int] = {}
    for node in model.graph.node:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return counts


def test_forms():
    """What distinguishes the networks: operators, and the odd paddings."""
    tiny = built("yolov3-tiny")
    ops = operators(tiny)
    assert (ops["LeakyRelu"], ops["Resize"], ops["Concat"], ops["MaxPool"]) == (11, 1, 1, 6)
    last = [n for n in tiny.graph.node if n.op_type == "MaxPool"][-1]
    found = {a.name: list(a.ints) for a in last.attribute}
    assert found == {"kernel_shape": [2, 2], "strides": [1, 1], "pads": [0, 0, 1, 1]}
    ops = operators(built("mobilenetv3-small"))
    assert (ops["HardSigmoid"], ops["HardSwish"], ops["Mul"], ops["Add"]) == (9, 19, 9, 6)
    model = built("mobilenetv2")
    assert operators(model)["Clip"] == 35
    # onnxruntime fuses a Clip that the range of its QuantizeLinear implies, and no other.
    clips = {n.output[0] + "_q_scale" for n in model.graph.node if n.op_type == "Clip"}
    scales = [numpy_helper.to_array(c) for c in model.graph.initializer if c.name in clips]
    assert len(scales) == 35 and all(5.999 < s * np.float32(255) <= 6 for s in scales)
    assert operators(built("squeezenet"))["Concat"] == 8
    assert operators(built("unet-small"))["ConvTranspose"] == 3
    stem = next(n for n in built("dscnn-kws").graph.node if n.op_type == "Conv")
    assert [list(a.ints) for a in stem.attribute if a.name == "pads"] == [[4, 1, 5, 1]]


def test_resnet8_fuses_its_additions(tmp_path):
    zoo.write(zoo.build("resnet8"), tmp_path / "net.onnx")
    ops = load(tmp_path / "net.onnx").ops
    assert [op.op_type for op in ops].count("Conv+Add") == 3
    assert not any(op.op_type == "Add" for op in ops)


@pytest.mark.parametrize("name, options", [("mobilenetv3-small", {"size": 32}), ("resnet8", {})])
def test_seeds_differ_and_repeat(name, options, tmp_path):
    path = tmp_path / "net.onnx"
    words = [w for key, value in options.items() for w in (f"--{key}", str(value))]
    zoo_run = [sys.executable, "-m", "systole.sw.zoo", name, "-o", str(path), "--seed", "1", *words]
    subprocess.run(zoo_run, check=True, capture_output=True)
    first, other = (zoo.build(name, seed=s, **options).SerializeToString() for s in (1, 2))
    assert path.read_bytes() == first != other


def test_refusals():
    for name, options, sentence in (
        ("vgg", {}, "no network 'vgg'; there are gemm, "),
        ("resnet8", {"size": 32}, "parameter size belongs to resnet18, .* not to resnet8"),
        ("gemm", {"depth": 3}, "parameter depth belongs to no network, not to gemm"),
        ("yolov3", {"size": 400}, "size 400 of yolov3 is not a positive multiple of 32"),
        ("unet-small", {"size": 0}, "size 0 of unet-small is not a positive multiple of 8"),
    ):
        with pytest.raises(ValueError, match=sentence):
            zoo.build(name, **options)


def test_command_line(tmp_path):
    app = typer.Typer()
    app.command()(command.main)
    run = CliRunner().invoke
    path = tmp_path / "g.onnx"
    done = run(app, ["gemm", "-o", str(path), "--m", "2", "--k", "9", "--n", "5"])
    assert done.exit_code == 0
    assert "90 multiply-accumulates, 0.0000% of activations saturate" in done.output
    assert load(path).inputs and [p.name for p in tmp_path.iterdir()] == ["g.onnx"]
    for bad in (
        ["nothing", "-o", str(path)],
        ["resnet8", "-o", str(path), "--m", "3"],
        ["resnet18", "-o", str(path), "--size", "100"],
        ["gemm", "-o", str(tmp_path / "no" / "g.onnx")],
        ["gemm", "-o", str(path), "--m", "0"],
    ):
        assert run(app, bad).exit_code == 2, bad


def test_digits_model():
    data = np.load(TEST_SET)
    x, y = data["x"], data["y"]
    assert MODEL.stat().st_size < 200_000 and x.shape == (360, 1, 8, 8)
    graph, results = compare(MODEL, x[:20, None])
    assert sum(r.equal for r in results) >= 0.99 * sum(r.elements for r in results)
    assert max(r.max_abs_diff for r in results) <= 1
    (port,), (out,) = graph.inputs, graph.outputs
    tensor = graph.tensors[port.tensor]
    guess = []
    for image in x[:, None]:
        ours = golden.run(graph, {port.tensor: golden.quantise_input(port, tensor, image)})
        guess.append(ours[out.tensor].argmax())
    assert (np.array(guess) == y).mean() >= 0.95


def test_digits_transformer_gradients():
    from systole.sw.zoo.digits import train_transformer as train

    rng = np.random.default_rng(0)
    p = {k: v.astype(np.float64) for k, v in train.initial(rng).items()}
    x, y = rng.random((3, 1, 8, 8)), np.array([1, 7, 3])
    _, grads = train.gradients(p, x, y)
    assert grads.keys() == p.keys()
    for name, value in p.items():
        index = tuple(rng.integers(0, size) for size in value.shape)
        step, values = 1e-5, []
        for sign in (1, -1):
            moved = {k: v.copy() for k, v in p.items()}
            moved[name][index] += sign * step
            values.append(train.gradients(moved, x, y)[0])
        slope = (values[0] - values[1]) / (2 * step)
        assert abs(slope - grads[name][index]) < 1e-6 + 1e-3 * abs(slope), name


def test_digits_transformer():
    """All of it runs on the accelerator, in one segment."""
    data = np.load(TEST_SET)
    x, y = data["x"][:60], data["y"][:60]
    compiled = systole.compile(TRANSFORMER, systole.Config(row_ops=True, zero_points=True))
    assert TRANSFORMER.stat().st_size < 200_000
    assert len(compiled.partition.segments) == 1
    found = systole.accuracy(compiled, x, y)
    assert found.accelerator >= 0.9
    assert found.same_class >= 0.98
    report, _ = systole.run(compiled, x[0], simulator="commands")
    assert report.golden_mismatches == 0


@pytest.mark.skipif(not importlib.util.find_spec("sklearn"), reason="scikit-learn is missing")
def test_digits_training():
    """The committed test set is what training leaves out; gradients agree with differences."""
    from systole.sw.zoo.digits import train

    x, y, x_test, y_test = train.split()
    data = np.load(TEST_SET)
    assert (data["x"] == x_test).all() and (data["y"] == y_test).all()
    p = {k: v.astype(np.float64) for k, v in train.initial(np.random.default_rng(0)).items()}
    _, grads = train.gradients(p, x[:5], y[:5])
    for name, index in (("w1", (3, 0, 1, 2)), ("w2", (5, 2, 0, 1)), ("w3", (7, 9, 2, 2))):
        step = 1e-4
        values = []
        for sign in (1, -1):
            moved = {k: v.copy() for k, v in p.items()}
            moved[name][index] += sign * step
            values.append(train.gradients(moved, x[:5], y[:5])[0])
        slope = (values[0] - values[1]) / (2 * step)
        assert abs(slope - grads[name][index]) < 1e-4 + 1e-2 * abs(slope), name
