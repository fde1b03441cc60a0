"""Lowering of products of two activations.

MatMul is an array stage whose weights are the right operand's words in DRAM: features are the lanes
of a word, so that on a square array the words of a block are the rows of a matrix, ``cols`` columns
wide. It takes matrices that begin with a word:

* The left operand's may begin in any lane: zeros before the matrix' first row shift it (words of
  the zero point where the array takes that off).
* The right operand's that begin within a word are moved first, to a tensor that holds every matrix
  by itself, by a permutation as Select's. Results that end within a word are moved likewise,
  afterwards.

On an array that is not square the right operand is always moved, to words of activations that make
words of weights (:class:`_WeightWords`).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from systole.isa import Config
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
    for matrices that cannot be moved, or an array that cannot take them."""
    config = context.config
    stages: list[Stage] = []
    operand = _RightOperand(op.b.tensor, _spread(context, op.b, op.columns), config.cols)
    if config.rows != config.cols or (op.b.places[:, 1] % config.rows).any():
        moved, context, operand = _separate_operand(context, layer, op)
        stages.append(moved)
    complement = None
    if context.tensors[op.a.tensor].zero == -128 and not config.zero_points:
        complement = f"{op.output}:complement"
        stages.append(_complement(context, layer, op, operand.tensor, complement))
    if not (op.places[:, 1] % config.rows).any():
        spread = _spread(context, Matrices(op.output, op.places), op.columns)
        stage = _product_stage(context, layer, op, operand, spread=spread, complement=complement)
        return [*stages, stage]
    apart = dataclasses.replace(op, output=f"{op.output}:apart")
    seen = context.seeing(dataclasses.replace(context.tensors[op.output], name=apart.output))
    stages.append(_product_stage(seen, layer, apart, operand, complement=complement))
    return [*stages, _gather_results(context, layer, op, apart.output)]


@dataclass(frozen=True)
class _RightOperand:
    """The right operand as the array takes it."""

    tensor: str
    spread: Spread
    """In words of weights; ``words`` in words of activations."""
    columns: int
    """Those of a matrix in a word of weights, ``cols`` or fewer: then every block of columns is a
    matrix of its own."""


@dataclass(frozen=True)
class _WeightWords:
    """How words of activations, ``rows`` lanes in ``vector_bytes``, make words of weights, ``cols``
    lanes in ``weight_vector_bytes``, in DRAM."""

    side: int
    """Words of activations that lie side by side in a word of weights."""
    deep: int
    """Words of weights that lie one behind the other in a word of activations."""
    pitch: int
    """Lanes from one of those to the next."""
    columns: int
    """Columns of a matrix that find room in a word of weights."""

    @staticmethod
    def of(op: MatMul, config: Config) -> _WeightWords:
        """Raises :class:`ModelError` where words of weights do not fit in those of activations."""
        word, weights = config.vector_bytes, config.weight_vector_bytes
        if weights < word:
            deep = word // weights
            if config.rows < (deep - 1) * weights + config.cols:
                raise ModelError(
                    f"node {op.name}: a product of two activations needs an array whose rows are "
                    f"a power of two, or no more than its columns; this one has {config.rows} "
                    f"rows and {config.cols} columns"
                )
            return _WeightWords(1, deep, weights, config.cols)
        # Lanes beyond ``rows`` in a word of activations are no columns.
        columns = config.cols if config.rows == word else min(config.rows, config.cols)
        return _WeightWords(weights // word, 1, 0, columns)

    def picks(self, x: str, first: int, count: int, position: int, rows: int) -> list[list[Pick]]:
        """What makes ``count`` columns from channel ``first`` of ``x`` on, from ``position`` on, of
        the next words of activations: a list for each of ``side``, of a pick for each of ``deep``.
        """
        phases = []
        for at in range(0, self.side * rows, rows):
            own = min(rows, count - at, self.columns - at)
            picks = []
            for k in range(self.deep if own > 0 else 0):
                channels = np.full(rows, -1)
                channels[k * self.pitch :][:own] = first + at + np.arange(own)
                picks.append(Pick(x, channels, strides=(1, self.deep), offsets=(0, position + k)))
            phases.append(picks)
        return phases


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


def _complement(context: LoweringContext, layer: int, op: MatMul, operand: str, name: str) -> Stage:
    """The stage that makes -1 - w of the right ``operand``'s w: times -128 that is 128 * w + 128,
    and 128 is no int8."""
    values = (-1 - np.arange(-128, 128)).astype(np.int8)
    table = Table(
        name=op.name,
        op_type=op.op_type,
        output=name,
        low=-128,
        high=127,
        x=operand,
        values=values,
    )
    output = dataclasses.replace(context.tensors[operand], name=name)
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
    operand: _RightOperand,
    *,
    spread: Spread | None = None,
    complement: str | None = None,
) -> ArrayStage:
    """The product itself. ``spread``: where its results lie, if not one after the other."""
    config, tensors = context.config, context.tensors
    za, zb = tensors[op.a.tensor].zero, tensors[op.b.tensor].zero
    # The zero points that the array takes off, and those that take passes of their own.
    taken = (za, zb) if config.zero_points else (0, 0)
    za, zb = za - taken[0], zb - taken[1]
    # Matrices that the array sees in one of the operator's.
    parts = 1 if operand.columns == config.cols else -(-op.columns // operand.columns)
    columns = op.columns if parts == 1 else operand.columns
    a = _in_parts(_spread(context, op.a, op.depth), parts, apart=False)
    b = _in_parts(operand.spread, parts)
    lanes = (op.a.places[:, 1] % config.rows).repeat(parts)
    blocks_of_lane = set(zip(lanes.tolist(), a.blocks))
    weights, zeros = _constant_matrices(
        config, op.depth, blocks_of_lane, total=-zb, around=taken[1]
    )
    # Minus what a complement adds beside the product with the zero point.
    bias = np.full(columns, op.depth * (za * zb - 128 * bool(complement)), np.int64)
    scale = np.full(columns, op.scale, np.float32)
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
        batch=op.batch * parts,
        h=1,
        w=op.rows,
        out_h=1,
        out_w=op.rows,
        channels=columns,
        blocks=layout.blocks_of(columns, config.rows),
        group_words=config.cols // config.lanes if parts == 1 else 1,
        sources=(source,),
        phases=(Phase(0, 0, (), 0),),
        requant=context.requant(op, op.activation),
        weights=weights,
        params=context.params(op, bias, scale, config.lanes),
        table=context.table(op.activation),
        striped=False,
        product=Product(
            tensor=operand.tensor,
            complement=complement,
            spread=b,
            depth=op.depth,
            lanes=tuple(lanes.tolist()),
            pads=(za,) if complement else _summands(-za),
            zeros=zeros,
            input_zero=taken[0],
            weight_zero=taken[1],
        ),
        spread=spread and _in_parts(spread, parts),
    )


def _in_parts(spread: Spread, parts: int, *, apart: bool = True) -> Spread:
    """Each image as often as it has ``parts``: ``apart``, a block each."""
    if parts == 1:
        return spread
    step = spread.step if apart else 0
    return dataclasses.replace(
        spread,
        starts=tuple(start + k * step for start in spread.starts for k in range(parts)),
        blocks=tuple(1 if apart else n for n in spread.blocks for _ in range(parts)),
    )


def _constant_matrices(
    config: Config,
    depth: int,
    blocks_of_lane: set[tuple[int, int]],
    *,
    total: int,
    around: int,
) -> tuple[np.ndarray, dict[int, tuple[int, ...]]]:
    """Weight words (count, cols) of ``around``, then of matrices that add up to ``total`` in
    ``depth`` rows from each lane; by lane, the words where its matrices begin."""
    rows, cols = config.rows, config.cols
    weights = [np.full((rows, cols), around, np.int8)]
    offsets: dict[int, tuple[int, ...]] = {}
    for lane, blocks in sorted(blocks_of_lane):
        own = []
        for value in _summands(total):
            own.append(sum(map(len, weights)))
            constant = np.zeros((blocks * rows, cols), np.int8)
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
) -> tuple[Stage, LoweringContext, _RightOperand]:
    """The right operand with every matrix by itself: the stage that moves it, the context with the
    new tensor, and the operand there.

    The new tensor's words are those of an image one block deep, a row for every block of columns of
    every matrix."""
    config, source = context.config, context.tensors[op.b.tensor]
    words = _WeightWords.of(op, config)
    places, which = np.unique(op.b.places, axis=0, return_inverse=True)
    name = f"{op.output}:operand"
    _, _, h, w = source.shape
    seen, per_image = side_by_side(source.shape, (1, h * w), config)
    blocks = -(-op.columns // words.columns)
    phases = []
    for n, c, position in places.tolist():
        for first in range(0, op.columns, words.columns):
            channel, count = n * per_image + c + first, op.columns - first
            phases += words.picks(op.b.tensor, channel, count, position, config.rows)
    row = -(-op.depth // words.deep) * words.side
    output = _Image(name, (1, config.rows, len(places) * blocks, row))
    moved = _move(
        context,
        layer,
        op,
        phases=phases,
        steps=(len(places) * blocks, words.side),
        source=_Image(op.b.tensor, seen),
        output=output,
        zero=source.zero,
    )
    tensor = dataclasses.replace(source, name=name, shape=output.shape)
    step = row // words.side * words.deep
    spread = Spread(
        starts=tuple((which.reshape(-1) * blocks * step).tolist()),
        blocks=(blocks,) * op.batch,
        step=step,
        words=len(places) * blocks * row,
    )
    return moved, context.seeing(tensor), _RightOperand(name, spread, words.columns)


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
    return _move(
        context,
        layer,
        op,
        phases=phases,
        steps=(height, 1),
        source=seen,
        output=output,
        zero=out.zero,
    )


def _move(
    context: LoweringContext,
    layer: int,
    op: MatMul,
    *,
    phases: list[list[Pick]],
    steps: tuple[int, int],
    source: _Image,
    output: _Image,
    zero: int,
) -> Stage:
    """A Select of one tensor; all of zero point ``zero``."""
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
        steps=steps,
        fill=zero,
    )
    stage = lower_select(context.seeing(*tensors), layer, select)
    return dataclasses.replace(stage, striped=False)
