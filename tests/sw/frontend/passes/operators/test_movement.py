"""Operators that move elements, against onnxruntime."""

import numpy as np
import pytest

from systole.sw.ir.graph import Conv, Pool, Select
from tests.helpers.operator_models import (
    DTYPES,
    Build,
    check,
    const,
    ints,
    node,
)
from tests.helpers.random_models import random_array

MOVES = {
    "slice": [node("Slice", ints(1, 2, 0), ints(5, 99, 7), ints(1, 2, 3), ints(1, 3, 2))],
    "slice from the start": [node("Slice", ints(0), ints(5), ints(3))],
    "slice to the end": [node("Slice", ints(-4), ints(99), ints(-1))],
    "pad": [node("Pad", ints(0, 0, 2, 1, 0, 0, 0, 3))],
    "pad channels": [node("Pad", ints(0, 1, 0, 0, 0, 2, 0, 0), const(1.1))],
    "pad with one": [node("Pad", ints(0, 0, 1, 0, 0, 0, 2, 0), const(1.0))],
    "pad and crop": [node("Pad", ints(0, 0, -2, 1, 0, 0, 0, -3))],
    "pad by reflection": [node("Pad", ints(0, 0, 1, 0, 0, 0, 2, 0), mode="reflect")],
    "resize": [
        node("Resize", None, const(1, 1, 2, 3), mode="nearest",
             coordinate_transformation_mode="asymmetric", nearest_mode="floor"),
    ],
    "resize half pixel": [node("Resize", None, const(1, 1, 3, 2), mode="nearest")],
    "resize to sizes": [node("Resize", None, None, ints(1, 6, 14, 24), mode="nearest")],
    "resize by 3/2": [node("Resize", None, const(1, 1, 1.5, 1), mode="nearest")],
    "shrink": [node("Resize", None, const(1, 1, 0.5, 0.5), mode="nearest")],
    "space to depth": [
        node("Slice", ints(0), ints(6), ints(2)), node("SpaceToDepth", blocksize=2)
    ],
    "depth to space": [
        node("Slice", ints(0), ints(4), ints(1)), node("DepthToSpace", blocksize=2)
    ],
    "depth to space CRD": [
        node("Slice", ints(2), ints(6), ints(1)), node("DepthToSpace", blocksize=2, mode="CRD")
    ],
    "shuffle": [
        node("Reshape", ints(0, 2, 3, 7, 8)),
        node("Transpose", perm=[0, 2, 1, 3, 4]),
        node("Reshape", ints(1, 6, 7, 8)),
    ],
    "pad by the edge": [node("Pad", ints(0, 0, 2, 1, 0, 0, 1, 3), mode="edge")],
    "flip": [node("Slice", ints(-1), ints(-99), ints(3), ints(-1))],
    "gather": [node("Gather", ints(3, 3, 0), axis=1)],
    "tile": [node("Tile", ints(1, 2, 1, 1))],
    "more images": [node("Tile", ints(3, 1, 1, 1))],
    "pad all around with a number": [node("Pad", ints(0, 1, 1, 2, 0, 0, 3, 1), const(-0.7))],
    "pad and crop with a number": [node("Pad", ints(0, 0, -2, 1, 0, 0, 1, -3), const(2.2))],
    "pad with what saturates": [node("Pad", ints(0, 0, 1, 1, 0, 0, 0, 0), const(-np.inf))],
    "pad images with a number": [node("Pad", ints(1, 0, 0, 2, 0, 0, 1, 0), const(1.0))],
    "reflect all around": [node("Pad", ints(0, 0, 3, 5, 0, 0, 6, 4), mode="reflect")],
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MOVES)
@pytest.mark.parametrize("same", [True, False])
def test_movement(name, same, dtype, tmp_path):
    """With the input's scale and zero point exact."""
    model = Build(dtype)
    value = model.x("x", (1, 6, 7, 8))
    for step in MOVES[name]:
        value = step(model, value)
    model = model.end(value, *((0.0371, 3) if same else (0.0293, -7)))
    graph = check(model, tmp_path, exact=same)
    assert {type(op) for op in graph.ops} == {Select}


LONG_MOVES = {
    "flip": [node("Slice", ints(-1, -1), ints(-999, -999), ints(2, 3), ints(-1, -1))],
    "irregular": [node("Gather", ints(*np.random.default_rng(0).permutation(140) % 70), axis=2)],
    "broadcast": [
        node("Slice", ints(3, 4), ints(4, 5), ints(2, 3)), node("Expand", ints(1, 2, 70, 20))
    ],
    "broadcast by resizing": [
        node("Slice", ints(3, 4), ints(4, 5), ints(2, 3)),
        node("Resize", None, None, ints(1, 2, 71, 129)),
    ],
    "uneven resize": [node("Resize", None, None, ints(1, 2, 87, 79), mode="nearest")],
    "pad by the edge": [node("Pad", ints(0, 0, 40, 20, 0, 0, 1, 30), mode="edge")],
}  # fmt: skip


@pytest.mark.parametrize("name", LONG_MOVES)
def test_movement_in_steps(name, tmp_path):
    """No Select does these at once: one axis at a time, or more than 64 lines in pieces."""
    model = Build(np.int8)
    value = model.x("x", (1, 2, 70, 90))
    for i, step in enumerate(LONG_MOVES[name]):
        if i:
            value = model.again(value, 0.0371, 3, "first")
        value = step(model, value)
    graph = check(model.end(value, 0.0371, 3), tmp_path, exact=True)
    assert {type(op) for op in graph.ops} == {Select}
    assert len(graph.ops) > len(LONG_MOVES[name])


def test_number_around_an_image_takes_one_pass_more(tmp_path):
    """A constant of one channel marks where it goes, whatever the channels."""
    model = Build(np.int8)
    pad = node("Pad", ints(0, 0, 1, 1, 0, 0, 1, 1), const(0.5))
    graph = check(model.end(pad(model, model.x("x", (1, 40, 9, 9))), 0.0371, 3), tmp_path, True)
    (op,) = graph.ops
    assert len(op.phases) == 1 and len(op.phases[0]) == 2
    assert [array.shape for array in graph.constants.values()] == [(1, 1, 11, 11)]


def test_concat_of_what_is_stored_in_another_order(tmp_path):
    model = Build(np.int8)
    x = model.node("MaxPool", [model.x("x", (1, 15, 9, 15))], "m", kernel_shape=[1, 1])
    x = model.again(x, 0.0371, 3, "q")
    x = node("Transpose", perm=[0, 2, 1, 3])(model, x)
    check(model.end(model.node("Concat", [x, x], "c", axis=2), 0.0371, 3), tmp_path, exact=True)


def test_movement_of_integers(tmp_path):
    """The operators on int8 itself, and a chain of them."""
    model = Build(np.uint8)
    x = model.input("x", np.uint8, (1, 6, 8, 8))
    real = model.dq(x, 0.05, np.uint8(100))
    x = model.q(model.node("MaxPool", [real], "m", kernel_shape=[1, 1]), 0.07, np.uint8(30), "a")
    x = node("Pad", ints(0, 0, 1, 1, 0, 0, 1, 1), (np.uint8(30),))(model, x)
    x = node("SpaceToDepth", blocksize=1)(model, x)
    x = model.node("Concat", [x, x], "both", axis=1)
    graph = check(
        model.done(node("Slice", ints(3), ints(9), ints(1))(model, x), np.uint8), tmp_path
    )
    assert [type(op) for op in graph.ops] == [Pool] + 4 * [Select]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", [1, 2, 3])
def test_concat_and_split(axis, dtype, tmp_path):
    model = Build(dtype)
    shape = [1, 5, 6, 7]
    names = [model.x("a", shape), model.x("b", shape, 0.051, 40)]
    third = shape[:axis] + [2] + shape[axis + 1 :]
    names.append(model.x("c", third, 0.0293, -7))
    whole = model.again(model.node("Concat", names, "cat", axis=axis), 0.0293, -7, "whole")
    sizes = [shape[axis] + 1, shape[axis], 1]
    model.node("Split", [whole, model.const("sizes", np.array(sizes))], "p0", axis=axis)
    model.nodes[-1].output.extend(["p1", "p2"])
    graph = check(model.end("p1", 0.031), tmp_path)
    first, second = graph.ops
    assert first.steps == ((1, 1), (14, 1), (1, 16))[axis - 1] and len(second.phases) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", [2, 3])
@pytest.mark.parametrize("op_type", ["Concat", "QLinearConcat"])
def test_long_concat(op_type, axis, dtype, tmp_path):
    """More rows or columns than there can be phases: one sum of shifted inputs."""
    shapes = [[2, 5, 7, 7] for _ in range(3)]
    scales = [0.0293, 0.051, 0.0293]
    for shape, size in zip(shapes, (70, 61, 3)):
        shape[axis] = size
    model = Build(dtype)
    if op_type == "Concat":
        names = [model.x(f"x{i}", s, k, -7) for i, (s, k) in enumerate(zip(shapes, scales))]
        model = model.end(model.node("Concat", names, "cat", axis=axis), 0.0293, -7)
    else:
        names = model.pair("y", 0.0293, model.zero(-7))
        for i, (shape, scale) in enumerate(zip(shapes, scales)):
            name = model.input(f"x{i}", dtype, shape)
            names += [name, *model.pair(f"x{i}", scale, model.zero(-7))]
        y = model.node(op_type, names, "y", "com.microsoft", axis=axis)
        model = model.done(y, dtype)
    rescaled, whole = check(model, tmp_path).ops
    assert rescaled.inputs == ("x1",) and len(whole.phases) == 1 and len(whole.phases[0]) == 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_anchors(dtype, tmp_path):
    """Detection heads: every pixel's anchors become rows, of several maps one list."""
    model = Build(dtype)
    lists = []
    for i, (size, anchors) in enumerate((((9, 11), 3), ((5, 6), 2), ((3, 3), 3))):
        x = model.x(f"x{i}", (1, 4 * anchors, *size))
        x = model.node("MaxPool", [x], f"m{i}", kernel_shape=[3, 3], pads=[1, 1, 1, 1])
        x = model.again(x, 0.0371, 3, f"p{i}")
        x = model.node("Transpose", [x], f"t{i}", perm=[0, 2, 3, 1])
        x = model.again(x, 0.0371, 3, f"q{i}")
        lists.append(node("Reshape", ints(1, -1, 4))(model, x))
    graph = check(
        model.end(model.node("Concat", lists, "boxes", axis=1), 0.0371, 3), tmp_path, True
    )
    op = graph.ops[-1]
    assert isinstance(op, Select) and op.flat and op.steps == (1, 6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_concat(dtype, tmp_path):
    model = Build(dtype)
    names = model.pair("y", 0.063, model.zero(3))
    for name, channels, scale in (("a", 3, 0.063), ("b", 4, 0.017)):
        names += [model.input(name, dtype, (2, channels, 9, 5))]
        names += model.pair(name, scale, model.zero(3))
    y = model.node("QLinearConcat", names, "y", "com.microsoft", axis=1)
    (op,) = check(model.done(y, dtype), tmp_path).ops
    assert [p.channels.tolist() for p in op.phases[0]] == [
        [0, 1, 2, -1, -1, -1, -1], [-1, -1, -1, 0, 1, 2, 3],
    ]  # fmt: skip


def test_product_of_moved_elements(tmp_path):
    """The columns of an image as features."""
    model = Build(np.int8)
    w = random_array(np.random.default_rng(0), np.int8, (5, 7))
    w = model.dq(model.const("w", w), 0.02, np.int8(0))
    model = model.end(model.node("MatMul", [model.x("x", (1, 2, 3, 5)), w], "p"), 0.3)
    assert [type(op) for op in check(model, tmp_path).ops] == [Conv]
    model = Build(np.int8)
    x = model.node("MaxPool", [model.x("x", (1, 2, 4, 6))], "m", kernel_shape=[2, 2])
    x = model.again(x, 0.0371, 3, "mid")
    w = random_array(np.random.default_rng(0), np.int8, (5, 7))
    w = model.dq(model.const("w", w), 0.02, np.int8(0))
    model = model.end(model.node("MatMul", [x, w], "p"), 0.3)
    graph = check(model, tmp_path)
    assert [type(op) for op in graph.ops] == [Pool, Select, Conv]
    assert graph.tensors["y"].onnx_shape == (1, 2, 3, 7)


def test_shuffled_channels_before_a_convolution(tmp_path):
    """QDQ between all nodes, as quantisers write it."""
    rng = np.random.default_rng(0)
    model = Build(np.uint8)
    value = model.x("x", (1, 6, 7, 8))
    for i, step in enumerate(MOVES["shuffle"]):
        value = model.again(step(model, value), 0.0371, 3, f"q{i}")
    w = model.dq(model.const("w", random_array(rng, np.int8, (4, 6, 3, 3))), 0.02, np.int8(0))
    graph = check(model.end(model.node("Conv", [value, w], "c"), 0.3), tmp_path, exact=True)
    assert [type(op) for op in graph.ops] == [Select, Conv]
    assert graph.ops[0].phases[0][0].channels.tolist() == [0, 3, 1, 4, 2, 5]


def test_moved_without_a_scale(tmp_path):
    """DequantizeLinear, Pad, MaxPool, Conv: each keeps the scale it is given."""
    rng = np.random.default_rng(0)
    model = Build(np.int8)
    value = node("Pad", ints(0, 0, 1, 1, 0, 0, 1, 1))(model, model.x("x", (1, 4, 7, 8)))
    value = node("MaxPool", kernel_shape=[2, 2])(model, value)
    w = model.dq(model.const("w", random_array(rng, np.int8, (4, 4, 3, 3))), 0.02, np.int8(0))
    graph = check(model.end(model.node("Conv", [value, w], "c"), 0.3), tmp_path)
    assert [type(op) for op in graph.ops] == [Select, Pool, Conv]


def test_parts_of_integers(tmp_path):
    """Each result of a Split of int8 itself is a tensor of its own."""
    model = Build(np.int8)
    x = model.q(model.node("Neg", [model.x("x", (1, 6, 5, 7))], "n"), 0.0371, np.int8(3), "q")
    model.node("Split", [x, model.const("sizes", np.array([2, 2, 2]))], "p0", axis=1)
    model.nodes[-1].output.extend(["p1", "p2"])
    a, b = (model.dq(p, 0.0371, np.int8(3)) for p in ("p0", "p2"))
    graph = check(model.end(model.node("Sub", [a, b], "s"), 0.0713), tmp_path)
    (first,), (second,) = (op.phases[0] for op in graph.ops if isinstance(op, Select))
    assert (first.channels.tolist(), second.channels.tolist()) == ([0, 1], [4, 5])
