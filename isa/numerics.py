"""The contract of arithmetic in numpy: what every engine's number path must produce, bit for bit.

Sources: IEEE 754 binary32; onnxruntime's QLinearConv/QLinearMatMul requantisation
(``saturate(rint(float32(acc) * scale) + zero_point)``).
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

MULTIPLIER_BITS = 24
MAX_SHIFT = 63


def split_scale(scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 scales (any shape, > 0) as ``(multiplier, shift)`` with
    ``scale == multiplier * 2**-shift`` exactly and 2^23 <= multiplier < 2^24.

    Scales under 2^-40 become multiplier 0: no int32 accumulator reaches 0.5 with them.
    Raises ``ValueError`` for scales that are not positive and finite, or >= 2^24.
    """
    scale = np.asarray(scale, np.float32)
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        raise ValueError("requantisation scale is not a positive finite number")
    significand, exponent = np.frexp(scale.astype(np.float64))
    multiplier = (significand * (1 << MULTIPLIER_BITS)).astype(np.int64)
    shift = MULTIPLIER_BITS - exponent.astype(np.int64)
    if (shift < 0).any():
        raise ValueError(f"requantisation scale {scale.max()} is 2^24 or more")
    tiny = shift > MAX_SHIFT
    return np.where(tiny, 0, multiplier), np.where(tiny, 0, shift)


def wrap_int32(x: np.ndarray) -> np.ndarray:
    """int64 values modulo 2^32 as int32."""
    return np.asarray(x, np.int64).astype(np.uint32).view(np.int32)


def requantise(
    acc: np.ndarray,
    bias: np.ndarray,
    multiplier: np.ndarray,
    shift: np.ndarray,
    *,
    zero: int,
    low: int,
    high: int,
) -> np.ndarray:
    """int32 accumulators (channels last) to int8 with per-channel parameters.

    The float32 operations below round exactly as the integer hardware does (see ``isa.params``):
    the scale is a float32 by construction, and neither it nor the product can be subnormal.
    """
    s = wrap_int32(np.asarray(acc, np.int64) + np.asarray(bias, np.int64))
    scale = np.ldexp(np.asarray(multiplier, np.float64), -np.asarray(shift)).astype(np.float32)
    product = s.astype(np.float32) * scale
    # Clamp before the conversion to integers: the product may exceed int32.
    rounded = np.rint(np.clip(product, -1024, 1024)).astype(np.int32)
    return np.clip(rounded + zero, low, high).astype(np.int8)


def shift_half_even(x: np.ndarray, shift: int) -> np.ndarray:
    """int64 ``x / 2**shift`` rounded to the nearest integer, ties to even."""
    x = np.asarray(x, np.int64)
    if shift == 0:
        return x
    floor = x >> shift
    rest = x - (floor << shift)
    half = np.int64(1) << (shift - 1)
    return floor + ((rest > half) | ((rest == half) & ((floor & 1) == 1)))


def split_ratios(*ratios: float) -> tuple[tuple[int, ...], int]:
    """Positive ratios as integers under 2^24 with one common right shift in 1..63, as precise as
    fits. Raises ``ValueError`` when the largest is 2^22 or more, or not positive and finite."""
    top = max(ratios)
    if not (np.isfinite(top) and min(ratios) > 0):
        raise ValueError("scale ratio is not a positive finite number")
    shift = min(MULTIPLIER_BITS - 1 - math.frexp(top)[1], MAX_SHIFT)
    if shift < 1:
        raise ValueError(f"scale ratio {top} is 2^22 or more")
    return tuple(round(r * 2.0**shift) for r in ratios), shift


def combine(
    kind: Literal["add", "sub", "mul"],
    a: np.ndarray,
    b: np.ndarray,
    *,
    za: int,
    zb: int,
    zo: int,
    ma: int,
    mb: int,
    shift: int,
    low: int,
    high: int,
) -> np.ndarray:
    """int8 a + b, a - b or a * b (broadcast) to int8, with scales as integer ratios under 2^24
    (POST's ADD, SUB, MUL; the last has one ratio, ``ma``)."""
    da, db = np.asarray(a, np.int64) - za, np.asarray(b, np.int64) - zb
    total = da * db * ma if kind == "mul" else da * ma + db * (mb if kind == "add" else -mb)
    return np.clip(shift_half_even(total, shift) + zo, low, high).astype(np.int8)


def lookup(x: np.ndarray, table: np.ndarray) -> np.ndarray:
    """``table[x + 128]`` for int8 ``x``; ``table`` has 256 entries (POST's table)."""
    return table[np.asarray(x, np.int16) + 128]
