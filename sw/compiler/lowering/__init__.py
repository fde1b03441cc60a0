"""Lowering: each operator of the graph becomes a stage with the constants its engines read.

Tensors that only bring channels of others together are left out before
(:mod:`~sw.compiler.joins`). Cases, in order:

1. Conv, depthwise, weights int8 (with ``zero_points``: with any zero point), no addition, window
   engine present: WINDOW; a fused function is then a stage of its own, POST from the scratchpad
   (``window``).
2. Conv on a packed graph input: WINDOW IM2COL, then CONV over the folded reduction, then POST
   (``folding``).
3. Any other Conv (groups spread out, blocks of zero weights left out; weights beyond int8 as the
   sum of two passes): CONV, then POST (``convolution``).
4. ConvTranspose: one phase of plain convolution for each output position modulo the stride
   (``convolution``).
5. Select: convolutions by permutation matrices (``selection``).
6. Pool: WINDOW, MAX or SUM (``window``).
7. Binary, Table: POST from the scratchpad (``vector``).
8. Softmax, Normalise: WINDOW's row operations (``row``).
9. MatMul (``products``), Transpose (``transposition``).

A stage whose geometry is pointwise sees its images flattened to one row.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from systole.isa import Config
from systole.isa.numerics import lookup
from systole.sw.compiler.joins import JoinedGraph, Replacement, join, windowed
from systole.sw.compiler.lowering.checks import check_limits
from systole.sw.compiler.lowering.context import LoweringContext
from systole.sw.compiler.lowering.convolution import lower_conv, lower_transposed
from systole.sw.compiler.lowering.folding import packed_inputs
from systole.sw.compiler.lowering.products import lower_product
from systole.sw.compiler.lowering.row import lower_normalise, lower_softmax
from systole.sw.compiler.lowering.selection import lower_select
from systole.sw.compiler.lowering.transposition import lower_transpose
from systole.sw.compiler.lowering.vector import lower_binary, lower_table
from systole.sw.compiler.lowering.window import lower_depthwise, lower_pool, own_result
from systole.sw.compiler.stages import ArrayStage, Stage, VectorStage
from systole.sw.ir.graph import (
    Binary,
    Conv,
    ConvTranspose,
    Graph,
    MatMul,
    Normalise,
    Op,
    Pool,
    Select,
    Softmax,
    Table,
    Transpose,
)


@dataclass(frozen=True)
class Lowering:
    """A graph lowered for a configuration."""

    graph: Graph
    """The graph, with the tensors that only the program has."""
    stages: list[Stage]
    packed: frozenset[str]
    """Graph inputs that are kept packed."""
    joined: JoinedGraph
    """The graph without its virtual tensors."""


def lower(graph: Graph, config: Config) -> Lowering:
    """Raises :class:`ModelError` for what the configuration's engines cannot do."""
    packed = packed_inputs(graph, config)
    joined = join(graph, config)
    tensors = dict(joined.graph.tensors)
    for _, op in joined.ops:
        if isinstance(op, Conv) and windowed(op, config) and op.activation is not None:
            own = own_result(tensors[op.output], op.activation)
            tensors[own.name] = own
    context = LoweringContext(config, tensors, packed, joined.parts)
    for op in joined.graph.ops:
        check_limits(op, tensors)
    stages: list[Stage] = []
    for layer, op in joined.ops:
        stages += _lower(context, layer, op)
        replacement = joined.replacements.get(op.output)
        if replacement is not None:
            stages[-1] = _with_function(context, stages[-1], replacement)
    return Lowering(dataclasses.replace(joined.graph, tensors=tensors), stages, packed, joined)


def _lower(context: LoweringContext, layer: int, op: Op) -> list[Stage]:
    """The stages of one operator."""
    match op:
        case Conv() if windowed(op, context.config):
            return lower_depthwise(context, layer, op)
        case Conv():
            return [lower_conv(context, layer, op)]
        case ConvTranspose():
            return [lower_transposed(context, layer, op)]
        case Select():
            return [lower_select(context, layer, op)]
        case Pool():
            return [lower_pool(context, layer, op)]
        case Binary():
            return [lower_binary(context, layer, op)]
        case Table():
            return [lower_table(context, layer, op)]
        case Softmax():
            return [lower_softmax(context, layer, op)]
        case Normalise():
            return [lower_normalise(context, layer, op)]
        case MatMul():
            return lower_product(context, layer, op)
        case Transpose():
            return [lower_transpose(context, layer, op)]
    raise TypeError(f"no lowering of {type(op).__name__}")


def _with_function(context: LoweringContext, stage: Stage, replacement: Replacement) -> Stage:
    """The stage with its table composed with a function: it makes that one's tensor instead."""
    assert isinstance(stage, ArrayStage | VectorStage), "only POST has a table"
    values = replacement.table
    if stage.table is not None:
        values = lookup(stage.table.reshape(-1)[:256], values)
    op = dataclasses.replace(stage.op, output=replacement.tensor)
    return dataclasses.replace(stage, op=op, table=context.table_words(values))
