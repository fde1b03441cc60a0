"""Elementwise functions as tables, against onnxruntime."""

import numpy as np
import pytest

from systole.sw.ir.graph import Binary, Conv, Pool, Select, Table
from tests.helpers.operator_models import (
    CONSTANTS,
    DTYPES,
    Build,
    check,
    const,
    node,
)
from tests.helpers.random_models import random_array

FUNCTIONS = {
    "Sigmoid": [node("Sigmoid")],
    "Tanh": [node("Tanh")],
    "HardSigmoid": [node("HardSigmoid", alpha=0.3)],
    "HardSwish": [node("HardSwish")],
    "LeakyRelu": [node("LeakyRelu", alpha=0.1)],
    "Elu": [node("Elu")],
    "Gelu": [node("Gelu", approximate="tanh")],
    "Gelu microsoft": [node("Gelu", domain="com.microsoft")],
    "Erf": [node("Erf")],
    "Exp": [node("Exp")],
    "Sqrt": [node("Abs"), node("Sqrt")],
    "Neg": [node("Neg")],
    "Reciprocal": [node("Reciprocal")],
    "PRelu": [node("PRelu", const([[[0.2]]]))],
    "Relu of Mul": [node("Mul", const(-1.3)), node("Relu")],
    "Clip of Sub": [node("Sub", const([0.4])), node("Clip", const(-1.0), const(2.0))],
    "Add after Relu": [node("Relu"), node("Add", const(0.7))],
    "Pow": [node("Pow", const(2.0))],
    "Div": [node("Div", const(3.0))],
    "Max": [node("Max", const(0.33))],
    "Reshape": [node("Sigmoid"), node("Transpose", perm=[0, 1, 3, 2]), node("Tanh")],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_function(name, dtype, tmp_path):
    model = Build(dtype)
    value = model.x("x", (2, 5, 11, 13))
    for step in FUNCTIONS[name]:
        value = step(model, value)
    (op,) = check(model.end(value), tmp_path).ops
    assert isinstance(op, Table)


def silu(model, x, quantised):
    gate = model.node("Sigmoid", [x], "gate")
    if quantised:
        gate = model.again(gate, 1 / 255, -128, "gate_q")
    return model.node("Mul", [x, gate], "silu")


@pytest.mark.parametrize("quantised", [False, True])
def test_function_joins_the_convolution(quantised, tmp_path):
    """x * sigmoid(x), with and without a scale between: one table, behind the convolution."""
    rng = np.random.default_rng(0)
    model = Build(np.int8)
    w = model.dq(model.const("w", random_array(rng, np.int8, (6, 4, 3, 3))), 0.003, np.int8(0))
    x = model.again(model.node("Conv", [model.x("x", (1, 4, 9, 8)), w], "c"), 0.043, 5, "mid")
    (op,) = check(model.end(silu(model, x, quantised)), tmp_path).ops
    assert isinstance(op, Conv) and op.op_type == "Conv+Sigmoid+Mul"
    assert (op.activation.mid_name, op.activation.zero, op.output) == ("mid", 5, "y")


def test_function_of_a_shared_tensor_stays(tmp_path):
    model = Build(np.int8)
    x = model.x("x", (1, 4, 9, 8))
    total = model.again(model.node("Add", [x, model.x("z", (1, 4, 9, 8))], "s"), 0.07, 1, "mid")
    gate = model.again(model.node("Sigmoid", [total], "g"), 1 / 250, -128, "gate")
    graph = check(model.end(model.node("Concat", [total, gate], "both", axis=1)), tmp_path)
    assert [type(op) for op in graph.ops] == [Binary, Table, Select]


def test_tables_and_clamps_in_a_row_are_one(tmp_path):
    model = Build(np.uint8)
    value = model.x("x", (1, 4, 9, 8))
    for i, step in enumerate((node("Tanh"), node("Relu"), node("Neg"))):
        value = model.again(step(model, value), 0.011, -20, f"q{i}")
    (op,) = check(model.end(node("Exp")(model, value), 0.0047), tmp_path).ops
    assert isinstance(op, Table) and op.output == "y"


@pytest.mark.parametrize("op_type", ["QLinearSigmoid", "QLinearLeakyRelu"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_functions(op_type, dtype, tmp_path):
    model = Build(dtype)
    names = [model.input("x", dtype, (1, 3, 16, 17)), *model.pair("x", 0.05, model.zero(9))]
    names += model.pair("y", 0.0063, model.zero(-100))
    extra = {"alpha": 0.2} if op_type.endswith("Relu") else {}
    y = model.node(op_type, names, "y", "com.microsoft", **extra)
    (op,) = check(model.done(y, dtype), tmp_path).ops
    assert isinstance(op, Table)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", CONSTANTS)
@pytest.mark.parametrize("signs", ["positive", "negative", "mixed"])
def test_prelu(form, signs, dtype, tmp_path):
    shape, own = CONSTANTS[form]
    model = Build(dtype)
    low, high = {"positive": (0, 1.5), "negative": (-1, 0), "mixed": (-1, 2)}[signs]
    slope = np.random.default_rng(1).uniform(low, high, own).astype(np.float32)
    slope.flat[1] = 0
    graph = check(model.end(node("PRelu", (slope,))(model, model.x("x", shape))), tmp_path)
    types = [Table, *([Pool] if signs == "mixed" else []), Conv, Binary]
    assert [type(op) for op in graph.ops] == types


def test_prelu_and_clamp(tmp_path):
    model = Build(np.uint8)
    slope = (np.linspace(-0.5, 1, 5, dtype=np.float32).reshape(5, 1, 1),)
    value = node("PRelu", slope)(model, model.x("x", (1, 5, 9, 7)))
    check(model.end(node("Clip", const(-0.3), const(1.7))(model, value)), tmp_path)
