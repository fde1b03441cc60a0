"""Every operator beyond plain convolution and pooling, against onnxruntime."""

import numpy as np
import onnx
import pytest

from systole.sw.frontend.load import load
from systole.sw.golden import model as golden
from systole.sw.golden import oracle
from systole.sw.ir.graph import Binary, Conv, ConvTranspose, ModelError, Pool, Select, Table
from tests.helpers.random_models import Model, random_array, random_graph_model, random_inputs

DTYPES = [np.int8, np.uint8]


def compare(model, tmp_path, seed=0):
    """The graph and the golden model's comparison with onnxruntime, output by output."""
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
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
    results = [
        oracle.compare(p, graph.tensors[p.tensor], ours[p.tensor], theirs[p.name])
        for p in graph.outputs
    ]
    return graph, results


def check(model, tmp_path, exact=False, seed=0):
    graph, results = compare(model, tmp_path, seed)
    for result in results:
        if exact:
            assert result.exact, result
        assert result.max_abs_diff <= 1 and result.equal >= 0.999 * result.elements - 1, result
    return graph


class Build(Model):
    """A model whose activations share a type; scales away from powers of two, so that ties are
    rare."""

    def __init__(self, dtype, opset=21):
        super().__init__(opset)
        self.dtype = np.dtype(dtype)

    def zero(self, signed):
        return np.array(signed + (128 if self.dtype == np.uint8 else 0), self.dtype)

    def x(self, name, shape, scale=0.0371, zero=3):
        return self.dq(self.input(name, self.dtype, shape), scale, self.zero(zero))

    def end(self, value, scale=0.0293, zero=-7, name="y"):
        return self.done(self.q(value, scale, self.zero(zero), name), self.dtype)

    def again(self, value, scale, zero, name):
        """Quantised and dequantised."""
        return self.dq(self.q(value, scale, self.zero(zero), name), scale, self.zero(zero))


def node(op_type, *constants, domain="", **attributes):
    """A step: one node of a value and constants."""

    def step(model, value):
        n = len(model.nodes)
        names = [model.const(f"c{n}_{i}", c[0]) if c else "" for i, c in enumerate(constants)]
        return model.node(op_type, [value, *names], f"v{n}", domain, **attributes)

    return step


def const(*values, kind=np.float32):
    return (np.array(values[0] if len(values) == 1 else values, kind),)


def ints(*values):
    return (np.array(values, np.int64),)


# Weights -----------------------------------------------------------------------------------------


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


# Functions ---------------------------------------------------------------------------------------

FUNCTIONS = {
    "Sigmoid": [node("Sigmoid")],
    "Tanh": [node("Tanh")],
    "HardSigmoid": [node("HardSigmoid", alpha=0.3)],
    "HardSwish": [node("HardSwish")],
    "LeakyRelu": [node("LeakyRelu", alpha=0.1)],
    "Elu": [node("Elu")],
    "Gelu": [node("Gelu", approximate="tanh")],
    "Gelu microsoft": [node("Gelu", domain="com.microsoft")],
    "Erf": [node("Erf")],
    "Exp": [node("Exp")],
    "Sqrt": [node("Abs"), node("Sqrt")],
    "Neg": [node("Neg")],
    "Reciprocal": [node("Reciprocal")],
    "PRelu": [node("PRelu", const([[[0.2]]]))],
    "Relu of Mul": [node("Mul", const(-1.3)), node("Relu")],
    "Clip of Sub": [node("Sub", const([0.4])), node("Clip", const(-1.0), const(2.0))],
    "Add after Relu": [node("Relu"), node("Add", const(0.7))],
    "Pow": [node("Pow", const(2.0))],
    "Div": [node("Div", const(3.0))],
    "Max": [node("Max", const(0.33))],
    "Reshape": [node("Sigmoid"), node("Transpose", perm=[0, 1, 3, 2]), node("Tanh")],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_function(name, dtype, tmp_path):
    model = Build(dtype)
    value = model.x("x", (2, 5, 11, 13))
    for step in FUNCTIONS[name]:
        value = step(model, value)
    (op,) = check(model.end(value), tmp_path).ops
    assert isinstance(op, Table)


def silu(model, x, quantised):
    gate = model.node("Sigmoid", [x], "gate")
    if quantised:
        gate = model.again(gate, 1 / 255, -128, "gate_q")
    return model.node("Mul", [x, gate], "silu")


@pytest.mark.parametrize("quantised", [False, True])
def test_function_joins_the_convolution(quantised, tmp_path):
    """x * sigmoid(x), with and without a scale between: one table, behind the convolution."""
    rng = np.random.default_rng(0)
    model = Build(np.int8)
    w = model.dq(model.const("w", random_array(rng, np.int8, (6, 4, 3, 3))), 0.003, np.int8(0))
    x = model.again(model.node("Conv", [model.x("x", (1, 4, 9, 8)), w], "c"), 0.043, 5, "mid")
    (op,) = check(model.end(silu(model, x, quantised)), tmp_path).ops
    assert isinstance(op, Conv) and op.op_type == "Conv+Sigmoid+Mul"
    assert (op.activation.mid_name, op.activation.zero, op.output) == ("mid", 5, "y")


def test_function_of_a_shared_tensor_stays(tmp_path):
    model = Build(np.int8)
    x = model.x("x", (1, 4, 9, 8))
    total = model.again(model.node("Add", [x, model.x("z", (1, 4, 9, 8))], "s"), 0.07, 1, "mid")
    gate = model.again(model.node("Sigmoid", [total], "g"), 1 / 250, -128, "gate")
    graph = check(model.end(model.node("Concat", [total, gate], "both", axis=1)), tmp_path)
    assert [type(op) for op in graph.ops] == [Binary, Table, Select]


def test_tables_and_clamps_in_a_row_are_one(tmp_path):
    model = Build(np.uint8)
    value = model.x("x", (1, 4, 9, 8))
    for i, step in enumerate((node("Tanh"), node("Relu"), node("Neg"))):
        value = model.again(step(model, value), 0.011, -20, f"q{i}")
    (op,) = check(model.end(node("Exp")(model, value), 0.0047), tmp_path).ops
    assert isinstance(op, Table) and op.output == "y"


@pytest.mark.parametrize("op_type", ["QLinearSigmoid", "QLinearLeakyRelu"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_functions(op_type, dtype, tmp_path):
    model = Build(dtype)
    names = [model.input("x", dtype, (1, 3, 16, 17)), *model.pair("x", 0.05, model.zero(9))]
    names += model.pair("y", 0.0063, model.zero(-100))
    extra = {"alpha": 0.2} if op_type.endswith("Relu") else {}
    y = model.node(op_type, names, "y", "com.microsoft", **extra)
    (op,) = check(model.done(y, dtype), tmp_path).ops
    assert isinstance(op, Table)


# Arithmetic --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op_type", ["Add", "Sub", "Mul"])
@pytest.mark.parametrize(
    "a, b",
    [
        ((2, 5, 9, 7), (2, 5, 9, 7)),
        ((2, 5, 9, 7), (2, 5, 1, 1)),
        ((1, 5, 9, 7), (5, 1, 1)),
        ((1, 5, 9), (1, 5, 1)),
        ((13, 6), (13, 6)),
        ((13, 6), (1, 6)),
        ((13, 6), (6,)),
        ((1, 5, 9, 7), (1, 1, 9, 7)),
        ((1, 5, 9, 7), (1, 1, 1, 1)),
    ],
)
@pytest.mark.parametrize("swapped", [False, True])
def test_arithmetic(a, b, op_type, dtype, swapped, tmp_path):
    model = Build(dtype)
    names = [model.x("a", a), model.x("b", b, 0.0213, -30)]
    names = names[::-1] if swapped else names
    model = model.end(model.node(op_type, names, "r"), 0.0517)
    if swapped and op_type == "Sub" and a != b:
        with pytest.raises(ModelError, match="only the second may be broadcast"):
            compare(model, tmp_path)
        return
    graph = check(model, tmp_path)
    assert isinstance(graph.ops[-1], Binary) and graph.ops[-1].kind == op_type.lower()
    spread = graph.ops[-1].b if a != b else None
    assert spread is None or graph.tensors[spread].shape[2:] in ((1, 1), (9, 7))


CONSTANTS = {
    "image": ((2, 5, 9, 7), (5, 1, 1)),
    "batched": ((1, 5, 9, 7), (1, 5, 1, 1)),
    "signal": ((2, 5, 30), (5, 1)),
    "sequence": ((2, 9, 40), (40,)),
    "matrix": ((9, 40), (1, 40)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op_type", ["Add", "Sub", "Mul", "Div"])
@pytest.mark.parametrize("form", CONSTANTS)
@pytest.mark.parametrize("kind", ["float", "quantised", "first"])
def test_constant_per_channel(op_type, form, kind, dtype, tmp_path):
    shape, own = CONSTANTS[form]
    rng = np.random.default_rng(len(form))
    model = Build(dtype)
    if kind == "quantised":
        whole = model.const("k", rng.integers(129, 255, own).astype(np.uint8))
        constant = model.dq(whole, 0.0217, np.uint8(128))
    else:
        values = rng.uniform(0.3, 2, own) * rng.choice([-1, 1], own)
        constant = model.const("k", values.astype(np.float32))
    names = [model.x("x", shape), constant]
    model = model.end(model.node(op_type, names[::-1] if kind == "first" else names, "r"), 0.0437)
    if (op_type, kind) == ("Div", "first"):
        with pytest.raises(ModelError, match="must be a dequantised"):
            compare(model, tmp_path)
        return
    (op,) = check(model, tmp_path).ops
    assert isinstance(op, Conv) and op.group == op.weights.size


def test_constants_in_a_row(tmp_path):
    """A batch normalisation in pieces, and a clamp."""
    rng = np.random.default_rng(0)
    model = Build(np.uint8)
    value = model.x("x", (1, 5, 9, 7))
    for op_type, low in (("Mul", 0.5), ("Add", -1.0), ("Mul", -1.5), ("Sub", 0.1), ("Relu", None)):
        more = [] if low is None else [(rng.uniform(low, low + 1, (5, 1, 1)).astype(np.float32),)]
        value = node(op_type, *more)(model, value)
    (op,) = check(model.end(value), tmp_path).ops
    assert op.op_type == "Mul+Add+Mul+Sub"


def test_channels_with_hardly_any_gain(tmp_path):
    """As of dead channels of a trained network: what is added to them remains."""
    model = Build(np.int8)
    gain = 10.0 ** -np.arange(14, dtype=np.float32).reshape(14, 1, 1)
    value = node("Mul", (gain,))(model, model.x("x", (1, 14, 9, 7)))
    shift = np.random.default_rng(0).uniform(-3, 3, (14, 1, 1)).astype(np.float32)
    check(model.end(node("Add", (shift,))(model, value)), tmp_path)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("behind", ["activation", "convolution", "rows"])
def test_batch_normalisation(behind, dtype, tmp_path):
    rng = np.random.default_rng(0)
    model = Build(dtype)
    x = model.x("x", (9, 6) if behind == "rows" else (1, 6, 9, 7))
    if behind == "convolution":
        w = model.dq(model.const("w", random_array(rng, np.int8, (6, 6, 3, 3))), 0.002, np.int8(0))
        x = model.node("Conv", [x, w], "c")
    ranges = ((-1.5, 1.5), (-0.2, 0.2), (-0.2, 0.2), (0.5, 1.5))
    given = [(rng.uniform(low, high, 6).astype(np.float32),) for low, high in ranges]
    model = model.end(node("Relu")(model, node("BatchNormalization", *given)(model, x)), 0.0493)
    (op,) = check(model, tmp_path).ops
    behind_one = behind == "convolution"
    assert op.op_type == ("Conv" if behind_one else "BatchNormalization") and op.low == -7


SHORTCUTS = {
    "input": lambda model, x: x,
    "other": lambda model, x: model.x("z", (2, 24, 9, 11), 0.0513, -20),
    "made": lambda model, x: model.again(node("Neg")(model, x), 0.0513, -20, "n"),
    "turned": lambda model, x: node("Transpose", perm=[0, 3, 1, 2])(
        model, model.x("z", (2, 9, 11, 24), 0.0513, -20)
    ),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", SHORTCUTS)
@pytest.mark.parametrize("kernel, group", [(1, 1), (3, 1), (3, 24)])
def test_shortcut(form, kernel, group, dtype, tmp_path):
    """A convolution without a scale and an activation: in whole units of its sums."""
    rng, model = np.random.default_rng(3), Build(dtype)
    x = model.x("x", (2, 24, 9, 11))
    w = model.const("w", random_array(rng, np.int8, (24, 24 // group, kernel, kernel)))
    w = model.dq(w, rng.uniform(0.0015, 0.003, 24), np.zeros(24, np.int8), axis=0)
    b = model.const("b", rng.normal(0, 1, 24).astype(np.float32))
    value = model.node("Conv", [x, w, b], "c", pads=[kernel // 2] * 4, group=group)
    names = [value, SHORTCUTS[form](model, x)]
    value = node("Relu")(model, model.node("Add", names[:: -1 if kernel == 1 else 1], "a"))
    graph, (result,) = compare(model.end(value, 0.0893, -100), tmp_path)
    op = next(op for op in graph.ops if isinstance(op, Conv))
    assert op.op_type == "Conv+Add" and op.shortcut and op.residual is None
    assert result.max_abs_diff <= 1 and result.equal >= 0.98 * result.elements, result


@pytest.mark.parametrize("scale, match", [(3.0, "it must be 1 to 8128"), (1e-6, "1 to 8128")])
def test_shortcut_out_of_reach(scale, match, tmp_path):
    model = Build(np.int8)
    w = model.const("w", random_array(np.random.default_rng(0), np.int8, (4, 4, 1, 1)))
    value = model.node("Conv", [model.x("x", (1, 4, 9, 7)), model.dq(w, 0.002, np.int8(0))], "c")
    value = model.node("Add", [value, model.x("z", (1, 4, 9, 7), scale)], "a")
    with pytest.raises(ModelError, match=match):
        compare(model.end(value, 3.0), tmp_path)


def test_shortcut_too_coarse(tmp_path):
    """Few units of the sums to a step: their remainder counts."""
    model = Build(np.int8)
    w = model.const("w", random_array(np.random.default_rng(0), np.int8, (4, 4, 1, 1)))
    value = model.node("Conv", [model.x("x", (1, 4, 9, 7)), model.dq(w, 1.0, np.int8(0))], "c")
    value = model.node("Add", [value, model.x("z", (1, 4, 9, 7), 0.0537)], "a")
    with pytest.raises(ModelError, match="int8 cannot represent an operand of Conv"):
        compare(model.end(value, 0.0613), tmp_path)


@pytest.mark.parametrize("op_type", ["Mul", "Div"])
@pytest.mark.parametrize("of", ["Conv", "Add", "Mul", "AveragePool", "MatMul"])
def test_result_times_a_number(of, op_type, tmp_path):
    """No scale in between: it is in the result's. Also behind a clamp."""
    model = Build(np.int8)
    x = model.x("x", (1, 6, 9, 9))
    w = random_array(np.random.default_rng(0), np.int8, (6, 6, 3, 3))
    w = model.dq(model.const("w", w), 0.001, np.int8(0))
    more = {"Conv": [w], "AveragePool": []}.get(of, [model.x("z", (1, 6, 9, 9), 0.021)])
    attributes = {"kernel_shape": [2, 2]} if of == "AveragePool" else {}
    value = node("Relu")(model, model.node(of, [x, *more], "v", **attributes))
    value = node(op_type, const(0.37))(model, value)
    (op,) = check(model.end(value, 0.0437), tmp_path).ops
    assert op.op_type == of and op.low == -7


@pytest.mark.parametrize("added", ["Add", "Sub"])
@pytest.mark.parametrize("op_type", ["Conv", "ConvTranspose"])
def test_constants_behind_a_convolution(op_type, added, tmp_path):
    rng = np.random.default_rng(0)
    model = Build(np.int8)
    w = model.dq(model.const("w", random_array(rng, np.int8, (6, 6, 3, 3))), 0.02, np.int8(0))
    value = model.node(op_type, [model.x("x", (1, 6, 9, 7)), w], "c")
    gain = np.array([1.5, -0.5, 0.25, 1, 0, -2], np.float32).reshape(6, 1, 1)
    value = node("Mul", (gain,))(model, value)
    value = node(added, (rng.normal(size=(6, 1, 1)).astype(np.float32),))(model, value)
    check(model.end(value, 0.3), tmp_path)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", CONSTANTS)
@pytest.mark.parametrize("signs", ["positive", "negative", "mixed"])
def test_prelu(form, signs, dtype, tmp_path):
    shape, own = CONSTANTS[form]
    model = Build(dtype)
    low, high = {"positive": (0, 1.5), "negative": (-1, 0), "mixed": (-1, 2)}[signs]
    slope = np.random.default_rng(1).uniform(low, high, own).astype(np.float32)
    slope.flat[1] = 0
    graph = check(model.end(node("PRelu", (slope,))(model, model.x("x", shape))), tmp_path)
    types = [Table, *([Pool] if signs == "mixed" else []), Conv, Binary]
    assert [type(op) for op in graph.ops] == types


def test_prelu_and_clamp(tmp_path):
    model = Build(np.uint8)
    slope = (np.linspace(-0.5, 1, 5, dtype=np.float32).reshape(5, 1, 1),)
    value = node("PRelu", slope)(model, model.x("x", (1, 5, 9, 7)))
    check(model.end(node("Clip", const(-0.3), const(1.7))(model, value)), tmp_path)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op_type", ["QLinearAdd", "QLinearMul"])
@pytest.mark.parametrize("constant", [None, "one", "channels"])
def test_fused_arithmetic(op_type, dtype, constant, tmp_path):
    rng = np.random.default_rng(0)
    model = Build(dtype)
    names = [model.input("a", dtype, (1, 5, 30, 40)), *model.pair("a", 0.053, model.zero(9))]
    values = {"one": model.zero(77), "channels": random_array(rng, dtype, (5, 1, 1))}.get(constant)
    b = model.const("b", values) if constant else model.input("b", dtype, (1, 5, 30, 40))
    names += [b, *model.pair("b", 0.041, model.zero(-3)), *model.pair("y", 0.113, model.zero(1))]
    y = model.node(op_type, names, "y", "com.microsoft")
    (op,) = check(model.done(y, dtype), tmp_path).ops
    assert isinstance(op, {None: Binary, "one": Table, "channels": Conv}[constant])


def test_gate_of_an_image(tmp_path):
    """Squeeze and excitation: the gate is computed, then broadcast."""
    rng = np.random.default_rng(1)
    model = Build(np.uint8)
    x = model.x("x", (2, 8, 7, 9))
    mean = model.again(model.node("GlobalAveragePool", [x], "m"), 0.011, 3, "mean")
    w = model.dq(model.const("w", random_array(rng, np.int8, (8, 8, 1, 1))), 0.02, np.int8(0))
    inner = model.again(model.node("Conv", [mean, w], "c"), 0.05, 0, "inner")
    gate = model.again(model.node("Sigmoid", [inner], "s"), 1 / 255, -128, "gate")
    graph = check(model.end(model.node("Mul", [gate, x], "p")), tmp_path)
    assert [op.op_type for op in graph.ops] == ["GlobalAveragePool", "Conv+Sigmoid", "Mul"]
    assert graph.ops[-1].inputs == ("x", "gate")


# Pools -------------------------------------------------------------------------------------------

POOLS = {
    "plain": ((2, 5, 9, 8), {"kernel_shape": [3, 2]}),
    "same": ((1, 5, 9, 8), {"kernel_shape": [3, 3], "pads": [1] * 4}),
    "strided": ((2, 20, 9, 8), {"kernel_shape": [3, 4], "pads": [1, 2, 0, 3], "strides": [2, 3]}),
    "large": ((1, 5, 12, 11), {"kernel_shape": [7, 9], "pads": [3, 4, 3, 4]}),
    "auto": ((1, 5, 10, 7), {"kernel_shape": [3, 4], "auto_pad": "SAME_LOWER", "strides": [2, 2]}),
    "ceil": ((1, 5, 10, 9), {"kernel_shape": [3, 3], "strides": [2, 4], "ceil_mode": 1}),
    "both": (
        (1, 5, 10, 9),
        {"kernel_shape": [3, 4], "strides": [2, 4], "ceil_mode": 1, "pads": [1, 0, 1, 1]},
    ),
    "signal": ((2, 5, 30), {"kernel_shape": [5], "pads": [2, 1], "strides": [3]}),
    "dilated": ((1, 5, 12, 9), {"kernel_shape": [3, 2], "dilations": [2, 3], "pads": [2, 1, 1, 0]}),
}


POOL_CASES = [
    (name, op_type, fused)
    for name, (_, attributes) in POOLS.items()
    for op_type in ("AveragePool", "AveragePool padded", "MaxPool")
    for fused in (False, True)
    if not (fused and op_type == "MaxPool")
    # onnxruntime makes an invalid operator of a dilated QDQ AveragePool.
    if op_type == "MaxPool" or "dilations" not in attributes
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "op_type", "fused"), POOL_CASES)
def test_pool(name, op_type, fused, dtype, tmp_path):
    shape, attributes = POOLS[name]
    if op_type.endswith("padded"):
        attributes = attributes | {"count_include_pad": 1}
    kind = op_type.split()[0]
    model = Build(dtype)
    if fused:
        names = [model.input("x", dtype, shape), *model.pair("x", 0.0371, model.zero(3))]
        names += model.pair("y", 0.0293, model.zero(-7))
        model = model.done(
            model.node("QLinearAveragePool", names, "y", "com.microsoft", **attributes), dtype
        )
    else:
        model = model.end(model.node(kind, [model.x("x", shape)], "p", **attributes))
    if op_type.endswith("padded") and name in ("ceil", "both"):
        with pytest.raises(ModelError, match="overhanging the padding"):
            compare(model, tmp_path)
        return
    graph = check(model, tmp_path)
    assert isinstance(graph.ops[0], Pool)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 5, 9, 8), (2, 5, 30)])
@pytest.mark.parametrize("op_type", ["GlobalMaxPool", "ReduceMax", "ReduceMax flat", "ReduceMean"])
def test_pool_of_the_image(op_type, shape, dtype, tmp_path):
    model = Build(dtype)
    kind, *flat = op_type.split()
    names = [model.x("x", shape)]
    if kind.startswith("Reduce"):
        names.append(model.const("axes", np.arange(2, len(shape))))
        value = model.node(kind, names, "p", keepdims=int(not flat))
    else:
        value = model.node(kind, names, "p")
    model = model.end(value, *((0.0371, 3) if kind.endswith("Max") else ()))
    assert isinstance(check(model, tmp_path).ops[0], Pool)


REDUCED = {
    (2, 5, 9, 8): [(1,), (2,), (-1,), (1, 2), (2, 3)],
    (2, 9, 30): [(1,), (2,)],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, axes", [(s, a) for s, each in REDUCED.items() for a in each])
@pytest.mark.parametrize("op_type", ["ReduceMean", "ReduceMax"])
@pytest.mark.parametrize("keep", [0, 1])
def test_reduction(shape, axes, op_type, keep, dtype, tmp_path):
    """Also channels last; the mean over the channels is a product."""
    model = Build(dtype)
    names = [model.x("x", shape), model.const("axes", np.array(axes))]
    value = model.node(op_type, names, "r", keepdims=keep)
    graph = check(model.end(value, *((0.0371, 3) if op_type == "ReduceMax" else ())), tmp_path)
    mean = op_type == "ReduceMean" and axes == (1,)
    assert isinstance(graph.ops[-1], Conv if mean else Pool)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op_type", ["GlobalAveragePool", "GlobalMaxPool"])
@pytest.mark.parametrize("shape", [(2, 5, 196), (1, 5, 112, 8)])
def test_pool_of_a_long_image(shape, op_type, dtype, tmp_path):
    model = Build(dtype)
    value = node(op_type)(model, model.x("x", shape))
    average = op_type == "GlobalAveragePool"
    model = model.end(value, *((0.0031, -7) if average else (0.0371, 3)))
    assert isinstance(check(model, tmp_path).ops[0], Pool)


def test_mean_of_a_sequence(tmp_path):
    """Rows and features as a product makes them: nothing is moved."""
    model = Build(np.int8)
    w = random_array(np.random.default_rng(0), np.int8, (24, 20))
    w = model.dq(model.const("w", w), 0.01, np.int8(0))
    x = model.again(model.node("MatMul", [model.x("x", (1, 9, 24)), w], "p"), 0.1013, 0, "q")
    graph = check(model.end(node("ReduceMean", ints(1), keepdims=0)(model, x)), tmp_path)
    assert [type(op) for op in graph.ops] == [Conv, Pool]


# Transposed convolution --------------------------------------------------------------------------


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


# Movement ----------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("perm", [[0, 1, 3, 2], [0, 2, 3, 1], [0, 3, 1, 2], [0, 3, 2, 1]])
@pytest.mark.parametrize("behind", ["end", "reshape", "pool"])
def test_transposed(perm, behind, dtype, tmp_path):
    """A computed tensor whose transpose is read in order."""
    model = Build(dtype)
    x = model.node("MaxPool", [model.x("x", (1, 6, 10, 9))], "m", kernel_shape=[2, 2])
    x = model.node("Transpose", [model.again(x, 0.0371, 3, "q")], "t", perm=perm)
    if behind == "reshape":
        x = node("Reshape", ints(1, 9, 6, 8))(model, x)
    if behind == "pool":
        x = node("MaxPool", kernel_shape=[2, 2])(model, x)
    types = {type(op) for op in check(model.end(x, 0.0371, 3), tmp_path, exact=True).ops}
    assert types == ({Pool} if behind == "end" else {Pool, Select})


CHANNELS_LAST = {
    "pad": [node("Pad", ints(0, 0, 0, 0, 0, 1, 1, 0))],
    "join": [],
    "slice": [node("Slice", ints(1), ints(9), ints(1))],
    "upsample": [node("Resize", None, const(1, 2, 2, 1), mode="nearest")],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CHANNELS_LAST)
def test_channels_last(name, dtype, tmp_path):
    """Between the transpositions that a converter puts around convolutions; nothing is moved
    otherwise."""
    rng, model = np.random.default_rng(0), Build(dtype)

    def conv(x, name, inputs, outputs):
        w = model.const(name, random_array(rng, np.int8, (outputs, inputs, 3, 3)))
        w = model.dq(w, 0.004, np.int8(0))
        x = node("Transpose", perm=[0, 3, 1, 2])(model, x)
        x = model.node("Conv", [x, w], f"{name}_c", pads=[1] * 4)
        return model.again(node("Transpose", perm=[0, 2, 3, 1])(model, x), 0.0713, 3, f"{name}_q")

    x = conv(model.x("x", (1, 10, 12, 3)), "a", 3, 20)
    for step in CHANNELS_LAST[name]:
        x = step(model, x)
    if name == "join":
        x = model.node("Concat", [x, conv(x, "b", 20, 4)], "j", axis=3)
    x = model.again(x, 0.0713, 3, "moved")
    x = conv(x, "d", 24 if name == "join" else 20, 8)
    model = model.done("d_q", dtype)
    count = 4 if name == "join" else 3
    ops = check(model, tmp_path, exact=True).ops
    assert [type(op) for op in ops].count(Select) == 1 and len(ops) == count


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


LINEAR = {
    "twice": ((2, 5, 7, 6), (1, 1, 2, 2), "half_pixel"),
    "four times": ((1, 5, 7, 6), (1, 1, 4, 4), "half_pixel"),
    "eight times": ((1, 5, 3, 6), (1, 1, 8, 8), "half_pixel"),
    "three and one": ((1, 5, 7, 6), (1, 1, 3, 1), "pytorch_half_pixel"),
    "asymmetric": ((1, 5, 7, 6), (1, 1, 2, 3), "asymmetric"),
    "corners": ((1, 5, 7, 6), [2, 5, 13, 11], "align_corners"),
    "corners, other": ((1, 5, 9, 6), [2, 5, 17, 16], "align_corners"),
    "by 3/2": ((1, 5, 8, 6), (1, 1, 1.5, 1.5), "half_pixel"),
    "half": ((1, 5, 8, 6), (1, 1, 0.5, 0.5), "half_pixel"),
    "third": ((1, 5, 9, 6), (1, 1, 1 / 3, 1 / 2), "asymmetric"),
    "to sizes": ((1, 5, 9, 6), [1, 5, 18, 9], "half_pixel_symmetric"),
    "to one": ((1, 5, 9, 6), [1, 5, 1, 1], "pytorch_half_pixel"),
    "of one": ((1, 5, 1, 1), [1, 5, 8, 8], "half_pixel"),
    "wide": ((1, 3, 4, 150), (1, 1, 2, 2), "half_pixel"),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("form", ["qdq", "integers"])
def test_linear_resize(name, form, dtype, tmp_path):
    shape, factors, mode = LINEAR[name]
    if isinstance(factors, list):
        operands = [None, None, ints(shape[0], *factors[1:])]
    else:
        operands = [None, const(*factors)]
    step = node("Resize", *operands, mode="linear", coordinate_transformation_mode=mode)
    model = Build(dtype)
    if form == "qdq":
        model = model.end(step(model, model.x("x", shape)))
        graph = check(model, tmp_path)
    else:
        x = model.q(model.node("Neg", [model.x("x", shape)], "n"), 0.0371, model.zero(3), "q")
        graph, (result,) = compare(model.done(step(model, x), dtype), tmp_path)
        # onnxruntime's integer kernel cuts off what we round.
        assert result.max_abs_diff <= 1
    assert isinstance(graph.ops[-1], Select)


def test_old_linear_resize(tmp_path):
    model = Build(np.uint8, opset=10)
    x = model.x("x", (1, 5, 7, 6))
    scales = model.const("s", np.float32([1, 1, 2, 3]))
    model = model.end(model.node("Resize", [x, scales], "r", mode="linear"))
    check(model, tmp_path)


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


# Quantised behind the operators that choose -------------------------------------------------------


def convolved(model, name="c"):
    """A convolution's result of (1, 8, 8, 8), float, clamped."""
    w = random_array(np.random.default_rng(0), np.int8, (8, 4, 3, 3))
    w = model.dq(model.const(f"{name}_w", w), 0.01, np.int8(0))
    value = model.node("Conv", [model.x(f"{name}_x", (1, 4, 10, 10)), w], name)
    return model.node("Relu", [value], f"{name}_relu")


CHOICES = {
    "pool": [node("MaxPool", kernel_shape=[2, 2], strides=[2, 2])],
    "pools": [node("MaxPool", kernel_shape=[3, 3], pads=[1] * 4), node("Pad", ints(*[1] * 8))],
    "resize": [node("Resize", None, const(1, 1, 2, 2), mode="nearest")],
    "order": [node("Reshape", ints(1, 2, 4, 64)), node("Transpose", perm=[0, 2, 1, 3]),
              node("Reshape", ints(1, 8, 8, 8))],
    "clip": [node("Slice", ints(2), ints(6), ints(1)), node("Clip", const(0.3), const(2.0))],
    "maximum": [node("GlobalMaxPool")],
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CHOICES)
def test_quantised_early(name, dtype, tmp_path):
    """QuantizeLinear stands behind what chooses among elements; in front of it is the same."""
    model = Build(dtype)
    value = convolved(model)
    for step in CHOICES[name]:
        value = step(model, value)
    graph = check(model.end(value, 0.0593, -20), tmp_path, exact=True)
    assert isinstance(graph.ops[0], Conv) and graph.tensors[graph.ops[0].output].zero == -20


@pytest.mark.parametrize("dtype", DTYPES)
def test_concat_quantised_early(dtype, tmp_path):
    model = Build(dtype)
    gate = model.node("Sigmoid", [model.x("z", (1, 3, 8, 8))], "gate")
    value = model.node("Concat", [convolved(model), gate, convolved(model, "d")], "cat", axis=1)
    value = node("MaxPool", kernel_shape=[2, 2])(model, value)
    graph = check(model.end(value, 0.0293, -20), tmp_path)
    assert [type(op) for op in graph.ops] == [Conv, Table, Conv, Select, Pool]


def test_float_input_quantised_early(tmp_path):
    model = Build(np.int8)
    x = node("MaxPool", kernel_shape=[2, 2])(model, model.input("x", np.float32, (1, 4, 8, 8)))
    onnx.save(model.end(x, 0.0293, -20), tmp_path / "model.onnx")
    graph = load(tmp_path / "model.onnx")
    array = np.random.default_rng(0).normal(size=(1, 4, 8, 8)).astype(np.float32)
    (port,) = graph.inputs
    ours = golden.quantise_input(port, graph.tensors[port.tensor], array)
    ours = golden.run(graph, {port.tensor: ours})
    theirs = oracle.run(tmp_path / "model.onnx", {"x": array})["y"]
    assert np.array_equal(ours[graph.outputs[0].tensor], theirs)


@pytest.mark.parametrize("behind", ["two scales", "a mean", "an output"])
def test_not_quantised_early(behind, tmp_path):
    """Not where the ways behind do not agree on a scale."""
    model = Build(np.int8)
    pooled = node("MaxPool", kernel_shape=[2, 2])(model, convolved(model))
    first = model.again(pooled, 0.0593, 3, "first")
    if behind == "an output":
        onnx_model = model.end(first)
        onnx_model.graph.output.append(onnx.helper.make_empty_tensor_value_info(pooled))
    else:
        second = model.node("Neg", [pooled], "n") if behind == "a mean" else pooled
        second = model.again(second, 0.0613, 3, "second")
        onnx_model = model.end(model.node("Add", [first, second], "a"))
    with pytest.raises(ModelError, match="is float32: a QuantizeLinear"):
        compare(onnx_model, tmp_path)


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantised_twice_alike(dtype, tmp_path):
    """A QuantizeLinear for every reader, as some exporters write: computed once."""
    model = Build(dtype)
    value = convolved(model)
    a, b = (model.again(value, 0.0593, -20, name) for name in "ab")
    b = model.again(node("GlobalMaxPool")(model, b), 0.0593, -20, "m")
    graph = check(model.end(model.node("Add", [a, b], "s"), 0.0671), tmp_path)
    assert [type(op) for op in graph.ops] == [Conv, Pool, Binary]


# Refusals ----------------------------------------------------------------------------------------

REFUSED = {
    "flip": (node("Slice", ints(-1), ints(-999), ints(3), ints(-1)), "no regular order"),
    "irregular": (
        node("Gather", ints(*np.random.default_rng(0).permutation(70)), axis=3),
        "no regular order",
    ),
    "pad with one": (node("Pad", ints(0, 0, 0, 0, 0, 0, 1, 1), const(1.0)), "no regular order"),
    "pad with many": (node("Pad", ints(0, 0, 0, 0, 0, 0, 1, 1), const(1.0, 2.0)), "one constant"),
    "cubic": (node("Resize", None, const(1, 1, 2, 2), mode="cubic"), "mode = 'cubic'"),
    "linear channels": (
        node("Resize", None, const(1, 2, 2, 2), mode="linear"),
        "mode only supports",
    ),
    "linear and smooth": (
        node("Resize", None, const(1, 1, 0.5, 0.5), mode="linear", antialias=1),
        "antialias = 1",
    ),
    "linear by much": (node("Resize", None, const(1, 1, 16, 16), mode="linear"), "256 phases"),
    "linear of a box": (
        node(
            "Resize",
            const(0, 0, 0, 0, 1, 1, 1, 1),
            const(1, 1, 2, 2),
            mode="linear",
            coordinate_transformation_mode="tf_crop_and_resize",
        ),
        "tf_crop_and_resize",
    ),
    "constants": (node("Pow", (np.arange(4, dtype=np.float32).reshape(4, 1, 1),)), "one value"),
    "impossible": (node("Slice", ints(0, 0), ints(1), ints(1)), "onnxruntime refuses it"),
    "rows": (
        node("Mul", (np.linspace(9, 100, 70, dtype=np.float32).reshape(70, 1),)),
        "int8 cannot represent",
    ),
    "mean of everything": (node("ReduceMean", ints(1, 2, 3)), "one or two of the last"),
    "mean of channels and columns": (node("ReduceMean", ints(1, 3)), "cannot both be reduced"),
    "mean of images": (node("ReduceMean", ints(0)), "one or two of the last"),
    "wider": (node("Add", (np.arange(8, dtype=np.float32).reshape(2, 4, 1, 1),)), "does not fit"),
    "not finite": (node("Add", (np.float32([[[0]], [[1]], [[2]], [[np.inf]]]),)), "not finite"),
    "divisor": (node("Div", (np.arange(4, dtype=np.float32).reshape(4, 1, 1),)), "has zeros"),
    "slope": (node("PRelu", (np.arange(70, dtype=np.float32).reshape(70, 1),)), "channels only"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, tmp_path):
    step, match = REFUSED[name]
    model = Build(np.int8)
    with pytest.raises(ModelError, match=match):
        compare(model.end(step(model, model.x("x", (1, 4, 70, 300)))), tmp_path)


# Graphs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_random_graph(seed, tmp_path):
    """Rounding that differs by one on the way may differ by more behind: most must agree."""
    model = random_graph_model(np.random.default_rng(seed))
    _, results = compare(model, tmp_path, seed)
    for result in results:
        assert result.max_abs_diff <= 2 and result.equal >= 0.99 * result.elements - 1, result


def test_random_graphs_have_all_operators(tmp_path):
    seen = set()
    for seed in range(20):
        path = tmp_path / "model.onnx"
        onnx.save(random_graph_model(np.random.default_rng(seed)), path)
        for op in load(path).ops:
            seen.add(type(op))
            seen.update({"residual"} if getattr(op, "residual", None) else ())
            seen.update({"activation"} if getattr(op, "activation", None) else ())
    assert seen >= {Conv, ConvTranspose, Binary, Table, Select, Pool, "residual", "activation"}
