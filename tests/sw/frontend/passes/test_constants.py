"""Constants that are tensors: positional embeddings, class tokens, masks, grids. Against
onnxruntime, and compiled by several schedules against the golden model on the command-level
simulator (on RTL: ``test_rtl``, random operators)."""

import numpy as np
import onnx
import pytest

from systole.isa import Config
from systole.sw.cli.bench import minimum_traffic
from systole.sw.compiler import Compiler, compile_graph
from systole.sw.compiler.stripes import Chain, Schedule
from systole.sw.frontend.load import load
from systole.sw.golden import model as golden
from systole.sw.ir.graph import Binary, Conv, MatMul, ModelError, Pool, Select
from systole.sw.session.backends import open_device
from systole.sw.simulate.cycles import predict_layers
from tests.helpers.layer_checks import check_on, check_program, compile_by_chance
from tests.helpers.operator_models import DTYPES, Build, compare, ints, node
from tests.helpers.random_models import random_array, random_inputs

CONFIGS = [
    Config(),
    Config.sized(4, 4, scratchpad_bytes=8192),
    Config.sized(12, 20),
    Config.sized(16, 16, scratchpad_bytes=32768, weight_bytes=8192, accumulator_bytes=4096),
]


def check(model, tmp_path, least=0.999, configs=CONFIGS[:3], seed=0):
    """Equal to onnxruntime but for 1 LSB in few elements; equal on all levels; the graph."""
    graph, results = compare(model, tmp_path, seed)
    for result in results:
        assert result.max_abs_diff <= 1 and result.equal >= least * result.elements - 1, result
    rng = np.random.default_rng(seed)
    inputs = {
        p.tensor: rng.integers(-128, 128, graph.tensors[p.tensor].shape).astype(np.int8)
        for p in graph.inputs
    }
    expected = golden.run(graph, inputs)
    for k, config in enumerate(configs):
        with open_device("commands", config, memory_bytes=64 << 20) as device:
            check_on(device, config, graph, inputs, expected, dump=bool(k % 2))
            program, _ = compile_by_chance(rng, graph, config, dump=not k % 2)
            check_program(device, program, inputs, expected)
    return graph


FORMS = {
    "image": ((2, 5, 9, 7), (5, 9, 7)),
    "plane": ((1, 40, 9, 7), (1, 1, 9, 7)),
    "signal": ((1, 5, 30), (5, 30)),
    "sequence": ((2, 9, 40), (1, 9, 40)),
    "matrix": ((9, 40), (9, 40)),
    "grid": ((2, 3, 4, 5, 6), (3, 1, 5, 6)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op_type", ["Add", "Sub", "Mul"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("first", [False, True])
def test_quantised(form, op_type, dtype, first, tmp_path):
    """The second operand of a Binary, as an activation."""
    shape, own = FORMS[form]
    model = Build(dtype)
    codes = np.random.default_rng(1).integers(0, 256, own).astype(np.uint8)
    names = [model.x("x", shape), model.dq(model.const("k", codes), 0.0217, np.uint8(77))]
    model = model.end(model.node(op_type, names[::-1] if first else names, "r"), 0.0537)
    graph = check(model, tmp_path)
    (op,) = graph.ops
    ((name, array),) = graph.constants.items()
    assert isinstance(op, Binary) and op.inputs == (("x", name), (name, "x"))[first]
    assert array.shape == graph.tensors["x"].shape and array.dtype == np.int8


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op_type", ["Add", "Sub"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("reach", [1.0, 40.0])
def test_real(form, op_type, dtype, first, reach, tmp_path):
    """One rounding of the sum with coarse and fine codes, however large the numbers."""
    shape, own = FORMS[form]
    model = Build(dtype)
    values = (np.random.default_rng(1).uniform(-reach, reach, own).astype(np.float32),)
    names = [model.x("x", shape), model.const("k", values[0])]
    model = model.end(model.node(op_type, names[::-1] if first else names, "r"), 0.037 * reach)
    (op,) = check(model, tmp_path, least=0.99, configs=CONFIGS[:2]).ops
    assert isinstance(op, Select) and len(op.phases[0]) == 3


@pytest.mark.parametrize("op_type", ["Add", "Sub", "Mul"])
@pytest.mark.parametrize("values", [(0, 1), (-1, 0, 1), range(-20, 60), (0.25, 0.5, 1.75)])
def test_real_that_codes_give_exactly(op_type, values, tmp_path):
    model = Build(np.int8)
    mask = np.random.default_rng(1).choice(np.float32(values), (9, 40))
    value = node(op_type, (mask,))(model, model.x("x", (1, 9, 40)))
    (op,) = check(model.end(value, 0.0437 * max(np.abs(mask).max(), 1)), tmp_path).ops
    assert isinstance(op, Binary)


def test_divisor(tmp_path):
    model = Build(np.int8)
    divisor = np.random.default_rng(1).choice(np.float32([1, 2, 4, 8]), (9, 40))
    value = node("Div", (divisor,))(model, model.x("x", (1, 9, 40)))
    (op,) = check(model.end(value, 0.0437), tmp_path).ops
    assert isinstance(op, Binary) and op.kind == "mul"


def test_real_factor_is_rounded_where_the_result_is_coarse(tmp_path):
    values = np.random.default_rng(1).uniform(0.3, 2, (9, 40)).astype(np.float32)
    for scale, fits in ((0.09, True), (0.02, False)):
        model = Build(np.int8)
        model = model.end(node("Mul", (values,))(model, model.x("x", (1, 9, 40))), scale)
        if fits:
            check(model, tmp_path, least=0.5)
        else:
            with pytest.raises(ModelError, match=r"at most 0\.5 allowed"):
                compare(model, tmp_path)


def test_too_large(tmp_path):
    model = Build(np.int8)
    values = np.random.default_rng(1).uniform(-1e4, 1e4, (9, 40)).astype(np.float32)
    model = model.end(node("Add", (values,))(model, model.x("x", (1, 9, 40))), 90)
    with pytest.raises(ModelError, match="16129 steps are the limit"):
        compare(model, tmp_path)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op_type", ["QLinearAdd", "QLinearMul"])
def test_fused(op_type, dtype, tmp_path):
    model = Build(dtype)
    names = [model.input("a", dtype, (1, 5, 9, 7)), *model.pair("a", 0.053, model.zero(9))]
    b = model.const("b", random_array(np.random.default_rng(0), dtype, (1, 5, 9, 7)))
    names += [b, *model.pair("b", 0.041, model.zero(-3)), *model.pair("y", 0.1131, model.zero(1))]
    y = model.node(op_type, names, "y", "com.microsoft")
    graph = check(model.done(y, dtype), tmp_path)
    assert [type(op) for op in graph.ops] == [Binary] and len(graph.constants) == 1


def tokens(dtype, batch: int, depth: int = 24) -> onnx.ModelProto:
    """The stem of a vision transformer: patches, a class token before them, a positional embedding,
    a projection."""
    rng, model = np.random.default_rng(1), Build(dtype)

    def weights(name, shape):
        return model.dq(model.const(name, random_array(rng, np.int8, shape)), 0.01, np.int8(0))

    x = model.node("Conv", [model.x("x", (batch, 3, 8, 12)), weights("w", (depth, 3, 4, 4))], "c",
                   strides=[4, 4])  # fmt: skip
    x = node("Reshape", ints(0, depth, 6))(model, model.again(x, 0.1093, 4, "patches"))
    x = node("Transpose", perm=[0, 2, 1])(model, x)
    token = model.const("token", random_array(rng, np.uint8, (batch, 1, depth)))
    token = model.dq(token, 0.0719, np.uint8(100))
    x = model.again(model.node("Concat", [token, x], "cat", axis=1), 0.1093, 4, "all")
    position = model.const("position", random_array(rng, np.int8, (1, 7, depth)))
    x = model.node("Add", [x, model.dq(position, 0.0213, np.int8(3))], "a")
    x = model.again(x, 0.1237, 4, "placed")
    return model.end(model.node("MatMul", [x, weights("v", (depth, 20))], "p"), 0.5113)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 2])
def test_tokens(dtype, batch, tmp_path):
    """Nothing is moved for the constants."""
    graph = check(tokens(dtype, batch), tmp_path, least=0.9, configs=CONFIGS)
    assert [type(op) for op in graph.ops] == [Conv, Select, Binary, Conv]
    shapes = [array.shape for array in graph.constants.values()]
    assert shapes == [(batch, 24, 1, 1), (1, 24, 1, 7 * batch)]


def test_embedding_joins_the_product(tmp_path):
    """Of a table's rows at constant places; a residual behind the product."""
    rng, model = np.random.default_rng(2), Build(np.int8)
    table = model.dq(model.const("t", random_array(rng, np.int8, (30, 16))), 0.02, np.int8(5))
    rows = model.node("Gather", [table, model.const("ids", np.arange(7)[None] * 3)], "g", axis=0)
    w = model.dq(model.const("w", random_array(rng, np.int8, (16, 16))), 0.01, np.int8(0))
    x = model.again(model.node("MatMul", [model.x("x", (1, 7, 16)), w], "p"), 0.1013, 0, "q")
    graph = check(model.end(model.node("Add", [x, rows], "a"), 0.1113), tmp_path, least=0.99)
    (op,) = graph.ops
    assert op.op_type == "MatMul+Add" and op.residual.other in graph.constants


@pytest.mark.parametrize("a, b", [((7, 9), (9, 20)), ((2, 7, 9), (2, 9, 20)), ((7, 9), (3, 9, 20))])
def test_constant_times_activation(a, b, tmp_path):
    rng, model = np.random.default_rng(2), Build(np.int8)
    left = model.dq(model.const("c", random_array(rng, np.int8, a)), 0.02, np.int8(5))
    model = model.end(model.node("MatMul", [left, model.x("x", b)], "p"), 0.313)
    graph = check(model, tmp_path, configs=CONFIGS[:2])
    assert isinstance(graph.ops[-1], MatMul) and graph.ops[-1].a.tensor in graph.constants


def test_reshaped_weights(tmp_path):
    """Scales keep their axis."""
    rng, model = np.random.default_rng(2), Build(np.int8)
    scales, zeros = rng.uniform(0.01, 0.02, 10), np.zeros(10, np.int8)
    w = model.dq(model.const("w", random_array(rng, np.int8, (10, 48))), scales, zeros, axis=0)
    w = node("Reshape", ints(10, 3, 4, 4))(model, w)
    (op,) = check(model.end(model.node("Conv", [model.x("x", (1, 3, 8, 8)), w], "c"), 0.3),
                  tmp_path).ops  # fmt: skip
    assert op.weights.shape == (10, 3, 4, 4)
    model = Build(np.int8)
    w = model.dq(model.const("w", random_array(rng, np.int8, (10, 48))), scales, zeros, axis=0)
    w = node("Reshape", ints(5, 6, 4, 4))(model, w)
    with pytest.raises(ModelError, match="scales along axis 0 to"):
        compare(model.end(model.node("Conv", [model.x("x", (1, 6, 8, 8)), w], "c"), 0.3), tmp_path)


def test_what_cannot_be_an_operand_is_named(tmp_path):
    rng = np.random.default_rng(2)
    for codes, scale, why in (
        (random_array(rng, np.int8, (1, 5, 9, 7)), np.full(5, 0.02), "quantised per tensor"),
        (np.ones((1, 5, 9, 7), np.int32), 0.02, "constant of type int32"),
    ):
        model = Build(np.int8)
        zero = np.zeros(np.shape(scale), codes.dtype)
        k = model.dq(model.const("k", codes), scale, zero, axis=1)
        model = model.end(model.node("Concat", [model.x("x", (1, 5, 9, 7)), k], "c", axis=1))
        with pytest.raises(ModelError, match=why):
            compare(model, tmp_path)


# Schedules and costs ------------------------------------------------------------------------------


def large(tmp_path):
    """A convolution, an embedding of 48 KiB on it, a pool."""
    rng, model = np.random.default_rng(0), Build(np.int8)
    w = model.dq(model.const("w", random_array(rng, np.int8, (16, 16, 3, 3))), 0.002, np.int8(0))
    x = model.node("Conv", [model.x("x", (1, 16, 48, 64)), w], "c", pads=[1] * 4)
    k = model.dq(model.const("k", random_array(rng, np.int8, (16, 48, 64))), 0.0217, np.int8(4))
    x = model.node("Sub", [model.again(x, 0.0541, 3, "q"), k], "s")
    x = model.again(x, 0.0613, 3, "r")
    model = model.end(
        model.node("MaxPool", [x], "m", kernel_shape=[2, 2], strides=[2, 2]), 0.0613, 3
    )
    onnx.save(model, tmp_path / "model.onnx")
    graph = load(tmp_path / "model.onnx")
    arrays = random_inputs(rng, model)
    inputs = {
        p.tensor: golden.quantise_input(p, graph.tensors[p.tensor], arrays[p.name])
        for p in graph.inputs
    }
    return graph, inputs, golden.run(graph, inputs)


@pytest.mark.parametrize("config", CONFIGS)
def test_schedules(config, tmp_path):
    """Resident or not, in regions or stripes; every part of the constant is read once."""
    graph, inputs, expected = large(tmp_path)
    assert [type(op) for op in graph.ops] == [Conv, Binary, Pool]
    chain = Chain(0, 2, 12) if config in CONFIGS[::2] else Chain(1, 2, 24)
    schedules = [Schedule(), Schedule(regions=((1, 100),)), Schedule((chain,))]
    compiler = Compiler(graph, config)
    whole = -(-16 // config.rows) * config.vector_bytes * 48 * 64
    with open_device("commands", config, memory_bytes=64 << 20) as device:
        for schedule in schedules:
            program = compiler.program(schedule)
            check_program(device, program, inputs, expected)
            read = predict_layers(program, 64).layers[1].read_bytes
            assert whole <= read < 2.1 * whole


def test_the_least_traffic_counts_constants(tmp_path):
    graph, _, _ = large(tmp_path)
    assert minimum_traffic(graph) == 16 * 16 * 9 + 2 * 16 * 48 * 64 + 16 * 24 * 32
    program = compile_graph(graph, CONFIGS[0])
    assert not set(graph.constants) & set(program.tensors)
