"""Every tensor of the golden model against onnxruntime's, and where the first difference is."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from systole.sw.compiler.partition import partition
from systole.sw.frontend.inputs import random_inputs
from systole.sw.session import diff
from tests.helpers.diff_models import convolutions, saved
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


def test_channels_last_are_recognised():
    ours = np.arange(2 * 3 * 4, dtype=np.int8).reshape(1, 2, 3, 4)
    theirs = ours.transpose(0, 2, 3, 1)
    assert np.array_equal(diff._align(ours, theirs, None), ours)
    assert diff._align(ours, theirs[:, 1:], None) is None
