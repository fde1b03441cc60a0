"""Products of integers are exact on any processor: none of them runs in a kernel that saturates."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from systole.sw.compiler.partition import HostSegment
from systole.sw.golden import oracle
from systole.sw.golden.exact import saturating_products, without_saturation
from systole.sw.session.host import run as run_on_host
from tests.helpers.random_models import Model, random_array, random_gemm_model

ROWS, DEPTH, COLUMNS = 8, 70, 20
A, B = (ROWS, DEPTH), (DEPTH, COLUMNS)


def worst(dtype, shape, rng) -> np.ndarray:
    """The type's extremes, of one sign or mixed: sums of two products need more than 16 bits."""
    limits = np.iinfo(dtype)
    if rng.integers(2):
        return np.full(shape, limits.max, dtype)
    return rng.choice(np.array([limits.min, limits.max], dtype), shape)


def integer_product(a, b, a_zero=0, b_zero=0) -> np.ndarray:
    return (a.astype(np.int64) - a_zero) @ (b.astype(np.int64) - b_zero)


def requantised(sums, scale, zero, dtype) -> np.ndarray:
    limits = np.iinfo(dtype)
    rounded = np.rint(sums.astype(np.float32) * np.float32(scale)).astype(np.int64)
    return np.clip(rounded + zero, limits.min, limits.max).astype(dtype)


def qdq_product(a_type, b_type, *, constant: bool, path=()) -> onnx.ModelProto:
    """MatMul between DequantizeLinear and QuantizeLinear, uint8 result. ``path``: operators that
    the first operand passes on its way to the product."""
    model = Model()
    a = model.dq(model.input("a", a_type, A), 1.0, np.array(3, a_type))
    for op_type in path:
        a = model.node(op_type, [a], f"{a}_{op_type}")
    if constant:
        model.const("b", worst(b_type, B, np.random.default_rng(1)))
    else:
        model.input("b", b_type, B)
    b = model.dq("b", 2.0**-14, np.array(0 if constant else -7, b_type))
    y = model.q(model.node("MatMul", [a, b], "real"), 1.0, np.array(128, np.uint8), "y")
    return model.done(y, np.uint8, None)


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("path", [(), ("Identity",), ("Relu",)])
@pytest.mark.parametrize("seed", range(3))
def test_qdq_product(seed, path, constant):
    rng = np.random.default_rng(seed)
    model = qdq_product(np.uint8, np.int8, constant=constant, path=path)
    assert not saturating_products(oracle.final_model(model))
    arrays = {"a": worst(np.uint8, A, rng)}
    b, zero = worst(np.int8, B, np.random.default_rng(1)), 0
    if not constant:
        arrays["b"] = b = worst(np.int8, B, rng)
        zero = -7
    result = oracle.run(model, arrays)["y"]
    a = np.maximum(arrays["a"], 3) if "Relu" in path else arrays["a"]
    wanted = requantised(integer_product(a, b, 3, zero), 2.0**-14, 128, np.uint8)
    assert (result == wanted).all()


def integer_model(op_type, domain, a_type, b_type, *, b_zero: int | None) -> onnx.ModelProto:
    """One product of two inputs, written with integer operators; ``b_zero`` None: left out."""
    model = Model()
    a, b = model.input("a", a_type, A), model.input("b", b_type, B)
    az = model.const("az", np.array(3, a_type))
    bz = "" if b_zero is None else model.const("bz", np.array(b_zero, b_type))
    names = {
        "MatMulInteger": [a, b, az, bz],
        "MatMulIntegerToFloat": [
            *(a, b, model.const("as", np.float32(1)), model.const("bs", np.float32(2.0**-14))),
            *(az, bz),
        ],
        "QLinearMatMul": [
            *(a, model.const("as", np.float32(1)), az),
            *(b, model.const("bs", np.float32(2.0**-14)), bz),
            *model.pair("y", 1.0, np.array(5, a_type)),
        ],
        "QGemm": [
            *(a, model.const("as", np.float32(1)), az),
            *(b, model.const("bs", np.float32(2.0**-14)), bz, ""),
            *model.pair("y", 1.0, np.array(5, a_type)),
        ],
    }[op_type]
    attributes = {"alpha": 1.0, "transA": 0, "transB": 0} if op_type == "QGemm" else {}
    y = model.node(op_type, names, "y", domain=domain, **attributes)
    made = model.done(y, np.float32, None)
    made.graph.output[0].type.tensor_type.elem_type = {
        "MatMulInteger": TensorProto.INT32,
        "MatMulIntegerToFloat": TensorProto.FLOAT,
    }.get(op_type, helper.np_dtype_to_tensor_dtype(np.dtype(a_type)))
    return made


TYPES = [(np.uint8, np.int8), (np.uint8, np.uint8), (np.int8, np.int8)]


@pytest.mark.parametrize("optimise", [True, False])
@pytest.mark.parametrize(
    "op_type, domain, types",
    [
        *(("MatMulInteger", "", t) for t in (*TYPES, (np.int8, np.uint8))),
        *(("MatMulIntegerToFloat", "com.microsoft", t) for t in TYPES),
        *(("QLinearMatMul", "", t) for t in TYPES),
        *(("QGemm", "com.microsoft", t) for t in TYPES),
    ],
)
def test_integer_operators(op_type, domain, types, optimise):
    a_type, b_type = types
    zero = {np.int8: -7, np.uint8: 121}[b_type]
    for b_zero in (zero, None) if op_type.startswith("MatMulInteger") else (zero,):
        model = integer_model(op_type, domain, a_type, b_type, b_zero=b_zero)
        assert not saturating_products(oracle.final_model(model, optimise=optimise))
        rng = np.random.default_rng(0)
        a, b = worst(a_type, A, rng), worst(b_type, B, rng)
        (result,) = oracle.session(model, optimise=optimise).run(None, {"a": a, "b": b})
        sums = integer_product(a, b, 3, b_zero or 0)
        wanted = {
            "MatMulInteger": lambda sums: sums,
            "MatMulIntegerToFloat": lambda sums: sums.astype(np.float32) * np.float32(2.0**-14),
        }.get(op_type, lambda sums: requantised(sums, 2.0**-14, 5, a_type))(sums)
        assert (result == wanted).all()


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("form", ["ConvInteger", "QLinearConv", "qdq"])
def test_convolutions(form, per_channel):
    rng = np.random.default_rng(2)
    model, scales = Model(), np.full(12 if per_channel else (), 2.0**-14, np.float32)
    model.input("x", np.uint8, (1, 9, 6, 6))
    weights = worst(np.int8, (12, 9, 3, 3), rng)
    model.const("w", weights)
    zero = np.zeros(scales.shape, np.int8)
    if form == "qdq":
        operands = [model.dq("x", 1.0, np.uint8(0)), model.dq("w", scales, zero, axis=0)]
        y = model.q(model.node("Conv", operands, "real"), 1.0, np.uint8(99), "y")
    elif form == "QLinearConv":
        names = ["x", *model.pair("x", 1.0, np.uint8(0))]
        names += ["w", model.const("ws", scales), model.const("wz", zero)]
        y = model.node("QLinearConv", [*names, *model.pair("y", 1.0, np.uint8(99))], "y")
    else:
        y = model.node("ConvInteger", ["x", "w", model.const("xz", np.uint8(0))], "y")
    made = model.done(y, np.uint8, None)
    if form == "ConvInteger":
        made.graph.output[0].type.tensor_type.elem_type = TensorProto.INT32
    assert not saturating_products(oracle.final_model(made))
    x = worst(np.uint8, (1, 9, 6, 6), rng)
    windows = np.lib.stride_tricks.sliding_window_view(x[0], (3, 3), axis=(1, 2))
    sums = np.einsum("cyxij,ocij->oyx", windows.astype(np.int64), weights.astype(np.int64))[None]
    wanted = sums if form == "ConvInteger" else requantised(sums, 2.0**-14, 99, np.uint8)
    assert (oracle.run(made, {"x": x})["y"] == wanted).all()


def test_quantised_at_run_time():
    """DynamicQuantizeLinear, MatMulInteger, Cast, Mul: what dynamic quantisation writes."""
    model = Model()
    model.input("x", np.float32, A)
    b = worst(np.int8, B, np.random.default_rng(4))
    model.const("b", b)
    node = helper.make_node("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"])
    model.nodes.append(node)
    sums = model.node("MatMulInteger", ["xq", "b", "xz", model.const("bz", np.int8(0))], "sums")
    real = model.node("Cast", [sums], "real", to=TensorProto.FLOAT)
    scale = model.node("Mul", ["xs", model.const("bs", np.float32(0.5))], "scale")
    made = model.done(model.node("Mul", [real, scale], "y"), np.float32, None)
    final = oracle.final_model(made)
    assert not saturating_products(final)
    assert "DynamicQuantizeMatMul" in [n.op_type for n in final.graph.node]
    x = np.full(A, 255, np.float32)
    result = oracle.run(made, {"x": x})["y"]
    assert np.allclose(result, 0.5 * (x.astype(np.float64) @ b), rtol=1e-6)


@pytest.mark.parametrize("scales", [(1,), (1, 64)])
def test_lstm_quantised_at_run_time(scales):
    """One step whose gates are all equal: x is 1, every weight 127."""
    model, hidden, size = Model(), 16, 32
    model.input("x", np.float32, (1, 1, size))
    names = ["x", model.const("w", np.full((1, size, 4 * hidden), 127, np.int8))]
    names += [model.const("r", np.ones((1, hidden, 4 * hidden), np.int8)), *[""] * 5]
    for name in ("w", "r"):
        names.append(model.const(f"{name}_scale", np.full(scales, 1e-4, np.float32)))
        names.append(model.const(f"{name}_zero", np.zeros(scales, np.int8)))
    model.node("DynamicQuantizeLSTM", names, "y", "com.microsoft", hidden_size=hidden)
    made = model.done("y", np.float32, None)
    assert not saturating_products(oracle.final_model(made))
    gate = 1 / (1 + np.exp(-size * 127e-4))
    result = oracle.run(made, {"x": np.ones((1, 1, size), np.float32)})["y"]
    assert np.allclose(result, gate * np.tanh(gate * np.tanh(size * 127e-4)), rtol=1e-5)


def test_attention():
    """All values of a head are equal, so the weights of attention do not matter."""
    model, size = Model(), 64
    x = np.full((1, 3, size), 255, np.uint8)
    w = worst(np.int8, (size, 3 * size), np.random.default_rng(7))
    model.input("x", np.uint8, x.shape)
    names = ["x", model.const("w", w), model.const("b", np.zeros(3 * size, np.float32))]
    names += [model.const("xs", np.float32(1)), model.const("ws", np.float32(2.0**-10)), ""]
    names += [model.const("xz", np.uint8(0)), model.const("wz", np.int8(0))]
    model.node("QAttention", names, "y", "com.microsoft", num_heads=4)
    made = model.done("y", np.float32, None)
    assert not saturating_products(oracle.final_model(made))
    wanted = integer_product(x, w[:, 2 * size :]) * 2.0**-10
    assert np.allclose(oracle.run(made, {"x": x})["y"], wanted, rtol=1e-5)


def test_inside_bodies():
    """The operand of a product inside an If is a constant of the graph around it."""
    names = ["a", "b", "az", "bz"]
    branch = helper.make_graph(
        [helper.make_node("MatMulInteger", names, ["inner"])],
        "branch",
        [],
        [helper.make_tensor_value_info("inner", TensorProto.INT32, [ROWS, COLUMNS])],
    )
    model = Model()
    model.input("a", np.uint8, A)
    b = worst(np.int8, B, np.random.default_rng(4))
    for name, value in (("b", b), ("az", np.uint8(0)), ("bz", np.int8(0))):
        model.const(name, value)
    model.inputs.append(helper.make_tensor_value_info("choice", TensorProto.BOOL, []))
    y = model.node("If", ["choice"], "y", then_branch=branch, else_branch=branch)
    made = model.done(y, np.float32, None)
    made.graph.output[0].type.tensor_type.elem_type = TensorProto.INT32
    assert len(saturating_products(made)) == 2
    assert not saturating_products(oracle.final_model(made))
    for choice in (True, False):
        a = np.full(A, 255, np.uint8)
        result = oracle.run(made, {"a": a, "choice": np.array(choice)})["y"]
        assert (result == integer_product(a, b)).all()


def test_on_the_host():
    model = qdq_product(np.uint8, np.int8, constant=False)
    rng = np.random.default_rng(6)
    arrays = {"a": np.full(A, 255, np.uint8), "b": worst(np.int8, B, rng)}
    host = run_on_host(HostSegment(model, []), arrays, 0)
    sums = integer_product(arrays["a"], arrays["b"], 3, -7)
    assert (host.values["y"] == requantised(sums, 2.0**-14, 128, np.uint8)).all()


def test_int8_is_left_alone():
    model = random_gemm_model(np.random.default_rng(1), form="qlinear")
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.INT8
    for constant in model.graph.initializer:
        if constant.data_type == TensorProto.UINT8:
            constant.data_type = TensorProto.INT8
    before = model.SerializeToString()
    assert not saturating_products(model)
    assert without_saturation(model).SerializeToString() == before


def test_random_mixed_products():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        types = [np.dtype(rng.choice(["int8", "uint8"])) for _ in range(2)]
        model = integer_model("MatMulInteger", "", *types, b_zero=None)
        a, b = random_array(rng, types[0], A), random_array(rng, types[1], B)
        assert (oracle.run(model, {"a": a, "b": b})["y"] == integer_product(a, b, 3)).all()


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64") or not shutil.which("qemu-x86_64"),
    reason="needs an x86 machine and qemu-user, to emulate older processors",
)
@pytest.mark.parametrize("processor", ["Haswell", pytest.param("Nehalem", marks=pytest.mark.long)])
def test_on_an_older_processor(processor):
    """This file again, on an emulated processor without VNNI (and without AVX)."""
    command = ["qemu-x86_64", "-cpu", processor, sys.executable, "-m", "pytest"]
    command += ["-p", "no:xdist", "-p", "no:cacheprovider", "-k", "not older", __file__]
    run = subprocess.run(
        command,
        # numpy takes a processor with AVX2 for one that it is not.
        env={**os.environ, "NPY_DISABLE_CPU_FEATURES": "X86_V3", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
    assert "passed" in run.stdout
