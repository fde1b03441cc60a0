"""The totals of a run: shares of the work, crossings, and a frame's time with the host and
without."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from onnx import helper
from typer.testing import CliRunner

import systole
from systole.sw.cli.main import app
from tests.helpers.random_models import Model, random_array

RNG = np.random.default_rng(4)
X = RNG.integers(-128, 128, (1, 4, 6, 6)).astype(np.int8)


def convolutions() -> onnx.ModelProto:
    """Three convolutions; the second exchanges floats with operators for the host."""
    model = Model()
    value = model.input("x", np.int8, (1, 4, 6, 6))
    for i in range(3):
        name = model.const(f"w{i}", random_array(RNG, np.int8, (4, 4, 1, 1)))
        weights = model.dq(name, 0.005, np.int8(0))
        value = model.node("Conv", [model.dq(value, 0.05, np.int8(3)), weights], f"sum{i}")
        if i == 1:
            value = model.node("Hardmax", [value], "hard", axis=1)
        value = model.q(value, 0.05, np.int8(3), f"y{i}")
    return model.done(value, np.int8, None)


@pytest.fixture(scope="module")
def compiled():
    return systole.compile(convolutions(), systole.Config.sized(8, 8))


@pytest.mark.parametrize("simulator", ["commands", "model", "golden"])
def test_totals(compiled, simulator):
    report, _ = systole.run(compiled, X, simulator=simulator, clock_mhz=50)
    each = 36 * 4 * 4
    assert (report.macs, report.model_macs, report.host_macs) == (2 * each, 3 * each, each)
    assert report.mac_share == pytest.approx(2 / 3)
    prediction = systole.predict(compiled)
    assert report.timing == "predicted" and report.predicted_cycles == prediction.cycles
    assert report.utilisation == prediction.utilisation
    assert report.dram_read_bytes == prediction.dram_read_bytes > 0
    assert report.dram_write_bytes == prediction.dram_write_bytes > 0
    assert report.accelerator_seconds == prediction.cycles / 50e6
    assert report.host_seconds >= sum(op.seconds for op in report.host_ops) > 0
    assert report.frame_seconds == report.accelerator_seconds + report.host_seconds
    assert report.frames_per_second == 1 / report.frame_seconds


def test_crossings(compiled):
    """Each of the two programs gets an input and gives an output of 36 words of 8 channels."""
    report, _ = systole.run(compiled, X, simulator="golden")
    c = report.crossings
    assert (c.to_accelerator, c.to_host) == (2, 2)
    assert c.to_accelerator_bytes == c.to_host_bytes == 2 * 36 * 8


def test_host_runs_are_counted_once(compiled):
    """The warming run is in no operator's time: with it, they would take longer than the host."""
    report, _ = systole.run(compiled, X, simulator="golden")
    assert [op.op for op in report.host_ops] == ["Conv", "Hardmax"]
    assert sum(op.seconds for op in report.host_ops) <= report.host_seconds


def cli(tmp_path, *words):
    """The report as printed, and as JSON."""
    onnx.save(convolutions(), tmp_path / "m.onnx")
    out = tmp_path / "r.json"
    result = CliRunner().invoke(app, ["run", str(tmp_path / "m.onnx"), "--json", str(out), *words])
    assert result.exit_code == 0, result.stderr
    return result.stdout, json.loads(out.read_text())


def test_the_report_prints_the_whole_frame(tmp_path):
    text, report = cli(tmp_path, "--sim", "model", "--clock-mhz", "50")
    assert "66.7 % of the model's 1,728" in text
    assert "at an assumed clock of 50 MHz" in text and "measured on this machine" in text
    assert f"{report['frames_per_second']:,.1f} frames/s" in text
    assert "crossings 4: 2 to the accelerator" in text
    assert report["cycles"] == report["predicted_cycles"]
    assert f"DRAM read {report['dram_read_bytes']:,} B" in text
    assert "on the host: Hardmax 'hard_node': operator not supported" in text
    assert "on the host: Conv 'sum1_node': because Hardmax 'hard_node' runs on the host" in text


def with_host_products(op_type: str) -> onnx.ModelProto:
    """A convolution, and products behind it that only the host computes: by an Einsum, or in the
    rounds of a Loop, as many as an input says."""
    model = Model()
    weights = model.dq(
        model.const("w", random_array(RNG, np.int8, (4, 4, 1, 1))), 0.005, np.int8(0)
    )
    real = model.dq(model.input("x", np.int8, (1, 4, 6, 6)), 0.05, np.int8(3))
    code = model.q(model.node("Conv", [real, weights], "c"), 0.05, np.int8(3), "y")
    real = model.dq(code, 0.05, np.int8(3))
    if op_type == "Einsum":
        model.node("Einsum", [real, real], "z", equation="nchw,ncwk->nchk")
        return model.done("z", np.float32)
    info = helper.make_tensor_value_info
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["going"], ["on"]),
            helper.make_node("MatMul", [real, real], ["p"]),
        ],
        "body",
        [info("i", onnx.TensorProto.INT64, []), info("going", onnx.TensorProto.BOOL, [])],
        [info("on", onnx.TensorProto.BOOL, []), info("p", onnx.TensorProto.FLOAT, [1, 4, 6, 6])],
    )
    top = model.node("ReduceMax", [real], "top", keepdims=0)
    rounds = model.node("Cast", [top], "rounds", to=onnx.TensorProto.INT64)
    model.node("Loop", [rounds, model.const("yes", True)], "z", body=body)
    return model.done("z", np.float32)


def test_products_on_the_host_count():
    report, _ = systole.run(with_host_products("Einsum"), X, simulator="golden")
    assert report.mac_share == (36 * 4 * 4) / (36 * 4 * 4 + 4 * 6 * 6 * 6)


def test_no_share_where_products_are_not_known(tmp_path):
    onnx.save(with_host_products("Loop"), tmp_path / "m.onnx")
    result = CliRunner().invoke(app, ["run", str(tmp_path / "m.onnx"), "--sim", "model"])
    assert result.exit_code == 0, result.stderr
    assert (
        "MACs on the accelerator 576, those of Loop 'z_node' on the host are not known"
        in result.stdout
    )
    assert "% of the model's" not in result.stdout


def test_a_layer_that_differs_by_ties_is_explained():
    model = Model()
    real = model.dq(model.input("x", np.uint8, (1, 3, 9, 9)), 0.043, np.uint8(117))
    scales = model.const("scales", np.array([1, 1, 2, 2], np.float32))
    resized = model.node("Resize", [real, "", scales], "resized", mode="linear")
    done = model.done(model.q(resized, 0.043, np.uint8(117), "y"), np.uint8, None)
    x = RNG.integers(0, 256, (1, 3, 9, 9)).astype(np.uint8)
    report, _ = systole.run(done, x, simulator="golden")
    assert report.ort["equal"] < report.ort["elements"]
    (line,) = report.explanations
    wrong = report.ort["elements"] - report.ort["equal"]
    assert f"{wrong} of 972 elements differ by at most 1, all of them ties" in line
