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
    count = 4 if name == "join" else 3
    ops = check(model, tmp_path, exact=True).ops
    assert [type(op) for op in ops].count(Select) == 1 and len(ops) == count
