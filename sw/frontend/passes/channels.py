"""What differs from channel to channel but not over the image, as depthwise 1x1 convolutions."""

from __future__ import annotations

import numpy as np

from systole.sw.frontend.passes.finish import checked
from systole.sw.frontend.passes.values import Affine, Node
from systole.sw.ir.graph import Conv

WEIGHTS = np.arange(1, 128)
FIXED = np.float32(2.0**-20)
"""Scale of a channel that is constant."""
MOST = 2**30
"""Largest bias."""


def affine(node: Node, x: Affine, gain: np.ndarray, shift: np.ndarray) -> Conv:
    """``gain * (q - zero) + shift`` of every channel in units of the result, with one rounding:
    ``(w * (q - zero) + p) * (gain / w)``, where p / w is the fraction with w up to 127 nearest to
    shift / gain. Its error is a few hundredths of a unit at most, with w = 1 none for shift 0."""
    # Beside a shift so much larger a channel's own elements do not count.
    moving = np.abs(gain) * MOST > np.maximum(np.abs(shift), 1)
    ratio = np.where(moving, shift, 0) / np.where(moving, gain, 1)
    exact = ratio[:, None] * WEIGHTS
    error = np.abs(exact - np.rint(exact)) / WEIGHTS
    weight = WEIGHTS[np.argmin(np.where(np.abs(exact) <= MOST, error, np.inf), axis=1)]
    bias = np.where(moving, np.rint(ratio * weight) * np.sign(gain), np.rint(shift / FIXED))
    scale = np.where(moving, np.abs(gain) / weight, FIXED).astype(np.float32)
    off = np.where(moving, np.abs(ratio * weight - np.rint(ratio * weight)), 0)
    weight = np.where(moving, weight * np.sign(gain), 0)
    return Conv(
        **node.fields("+".join(x.op_types), name=x.name),
        x=x.tensor,
        weights=weight.astype(np.int8).reshape(-1, 1, 1, 1),
        bias=np.clip(bias, -MOST, MOST).astype(np.int32),
        scale=checked(node, scale),
        strides=(1, 1),
        pads=(0, 0, 0, 0),
        dilations=(1, 1),
        group=len(gain),
        off=off,
    )
