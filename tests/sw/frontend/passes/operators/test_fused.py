"""Operators of fused form, against onnxruntime."""

import numpy as np
import pytest

from systole.sw.ir.graph import Binary, Conv, Table
from tests.helpers.operator_models import (
    DTYPES,
    Build,
    check,
)
from tests.helpers.random_models import random_array


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op_type", ["QLinearAdd", "QLinearMul"])
@pytest.mark.parametrize("constant", [None, "one", "channels"])
def test_fused_arithmetic(op_type, dtype, constant, tmp_path):
    rng = np.random.default_rng(0)
    model = Build(dtype)
    names = [model.input("a", dtype, (1, 5, 30, 40)), *model.pair("a", 0.053, model.zero(9))]
    values = {"one": model.zero(77), "channels": random_array(rng, dtype, (5, 1, 1))}.get(constant)
    b = model.const("b", values) if constant else model.input("b", dtype, (1, 5, 30, 40))
    names += [b, *model.pair("b", 0.041, model.zero(-3)), *model.pair("y", 0.113, model.zero(1))]
    y = model.node(op_type, names, "y", "com.microsoft")
    (op,) = check(model.done(y, dtype), tmp_path).ops
    assert isinstance(op, {None: Binary, "one": Table, "channels": Conv}[constant])
