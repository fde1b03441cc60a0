"""Convolutions and transposed convolutions: weights and geometry, against onnxruntime."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from systole.sw.compiler.partition import partition
from systole.sw.frontend.load import load
from systole.sw.golden import oracle
from systole.sw.ir.graph import Conv, ConvTranspose, MatMul, ModelError
from systole.sw.session.segments import follow
from tests.helpers.operator_models import (
    DTYPES,
    Build,
    check,
)
from tests.helpers.random_models import random_array


@pytest.mark.parametrize("form", ["qdq", "qlinear"])
@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("channelwise", [False, True])
@pytest.mark.parametrize("group", [1, 2, 6])
def test_asymmetric_weights(form, kind, channelwise, group, tmp_path):
    rng = np.random.default_rng([group, channelwise])
    model = Build(np.uint8)
    w = random_array(rng, kind, (12, 6 // group, 3, 3))
    zeros = random_array(rng, kind, 12 if channelwise else ())
    scales = rng.uniform(0.01, 0.02, zeros.shape).astype(np.float32)
    model.const("w", w)
    if form == "qdq":
        real = [model.x("x", (1, 6, 9, 7)), model.dq("w", scales, zeros, axis=0)]
        model = model.end(model.node("Conv", real, "c", group=group, pads=[1, 0, 1, 2]), 0.9)
    else:
        names = [model.input("x", np.uint8, (1, 6, 9, 7)), *model.pair("x", 0.05, np.uint8(140))]
        names += ["w", *model.pair("w", scales, zeros), *model.pair("y", 0.9, np.uint8(7))]
        model = model.done(model.node("QLinearConv", names, "y", group=group), np.uint8)
    graph = check(model, tmp_path, exact=form == "qdq" or not channelwise)
    (op,) = graph.ops
    shape = (-1, 1, 1, 1) if channelwise else ()
    assert (op.weights == w.astype(np.int16) - zeros.astype(np.int16).reshape(shape)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [2, 3, 6])
def test_transposed_convolution_in_groups(group, dtype, tmp_path):
    rng = np.random.default_rng(2)
    model = Build(dtype)
    zeros = random_array(rng, np.int8, (2,))
    w = model.const("w", random_array(rng, np.int8, (6, 2, 3, 4)))
    b = model.const("b", rng.normal(size=2 * group).astype(np.float32))
    names = [model.x("x", (2, 6, 5, 7)), model.dq(w, rng.uniform(0.01, 0.02, 2), zeros, axis=1), b]
    model = model.end(model.node("ConvTranspose", names, "c", strides=[2, 1], group=group), 0.417)
    (op,) = check(model, tmp_path).ops
    assert op.weights.shape == (2 * group, 6, 3, 4) and op.weights.dtype == np.int16


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape, kernel, attributes",
    [
        ((1, 5, 6, 7), (2, 2), {"strides": [2, 2]}),
        ((2, 5, 6, 7), (3, 3), {"strides": [2, 2], "pads": [1] * 4, "output_padding": [1, 1]}),
        ((1, 3, 5, 4), (3, 2), {"strides": [3, 1], "pads": [0, 1, 2, 0], "dilations": [2, 3]}),
        ((1, 3, 5, 4), (1, 1), {"strides": [3, 2], "output_padding": [2, 1]}),
        ((1, 3, 5, 4), (4, 4), {"strides": [2, 2], "auto_pad": "SAME_UPPER"}),
        ((1, 3, 5, 4), (3, 2), {"strides": [4, 3], "auto_pad": "SAME_UPPER"}),
        ((1, 3, 5, 4), (3, 2), {"strides": [4, 3], "auto_pad": "SAME_LOWER"}),
        ((1, 3, 5, 4), (3, 3), {"strides": [2, 2], "output_shape": [10, 9]}),
        ((1, 3, 12), (4,), {"strides": [2], "pads": [1, 1]}),
    ],
)
def test_transposed_convolution(shape, kernel, attributes, dtype, tmp_path):
    rng = np.random.default_rng(2)
    model = Build(dtype)
    w = model.const("w", random_array(rng, np.int8, (shape[1], 6, *kernel)))
    b = model.const("b", rng.integers(-3000, 3000, 6).astype(np.int32))
    scale = np.float32(0.0371) * np.float32(0.0113)
    names = [model.x("x", shape), model.dq(w, 0.0113, np.int8(0)), model.dq(b, scale, np.int32(0))]
    model = model.end(model.node("ConvTranspose", names, "c", **attributes), 0.417)
    (op,) = check(model, tmp_path).ops
    assert isinstance(op, ConvTranspose) and min(op.pads) >= 0


def test_transposed_convolution_with_zero_points_and_function(tmp_path):
    rng = np.random.default_rng(3)
    model = Build(np.uint8)
    w = model.const("w", random_array(rng, np.uint8, (4, 3, 3, 3)))
    zeros = random_array(rng, np.uint8, (3,))
    w = model.dq(w, np.full(3, 0.0113), zeros, axis=1)
    x = model.node("ConvTranspose", [model.x("x", (1, 4, 5, 6)), w], "c", strides=[2, 2])
    x = model.node("Tanh", [model.again(x, 0.217, 3, "mid")], "t")
    (op,) = check(model.end(x, 0.0083, 1), tmp_path).ops
    assert op.weights.dtype == np.int16 and op.activation.mid_name == "mid"


@pytest.mark.parametrize("element", [TensorProto.INT4, TensorProto.UINT4])
@pytest.mark.parametrize("per_channel", [True, False])
def test_weights_of_four_bits(element, per_channel, tmp_path):
    """They are weights of 8 bits: the same numbers."""
    rng, model = np.random.default_rng(3), Build(np.uint8)
    numbers = rng.integers(-8, 8, (6, 5, 3, 3)) + (8 if element == TensorProto.UINT4 else 0)
    model.constants.append(helper.make_tensor("w", element, numbers.shape, numbers.ravel()))
    count = (6,) if per_channel else ()
    zero = np.full(count, 8 if element == TensorProto.UINT4 else 0)
    model.constants.append(helper.make_tensor("wz", element, count, zero.ravel()))
    scale = model.const("ws", np.full(count, 0.01, np.float32))
    w = model.node("DequantizeLinear", ["w", scale, "wz"], "w_real", axis=0)
    made = model.end(model.node("Conv", [model.x("x", (1, 5, 8, 8)), w], "c"))
    path = tmp_path / "model.onnx"
    onnx.save(made, path)
    x = random_array(rng, np.uint8, (1, 5, 8, 8))
    trail = follow(partition(path), {"x": x})
    assert not trail.host_ops
    meaning = oracle.run(path, {"x": x}, optimise=False)["y"]
    assert np.abs(trail.values["y"].astype(int) - meaning).max() <= 1


@pytest.mark.parametrize("count", [3, 7])
def test_biases_of_another_length_are_refused(count, tmp_path):
    model = Build(np.uint8)
    model.const("w", np.ones((6, 5, 1, 1), np.int8))
    model.const("b", np.ones(count, np.int32))
    operands = [model.x("x", (1, 5, 4, 4)), model.dq("w", 0.01, np.int8(0))]
    operands.append(model.dq("b", 0.01 * 0.0371, np.int32(0)))
    path = tmp_path / "model.onnx"
    onnx.save(model.end(model.node("Conv", operands, "c")), path)
    with pytest.raises(ModelError, match=f"bias of {count} values for 6 output channels"):
        load(path)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape, constant",
    [((2, 3, 7, 9), (1, 1, 9, 8)), ((2, 3, 7, 9), (3, 9, 8)), ((7, 9), (1, 1, 9, 8))],
)
def test_constant_that_holds_one_matrix(shape, constant, dtype, tmp_path):
    """However often, per column too: a product by that matrix."""
    model = Build(dtype)
    w = random_array(np.random.default_rng(0), np.int8, constant[-2:])
    w = model.const("w", np.ascontiguousarray(np.broadcast_to(w, constant)))
    scales = [model.const("s", np.linspace(0.005, 0.011, 8, dtype=np.float32))]
    scales.append(model.const("z", np.zeros(8, np.int8)))
    w = model.node("DequantizeLinear", [w, *scales], "w_real", axis=len(constant) - 1)
    graph = check(model.end(model.node("MatMul", [model.x("x", shape), w], "p"), 0.093), tmp_path)
    assert isinstance(graph.ops[-1], Conv) and not any(isinstance(op, MatMul) for op in graph.ops)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scales", ["one", "each"])
@pytest.mark.parametrize("gamma", [[0.7], [0.7, -1.3, 0, 2, -0.4, 1]])
def test_weights_times_gamma(gamma, scales, dtype, tmp_path):
    """Signs reflect the codes, -128 among them, about any zero point."""
    model = Build(dtype)
    w = random_array(np.random.default_rng(2), dtype, (6, 4, 3, 3))
    w.flat[:8] = np.iinfo(dtype).min
    count = 6 if scales == "each" else 1
    zero = np.linspace(-5, 9, count).astype(np.int64) + (128 if dtype == np.uint8 else 0)
    pair = [model.const("s", np.linspace(0.004, 0.009, count, dtype=np.float32).reshape(-1))]
    pair.append(model.const("z", zero.astype(dtype)))
    if count == 1:
        pair = model.pair("w", 0.004, zero.astype(dtype)[0])
    real = model.node("DequantizeLinear", [model.const("w", w), *pair], "real", axis=0)
    factor = model.const("gamma", np.float32(gamma).reshape(-1, 1, 1, 1))
    real = model.node("Mul", [factor, real], "scaled")
    model = model.end(model.node("Conv", [model.x("x", (1, 4, 9, 8)), real], "c"), 0.0937)
    (op,) = check(model, tmp_path).ops
    assert isinstance(op, Conv)
