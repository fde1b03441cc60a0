"""What stays float when a model is quantised, and inputs that are no real numbers."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from systole.sw.compiler.partition import place
from systole.sw.ir.graph import ModelError
from systole.sw.quantisation import calibrate
from systole.sw.quantisation.floating import floating_nodes
from systole.sw.quantisation.measure import layer_noise
from systole.sw.quantisation.pipeline import QuantisationOptions, quantise, quantise_model
from systole.sw.quantisation.prepare import input_shapes, input_types, prepare
from systole.sw.quantisation.samples import ArraySamples

RNG = np.random.default_rng(5)
WIDTH = 16


def save(path, nodes, inputs, constants, outputs=("y",), opset=13, microsoft=False):
    """A model of these (operator, inputs, output, attributes) nodes in a file."""
    protos = [
        helper.make_node(op, list(given), [out], name=out, **(attributes[0] if attributes else {}))
        for op, given, out, *attributes in nodes
    ]
    graph = helper.make_graph(
        protos,
        "test",
        [helper.make_tensor_value_info(n, t, s) for n, t, s in inputs],
        [helper.make_empty_tensor_value_info(n) for n in outputs],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in constants.items()],
    )
    opsets = [helper.make_opsetid("", opset)]
    opsets += [helper.make_opsetid("com.microsoft", 1)] if microsoft else []
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


def quantised_inputs(model: onnx.ModelProto) -> set[str]:
    """Nodes whose operands are all dequantised."""
    codes = {o for n in model.graph.node if n.op_type == "DequantizeLinear" for o in n.output}
    return {n.name for n in model.graph.node if n.input and set(n.input) <= codes}


def attention(mask: np.ndarray, path):
    """One head without projections: scores, mask, Softmax, product."""
    nodes = [
        ("Transpose", ["x"], "k", {"perm": [0, 2, 1]}),
        ("MatMul", ["x", "k"], "scores"),
        ("Mul", ["scores", "scale"], "scaled"),
        ("Add", ["scaled", "mask"], "masked"),
        ("Softmax", ["masked"], "weights"),
        ("MatMul", ["weights", "x"], "y"),
    ]
    constants = {"scale": np.float32(WIDTH**-0.5), "mask": mask}
    return save(path, nodes, [("x", TensorProto.FLOAT, [1, 8, WIDTH])], constants)


@pytest.mark.parametrize("lowest", [-np.inf, np.finfo(np.float32).min, -1e4])
@pytest.mark.parametrize("method", ["minmax", "percentile"])
def test_masks_do_not_share_a_scale_with_scores(lowest, method, tmp_path):
    mask = np.triu(np.full((8, 8), lowest, np.float32), 1)
    path = attention(mask, tmp_path / "m.onnx")
    model = prepare(path)
    x = RNG.normal(size=(16, 8, WIDTH)).astype(np.float32)
    samples = ArraySamples({"x": x}, input_shapes(model))
    float_model, quantised = quantise(model, samples, QuantisationOptions(method=method))
    assert {"scores", "y"} <= quantised_inputs(quantised)
    noise = {row.tensor: row.snr_db for row in layer_noise(float_model, quantised, samples)}
    assert noise["y"] > 25 and noise["scaled"] > 25, noise


@pytest.mark.parametrize("square", ["Pow", "Mul"])
@pytest.mark.parametrize("inverse", ["Div", "Reciprocal"])
def test_decomposed_normalisation_stays_float(square, inverse, tmp_path):
    nodes = [
        ("MatMul", ["x", "w"], "h"),
        ("ReduceMean", ["h"], "mean", {"axes": [-1]}),
        ("Sub", ["h", "mean"], "difference"),
        (square, ["difference", "two" if square == "Pow" else "difference"], "square"),
        ("ReduceMean", ["square"], "variance", {"axes": [-1]}),
        ("Add", ["variance", "epsilon"], "positive"),
        ("Sqrt", ["positive"], "root"),
    ]
    if inverse == "Div":
        nodes.append(("Div", ["difference", "root"], "normal"))
    else:
        nodes += [
            ("Reciprocal", ["root"], "inverse"),
            ("Mul", ["difference", "inverse"], "normal"),
        ]
    nodes += [
        ("Mul", ["normal", "gamma"], "scaled"),
        ("Add", ["scaled", "beta"], "shifted"),
        ("MatMul", ["shifted", "w"], "y"),
    ]
    constants = {
        "w": RNG.normal(size=(WIDTH, WIDTH)).astype(np.float32),
        "two": np.float32(2),
        "epsilon": np.float32(1e-5),
        "gamma": RNG.uniform(0.5, 2, WIDTH).astype(np.float32),
        "beta": RNG.normal(size=WIDTH).astype(np.float32),
    }
    path = save(tmp_path / "m.onnx", nodes, [("x", TensorProto.FLOAT, [1, 8, WIDTH])], constants)
    inside = {out for _, _, out, *_ in nodes} - {"h", "y"}
    assert floating_nodes(onnx.load(path)) == inside
    samples = {"x": RNG.normal(size=(8, 8, WIDTH)).astype(np.float32)}
    quantised = quantise_model(path, samples)
    done = quantised_inputs(quantised)
    assert {"h", "y"} <= done
    assert not done & (inside - {"mean", "difference"})


def test_root_of_something_else_is_no_normalisation(tmp_path):
    nodes = [("Abs", ["x"], "a"), ("Sqrt", ["a"], "r"), ("Add", ["r", "x"], "y")]
    path = save(tmp_path / "m.onnx", nodes, [("x", TensorProto.FLOAT, [1, 4])], {})
    assert not floating_nodes(onnx.load(path))


@pytest.mark.parametrize("element", [TensorProto.INT64, TensorProto.INT32])
def test_token_ids_and_boolean_masks(element, tmp_path):
    nodes = [
        ("Gather", ["table", "ids"], "embedded"),
        ("Where", ["keep", "embedded", "nothing"], "kept"),
        ("MatMul", ["kept", "w"], "y"),
    ]
    constants = {
        "table": RNG.normal(size=(50, WIDTH)).astype(np.float32),
        "nothing": np.float32(0),
        "w": RNG.normal(size=(WIDTH, 4)).astype(np.float32),
    }
    inputs = [("ids", element, [1, 6]), ("keep", TensorProto.BOOL, [1, 6, 1])]
    path = save(tmp_path / "m.onnx", nodes, inputs, constants)
    model = prepare(path)
    assert [t.kind for t in input_types(model).values()] == ["i", "b"]
    arrays = {"ids": RNG.integers(0, 50, (8, 6)), "keep": RNG.integers(0, 2, (8, 6, 1)) > 0}
    quantised = quantise_model(path, arrays)
    assert "y" in quantised_inputs(quantised)
    with pytest.raises(Exception, match="array ids is float64; the model takes int"):
        quantise_model(path, arrays | {"ids": np.zeros((8, 6))})


@pytest.mark.parametrize("dead", [0, 1, 3])
def test_dead_channels_anywhere(dead, tmp_path):
    w = RNG.normal(size=(4, 3, 1, 1)).astype(np.float32)
    w[dead] = 0
    constants = {"w": w, "b": RNG.normal(size=4).astype(np.float32)}
    nodes = [("Conv", ["x", "w", "b"], "y")]
    path = save(tmp_path / "m.onnx", nodes, [("x", TensorProto.FLOAT, [1, 3, 8, 8])], constants)
    quantised = quantise_model(path, {"x": RNG.normal(size=(4, 3, 8, 8)).astype(np.float32)})
    (scales,) = (
        numpy_helper.to_array(i) for i in quantised.graph.initializer if i.name == "w_scale"
    )
    peaks = np.abs(w).reshape(4, -1).max(axis=1)
    alive = peaks > 0
    assert np.allclose(scales[alive], peaks[alive] / 127, rtol=0.01)
    assert np.allclose(scales[dead], np.median(peaks[alive]) / 127, rtol=0.01)


def test_layers_that_share_a_bias(tmp_path):
    nodes = [("Conv", ["x", "w1", "b"], "h"), ("Conv", ["h", "w2", "b"], "y")]
    constants = {
        "w1": RNG.normal(size=(4, 4, 1, 1)).astype(np.float32),
        "w2": 9 * RNG.normal(size=(4, 4, 1, 1)).astype(np.float32),
        "b": RNG.normal(size=4).astype(np.float32),
    }
    path = save(tmp_path / "m.onnx", nodes, [("x", TensorProto.FLOAT, [1, 4, 6, 6])], constants)
    x = RNG.normal(size=(4, 4, 6, 6)).astype(np.float32)
    model = prepare(path)
    samples = ArraySamples({"x": x}, input_shapes(model))
    rows = layer_noise(*quantise(model, samples, QuantisationOptions()), samples)
    assert min(row.snr_db for row in rows) > 25, rows


@pytest.mark.parametrize("element", [np.float16, "bfloat16"])
def test_narrow_floats_become_float32(element, tmp_path):
    w = RNG.normal(size=(4, 3, 1, 1)).astype(np.float32)
    kind = TensorProto.FLOAT16
    if element == "bfloat16":
        import ml_dtypes

        element, kind = ml_dtypes.bfloat16, TensorProto.BFLOAT16
    constants = {"w": w.astype(element)}
    nodes = [("Conv", ["x", "w"], "h"), ("Cast", ["h"], "y", {"to": kind})]
    path = save(tmp_path / "m.onnx", nodes, [("x", kind, [1, 3, 8, 8])], constants)
    quantised = quantise_model(path, {"x": RNG.normal(size=(4, 3, 8, 8)).astype(np.float32)})
    assert quantised.graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT
    assert "h" in quantised_inputs(quantised)


def test_operators_of_onnxruntime_in_the_middle(tmp_path):
    nodes = [
        ("MatMul", ["x", "w"], "h"),
        ("Gelu", ["h"], "g", {"domain": "com.microsoft"}),
        ("Squeeze", ["g", "axis"], "s"),
        ("Gemm", ["s", "w"], "y"),
    ]
    constants = {
        "w": RNG.normal(size=(WIDTH, WIDTH)).astype(np.float32),
        "axis": np.array([1], np.int64),
    }
    inputs = [("x", TensorProto.FLOAT, [1, 1, WIDTH])]
    path = save(tmp_path / "m.onnx", nodes, inputs, constants, microsoft=True)
    quantised = quantise_model(path, {"x": RNG.normal(size=(8, 1, WIDTH)).astype(np.float32)})
    assert {"h", "y"} <= quantised_inputs(quantised)


def test_a_broken_result_is_noticed(tmp_path, monkeypatch):
    path = save(
        tmp_path / "m.onnx",
        [("Gemm", ["x", "w"], "y")],
        [("x", TensorProto.FLOAT, [1, WIDTH])],
        {"w": RNG.normal(size=(WIDTH, 4)).astype(np.float32)},
    )
    quantise_node = calibrate.QDQQuantizer.quantize_model

    def broken(self):
        quantise_node(self)
        for node in self.model.model.graph.node:
            if node.op_type == "Gemm":
                node.input[1] = node.input[0]

    monkeypatch.setattr(calibrate.QDQQuantizer, "quantize_model", broken)
    with pytest.raises(ModelError, match="made a model that does not run"):
        quantise_model(path, {"x": RNG.normal(size=(8, WIDTH)).astype(np.float32)})


def test_dynamically_quantised_models_are_named_as_such(tmp_path):
    node = helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"], name="dyn")
    graph = helper.make_graph(
        [node],
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
        [helper.make_empty_tensor_value_info("q")],
    )
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)]), path)
    with pytest.raises(ModelError, match="quantised at run time: it holds DynamicQuantizeLinear"):
        prepare(path)


ELEMENTWISE = {
    **dict.fromkeys(("Abs", "Neg", "Sign", "Ceil", "Floor", "Round", "Elu", "Celu", "Selu"), ""),
    **dict.fromkeys(("Gelu", "Swish", "Erf", "Mish", "Softplus", "Softsign", "HardSwish"), ""),
    "ThresholdedRelu": "",
    **dict.fromkeys(("FastGelu", "QuickGelu"), "com.microsoft"),
}


@pytest.mark.parametrize("op_type", ELEMENTWISE)
def test_elementwise_functions_leave_nothing_to_the_host(op_type, tmp_path):
    w, rng = (RNG.normal(size=(4, 4, 1, 1)) / 2).astype(np.float32), np.random.default_rng(2)
    function = helper.make_node(op_type, ["h"], ["f"], name="f", domain=ELEMENTWISE[op_type])
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 4, 6, 6]) for n in "xy")
    convs = [helper.make_node("Conv", [a, "w"], [b], name=b) for a, b in ("xh", "fy")]
    graph = helper.make_graph(
        [convs[0], function, convs[1]], "test", [x], [y], [numpy_helper.from_array(w, "w")]
    )
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "m.onnx")
    samples = {"x": rng.normal(size=(16, 4, 6, 6)).astype(np.float32)}
    onnx.save(quantise_model(tmp_path / "m.onnx", samples), tmp_path / "q.onnx")
    assert [p for p in place(tmp_path / "q.onnx") if p.host and not p.converts] == []
