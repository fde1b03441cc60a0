"""What the passes on the graph have in common.

A pass is a function of a graph, known by its own name. None changes a result: the golden model
gives the same bits with and without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from systole.sw.ir.graph import Graph, Op


class PassResult(NamedTuple):
    """A pass' graph, and whether it differs from the one the pass was given."""

    graph: Graph
    changed: bool


Pass = Callable[[Graph], PassResult]


def uses(graph: Graph) -> dict[str, int]:
    """How often each tensor is read, by operators or as an output of the graph."""
    count = dict.fromkeys(graph.tensors, 0)
    for name in [x for op in graph.ops for x in op.inputs] + [p.tensor for p in graph.outputs]:
        count[name] += 1
    return count


def with_ops(graph: Graph, ops: Sequence[Op]) -> PassResult:
    """The graph with other operators, without the tensors that no longer exist."""
    kept = {name for op in ops for name in (op.output, *op.inputs)}
    tensors = {name: t for name, t in graph.tensors.items() if name in kept}
    same_ops = len(ops) == len(graph.ops) and all(a is b for a, b in zip(ops, graph.ops))
    if same_ops and len(tensors) == len(graph.tensors):
        return PassResult(graph, changed=False)
    constants = {name: array for name, array in graph.constants.items() if name in kept}
    changed = replace(graph, ops=list(ops), tensors=tensors, constants=constants)
    return PassResult(changed, changed=True)


def both_types(first: Op, second: Op) -> str:
    """The ``op_type`` of two operators that became one."""
    return f"{first.op_type}+{second.op_type}"
