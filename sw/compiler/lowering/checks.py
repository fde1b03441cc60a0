"""Limits of the commands that an operator's sizes must keep."""

from __future__ import annotations

from collections.abc import Mapping

from systole.isa import Opcode
from systole.sw.compiler.limits import largest
from systole.sw.compiler.lowering.window import MAX_KERNEL
from systole.sw.compiler.stages import MAX_DIM
from systole.sw.ir.graph import Conv, ConvTranspose, ModelError, Op, Pool, Tensor

MAX_STRIDE = largest(Opcode.CONV, "stride_x")
MAX_DILATION = largest(Opcode.CONV, "dilation_x")


def check_limits(op: Op, tensors: Mapping[str, Tensor]) -> None:
    """Raises :class:`ModelError` for an image, kernel, stride or dilation that is too large."""
    for name in (*op.inputs, op.output):
        for what, size in zip(("height", "width"), tensors[name].shape[2:]):
            if size > MAX_DIM:
                raise ModelError(f"node {op.name}: tensor {name}: {what} {size} exceeds {MAX_DIM}")
    if not isinstance(op, Conv | Pool | ConvTranspose):
        return
    if isinstance(op, Pool):
        kernel = op.window(tensors[op.x].shape, MAX_KERNEL)
    else:
        kernel = op.weights.shape[2:]
    for what, values, limit in (
        ("kernel", kernel, MAX_KERNEL),
        ("strides", op.strides, MAX_STRIDE),
        ("dilations", op.dilations, MAX_DILATION),
    ):
        if max(values) > limit:
            raise ModelError(f"node {op.name}: {what} {tuple(values)} exceeds {limit}")
