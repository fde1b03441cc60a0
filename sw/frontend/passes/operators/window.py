"""Geometry of sliding windows, one- and two-dimensional."""

from __future__ import annotations

from systole.sw.frontend.passes.layout import OnnxView
from systole.sw.frontend.passes.values import Node, Pending
from systole.sw.ir.graph import Conv, ConvTranspose, Pool


def pair(values: tuple[int, ...]) -> tuple[int, int]:
    """One number per spatial dimension as (vertical, horizontal)."""
    return (1, values[0]) if len(values) == 1 else values


def image_result(
    op: Conv | ConvTranspose | Pool, shape: tuple[int, int, int, int], rank: int
) -> Pending:
    view = OnnxView.contiguous(shape)
    return Pending(op, shape, view if rank == 2 else view.reshape((*shape[:2], shape[3])))


def window(
    node: Node, kernel: tuple[int, ...], image: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int, int, int], tuple[int, int], tuple[int, int]]:
    """Strides, pads (top, left, bottom, right), dilations and output size of a sliding window.
    ``ceil_mode``'s overhang becomes padding."""
    rank = len(kernel)
    ones, zeros = (1,) * rank, (0,) * (2 * rank)
    strides = node.ints("strides", ones, 1, rank)
    dilations = node.ints("dilations", ones, 1, rank)
    given = node.ints("pads", zeros, 0, 2 * rank)
    auto = node.string("auto_pad", "NOTSET")
    if auto not in ("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"):
        raise node.fail(f"auto_pad = {auto!r}: NOTSET, VALID, SAME_UPPER or SAME_LOWER")
    ceil = bool(node.int("ceil_mode", 0))
    sizes = image[-rank:]
    before, after, out = [], [], []
    for i, size in enumerate(sizes):
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
            raise node.fail(f"kernel reaches over {reach} but the padded input has {room + reach}")
        count = room // strides[i] + 1
        if ceil and room % strides[i] and count * strides[i] < size + first:
            last += strides[i] - room % strides[i]
            count += 1
        before.append(first)
        after.append(last)
        out.append(count)
    one, none = (1,) * (2 - rank), (0,) * (2 - rank)
    pads = (*none, *before, *none, *after)
    return (*one, *strides), pads, (*one, *dilations), (*one, *out)


def counts(
    node: Node, op: Pool, image: tuple[int, int], out: tuple[int, int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The elements inside the image of each row and each column of windows."""
    made = []
    for axis in (0, 1):
        dilation = op.dilations[axis]
        numbers = []
        for i in range(out[axis]):
            first = i * op.strides[axis] - op.pads[axis]
            taps = range(first, first + op.kernel[axis] * dilation, dilation)
            numbers.append(sum(0 <= tap < image[axis] for tap in taps))
        if not all(numbers):
            raise node.fail(f"pads = {list(op.pads)}: a window lies in the padding alone")
        made.append(tuple(numbers))
    return made[0], made[1]


def transposed_window(
    node: Node, kernel: tuple[int, ...], image: tuple[int, int]
) -> tuple[
    tuple[int, int], tuple[int, int, int, int], tuple[int, int], tuple[int, int], tuple[int, int]
]:
    """Strides, pads (top, left, bottom, right; none negative), dilations and output size of a
    transposed convolution, and the zeros that its kernel needs behind it to reach that far."""
    rank = len(kernel)
    ones, zeros = (1,) * rank, (0,) * (2 * rank)
    strides = node.ints("strides", ones, 1, rank)
    dilations = node.ints("dilations", ones, 1, rank)
    given = node.ints("pads", zeros, 0, 2 * rank)
    extra = node.ints("output_padding", zeros[:rank], 0, rank)
    wanted = node.ints("output_shape", None, 1, rank)
    auto = node.string("auto_pad", "NOTSET")
    if auto not in ("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"):
        raise node.fail(f"auto_pad = {auto!r}: NOTSET, VALID, SAME_UPPER or SAME_LOWER")
    for i, most in enumerate(map(max, strides, dilations)):
        if extra[i] >= most:
            raise node.fail(
                f"output_padding = {list(extra)}: each must be less than the stride or dilation, "
                f"{most}"
            )
    before, after, out, missing = [], [], [], []
    for i, size in enumerate(image[-rank:]):
        full = (size - 1) * strides[i] + (kernel[i] - 1) * dilations[i] + 1
        if wanted or auto.startswith("SAME"):
            count = wanted[i] if wanted else size * strides[i]
            if count - extra[i] - full >= strides[i]:
                raise node.fail(f"output_shape = {list(wanted)}: more than the input can reach")
            total = max(full + extra[i] - count, 0)
            first = total // 2 if auto == "SAME_UPPER" else total - total // 2
        else:
            first, last = (0, 0) if auto == "VALID" else (given[i], given[rank + i])
            count = full + extra[i] - first - last
        if count < 1:
            raise node.fail(f"pads leave {count} of its output")
        # What lies beyond the full extent is reached by zeros behind the kernel.
        zero = max(-(-(first + count - full) // dilations[i]), 0)
        before.append(first)
        after.append(full + zero * dilations[i] - first - count)
        out.append(count)
        missing.append(zero)
    one, none = (1,) * (2 - rank), (0,) * (2 - rank)
    pads = (*none, *before, *none, *after)
    return (*one, *strides), pads, (*one, *dilations), (*one, *out), (*none, *missing)
