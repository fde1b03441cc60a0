"""Arithmetic with constants along the channels, against onnxruntime."""

import numpy as np
import pytest

from systole.sw.ir.graph import Conv, ModelError
from tests.helpers.operator_models import (
    CONSTANTS,
    DTYPES,
    Build,
    check,
    compare,
    const,
    node,
)
from tests.helpers.random_models import random_array


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op_type", ["Add", "Sub", "Mul", "Div"])
@pytest.mark.parametrize("form", CONSTANTS)
@pytest.mark.parametrize("kind", ["float", "quantised", "first"])
def test_constant_per_channel(op_type, form, kind, dtype, tmp_path):
    shape, own = CONSTANTS[form]
    rng = np.random.default_rng(len(form))
    model = Build(dtype)
    if kind == "quantised":
        whole = model.const("k", rng.integers(129, 255, own).astype(np.uint8))
        constant = model.dq(whole, 0.0217, np.uint8(128))
    else:
        values = rng.uniform(0.3, 2, own) * rng.choice([-1, 1], own)
        constant = model.const("k", values.astype(np.float32))
    names = [model.x("x", shape), constant]
    model = model.end(model.node(op_type, names[::-1] if kind == "first" else names, "r"), 0.0437)
    if (op_type, kind) == ("Div", "first"):
        with pytest.raises(ModelError, match="must be a dequantised"):
            compare(model, tmp_path)
        return
    (op,) = check(model, tmp_path).ops
    assert isinstance(op, Conv) and op.group == op.weights.size


def test_constants_in_a_row(tmp_path):
    """A batch normalisation in pieces, and a clamp."""
    rng = np.random.default_rng(0)
    model = Build(np.uint8)
    value = model.x("x", (1, 5, 9, 7))
    for op_type, low in (("Mul", 0.5), ("Add", -1.0), ("Mul", -1.5), ("Sub", 0.1), ("Relu", None)):
        more = [] if low is None else [(rng.uniform(low, low + 1, (5, 1, 1)).astype(np.float32),)]
        value = node(op_type, *more)(model, value)
    (op,) = check(model.end(value), tmp_path).ops
    assert op.op_type == "Mul+Add+Mul+Sub"


def test_channels_with_hardly_any_gain(tmp_path):
    """As of dead channels of a trained network: what is added to them remains."""
    model = Build(np.int8)
    gain = 10.0 ** -np.arange(14, dtype=np.float32).reshape(14, 1, 1)
    value = node("Mul", (gain,))(model, model.x("x", (1, 14, 9, 7)))
    shift = np.random.default_rng(0).uniform(-3, 3, (14, 1, 1)).astype(np.float32)
    check(model.end(node("Add", (shift,))(model, value)), tmp_path)


@pytest.mark.parametrize("op_type", ["Mul", "Div"])
@pytest.mark.parametrize("of", ["Conv", "Add", "Mul", "AveragePool", "MatMul"])
def test_result_times_a_number(of, op_type, tmp_path):
    """No scale in between: it is in the result's. Also behind a clamp."""
    model = Build(np.int8)
    x = model.x("x", (1, 6, 9, 9))
    w = random_array(np.random.default_rng(0), np.int8, (6, 6, 3, 3))
    w = model.dq(model.const("w", w), 0.001, np.int8(0))
    more = {"Conv": [w], "AveragePool": []}.get(of, [model.x("z", (1, 6, 9, 9), 0.021)])
    attributes = {"kernel_shape": [2, 2]} if of == "AveragePool" else {}
    value = node("Relu")(model, model.node(of, [x, *more], "v", **attributes))
    value = node(op_type, const(0.37))(model, value)
    (op,) = check(model.end(value, 0.0437), tmp_path).ops
    assert op.op_type == of and op.low == -7


@pytest.mark.parametrize("added", ["Add", "Sub"])
@pytest.mark.parametrize("op_type", ["Conv", "ConvTranspose"])
def test_constants_behind_a_convolution(op_type, added, tmp_path):
    rng = np.random.default_rng(0)
    model = Build(np.int8)
    w = model.dq(model.const("w", random_array(rng, np.int8, (6, 6, 3, 3))), 0.02, np.int8(0))
    value = model.node(op_type, [model.x("x", (1, 6, 9, 7)), w], "c")
    gain = np.array([1.5, -0.5, 0.25, 1, 0, -2], np.float32).reshape(6, 1, 1)
    value = node("Mul", (gain,))(model, value)
    value = node(added, (rng.normal(size=(6, 1, 1)).astype(np.float32),))(model, value)
    check(model.end(value, 0.3), tmp_path)
