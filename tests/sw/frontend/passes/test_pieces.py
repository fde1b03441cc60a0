"""Functions of results that are not quantised in front of them, against onnxruntime."""

import numpy as np
import pytest

from systole.isa import Config
from systole.sw.frontend.passes.pieces import pieces_of
from systole.sw.frontend.passes.values import Quant
from systole.sw.golden import model as golden
from systole.sw.ir.graph import Binary, Conv, ConvTranspose, MatMul, ModelError, Pool, Table
from systole.sw.session.backends import open_device
from tests.helpers.layer_checks import check_on
from tests.helpers.operator_models import DTYPES, Build, check, compare, const, node
from tests.helpers.random_models import random_array


def conv(model, scale=0.003):
    """An unquantised result of about +-6."""
    w = random_array(np.random.default_rng(0), np.int8, (6, 4, 3, 3))
    w = model.dq(model.const("w", w), scale, np.int8(0))
    b = np.linspace(-1, 1, 6, dtype=np.float32)
    return model.node("Conv", [model.x("x", (1, 4, 16, 17)), w, model.const("b", b)], "c")


def compiled(graph):
    """Runs the graph on the command-level simulator, which must give the golden model's bits."""
    rng = np.random.default_rng(1)
    inputs = {
        p.tensor: rng.integers(-128, 128, graph.tensors[p.tensor].shape).astype(np.int8)
        for p in graph.inputs
    }
    with open_device("commands", Config(), memory_bytes=64 << 20) as device:
        check_on(device, Config(), graph, inputs, golden.run(graph, inputs))


def silu(model, x):
    return model.node("Mul", [x, model.node("Sigmoid", [x], "gate")], "silu")


def hard_swish(model, x):
    """As exporters write it: the sum with 3 joins the bias, and is another operator's result."""
    gate = model.node("Add", [x, model.const("three", np.float32(3))], "moved")
    gate = node("Clip", const(0.0), const(6.0))(model, gate)
    return node("Div", const(6.0))(model, model.node("Mul", [x, gate], "swished"))


def gelu(model, x):
    half = node("Div", const(1.41421356))(model, x)
    gate = node("Add", const(1.0))(model, node("Erf")(model, half))
    return node("Mul", const(0.5))(model, model.node("Mul", [x, gate], "gated"))


def leaky_by_max(model, x):
    return model.node("Max", [x, node("Mul", const(0.1))(model, x)], "leaky")


LINES = {
    "LeakyRelu": (node("LeakyRelu", alpha=0.1), [Conv, Conv]),
    "steep": (node("LeakyRelu", alpha=0.013), [Conv, Conv]),
    "falling": (node("LeakyRelu", alpha=-0.3), [Conv, Conv]),
    "PRelu": (node("PRelu", const([[[0.2]]])), [Conv, Conv]),
    "of a maximum": (leaky_by_max, [Conv, Conv]),
    "Abs": (node("Abs"), [Conv, Conv]),
    "Neg": (node("Neg"), [Conv]),
    "Max": (node("Max", const(-1.3)), [Conv]),
    "Max and Min": (
        lambda m, x: node("Min", const(2.0))(m, node("Max", const(-1.3))(m, x)),
        [Conv],
    ),
    "clamped": (lambda m, x: node("Clip", const(-0.3))(m, node("LeakyRelu")(m, x)), [Conv, Conv]),
    "clamped before": (lambda m, x: node("Add", const(0.293))(m, node("Relu")(m, x)), [Conv]),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LINES)
def test_lines_are_exact(name, dtype, tmp_path):
    step, types = LINES[name]
    model = Build(dtype)
    graph = check(model.end(step(model, conv(model)), 0.0293, -7), tmp_path)
    assert [type(op) for op in graph.ops] == types
    compiled(graph)


CURVES = {
    "Sigmoid": (node("Sigmoid"), (1 / 255, -128), 2),
    "Tanh": (node("Tanh"), (1 / 127, 0), 2),
    "HardSigmoid": (node("HardSigmoid", alpha=0.2), (1 / 255, -128), 1),
    "HardSwish": (node("HardSwish"), (0.025, -113), 2),
    "decomposed HardSwish": (hard_swish, (0.025, -113), 2),
    "Gelu": (node("Gelu", domain="com.microsoft"), (0.025, -121), 2),
    "decomposed Gelu": (gelu, (0.025, -121), 2),
    "Silu": (silu, (0.025, -117), 2),
    "Elu": (node("Elu"), (0.025, -88), 2),
    "coarse": (node("Sigmoid"), (1 / 32, -16), 1),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CURVES)
def test_curves_are_within_a_step(name, dtype, tmp_path):
    step, (scale, zero), count = CURVES[name]
    model = Build(dtype)
    graph, (result,) = compare(model.end(step(model, conv(model)), scale, zero), tmp_path)
    assert result.max_abs_diff <= 1 and result.equal > 0.45 * result.elements
    assert sum(isinstance(op, Conv) for op in graph.ops) == count
    compiled(graph)


RESULTS = {
    "ConvTranspose": ConvTranspose,
    "MatMul": MatMul,
    "Add": Binary,
    "GlobalAveragePool": Pool,
}


@pytest.mark.parametrize("op_type", RESULTS)
def test_any_result_that_is_computed(op_type, tmp_path):
    model = Build(np.int8)
    shape = (1, 8, 16, 16)
    operands = [model.x("x", shape)]
    if op_type == "ConvTranspose":
        w = random_array(np.random.default_rng(0), np.int8, (8, 4, 3, 3))
        operands.append(model.dq(model.const("w", w), 0.003, np.int8(0)))
    elif op_type in ("MatMul", "Add"):
        operands.append(model.x("z", shape))
    value = node("LeakyRelu", alpha=0.1)(model, model.node(op_type, operands, "r"))
    scale = {"MatMul": 0.21, "GlobalAveragePool": 0.0021}.get(op_type, 0.03)
    graph = check(model.end(value, scale, -60), tmp_path)
    assert isinstance(graph.ops[0], RESULTS[op_type])
    compiled(graph)


def test_table_of_a_result_that_is_read_twice(tmp_path):
    """Quantised in two ways: the function has its own grid."""
    model = Build(np.int8)
    value = conv(model)
    plain = model.again(value, 0.05, 0, "plain")
    gate = model.again(node("LeakyRelu", alpha=0.1)(model, value), 0.03, -60, "leaky")
    check(model.end(model.node("Add", [plain, gate], "sum"), 0.0613, 3), tmp_path)


def test_too_steep_a_function_is_refused(tmp_path):
    model = Build(np.int8)
    value = node("Exp")(model, conv(model, 0.02))
    with pytest.raises(ModelError, match="does not represent closely enough"):
        compare(model.end(value, 500.0, -128), tmp_path)


def test_pieces_say_by_how_much_they_may_be_off():
    """A function of slope 1, of numbers to 10 either way, to a grid of 0.1."""
    (piece,) = pieces_of(lambda x: np.tanh(x / 3) * 3, Quant(np.float32(0.1), 0, False), 100.0)
    assert 0.25 < piece.error < 0.5 and isinstance(piece.values, np.ndarray)
    assert Table not in map(type, pieces_of(np.abs, Quant(np.float32(0.1), 0, False), 100.0))


@pytest.mark.parametrize("name", ["Sigmoid", "Tanh", "Gelu"])
def test_numbers_behind_the_grid_have_the_functions_limit(name, tmp_path):
    """Most of these lie where the function has long come to its end."""
    model = Build(np.int8)
    value = node(name)(model, conv(model, 0.03))
    _, (result,) = compare(
        model.end(value, 1 / 255 if name == "Sigmoid" else 0.0293, -128), tmp_path
    )
    assert result.max_abs_diff <= 1 and result.equal >= 0.97 * result.elements
