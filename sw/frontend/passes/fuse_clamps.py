"""Pass 4, fuse_clamps: clamps in the operator before them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from systole.sw.frontend.passes.graph_pass import PassResult, uses, with_ops
from systole.sw.ir.graph import Graph, Op, Pool, Table, Transpose


def fuse_clamps(graph: Graph) -> PassResult:
    """Fuses a clamp (a maximum over one element) into the operator that computes its operand.

    The operand must not be read by anything else.

    1. Behind a Table: the table's values are clamped.
    2. Behind a Transpose, which cannot clamp: nothing.
    3. Behind any other operator, another clamp included: the clamp of that operator narrows."""
    count = uses(graph)
    ops: list[Op] = []
    place: dict[str, int] = {}
    for op in graph.ops:
        at = place.get(op.x) if isinstance(op, Pool) and op.is_clamp and count[op.x] == 1 else None
        if at is None or isinstance(ops[at], Transpose):
            place[op.output] = len(ops)
            ops.append(op)
        else:
            place[op.output] = at
            ops[at] = _clamped(ops[at], op)
    return with_ops(graph, ops)


def _clamped(op: Op, clamp: Op) -> Op:
    """``op`` with the result of ``clamp``."""
    if isinstance(op, Table):
        values = np.clip(op.values, clamp.low, clamp.high)
        return replace(op, output=clamp.output, values=values)
    low, high = (min(max(v, clamp.low), clamp.high) for v in (op.low, op.high))
    return replace(op, output=clamp.output, low=low, high=high)
