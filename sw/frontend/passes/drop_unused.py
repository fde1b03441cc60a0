"""Pass 3, drop_unused: operators whose result nothing reads."""

from __future__ import annotations

from systole.sw.frontend.passes.graph_pass import PassResult, with_ops
from systole.sw.ir.graph import Graph, Op


def drop_unused(graph: Graph) -> PassResult:
    """Drops what no output of the graph depends on.

    1. An operator whose result neither an operator that stays nor an output reads.
    2. A tensor or constant that only such operators read or write."""
    wanted = {p.tensor for p in graph.outputs}
    ops: list[Op] = []
    for op in reversed(graph.ops):
        if op.output in wanted:
            ops.append(op)
            wanted.update(op.inputs)
    return with_ops(graph, ops[::-1])
