"""Chains of convolutions, saved as files."""

import numpy as np
import onnx

from tests.helpers.random_models import Model, random_array


def convolutions(count: int, host_before: int | None = None) -> onnx.ModelProto:
    """A chain y0, y1, ...; before one of them an operator for the host."""
    model, rng = Model(), np.random.default_rng(3)
    value = model.input("x", np.int8, (1, 4, 6, 6))
    for i in range(count):
        real = model.dq(value, 0.05, np.int8(3))
        if i == host_before:
            real = model.node("Hardmax", [real], "hard", axis=1)
            real = model.dq(model.q(real, 0.05, np.int8(3), "hard_q"), 0.05, np.int8(3))
        name = model.const(f"w{i}", random_array(rng, np.int8, (4, 4, 3, 3)))
        weights = model.dq(name, 0.005, np.int8(0))
        sums = model.node("Conv", [real, weights], f"sum{i}", pads=[1, 1, 1, 1])
        value = model.q(sums, 0.05, np.int8(3), f"y{i}")
    return model.done(value, np.int8)


def saved(model: onnx.ModelProto, path):
    onnx.save(model, path)
    return path
