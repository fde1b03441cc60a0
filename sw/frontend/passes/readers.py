"""How the operators behind a graph input read it: the order of its axes in which it is best stored
where the first operator that reads it takes any."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from systole.sw.frontend.passes.values import Node

IMAGES = frozenset(
    ("Conv", "ConvTranspose", "QLinearConv", "MaxPool", "AveragePool", "QLinearAveragePool")
    + ("GlobalAveragePool", "QLinearGlobalAveragePool", "GlobalMaxPool", "BatchNormalization")
    + ("InstanceNormalization", "DepthToSpace", "SpaceToDepth")
)
"""Operators that take the second axis for channels."""
ROWS = frozenset(("MatMul", "QLinearMatMul", "MatMulInteger"))
"""Operators that take the last axis for channels."""
ANY = frozenset(
    ("QuantizeLinear", "DequantizeLinear", "Identity", "Dropout", "Pad", "Slice", "Concat", "Split")
    + ("Add", "Sub", "Mul", "Div", "QLinearAdd", "QLinearMul", "Max", "Min", "Clip", "Relu")
    + ("LeakyRelu", "QLinearLeakyRelu", "PRelu", "Sigmoid", "QLinearSigmoid", "Tanh", "HardSwish")
    + (
        "HardSigmoid",
        "Elu",
        "Gelu",
        "Abs",
        "Neg",
        "Sqrt",
        "Pow",
        "Erf",
        "Exp",
        "Resize",
        "Upsample",
    )
    + ("QLinearConcat",)
)
"""Operators whose results have the axes of their operand, whatever they mean."""


def order_of_axes(value: ir.Value, rank: int) -> tuple[int, ...] | None:
    """The axes of ``value``, of rank 3 or 4, in the order images, channels, positions, as the
    nearest operator behind it that takes one for channels reads them. None if there is none."""
    if rank not in (3, 4):
        return None
    seen: set[tuple[str, tuple[int, ...]]] = set()
    todo = [(value, tuple(range(rank)))]
    while todo:
        at, axes = todo.pop(0)
        if (at.name or "", axes) in seen:
            continue
        seen.add((at.name or "", axes))
        for user, _ in at.uses():
            if user.op_type in IMAGES:
                return axes
            if user.op_type in ROWS and rank == 4:
                return (axes[0], axes[-1], *axes[1:-1])
            todo += [(out, reordered) for out, reordered in _behind(user, axes)]
    return None


def _behind(user: ir.Node, axes: tuple[int, ...]) -> Iterator[tuple[ir.Value, tuple[int, ...]]]:
    """The results of a node whose operand has ``axes``, with theirs."""
    if user.op_type == "Transpose":
        perm = Node(user).integers("perm", tuple(reversed(range(len(axes)))))
        if sorted(perm) != list(range(len(axes))):
            return
        axes = tuple(axes[p] for p in perm)
    elif user.op_type not in ANY:
        return
    for output in user.outputs:
        yield output, axes
