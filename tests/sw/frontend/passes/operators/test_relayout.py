"""Operators that move no data, and what they cost behind them, against onnxruntime."""

import numpy as np
import pytest

from systole.sw.ir.graph import Pool, Select
from tests.helpers.operator_models import (
    DTYPES,
    Build,
    check,
    const,
    ints,
    node,
)
from tests.helpers.random_models import random_array


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("perm", [[0, 1, 3, 2], [0, 2, 3, 1], [0, 3, 1, 2], [0, 3, 2, 1]])
@pytest.mark.parametrize("behind", ["end", "reshape", "pool"])
def test_transposed(perm, behind, dtype, tmp_path):
    """A computed tensor whose transpose is read in order."""
    model = Build(dtype)
    x = model.node("MaxPool", [model.x("x", (1, 6, 10, 9))], "m", kernel_shape=[2, 2])
    x = model.node("Transpose", [model.again(x, 0.0371, 3, "q")], "t", perm=perm)
    if behind == "reshape":
        x = node("Reshape", ints(1, 9, 6, 8))(model, x)
    if behind == "pool":
        x = node("MaxPool", kernel_shape=[2, 2])(model, x)
    types = {type(op) for op in check(model.end(x, 0.0371, 3), tmp_path, exact=True).ops}
    assert types == ({Pool} if behind == "end" else {Pool, Select})


CHANNELS_LAST = {
    "pad": [node("Pad", ints(0, 0, 0, 0, 0, 1, 1, 0))],
    "join": [],
    "slice": [node("Slice", ints(1), ints(9), ints(1))],
    "upsample": [node("Resize", None, const(1, 2, 2, 1), mode="nearest")],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CHANNELS_LAST)
def test_channels_last(name, dtype, tmp_path):
    """Between the transpositions that a converter puts around convolutions; nothing is moved
    otherwise."""
    rng, model = np.random.default_rng(0), Build(dtype)

    def conv(x, name, inputs, outputs):
        w = model.const(name, random_array(rng, np.int8, (outputs, inputs, 3, 3)))
        w = model.dq(w, 0.004, np.int8(0))
        x = node("Transpose", perm=[0, 3, 1, 2])(model, x)
        x = model.node("Conv", [x, w], f"{name}_c", pads=[1] * 4)
        return model.again(node("Transpose", perm=[0, 2, 3, 1])(model, x), 0.0713, 3, f"{name}_q")

    x = conv(model.x("x", (1, 10, 12, 3)), "a", 3, 20)
    for step in CHANNELS_LAST[name]:
        x = step(model, x)
    if name == "join":
        x = model.node("Concat", [x, conv(x, "b", 20, 4)], "j", axis=3)
    x = model.again(x, 0.0713, 3, "moved")
    x = conv(x, "d", 24 if name == "join" else 20, 8)
    model = model.done("d_q", dtype)
    ops = check(model, tmp_path, exact=True).ops
    moves = 0 if name == "pad" else 1  # the convolution pads
    convs = 3 if name == "join" else 2
    assert [type(op) for op in ops].count(Select) == moves and len(ops) == convs + moves


FRONTS = {
    "pad": [node("Pad", ints(0, 1, 1, 0, 0, 1, 1, 0))],
    "multiply": [node("Mul", (np.float32([0.8731, 1.1177, 0.7013]),))],
    "crop and shift": [
        node("Slice", ints(1), ints(70), ints(1)), node("Add", (np.float32([[0.1]]),))
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", FRONTS)
def test_in_front_of_the_first_transposition(name, tmp_path):
    """What a converter puts there reads the graph input as the convolution behind it does."""
    model = Build(np.int8)
    x = model.x("x", (1, 71, 72, 3))
    for i, step in enumerate(FRONTS[name]):
        x = model.again(step(model, x), 0.0371, 3, f"front{i}")
    x = node("Transpose", perm=[0, 3, 1, 2])(model, x)
    w = model.const("w", random_array(np.random.default_rng(0), np.int8, (8, 3, 3, 3)))
    x = model.node("Conv", [x, model.dq(w, 0.004, np.int8(0))], "c", strides=[2, 2])
    graph = check(model.end(x), tmp_path)
    assert len(graph.ops) == (1 if name == "pad" else len(FRONTS[name]) + 1)  # the Conv pads
    assert all(tensor.shape[1] in (3, 8) for tensor in graph.tensors.values())


SQUEEZES = {
    "mean": [node("ReduceMean", ints(1, 2), keepdims=1)],
    "mean and reshape": [
        node("ReduceMean", ints(1, 2), keepdims=0), node("Reshape", ints(1, 1, 1, 24))
    ],
    "pool": [
        node("Transpose", perm=[0, 3, 1, 2]), node("GlobalAveragePool"),
        node("Transpose", perm=[0, 2, 3, 1]),
    ],
}  # fmt: skip


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", SQUEEZES)
def test_squeeze_and_excite_with_channels_last(name, first, tmp_path):
    """Means, gates and residuals between transpositions move nothing. A mean of 81 has no ties."""
    model, rng = Build(np.int8), np.random.default_rng(0)

    def conv(x, name, inputs, outputs, group=1):
        kernel = 3 if group > 1 else 1
        w = model.const(
            name, random_array(rng, np.int8, (outputs, inputs // group, kernel, kernel))
        )
        w = model.dq(w, 0.0071, np.int8(0))
        x = node("Transpose", perm=[0, 3, 1, 2])(model, x)
        x = model.node("Conv", [x, w], f"{name}_c", pads=[kernel // 2] * 4, group=group)
        return model.again(node("Transpose", perm=[0, 2, 3, 1])(model, x), 0.0713, 3, f"{name}_q")

    x = conv(model.x("x", (1, 9, 9, 24)), "depth", 24, 24, group=24)
    gate = x
    for i, step in enumerate(SQUEEZES[name]):
        gate = step(model, gate)
        if i != len(SQUEEZES[name]) - 1 and name != "pool":
            gate = model.again(gate, 0.0293, 3, f"gate{i}")
    gate = conv(model.again(gate, 0.0293, 3, "mean"), "squeeze", 24, 6)
    gate = model.again(node("Sigmoid")(model, conv(gate, "excite", 6, 24)), 0.0041, -128, "gate")
    x = model.again(model.node("Mul", [gate, x] if first else [x, gate], "m"), 0.0713, 3, "scaled")
    x = model.node("Add", [conv(x, "project", 24, 24), model.x("other", (1, 9, 9, 24))], "sum")
    graph = check(model.end(x, 0.0713, 3), tmp_path)
    kinds = sorted(type(op).__name__ for op in graph.ops)
    assert kinds == ["Binary", "Conv", "Conv", "Conv", "Conv", "Pool"]
