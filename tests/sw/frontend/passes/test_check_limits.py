"""Sums beyond int32 are refused on the accelerator: the host computes them, and nothing wraps."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from systole.sw.compiler.partition import partition, place
from systole.sw.frontend.load import load
from systole.sw.golden import oracle
from systole.sw.ir.graph import ModelError
from systole.sw.session.segments import follow
from tests.helpers.random_models import Model

INT32_MAX = 2**31 - 1


def product(op_type: str, bias: int, *, tail: bool = False) -> onnx.ModelProto:
    """A sum of weights of 127 and a bias; with ``tail`` a MaxPool in front, for the accelerator."""
    model = Model()
    shape = [1, 4, 6, 6] if op_type.startswith("Conv") else [3, 16]
    real = model.dq(model.input("x", np.int8, shape), 1.0, np.int8(-128))
    if tail:
        pool = model.node("MaxPool", [real], "pool", kernel_shape=[1, 1])
        real = model.dq(model.q(pool, 1.0, np.int8(-128), "pq"), 1.0, np.int8(-128))
    weights = {"Conv": (5, 4, 1, 1), "ConvTranspose": (4, 5, 1, 1), "Gemm": (16, 5)}[op_type]
    model.const("w", np.full(weights, 127, np.int8))
    model.const("b", np.array([0, 0, bias, 0, 0], np.int32))
    operands = [real, model.dq("w", 1.0, np.int8(0)), model.dq("b", 1.0, np.int32(0))]
    y = model.q(model.node(op_type, operands, "sum"), 2.0**24, np.int8(0), "y")
    return model.done(y, np.int8, None)


TERMS = {"Conv": 4, "ConvTranspose": 4, "Gemm": 16}


@pytest.mark.parametrize("op_type", TERMS)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sum_that_fits(op_type, sign, tmp_path):
    path, most = tmp_path / "model.onnx", TERMS[op_type] * 127 * 255
    onnx.save(product(op_type, sign * (INT32_MAX - most)), path)
    load(path)
    onnx.save(product(op_type, sign * (INT32_MAX - most + 1)), path)
    with pytest.raises(ModelError, match="output channel 2 may reach 2,147,483,648; int32 holds"):
        load(path)


@pytest.mark.parametrize("op_type", TERMS)
def test_the_host_computes_what_does_not_fit(op_type, tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save(product(op_type, INT32_MAX, tail=op_type != "Gemm"), path)
    assert any("may reach" in p.rule for p in place(path) if p.op_type == op_type)
    if op_type == "Gemm":
        return
    x = np.full((1, 4, 6, 6), 127, np.int8)
    plan = partition(path)
    values = follow(plan, {"x": x}).values
    meaning = oracle.run(path, {"x": x}, optimise=False)["y"]
    assert (values["y"] == meaning).all()
    assert (values["y"][:, 2] == 127).all()
