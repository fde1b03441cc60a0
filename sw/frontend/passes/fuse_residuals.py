"""Pass 5, fuse_residuals: additions in the convolution before them."""

from __future__ import annotations

from dataclasses import replace

from systole.sw.frontend.passes.graph_pass import PassResult, both_types, uses, with_ops
from systole.sw.ir.graph import Binary, Conv, Graph, Op, Residual


def fuse_residuals(graph: Graph) -> PassResult:
    """Fuses an addition of equal shapes into a convolution that computes one of its operands.

    The convolution must have one group and no residual yet, and only the addition may read its
    result. It moves to the place of the addition.

    1. One operand comes from such a convolution: it takes the other operand as its residual.
    2. Both do: the later convolution takes the result of the earlier one, which is ready then.
    3. Neither does: nothing."""
    count = uses(graph)
    ops: list[Op | None] = list(graph.ops)
    place = {op.output: i for i, op in enumerate(graph.ops)}
    for i, op in enumerate(graph.ops):
        if not isinstance(op, Binary) or op.kind != "add":
            continue
        if graph.tensors[op.a].shape != graph.tensors[op.b].shape:
            continue
        candidates = []
        for name in (op.a, op.b):
            conv = ops[place[name]] if name in place else None
            if isinstance(conv, Conv) and count[name] == 1 and _takes_residual(conv):
                candidates.append((place[name], conv))
        if candidates:
            at, conv = max(candidates, key=lambda c: c[0])
            ops[at], ops[i] = None, _with_residual(graph, conv, op)
    return with_ops(graph, [op for op in ops if op is not None])


def _takes_residual(conv: Conv) -> bool:
    return conv.group == 1 and conv.residual is None


def _with_residual(graph: Graph, conv: Conv, op: Binary) -> Conv:
    """``conv`` with the addition ``op`` of its result and another tensor."""
    first = op.a == conv.output
    ratios = (op.a_ratio, op.b_ratio) if first else (op.b_ratio, op.a_ratio)
    residual = Residual(
        other=op.b if first else op.a,
        mid_zero=graph.tensors[conv.output].zero,
        mid_low=conv.low,
        mid_high=conv.high,
        conv_ratio=ratios[0],
        other_ratio=ratios[1],
        mid_name=conv.output,
        name=op.name,
    )
    return replace(
        conv,
        op_type=both_types(conv, op),
        output=op.output,
        low=op.low,
        high=op.high,
        residual=residual,
    )
