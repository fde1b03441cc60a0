"""Networks built in code, and the trained digits network."""

import importlib.util

import numpy as np
import onnx
import pytest
from typer.testing import CliRunner

from sw import golden, oracle, zoo
from sw.digits import MODEL, TEST_SET
from sw.graph import Conv, macs
from sw.load import load

NETWORKS = [
    ("resnet8", {}, 12_501_632),
    ("vgg-block", {}, 2 * 56 * 56 * 64 * 64 * 9),
    ("gemm", {}, 16 * 256 * 256),
    ("gemm", {"m": 3, "k": 1000, "n": 77}, 231_000),
    ("gemm", {"m": 1, "k": 5, "n": 1, "seed": 4}, 5),
]


def compare(path, arrays):
    """Golden against onnxruntime over arrays for the only float input; all of the golden tensors of
    the last one."""
    graph = load(path)
    (port,), (out,) = graph.inputs, graph.outputs
    tensor = graph.tensors[port.tensor]
    results = []
    for array in arrays:
        ours = golden.run(graph, {port.tensor: golden.quantise_input(port, tensor, array)})
        theirs = oracle.run(path, {port.name: array})[out.name]
        results.append(oracle.compare(out, graph.tensors[out.tensor], ours[out.tensor], theirs))
    return graph, ours, results


@pytest.mark.parametrize("name, sizes, work", NETWORKS)
def test_network_is_exact_and_not_saturated(name, sizes, work, tmp_path):
    path = tmp_path / "net.onnx"
    zoo.write(zoo.build(name, **sizes), path)
    port = load(path).inputs[0]
    rng = np.random.default_rng(7)
    shape = load(path).tensors[port.tensor].onnx_shape
    array = rng.uniform(-2, 2, shape).astype(np.float32)
    graph, ours, results = compare(path, [array])
    assert sum(macs(op, graph) for op in graph.ops) == work
    assert results[0].exact
    for op in graph.ops:
        y = ours[op.output]
        assert (y == op.high).mean() < 0.02, f"{op.name} saturates"
        if isinstance(op, Conv) and y.size > 64:
            assert y.std() > 10, f"{op.name} uses little of its range"


def test_resnet8_fuses_its_additions(tmp_path):
    zoo.write(zoo.build("resnet8"), tmp_path / "net.onnx")
    ops = load(tmp_path / "net.onnx").ops
    assert [op.op_type for op in ops].count("Conv+Add") == 3
    assert not any(op.op_type == "Add" for op in ops)


def test_seeds_differ_and_repeat():
    small = {"m": 2, "k": 8, "n": 4}
    first, again, other = (zoo.build("gemm", seed=s, **small) for s in (1, 1, 2))
    assert first == again and first != other
    with pytest.raises(ValueError, match="no network 'vgg'"):
        zoo.build("vgg")


def test_command_line(tmp_path):
    app = zoo.typer.Typer()
    app.command()(zoo.main)
    run = CliRunner().invoke
    path = tmp_path / "g.onnx"
    assert run(app, ["gemm", "-o", str(path), "--m", "2", "--k", "9", "--n", "5"]).exit_code == 0
    assert [list(i.dims) for i in onnx.load(path).graph.initializer if i.name.endswith("weights")]
    assert load(path).inputs and [p.name for p in tmp_path.iterdir()] == ["g.onnx"]
    for bad in (
        ["nothing", "-o", str(path)],
        ["resnet8", "-o", str(path), "--m", "3"],
        ["gemm", "-o", str(tmp_path / "no" / "g.onnx")],
        ["gemm", "-o", str(path), "--m", "0"],
    ):
        assert run(app, bad).exit_code == 2, bad


def test_digits_model():
    data = np.load(TEST_SET)
    x, y = data["x"], data["y"]
    assert MODEL.stat().st_size < 200_000 and x.shape == (360, 1, 8, 8)
    graph, _, results = compare(MODEL, x[:20, None])
    assert sum(r.equal for r in results) >= 0.99 * sum(r.elements for r in results)
    assert max(r.max_abs_diff for r in results) <= 1
    (port,), (out,) = graph.inputs, graph.outputs
    tensor = graph.tensors[port.tensor]
    guess = []
    for image in x[:, None]:
        ours = golden.run(graph, {port.tensor: golden.quantise_input(port, tensor, image)})
        guess.append(ours[out.tensor].argmax())
    assert (np.array(guess) == y).mean() >= 0.95


@pytest.mark.skipif(not importlib.util.find_spec("sklearn"), reason="scikit-learn is missing")
def test_digits_training():
    """The committed test set is what training leaves out; gradients agree with differences."""
    from sw.digits import train

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
