"""Functions of float32 numbers: against exact ones, and the same on every processor."""

import hashlib
import math
from decimal import Decimal, localcontext

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper

from systole.sw.frontend.load import load
from systole.sw.frontend.passes.operators import elementary
from systole.sw.frontend.passes.operators.functions import elementwise
from systole.sw.frontend.passes.operators.registry import MICROSOFT, OPERATORS
from systole.sw.frontend.passes.values import Node
from systole.sw.golden import oracle
from systole.sw.ir.graph import Table
from tests.helpers.operator_models import Build, const, node

OPSETS = {"": 24, MICROSOFT: 1}
TINY = 2.0**-45


def exact(x: float, function) -> float:
    """``function`` of decimal numbers with more digits than any float needs."""
    with localcontext() as context:
        context.prec = 120
        return float(function(Decimal(x)))


def tanh(x: Decimal) -> Decimal:
    e = (2 * x).exp()
    return (e - 1) / (e + 1)


def softplus(x: Decimal) -> Decimal:
    return (1 + x.exp()).ln()


def erf(x: Decimal) -> Decimal:
    pi = Decimal("3.141592653589793238462643383279502884197169399375105820974944592307816406286209")
    term = total = x
    for n in range(1, 600):
        term *= -x * x / n
        total += term / (2 * n + 1)
    return 2 * total / pi.sqrt()


EXACT = {
    "exp": (elementary.exp, lambda x: x.exp()),
    "expm1": (elementary.expm1, lambda x: x.exp() - 1),
    "log": (lambda x: elementary.log(np.abs(x)), lambda x: abs(x).ln()),
    "log about 1": (
        lambda x: elementary.log(1 + np.rint(1000 * x) / 2**20),
        lambda x: (1 + (1000 * x).to_integral_value() / 2**20).ln(),
    ),
    "tanh": (elementary.tanh, tanh),
    "sigmoid": (elementary.sigmoid, lambda x: 1 / (1 + (-x).exp())),
    "softplus": (elementary.softplus, softplus),
    "erf": (elementary.erf, erf),
    "erfc": (elementary.erfc, lambda x: 1 - erf(x)),
    "gelu": (elementary.gelu, lambda x: x * (1 + erf(x / Decimal(2).sqrt())) / 2),
    "power": (
        lambda x: elementary.power(np.abs(x), np.full_like(x, 2.75)),
        lambda x: (abs(x).ln() * Decimal("2.75")).exp(),
    ),
}


@pytest.mark.parametrize("name", EXACT)
def test_exact(name):
    rng = np.random.default_rng(0)
    own, true = EXACT[name]
    x = np.concatenate([rng.normal(0, s, 12) for s in (1e-6, 0.1, 1, 4)]).astype(np.float32)
    for number, result in zip(x, own(x.astype(np.float64)), strict=True):
        wanted = exact(float(number), true)
        assert abs(result - wanted) <= TINY * abs(wanted), (number, result, wanted)


ENDS = {
    "Exp": {-math.inf: 0, math.inf: math.inf, 1000: math.inf, -1000: 0, 0: 1},
    "Log": {0: -math.inf, 1: 0, -1: math.nan, math.inf: math.inf},
    "Tanh": {-math.inf: -1, math.inf: 1, 20: 1, 0: 0},
    "Sigmoid": {-math.inf: 0, math.inf: 1, 200: 1, 0: 0.5},
    "Softplus": {-math.inf: 0, math.inf: math.inf, 1000: 1000},
    "Erf": {-math.inf: -1, math.inf: 1, 0: 0, 5: 1},
    "Gelu": {math.inf: math.inf, 100: 100, 0: 0},
    "Mish": {50: 50, 100: 100, 0: 0},
    "Reciprocal": {0: math.inf, -math.inf: 0},
    "Round": {0.5: 0, 1.5: 2, -0.5: 0},
    "Sign": {-3: -1, 0: 0, 7: 1},
}


def computed(op_type, x, *others, domain="", **attributes):
    names = ["x", *(f"c{i}" for i in range(len(others)))]
    proto = helper.make_node(op_type, names, ["y"], domain=domain, **attributes)
    arrays = [np.asarray(a, np.float32) for a in (x, *others)]
    return elementary.compute(Node(ir.serde.deserialize_node(proto)), arrays, OPSETS)


@pytest.mark.parametrize("op_type", ENDS)
def test_ends(op_type):
    wanted = ENDS[op_type] | {math.nan: math.nan}
    result = computed(op_type, list(wanted))
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, np.array([*wanted.values()], np.float32))


def test_powers():
    cases = {(-2, 3): -8, (-2, 2): 4, (-2, 0.5): math.nan, (0, 0): 1, (0, -1): math.inf}
    cases |= {(4, 0.5): 2, (10, -2): 0.01, (2, 10): 1024, (-3, -1): -1 / 3, (-2, 5): -32}
    x, exponents = zip(*cases, strict=True)
    result = computed("Pow", x, exponents)
    np.testing.assert_array_equal(result, np.array([*cases.values()], np.float32))


def test_others_are_onnxruntimes():
    """What is not known here, and what is of another type."""
    assert computed("Atan", [1.0]) == pytest.approx(math.pi / 4)
    proto = ir.serde.deserialize_node(helper.make_node("Abs", ["x"], ["y"]))
    result = elementary.compute(Node(proto), [np.array([-3], np.int32)], OPSETS)
    assert result.dtype == np.int32 and result == 3


STEPS = {
    **{name: [node(name)] for name in ("Abs", "Ceil", "Celu", "Elu", "Erf", "Exp", "Floor")},
    **{name: [node(name)] for name in ("Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish")},
    **{name: [node(name)] for name in ("Neg", "Reciprocal", "Round", "Selu", "Sigmoid", "Sign")},
    **{name: [node(name)] for name in ("Softplus", "Softsign", "Swish", "Tanh")},
    "ThresholdedRelu": [node("ThresholdedRelu", alpha=0.3)],
    "Log": [node("Abs"), node("Log")],
    "Sqrt": [node("Abs"), node("Sqrt")],
    "Gelu by tanh": [node("Gelu", approximate="tanh")],
    "Gelu of Microsoft's": [node("Gelu", domain=MICROSOFT)],
    "FastGelu": [node("FastGelu", domain=MICROSOFT)],
    "QuickGelu": [node("QuickGelu", domain=MICROSOFT)],
    "Celu 0.7": [node("Celu", alpha=0.7)],
    "Elu 1.7": [node("Elu", alpha=1.7)],
    "Pow 1.7": [node("Abs"), node("Pow", const(1.7))],
    "Pow 3": [node("Pow", const(3.0))],
    "chain": [node("Mul", const(0.7)), node("Add", const(0.1)), node("Tanh"), node("Exp")],
}
SCALES = ((0.0371, 0.0293), (0.1, 1 / 127), (1 / 16, 1 / 255), (0.5, 0.004))


def tables(name):
    """Models of one function, and their tables, at several scales."""
    for scale, own in SCALES:
        model = Build(np.int8, opset=24)
        value = model.x("x", (1, 1, 1, 256), scale)
        for step in STEPS[name]:
            value = step(model, value)
        yield model.end(value, own)


def loaded(proto, tmp_path):
    onnx.save(proto, tmp_path / "model.onnx")
    (op,) = load(tmp_path / "model.onnx").ops
    assert isinstance(op, Table)
    return op.values


DIGEST = "3c74078a635ea90d88868978f89f45529ef855e517174e8fec2c3e608666b08d"


def test_the_same_on_every_processor(tmp_path):
    """The tables of all functions, to the bit: those of the processor that this was written on."""
    digest = hashlib.sha256()
    for name in STEPS:
        for proto in tables(name):
            digest.update(loaded(proto, tmp_path).tobytes())
    assert digest.hexdigest() == DIGEST


def test_no_library_takes_part(tmp_path, monkeypatch):
    """Functions that libraries choose by the processor."""

    def refuse(*_, **__):
        raise AssertionError("depends on the processor")

    for name in (
        "exp",
        "exp2",
        "expm1",
        "log",
        "log1p",
        "power",
        "tanh",
        "float_power",
        "logaddexp",
    ):
        monkeypatch.setattr(np, name, refuse)
    monkeypatch.setattr(elementary, "evaluate", refuse)
    for name in STEPS:
        for proto in tables(name):
            loaded(proto, tmp_path)


@pytest.mark.parametrize("name", STEPS)
def test_as_onnxruntime(name, tmp_path):
    for proto in tables(name):
        values = loaded(proto, tmp_path)
        codes = np.arange(-128, 128).astype(np.int8).reshape(1, 1, 1, 256)
        theirs = oracle.run(proto, {"x": codes}, optimise=False)["y"].reshape(-1)
        off = np.abs(theirs.astype(int) - values)
        assert off.max() <= 1 and (off > 0).sum() <= 2


def test_all_functions_are_known():
    names = {key for key, handler in OPERATORS.items() if handler is elementwise}
    assert names <= elementary.FUNCTIONS.keys()
