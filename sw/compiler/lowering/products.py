"""Lowering of products of two activations.

MatMul is an array stage whose weights are the right operand's words in DRAM: features are the lanes
of a word, so that the words of a block are the rows of a matrix, ``cols`` columns wide. It takes a
square array, and matrices that begin with a word:

* The left operand's may begin in any lane: zeros before the matrix' first row shift it (words of
  the zero point where the array takes that off).
* The right operand's that begin within a word are moved first, to a tensor that holds every matrix
  by itself, by a permutation as Select's. Results that end within a word are moved likewise,
  afterwards.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from systole.sw.compiler.lowering.context import LoweringContext, Shape, side_by_side
from systole.sw.compiler.lowering.selection import lower_select
from systole.sw.compiler.lowering.vector import lower_table
from systole.sw.compiler.stages import (
    MAX_DIM,
    POINTWISE,
    ArrayStage,
    Phase,
    Product,
    Source,
    Spread,
    Stage,
)
from systole.sw.ir import layout
from systole.sw.ir.graph import MatMul, Matrices, ModelError, Pick, Select, Table


def lower_product(context: LoweringContext, layer: int, op: MatMul) -> list[Stage]:
    """The stages of a product, those that move its matrices included. Raises :class:`ModelError`
    for an array that is not square, or matrices that cannot be moved."""
    config = context.config
    if config.rows != config.cols:
        raise ModelError(
            f"node {op.name}: a product of two activations needs a square array; this one has "
            f"{config.rows} rows and {config.cols} columns"
        )
    stages: list[Stage] = []
    if (op.b.places[:, 1] % config.rows).any():
        moved, context, b = _separate_operand(context, layer, op)
        stages.append(moved)
        op = dataclasses.replace(op, b=b)
    complement = None
    if context.tensors[op.a.tensor].zero == -128 and not config.zero_points:
        complement = f"{op.output}:complement"
        stages.append(_complement(context, layer, op, complement))
    if not (op.places[:, 1] % config.rows).any():
        spread = _spread(context, Matrices(op.output, op.places), op.columns)
        return [*stages, _product_stage(context, layer, op, spread, complement)]
    apart = dataclasses.replace(op, output=f"{op.output}:apart")
    seen = context.seeing(dataclasses.replace(context.tensors[op.output], name=apart.output))
    stages.append(_product_stage(seen, layer, apart, None, complement))
    return [*stages, _gather_results(context, layer, op, apart.output)]


def _spread(context: LoweringContext, operand: Matrices, channels: int) -> Spread:
    """Where the matrices of an operand lie, ``channels`` wide."""
    rows = context.config.rows
    n, c, h, w = context.tensors[operand.tensor].shape
    blocks = layout.blocks_of(c, rows)
    image, channel, position = operand.places.T
    starts = (image * blocks + channel // rows) * (h * w) + position
    counts = -(-(channel % rows + channels) // rows)
    return Spread(
        starts=tuple(starts.tolist()),
        blocks=tuple(counts.tolist()),
        step=h * w,
        words=n * blocks * h * w,
    )


def _complement(context: LoweringContext, layer: int, op: MatMul, name: str) -> Stage:
    """The stage that makes -1 - w of the right operand's w: times -128 that is 128 * w + 128, and
    128 is no int8."""
    values = (-1 - np.arange(-128, 128)).astype(np.int8)
    table = Table(
        name=op.name,
        op_type=op.op_type,
        output=name,
        low=-128,
        high=127,
        x=op.b.tensor,
        values=values,
    )
    output = dataclasses.replace(context.tensors[op.b.tensor], name=name)
    stage = lower_table(context.seeing(output), layer, table)
    return dataclasses.replace(stage, striped=False)


def _summands(value: int) -> tuple[int, ...]:
    """int8 numbers, none zero, that add up to ``value`` (-127..128)."""
    parts = (value,) if value < 128 else (64, 64)
    return tuple(p for p in parts if p)


def _product_stage(
    context: LoweringContext,
    layer: int,
    op: MatMul,
    spread: Spread | None,
    complement: str | None,
) -> ArrayStage:
    """The product itself. ``spread``: where its results lie, if not one after the other."""
    rows, tensors = context.config.rows, context.tensors
    za, zb = tensors[op.a.tensor].zero, tensors[op.b.tensor].zero
    # The zero points that the array takes off, and those that take passes of their own.
    taken = (za, zb) if context.config.zero_points else (0, 0)
    za, zb = za - taken[0], zb - taken[1]
    a = _spread(context, op.a, op.depth)
    lanes = op.a.places[:, 1] % rows
    blocks_of_lane = set(zip(lanes.tolist(), a.blocks))
    weights, zeros = _constant_matrices(rows, op.depth, blocks_of_lane, total=-zb, around=taken[1])
    # Minus what a complement adds beside the product with the zero point.
    bias = np.full(op.columns, op.depth * (za * zb - 128 * bool(complement)), np.int64)
    scale = np.full(op.columns, op.scale, np.float32)
    source = Source(
        tensor=op.a.tensor,
        h=1,
        w=op.rows,
        blocks=max(a.blocks),
        geometries=(POINTWISE,),
        zero=za,
        per_group=False,
        spread=a,
    )
    return ArrayStage(
        layer=layer,
        op=op,
        batch=op.batch,
        h=1,
        w=op.rows,
        out_h=1,
        out_w=op.rows,
        channels=op.columns,
        blocks=layout.blocks_of(op.columns, rows),
        group_words=1,
        sources=(source,),
        phases=(Phase(0, 0, (), 0),),
        requant=context.requant(op, op.activation),
        weights=weights,
        params=context.params(op, bias, scale, context.config.lanes),
        table=context.table(op.activation),
        striped=False,
        product=Product(
            tensor=op.b.tensor,
            complement=complement,
            spread=_spread(context, op.b, op.columns),
            depth=op.depth,
            lanes=tuple(lanes.tolist()),
            pads=(za,) if complement else _summands(-za),
            zeros=zeros,
            input_zero=taken[0],
            weight_zero=taken[1],
        ),
        spread=spread,
    )


def _constant_matrices(
    rows: int, depth: int, blocks_of_lane: set[tuple[int, int]], *, total: int, around: int
) -> tuple[np.ndarray, dict[int, tuple[int, ...]]]:
    """Weight words (count, rows) of ``around``, then of matrices that add up to ``total`` in
    ``depth`` rows from each lane; by lane, the words where its matrices begin."""
    weights = [np.full((rows, rows), around, np.int8)]
    offsets: dict[int, tuple[int, ...]] = {}
    for lane, blocks in sorted(blocks_of_lane):
        own = []
        for value in _summands(total):
            own.append(sum(map(len, weights)))
            constant = np.zeros((blocks * rows, rows), np.int8)
            constant[lane : lane + depth] = value
            weights.append(constant)
        offsets[lane] = tuple(own)
    return np.concatenate(weights), offsets


# Moving whole matrices ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Image:
    """A tensor as it is seen while matrices are moved."""

    name: str
    shape: Shape


def _separate_operand(
    context: LoweringContext, layer: int, op: MatMul
) -> tuple[Stage, LoweringContext, Matrices]:
    """The right operand with every matrix by itself: the stage that moves it, the context with the
    new tensor, and where the matrices are there.

    The new tensor's words are those of an image one block deep, a row for every block of every
    matrix."""
    rows, source = context.config.rows, context.tensors[op.b.tensor]
    places, which = np.unique(op.b.places, axis=0, return_inverse=True)
    blocks = layout.blocks_of(op.columns, rows)
    name = f"{op.output}:operand"
    _, _, h, w = source.shape
    seen, per_image = side_by_side(source.shape, (1, h * w), context.config)
    phases = []
    for n, c, p in places.tolist():
        for first in range(0, op.columns, rows):
            channels = np.full(rows, -1)
            count = min(rows, op.columns - first)
            channels[:count] = n * per_image + c + first + np.arange(count)
            phases.append([Pick(op.b.tensor, channels, offsets=(0, p))])
    output = _Image(name, (1, rows, len(phases), op.depth))
    moved = _move(
        context,
        layer,
        op,
        phases=phases,
        source=_Image(op.b.tensor, seen),
        output=output,
        zero=source.zero,
    )
    tensor = dataclasses.replace(source, name=name, shape=(len(places), blocks * rows, 1, op.depth))
    where = np.zeros((op.batch, 3), np.int64)
    where[:, 0] = which.reshape(-1)
    return moved, context.seeing(tensor), Matrices(name, where)


def _gather_results(context: LoweringContext, layer: int, op: MatMul, name: str) -> Stage:
    """The stage that brings results from ``name``, every matrix by itself, side by side."""
    rows, out = context.config.rows, context.tensors[op.output]
    blocks = layout.blocks_of(op.columns, rows)
    height = out.shape[2] * out.shape[3] // op.rows
    shape, per_image = side_by_side(out.shape, (height, op.rows), context.config)
    phases: list[list[Pick]] = [[] for _ in range(height)]
    for i, (n, c, p) in enumerate(op.places.tolist()):
        for block in range(blocks):
            channels = np.full(shape[1], -1)
            count = min(rows, op.columns - block * rows)
            first = n * per_image + c + block * rows
            channels[first : first + count] = np.arange(count)
            pick = Pick(name, channels, offsets=(i * blocks + block, 0))
            phases[p // op.rows].append(pick)
    seen = _Image(name, (1, rows, op.batch * blocks, op.rows))
    output = _Image(op.output, shape)
    return _move(context, layer, op, phases=phases, source=seen, output=output, zero=out.zero)


def _move(
    context: LoweringContext,
    layer: int,
    op: MatMul,
    *,
    phases: list[list[Pick]],
    source: _Image,
    output: _Image,
    zero: int,
) -> Stage:
    """A Select of one tensor, a phase for each row of the output; all of zero point ``zero``."""
    size = max(*source.shape[2:], *output.shape[2:])
    if size > MAX_DIM:
        raise ModelError(
            f"node {op.name}: its matrices do not begin with a word, and to move them takes an "
            f"image of {size} rows or columns: {MAX_DIM} is the limit"
        )
    like = dataclasses.replace(context.tensors[op.output], zero=zero)
    tensors = [dataclasses.replace(like, name=i.name, shape=i.shape) for i in (source, output)]
    select = Select(
        name=op.name,
        op_type=op.op_type,
        output=output.name,
        low=-128,
        high=127,
        phases=phases,
        steps=(len(phases), 1),
        fill=zero,
    )
    stage = lower_select(context.seeing(*tensors), layer, select)
    return dataclasses.replace(stage, striped=False)
