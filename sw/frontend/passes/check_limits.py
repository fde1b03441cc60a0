"""Pass 9, check_limits: sizes that no command can express, whatever the configuration."""

from __future__ import annotations

import numpy as np

from systole.isa.commands import COMMANDS, Opcode
from systole.sw.frontend.passes.graph_pass import PassResult
from systole.sw.ir.graph import Conv, ConvTranspose, Graph, ModelError, Pool, Select, Tensor

INT32_MAX = np.iinfo(np.int32).max
_LIMITS = {f.name: f.high for f in COMMANDS[Opcode.WINDOW].fields}


def check_limits(graph: Graph) -> PassResult:
    """Refuses what exceeds the fields of the commands; it never changes the graph.

    1. Rows and columns of a tensor.
    2. The step between the rows or columns that a Select takes.
    3. Kernel, strides, dilations and padding of a convolution or pool. A pool of a whole image
       counts with the rows and columns that the compiler sees it with.
    4. The sums of a convolution or product by a constant: int32, for every possible input.

    Raises :class:`ModelError` naming the operator, the size and the limit."""
    for tensor in graph.tensors.values():
        _check_tensor(tensor)
    for op in graph.ops:
        if isinstance(op, Select):
            _check_select(op)
        elif isinstance(op, Conv | ConvTranspose):
            _check_window(op, op.weights.shape[2:])
            _check_sums(op, graph)
        elif isinstance(op, Pool):
            _check_window(op, op.window(graph.tensors[op.x].shape, _LIMITS["kernel_w"]))
    return PassResult(graph, changed=False)


def _check_tensor(tensor: Tensor) -> None:
    for what, size in zip(("height", "width"), tensor.shape[2:], strict=True):
        if size > _LIMITS["in_w"]:
            raise ModelError(f"tensor {tensor.name!r}: {what} {size} exceeds {_LIMITS['in_w']}")


def _check_select(op: Select) -> None:
    step = max((s for picks in op.phases for p in picks for s in p.strides), default=1)
    if step > _LIMITS["stride_x"]:
        raise ModelError(
            f"{op.op_type} {op.name!r}: takes every {step}th row or column; "
            f"{_LIMITS['stride_x']} is the limit"
        )


def _check_window(op: Conv | ConvTranspose | Pool, kernel: tuple[int, ...]) -> None:
    for what, sizes, limit in (
        ("kernel_shape", kernel, _LIMITS["kernel_w"]),
        ("strides", op.strides, _LIMITS["stride_x"]),
        ("dilations", op.dilations, _LIMITS["dilation_x"]),
        ("pads", op.pads, _LIMITS["x0"]),
    ):
        if max(sizes) > limit:
            raise ModelError(f"{op.op_type} {op.name!r}: {what} = {list(sizes)} exceeds {limit}")


def _check_sums(op: Conv | ConvTranspose, graph: Graph) -> None:
    """Sums that do not fit would wrap: the sign would flip."""
    outputs = op.weights.shape[0]
    magnitudes = np.abs(op.weights.astype(np.int64)).reshape(outputs, -1).sum(axis=1)
    largest = magnitudes * _reach(graph.tensors[op.x])
    largest += np.abs(op.bias.astype(np.int64))
    if isinstance(op, Conv) and op.shortcut is not None:
        largest += op.shortcut.factors.astype(np.int64) * _reach(graph.tensors[op.shortcut.other])
    channel = int(largest.argmax())
    if largest[channel] > INT32_MAX:
        raise ModelError(
            f"{op.op_type} {op.name!r}: the sums of output channel {channel} may reach "
            f"{largest[channel]:,}; int32 holds {INT32_MAX:,}"
        )


def _reach(tensor: Tensor) -> int:
    """The largest magnitude of a tensor's codes less their zero point."""
    return max(127 - tensor.zero, tensor.zero + 128)
