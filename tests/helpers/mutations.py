"""Damaged ONNX files, replayable by seed: numbers, names, shapes, types, edges, bytes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.helpers.random_models import Model, random_conv_model, random_gemm_model

NUMBERS = (-(2**63), -(2**31), -2, -1, 0, 1, 2, 3, 7, 255, 256, 65_535, 2**31 - 1, 2**31, 2**62)
REALS = (0.0, -1.0, 1e-45, 1e-30, 3e38, float("inf"), float("-inf"), float("nan"))
NAMES = ("", "x", "y", "[red]", "[/]", "a" * 300, "na\u00efve", "a b\n\tc", "%s{}")
TYPES = (
    *(TensorProto.FLOAT, TensorProto.INT8, TensorProto.UINT8, TensorProto.INT32),
    *(TensorProto.INT64, TensorProto.BOOL, TensorProto.FLOAT16, TensorProto.STRING, 0, 99),
)
OPERATORS = ("Add", "Conv", "Relu", "Softmax", "MaxPool", "Reshape", "If", "NoSuchOperator", "")


def seed_model(rng: np.random.Generator) -> onnx.ModelProto:
    """A small legal model to damage."""
    kind = rng.integers(4)
    if kind == 0:
        return random_conv_model(rng, channels=12, size=12, kernel=3, work=20_000)
    if kind == 1:
        return random_conv_model(rng, form="qlinear", channels=12, size=12, kernel=3, work=20_000)
    if kind == 2:
        return random_gemm_model(rng, form=str(rng.choice(["qdq", "qlinear", "qgemm"])))
    return _network(rng)


def _network(rng: np.random.Generator) -> onnx.ModelProto:
    """Convolution, pooling, movement, product, function."""
    model = Model()
    real = model.dq(model.input("x", np.uint8, [1, 3, 8, 8]), 0.05, np.uint8(10))
    model.const("w", rng.integers(-128, 128, (4, 3, 3, 3)).astype(np.int8))
    w = model.dq("w", np.full(4, 0.01, np.float32), np.zeros(4, np.int8), axis=0)
    y = model.q(model.node("Conv", [real, w], "c", pads=[1, 1, 1, 1]), 0.1, np.uint8(3), "cq")
    pool = model.node("MaxPool", [model.dq(y, 0.1, np.uint8(3))], "p", kernel_shape=[2, 2])
    y = model.q(pool, 0.1, np.uint8(3), "pq")
    turned = model.node("Transpose", [model.dq(y, 0.1, np.uint8(3))], "t", perm=[0, 2, 3, 1])
    flat = model.node("Reshape", [turned, model.const("to", np.array([7, 28], np.int64))], "f")
    y = model.q(model.node("Sigmoid", [flat], "s"), 1 / 256, np.uint8(0), "sq")
    return model.done(y, np.uint8, [7, 28])


def damaged(rng: np.random.Generator) -> bytes:
    """The content of a damaged file: one to three changes to a legal model, and now and then some
    bytes of the file changed or its end cut off."""
    model = seed_model(rng)
    for _ in range(int(rng.integers(1, 4))):
        with contextlib.suppress(IndexError):  # nothing left to change
            _pick(rng, CHANGES)(model, rng)
    content = bytearray(model.SerializeToString())
    if rng.integers(5) == 0:
        for _ in range(int(rng.integers(1, 5))):
            content[int(rng.integers(len(content)))] = int(rng.integers(256))
    if rng.integers(20) == 0:
        del content[int(rng.integers(len(content))) :]
    return bytes(content)


def _pick(rng: np.random.Generator, options):
    """One of them; IndexError if there is none."""
    if not options:
        raise IndexError
    return options[int(rng.integers(len(options)))]


def _change_dimension(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    values = [*model.graph.input, *model.graph.output, *model.graph.value_info]
    shape = _pick(rng, values).type.tensor_type.shape
    if not shape.dim or rng.integers(4) == 0:
        shape.dim.add().dim_value = 2
        return
    dim = _pick(rng, shape.dim)
    if rng.integers(4) == 0:
        dim.dim_param = _pick(rng, NAMES)
    else:
        dim.dim_value = _pick(rng, NUMBERS)


def _change_type(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    values = [*model.graph.input, *model.graph.output]
    _pick(rng, values).type.tensor_type.elem_type = _pick(rng, TYPES)


def _change_constant(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    if not model.graph.initializer:
        return
    tensor = _pick(rng, model.graph.initializer)
    array = numpy_helper.to_array(tensor).copy()
    if not array.size:
        return
    if array.dtype.kind == "f":
        array.flat[int(rng.integers(array.size))] = _pick(rng, REALS)
    else:
        limits = np.iinfo(array.dtype)
        number = min(max(_pick(rng, NUMBERS), limits.min), limits.max)
        array.flat[int(rng.integers(array.size))] = number
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def _reshape_constant(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    if not model.graph.initializer:
        return
    tensor = _pick(rng, model.graph.initializer)
    array = numpy_helper.to_array(tensor)
    made = (array.reshape(-1), array[..., None], array.reshape(-1)[:1], array.reshape(-1)[:0])
    tensor.CopyFrom(numpy_helper.from_array(_pick(rng, made).copy(), tensor.name))


def _retype_constant(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    if not model.graph.initializer:
        return
    tensor = _pick(rng, model.graph.initializer)
    kinds = (np.int8, np.uint8, np.int32, np.int64, np.float32, np.float16)
    with np.errstate(all="ignore"):
        array = numpy_helper.to_array(tensor).astype(_pick(rng, kinds))
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def _change_attribute(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    node = _pick(rng, model.graph.node)
    if not node.attribute or rng.integers(4) == 0:
        name = str(rng.choice(["axis", "group", "auto_pad", "to", "strides", "unknown"]))
        node.attribute.append(helper.make_attribute(name, int(_pick(rng, NUMBERS))))
        return
    attribute = _pick(rng, node.attribute)
    if attribute.ints:
        attribute.ints[int(rng.integers(len(attribute.ints)))] = _pick(rng, NUMBERS)
    elif attribute.type == onnx.AttributeProto.FLOAT:
        attribute.f = _pick(rng, REALS)
    else:
        attribute.i = _pick(rng, NUMBERS)


def _rename(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    kind = rng.integers(4)
    if kind == 0:
        _pick(rng, model.graph.node).name = _pick(rng, NAMES)
    elif kind == 1:
        _pick(rng, model.graph.input).name = _pick(rng, NAMES)
    elif kind == 2:
        model.graph.name = _pick(rng, NAMES)
    else:
        old, new = _pick(rng, model.graph.node).output[0], _pick(rng, NAMES)
        for node in model.graph.node:
            node.input[:] = [new if n == old else n for n in node.input]
            node.output[:] = [new if n == old else n for n in node.output]


def _rewire(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    node = _pick(rng, model.graph.node)
    values = [n for other in model.graph.node for n in (*other.input, *other.output)]
    if node.input:
        node.input[int(rng.integers(len(node.input)))] = _pick(rng, [*values, "", "nowhere"])


def _change_operator(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    node = _pick(rng, model.graph.node)
    if rng.integers(4) == 0:
        node.domain = str(rng.choice(["com.microsoft", "nobody.knows", "ai.onnx.ml"]))
    else:
        node.op_type = _pick(rng, OPERATORS)


def _drop(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    graph = model.graph
    field = _pick(rng, (graph.node, graph.initializer, graph.input, graph.output))
    if field:
        del field[int(rng.integers(len(field)))]


def _double(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    graph = model.graph
    field = _pick(rng, (graph.node, graph.initializer, graph.input, graph.output))
    if field:
        field.add().CopyFrom(_pick(rng, field))


def _change_version(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    if rng.integers(2):
        model.ir_version = int(rng.choice([0, 1, 3, 99]))
    elif model.opset_import:
        model.opset_import[0].version = int(rng.choice([-1, 0, 1, 7, 10, 12, 999]))


CHANGES: tuple[Callable[[onnx.ModelProto, np.random.Generator], None], ...] = (
    *(_change_dimension, _change_type, _change_constant, _reshape_constant, _retype_constant),
    *(_change_attribute, _rename, _rewire, _change_operator, _drop, _double, _change_version),
)
