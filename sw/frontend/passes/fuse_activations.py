"""Pass 6, fuse_activations: tables in the operator before them."""

from __future__ import annotations

from dataclasses import replace

from systole.isa import numerics
from systole.sw.frontend.passes.graph_pass import PassResult, both_types, uses, with_ops
from systole.sw.ir.graph import (
    Activation,
    Binary,
    Conv,
    ConvTranspose,
    Graph,
    MatMul,
    Op,
    Table,
)

Activated = Conv | ConvTranspose | Binary | MatMul
"""Operators that take a table."""


def fuse_activations(graph: Graph) -> PassResult:
    """Fuses a Table into the operator that computes its operand.

    The operand must not be read by anything else.

    1. Behind a convolution, product or arithmetic: the table becomes its activation.
    2. Behind one that has an activation already: the two tables become one.
    3. Behind another Table: the two become one.
    4. Behind any other operator: nothing."""
    count = uses(graph)
    ops: list[Op] = []
    place: dict[str, int] = {}
    for op in graph.ops:
        at = place.get(op.x) if isinstance(op, Table) and count[op.x] == 1 else None
        fused = _fused(graph, ops[at], op) if at is not None and isinstance(op, Table) else None
        if at is None or fused is None:
            place[op.output] = len(ops)
            ops.append(op)
        else:
            place[op.output] = at
            ops[at] = fused
    return with_ops(graph, ops)


def _fused(graph: Graph, before: Op, table: Table) -> Op | None:
    """``before`` with ``table`` behind it; None if it takes none."""
    op_type = both_types(before, table)
    if isinstance(before, Table):
        values = numerics.lookup(before.values, table.values)
        return replace(before, op_type=op_type, output=table.output, values=values)
    if not isinstance(before, Activated):
        return None
    if before.activation is None:
        activation = Activation(table.x, graph.tensors[table.x].zero, table.values)
    else:
        values = numerics.lookup(before.activation.values, table.values)
        activation = replace(before.activation, values=values)
    return replace(before, op_type=op_type, output=table.output, activation=activation)
