"""Runs compare with the integer kernels and with the graph as written, and say which is right."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from typer.testing import CliRunner

import systole
from systole.sw.cli.main import app
from systole.sw.session.report import MOST_STEPS
from tests.helpers.random_models import Model

RNG = np.random.default_rng(4)


def scales_along_inputs() -> onnx.ModelProto:
    """A convolution whose weight scales lie along its input channels: onnxruntime's optimiser takes
    them for the outputs'. A pooling in front runs on the accelerator."""
    model = Model()
    real = model.dq(model.input("x", np.uint8, [1, 4, 6, 6]), 0.05, np.uint8(128))
    pool = model.node("MaxPool", [real], "pool", kernel_shape=[2, 2])
    real = model.dq(model.q(pool, 0.05, np.uint8(128), "pq"), 0.05, np.uint8(128))
    model.const("w", RNG.integers(-128, 128, (4, 4, 1, 1)).astype(np.int8))
    scales = np.array([0.001, 0.01, 0.03, 0.1], np.float32)
    w = model.dq("w", scales, np.zeros(4, np.int8), axis=1)
    y = model.q(model.node("Conv", [real, w], "sum"), 0.2, np.uint8(128), "y")
    return model.done(y, np.uint8, None)


def test_the_graph_decides_where_the_optimiser_is_wrong():
    x = RNG.integers(0, 256, (1, 4, 6, 6)).astype(np.uint8)
    report, outputs = systole.run(scales_along_inputs(), x, simulator="commands")
    assert report.graph["equal"] == report.graph["elements"] == outputs["y"].size
    assert report.ort["equal"] < report.ort["elements"]
    assert report.kernels_off_by > MOST_STEPS and report.reference == "graph"


def test_rounding_is_no_disagreement():
    model = Model()
    real = model.dq(model.input("x", np.uint8, [1, 4, 9, 9]), 0.05, np.uint8(128))
    model.const("w", RNG.integers(-128, 128, (8, 4, 3, 3)).astype(np.int8))
    y = model.q(
        model.node("Conv", [real, model.dq("w", 0.01, np.int8(0))], "sum"), 0.3, np.uint8(99), "y"
    )
    x = RNG.integers(0, 256, (1, 4, 9, 9)).astype(np.uint8)
    report, _ = systole.run(model.done(y, np.uint8, None), x, simulator="golden")
    assert report.ort["equal"] == report.ort["elements"]
    assert report.kernels_off_by <= 1


def cli(*words):
    return CliRunner().invoke(app, ["run", *map(str, words)])


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save(scales_along_inputs(), path)
    return path


def test_the_report_says_which_is_right(path):
    result = cli(path, "--sim", "golden")
    assert result.exit_code == 0
    assert "the graph as written, without fused kernels: 100 of 100" in result.output
    assert "the graph as written is taken for right" in result.output


def test_outputs_by_name_in_the_models_own_types(path, tmp_path):
    out = tmp_path / "outputs.npz"
    assert cli(path, "--sim", "golden", "--output", out).exit_code == 0
    with np.load(out) as arrays:
        assert arrays["y"].dtype == np.uint8 and arrays["y"].shape == (1, 4, 5, 5)


def test_the_graph_after_a_pass(path):
    result = cli(path, "--sim", "golden", "--dump-after", "drop_unused")
    assert result.exit_code == 0 and "= Pool 'pool_node' (MaxPool)" in result.output
    result = cli(path, "--sim", "golden", "--dump-after", "nothing")
    assert result.exit_code == 2 and "--dump-after nothing: must be one of" in result.output


def test_devices_as_outputs(path):
    assert cli(path, "--sim", "golden", "--json", "/dev/null").exit_code == 0
    result = cli(path, "--sim", "golden", "--json", "/dev/full")
    assert result.exit_code == 2
    assert "output /dev/full: cannot be written: No space left on device" in result.output
