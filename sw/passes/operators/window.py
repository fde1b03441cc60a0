"""Geometry of sliding windows, one- and two-dimensional."""

from __future__ import annotations

from sw.graph import Conv, Pool
from sw.passes.layout import View
from sw.passes.lower import Node, Pending


def pair(values: tuple[int, ...]) -> tuple[int, int]:
    """One number per spatial dimension as (vertical, horizontal)."""
    return (1, values[0]) if len(values) == 1 else values


def image_result(op: Conv | Pool, shape: tuple[int, int, int, int], rank: int) -> Pending:
    view = View.contiguous(shape)
    return Pending(op, shape, view if rank == 2 else view.reshape((*shape[:2], shape[3])))


def window(
    node: Node, kernel: tuple[int, ...], image: tuple[int, int], no_overhang: bool = False
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
            if no_overhang:
                raise node.fail("ceil_mode = 1 with a window overhanging the input: it must be 0")
            last += strides[i] - room % strides[i]
            count += 1
        before.append(first)
        after.append(last)
        out.append(count)
    one, none = (1,) * (2 - rank), (0,) * (2 - rank)
    pads = (*none, *before, *none, *after)
    return (*one, *strides), pads, (*one, *dilations), (*one, *out)
