"""Geometry of sliding windows, one- and two-dimensional."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from systole.sw.frontend.passes.layout import OnnxView, Shape
from systole.sw.frontend.passes.values import Node, Pending
from systole.sw.ir.graph import Conv, ConvTranspose, MatMul, Pool

Pair = tuple[int, int]
"""Vertical, horizontal."""
Pads = tuple[int, int, int, int]
"""Top, left, bottom, right."""

AUTO_PADS = ("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER")


@dataclass(frozen=True, kw_only=True)
class Window:
    """A window on an image; a one-dimensional one is one row high."""

    kernel: Pair
    strides: Pair
    pads: Pads
    """None negative; of a transposed convolution they crop the output."""
    dilations: Pair
    out: Pair
    """Rows and columns of the result."""
    extension: Pair = (0, 0)
    """Transposed convolution: zeros that the kernel needs behind it to reach the whole result."""


def pair(values: Sequence[int], before: int = 1) -> Pair:
    """One number per spatial dimension as (vertical, horizontal); ``before`` is the vertical one
    of a single dimension."""
    return (before, values[0]) if len(values) == 1 else (values[0], values[1])


def image_result(op: Conv | ConvTranspose | MatMul | Pool, shape: Shape, rank: int) -> Pending:
    """The result of ``op``, an image of ``rank`` spatial dimensions."""
    view = OnnxView.contiguous(shape)
    return Pending(op, shape, view if rank == 2 else view.reshape((*shape[:2], shape[3])))


def window(node: Node, kernel: tuple[int, ...], image: Pair) -> Window:
    """The window of a convolution or pool with ``kernel``, by the node's attributes.
    ``ceil_mode``'s overhang becomes padding."""
    rank = len(kernel)
    strides, dilations, given, auto = _attributes(node, rank)
    ceil = bool(node.integer("ceil_mode", 0))
    before, after, out = [], [], []
    for i, size in enumerate(image[-rank:]):
        reach = (kernel[i] - 1) * dilations[i] + 1
        if auto == "NOTSET":
            first, last = given[i], given[rank + i]
        elif auto == "VALID":
            first = last = 0
        else:
            total = max((-(-size // strides[i]) - 1) * strides[i] + reach - size, 0)
            first = total // 2 if auto == "SAME_UPPER" else total - total // 2
            last = total - first
        room = size + first + last - reach
        if room < 0:
            raise node.fail(
                f"kernel_shape = {list(kernel)} reaches over {reach} elements; the padded input "
                f"has {room + reach}"
            )
        count = room // strides[i] + 1
        if ceil and room % strides[i] and count * strides[i] < size + first:
            last += strides[i] - room % strides[i]
            count += 1
        before.append(first)
        after.append(last)
        out.append(count)
    return Window(
        kernel=pair(kernel),
        strides=pair(strides),
        pads=(*pair(before, 0), *pair(after, 0)),
        dilations=pair(dilations),
        out=pair(out),
    )


def counts(node: Node, op: Pool, image: Pair, out: Pair) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The elements inside the image of each row and each column of windows."""
    rows, columns = (_counts(node, op, axis, image[axis], out[axis]) for axis in (0, 1))
    return rows, columns


def _counts(node: Node, op: Pool, axis: int, size: int, out: int) -> tuple[int, ...]:
    dilation = op.dilations[axis]
    numbers = []
    for i in range(out):
        first = i * op.strides[axis] - op.pads[axis]
        taps = range(first, first + op.kernel[axis] * dilation, dilation)
        numbers.append(sum(0 <= tap < size for tap in taps))
    if not all(numbers):
        raise node.fail(f"pads = {list(op.pads)}: a window lies in the padding alone")
    return tuple(numbers)


def transposed_window(node: Node, kernel: tuple[int, ...], image: Pair) -> Window:
    """The window of a transposed convolution with ``kernel``, by the node's attributes."""
    rank = len(kernel)
    strides, dilations, given, auto = _attributes(node, rank)
    extra = node.integers("output_padding", (0,) * rank, low=0, count=rank)
    wanted = node.integers("output_shape", None, low=1, count=rank)
    for i, most in enumerate(map(max, strides, dilations)):
        if extra[i] >= most:
            raise node.fail(
                f"output_padding = {list(extra)}: each must be less than the stride or dilation, "
                f"{most}"
            )
    before, after, out, extension = [], [], [], []
    for i, size in enumerate(image[-rank:]):
        full = (size - 1) * strides[i] + (kernel[i] - 1) * dilations[i] + 1
        if wanted or auto.startswith("SAME"):
            # Padding is never negative: a kernel shorter than the stride leaves less.
            count = wanted[i] if wanted else min(size * strides[i], full + extra[i])
            if count - extra[i] - full >= strides[i]:
                raise node.fail(
                    f"output_shape = {list(wanted or ())}: the input reaches less than "
                    f"{full + extra[i] + strides[i]} elements"
                )
            total = max(full + extra[i] - count, 0)
            first = total // 2 if auto == "SAME_UPPER" else total - total // 2
        else:
            first, last = (0, 0) if auto == "VALID" else (given[i], given[rank + i])
            count = full + extra[i] - first - last
        if count < 1:
            raise node.fail(f"pads = {list(given)} leave {count} elements of its output")
        # What lies beyond the full extent is reached by zeros behind the kernel.
        zeros = max(-(-(first + count - full) // dilations[i]), 0)
        before.append(first)
        after.append(full + zeros * dilations[i] - first - count)
        out.append(count)
        extension.append(zeros)
    return Window(
        kernel=pair(kernel),
        strides=pair(strides),
        pads=(*pair(before, 0), *pair(after, 0)),
        dilations=pair(dilations),
        out=pair(out),
        extension=pair(extension, 0),
    )


def _attributes(
    node: Node, rank: int
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], str]:
    """``strides``, ``dilations``, ``pads`` and ``auto_pad`` of ``rank`` dimensions."""
    auto = node.string("auto_pad", "NOTSET")
    if auto not in AUTO_PADS:
        raise node.fail(f"auto_pad = {auto!r}: it must be one of {', '.join(AUTO_PADS)}")
    return (
        node.integers("strides", (1,) * rank, low=1, count=rank),
        node.integers("dilations", (1,) * rank, low=1, count=rank),
        node.integers("pads", (0,) * (2 * rank), low=0, count=2 * rank),
        auto,
    )
