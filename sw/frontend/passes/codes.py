"""Constants as int8 codes with a scale and a zero point: what an activation is."""

from __future__ import annotations

import numpy as np

from systole.sw.frontend.passes.values import Node, Quant, QuantConst

EXACT = 1e-4
"""Units that a real number may be off its code and count as exact."""
FINE = 127
"""What the coarse codes of :func:`fine` count for, in units of the others."""


def of_quantised(node: Node, value: QuantConst) -> tuple[np.ndarray, Quant]:
    """A quantised constant. Raises :class:`~sw.ir.graph.ModelError` if it is not of an activation's
    form."""
    if value.array.dtype not in (np.int8, np.uint8):
        raise node.fail(f"a constant of type {value.array.dtype} as an operand; int8 or uint8")
    if value.scale.size > 1 or value.zero.size > 1:
        raise node.fail(
            f"a constant with {max(value.scale.size, value.zero.size)} scales as an operand: it "
            "must be quantised per tensor"
        )
    unsigned = value.array.dtype == np.uint8
    shift = 128 if unsigned else 0
    codes = (value.array.astype(np.int16) - shift).astype(np.int8)
    scale = np.float32(value.scale.reshape(()))
    return codes, Quant(scale, int(value.zero.reshape(())) - shift, unsigned)


def of_real(array: np.ndarray) -> tuple[np.ndarray, Quant, float]:
    """The int8 codes nearest to finite numbers, by a scale that gives them exactly where there is
    one, and by how much the worst is off."""
    levels = np.unique(np.append(array, 0.0))
    reach = max(levels[-1] - levels[0], np.finfo(np.float32).tiny * 255)
    scale = reach / 255
    steps = np.diff(levels)
    if len(steps):
        step = steps.min()
        whole = levels / step
        if reach / step <= 255 and np.abs(whole - np.rint(whole)).max() <= EXACT:
            scale = step
    scale = np.float32(scale)
    zero = int(np.clip(np.rint(-128 - levels[0] / scale), -128, 127))
    codes = np.clip(np.rint(array / scale) + zero, -128, 127)
    off = np.abs((codes - zero) * np.float64(scale) - array).max()
    return codes.astype(np.int8), Quant(scale, zero, False), float(off)


def fine(array: np.ndarray, unit: float) -> tuple[np.ndarray, np.ndarray]:
    """Finite numbers of at most 127 * FINE units as coarse and fine int8 codes, ``FINE *
    coarse + fine`` units, off by half a unit at most."""
    number = np.rint(array / unit)
    coarse = np.clip(np.rint(number / FINE), -127, 127)
    return coarse.astype(np.int8), (number - FINE * coarse).astype(np.int8)
