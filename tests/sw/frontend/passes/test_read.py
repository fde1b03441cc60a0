"""Pass 1: shapes that are fixed, constants that are folded, and malformed models."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from systole.sw.frontend.passes.read import read
from systole.sw.ir.graph import ModelError
from tests.helpers.random_models import Model


def saved(nodes, path, shape=("batch", 3, "height", 8), initialisers=()):
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    constants = [onnx.numpy_helper.from_array(array, name) for name, array in initialisers]
    graph = helper.make_graph(nodes, "g", [x], [y], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("name", ["height", "x:2"])
def test_open_dimensions_are_bound_and_the_batch_is_one(name, tmp_path):
    path = saved([helper.make_node("Relu", ["x"], ["y"])], tmp_path / "m.onnx")
    (value,) = read(path, {name: 5}).graph.inputs
    assert value.shape.numpy() == (1, 3, 5, 8)


def test_what_is_left_open_is_refused(tmp_path):
    path = saved([helper.make_node("Relu", ["x"], ["y"])], tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=r"dimension 2 is height; .* --dim height=N"):
        read(path)
    with pytest.raises(ModelError, match="no open dimension depth"):
        read(path, {"height": 5, "depth": 2})


def test_constants_are_folded_and_nodes_sorted(tmp_path):
    nodes = [
        helper.make_node("Add", ["x", "sum"], ["y"]),
        helper.make_node("Add", ["a", "a"], ["sum"]),
        helper.make_node("Neg", ["x"], ["nobody reads it"]),
    ]
    a = np.float32([1.5])
    model = read(saved(nodes, tmp_path / "m.onnx", (1, 3, 4, 8), [("a", a)]))
    assert [node.op_type for node in model.graph] == ["Add"]
    (constant,) = model.graph.initializers.values()
    assert constant.const_value.numpy() == 3.0


def test_an_unknown_value_is_named(tmp_path):
    path = saved([helper.make_node("Add", ["x", "b"], ["y"])], tmp_path / "m.onnx", (1, 3, 4, 8))
    with pytest.raises(ModelError, match="input 'b' is defined by no node, input or initialiser"):
        read(path)


def _dropout(training, ratio=0.5):
    model = Model(21)
    extra = [model.const("ratio", np.float32(ratio)), model.const("training", np.bool_(training))]
    real = model.dq(model.input("x", np.int8, (2, 4)), 0.1, np.int8(0))
    dropped = model.node("Dropout", [real, *extra], "dropped")
    return model.done(model.q(dropped, 0.2, np.int8(0), "y"), np.int8)


def _random(op_type, used, **attributes):
    model = Model(21)
    real = model.dq(model.input("x", np.int8, (2, 4)), 0.1, np.int8(0))
    noise = model.node(op_type, [real] if op_type == "Bernoulli" else [], "noise", **attributes)
    total = model.node("Add", [real, noise], "total")
    return model.done(model.q(total if used else real, 0.2, np.int8(0), "y"), np.int8)


@pytest.mark.parametrize(
    "model, reason",
    [
        (_dropout(True), "Dropout 'dropped_node': training_mode is not false: its result is"),
        (_random("RandomNormal", True, shape=[2, 4]), "RandomNormal 'noise_node': its result is"),
        (_random("Bernoulli", True), "Bernoulli 'noise_node': its result is random, so that no"),
    ],
)
def test_random_results_are_refused(model, reason, tmp_path):
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(ModelError) as e:
        read(tmp_path / "model.onnx")
    assert reason in str(e.value) and str(e.value).endswith("export the model in evaluation mode")


@pytest.mark.parametrize(
    "model", [_dropout(False), _dropout(True, 0.0), _random("Bernoulli", False)]
)
def test_random_operators_without_effect_are_taken(model, tmp_path):
    onnx.save(model, tmp_path / "model.onnx")
    read(tmp_path / "model.onnx")
