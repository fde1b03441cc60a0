"""The golden model against onnxruntime."""

import numpy as np
import onnx
import onnxruntime
import pytest

from systole.sw.frontend.load import load
from systole.sw.golden import model as golden
from systole.sw.golden import oracle
from systole.sw.ir.graph import Conv, Pool, Port, Tensor
from tests.helpers.random_models import (
    Model,
    random_array,
    random_conv_model,
    random_gemm_model,
    random_inputs,
)

SEEDS = range(12)


def both(model, inputs, tmp_path):
    """The graph, and each output's comparison with onnxruntime."""
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    graph = load(path)
    arrays = {
        p.tensor: golden.quantise_input(p, graph.tensors[p.tensor], inputs[p.name])
        for p in graph.inputs
    }
    ours = golden.run(graph, arrays)
    theirs = oracle.run(path, inputs)
    result = [
        oracle.compare(p, graph.tensors[p.tensor], ours[p.tensor], theirs[p.name])
        for p in graph.outputs
    ]
    return graph, result, ours


def check_exact(model, rng, tmp_path):
    graph, (result,), ours = both(model, random_inputs(rng, model), tmp_path)
    assert result.exact, result
    return graph, ours


@pytest.mark.parametrize("form", ["qdq", "qlinear"])
@pytest.mark.parametrize("group", ["one", "depthwise", "any"])
@pytest.mark.parametrize("seed", SEEDS)
def test_conv_is_exact(seed, group, form, tmp_path):
    rng = np.random.default_rng([seed, len(group), len(form)])
    model = random_conv_model(rng, form=form, group=group, work=5_000_000)
    graph, _ = check_exact(model, rng, tmp_path)
    assert [type(op) for op in graph.ops] == [Conv]


@pytest.mark.parametrize("form", ["qdq", "qlinear", "qgemm"])
@pytest.mark.parametrize("seed", SEEDS)
def test_product_is_exact(seed, form, tmp_path):
    rng = np.random.default_rng([seed, len(form)])
    check_exact(random_gemm_model(rng, form=form), rng, tmp_path)


def test_ties_and_large_accumulators_are_exact(tmp_path):
    """Scales of powers of two make half of all results ties; K = 20,000 exceeds 2^24."""
    rng = np.random.default_rng(0)
    for k, scale in ((8, 2.0**-9), (20_000, 2.0**-17), (20_000, 3e-7)):
        model = Model()
        weights = rng.integers(-128, 128, (k, 64)).astype(np.int8)
        # Columns of one sign alone, for the largest sums.
        weights[:, ::4] |= 127 if k > 8 else 0
        names = [model.input("x", np.int8, [64, k]), *model.pair("x", 1.0, np.int8(-128))]
        names += [
            model.const("w", weights),
            *model.pair("w", scale, np.int8(0)),
            *model.pair("y", 1.0, np.int8(3)),
        ]
        model = model.done(model.node("QLinearMatMul", names, "y"), np.int8, [64, 64])
        x = rng.integers(-128, 128, (64, k)).astype(np.int8)
        graph, (result,), _ = both(model, {"x": x}, tmp_path)
        assert result.exact
        op = graph.ops[0]
        image = x.T[None, :, None]
        acc = np.concatenate([a for _, _, a in golden.accumulate(op, image, -128)])
        assert (acc[0] == (x.astype(np.float64) + 128) @ weights.astype(np.float64)).all()
        if k == 8:
            assert (np.mod(acc * scale, 1) == 0.5).mean() > 1e-3
        else:
            assert np.abs(acc).max() > 1 << 24


def test_accumulators_in_pieces(monkeypatch):
    rng = np.random.default_rng(0)
    weights = rng.integers(-128, 128, (5, 7, 3, 3)).astype(np.int8)
    scale = np.full(5, 1e-3, np.float32)
    op = Conv(
        "", "Conv", "", -128, 127, "", weights, np.zeros(5, np.int32), scale,
        (2, 1), (1, 0, 2, 1), (1, 2),
    )  # fmt: skip
    x = rng.integers(-128, 128, (2, 7, 20, 20)).astype(np.int8)
    whole = list(golden.accumulate(op, x, 9))
    monkeypatch.setattr(golden, "CHUNK", 1)
    pieces = list(golden.accumulate(op, x, 9))
    assert len(whole) == 2 and len(pieces) == 2 * 11
    assert (np.stack([a for _, _, a in pieces[:11]])[:, 0] == whole[0][2]).all()


def optimised(model, path, level, int8):
    """The operator types that onnxruntime makes of a model."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.add_session_config_entry("session.qdqisint8allowed", int8)
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 3
    onnxruntime.InferenceSession(model.SerializeToString(), options)
    return [n.op_type for n in onnx.load(path).graph.node]


def test_optimised_onnxruntime_runs_integer_kernels(tmp_path):
    """What the oracle relies on: the level, and the permission of int8."""
    model = random_conv_model(np.random.default_rng(1), work=100_000)
    assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.INT8
    path = tmp_path / "optimised.onnx"
    assert "QLinearConv" not in optimised(model, path, "ORT_ENABLE_BASIC", "1")
    assert "QLinearConv" not in optimised(model, path, "ORT_ENABLE_ALL", "0")
    assert "QLinearConv" in optimised(model, path, "ORT_ENABLE_EXTENDED", "1")
    assert "QLinearConv" in optimised(model, path, "ORT_ENABLE_ALL", "1")


def window_model(rng, op_type, form="qdq", **attributes):
    dtype = np.dtype(rng.choice(["int8", "uint8"]))
    zero = random_array(rng, dtype, ())
    shape = [1, int(rng.integers(1, 40)), *rng.integers(12, 30, 2).tolist()]
    model = Model()
    x = model.input("x", dtype, shape)
    xs, ys = 0.05, 0.05 * rng.uniform(0.4, 1.2)
    if form == "qlinear":
        names = [x, *model.pair("x", xs, zero), *model.pair("y", ys, zero)]
        y = model.node(op_type, names, "y", domain="com.microsoft", **attributes)
    else:
        real = model.node(op_type, [model.dq(x, xs, zero)], "real", **attributes)
        y = model.q(real, xs if op_type == "MaxPool" else ys, zero, "y")
    return model.done(y, dtype, None)


@pytest.mark.parametrize(
    "op_type, form, attributes",
    [
        ("AveragePool", "qdq", {"kernel_shape": [3, 2], "strides": [2, 1]}),
        (
            "AveragePool",
            "qdq",
            {"kernel_shape": [3, 3], "pads": [1, 1, 0, 1], "count_include_pad": 1},
        ),
        ("GlobalAveragePool", "qdq", {}),
        ("QLinearAveragePool", "qlinear", {"kernel_shape": [2, 5], "strides": [2, 3]}),
        ("QLinearGlobalAveragePool", "qlinear", {}),
    ],
)
def test_average_pools_within_one(op_type, form, attributes, tmp_path):
    total = equal = 0
    for seed in range(4):
        rng = np.random.default_rng(seed)
        model = window_model(rng, op_type, form, **attributes)
        _, (result,), _ = both(model, random_inputs(rng, model), tmp_path)
        assert result.max_abs_diff <= 1
        total, equal = total + result.elements, equal + result.equal
    assert equal >= 0.999 * total, (equal, total)


@pytest.mark.parametrize(
    "attributes",
    [
        {"kernel_shape": [2, 2], "strides": [2, 2]},
        {"kernel_shape": [3, 5], "pads": [1, 2, 2, 4], "strides": [1, 3]},
        {"kernel_shape": [3, 2], "dilations": [2, 3]},
        {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1},
        {"kernel_shape": [3, 3], "strides": [2, 2], "auto_pad": "SAME_LOWER"},
    ],
)
def test_max_pool_is_exact(attributes, tmp_path):
    for seed in range(3):
        rng = np.random.default_rng(seed)
        graph, _ = check_exact(window_model(rng, "MaxPool", **attributes), rng, tmp_path)
        assert [type(op) for op in graph.ops] == [Pool]


def residual_model(rng, dtype=np.int8):
    """Two convolutions of one input, added, Relu."""
    model = Model()
    zero = random_array(rng, dtype, ())
    real = model.dq(model.input("x", dtype, [1, 9, 12, 11]), 0.03, zero)
    branches = []
    for name in ("a", "b"):
        model.const(f"w{name}", random_array(rng, np.int8, (13, 9, 3, 3)))
        w = model.dq(f"w{name}", 0.002, np.int8(0))
        y = model.node("Conv", [real, w], f"conv_{name}", pads=[1, 1, 1, 1])
        q = model.q(y, rng.uniform(0.05, 0.2), random_array(rng, dtype, ()), f"mid_{name}")
        pair = model.nodes[-1].input[1:]
        branches.append(model.node("DequantizeLinear", [q, *pair], f"{q}_real"))
    total = model.node("Relu", [model.node("Add", branches, "sum")], "relu")
    y = model.q(total, 0.15, np.array(np.iinfo(dtype).min, dtype), "y")
    return model.done(y, dtype, [1, 13, 12, 11])


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_residual_within_one(dtype, tmp_path):
    total = equal = 0
    for seed in range(4):
        rng = np.random.default_rng(seed)
        model = residual_model(rng, dtype)
        graph, (result,), ours = both(model, random_inputs(rng, model), tmp_path)
        first, second = graph.ops
        assert first.residual is None and second.op_type == "Conv+Add"
        assert second.residual.mid_name == "mid_b" and second.residual.other == "mid_a"
        assert "mid_b" in ours and result.max_abs_diff <= 1
        total, equal = total + result.elements, equal + result.equal
    assert equal >= 0.999 * total, (equal, total)


def test_qlinear_add_within_one(tmp_path):
    rng = np.random.default_rng(3)
    model = Model()
    names = []
    for name, scale, zero in (("a", 0.11, 200), ("b", 0.05, 0)):
        pair = model.pair(name, scale, np.uint8(zero))
        names += [model.input(name, np.uint8, [1, 5, 30, 40]), *pair]
    y = model.node("QLinearAdd", names + model.pair("y", 0.13, np.uint8(99)), "y", "com.microsoft")
    model = model.done(y, np.uint8, [1, 5, 30, 40])
    graph, (result,), _ = both(model, random_inputs(rng, model), tmp_path)
    assert result.max_abs_diff <= 1 and result.equal >= 0.999 * result.elements
    a, b = graph.ops[0].inputs
    assert (a, b) == ("a", "b")


def test_float_ports_quantise_as_onnxruntime_does(tmp_path):
    """Halves, values beyond the range, and the way back."""
    model = Model()
    x = model.input("x", np.float32, [1, 2, 8, 8])
    q = model.q(x, 0.25, np.uint8(7), "q")
    pool = model.node("MaxPool", [model.dq(q, 0.25, np.uint8(7))], "m", kernel_shape=[2, 2])
    y = model.dq(model.q(pool, 0.25, np.uint8(7), "mq"), 0.25, np.uint8(7))
    model = model.done(y, np.float32, [1, 2, 7, 7])
    array = (np.arange(128, dtype=np.float32) - 30).reshape(1, 2, 8, 8) * 0.625
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    graph = load(path)
    (port,), (out,) = graph.inputs, graph.outputs
    tensor = graph.tensors[port.tensor]
    ours = golden.run(graph, {port.tensor: golden.quantise_input(port, tensor, array)})
    real = golden.dequantise_output(out, graph.tensors[out.tensor], ours[out.tensor])
    assert real.dtype == np.float32 and (real == oracle.run(path, {"x": array})["mq_real"]).all()
    with pytest.raises(ValueError, match="no numbers"):
        golden.quantise_input(port, tensor, np.full((1, 2, 8, 8), np.nan, np.float32))
    with pytest.raises(ValueError, match="'x' is float64"):
        golden.quantise_input(port, tensor, array.astype(np.float64))
    with pytest.raises(ValueError, match="needed"):
        golden.run(graph, {port.tensor: np.zeros((1, 2, 8, 9), np.int8)})


def test_compare_counts_units():
    tensor = Tensor("y", (1, 4, 1, 1), np.float32(0.1), 5, False, (1, 4), (0, 1))
    ours = np.array([1, 2, 3, 4], np.int8).reshape(1, 4, 1, 1)
    other = np.array([[1, 2, 5, 3]], np.int8)
    result = oracle.compare(Port("y", "y", "int8"), tensor, ours, other)
    assert (result.elements, result.equal, result.max_abs_diff) == (4, 2, 2)
    real = (other.astype(np.float32) - 5) * np.float32(0.1)
    assert oracle.compare(Port("y", "y", "float32"), tensor, ours, real) == result
