"""The contract of WINDOW's row operations in numpy: Softmax and normalisation, bit for bit.

A row is all channels of one position. SOFTMAX and NORMALISE reduce it to a few numbers, then make
every element with them. Both are exact in integers but for the roundings that stand here, so that
the result differs from that of the float operator between DequantizeLinear and QuantizeLinear in
one element of 100,000 or so, by one.

Sources: the definitions of Softmax, LayerNormalization and RMSNormalization in ONNX.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from systole.isa.numerics import MULTIPLIER_BITS, requantise, split_scale

EXP_BITS = 24
"""Of an entry of SOFTMAX's table."""
SUM_BITS = EXP_BITS + 12
"""Hold the sum of a row's exponentials; the divider's operands are aligned to them."""
QUOTIENT_BITS = 37
"""The divider's numerator is shifted left by so many bits."""

EPSILON_BITS = 12
"""Fraction bits of NORMALISE's variance, which hold a small epsilon."""
VARIANCE_BITS = 56
"""Hold the scaled variance of any row. Even."""
ROOT_BITS = 25
"""Of the square root."""
FACTOR_BITS = 28
"""Fraction bits of a row's factor and offset."""
MAX_FACTOR = 1 << 35
"""Only a row that is constant has a factor from here on: it counts as 0."""
NORMAL_BITS = 20
"""Fraction bits of what NORMALISE gives to the requantiser."""
COARSE_BITS = 12
"""So many fewer, for channels whose bias would not fit otherwise."""
NORMAL_WIDTH = 28
"""Normal numbers are held in so many bits, modulo 2^28: no element of a row has one of 2^27."""
MAX_BIAS = 1 << 30
"""Of a channel of NORMALISE."""


def reciprocal(numerator: np.ndarray | int, divisor: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``numerator / divisor`` as an integer of 24 significant bits (rounded half up) and a right
    shift: the numerator at most 2^24, the divisor 1 to 2^36 - 1."""
    divisor = np.asarray(divisor, np.int64)
    length = bit_length(divisor)
    quotient = (np.asarray(numerator, np.int64) << QUOTIENT_BITS) // (
        divisor << (SUM_BITS - length)
    )
    excess = bit_length(quotient) - MULTIPLIER_BITS
    rounded = (quotient + (1 << (excess - 1))) >> excess
    carry = rounded >> MULTIPLIER_BITS
    shift = QUOTIENT_BITS - SUM_BITS + length - excess - carry
    return rounded >> carry, shift


def bit_length(x: np.ndarray) -> np.ndarray:
    """Bits of positive int64 numbers below 2^62; 0 has 1."""
    # float64 rounds numbers of more than 53 bits up, to the next power of two at most.
    length = np.frexp(np.maximum(x, 1).astype(np.float64))[1].astype(np.int64)
    return length - ((np.maximum(x, 1) >> (length - 1)) == 0)


def exponentials(scale: float) -> np.ndarray:
    """SOFTMAX's table for elements of ``scale``: int64 (256,), by how far an element is below the
    row's largest."""
    powers = np.array([math.exp(-float(scale) * d) for d in range(256)])
    return np.rint(powers * ((1 << EXP_BITS) - 1)).astype(np.int64)


@dataclass(frozen=True)
class SoftmaxParameters:
    """SOFTMAX's parameters."""

    table: np.ndarray
    """int (256,): :func:`exponentials`."""
    numerator: int
    """The reciprocal of the result's scale is ``numerator * 2**-shift``; below 2^24."""
    shift: int
    """Within -128..127."""

    @classmethod
    def of_scales(cls, x: float, y: float) -> SoftmaxParameters:
        """For elements of scale ``x`` and results of scale ``y``."""
        significand, exponent = math.frexp(1 / float(y))
        numerator = round(significand * (1 << MULTIPLIER_BITS))
        # A significand that is rounded up to 1.
        carry = numerator >> MULTIPLIER_BITS
        return cls(exponentials(x), numerator >> carry, MULTIPLIER_BITS - exponent - carry)


def softmax(
    x: np.ndarray, p: SoftmaxParameters, valid: np.ndarray, *, zero: int, low: int, high: int
) -> np.ndarray:
    """SOFTMAX of int8 rows (..., features). ``valid`` (as ``x``, or broadcast): elements that
    count; the others, and all of a row without any, give ``zero``.

    1. The largest valid element of the row.
    2. The sum of the table's entries at ``largest - x``, of the valid elements.
    3. The row's multiplier and shift: ``numerator / sum``, of 24 bits.
    4. Each entry again, requantised with these."""
    x = np.asarray(x, np.int64)
    valid = np.broadcast_to(valid, x.shape)
    largest = np.where(valid, x, -128).max(axis=-1, keepdims=True)
    entries = np.where(valid, p.table[np.where(valid, largest - x, 0)], 0)
    total = entries.sum(axis=-1, keepdims=True)
    multiplier, shift = reciprocal(p.numerator, np.maximum(total, 1))
    out = requantise(
        entries, np.zeros((), np.int64), multiplier, shift + p.shift, zero=zero, low=low, high=high
    )
    return out


@dataclass(frozen=True)
class NormaliseParameters:
    """NORMALISE's parameters."""

    features: int
    """Elements of a row."""
    epsilon: int
    """What is added to the scaled variance, of EPSILON_BITS fraction bits."""
    centred: bool
    """The mean is taken off (LayerNormalization; else RMSNormalization)."""
    bias: np.ndarray
    """int64 (features,), and so all below: the requantisation's parameters."""
    multiplier: np.ndarray
    shift: np.ndarray
    negate: np.ndarray
    """bool: the channel's factor is negative."""
    coarse: np.ndarray
    """bool: its normal numbers have COARSE_BITS fraction bits less."""

    @classmethod
    def of_scales(
        cls,
        gain: np.ndarray,
        shift: np.ndarray,
        *,
        x: float,
        y: float,
        epsilon: float,
        centred: bool,
    ) -> NormaliseParameters:
        """For elements of scale ``x`` and results of scale ``y``; ``gain`` and ``shift`` by
        channel. Raises ``ValueError`` where epsilon is beyond what the variance is held in."""
        features = len(gain)
        scaled = round(epsilon * (features / float(x)) ** 2 * (1 << EPSILON_BITS))
        if scaled >> (VARIANCE_BITS - 1):
            most = 2.0 ** (VARIANCE_BITS - 1 - EPSILON_BITS) * (float(x) / features) ** 2
            raise ValueError(f"epsilon = {epsilon:g}: at most {most:g} at this scale")
        channels = [_channel(float(g) / float(y), float(s) / float(y)) for g, s in zip(gain, shift)]
        bias, multiplier, right, negate, coarse = (np.array(each) for each in zip(*channels))
        return cls(
            features=features,
            epsilon=scaled,
            centred=centred,
            bias=bias,
            multiplier=multiplier,
            shift=right,
            negate=negate,
            coarse=coarse,
        )


def _channel(gain: float, shift: float) -> tuple[int, int, int, bool, bool]:
    """Bias, multiplier, shift, negate and coarse of a channel that becomes ``normal * gain +
    shift`` steps of the result."""
    for bits in (NORMAL_BITS, NORMAL_BITS - COARSE_BITS):
        scale = np.float32(abs(gain) * 2.0**-bits)
        coarse = bits < NORMAL_BITS
        if scale > 0 and abs(shift) < float(scale) * MAX_BIAS:
            multiplier, right = split_scale(np.asarray(scale))
            return round(shift / float(scale)), int(multiplier), int(right), gain < 0, coarse
    # What varies is far below one step.
    scale = np.float32(abs(shift) / MAX_BIAS)
    if scale == 0:
        return 0, 0, 0, False, True
    multiplier, right = split_scale(np.asarray(scale))
    return int(math.copysign(MAX_BIAS, shift)), int(multiplier), int(right), gain < 0, True


def statistics(x: np.ndarray, p: NormaliseParameters) -> tuple[np.ndarray, np.ndarray]:
    """Factor and offset of int8 rows less their zero point (..., features): an element's normal
    number is ``x * factor - offset``, of FACTOR_BITS fraction bits.

    1. ``sum`` of x (0 unless ``centred``) and ``squares``, the sum of x * x.
    2. ``v = (features * squares - sum * sum) * 2**EPSILON_BITS + epsilon``.
    3. Its square root, of ROOT_BITS bits: ``v`` is aligned to VARIANCE_BITS by an even shift.
    4. Its reciprocal, of as many, times ``features`` and times ``sum``: factor and offset, rounded
       half up to FACTOR_BITS fraction bits. Both are 0 where the factor is not below MAX_FACTOR or
       ``v`` is 0: all elements are the same."""
    x = np.asarray(x, np.int64)
    total = x.sum(axis=-1) if p.centred else np.zeros(x.shape[:-1], np.int64)
    squares = (x * x).sum(axis=-1)
    v = ((p.features * squares - total * total) << EPSILON_BITS) + p.epsilon
    length = bit_length(v)
    even = length + (length & 1)
    root = _root((v << (VARIANCE_BITS - even)) >> (VARIANCE_BITS - 2 * ROOT_BITS))
    inverse = ((np.int64(1) << (2 * ROOT_BITS)) // np.maximum(root, 1) + 1) >> 1
    shift = even // 2 + ROOT_BITS - 1 - EPSILON_BITS // 2 - FACTOR_BITS
    factor, offset = (_shifted(each * inverse, shift) for each in (p.features, total))
    varied = (v > 0) & (factor < MAX_FACTOR)
    return np.where(varied, factor, 0), np.where(varied, offset, 0)


def normalise(
    x: np.ndarray, p: NormaliseParameters, *, x_zero: int, zero: int, low: int, high: int
) -> np.ndarray:
    """NORMALISE of int8 rows (..., features), whose zero point is ``x_zero``: :func:`statistics`,
    then every channel's normal number, with its sign and precision, requantised."""
    x = np.asarray(x, np.int64) - x_zero
    factor, offset = (each[..., None] for each in statistics(x, p))
    normal = _shifted(x * factor - offset, FACTOR_BITS - NORMAL_BITS)
    normal = np.where(p.negate, -normal, normal)
    normal = normal + np.where(p.coarse, 1 << (COARSE_BITS - 1), 0)
    normal = _wrapped(normal, NORMAL_WIDTH) >> np.where(p.coarse, COARSE_BITS, 0)
    return requantise(normal, p.bias, p.multiplier, p.shift, zero=zero, low=low, high=high)


def _shifted(x: np.ndarray, shift: np.ndarray | int) -> np.ndarray:
    """int64 ``x * 2**-shift``, rounded half up."""
    right, left = np.maximum(shift, 0), np.maximum(-np.asarray(shift), 0)
    return ((x << left) + ((np.int64(1) << right) >> 1)) >> right


def _wrapped(x: np.ndarray, bits: int) -> np.ndarray:
    """int64 numbers modulo ``2**bits``, as signed ones."""
    half = np.int64(1) << (bits - 1)
    return ((x + half) & ((half << 1) - 1)) - half


def _root(x: np.ndarray) -> np.ndarray:
    """The integer square root of int64 numbers below 2^52."""
    root = np.sqrt(x.astype(np.float64)).astype(np.int64)
    root -= root * root > x
    return root + ((root + 1) * (root + 1) <= x)
