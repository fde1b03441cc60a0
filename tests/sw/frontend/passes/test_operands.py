"""Results without a scale that are quantised early, as all that follows them is."""

import numpy as np
import onnx
import pytest

from systole.sw.frontend.load import load
from systole.sw.golden import model as golden
from systole.sw.golden import oracle
from systole.sw.ir.graph import Conv, ModelError, Pool, Select, Table
from tests.helpers.operator_models import (
    DTYPES,
    Build,
    check,
    compare,
    const,
    convolved,
    ints,
    node,
)

CHOICES = {
    "pool": [node("MaxPool", kernel_shape=[2, 2], strides=[2, 2])],
    "pools": [node("MaxPool", kernel_shape=[3, 3], pads=[1] * 4), node("Pad", ints(*[1] * 8))],
    "resize": [node("Resize", None, const(1, 1, 2, 2), mode="nearest")],
    "order": [node("Reshape", ints(1, 2, 4, 64)), node("Transpose", perm=[0, 2, 1, 3]),
              node("Reshape", ints(1, 8, 8, 8))],
    "clip": [node("Slice", ints(2), ints(6), ints(1)), node("Clip", const(0.3), const(2.0))],
    "maximum": [node("GlobalMaxPool")],
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CHOICES)
def test_quantised_early(name, dtype, tmp_path):
    """QuantizeLinear stands behind what chooses among elements; in front of it is the same."""
    model = Build(dtype)
    value = convolved(model)
    for step in CHOICES[name]:
        value = step(model, value)
    graph = check(model.end(value, 0.0593, -20), tmp_path, exact=True)
    assert isinstance(graph.ops[0], Conv) and graph.tensors[graph.ops[0].output].zero == -20


@pytest.mark.parametrize("dtype", DTYPES)
def test_concat_quantised_early(dtype, tmp_path):
    model = Build(dtype)
    gate = model.node("Sigmoid", [model.x("z", (1, 3, 8, 8))], "gate")
    value = model.node("Concat", [convolved(model), gate, convolved(model, "d")], "cat", axis=1)
    value = node("MaxPool", kernel_shape=[2, 2])(model, value)
    graph = check(model.end(value, 0.0293, -20), tmp_path)
    assert [type(op) for op in graph.ops] == [Conv, Table, Conv, Select, Pool]


def test_float_input_quantised_early(tmp_path):
    model = Build(np.int8)
    x = node("MaxPool", kernel_shape=[2, 2])(model, model.input("x", np.float32, (1, 4, 8, 8)))
    onnx.save(model.end(x, 0.0293, -20), tmp_path / "model.onnx")
    graph = load(tmp_path / "model.onnx")
    array = np.random.default_rng(0).normal(size=(1, 4, 8, 8)).astype(np.float32)
    (port,) = graph.inputs
    ours = golden.quantise_input(port, graph.tensors[port.tensor], array)
    ours = golden.run(graph, {port.tensor: ours})
    theirs = oracle.run(tmp_path / "model.onnx", {"x": array})["y"]
    assert np.array_equal(ours[graph.outputs[0].tensor], theirs)


@pytest.mark.parametrize("behind", ["two scales", "a mean", "an output"])
def test_not_quantised_early(behind, tmp_path):
    """Not where the ways behind do not agree on a scale."""
    model = Build(np.int8)
    pooled = node("MaxPool", kernel_shape=[2, 2])(model, convolved(model))
    first = model.again(pooled, 0.0593, 3, "first")
    if behind == "an output":
        onnx_model = model.end(first)
        onnx_model.graph.output.append(onnx.helper.make_empty_tensor_value_info(pooled))
    else:
        second = model.node("Neg", [pooled], "n") if behind == "a mean" else pooled
        second = model.again(second, 0.0613, 3, "second")
        onnx_model = model.end(model.node("Add", [first, second], "a"))
    with pytest.raises(ModelError, match="is float32: a QuantizeLinear"):
        compare(onnx_model, tmp_path)
