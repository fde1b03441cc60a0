"""Lowering of Transpose: IM2COL gathers one byte of each of many words."""

from __future__ import annotations

from systole.isa import Opcode
from systole.sw.compiler.limits import largest
from systole.sw.compiler.lowering.context import LoweringContext
from systole.sw.compiler.stages import POINTWISE, Source, Stage, TransposeStage
from systole.sw.ir import layout
from systole.sw.ir.graph import ModelError, Transpose

MAX_TAPS = largest(Opcode.WINDOW, "kernel_w")
"""Columns of a window: the words that a transposition gathers a byte from at a time."""


def lower_transpose(context: LoweringContext, layer: int, op: Transpose) -> Stage:
    """An exchange of channels and positions. Raises :class:`ModelError` without a window engine or
    on an array of too many rows."""
    config = context.config
    if not config.window or config.rows > MAX_TAPS:
        raise ModelError(
            f"node {op.name}: Transpose of channels and positions needs the window engine "
            f"(window = true) and at most {MAX_TAPS} rows; this array has {config.rows}"
        )
    x = context.tensors[op.x]
    n, _, h, w = x.shape
    c = context.tensors[op.output].shape[3]
    source = Source(
        tensor=op.x,
        h=1,
        w=h * w,
        blocks=layout.blocks_of(x.shape[1], config.rows),
        geometries=(POINTWISE,),
        zero=x.zero,
        per_group=True,
    )
    return TransposeStage(
        layer=layer,
        op=op,
        batch=n,
        h=1,
        w=c,
        out_h=1,
        out_w=c,
        channels=h * w,
        blocks=layout.blocks_of(h * w, config.rows),
        group_words=MAX_TAPS // config.rows,
        sources=(source,),
        striped=False,
        first=op.first,
    )
