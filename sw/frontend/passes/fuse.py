"""Passes on the graph: operators that need no pass over memory of their own.

None changes a result: the golden model gives the same bits with and without them.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from systole.isa import numerics
from systole.sw.ir.graph import (
    Activation,
    Binary,
    Conv,
    ConvTranspose,
    Graph,
    MatMul,
    Op,
    Pool,
    Residual,
    Table,
    Transpose,
)

ACTIVATED = Conv | ConvTranspose | Binary | MatMul
"""Operators that a table can join."""


def _uses(graph: Graph) -> dict[str, int]:
    """How often each tensor is read, by operators or as an output of the graph."""
    uses = dict.fromkeys(graph.tensors, 0)
    for name in [x for op in graph.ops for x in op.inputs] + [p.tensor for p in graph.outputs]:
        uses[name] += 1
    return uses


def _with_ops(graph: Graph, ops: list[Op]) -> Graph:
    """The graph with other operators, without the tensors that no longer exist."""
    kept = {name for op in ops for name in (op.output, *op.inputs)}
    tensors = {name: t for name, t in graph.tensors.items() if name in kept}
    constants = {name: array for name, array in graph.constants.items() if name in kept}
    return replace(graph, ops=ops, tensors=tensors, constants=constants)


def drop_unused(graph: Graph) -> Graph:
    """Without the operators whose result nothing reads."""
    wanted = {p.tensor for p in graph.outputs}
    ops: list[Op] = []
    for op in reversed(graph.ops):
        if op.output in wanted:
            ops.append(op)
            wanted.update(op.inputs)
    return _with_ops(graph, ops[::-1])


def fuse_clamps(graph: Graph) -> Graph:
    """A 1x1 maximum pool (a clamp alone) of a tensor that nothing else reads joins the clamp of the
    operator that makes it, or the values of the table."""
    uses = _uses(graph)
    ops: list[Op] = []
    place: dict[str, int] = {}
    for op in graph.ops:
        clamp = isinstance(op, Pool) and op.kind == "max" and op.pointwise
        at = place.get(op.x) if clamp and uses[op.x] == 1 else None
        before = None if at is None else ops[at]
        if before is not None and not isinstance(before, Transpose):
            low, high = (min(max(v, op.low), op.high) for v in (before.low, before.high))
            if isinstance(before, Table):
                values = np.clip(before.values, op.low, op.high)
                ops[at] = replace(before, output=op.output, values=values)
            else:
                ops[at] = replace(before, output=op.output, low=low, high=high)
            place[op.output] = at
        else:
            place[op.output] = len(ops)
            ops.append(op)
    return _with_ops(graph, ops)


def fuse_residuals(graph: Graph) -> Graph:
    """An addition (of equal shapes) joins the ungrouped convolution whose output it alone reads, of
    two the later one, so that the other operand is ready. The convolution moves to the addition's
    place."""
    uses = _uses(graph)
    ops: list[Op | None] = list(graph.ops)
    place = {op.output: i for i, op in enumerate(graph.ops)}
    for i, op in enumerate(graph.ops):
        if not isinstance(op, Binary) or op.kind != "add":
            continue
        same = graph.tensors[op.a].shape == graph.tensors[op.b].shape
        candidates = [
            (place[name], name)
            for name in (op.a, op.b)
            if same and uses[name] == 1 and name in place and _fusible(ops[place[name]])
        ]
        if candidates:
            at, name = max(candidates)
            ops[at], ops[i] = None, _fused(graph, ops[at], op, name)
    return _with_ops(graph, [op for op in ops if op is not None])


def _fusible(op: Op | None) -> bool:
    return isinstance(op, Conv) and op.group == 1 and op.residual is None


def _fused(graph: Graph, conv: Conv, op: Binary, mid: str) -> Conv:
    first = op.a == mid
    ratios = (op.a_ratio, op.b_ratio) if first else (op.b_ratio, op.a_ratio)
    residual = Residual(
        other=op.b if first else op.a,
        mid_zero=graph.tensors[mid].zero,
        mid_low=conv.low,
        mid_high=conv.high,
        conv_ratio=ratios[0],
        other_ratio=ratios[1],
        mid_name=mid,
        name=op.name,
    )
    return replace(
        conv,
        op_type=_both(conv, op),
        output=op.output,
        low=op.low,
        high=op.high,
        residual=residual,
    )


def fuse_activations(graph: Graph) -> Graph:
    """A table of a tensor that nothing else reads joins the convolution, product or arithmetic that
    makes it; behind another table, or one that has joined, it becomes one with it."""
    uses = _uses(graph)
    ops: list[Op] = []
    place: dict[str, int] = {}
    for op in graph.ops:
        at = place.get(op.x) if isinstance(op, Table) and uses[op.x] == 1 else None
        before = None if at is None else ops[at]
        if isinstance(before, Table):
            values = numerics.lookup(before.values, op.values)
            ops[at] = replace(before, op_type=_both(before, op), output=op.output, values=values)
        elif isinstance(before, ACTIVATED):
            activation = Activation(op.x, graph.tensors[op.x].zero, op.values)
            if before.activation is not None:
                values = numerics.lookup(before.activation.values, op.values)
                activation = replace(before.activation, values=values)
            types = {"op_type": _both(before, op), "output": op.output}
            ops[at] = replace(before, **types, activation=activation)
        else:
            at = len(ops)
            ops.append(op)
        place[op.output] = at
    return _with_ops(graph, ops)


def _both(first: Op, second: Op) -> str:
    return f"{first.op_type}+{second.op_type}"
