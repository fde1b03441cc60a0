"""Windows with more rows or columns than a command's kernel: in two steps, as products, or as
smaller windows of more channels."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from systole.isa.commands import COMMANDS, Opcode
from systole.sw.frontend.passes.layout import Shape
from systole.sw.frontend.passes.operators.window import Pair
from systole.sw.frontend.passes.state import LoweringState
from systole.sw.frontend.passes.values import Node, Quant
from systole.sw.ir.graph import Conv, MatMul, Matrices, Pick, Pool, Select

_LIMITS = {f.name: f.high for f in COMMANDS[Opcode.WINDOW].fields}
MAX_KERNEL = _LIMITS["kernel_w"]
MAX_STRIDE = _LIMITS["stride_x"]
MAX_MEMBERS = 1 << 22
"""Elements of the largest constant that says which elements a window has."""


MAX_OFFSET = _LIMITS["x0"]


def exceeds(op: Pool, shape: Shape) -> bool:
    """Whether no command has the window of ``op`` on an input of ``shape``."""
    return max(op.window(shape, MAX_KERNEL)) > MAX_KERNEL


class _Steps(NamedTuple):
    """Windows of an axis as windows of windows."""

    kernels: Pair
    strides: Pair
    dilations: Pair


def in_two_steps(state: LoweringState, node: Node, op: Pool, shape: Shape, out: Pair) -> Pool:
    """A large maximum of an input of ``shape`` as one of maxima, which are emitted; ``op`` itself
    where none of two commands' sizes is the same."""
    steps = []
    for axis, size in enumerate(shape[2:]):
        padded = size + op.pads[axis] + op.pads[axis + 2]
        found = _steps_of(op.kernel[axis], op.strides[axis], op.dilations[axis], padded, out[axis])
        if found is None:
            return op
        steps.append(found)
    first, second = (
        replace(
            op,
            kernel=(steps[0].kernels[i], steps[1].kernels[i]),
            strides=(steps[0].strides[i], steps[1].strides[i]),
            dilations=(steps[0].dilations[i], steps[1].dilations[i]),
        )
        for i in (0, 1)
    )
    reach = [(k - 1) * d + 1 for k, d in zip(first.kernel, first.dilations, strict=True)]
    rows, columns = (
        (shape[2 + i] + op.pads[i] + op.pads[i + 2] - reach[i]) // first.strides[i] + 1
        for i in (0, 1)
    )
    name = state.emitter.emit(
        replace(first, scale=np.float32(1)),
        f"{node.output}:of parts",
        shape=(*shape[:2], rows, columns),
        quant=state.tensors.quant(op.x),
    )
    return replace(second, x=name, pads=(0, 0, 0, 0))


def _steps_of(kernel: int, stride: int, dilation: int, padded: int, out: int) -> _Steps | None:
    """The steps of an axis of ``padded`` elements with ``out`` windows; the second step has as few
    elements as possible, the first the largest stride of these. None if a size is too large."""
    if kernel <= MAX_KERNEL:
        return _Steps((kernel, 1), (stride, 1), (dilation, 1))
    count = -(-kernel // MAX_KERNEL)
    candidates = []
    # The parts overlap or touch, and the last ends where the kernel does.
    for apart in range(-(-(kernel - MAX_KERNEL) // (count - 1)), kernel // count + 1):
        between = apart * dilation
        room = padded - (kernel - 1) * dilation - 1
        # A single window may stand on parts any stride apart.
        own = between if out == 1 else math.gcd(stride, between)
        then = room // own + 1 if out == 1 else stride // own
        steps = _Steps(
            (kernel - (count - 1) * apart, count), (own, then), (dilation, between // own)
        )
        if max(*steps.strides, *steps.dilations) <= MAX_STRIDE and count <= MAX_KERNEL:
            candidates.append(steps)
    return max(candidates, key=lambda s: s.strides[0], default=None)


def as_product(
    state: LoweringState, node: Node, op: Pool, shape: Shape, out: Pair
) -> Pool | MatMul:
    """A large average of an input of ``shape`` as a product: a constant that has 1 for each element
    of a window, times the channels of the image. Its sums are exact, so it is rounded once.

    ``op`` itself where windows count different numbers of elements, or the constant would be too
    large."""
    if op.counts is not None:
        return op
    n, c, h, w = shape
    rows, columns = (_members(op, axis, shape[2 + axis], out[axis]) for axis in (0, 1))
    banded = not any(op.pads[::2]) and op.dilations[0] == 1
    if banded:
        # Every row of windows takes rows of the image that lie one behind the other.
        starts = np.arange(out[0]) * op.strides[0]
        members = np.tile(columns, (1, op.kernel[0]))
    else:
        starts = np.zeros(1, np.int64)
        members = np.einsum("ih,jw->ijhw", rows, columns).reshape(out[0] * out[1], h * w)
    if members.size > MAX_MEMBERS:
        return op
    positions, depth = members.shape
    array = np.ascontiguousarray(members.T.reshape(1, depth, 1, positions))
    ones = state.tensors.add_constant(node, array, Quant(np.float32(1), 0, False), stored=True)
    images = np.repeat(np.arange(n), len(starts))
    channels = np.zeros_like(images)
    window = np.float32(math.prod(op.kernel))
    return MatMul(
        **node.fields(),
        a=Matrices(ones, np.zeros((len(images), 3), np.int64)),
        b=Matrices(op.x, np.stack([images, channels, np.tile(starts * w, n)], 1)),
        places=np.stack([images, channels, np.tile(np.arange(len(starts)) * positions, n)], 1),
        rows=positions,
        depth=depth,
        columns=c,
        scale=np.float32(op.scale / window),
    )


def _members(op: Pool, axis: int, size: int, out: int) -> np.ndarray:
    """Which of ``size`` elements each window has on an axis: int8 (windows, size)."""
    members = np.zeros((out, size), np.int8)
    taps = np.arange(op.kernel[axis]) * op.dilations[axis] - op.pads[axis]
    for i in range(out):
        own = taps + i * op.strides[axis]
        members[i, own[(own >= 0) & (own < size)]] = 1
    return members


def in_blocks(state: LoweringState, node: Node, op: Conv, out: Pair) -> Conv:
    """A convolution whose kernel may be large as one by a block of the kernel: the other blocks'
    elements of the input become channels beside it, by a Select, which is emitted. ``op`` itself
    where no command moves the elements that far."""
    kernel = op.weights.shape[2:]
    if max(kernel) <= MAX_KERNEL:
        return op
    n, c, *size = state.tensors.shape(op.x)
    counts = [-(-k // MAX_KERNEL) for k in kernel]
    sizes = [-(-k // count) for k, count in zip(kernel, counts, strict=True)]
    pads = list(op.pads)
    steps, first = [0, 0], [0, 0]
    for axis in (0, 1):
        if counts[axis] > 1:
            steps[axis], first[axis] = sizes[axis] * op.dilations[axis], -pads[axis]
            size[axis] = (out[axis] - 1) * op.strides[axis] + steps[axis] - op.dilations[axis] + 1
            pads[axis] = pads[axis + 2] = 0
    blocks = [(y, x) for y in range(counts[0]) for x in range(counts[1])]
    moves = [(first[0] + y * steps[0], first[1] + x * steps[1]) for y, x in blocks]
    if max(abs(offset) for move in moves for offset in move) > MAX_OFFSET:
        return op
    per = c // op.group
    group, block, channel = np.unravel_index(
        np.arange(c * len(blocks)), (op.group, len(blocks), per)
    )
    picks = [
        Pick(op.x, np.where(block == i, group * per + channel, -1), offsets=move)
        for i, move in enumerate(moves)
    ]
    name = state.emitter.emit(
        Select(**node.fields(), phases=[picks]),
        f"{node.output}:in blocks",
        shape=(n, c * len(blocks), size[0], size[1]),
        quant=state.tensors.quant(op.x),
    )
    top, left, bottom, right = pads
    weights = _blocks(op.weights, counts, sizes)
    return replace(op, x=name, weights=weights, pads=(top, left, bottom, right))


def _blocks(weights: np.ndarray, counts: list[int], sizes: list[int]) -> np.ndarray:
    """The blocks of a kernel one after the other as input channels, zeros behind the last."""
    outputs, per = weights.shape[:2]
    missing = [(0, c * s - k) for c, s, k in zip(counts, sizes, weights.shape[2:], strict=True)]
    whole = np.pad(weights, ((0, 0), (0, 0), *missing))
    split = whole.reshape(outputs, per, counts[0], sizes[0], counts[1], sizes[1])
    ordered = split.transpose(0, 2, 4, 1, 3, 5)
    return np.ascontiguousarray(ordered.reshape(outputs, -1, *sizes))
