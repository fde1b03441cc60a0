"""Folded convolutions: a packed graph input is gathered by im2col into whole reduction words."""

from __future__ import annotations

import numpy as np

from systole.isa import Config, Opcode
from systole.sw.compiler.limits import largest
from systole.sw.compiler.lowering.context import LoweringContext
from systole.sw.compiler.stages import MAX_DIM, Fold, Geometry, Source
from systole.sw.ir import layout
from systole.sw.ir.graph import Conv, Graph, Op
from systole.sw.simulate.cycles import im2col_row_cycles

MAX_RUN = largest(Opcode.WINDOW, "run")
MAX_STEP = min(largest(Opcode.WINDOW, "stride_x"), largest(Opcode.WINDOW, "dilation_x"))
"""Bytes from one window, or tap, to the next."""
MAX_BLOCKS = largest(Opcode.CONV, "blocks")


def packed_inputs(graph: Graph, config: Config) -> frozenset[str]:
    """Graph inputs that are kept packed: all their consumers fold them."""
    if not config.window:
        return frozenset()
    outputs = {p.tensor for p in graph.outputs}
    return frozenset(
        p.tensor
        for p in graph.inputs
        if p.tensor not in outputs
        and all(_foldable(op, p.tensor, graph, config) for op in graph.ops if p.tensor in op.inputs)
    )


def _foldable(op: Op, name: str, graph: Graph, config: Config) -> bool:
    """The operator could read tensor ``name`` packed, and gains from it."""
    if not isinstance(op, Conv) or op.group != 1 or op.x != name:
        return False
    if name in op.inputs[1:]:
        return False
    channels = graph.tensors[name].shape[1]
    kh, kw = op.weights.shape[2:]
    run = kw * channels if op.dilations[1] == 1 else channels
    words = layout.blocks_of(kh * kw * channels, config.rows)
    return (
        words < kh * kw * layout.blocks_of(channels, config.rows)
        and run <= MAX_RUN
        and channels * max(op.strides[1], op.dilations[1]) <= MAX_STEP
        and channels * graph.tensors[name].shape[3] <= MAX_DIM
        and words <= MAX_BLOCKS
    )


def choose_fold(context: LoweringContext, op: Conv) -> Fold:
    """The faster of whole kernels and single kernel rows, if the rows fit in the scratchpad.

    Gathering and the array work at the same time: the slower one counts."""
    choices = [_choice(context, op, by_row=by_row) for by_row in (False, True)]
    return min(c for c in choices if c is not None)[-1]


def _choice(
    context: LoweringContext, op: Conv, *, by_row: bool
) -> tuple[int, int, bool, Fold] | None:
    """A fold behind what it is preferred by: cycles of the slower engine, and of both. None: its
    rows take too much of the scratchpad."""
    config = context.config
    _, channels, in_h, in_w = context.tensors[op.x].shape
    h, w = context.size(op.output)
    kh, kw = op.weights.shape[2:]
    dilation = op.dilations[1]
    runs, run = (1, channels * kw) if dilation == 1 else (kw, channels)
    columns = -(-len(op.weights) // config.cols)
    rows = 1 if by_row else kh
    words = layout.blocks_of(rows * runs * run, config.rows)
    held = 4 * (kh + op.strides[0]) * w * words
    if by_row and held > config.scratchpad_words // 3:
        return None
    per_row = im2col_row_cycles(
        config,
        x0=-op.pads[1] * channels,
        stride_x=op.strides[1] * channels,
        dilation_x=dilation * channels,
        kernel_w=runs,
        kernel_h=rows,
        run=run,
        in_w=channels * in_w,
        out_w=w,
    )
    gather = per_row * (in_h if by_row else h)
    array = h * w * words * columns * (kh if by_row else 1)
    fold = Fold(
        runs=runs,
        run=run,
        geometry=Geometry((kh, kw), op.strides, op.pads[:2], op.dilations),
        channels=channels,
        in_w=channels * in_w,
        words=words,
        by_row=by_row,
    )
    return max(gather, array), gather + array, not by_row, fold


def packed_source(context: LoweringContext, op: Conv, fold: Fold) -> Source:
    """The operator's packed input."""
    x = context.tensors[op.x]
    return Source(
        tensor=op.x,
        h=x.shape[2],
        w=layout.packed_pitch(x.shape[1], x.shape[3], context.config.rows),
        blocks=1,
        geometries=(fold.geometry,),
        zero=x.zero,
        per_group=False,
        packed=True,
    )


def folded_kernel(weights: np.ndarray, fold: Fold) -> np.ndarray:
    """The kernel (O, C, kh, kw) with one channel of the reduction per gathered byte: (ky, kx, c),
    c fastest."""
    o, _, kh, _ = weights.shape
    by_tap = weights.transpose(0, 2, 3, 1)
    if fold.by_row:
        return by_tap.reshape(o, kh, -1).transpose(0, 2, 1)[..., None]
    return by_tap.reshape(o, -1, 1, 1)


def row_geometry(g: Geometry) -> Geometry:
    """The window that is left when its columns are folded."""
    return Geometry((g.kernel[0], 1), (g.strides[0], 1), (g.pads[0], 0), (g.dilations[0], 1))
