"""Elementwise functions of float32 numbers, the same to the bit on every processor.

Libraries choose their exponentials by the instructions that a processor has, and these differ in
the last digit. Here all is made of float64's additions, products, quotients, square roots and
roundings, which IEEE 754 defines to the bit, and rounded to float32 once: within 2^-45 of the exact
result before that, so it is the nearest float32 but for about one result in a million."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import reduce

import numpy as np

from systole.sw.frontend.passes.evaluate import evaluate
from systole.sw.frontend.passes.operators.registry import MICROSOFT
from systole.sw.frontend.passes.values import Node

LN2 = 0.6931471805599453
LN2_HIGH = float.fromhex("0x1.62e42fee00000p-1")
"""The first 32 bits of ln 2: multiples by an exponent are exact."""
LN2_LOW = float.fromhex("0x1.a39ef35793c76p-33")
EXP_TERMS = 15
"""Of the series of exp, to |x| = ln 2 / 2."""
ATANH_TERMS = 18
"""Of the series of atanh, to |x| = 1/3."""
ERF_TERMS, ERFC_TERMS, ERF_REACH = 60, 80, 2.5
"""Terms of the series of erf, to |x| = ERF_REACH, and of the continued fraction of erfc from
there."""
LARGEST = 800.0
"""float64 has no exponential of it, nor of its negative."""

Array = np.ndarray
"""float64, unless it is said otherwise."""


def _series(x: Array, coefficients: Sequence[float]) -> Array:
    """The sum of ``coefficients[n] * x**n``."""
    return reduce(lambda total, c: total * x + c, coefficients[::-1], np.zeros_like(x))


_EXPONENTIAL = [1 / math.factorial(n) for n in range(EXP_TERMS)]
_SHIFTED = [1 / math.factorial(n + 1) for n in range(EXP_TERMS)]
"""Of expm1(x) / x."""
_ATANH = [1 / (2 * n + 1) for n in range(ATANH_TERMS)]
"""Of atanh(x) / x, in powers of its square."""


def exp(x: Array) -> Array:
    number = np.clip(np.nan_to_num(x), -LARGEST, LARGEST)
    twos = np.rint(number / LN2)
    rest = (number - twos * LN2_HIGH) - twos * LN2_LOW
    result = np.ldexp(_series(rest, _EXPONENTIAL), twos.astype(np.int32))
    return np.where(np.isnan(x), x, result)


def expm1(x: Array) -> Array:
    small = np.clip(np.nan_to_num(x), -LN2 / 2, LN2 / 2)
    return np.where(np.abs(x) < LN2 / 2, small * _series(small, _SHIFTED), exp(x) - 1)


def _log1p(x: Array) -> Array:
    """ln(1 + x) of -1/2 <= x <= 1."""
    ratio = x / (2 + x)
    return 2 * ratio * _series(ratio * ratio, _ATANH)


def log(x: Array) -> Array:
    known = (x > 0) & (x < np.inf)
    fraction, twos = np.frexp(np.where(known, x, 1.0))  # fractions are 1/2 to 1
    small = fraction < math.sqrt(0.5)
    fraction, twos = np.where(small, 2 * fraction, fraction), twos - small
    result = (_log1p(fraction - 1) + twos * LN2_LOW) + twos * LN2_HIGH
    special = np.where(x == 0, -np.inf, np.where(x > 0, x, np.nan))
    return np.where(known, result, special)


def tanh(x: Array) -> Array:
    behind = expm1(-2 * np.abs(x))
    return np.copysign(-behind / (2 + behind), x)


def sigmoid(x: Array) -> Array:
    return 1 / (1 + exp(-x))


def softplus(x: Array) -> Array:
    return np.maximum(x, 0) + _log1p(exp(-np.abs(x)))


def erf(x: Array) -> Array:
    small = np.clip(np.nan_to_num(x), -ERF_REACH, ERF_REACH)
    term = total = small
    for n in range(1, ERF_TERMS):
        term = term * (2 * small * small) / (2 * n + 1)
        total = total + term
    inside = 2 / math.sqrt(math.pi) * exp(-small * small) * total
    return np.where(np.abs(x) < ERF_REACH, inside, np.copysign(1 - _far_erfc(np.abs(x)), x))


def erfc(x: Array) -> Array:
    far = _far_erfc(np.abs(x))
    return np.where(np.abs(x) < ERF_REACH, 1 - erf(x), np.where(x < 0, 2 - far, far))


def _far_erfc(x: Array) -> Array:
    """erfc of x >= ``ERF_REACH``."""
    number = np.clip(x, ERF_REACH, 1e150)  # its square is a float64
    total = number
    for n in range(ERFC_TERMS, 0, -1):
        total = number + n / 2 / total
    result = exp(-number * number) / (math.sqrt(math.pi) * total)
    return np.where(np.isnan(x), x, result)


def gelu(x: Array) -> Array:
    return x * erfc(-x / math.sqrt(2)) / 2


def gelu_by_tanh(x: Array) -> Array:
    # (1 + tanh z) / 2 is sigmoid(2 z).
    return x * sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))


def power(x: Array, exponent: Array) -> Array:
    size = exp(exponent * log(np.abs(x)))
    odd = np.fmod(exponent, 2) != 0
    whole = exponent == np.rint(exponent)
    result = np.where(x < 0, np.where(whole, np.where(odd, -size, size), np.nan), size)
    for known, exact in ((0.5, np.sqrt(x)), (2, x * x), (3, x * x * x), (-1, 1 / x)):
        result = np.where(exponent == known, exact, result)
    return np.where((exponent == 0) | (x == 1), 1.0, result)


def _rounded(x: Array) -> Array:
    """What a value within a function is that ONNX defines by several operators."""
    return x.astype(np.float32).astype(np.float64)


def _number(node: Node, name: str, default: float) -> float:
    """A float attribute, which is float32."""
    return float(np.float32(node.real(name, default)))


def _elu(node: Node, x: Array) -> Array:
    return np.where(x > 0, x, _number(node, "alpha", 1) * expm1(x))


def _celu(node: Node, x: Array) -> Array:
    alpha = _number(node, "alpha", 1)
    return np.maximum(x, 0) + np.minimum(0, alpha * expm1(x / alpha))


def _selu(node: Node, x: Array) -> Array:
    alpha = _number(node, "alpha", 1.67326319217681884765625)
    gamma = _number(node, "gamma", 1.05070102214813232421875)
    return gamma * np.where(x > 0, x, alpha * expm1(x))


def _gelu(node: Node, x: Array) -> Array:
    return gelu_by_tanh(x) if node.string("approximate", "none") == "tanh" else gelu(x)


def _hard_sigmoid(node: Node, x: Array) -> Array:
    return _on_line(x, _number(node, "alpha", 0.2), _number(node, "beta", 0.5))


def _on_line(x: Array, slope: float, offset: float) -> Array:
    return np.clip(_rounded(slope * x) + offset, 0, 1)


def _hard_swish(node: Node, x: Array) -> Array:
    return x * _rounded(_on_line(x, float(np.float32(1 / 6)), 0.5))


def _mish(node: Node, x: Array) -> Array:
    return x * _rounded(tanh(_rounded(softplus(x))))


def _leaky_relu(node: Node, x: Array) -> Array:
    return np.where(x < 0, _number(node, "alpha", 0.01) * x, x)


def _thresholded_relu(node: Node, x: Array) -> Array:
    return np.where(x > _number(node, "alpha", 1), x, 0)


def _swish(node: Node, x: Array, alpha: float = 1) -> Array:
    return x * _rounded(sigmoid(_rounded(_number(node, "alpha", alpha) * x)))


def _quick_gelu(node: Node, x: Array) -> Array:
    return _swish(node, x, 1.702)


def _fast_gelu(node: Node, x: Array, bias: Array | None = None) -> Array:
    return gelu_by_tanh(x if bias is None else x + bias)


def _clip(node: Node, x: Array, low: Array | None = None, high: Array | None = None) -> Array:
    low = np.asarray(_number(node, "min", -math.inf)) if low is None else low
    high = np.asarray(_number(node, "max", math.inf)) if high is None else high
    return np.minimum(np.maximum(x, low), high)


def _plain(function: Callable[..., Array]) -> Callable[..., Array]:
    """A function of arrays as one of a node, too, which has no attributes."""
    return lambda node, *arrays: function(*arrays)


_OF_ARRAYS: dict[str, Callable[..., Array]] = {
    **{"Abs": np.abs, "Neg": np.negative, "Sign": np.sign, "Sqrt": np.sqrt},
    **{"Ceil": np.ceil, "Floor": np.floor, "Round": np.rint},
    **{"Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": np.divide},
    **{"Exp": exp, "Log": log, "Pow": power, "Erf": erf, "Tanh": tanh},
    **{"Sigmoid": sigmoid, "Softplus": softplus},
    "Max": lambda *arrays: reduce(np.maximum, arrays),
    "Min": lambda *arrays: reduce(np.minimum, arrays),
    "PRelu": lambda x, slope: np.where(x < 0, slope * x, x),
    "Reciprocal": lambda x: 1 / x,
    "Relu": lambda x: np.maximum(x, 0),
    "Softsign": lambda x: x / _rounded(1 + np.abs(x)),
}
FUNCTIONS: Mapping[tuple[str, str], Callable[..., Array]] = {
    **{("", name): _plain(function) for name, function in _OF_ARRAYS.items()},
    ("", "Celu"): _celu,
    ("", "Clip"): _clip,
    ("", "Elu"): _elu,
    ("", "Gelu"): _gelu,
    ("", "HardSigmoid"): _hard_sigmoid,
    ("", "HardSwish"): _hard_swish,
    ("", "LeakyRelu"): _leaky_relu,
    ("", "Mish"): _mish,
    ("", "Selu"): _selu,
    ("", "Swish"): _swish,
    ("", "ThresholdedRelu"): _thresholded_relu,
    (MICROSOFT, "FastGelu"): _fast_gelu,
    (MICROSOFT, "Gelu"): _plain(gelu),
    (MICROSOFT, "QuickGelu"): _quick_gelu,
}
"""By domain and type: the function of a node and its operands, None where one is left out."""


def compute(
    node: Node,
    arrays: Sequence[np.ndarray | None],
    opsets: Mapping[str, int],
    **changes: str,
) -> np.ndarray:
    """The result of ``node`` for its operands (None: left out); ``changes`` replace its ``op_type``
    and ``domain``. onnxruntime computes what is not among :data:`FUNCTIONS`, or not of float32.
    Raises :class:`sw.ir.graph.ModelError` if that refuses it."""
    key = (changes.get("domain", node.raw.domain), changes.get("op_type", node.op_type))
    function = FUNCTIONS.get(key)
    real = all(a is None or a.dtype == np.float32 for a in arrays[:1])
    if function is None or not real:
        return evaluate(node, arrays, opsets, **changes)[0]
    given = [None if a is None else a.astype(np.float64) for a in arrays]
    with np.errstate(all="ignore"):  # infinities and what is no number are results like others
        return function(node, *given).astype(np.float32)
