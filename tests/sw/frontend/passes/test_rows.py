"""Softmax and normalisations from a model: equal to the graph's meaning, in one form or another."""

import numpy as np
import onnx
import pytest
from onnx import helper

from systole.isa import Config
from systole.sw.compiler.partition import AcceleratorSegment, HostSegment, partition
from systole.sw.frontend.load import load
from systole.sw.golden import oracle
from systole.sw.ir.graph import ModelError, Normalise, Softmax
from tests.helpers.operator_models import DTYPES, Build, check

SHAPES = [((1, 50, 40), -1), ((2, 3, 20, 50), -1), ((1, 24, 8, 8), 1), ((9, 33), 1), ((6, 5, 7), 0)]


def of_rows(model: Build, x: str, shape: tuple[int, ...], axis: int, kind: str) -> str:
    """The operator of ``kind`` on ``x``, a node or several."""
    features = shape[axis]
    rng, size = np.random.default_rng(1), [1] * len(shape)
    size[axis] = features
    if kind == "Softmax":
        return model.node("Softmax", [x], "own", axis=axis)
    gain = model.const("gain", rng.normal(1, 0.4, features).astype(np.float32).reshape(size))
    shift = model.const("shift", rng.normal(0, 0.4, features).astype(np.float32).reshape(size))
    axes = model.const("axes", np.array([axis]))
    number = x
    if kind != "rms":
        number = model.node("Sub", [x, model.node("ReduceMean", [x, axes], "mean")], "number")
    if kind == "twice":
        again = model.node("Sub", [x, "mean"], "again")
        square = model.node("Mul", [again, again], "square")
    else:
        square = model.node("Pow", [number, model.const("two", np.float32(2))], "square")
    variance = model.node("ReduceMean", [square, axes], "variance")
    epsilon = model.const("epsilon", np.float32(1e-5))
    root = model.node("Sqrt", [model.node("Add", [variance, epsilon], "more")], "root")
    if kind == "reciprocal":
        inverse = model.node("Reciprocal", [root], "inverse")
        value = model.node("Mul", [inverse, number], "quotient")
    else:
        value = model.node("Div", [number, root], "quotient")
    value = model.node("Mul", [gain, value], "scaled")
    return value if kind == "rms" else model.node("Add", [value, shift], "shifted")


def row_model(dtype, shape, axis, kind):
    model = Build(dtype, opset=18)
    own = of_rows(model, model.x("x", shape), shape, axis, kind)
    zero, scale = (-128, 1 / 256) if kind == "Softmax" else (-7, 0.0293)
    return model.end(own, scale=scale, zero=zero)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
@pytest.mark.parametrize("kind", ["Softmax", "divided", "twice", "reciprocal", "rms"])
def test_rows_of_any_axis(tmp_path, kind, shape, axis, dtype):
    graph = check(row_model(dtype, shape, axis, kind), tmp_path)
    (op,) = (op for op in graph.ops if isinstance(op, Softmax | Normalise))
    assert isinstance(op, Softmax) == (kind == "Softmax")
    if isinstance(op, Normalise):
        assert op.centred == (kind != "rms")


def test_layer_normalization(tmp_path):
    model = Build(np.int8, opset=17)
    gain, shift = (model.const(name, np.linspace(-1, 2, 40, dtype=np.float32)) for name in "gs")
    x = model.node("LayerNormalization", [model.x("x", (2, 9, 40)), gain, shift], "own")
    (op,) = check(model.end(x), tmp_path).ops
    assert isinstance(op, Normalise) and op.centred and op.epsilon == 1e-5


def test_over_several_axes(tmp_path):
    model = Build(np.int8, opset=17)
    gain = model.const("gain", np.linspace(-1, 2, 40, dtype=np.float32).reshape(5, 8))
    x = model.node("LayerNormalization", [model.x("x", (3, 5, 8)), gain], "own", axis=1)
    graph = check(model.end(x), tmp_path)
    assert any(isinstance(op, Normalise) and len(op.gain) == 40 for op in graph.ops)


def test_before_opset_13_softmax_has_the_last_axis(tmp_path):
    for axis, taken in ((2, True), (1, False)):
        model = Build(np.int8, opset=11)
        x = model.node("Softmax", [model.x("x", (1, 9, 40))], "own", axis=axis)
        path = tmp_path / "model.onnx"
        onnx.save(model.end(x, scale=1 / 256, zero=-128), path)
        if taken:
            load(path)
            continue
        with pytest.raises(ModelError, match="before opset 13 it must be the last, 2"):
            load(path)


def test_what_uses_an_inner_result_keeps_the_nodes_apart(tmp_path):
    model = Build(np.int8, opset=18)
    shifted = of_rows(model, model.x("x", (1, 9, 40)), (1, 9, 40), -1, "divided")
    model.end(shifted)
    root = model.q("root", 0.02, np.int8(0), "root_codes")
    made = model.done("y", np.int8)
    made.graph.output.append(helper.make_tensor_value_info(root, onnx.TensorProto.INT8, None))
    onnx.save(made, tmp_path / "model.onnx")
    with pytest.raises(ModelError):
        load(tmp_path / "model.onnx")


@pytest.mark.parametrize("row_ops", [False, True])
def test_machines_without_row_operations_leave_them_to_the_host(tmp_path, row_ops):
    model = Build(np.int8, opset=18)
    x = model.node("Relu", [model.x("x", (1, 9, 40))], "relu")
    x = model.again(x, 0.02, model.zero(0), "between")
    x = of_rows(model, x, (1, 9, 40), -1, "divided")
    onnx.save(model.end(x), tmp_path / "model.onnx")
    plan = partition(tmp_path / "model.onnx", Config(row_ops=row_ops))
    kinds = [type(segment) for segment in plan.segments]
    assert kinds == [AcceleratorSegment] if row_ops else HostSegment in kinds


def test_softmax_alone_names_what_it_lacks(tmp_path):
    onnx.save(row_model(np.int8, (1, 9, 40), -1, "Softmax"), tmp_path / "model.onnx")
    with pytest.raises(ModelError, match=r"row_ops = false"):
        partition(tmp_path / "model.onnx", Config())


def test_the_oracle_divides_by_the_scale_itself(tmp_path):
    """onnxruntime fuses Softmax with the conversions around it, and divides by whole steps."""
    model = row_model(np.uint8, (1, 50, 40), -1, "Softmax")
    final = oracle.final_model(model)
    assert "QLinearSoftmax" not in {node.op_type for node in final.graph.node}
    x = np.random.default_rng(0).integers(0, 256, (1, 50, 40)).astype(np.uint8)
    fused, plain = (oracle.run(model, {"x": x}, optimise=which)["y"] for which in (True, False))
    assert (fused == plain).all()


def test_cut_of_channels_keeps_its_order(tmp_path):
    """Queries and keys of heads that a projection makes together are read where they are."""
    model, (batch, length, heads, size) = Build(np.int8, opset=18), (2, 16, 3, 8)
    rng, depth = np.random.default_rng(0), heads * size
    w = model.dq(
        model.const("w", rng.integers(-99, 99, (20, 3 * depth), np.int8)), 0.01, np.int8(0)
    )
    x = model.node("MatMul", [model.x("x", (batch, length, 20)), w], "product")
    x = model.again(x, 0.2, np.int8(3), "together")
    shape = model.const("shape", np.array([batch, length, 3, heads, size]))
    x = model.node("Reshape", [x, shape], "five")
    x = model.node("Transpose", [x], "heads", perm=[2, 0, 3, 1, 4])
    parts = [f"part{i}" for i in range(3)]
    model.nodes.append(
        helper.make_node("Split", [x, model.const("ones", np.ones(3, int))], parts, axis=0)
    )
    first = model.const("first", np.array([0]))
    q, k, _ = (model.node("Squeeze", [part, first], f"{part}s") for part in parts)
    k = model.node("Transpose", [k], "turned", perm=[0, 1, 3, 2])
    q, k = (model.again(v, 0.2, np.int8(3), f"{v}_own") for v in (q, k))
    graph = check(model.end(model.node("MatMul", [q, k], "scores"), scale=1.0), tmp_path)
    kinds = [type(op).__name__ for op in graph.ops]
    assert kinds == ["Conv", "Transpose", "MatMul"], kinds
