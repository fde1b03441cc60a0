"""Smoothing behind normalisations, and the noise of blocks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from systole import api
from systole.sw.frontend.inputs import InputError
from systole.sw.quantisation.measure import block_ends
from systole.sw.quantisation.pipeline import QuantisationOptions
from systole.sw.quantisation.prepare import input_shapes, prepare, session
from systole.sw.quantisation.samples import ArraySamples
from systole.sw.quantisation.smooth import smooth
from systole.sw.zoo.digits import TEST_SET, TRANSFORMER

WIDTH, TOKENS = 16, 6
LARGE = (3, 11)
"""Channels that the norm's gain makes large."""


def blocks(path: Path, *, decomposed: bool = False, also: str = "", gain: float = 40) -> Path:
    """Norm, two products that read it, their sum, and the way around; ``also``: an operator that
    reads the norm's result too."""
    rng = np.random.default_rng(3)
    gamma = np.ones(WIDTH, np.float32)
    gamma[list(LARGE)] *= gain
    constants = {
        "gamma": gamma,
        "beta": rng.normal(size=WIDTH).astype(np.float32) / 4,
        "w": rng.normal(size=(WIDTH, WIDTH)).astype(np.float32) / 4,
        "v": rng.normal(size=(WIDTH, WIDTH)).astype(np.float32) / 4,
        "two": np.array(2, np.float32),
        "little": np.array(1e-5, np.float32),
    }
    for name in "wv":
        constants[name][list(LARGE)] /= gain
    make = helper.make_node
    if decomposed:
        nodes = [
            make("ReduceMean", ["x"], ["mean"], axes=[-1]),
            make("Sub", ["x", "mean"], ["d"]),
            make("Pow", ["d", "two"], ["squares"]),
            make("ReduceMean", ["squares"], ["variance"], axes=[-1]),
            make("Add", ["variance", "little"], ["sum"]),
            make("Sqrt", ["sum"], ["root"]),
            make("Div", ["d", "root"], ["unit"]),
            make("Mul", ["unit", "gamma"], ["scaled"]),
            make("Add", ["scaled", "beta"], ["n"]),
        ]
    else:
        nodes = [make("LayerNormalization", ["x", "gamma", "beta"], ["n"])]
    nodes += [make("MatMul", ["n", "w"], ["p"]), make("MatMul", ["n", "v"], ["q"])]
    nodes += [make("Mul", ["p", "q"], ["m"]), make("Add", ["x", "m"], ["y"])]
    if also:
        nodes.append(make(also, ["n"], ["other"]))
    shape = (1, TOKENS, WIDTH)
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
            for name in ("y", *(["other"] if also else []))
        ],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opset = helper.make_opsetid("", 17)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=8), path)
    return path


def pictures() -> np.ndarray:
    shape = (24, 1, TOKENS, WIDTH)
    return np.random.default_rng(4).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("alpha", [None, 0.3])
def test_the_function_stays(decomposed, alpha, tmp_path):
    model = prepare(blocks(tmp_path / "net.onnx", decomposed=decomposed))
    x = pictures()
    samples = ArraySamples({"x": x}, input_shapes(model))
    (expected,) = session(model).run(None, {"x": x[0]})
    assert len(smooth(model, samples, alpha)) == 1
    (actual,) = session(model).run(None, {"x": x[0]})
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def snr(path: Path, option: float | str | None) -> float:
    options = QuantisationOptions(smooth=option)  # type: ignore[arg-type]
    ratio = api.quantize(path, {"x": pictures()}, options=options).report.outputs_snr_db["y"]
    assert ratio is not None
    return ratio


def test_large_channels_cost_less(tmp_path):
    path = blocks(tmp_path / "net.onnx")
    plain, chosen, given = (snr(path, option) for option in (None, "auto", 0.5))
    assert chosen > plain + 10
    assert given > plain + 10


def test_even_channels_are_left_alone(tmp_path):
    model = prepare(blocks(tmp_path / "net.onnx", gain=1))
    samples = ArraySamples({"x": pictures()}, input_shapes(model))
    assert smooth(model, samples) == {}


def test_what_something_else_reads_is_left_alone(tmp_path):
    model = prepare(blocks(tmp_path / "net.onnx", also="Tanh"))
    samples = ArraySamples({"x": pictures()}, input_shapes(model))
    assert smooth(model, samples, 0.5) == {}
    file = onnx.load(tmp_path / "net.onnx")
    del file.graph.node[-1]
    file.graph.output[-1].name = "n"
    onnx.save(file, tmp_path / "result.onnx")
    assert smooth(prepare(tmp_path / "result.onnx"), samples, 0.5) == {}


def test_alpha_has_limits(tmp_path):
    for bad in (-0.1, 1.5, float("nan")):
        with pytest.raises(InputError, match="must be within 0 to 1, or auto"):
            QuantisationOptions(smooth=bad)
    with pytest.raises(InputError, match="--smooth changes weights"):
        data = np.load(TEST_SET)["x"][:8, None]
        api.quantize(TRANSFORMER, data, options=QuantisationOptions(smooth="auto"))


def test_blocks_end_at_sums_with_a_way_around(tmp_path):
    path = blocks(tmp_path / "net.onnx")
    model = prepare(path)
    assert block_ends(model) == ["y"]
    beside = next(node for node in model.graph.node if node.op_type == "Mul")
    beside.op_type = "Add"  # of two products of the same operand
    assert block_ends(model) == ["y"]
    report = api.quantize(path, {"x": pictures()}).report
    assert [row.tensor for row in report.blocks] == ["y"]
    assert '"blocks"' in report.to_json()


def test_a_real_transformer_keeps_its_accuracy():
    folder = Path(__file__).resolve().parents[4] / "shared" / "models" / "exports"
    path, samples = folder / "t_vit.onnx", folder / "t_vit_test.npz"
    if not path.exists():
        pytest.skip("no folder of models")
    report = api.quantize(path, samples, options=QuantisationOptions(smooth="auto")).report
    assert report.float_accuracy is not None and report.int8_accuracy is not None
    assert report.int8_accuracy > report.float_accuracy - 0.01
    assert len(report.blocks) == 4
