"""Products of two activations and transposition: the golden model against onnxruntime, which must
be equal, and the compiled programs against the golden model on the command-level simulator (and on
RTL, in ``test_rtl``)."""

import json
from collections import Counter

import numpy as np
import onnx
import pytest

from systole.isa import Config
from systole.sw.compiler import compile_graph
from systole.sw.compiler.partition import partition
from systole.sw.compiler.placement import NO_ROW_OPS
from systole.sw.frontend.dataflow import CONVERSIONS
from systole.sw.frontend.load import load
from systole.sw.ir.graph import Conv, MatMul, ModelError, Select, Transpose, macs
from systole.sw.quantisation.pipeline import quantise_model
from systole.sw.session.backends import open_device
from tests.helpers.layer_checks import check_on, prepare
from tests.helpers.operator_models import Build, ints, node
from tests.helpers.product_models import (
    attention_model,
    encoder_block,
    nonlocal_block,
    product_model,
)
from tests.helpers.random_models import random_array
from tests.sw.cli.test_run import cli

CONFIGS = [
    Config(),
    Config.sized(4, 4, scratchpad_bytes=8192),
    Config.sized(12, 12),
    Config.sized(16, 16, scratchpad_bytes=32768, weight_bytes=8192, accumulator_bytes=4096),
]
"""The last and the second force transfers, regions and reloaded weights."""

SHAPES = [
    ((13, 7), (7, 5)),
    ((1, 5, 64), (1, 64, 33)),
    ((2, 3, 5, 7), (2, 3, 7, 4)),
    ((2, 3, 5, 7), (7, 4)),
    ((3, 5, 7), (2, 1, 7, 4)),
    ((1, 16, 16), (16, 16)),
    ((7,), (3, 7, 4)),
    ((5, 7), (7,)),
    ((2, 300, 70), (2, 70, 40)),
]
ZEROS = [(0, 0), (-128, 127), (127, -128), (5, -9)]
TYPES = {
    "int8": (np.int8, np.int8),
    "uint8": (np.uint8, np.uint8),
    "uint8 by int8": (np.uint8, np.int8),
}


def check_on_commands(model, tmp_path, configs=CONFIGS, seed=0):
    """Exact on all levels; the graph."""
    graph, inputs, expected = prepare(model, tmp_path / "model.onnx", seed)
    for k, config in enumerate(configs):
        with open_device("commands", config, memory_bytes=64 << 20) as device:
            check_on(device, config, graph, inputs, expected, dump=bool(k % 2))
    return graph


@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("form", ["qdq", "qlinear"])
@pytest.mark.parametrize("a, b", SHAPES, ids=str)
def test_product(a, b, form, types, tmp_path):
    for seed, zeros in enumerate(ZEROS):
        model = product_model(a, b, zeros, TYPES[types], form)
        graph = check_on_commands(model, tmp_path, seed=seed)
        (op,) = graph.ops
        assert isinstance(op, MatMul)
        assert macs(op, graph) == np.prod(np.matmul(np.ones(a), np.ones(b)).shape) * a[-1]


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    "length, heads, size", [(8, 2, 8), (13, 3, 4), (20, 2, 16), (17, 3, 5), (9, 2, 24), (40, 1, 20)]
)
def test_attention(length, heads, size, batch, dtype, tmp_path):
    """Heads that fill words, share them and straddle them. In the graph nothing moves but for one
    transposition, and scale and residual are fused."""
    graph = check_on_commands(attention_model(dtype, length, heads, size, batch), tmp_path)
    assert Counter(type(op) for op in graph.ops) == {Conv: 4, MatMul: 2, Transpose: 1}
    assert graph.tensors["scaled_q"].shape == (batch * heads, length, 1, length)
    assert graph.tensors["mixed_q"].shape == (1, heads * size, 1, batch * length)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
@pytest.mark.parametrize(
    "channels, size, image", [(8, 4, (1, 6, 5)), (20, 16, (1, 12, 11)), (20, 10, (2, 9, 8))]
)
def test_attention_between_pixels(channels, size, image, dtype, tmp_path):
    """The second product is turned round, so that it takes no transposition; its result gets the
    rows of an image."""
    graph = check_on_commands(nonlocal_block(dtype, channels, size, image), tmp_path)
    assert Counter(type(op) for op in graph.ops) == {
        Conv: 4,
        MatMul: 2,
        Select: 1,
        Transpose: 1,
    }
    assert graph.tensors["mixed_q"].shape == (image[0], size, 1, image[1] * image[2])


def test_operands_that_are_elsewhere_and_shared(tmp_path):
    """Slices of one tensor times others of it, its own transpose, and a graph output between."""
    model = Build(np.uint8)
    w = model.dq(
        model.const("w", random_array(np.random.default_rng(0), np.int8, (6, 60))),
        0.01,
        np.int8(0),
    )
    x = model.again(model.node("MatMul", [model.x("x", (20, 6)), w], "p"), 0.05, 7, "x_q")
    square = model.node("MatMul", [x, model.node("Transpose", [x], "t", perm=[1, 0])], "s")
    square = model.again(square, 0.3, 2, "square")
    parts = [node("Slice", ints(0), ints(20), ints(0))(model, square)]
    parts.append(node("Slice", ints(8), ints(40), ints(1))(model, x))
    graph = check_on_commands(model.end(model.node("MatMul", parts, "r"), 2.0), tmp_path, seed=3)
    assert Counter(type(op) for op in graph.ops)[MatMul] == 2


TRANSPOSITIONS = {
    "channels last": ((1, 6, 9, 8), [0, 2, 3, 1]),
    "batch": ((3, 6, 9, 8), [0, 2, 3, 1]),
    "matrix": ((1, 37, 21), [0, 2, 1]),
    "batch to channels": ((3, 6, 1, 8), [1, 0, 2, 3]),
    "batch to columns": ((3, 6, 1, 8), [2, 1, 3, 0]),
}


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
@pytest.mark.parametrize("name", TRANSPOSITIONS)
def test_transposed_into_a_convolution(name, dtype, tmp_path):
    shape, perm = TRANSPOSITIONS[name]
    model = Build(dtype)
    x = model.again(
        model.node("MaxPool", [model.x("x", shape)], "m", kernel_shape=[1] * (len(shape) - 2)),
        0.041,
        5,
        "mid",
    )
    x = model.node("Transpose", [x], "t", perm=perm)
    channels = shape[perm[1]]
    w = random_array(np.random.default_rng(1), np.int8, (5, channels, *[1] * (len(shape) - 2)))
    w = model.dq(model.const("w", w), 0.01, np.int8(0))
    check_on_commands(model.end(model.node("Conv", [x, w], "c"), 0.3), tmp_path)


def test_a_transposition_alone_and_one_to_the_batch(tmp_path):
    """What a transposition moves may also move between images."""
    model = Build(np.int8)
    x = model.node(
        "Reshape", [model.x("x", (2, 12, 5, 3)), model.const("s", np.array([4, 90]))], "r"
    )
    x = model.again(x, 0.0371, 3, "flat")
    w = random_array(np.random.default_rng(1), np.int8, (90, 7))
    w = model.dq(model.const("w", w), 0.01, np.int8(0))
    x = model.again(model.node("Transpose", [x], "t", perm=[1, 0]), 0.0371, 3, "turned")
    w = random_array(np.random.default_rng(1), np.int8, (4, 7))
    w = model.dq(model.const("v", w), 0.01, np.int8(0))
    graph = check_on_commands(model.end(model.node("MatMul", [x, w], "c"), 0.3), tmp_path)
    assert isinstance(graph.ops[-1], Conv)


def test_an_input_requantised_alike_keeps_its_place(tmp_path):
    """DequantizeLinear, Reshape and QuantizeLinear of an input in (rows, features)."""
    model = Build(np.int8)
    shape = model.const("shape", np.array([6, 10]))
    x = model.node("Reshape", [model.x("x", (1, 6, 10)), shape], "flat")
    x = model.again(x, 0.0371, 3, "again")
    w = random_array(np.random.default_rng(1), np.int8, (10, 7))
    w = model.dq(model.const("w", w), 0.01, np.int8(0))
    graph = check_on_commands(model.end(model.node("MatMul", [x, w], "c"), 0.3), tmp_path)
    assert [type(op) for op in graph.ops] == [Conv]


def test_elements_between_images(tmp_path):
    model = Build(np.int8)
    x = model.node(
        "Concat", [model.x("a", (1, 5, 6, 7)), model.x("b", (2, 5, 6, 7))], "cat", axis=0
    )
    x = model.again(x, 0.0371, 3, "all")
    x = node("Slice", ints(2, 1), ints(0, 5), ints(0, 1), ints(-1, 1))(model, x)
    graph = check_on_commands(model.end(x, 0.0371, 3), tmp_path)
    assert [(type(op), op.across_images) for op in graph.ops] == [(Select, True)] * 2


# Refusals and whole blocks ------------------------------------------------------------------------


def test_what_the_configuration_cannot_do_is_named(tmp_path):
    model = attention_model(np.int8, 8, 2, 8)
    graph, _, _ = prepare(model, tmp_path / "model.onnx", 0)
    for config, why in (
        (Config.sized(20, 12), "a power of two, or no more .* has 20 rows and 12 columns"),
        (Config.sized(16, 16, window=False), "needs the window engine"),
        (Config.sized(64, 64), "at most 63 rows; this array has 64"),
    ):
        with pytest.raises(ModelError, match=why):
            compile_graph(graph, config)


@pytest.mark.parametrize(
    "a, b, why",
    [
        ((2, 5, 7), (2, 8, 4), "do not fit"),
        ((2, 5, 7), (3, 7, 4), "batches \\[2\\] and \\[3\\]"),
        ((1, 40000), (40000, 1), "each sum has 40000 products; 33025 is the limit"),
    ],
)
def test_refused(a, b, why, tmp_path):
    onnx.save(product_model(a, b), tmp_path / "model.onnx")
    with pytest.raises(ModelError, match=why):
        load(tmp_path / "model.onnx")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A quantised transformer encoder block."""
    path = tmp_path_factory.mktemp("encoder") / "encoder.onnx"
    onnx.save(encoder_block(), path)
    samples = np.random.default_rng(1).normal(size=(8, 12, 16)).astype(np.float32)
    onnx.save(quantise_model(path, {"x": samples}), path)
    return path


def test_only_softmax_and_norms_of_an_encoder_are_the_hosts(encoder):
    """Of a machine without row operations."""
    placed = partition(encoder, Config()).placements
    on_host = [p for p in placed if p.host and p.op_type not in CONVERSIONS]
    assert [p.op_type for p in on_host] == ["Softmax", *["LayerNormalization"] * 2]
    assert {p.rule for p in on_host} == {NO_ROW_OPS}
    placed = partition(encoder, Config(row_ops=True)).placements
    assert not any(p.host for p in placed)


RUNS = [
    pytest.param("commands", 4, 4),
    pytest.param("commands", 16, 16),
    pytest.param("commands", 8, 16),
    pytest.param("commands", 20, 12),
    pytest.param("verilator", 4, 4, marks=pytest.mark.xdist_group("4x4")),
]


@pytest.mark.parametrize("sim, rows, cols", RUNS)
def test_encoder_runs(encoder, sim, rows, cols, tmp_path):
    """Equal on all levels; where the array cannot take matrices, the host has the products too."""
    out = tmp_path / "report.json"
    result = cli(encoder, "--sim", sim, "--rows", rows, "--cols", cols, "--json", out)
    assert result.exit_code == 0, result.stderr
    report = json.loads(out.read_text())
    assert report["golden_mismatches"] == 0
    assert [op["op"] for op in report["host_ops"]].count("MatMul") == (2 if rows > cols else 0)
