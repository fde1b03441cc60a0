"""Lowering of depthwise convolution and pooling to the window engine."""

from __future__ import annotations

import dataclasses

import numpy as np

from systole.isa import Opcode, WindowOp
from systole.sw.compiler.limits import largest
from systole.sw.compiler.lowering.context import LoweringContext
from systole.sw.compiler.lowering.vector import lower_table
from systole.sw.compiler.stages import Geometry, ParameterBands, Stage, WindowStage
from systole.sw.compiler.zeros import fitting_zero
from systole.sw.ir import layout
from systole.sw.ir.graph import Activation, Conv, ModelError, Pool, Table, Tensor

MAX_KERNEL = min(largest(Opcode.WINDOW, "kernel_h"), largest(Opcode.WINDOW, "kernel_w"))


def lower_depthwise(context: LoweringContext, layer: int, op: Conv) -> list[Stage]:
    """A depthwise convolution. A fused function is a stage of its own behind it."""
    if op.activation is None:
        return [_convolve(context, layer, op)]
    own = own_result(context.tensors[op.output], op.activation)
    seen = context.seeing(own)
    conv = dataclasses.replace(op, output=own.name, activation=None)
    table = Table(
        name=op.name,
        op_type=op.op_type,
        output=op.output,
        low=-128,
        high=127,
        x=own.name,
        values=op.activation.values,
    )
    return [_convolve(seen, layer, conv), lower_table(seen, layer, table)]


def own_result(output: Tensor, activation: Activation) -> Tensor:
    """The tensor between a depthwise convolution and its fused function."""
    return dataclasses.replace(output, name=f"{output.name}:own", zero=activation.zero)


def _convolve(context: LoweringContext, layer: int, op: Conv) -> Stage:
    rows = context.config.rows
    zero = fitting_zero(op.weights, context.config)
    assert zero is not None, "weights that no zero point makes int8 go to the array"
    x = context.tensors[op.x]
    total = op.weights.reshape(len(op.weights), -1).sum(1, dtype=np.int64)
    w = layout.pad_axis(op.weights[:, 0], 0, rows)
    c, kh, kw = w.shape
    words = w.reshape(c // rows, rows, kh, kw).transpose(0, 2, 3, 1).reshape(-1, rows)
    bias = op.bias.astype(np.int64) - x.zero * total
    params = context.params(op, bias, op.scale, rows)
    stage = _window_stage(
        context, layer, op, geometry=_geometry(op, (kh, kw)), window_op=WindowOp.DEPTHWISE
    )
    words = (words + np.int16(zero)).astype(np.int8)
    return dataclasses.replace(stage, window_weights=words, weight_zero=zero, params=params)


def lower_pool(context: LoweringContext, layer: int, op: Pool) -> Stage:
    """A maximum or average over windows. Raises :class:`ModelError` without a window engine."""
    if not context.config.window:
        raise ModelError(f"node {op.name}: {op.op_type} needs the window engine (window = true)")
    x = context.tensors[op.x]
    kernel = op.window(x.shape, MAX_KERNEL)
    if kernel != op.kernel:
        # The window is the whole image: see the image, too, with the kernel's rows and columns.
        seen = dataclasses.replace(x, shape=(*x.shape[:2], *kernel))
        other = dataclasses.replace(op, kernel=kernel)
        stage = lower_pool(context.seeing(seen), layer, other)
        return dataclasses.replace(stage, op=op, striped=False)
    geometry = _geometry(op, kernel)
    if op.kind == "max":
        return _window_stage(
            context, layer, op, geometry=geometry, window_op=WindowOp.MAX, pad=-128
        )
    stage = _window_stage(context, layer, op, geometry=geometry, window_op=WindowOp.SUM)
    if op.counts is None:
        return dataclasses.replace(stage, params=_average_params(context, op, op.scale))
    # One set of parameters for every number of elements that windows count.
    (ys, rows), (xs, columns) = (np.unique(c, return_inverse=True) for c in op.counts)
    counts, sets = np.unique(np.outer(ys, xs), return_inverse=True)
    params = [_average_params(context, op, op.scale_of(int(n))) for n in counts]
    bands = ParameterBands(rows, columns, sets.reshape(len(ys), len(xs)))
    return dataclasses.replace(stage, params=np.concatenate(params), bands=bands)


def _average_params(context: LoweringContext, op: Pool, scale: np.float32) -> np.ndarray:
    """The parameters of one block. All channels are alike: they serve every block."""
    rows = context.config.rows
    bias = np.full(rows, -context.tensors[op.x].zero * op.kernel[0] * op.kernel[1])
    return context.params(op, bias, np.full(rows, scale), rows)


def _geometry(op: Conv | Pool, kernel: tuple[int, int]) -> Geometry:
    return Geometry(kernel, op.strides, op.pads[:2], op.dilations)


def _window_stage(
    context: LoweringContext,
    layer: int,
    op: Conv | Pool,
    *,
    geometry: Geometry,
    window_op: WindowOp,
    pad: int | None = None,
) -> WindowStage:
    """A stage that has no parameters yet. ``pad``: what is read outside the input, if not its zero
    point."""
    n, channels, h, w = context.tensors[op.output].shape
    source = context.source(op.x, [geometry], context.size(op.x), per_group=True)
    if pad is not None:
        source = dataclasses.replace(source, zero=pad)
    return WindowStage(
        layer=layer,
        op=op,
        batch=n,
        h=h,
        w=w,
        out_h=h,
        out_w=w,
        channels=channels,
        blocks=source.blocks,
        group_words=1,
        sources=(source,),
        window_op=window_op,
        requant=context.requant(op),
    )
