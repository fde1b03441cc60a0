"""Pass 8, fuse_cuts: channels of a tensor where they are, for products and transpositions."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from systole.sw.frontend.passes.graph_pass import PassResult, uses, with_ops
from systole.sw.ir.graph import Graph, MatMul, Matrices, Op, Select, Transpose


class _Cut(NamedTuple):
    """Consecutive channels of a tensor."""

    tensor: str
    first: int


def fuse_cuts(graph: Graph) -> PassResult:
    """Products and transpositions read their channels in the tensor that a Select takes them from.

    The Select must take consecutive channels whole and change no code. It goes where nothing else
    reads it."""
    cuts = {op.output: cut for op in graph.ops if (cut := _cut(graph, op)) is not None}
    read = [_through(op, cuts) for op in graph.ops]
    count = uses(replace(graph, ops=read))
    kept = (op for op in read if op.output not in cuts or count[op.output])
    return with_ops(graph, list(kept))


def _cut(graph: Graph, op: Op) -> _Cut | None:
    """What a Select takes, if that is all that it does."""
    if not isinstance(op, Select) or (op.low, op.high) != (-128, 127) or op.across_images:
        return None
    if op.steps != (1, 1) or len(op.phases[0]) != 1:
        return None
    (pick,) = op.phases[0]
    if (pick.scale, pick.weight, pick.strides, pick.offsets) != (1, 1, (1, 1), (0, 0)):
        return None
    first, (n, c, h, w) = int(pick.channels[0]), graph.tensors[op.output].shape
    source = graph.tensors[pick.x]
    alike = source.zero == graph.tensors[op.output].zero and source.shape[0] == n
    if not alike or source.shape[2:] != (h, w) or first < 0:
        return None
    whole = np.array_equal(pick.channels, np.arange(first, first + c))
    return _Cut(pick.x, first) if whole else None


def _through(op: Op, cuts: dict[str, _Cut]) -> Op:
    """The operator, reading through the cuts among its operands."""
    if isinstance(op, Transpose) and op.x in cuts:
        cut = cuts[op.x]
        return replace(op, x=cut.tensor, first=op.first + cut.first)
    if isinstance(op, MatMul):
        a, b = (_moved(each, cuts) for each in (op.a, op.b))
        if (a, b) != (op.a, op.b):
            return replace(op, a=a, b=b)
    return op


def _moved(operand: Matrices, cuts: dict[str, _Cut]) -> Matrices:
    cut = cuts.get(operand.tensor)
    if cut is None:
        return operand
    return Matrices(cut.tensor, operand.places + (0, cut.first, 0))
