"""Pass 7, fuse_pads: padding with zero in the convolution that reads it."""

from __future__ import annotations

from dataclasses import replace

from systole.sw.frontend.passes.graph_pass import PassResult, both_types, uses, with_ops
from systole.sw.frontend.passes.moves import is_identity
from systole.sw.ir.graph import Conv, Graph, Op, Pick, Select


def fuse_pads(graph: Graph) -> PassResult:
    """Fuses a Select that only pads rows and columns with zero into the convolutions that read it.

    Nothing else must read it, and the kernels must be larger than the padding of each side."""
    pads = {op.output: op for op in graph.ops if _only_pads(graph, op)}
    count = uses(graph)
    for op in graph.ops:
        if isinstance(op, Conv) and op.x in pads and _takes(graph, op, pads[op.x]):
            count[op.x] -= 1
    fused = {name: op for name, op in pads.items() if count[name] == 0}
    ops: list[Op] = []
    for op in graph.ops:
        if isinstance(op, Conv) and op.x in fused:
            ops.append(_with_pads(graph, op, fused[op.x]))
        elif op.output not in fused:
            ops.append(op)
    return with_ops(graph, ops)


def _pick(op: Op) -> Pick | None:
    """The only pick of a Select that has one and keeps its codes."""
    if not isinstance(op, Select) or (op.low, op.high) != (-128, 127) or len(op.phases) != 1:
        return None
    picks = op.phases[0]
    return picks[0] if len(picks) == 1 and picks[0].scale == 1 and not op.flat else None


def _only_pads(graph: Graph, op: Op) -> bool:
    pick = _pick(op)
    if pick is None:
        return False
    assert isinstance(op, Select)
    source, tensor = graph.tensors[pick.x], graph.tensors[op.output]
    still = replace(op, phases=[[replace(pick, offsets=(0, 0))]])
    inside = (*source.shape[:2], *tensor.shape[2:])
    return (
        source.zero == tensor.zero
        and is_identity(still, tensor.shape, inside)
        and all(p >= 0 for p in _pads(graph, op))
    )


def _pads(graph: Graph, op: Op) -> tuple[int, int, int, int]:
    """What the Select adds at the top, left, bottom and right; negative where it cuts."""
    pick = _pick(op)
    assert pick is not None
    (top, left), (h, w) = (-o for o in pick.offsets), graph.tensors[pick.x].shape[2:]
    rows, columns = graph.tensors[op.output].shape[2:]
    return top, left, rows - h - top, columns - w - left


def _takes(graph: Graph, conv: Conv, pad: Op) -> bool:
    """Whether the kernel of ``conv`` is larger than its padding with that of ``pad``."""
    pads = _with_pads(graph, conv, pad).pads
    kernel = conv.weights.shape[2:]
    return all(p < (k - 1) * d + 1 for p, k, d in zip(pads, kernel * 2, conv.dilations * 2))


def _with_pads(graph: Graph, conv: Conv, pad: Op) -> Conv:
    top, left, bottom, right = map(sum, zip(conv.pads, _pads(graph, pad)))
    (x,) = pad.inputs
    return replace(conv, op_type=both_types(pad, conv), x=x, pads=(top, left, bottom, right))
