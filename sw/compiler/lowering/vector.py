"""Lowering of elementwise operators: POST from the scratchpad."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from systole.isa import PostOp
from systole.sw.compiler.lowering.context import LoweringContext, flattened, ratios
from systole.sw.compiler.stages import POINTWISE, Combine, Requant, Source, Stage, VectorStage
from systole.sw.ir.graph import Binary, Op, Table

BINARY_OPS = {"add": PostOp.ADD, "sub": PostOp.SUB, "mul": PostOp.MUL}


def lower_table(context: LoweringContext, layer: int, op: Table) -> Stage:
    """A function of every element."""
    values = np.clip(op.values, op.low, op.high)
    table = context.table_words(values)
    return _vector_stage(context, layer, op, combine=Combine(op=PostOp.NONE), table=table)


def lower_binary(context: LoweringContext, layer: int, op: Binary) -> Stage:
    """An addition, subtraction or product of two tensors, with its fused function."""
    result = context.requant(op, op.activation)
    zeros = (context.tensors[op.a].zero, context.tensors[op.b].zero)
    if op.kind == "mul":
        (ma,), shift = ratios(op, op.a_ratio)
        combine = Combine(
            op=PostOp.MUL,
            za=zeros[0],
            zb=zeros[1],
            zo=result.zero,
            ma=ma,
            shift=shift,
            low2=result.low,
            high2=result.high,
        )
    else:
        combine = add(op, result, zeros=zeros, scales=(op.a_ratio, op.b_ratio))
        combine = dataclasses.replace(combine, op=BINARY_OPS[op.kind])
    table = context.table(op.activation)
    return _vector_stage(context, layer, op, combine=combine, table=table)


def add(op: Op, result: Requant, *, zeros: tuple[int, int], scales: tuple[float, float]) -> Combine:
    """The addition of two operands with their zero points and scales relative to the result's."""
    (ma, mb), shift = ratios(op, *scales)
    return Combine(
        op=PostOp.ADD,
        za=zeros[0],
        zb=zeros[1],
        zo=result.zero,
        ma=ma,
        mb=mb,
        shift=shift,
        low2=result.low,
        high2=result.high,
    )


def _vector_stage(
    context: LoweringContext,
    layer: int,
    op: Table | Binary,
    *,
    combine: Combine,
    table: np.ndarray | None,
) -> VectorStage:
    """The stage of an operator whose inputs are POST's operands, in order."""
    n, channels, *_ = context.tensors[op.output].shape
    h, w = flattened(context.size(op.output))
    sources = tuple(_operand(context, op, name) for name in op.inputs)
    return VectorStage(
        layer=layer,
        op=op,
        batch=n,
        h=h,
        w=w,
        out_h=h,
        out_w=w,
        channels=channels,
        blocks=sources[0].blocks,
        group_words=1,
        sources=sources,
        combine=combine,
        table=table,
    )


def _operand(context: LoweringContext, op: Op, name: str) -> Source:
    """An input as POST's operand; one pixel may stand for all."""
    size = context.size(op.output)
    single = math.prod(context.size(name)) == 1 != math.prod(size)
    seen = (1, 1) if single else flattened(size)
    source = context.source(name, [POINTWISE], seen, per_group=True)
    return dataclasses.replace(source, broadcast=single)
