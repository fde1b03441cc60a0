"""Passes 3 and 4 on the graph: operators that need no pass over memory of their own.

Neither changes a result: the golden model gives the same bits with and without them.
"""

from __future__ import annotations

from dataclasses import replace

from sw.graph import Binary, Conv, Graph, Op, Pool, Residual


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
    return replace(graph, ops=ops, tensors=tensors)


def fuse_clamps(graph: Graph) -> Graph:
    """A 1x1 maximum pool (a clamp alone) of a tensor that nothing else reads joins the clamp of the
    operator that makes it."""
    uses = _uses(graph)
    ops: list[Op] = []
    place: dict[str, int] = {}
    for op in graph.ops:
        clamp = isinstance(op, Pool) and op.kind == "max" and op.pointwise
        if clamp and uses[op.x] == 1 and op.x in place:
            at = place[op.x]
            before = ops[at]
            low, high = (min(max(v, op.low), op.high) for v in (before.low, before.high))
            ops[at] = replace(before, output=op.output, low=low, high=high)
            place[op.output] = at
        else:
            place[op.output] = len(ops)
            ops.append(op)
    return _with_ops(graph, ops)


def fuse_residuals(graph: Graph) -> Graph:
    """An addition joins the ungrouped convolution whose output it alone reads, of two the later
    one, so that the other operand is ready. The convolution moves to the addition's place."""
    uses = _uses(graph)
    ops: list[Op | None] = list(graph.ops)
    place = {op.output: i for i, op in enumerate(graph.ops)}
    for i, op in enumerate(graph.ops):
        if not isinstance(op, Binary) or op.kind != "add":
            continue
        candidates = [
            (place[name], name)
            for name in (op.a, op.b)
            if uses[name] == 1 and name in place and _fusible(ops[place[name]])
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
        op_type=f"{conv.op_type}+{op.op_type}",
        output=op.output,
        low=op.low,
        high=op.high,
        residual=residual,
    )
