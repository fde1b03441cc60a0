"""Shapes follow from inputs and nodes, whatever a file notes; what is too large is refused."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from systole.sw.compiler.partition import partition
from systole.sw.golden import oracle
from systole.sw.ir.graph import ModelError
from systole.sw.ir.model_file import load_proto
from systole.sw.session.segments import follow
from tests.helpers.random_models import Model

OLD = 4
"""Rows and columns that the notes are left over from."""


def shape_chain(kind: str, size: int | str) -> onnx.ModelProto:
    """A pooling whose result's shape, taken at run time, decides what follows."""
    model = Model()
    real = model.dq(model.input("x", np.uint8, [1, 3, size, size]), 0.05, np.uint8(10))
    pool = model.node("MaxPool", [real], "pool", kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    y = model.q(pool, 0.05, np.uint8(10), "pq")
    real = model.dq(y, 0.05, np.uint8(10))
    shape = model.node("Shape", [real], "shape")
    if kind == "Reshape":
        lead = model.const("lead", np.array([1, -1], np.int64))
        rows = model.node("Gather", [shape, model.const("i", np.array([2], np.int64))], "rows")
        to = model.node("Concat", [lead, rows], "to", axis=0)
        y = model.node("Reshape", [real, to], "turned")
    elif kind == "Resize":
        double = model.const("double", np.array([1, 1, 2, 2], np.int64))
        sizes = model.node("Mul", [shape, double], "sizes")
        y = model.node("Resize", [real, "", "", sizes], "turned", mode="nearest")
    else:
        count = model.node("Size", [real], "count")
        real_count = model.node("Cast", [count], "real_count", to=TensorProto.FLOAT)
        y = model.node("Div", [real, real_count], "turned")
    model.q(y, 0.05 if kind != "Size" else 0.0005, np.uint8(10), "y")
    made = model.done("y", np.uint8, None)
    for name in ("pool", "pq", "pq_real"):
        made.graph.value_info.append(
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3, OLD, OLD])
        )
    made.graph.value_info[1].type.tensor_type.elem_type = TensorProto.UINT8
    return made


@pytest.mark.parametrize("kind", ["Reshape", "Resize", "Size"])
@pytest.mark.parametrize("bound", [True, False])
def test_stale_notes_are_not_believed(kind, bound, tmp_path):
    path, size = tmp_path / "model.onnx", 6
    model = shape_chain(kind, "n" if bound else size)
    fresh = onnx.ModelProto()
    fresh.CopyFrom(model)
    del fresh.graph.value_info[:]
    onnx.save(model, path)
    x = np.random.default_rng(0).integers(0, 256, (1, 3, size, size)).astype(np.uint8)
    (wanted,) = oracle.session(fresh).run(None, {"x": x})
    plan = partition(path, dims={"n": size} if bound else None)
    found = follow(plan, {"x": x}).values["y"]
    assert found.shape == wanted.shape
    assert np.abs(found.astype(int) - wanted).max() <= 1
    assert (oracle.run(path, {"x": x})["y"] == wanted).all()


def test_notes_are_dropped_everywhere(tmp_path):
    path = tmp_path / "model.onnx"
    model = shape_chain("Reshape", 6)
    model.graph.output[0].type.tensor_type.shape.dim.add().dim_value = 99
    onnx.save(model, path)
    loaded = load_proto(path)
    assert not loaded.graph.value_info
    assert not loaded.graph.output[0].type.tensor_type.HasField("shape")


@pytest.mark.parametrize("dim", [-1, None])
def test_dimensions_without_name_or_number(dim, tmp_path):
    model = shape_chain("Reshape", 6)
    for d in model.graph.input[0].type.tensor_type.shape.dim[2:]:
        d.Clear()
        if dim is not None:
            d.dim_value = dim
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    with pytest.raises(ModelError, match=r"dimension 2 is open.*--dim x:2=N"):
        partition(path)
    plan = partition(path, dims={"x:2": 6, "x:3": 6})
    assert plan.inputs.tensors[plan.inputs.inputs[0].tensor].onnx_shape == (1, 3, 6, 6)


@pytest.mark.parametrize(
    "shape, message",
    [
        ((1, 3, 2**31 - 1, 2), "input 'x' needs 12,884,901,882 elements"),
        ((1, 3, 2**62, 8), "input 'x' needs .* elements"),
        ((60_000, 3, 6, 6), "input 'x': a batch of 60,000; at most 1,024"),
    ],
)
def test_too_large(shape, message, tmp_path):
    model = shape_chain("Reshape", 6)
    dims = model.graph.input[0].type.tensor_type.shape.dim
    for dim, size in zip(dims, shape, strict=True):
        dim.dim_value = size
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    with pytest.raises(ModelError, match=message):
        partition(path)


def test_too_large_on_the_way(tmp_path):
    model = Model()
    real = model.dq(model.input("x", np.uint8, [1, 64, 64, 64]), 0.05, np.uint8(10))
    scales = model.const("scales", np.array([1, 1, 64, 64], np.float32))
    y = model.q(model.node("Resize", [real, "", scales], "big"), 0.05, np.uint8(10), "y")
    path = tmp_path / "model.onnx"
    onnx.save(model.done(y, np.uint8, None), path)
    with pytest.raises(ModelError, match="tensor 'big' needs 1,073,741,824 elements"):
        partition(path)


@pytest.mark.parametrize("flat", [True, False])
def test_sparse_constants(flat, tmp_path):
    dense = np.zeros((4, 3, 1, 1), np.int8)
    dense[1, 2], dense[3, 0] = 77, -5
    places = np.argwhere(dense)
    values = numpy_helper.from_array(dense[tuple(places.T)], "w")
    indices = np.ravel_multi_index(tuple(places.T), dense.shape) if flat else places
    model = Model()
    real = model.dq(model.input("x", np.uint8, [1, 3, 5, 5]), 0.05, np.uint8(10))
    w = model.dq("w", 0.01, np.int8(0))
    y = model.q(model.node("Conv", [real, w], "c"), 0.05, np.uint8(99), "y")
    made = model.done(y, np.uint8, None)
    reference = onnx.ModelProto()
    reference.CopyFrom(made)
    reference.graph.initializer.append(numpy_helper.from_array(dense, "w"))
    made.graph.sparse_initializer.append(
        helper.make_sparse_tensor(
            values, numpy_helper.from_array(indices.astype(np.int64), "places"), dense.shape
        )
    )
    path = tmp_path / "model.onnx"
    onnx.save(made, path)
    x = np.random.default_rng(0).integers(0, 256, (1, 3, 5, 5)).astype(np.uint8)
    (wanted,) = oracle.session(reference).run(None, {"x": x})
    assert (follow(partition(path), {"x": x}).values["y"] == wanted).all()


def test_an_input_that_is_an_output(tmp_path):
    model = Model()
    real = model.dq(model.input("x", np.uint8, [1, 3, 5, 5]), 0.05, np.uint8(10))
    y = model.q(model.node("Relu", [real], "r"), 0.05, np.uint8(10), "y")
    made = model.done(y, np.uint8, None)
    made.graph.output.append(helper.make_tensor_value_info("x", TensorProto.UINT8, [1, 3, 5, 5]))
    path = tmp_path / "model.onnx"
    onnx.save(made, path)
    x = np.random.default_rng(0).integers(0, 256, (1, 3, 5, 5)).astype(np.uint8)
    values = follow(partition(path), {"x": x}).values
    assert (values["x"] == x).all() and values["y"].shape == x.shape


def test_names_that_are_no_text(tmp_path):
    model = shape_chain("Reshape", 6)
    model.graph.node[0].name = "Sch\u00f6n"
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString().replace(b"Sch\xc3\xb6n", b"Sch\xf6nn"))
    with pytest.raises(ModelError, match="node name 'Sch\ufffdnn' is not UTF-8 text"):
        partition(path)
