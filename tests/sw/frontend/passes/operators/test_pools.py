"""Pools and reductions, against onnxruntime."""

import numpy as np
import pytest

from systole.sw.ir.graph import Conv, ModelError, Pool
from tests.helpers.operator_models import (
    DTYPES,
    Build,
    check,
    compare,
    ints,
    node,
)
from tests.helpers.random_models import random_array

POOLS = {
    "plain": ((2, 5, 9, 8), {"kernel_shape": [3, 2]}),
    "same": ((1, 5, 9, 8), {"kernel_shape": [3, 3], "pads": [1] * 4}),
    "strided": ((2, 20, 9, 8), {"kernel_shape": [3, 4], "pads": [1, 2, 0, 3], "strides": [2, 3]}),
    "large": ((1, 5, 12, 11), {"kernel_shape": [7, 9], "pads": [3, 4, 3, 4]}),
    "auto": ((1, 5, 10, 7), {"kernel_shape": [3, 4], "auto_pad": "SAME_LOWER", "strides": [2, 2]}),
    "ceil": ((1, 5, 10, 9), {"kernel_shape": [3, 3], "strides": [2, 4], "ceil_mode": 1}),
    "both": (
        (1, 5, 10, 9),
        {"kernel_shape": [3, 4], "strides": [2, 4], "ceil_mode": 1, "pads": [1, 0, 1, 1]},
    ),
    "signal": ((2, 5, 30), {"kernel_shape": [5], "pads": [2, 1], "strides": [3]}),
    "dilated": ((1, 5, 12, 9), {"kernel_shape": [3, 2], "dilations": [2, 3], "pads": [2, 1, 1, 0]}),
}


POOL_CASES = [
    (name, op_type, fused)
    for name, (_, attributes) in POOLS.items()
    for op_type in ("AveragePool", "AveragePool padded", "MaxPool")
    for fused in (False, True)
    if not (fused and op_type == "MaxPool")
    # onnxruntime makes an invalid operator of a dilated QDQ AveragePool.
    if op_type == "MaxPool" or "dilations" not in attributes
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "op_type", "fused"), POOL_CASES)
def test_pool(name, op_type, fused, dtype, tmp_path):
    shape, attributes = POOLS[name]
    if op_type.endswith("padded"):
        attributes = attributes | {"count_include_pad": 1}
    kind = op_type.split()[0]
    model = Build(dtype)
    if fused:
        names = [model.input("x", dtype, shape), *model.pair("x", 0.0371, model.zero(3))]
        names += model.pair("y", 0.0293, model.zero(-7))
        model = model.done(
            model.node("QLinearAveragePool", names, "y", "com.microsoft", **attributes), dtype
        )
    else:
        model = model.end(model.node(kind, [model.x("x", shape)], "p", **attributes))
    if op_type.endswith("padded") and name in ("ceil", "both"):
        with pytest.raises(ModelError, match="overhanging the padding"):
            compare(model, tmp_path)
        return
    graph = check(model, tmp_path)
    assert isinstance(graph.ops[0], Pool)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 5, 9, 8), (2, 5, 30)])
@pytest.mark.parametrize("op_type", ["GlobalMaxPool", "ReduceMax", "ReduceMax flat", "ReduceMean"])
def test_pool_of_the_image(op_type, shape, dtype, tmp_path):
    model = Build(dtype)
    kind, *flat = op_type.split()
    names = [model.x("x", shape)]
    if kind.startswith("Reduce"):
        names.append(model.const("axes", np.arange(2, len(shape))))
        value = model.node(kind, names, "p", keepdims=int(not flat))
    else:
        value = model.node(kind, names, "p")
    model = model.end(value, *((0.0371, 3) if kind.endswith("Max") else ()))
    assert isinstance(check(model, tmp_path).ops[0], Pool)


REDUCED = {
    (2, 5, 9, 8): [(1,), (2,), (-1,), (1, 2), (2, 3)],
    (2, 9, 30): [(1,), (2,)],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, axes", [(s, a) for s, each in REDUCED.items() for a in each])
@pytest.mark.parametrize("op_type", ["ReduceMean", "ReduceMax"])
@pytest.mark.parametrize("keep", [0, 1])
def test_reduction(shape, axes, op_type, keep, dtype, tmp_path):
    """Also channels last; the mean over the channels is a product."""
    model = Build(dtype)
    names = [model.x("x", shape), model.const("axes", np.array(axes))]
    value = model.node(op_type, names, "r", keepdims=keep)
    graph = check(model.end(value, *((0.0371, 3) if op_type == "ReduceMax" else ())), tmp_path)
    mean = op_type == "ReduceMean" and axes == (1,)
    assert isinstance(graph.ops[-1], Conv if mean else Pool)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op_type", ["GlobalAveragePool", "GlobalMaxPool"])
@pytest.mark.parametrize("shape", [(2, 5, 196), (1, 5, 112, 8)])
def test_pool_of_a_long_image(shape, op_type, dtype, tmp_path):
    model = Build(dtype)
    value = node(op_type)(model, model.x("x", shape))
    average = op_type == "GlobalAveragePool"
    model = model.end(value, *((0.0031, -7) if average else (0.0371, 3)))
    assert isinstance(check(model, tmp_path).ops[0], Pool)


def test_mean_of_a_sequence(tmp_path):
    """Rows and features as a product makes them: nothing is moved."""
    model = Build(np.int8)
    w = random_array(np.random.default_rng(0), np.int8, (24, 20))
    w = model.dq(model.const("w", w), 0.01, np.int8(0))
    x = model.again(model.node("MatMul", [model.x("x", (1, 9, 24)), w], "p"), 0.1013, 0, "q")
    graph = check(model.end(node("ReduceMean", ints(1), keepdims=0)(model, x)), tmp_path)
    assert [type(op) for op in graph.ops] == [Conv, Pool]
