"""The loader: what it makes of models, and what it refuses."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.utils import Extractor

from systole.sw.frontend.load import load
from systole.sw.frontend.passes.layout import LayoutError, OnnxView, input_perm, output_perm
from systole.sw.golden import model as golden
from systole.sw.golden import oracle
from systole.sw.ir.graph import Conv, ModelError, Pool, Select
from tests.helpers.random_models import Model, random_array, random_inputs

REAL = Path(__file__).resolve().parents[4] / "shared" / "models"
X = (0.05, np.int8(3))
"""Scale and zero point of the inputs below."""


def saved(model, tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    return path


def conv_model(edit=lambda nodes: None, *, x_shape=(1, 4, 9, 9), weights=None, **attributes):
    """A quantised convolution, optionally edited; ``attributes`` are Conv's."""
    model = Model()
    rng = np.random.default_rng(0)
    real = model.dq(model.input("x", np.int8, x_shape), *X)
    model.const("w", random_array(rng, np.int8, (6, 4, 3, 3)) if weights is None else weights)
    w = model.dq("w", 0.01, np.int8(0))
    y = model.q(model.node("Conv", [real, w], "sum", **attributes), 0.3, np.int8(-5), "y")
    edit(model)
    return model.done(y, np.int8)


def chain(*steps, shape=(1, 4, 6, 5), dtype=np.int8, q=X):
    """A model of DequantizeLinear, ``steps`` (functions of model and value), QuantizeLinear."""
    model = Model()
    value = model.dq(model.input("x", dtype, shape), *X)
    for step in steps:
        value = step(model, value)
    return model.done(model.q(value, *q, "y"), np.asarray(q[1]).dtype)


def node(op_type, *constants, **attributes):
    """A step for ``chain``."""

    def step(model, value):
        n = len(model.nodes)
        names = [model.const(f"c{n}_{i}", c) for i, c in enumerate(constants)]
        return model.node(op_type, [value, *names], f"v{n}", **attributes)

    return step


def weighted(op_type, weights, *rest, **attributes):
    """A step with quantised weights."""

    def step(model, value):
        n = len(model.nodes)
        w = model.dq(model.const(f"w{n}", weights), 0.01, np.int8(0))
        return model.node(op_type, [value, w, *rest], f"v{n}", **attributes)

    return step


def requantised(scale, zero):
    """A step that quantises and dequantises."""

    def step(model, value):
        n = len(model.nodes)
        return model.dq(model.q(value, scale, zero, f"q{n}"), scale, zero)

    return step


def check(model, tmp_path, seed=0, exact=True):
    """Loads and compares with onnxruntime; the graph."""
    path = saved(model, tmp_path)
    graph = load(path)
    inputs = random_inputs(np.random.default_rng(seed), model)
    ours = golden.run(
        graph,
        {
            p.tensor: golden.quantise_input(p, graph.tensors[p.tensor], inputs[p.name])
            for p in graph.inputs
        },
    )
    theirs = oracle.run(path, inputs)
    for p in graph.outputs:
        result = oracle.compare(p, graph.tensors[p.tensor], ours[p.tensor], theirs[p.name])
        # One in a thousand may differ by one where onnxruntime computes in float32.
        assert result.max_abs_diff <= (0 if exact else 1), result
        assert result.equal >= result.elements * 0.999 - 1
    return graph


def weights(*shape, seed=1):
    return random_array(np.random.default_rng(seed), np.int8, shape)


# Layouts -----------------------------------------------------------------------------------------


def test_input_in_nhwc(tmp_path):
    model = Model()
    x = model.input("x", np.int8, (1, 6, 5, 4))
    x = model.node("Transpose", [x], "t", perm=[0, 3, 1, 2])
    w = model.dq(model.const("w", weights(3, 4, 3, 3)), 0.01, np.int8(0))
    y = model.node("Conv", [model.dq(x, *X), w], "sum")
    y = model.q(y, 0.4, np.int8(0), "y")
    y = model.node("Transpose", [y], "out", perm=[0, 2, 3, 1])
    graph = check(model.done(y, np.int8), tmp_path)
    x, y = graph.tensors["x"], graph.tensors["y"]
    assert (x.shape, x.perm, x.onnx_shape) == ((1, 4, 6, 5), (0, 3, 1, 2), (1, 6, 5, 4))
    assert (y.shape, y.onnx_shape) == ((1, 3, 4, 3), (1, 4, 3, 3))


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1)])
def test_flatten_before_gemm_becomes_a_convolution(order, tmp_path):
    shape = [(1, 4, 6, 5)[i] for i in order]
    steps = [
        weighted("Conv", weights(4, 4, 1, 1)),
        requantised(0.2, np.int8(1)),
        node("Transpose", perm=list(order)),
        node("Flatten"),
        weighted("Gemm", weights(120, 7)),
    ]
    graph = check(chain(*steps, q=(0.5, np.int8(0))), tmp_path, exact=False)
    op = graph.ops[1]
    assert shape and op.weights.shape == (7, 4, 6, 5) and op.op_type == "Gemm"
    assert graph.tensors["y"].shape == (1, 7, 1, 1) and graph.tensors["y"].onnx_shape == (1, 7)


def test_flat_input_reshaped_to_an_image(tmp_path):
    model = Model()
    x = model.node("Reshape", [model.input("x", np.int8, (1, 490)),
                               model.const("s", np.array([0, 1, 49, -1]))], "r")  # fmt: skip
    w = model.dq(model.const("w", weights(3, 1, 10, 4)), 0.01, np.int8(0))
    y = model.q(model.node("Conv", [model.dq(x, *X), w], "c"), 0.4, np.int8(0), "y")
    graph = check(model.done(y, np.int8), tmp_path)
    assert graph.tensors["x"].shape == (1, 1, 49, 10)


@pytest.mark.parametrize("lead", [(5,), (2, 3), (1, 4, 3)])
def test_matmul_over_rows(lead, tmp_path):
    steps = [
        weighted("MatMul", weights(8, 6)),
        requantised(0.3, np.int8(-4)),
        weighted("MatMul", weights(6, 9)),
    ]
    graph = check(chain(*steps, shape=(*lead, 8), q=(0.4, np.int8(7))), tmp_path, exact=False)
    rows = int(np.prod(lead))
    assert graph.tensors["x"].shape == (1, 8, 1, rows)
    assert graph.tensors["y"].shape == (1, 9, 1, rows)
    assert graph.tensors["y"].onnx_shape == (*lead, 9)


def test_matrix_transposed_and_biased(tmp_path):
    model = Model()
    real = model.dq(model.input("x", np.uint8, (8, 5)), 0.05, np.uint8(9))
    w = model.dq(model.const("w", weights(6, 8)), np.full(6, 0.01), np.zeros(6, np.int8), axis=0)
    w = model.node("Transpose", [w], "wt")
    x = model.node("Transpose", [real], "xt", perm=[1, 0])
    y = model.node("MatMul", [x, w], "p")
    y = model.node("Add", [model.const("b", np.arange(6, dtype=np.float32)), y], "a")
    graph = check(model.done(model.q(y, 0.4, np.uint8(100), "y"), np.uint8), tmp_path, exact=False)
    expected = np.rint(np.arange(6) / (np.float32(0.05) * np.float32(0.01)))
    assert (graph.ops[0].bias == expected).all()
    assert graph.tensors["x"].perm == (0, 1) and graph.tensors["x"].zero == 9 - 128


def test_batches(tmp_path):
    steps = [weighted("Conv", weights(6, 4, 3, 3)), requantised(0.2, np.int8(0))]
    steps += [node("Flatten"), weighted("Gemm", weights(7, 72), transB=1)]
    graph = check(chain(*steps, shape=(3, 4, 6, 5), q=(0.5, np.int8(0))), tmp_path, exact=False)
    assert graph.tensors["y"].shape == (3, 7, 1, 1)


def test_one_dimensional_convolution_and_pool(tmp_path):
    steps = [
        weighted("Conv", weights(6, 4, 3), strides=[2], pads=[1, 2], dilations=[2]),
        requantised(0.2, np.int8(0)),
        node("MaxPool", kernel_shape=[2], strides=[2]),
    ]
    graph = check(chain(*steps, shape=(1, 4, 30), q=(0.2, np.int8(0))), tmp_path)
    conv, pool = graph.ops
    assert (conv.strides, conv.pads, conv.dilations) == ((1, 2), (0, 1, 0, 2), (1, 2))
    assert pool.kernel == (1, 2) and graph.tensors["y"].onnx_shape == (1, 6, 7)


def test_squeeze_unsqueeze_dropout_identity(tmp_path):
    steps = [
        node("Identity"),
        node("GlobalAveragePool"),
        requantised(0.05, np.int8(3)),
        node("Squeeze", np.array([2, 3])),
        node("Dropout"),
        node("Unsqueeze", np.array([-1, 2])),
        weighted("Conv", weights(6, 4, 1, 1)),
    ]
    graph = check(chain(*steps, q=(0.1, np.int8(0))), tmp_path)
    assert [op.op_type for op in graph.ops] == ["GlobalAveragePool", "Conv"]


@pytest.mark.parametrize("keep", [0, 1])
def test_reduce_mean_over_space(keep, tmp_path):
    step = node("ReduceMean", np.array([2, -1]), keepdims=keep)
    graph = check(chain(step), tmp_path, exact=False)
    assert graph.ops[0].kernel == (6, 5)
    assert graph.tensors["y"].onnx_shape == ((1, 4, 1, 1) if keep else (1, 4))


def test_views():
    x = OnnxView.contiguous((2, 3, 4))
    assert x.transpose((0, 2, 1)).reshape((8, 3)).transpose((1, 0)).shape == (3, 8)
    flat = x.transpose((2, 0, 1)).reshape((4, 6))
    assert input_perm((2, 3, 4), flat) == (2, 0, 1)
    with pytest.raises(LayoutError):
        output_perm(x.transpose((0, 2, 1)).reshape((2, 12)))
    with pytest.raises(LayoutError):
        x.transpose((0, 2, 1)).reshape((2, 6, 2))
    assert flat.rebase(flat) == OnnxView.contiguous((4, 6))
    assert x.rebase(x.transpose((1, 0, 2))).dims == (((2, 4),), ((3, 8),), ((4, 1),))


# Fusion ------------------------------------------------------------------------------------------


def test_clamps_join_the_operator_before(tmp_path):
    steps = [
        weighted("Conv", weights(6, 4, 3, 3)),
        node("Relu"),
        node("Clip", np.float32(-1), np.float32(6)),
        requantised(0.1, np.int8(-20)),
        node("Clip", np.float32(1), np.float32(9)),
    ]
    graph = check(chain(*steps, q=(0.1, np.int8(-20))), tmp_path, exact=False)
    (op,) = graph.ops
    assert (op.low, op.high, op.output) == (-10, 40, "y")


def test_clamp_of_a_shared_tensor_stays(tmp_path):
    model = Model()
    x = model.input("x", np.int8, (1, 4, 6, 5))
    clipped = model.node("Relu", [model.dq(x, *X)], "r")
    q = model.q(clipped, *X, "q")
    names = [model.node("DequantizeLinear", [v, *p], f"{v}_again")
             for v, p in ((x, model.pair("p1", *X)), (q, model.pair("p2", *X)))]  # fmt: skip
    y = model.q(model.node("Concat", names, "s", axis=1), 0.11, np.int8(0), "y")
    graph = check(model.done(y, np.int8), tmp_path, exact=False)
    clamp, concat = graph.ops
    assert isinstance(clamp, Pool) and (clamp.kernel, clamp.low) == ((1, 1), 3)
    assert isinstance(concat, Select)


def test_rescaling_is_a_selection(tmp_path):
    graph = check(chain(node("Relu"), q=(0.03, np.int8(-128))), tmp_path, exact=False)
    (op,) = graph.ops
    (((pick,),), steps) = op.phases, op.steps
    assert steps == (1, 1) and (pick.channels == np.arange(4)).all()
    assert pick.scale == np.float32(0.05) / np.float32(0.03)
    step = node("MaxPool", kernel_shape=[2, 2])
    graph = check(chain(step, q=(0.03, np.int8(-128))), tmp_path, exact=False)
    assert [type(op) for op in graph.ops] == [Pool, Select]


def test_operators_on_integers(tmp_path):
    model = Model()
    x = model.input("x", np.uint8, (1, 4, 6, 5))
    names = [x, *model.pair("x", 0.05, np.uint8(7)), model.const("w", weights(6, 4, 3, 3))]
    names += [*model.pair("w", 0.01, np.int8(0)), *model.pair("y", 0.3, np.uint8(120))]
    y = model.node("QLinearConv", names, "c")
    y = model.node("Clip", [y, model.const("lo", np.uint8(100)), model.const("hi", np.uint8(160))],
                   "clip")  # fmt: skip
    y = model.node("MaxPool", [y], "y", kernel_shape=[2, 2])
    graph = check(model.done(y, np.uint8), tmp_path)
    conv, pool = graph.ops
    assert (conv.low, conv.high) == (100 - 128, 160 - 128) and isinstance(pool, Pool)


def test_residual_needs_an_ungrouped_convolution_read_once(tmp_path):
    def build(group, twice):
        model = Model()
        x = model.input("x", np.int8, (1, 4, 6, 5))
        w = model.dq(model.const("w", weights(4, 4 // group, 1, 1)), 0.01, np.int8(0))
        y = model.node("Conv", [model.dq(x, *X), w], "c", group=group)
        mid = model.dq(model.q(y, 0.217, np.int8(4), "mid"), 0.217, np.int8(4))
        total = model.node("Add", [mid, mid if twice else "x_real"], "s")
        return model.done(model.q(total, 0.31, np.int8(0), "y"), np.int8)

    for group, twice, fused in ((1, False, True), (4, False, False), (1, True, False)):
        graph = check(build(group, twice), tmp_path, exact=False)
        kinds = ["Conv+Add"] if fused or twice else ["Conv", "Add"]
        assert [op.op_type for op in graph.ops] == kinds
        if twice:  # a function of one activation
            assert graph.ops[0].activation.mid_name == "mid"
        if fused:
            residual = graph.ops[0].residual
            assert (residual.other, residual.mid_zero, residual.name) == ("x", 4, "s_node")
            assert residual.conv_ratio == float(np.float32(0.217) / np.float32(0.31))
            assert residual.other_ratio == float(np.float32(0.05) / np.float32(0.31))
            assert set(graph.tensors) == {"x", "y"}


# Reading -----------------------------------------------------------------------------------------


def test_uint8_symmetric_weights_and_quantised_constants(tmp_path):
    model = Model()
    real = model.dq(model.input("x", np.int8, (2, 8)), *X)
    w = weights(8, 3).astype(np.float32) * np.float32(0.01)
    q = model.node(
        "QuantizeLinear", [model.const("w", w), *model.pair("wq", 0.01, np.uint8(128))], "wq"
    )
    pair = [c.name for c in model.constants[-2:]][::-1]
    w = model.node("DequantizeLinear", [q, *sorted(pair)], "wr")
    y = model.q(model.node("MatMul", [real, w], "p"), 0.3, np.int8(0), "y")
    graph = load(saved(model.done(y, np.int8), tmp_path))
    assert (graph.ops[0].weights[:, :, 0, 0] == weights(8, 3).T).all()


def test_constant_shapes_are_folded(tmp_path):
    """Reshape to a shape that nodes compute."""
    model = Model()
    real = model.dq(model.input("x", np.int8, ("batch", 4, 6, 5)), *X)
    shape = model.node("Shape", ["x"], "shape")
    first = model.node("Gather", [shape, model.const("zero", np.array([0]))], "first")
    rest = model.const("rest", np.array([-1]))
    target = model.node("Concat", [first, rest], "target", axis=0)
    value = model.node("Reshape", [real, target], "flat")
    w = model.dq(model.const("w", weights(120, 3)), 0.01, np.int8(0))
    y = model.q(model.node("Gemm", [value, w], "p"), 0.3, np.int8(0), "y")
    graph = load(saved(model.done(y, np.int8), tmp_path))
    assert graph.ops[0].weights.shape == (3, 120, 1, 1)


def test_external_data(tmp_path):
    model = conv_model()
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="data.bin", size_threshold=0)
    assert len(load(path).ops) == 1
    data = (tmp_path / "data.bin").read_bytes()
    (tmp_path / "data.bin").write_bytes(data[:100])
    with pytest.raises(ModelError, match="has 100 bytes"):
        load(path)
    (tmp_path / "data.bin").unlink()
    with pytest.raises(ModelError, match="missing"):
        load(path)
    inner = tmp_path / "inner"
    inner.mkdir()
    (tmp_path / "data.bin").write_bytes(data)
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../data.bin"
    (inner / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match="outside the model's folder"):
        load(inner / "model.onnx")


def test_files_that_are_no_models(tmp_path):
    path = tmp_path / "model.onnx"
    for match, content in (
        ("not a readable ONNX model", b"hello, this is text"),
        ("not an ONNX model", b""),
        ("ONNX", conv_model().SerializeToString()[:200]),
    ):
        path.write_bytes(content)
        with pytest.raises(ModelError, match=match):
            load(path)
    for missing in (tmp_path / "none.onnx", tmp_path):
        with pytest.raises(ModelError, match="no such file"):
            load(missing)


def test_truncation_and_damage_never_escape(tmp_path):
    """Any cut and any flipped byte gives a graph or a ModelError."""
    data = conv_model(pads=[1, 1, 1, 1]).SerializeToString()
    path = tmp_path / "model.onnx"
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(40):
        damaged = bytearray(data)
        damaged[rng.integers(len(data))] ^= 1 << rng.integers(8)
        for content in (damaged, data[: rng.integers(len(data))]):
            path.write_bytes(content)
            try:
                load(path)
            except ModelError:
                refused += 1
    assert refused > 20


# Refusals ----------------------------------------------------------------------------------------


def const_edit(name, array):
    def edit(model):
        for i, tensor in enumerate(model.constants):
            if tensor.name == name:
                model.constants[i] = numpy_helper.from_array(np.asarray(array), name)

    return edit


def drop(name):
    def edit(model):
        model.constants[:] = [c for c in model.constants if c.name != name]

    return edit


def cycle(model):
    conv = next(n for n in model.nodes if n.op_type == "Conv")
    first = model.nodes[0]
    first.input[0] = conv.output[0]


def attribute(name, value):
    def edit(model):
        conv = next(n for n in model.nodes if n.op_type == "Conv")
        conv.attribute.append(helper.make_attribute(name, value))

    return edit


REFUSED_CONVS = [
    (const_edit("y_scale", np.float32(0)), "y_scale|QuantizeLinear 'y_node': scale = 0.0"),
    (const_edit("y_scale", np.float32("nan")), "scale = nan"),
    (const_edit("x_dq_scale", np.float32("inf")), "scale = inf"),
    (const_edit("x_dq_scale", np.float32(-1)), "positive and finite"),
    (const_edit("x_dq_scale", np.float32([1, 1, 1, 1])), "scale has 4 values"),
    (const_edit("x_dq_scale", np.float16(1)), "float16; float32 is needed"),
    (const_edit("x_dq_zero", np.int16(1)), "zero point is int16"),
    (const_edit("x_dq_zero", np.uint8(1)), "type differs"),
    (const_edit("w_dq_zero", np.int16(3)), "zero point has type int16, its constant int8"),
    (const_edit("w", np.zeros((6, 4, 3, 3), np.int32)), "its constant int32"),
    (const_edit("w", np.zeros((6, 5, 3, 3), np.int8)), "do not fit 4 input channels"),
    (const_edit("w", np.zeros((6, 4, 3), np.int8)), "weights of rank 3; 4"),
    (const_edit("w_dq_scale", np.ones(5, np.float32)), "does not fit axis"),
    (const_edit("w_dq_scale", np.float32(1e38)), "outside 0..2\\^24"),
    (drop("w"), "defined by no node"),
    (drop("y_scale"), "defined by no node"),
    (cycle, "cannot be sorted|defined by no"),
    (attribute("group", 3), "group = 3"),
    (attribute("group", 0), "group = 0"),
    (attribute("strides", [0, 1]), "strides = \\[0, 1\\]: each must be at least 1"),
    (attribute("strides", [1]), "has 1 values, 2 needed"),
    (attribute("strides", 1.5), "attribute strides has type FLOAT"),
    (attribute("strides", [300, 1]), "strides = \\[300, 1\\] exceeds 255"),
    (attribute("pads", [-1, 0, 0, 0]), "pads"),
    (attribute("dilations", [9, 1]), "reaches over 19 elements; the padded input has 9"),
    (attribute("auto_pad", "SAME"), "auto_pad = 'SAME'"),
    (attribute("kernel_shape", [3, 2]), "kernel_shape = \\[3, 2\\] but weights"),
]


@pytest.mark.parametrize("edit, match", REFUSED_CONVS, ids=[m for _, m in REFUSED_CONVS])
def test_refused_convolutions(edit, match, tmp_path):
    with pytest.raises(ModelError, match=match):
        load(saved(conv_model(edit), tmp_path))


REFUSED_CHAINS = [
    (chain(node("TopK")), "TopK 'v1_node': operator not supported; supported are Abs, Add"),
    (chain(node("Relu", ), node("Conv", np.zeros((1, 4, 1, 1), np.float32))), "is float32"),
    (chain(node("Conv", np.zeros((1, 4, 1, 1), np.float32))), "weights must be a quantised"),
    (chain(node("Add", np.float32([1e5, 1.2e5, -9.37e5, 3, 4]))), "varies over the image"),
    (chain(weighted("Conv", weights(6, 4, 3, 3)), node("Add", np.eye(4, 3, dtype=np.float32))),
     "does not run along the 6 channels"),
    (chain(node("AveragePool", kernel_shape=[1, 1], pads=[1, 0, 0, 0])), "each must be less than"),
    (chain(node("MaxPool", kernel_shape=[2, 2], dilations=[2, 1], auto_pad="SAME_UPPER")),
     "with dilations = \\[2, 1\\]: each must be 1"),
    (chain(node("ReduceMax", np.array([2, 3]), keepdims=2)), "keepdims = 2"),
    (chain(node("Pad", np.array([0, 4, 0, 0, 0, -4, 0, 0]))), "has no element of its operands"),
    (chain(node("Pad", np.array([0, -4, 0, 0, 0, 0, 0, 0]))), "has no element of its operands"),
    (chain(weighted("ConvTranspose", weights(4, 4, 3, 3), output_padding=[1, 0])),
     "output_padding = \\[1, 0\\]: each must be less"),
    (chain(node("GlobalMaxPool"), shape=(5, 4)), "operand of rank 2; 3 or 4"),
    (chain(node("ReduceMax", np.array([1, 2, 3]))), "axes = \\[1, 2, 3\\]: it must be one or two"),
    (chain(node("MaxPool")), "kernel_shape is missing"),
    (chain(node("MaxPool", kernel_shape=[2, 2], storage_order=1)), "storage_order = 1"),
    (chain(node("AveragePool", kernel_shape=[64, 1], pads=[32, 0, 32, 0])), "exceeds 63"),
    (chain(node("ReduceMean", np.array([0]))), "axes = \\[0\\]: it must be one or two"),
    (chain(node("Transpose", perm=[0, 0, 1, 2])), "must be a permutation"),
    (chain(node("Reshape", np.array([7, 7]))), "cannot reshape"),
    (chain(node("Reshape", np.array([0, 0, -1, -1]))), "shape = "),
    (chain(node("Flatten", axis=9)), "axis = 9"),
    (chain(node("Squeeze", np.array([1]))), "each must have size 1"),
    (chain(node("Unsqueeze", np.array([9]))), "axes = \\[9\\]: each must be in"),
    (chain(node("Clip", np.float32("nan"))), "min is not a number"),
    (chain(weighted("Gemm", weights(4, 4)), shape=(5, 4), q=(1e-30, np.int8(0))), "outside 0..2"),
    (chain(weighted("Gemm", weights(4, 4), alpha=-1.0), shape=(5, 4)), "alpha = -1.0"),
    (chain(weighted("Gemm", weights(4, 4), beta=0.5), shape=(5, 4)), "beta = 0.5"),
    (chain(weighted("Gemm", weights(3, 4)), shape=(5, 4)), "4 columns, the constant 3 rows"),
    (chain(weighted("Conv", weights(6, 4, 1, 1)), requantised(0.1, np.int8(0)),
           node("Gather", np.random.default_rng(0).permutation(1100) % 300, axis=3),
           shape=(1, 4, 2, 300)),
     "no regular order"),
    (chain(node("Identity")), "no operator|passed through"),
]  # fmt: skip


@pytest.mark.parametrize("model, match", REFUSED_CHAINS, ids=[m for _, m in REFUSED_CHAINS])
def test_refused_chains(model, match, tmp_path):
    with pytest.raises(ModelError, match=match):
        load(saved(model, tmp_path))


def test_refused_ends(tmp_path):
    for shape, match in (((1, "c", 9, 9), "dimension 1 is c"), ((1, 0, 9, 9), "dimension 1 is 0")):
        with pytest.raises(ModelError, match=match):
            load(saved(conv_model(x_shape=shape), tmp_path))
    model = conv_model()
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.INT16
    with pytest.raises(ModelError, match="input 'x' has type int16"):
        load(saved(model, tmp_path))
    model = conv_model()
    model.graph.output[0].name = "sum"
    with pytest.raises(ModelError, match="output 'sum' is not quantised"):
        load(saved(model, tmp_path))
    model = Model()
    y = model.node("Relu", [model.input("x", np.float32, (1, 4))], "y")
    with pytest.raises(ModelError, match="its operand must be an activation"):
        load(saved(model.done(y, np.float32), tmp_path))


def test_an_image_and_its_transpose_are_added(tmp_path):
    """Rows of 71 pixels fill no whole number of words: the image moves in pieces."""
    model = Model()
    x = model.dq(model.input("x", np.int8, (1, 4, 71, 71)), *X)
    w = model.dq(model.const("w", weights(4, 4, 1, 1)), 0.01, np.int8(0))
    y = model.dq(model.q(model.node("Conv", [x, w], "c"), 0.1, np.int8(0), "m"), 0.1, np.int8(0))
    y = model.node("Transpose", [y], "t", perm=[0, 1, 3, 2])
    y = model.q(model.node("Add", [x, y], "s"), 0.1, np.int8(0), "y")
    check(model.done(y, np.int8), tmp_path, exact=False)


def test_operands_of_two_sizes_are_not_added(tmp_path):
    model = Model()
    names = [model.dq(model.input(n, np.int8, (1, c)), *X) for n, c in (("a", 4), ("b", 3))]
    y = model.q(model.node("Add", names, "s"), 0.1, np.int8(0), "y")
    with pytest.raises(ModelError, match="differ in shape"):
        load(saved(model.done(y, np.int8), tmp_path))


# Real models -------------------------------------------------------------------------------------

DATA = {
    "ic": ("cifar10_test500_lossless", 11),
    "kws": ("kws01_1000", 11),
    "sww": ("sww_calib45", 9),
    "vww": ("vww01_1000", 29),
    "ad": ("ad01_one_clip", 10),
}


def logits(path):
    """The model up to its logits."""
    model = onnx.load(path)
    softmax = [n for n in model.graph.node if n.op_type == "Softmax"]
    if not softmax:
        return model
    dq = next(n for n in model.graph.node if softmax[0].input[0] in n.output)
    whole = onnx.shape_inference.infer_shapes(model)
    return Extractor(whole).extract_model([model.graph.input[0].name], [dq.input[0]])


@pytest.mark.skipif(not REAL.is_dir(), reason=f"{REAL} is missing")
def test_real_model_with_asymmetric_weights_equals_onnxruntime(tmp_path):
    model = logits(REAL / "other" / "coral_mobilenet_v1_025_128_uint8.onnx")
    path = saved(model, tmp_path)
    graph = load(path)
    assert {op.weights.dtype.name for op in graph.ops if isinstance(op, Conv)} == {"int16"}
    (port,), (out,) = graph.inputs, graph.outputs
    tensor = graph.tensors[port.tensor]
    x = random_array(np.random.default_rng(0), np.uint8, tensor.onnx_shape)
    ours = golden.run(graph, {port.tensor: golden.quantise_input(port, tensor, x)})
    theirs = oracle.run(path, {port.name: x})[out.name]
    assert oracle.compare(out, graph.tensors[out.tensor], ours[out.tensor], theirs).exact


@pytest.mark.skipif(not REAL.is_dir(), reason=f"{REAL} is missing")
@pytest.mark.parametrize("name", DATA)
def test_real_model_equals_onnxruntime(name, tmp_path):
    path = saved(logits(REAL / "mlperf_tiny" / f"{name}_int8.onnx"), tmp_path)
    graph = load(path)
    data, count = DATA[name]
    assert len(graph.ops) == count
    arrays = np.load(REAL / "data" / f"{data}.npz")
    x = arrays[next(k for k in arrays if k[0] in "xw")][:6]
    (port,), (out,) = graph.inputs, graph.outputs
    tensor = graph.tensors[port.tensor]
    for row in x:
        if row.dtype == np.float32:
            row = np.clip(np.rint(row / tensor.scale) + tensor.zero, -128, 127).astype(np.int8)
        elif row.dtype == np.uint8:
            row = (row.astype(np.int16) - 128).astype(np.int8)
        row = row.reshape(tensor.onnx_shape)
        ours = golden.run(graph, {port.tensor: golden.quantise_input(port, tensor, row)})
        theirs = oracle.run(path, {port.name: row})[out.name]
        assert oracle.compare(out, graph.tensors[out.tensor], ours[out.tensor], theirs).exact


@pytest.mark.skipif(not REAL.is_dir(), reason=f"{REAL} is missing")
def test_other_real_models_are_taken_or_told_to_be_quantised():
    for path in sorted([*(REAL / "other").glob("*.onnx"), *REAL.glob("mlperf_tiny/*_float.onnx")]):
        try:
            load(path)
        except ModelError as e:
            assert "quantise" in str(e)
        else:
            assert not path.stem.endswith("_float")


def test_the_graph_is_printed_after_a_pass(tmp_path, capsys):
    path = saved(chain(node("Relu"), node("Tanh")), tmp_path)
    load(path, dump_after="lower")
    before = capsys.readouterr().out
    load(path, dump_after="fuse_activations")
    after = capsys.readouterr().out
    assert before.startswith("after lower:\ngraph ") and "Table" in before
    assert after.startswith("after fuse_activations (unchanged):\n")
    with pytest.raises(ValueError, match="no pass 'fuse': the passes are lower, drop_unused"):
        load(path, dump_after="fuse")
