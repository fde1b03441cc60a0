"""Last pass, check: sizes that no command can express, whatever the configuration."""

from __future__ import annotations

from systole.isa.commands import COMMANDS, Opcode
from systole.sw.ir.graph import Conv, ConvTranspose, Graph, ModelError, Pool, Select

_LIMITS = {f.name: f.high for f in COMMANDS[Opcode.WINDOW].fields}


def check_limits(graph: Graph) -> Graph:
    """Raises :class:`ModelError` naming the operator, the size and the limit."""
    for tensor in graph.tensors.values():
        for what, size in zip(("height", "width"), tensor.shape[2:], strict=True):
            if size > _LIMITS["in_w"]:
                raise ModelError(f"tensor {tensor.name!r}: {what} {size} exceeds {_LIMITS['in_w']}")
    for op in graph.ops:
        if isinstance(op, Select):
            strides = [s for picks in op.phases for p in picks for s in p.strides]
            if max(strides, default=1) > _LIMITS["stride_x"]:
                raise ModelError(
                    f"{op.op_type} {op.name!r}: takes every {max(strides)}th row or column; "
                    f"{_LIMITS['stride_x']} is the limit"
                )
        if not isinstance(op, Conv | ConvTranspose | Pool):
            continue
        if isinstance(op, Pool):
            kernel = op.window(graph.tensors[op.x].shape, _LIMITS["kernel_w"])
        else:
            kernel = op.weights.shape[2:]
        for what, sizes, limit in (
            ("kernel_shape", kernel, _LIMITS["kernel_w"]),
            ("strides", op.strides, _LIMITS["stride_x"]),
            ("dilations", op.dilations, _LIMITS["dilation_x"]),
            ("pads", op.pads, _LIMITS["x0"]),
        ):
            if max(sizes) > limit:
                raise ModelError(
                    f"{op.op_type} {op.name!r}: {what} = {list(sizes)} exceeds {limit}"
                )
    return graph
