"""Arithmetic on two operands, against onnxruntime."""

import math

import numpy as np
import pytest

from systole.sw.ir.graph import Binary, Conv, ModelError, Pool, Select, Transpose
from tests.helpers.operator_models import (
    DTYPES,
    OTHER_LAYOUTS,
    REPEATING,
    Build,
    check,
    compare,
    const,
    ints,
    node,
    repeated_model,
    two_layouts_model,
)
from tests.helpers.random_models import random_array


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op_type", ["Add", "Sub", "Mul"])
@pytest.mark.parametrize(
    "a, b",
    [
        ((2, 5, 9, 7), (2, 5, 9, 7)),
        ((2, 5, 9, 7), (2, 5, 1, 1)),
        ((1, 5, 9, 7), (5, 1, 1)),
        ((1, 5, 9), (1, 5, 1)),
        ((13, 6), (13, 6)),
        ((13, 6), (1, 6)),
        ((13, 6), (6,)),
        ((1, 5, 9, 7), (1, 1, 9, 7)),
        ((1, 5, 9, 7), (1, 1, 1, 1)),
    ],
)
@pytest.mark.parametrize("swapped", [False, True])
def test_arithmetic(a, b, op_type, dtype, swapped, tmp_path):
    model = Build(dtype)
    names = [model.x("a", a), model.x("b", b, 0.0213, -30)]
    names = names[::-1] if swapped else names
    model = model.end(model.node(op_type, names, "r"), 0.0517)
    if swapped and op_type == "Sub" and a != b:
        with pytest.raises(ModelError, match="only the second may be broadcast"):
            compare(model, tmp_path)
        return
    graph = check(model, tmp_path)
    assert isinstance(graph.ops[-1], Binary) and graph.ops[-1].kind == op_type.lower()
    spread = graph.ops[-1].b if a != b else None
    assert spread is None or graph.tensors[spread].shape[2:] in ((1, 1), (9, 7))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("behind", ["activation", "convolution", "rows"])
def test_batch_normalisation(behind, dtype, tmp_path):
    rng = np.random.default_rng(0)
    model = Build(dtype)
    x = model.x("x", (9, 6) if behind == "rows" else (1, 6, 9, 7))
    if behind == "convolution":
        w = model.dq(model.const("w", random_array(rng, np.int8, (6, 6, 3, 3))), 0.002, np.int8(0))
        x = model.node("Conv", [x, w], "c")
    ranges = ((-1.5, 1.5), (-0.2, 0.2), (-0.2, 0.2), (0.5, 1.5))
    given = [(rng.uniform(low, high, 6).astype(np.float32),) for low, high in ranges]
    model = model.end(node("Relu")(model, node("BatchNormalization", *given)(model, x)), 0.0493)
    (op,) = check(model, tmp_path).ops
    behind_one = behind == "convolution"
    assert op.op_type == ("Conv" if behind_one else "BatchNormalization") and op.low == -7


SHORTCUTS = {
    "input": lambda model, x: x,
    "other": lambda model, x: model.x("z", (2, 24, 9, 11), 0.0513, -20),
    "made": lambda model, x: model.again(node("Neg")(model, x), 0.0513, -20, "n"),
    "turned": lambda model, x: node("Transpose", perm=[0, 3, 1, 2])(
        model, model.x("z", (2, 9, 11, 24), 0.0513, -20)
    ),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", SHORTCUTS)
@pytest.mark.parametrize("kernel, group", [(1, 1), (3, 1), (3, 24)])
def test_shortcut(form, kernel, group, dtype, tmp_path):
    """A convolution without a scale and an activation: in whole units of its sums."""
    rng, model = np.random.default_rng(3), Build(dtype)
    x = model.x("x", (2, 24, 9, 11))
    w = model.const("w", random_array(rng, np.int8, (24, 24 // group, kernel, kernel)))
    w = model.dq(w, rng.uniform(0.0015, 0.003, 24), np.zeros(24, np.int8), axis=0)
    b = model.const("b", rng.normal(0, 1, 24).astype(np.float32))
    value = model.node("Conv", [x, w, b], "c", pads=[kernel // 2] * 4, group=group)
    names = [value, SHORTCUTS[form](model, x)]
    value = node("Relu")(model, model.node("Add", names[:: -1 if kernel == 1 else 1], "a"))
    graph, (result,) = compare(model.end(value, 0.0893, -100), tmp_path)
    op = next(op for op in graph.ops if isinstance(op, Conv))
    assert op.op_type == "Conv+Add" and op.shortcut and op.residual is None
    assert result.max_abs_diff <= 1 and result.equal >= 0.98 * result.elements, result


@pytest.mark.parametrize("scale, match", [(3.0, "it must be 1 to 8128"), (1e-6, "1 to 8128")])
def test_shortcut_out_of_reach(scale, match, tmp_path):
    model = Build(np.int8)
    w = model.const("w", random_array(np.random.default_rng(0), np.int8, (4, 4, 1, 1)))
    value = model.node("Conv", [model.x("x", (1, 4, 9, 7)), model.dq(w, 0.002, np.int8(0))], "c")
    value = model.node("Add", [value, model.x("z", (1, 4, 9, 7), scale)], "a")
    with pytest.raises(ModelError, match=match):
        compare(model.end(value, 3.0), tmp_path)


def test_shortcut_too_coarse(tmp_path):
    """Few units of the sums to a step: their remainder counts."""
    model = Build(np.int8)
    w = model.const("w", random_array(np.random.default_rng(0), np.int8, (4, 4, 1, 1)))
    value = model.node("Conv", [model.x("x", (1, 4, 9, 7)), model.dq(w, 1.0, np.int8(0))], "c")
    value = model.node("Add", [value, model.x("z", (1, 4, 9, 7), 0.0537)], "a")
    with pytest.raises(ModelError, match="int8 cannot represent an operand of Conv"):
        compare(model.end(value, 0.0613), tmp_path)


def test_gate_of_an_image(tmp_path):
    """Squeeze and excitation: the gate is computed, then broadcast."""
    rng = np.random.default_rng(1)
    model = Build(np.uint8)
    x = model.x("x", (2, 8, 7, 9))
    mean = model.again(model.node("GlobalAveragePool", [x], "m"), 0.011, 3, "mean")
    w = model.dq(model.const("w", random_array(rng, np.int8, (8, 8, 1, 1))), 0.02, np.int8(0))
    inner = model.again(model.node("Conv", [mean, w], "c"), 0.05, 0, "inner")
    gate = model.again(model.node("Sigmoid", [inner], "s"), 1 / 255, -128, "gate")
    graph = check(model.end(model.node("Mul", [gate, x], "p")), tmp_path)
    assert [op.op_type for op in graph.ops] == ["GlobalAveragePool", "Conv+Sigmoid", "Mul"]
    assert graph.ops[-1].inputs == ("x", "gate")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op_type", ["Add", "Sub", "Mul"])
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("scale", [0.0213, 0.0313])
@pytest.mark.parametrize("name", REPEATING)
def test_repeated_operand_is_broadcast(name, scale, swapped, op_type, dtype, tmp_path):
    """A gate written with an explicit broadcast: the array has nothing to move, but for a first
    operand of a Sub, which no engine broadcasts."""
    model = repeated_model(name, op_type, swapped=swapped, scale=scale, dtype=dtype)
    graph = check(model, tmp_path)
    large = [op for op in graph.ops if isinstance(op, Select) and _size(graph, op.output) > 24]
    assert bool(large) == (swapped and op_type == "Sub")


@pytest.mark.parametrize("kind", ["constant", "output", "moved on"])
def test_repeated_value_that_others_read(kind, tmp_path):
    """What reads it is no arithmetic on two activations: its elements are repeated in memory."""
    model = Build(np.int8)
    gate = node("GlobalAveragePool")(model, model.x("x", (1, 24, 8, 9)))
    gate = REPEATING["Tile"](model, model.again(gate, 0.0213, 3, "gate"))
    if kind == "constant":
        value = node("Add", const(*range(72)))(model, node("Reshape", ints(1, 24, 72))(model, gate))
    elif kind == "moved on":
        value = node("Transpose", perm=[0, 2, 3, 1])(model, gate)
    else:
        value = gate
    graph = check(model.end(value, 0.0213 if kind != "constant" else 0.5), tmp_path)
    assert any(_size(graph, op.output) == 24 * 72 for op in graph.ops)


def _size(graph, tensor):
    return math.prod(graph.tensors[tensor].shape)


@pytest.mark.parametrize("op_type", ["Add", "Sub", "Mul"])
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("other", OTHER_LAYOUTS)
def test_one_of_two_layouts_moves(other, swapped, op_type, tmp_path):
    """Two computed operands (1, 8, 12, 24), channels last, one of them stored channels first, which
    fills words best: it stays where it is."""
    graph = check(two_layouts_model(other, op_type, swapped=swapped), tmp_path)
    pools = [op.output for op in graph.ops if isinstance(op, Pool)]
    moved = {x for op in graph.ops if isinstance(op, Select | Transpose) for x in op.inputs}
    assert len(moved & set(pools)) == 1
    assert isinstance(graph.ops[-1], Binary)
    if other == (0, 1, 2, 3):
        assert graph.tensors[graph.ops[-1].output].shape == (1, 24, 8, 12)
