"""Every tensor of the golden model against onnxruntime's, and where the first difference is."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from systole.sw.compiler.partition import partition
from systole.sw.frontend.inputs import random_inputs
from systole.sw.ir.graph import MatMul
from systole.sw.session import diff
from tests.helpers.diff_models import convolutions, saved
from tests.helpers.operator_models import Build, ints, node
from tests.helpers.product_models import attention_model
from tests.helpers.random_models import Model, random_array


def products() -> onnx.ModelProto:
    """Two matrix products; the rows of a matrix are columns of an image in the graph."""
    model, rng = Model(), np.random.default_rng(5)
    value = model.input("x", np.uint8, (3, 6))
    for i in range(2):
        real = model.dq(value, 0.05, np.uint8(100))
        name = model.const(f"w{i}", random_array(rng, np.int8, (6, 6)))
        product = model.node("MatMul", [real, model.dq(name, 0.01, np.int8(0))], f"sum{i}")
        value = model.q(product, 0.05, np.uint8(100), f"y{i}")
    return model.done(value, np.uint8)


@pytest.mark.parametrize(
    ("model", "tensors"),
    [
        (convolutions(3), ["y0", "y1", "y2"]),
        (convolutions(3, host_before=1), ["y0", "y1", "y2"]),
        (products(), ["y0", "y1"]),
    ],
    ids=["chain", "host between", "matrices"],
)
def test_every_tensor_is_compared(model, tensors, tmp_path):
    plan = partition(saved(model, tmp_path / "m.onnx"))
    rows, _ = diff.compare_layers(plan, random_inputs(plan.inputs, 1))
    assert [row.tensor for row in rows] == tensors
    for row in rows:
        assert row.difference.elements > 1
        for found in (row.difference, row.alone):
            assert (found.equal, found.largest, found.mean) == (found.elements, 0, 0.0)
    assert diff.first_offender(rows) is None


@pytest.mark.parametrize("host_before", [None, 2], ids=["one segment", "two segments"])
def test_first_offender(host_before, tmp_path):
    """onnxruntime runs a model of which one layer has another weight: the layers before agree, the
    one at fault differs by itself too, the ones behind differ only by what they were given."""
    model = convolutions(4, host_before)
    plan = partition(saved(model, tmp_path / "m.onnx"))
    weights = next(c for c in model.graph.initializer if c.name == "w1")
    changed = numpy_helper.to_array(weights).copy()
    changed[2] = -np.sign(changed[2]) * 100
    weights.CopyFrom(numpy_helper.from_array(changed, "w1"))
    plan = replace(plan, path=saved(model, tmp_path / "other.onnx"))
    rows, _ = diff.compare_layers(plan, random_inputs(plan.inputs, 1))
    assert diff.first_offender(rows) == 1
    first, at_fault, behind = rows[:3]
    assert first.difference.equal == first.difference.elements
    # One channel of four.
    assert 0 < at_fault.difference.elements - at_fault.difference.equal <= 36
    assert at_fault.alone == at_fault.difference
    assert at_fault.difference.largest >= at_fault.difference.mean > 0
    assert behind.difference.equal < behind.difference.elements
    assert behind.alone.equal == behind.alone.elements


def test_only_quantised_values_are_exposed(tmp_path):
    path = saved(convolutions(2), tmp_path / "m.onnx")
    exposed = diff.Exposed(path, ["y0", "sum0", "nonsense", "x", "y1"])
    assert sorted(exposed.outputs) == ["y0", "y1"]


def test_relaid_and_fused_tensors_are_compared(tmp_path):
    """Products in attention, whose heads become channels of the graph; the scale behind the scores
    is fused into their product."""
    plan = partition(saved(attention_model(np.uint8, 5, 3, 4), tmp_path / "m.onnx"))
    (segment,) = plan.segments
    assert any(isinstance(op, MatMul) and op.activation for op in segment.graph.ops)
    rows, _ = diff.compare_layers(plan, random_inputs(plan.inputs, 1))
    known = [row for row in rows if row.difference is not None]
    assert {"scores_q", "scaled_q", "mixed_q"} <= {row.tensor for row in known}
    for row in known:
        assert row.alone is not None, row.tensor
        assert row.difference.equal == row.difference.elements, row.tensor
        assert row.alone.equal == row.alone.elements, row.tensor


def upsampled(scale: float) -> onnx.ModelProto:
    """A picture between whose pixels three values are interpolated."""
    model = Model()
    real = model.dq(model.input("x", np.uint8, (1, 3, 9, 9)), 0.043, np.uint8(117))
    sizes = model.const("sizes", np.array([1, 1, 2, 2], np.float32))
    resized = model.node("Resize", [real, "", sizes], "resized", mode="linear")
    return model.done(model.q(resized, scale, np.uint8(117), "y"), np.uint8)


def added() -> onnx.ModelProto:
    """The sum of two inputs whose scales are half of the result's."""
    model = Model()
    reals = [model.dq(model.input(n, np.int8, (1, 4, 8, 8)), 0.0213, np.int8(3)) for n in "ab"]
    return model.done(model.q(model.node("Add", reals, "s"), 0.0426, np.int8(-5), "y"), np.int8)


def compared(model: onnx.ModelProto, tmp_path) -> tuple[diff.TensorDiff, list[str]]:
    """The row of the model's output, and what is said of all rows."""
    plan = partition(saved(model, tmp_path / "m.onnx"))
    rows, _ = diff.compare_layers(plan, random_inputs(plan.inputs, 1))
    return rows[-1], list(diff.explanations(rows))


def test_ties_are_explained(tmp_path):
    row, lines = compared(upsampled(0.043), tmp_path)
    assert row.explained and row.ties == row.differing > 0
    assert f"{row.ties} of 972 elements differ by at most 1, all of them ties" in lines[0]


def functions(*op_types: str, operator: str = "Add", between: bool = False) -> onnx.ModelProto:
    """Functions of the result of two inputs, quantised ``between`` or not."""
    model, scale = Build(np.int8), 1 / 255 if "Sigmoid" in op_types else 0.0293
    reals = [model.x("a", (1, 4, 16, 16)), model.x("b", (1, 4, 16, 16), 0.0213, -5)]
    value = model.node(operator, reals, "s")
    if between:
        value = model.again(value, 0.0571, 4, "mid")
    for step in map(node, op_types):
        value = step(model, value)
    return model.end(value, scale)


UNROUNDED = {
    "one grid": (("Gelu",), "Mul", "Mul 's_node' to int8 before Gelu"),
    "two": (("Sigmoid",), "Add", "Add 's_node' to int8 before Sigmoid"),
    "several functions": (("Tanh", "Exp"), "Sub", "Sub 's_node' to int8 before Tanh+Exp"),
}


@pytest.mark.parametrize("name", UNROUNDED)
def test_roundings_that_the_model_does_not_have(name, tmp_path):
    op_types, operator, rounded = UNROUNDED[name]
    row, (line,) = compared(functions(*op_types, operator=operator), tmp_path)
    assert row.explained and row.alone.largest == 1
    assert row.ties < row.rounded == row.differing < 0.15 * row.alone.elements
    assert line.endswith(
        f"all of them because the accelerator rounds {rounded}, where the model does not round"
    )


@pytest.mark.parametrize("op_type", ["Sigmoid", "Gelu"])
def test_a_rounding_of_the_models_is_no_difference(op_type, tmp_path):
    row, _ = compared(functions(op_type, between=True), tmp_path)
    assert row.difference.equal == row.difference.elements


def test_rounding_between_two_axes(tmp_path):
    model = Build(np.int8)
    operands = (None, None, ints(1, 3, 33, 29))
    step = node("Resize", *operands, mode="linear", coordinate_transformation_mode="align_corners")
    row, (line,) = compared(model.end(step(model, model.x("x", (1, 3, 12, 17))), 0.0371), tmp_path)
    assert row.explained and row.ties < row.rounded
    assert "the accelerator rounds to int8 within it" in line


def test_faults_behind_roundings_are_not_explained(tmp_path, monkeypatch):
    true = diff.Exposed.run

    def off(self, arrays):
        values = true(self, arrays)
        values["y"] = values["y"].copy()
        values["y"][0, 0] += 2
        return values

    monkeypatch.setattr(diff.Exposed, "run", off)
    row, (line,) = compared(functions("Sigmoid"), tmp_path)
    assert not row.explained and row.rounded <= row.differing - 200
    assert line.endswith("that does not explain the others")


def test_ties_of_sums(tmp_path, monkeypatch):
    """Half of all sums are ties; the reference rounds them up."""
    true = diff.Exposed.run

    def otherwise(self, arrays):
        values = true(self, arrays)
        twice = arrays["a"].astype(int) - 3 + arrays["b"] - 3
        values["y"] = np.clip((twice + 1) // 2 - 5, -128, 127).astype(np.int8)
        return values

    monkeypatch.setattr(diff.Exposed, "run", otherwise)
    row, _ = compared(added(), tmp_path)
    assert row.explained and row.ties > 20


def shifted() -> onnx.ModelProto:
    """An input and nearly half a step or more, by channel: the nearest fractions are halves."""
    model = Build(np.int8)
    shift = 0.0371 * np.array([0.499, 0.501, 3.499, -0.501], np.float32).reshape(4, 1, 1)
    value = node("Add", (shift,))(model, model.x("x", (1, 4, 8, 8)))
    return model.end(value, 0.0371, 3)


def biased() -> onnx.ModelProto:
    """A convolution whose bias has another scale than its sums, of which two are a step."""
    model = Build(np.int8)
    w = model.dq(model.const("w", np.eye(4, dtype=np.int8).reshape(4, 4, 1, 1)), 0.5, np.int8(0))
    b = model.const("b", np.array([51, 52, 145, 349], np.int32))
    b = model.dq(b, 0.0371 / 200, np.int32(0))
    return model.end(model.node("Conv", [model.x("x", (1, 4, 8, 8)), w, b], "c"), 0.0371, 3)


@pytest.mark.parametrize("model", [shifted, biased])
def test_constants_in_whole_units(model, tmp_path):
    row, lines = compared(model(), tmp_path)
    assert row.explained and row.ties == row.differing > 50 and row.alone.largest == 1
    assert "all of them ties" in lines[0]


@pytest.mark.parametrize("step", [1, 2])
def test_faults_are_not_explained(step, tmp_path, monkeypatch):
    """A reference that is off where the exact result lies close to a step."""
    true = diff.Exposed.run

    def off(self, arrays):
        values = true(self, arrays)
        values["y"] = values["y"].copy()
        values["y"][0, 0, 0, 0] += step  # a corner is a copy of a pixel
        return values

    monkeypatch.setattr(diff.Exposed, "run", off)
    row, lines = compared(upsampled(0.043), tmp_path)
    assert row.ties == row.differing - 1 and not row.explained
    assert "ties do not explain the others" in lines[0]
