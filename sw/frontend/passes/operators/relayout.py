"""Operators that move no data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from systole.sw.frontend.passes.layout import LayoutError, OnnxView
from systole.sw.frontend.passes.operators.registry import operator
from systole.sw.frontend.passes.state import LoweringState
from systole.sw.frontend.passes.values import (
    Const,
    Dequantised,
    Node,
    QuantConst,
    Quantised,
    Value,
    Variable,
)


def relayout(
    state: LoweringState, node: Node, value: Value | None, change: Callable[[OnnxView], OnnxView]
) -> Value:
    """An activation or a constant seen in another shape. No data move, unless it was transposed
    before."""
    if isinstance(value, QuantConst):
        return _constant(node, value, change)
    if not isinstance(value, Variable):
        raise node.fail("its operand must be an activation")
    try:
        return replace(value, view=change(value.view))
    except LayoutError as e:
        if not isinstance(value, Quantised | Dequantised):
            value = state.operands.early(node, value, 0)
        if value is None:
            raise node.fail(f"{e} without moving data") from None
    try:
        shape = change(OnnxView.contiguous(value.view.shape)).shape
    except LayoutError as e:
        raise node.fail(str(e)) from None
    return state.mover.rearranged(node, value, state.tensors.positions(value).reshape(shape))


def _constant(node: Node, value: QuantConst, change: Callable[[OnnxView], OnnxView]) -> QuantConst:
    shape, axis = value.array.shape, value.axis
    try:
        reshaped = change(OnnxView.contiguous(shape)).shape
    except LayoutError as e:
        raise node.fail(str(e)) from None
    if max(value.scale.size, value.zero.size) > 1:
        # The scales' axis must still be one.
        before, size = math.prod(shape[:axis]), shape[axis]
        same = [
            i
            for i in range(len(reshaped))
            if (math.prod(reshaped[:i]), reshaped[i]) == (before, size)
        ]
        if not same:
            raise node.fail(
                f"it would reshape a constant {list(shape)} with scales along axis {axis} to "
                f"{list(reshaped)}, where no axis holds them"
            )
        axis = same[0]
    return QuantConst(value.array.reshape(reshaped), value.scale, value.zero, axis)


@operator("Identity", "Dropout")
def identity(state: LoweringState, node: Node) -> Value:
    """Removed: the result is the first operand."""
    value = state.results.operand(node, 0)
    if value is None:
        raise node.fail("its operand is missing")
    return value


@operator("Transpose")
def transpose(state: LoweringState, node: Node) -> Value:
    """Permutes any axes. It moves no data itself: an operator that cannot read the transposed
    order has the elements moved before it. They must move in a regular order, as those of a Slice,
    or exchange channels and positions (by the window engine, of at most 63 rows)."""
    value = state.results.operand(node, 0)
    if isinstance(value, QuantConst):
        perm = _perm(node, value.array.ndim)
        axis = perm.index(value.axis)
        return QuantConst(value.array.transpose(perm), value.scale, value.zero, axis)
    if isinstance(value, Const):
        return Const(value.array.transpose(_perm(node, value.array.ndim)))
    return relayout(state, node, value, lambda view: view.transpose(_perm(node, len(view.shape))))


def _perm(node: Node, rank: int) -> tuple[int, ...]:
    perm = node.integers("perm", tuple(reversed(range(rank))), low=0, count=rank)
    if sorted(perm) != list(range(rank)):
        raise node.fail(f"perm = {list(perm)}: it must be a permutation of 0..{rank - 1}")
    return perm


@operator("Reshape")
def reshape(state: LoweringState, node: Node) -> Value:
    """Reshapes an activation or a constant to a constant shape."""
    given = state.results.const(node, 1, "shape")
    if given is None:
        raise node.fail("shape is missing")
    wanted = [int(d) for d in given.reshape(-1)]

    def change(view: OnnxView) -> OnnxView:
        dims = list(wanted)
        for i, dim in enumerate(dims):
            if dim == 0 and not node.integer("allowzero", 0) and i < len(view.shape):
                dims[i] = view.shape[i]
        if dims.count(-1) == 1:
            known = math.prod(d for d in dims if d != -1)
            dims[dims.index(-1)] = math.prod(view.shape) // known if known > 0 else 0
        if any(d < 1 for d in dims):
            raise node.fail(f"shape = {wanted} does not fit operand {list(view.shape)}")
        return view.reshape(dims)

    return relayout(state, node, state.results.operand(node, 0), change)


@operator("Flatten")
def flatten(state: LoweringState, node: Node) -> Value:
    """Flattens an activation or a constant at any ``axis``."""

    def change(view: OnnxView) -> OnnxView:
        rank, axis = len(view.shape), node.integer("axis", 1)
        if not -rank <= axis <= rank:
            raise node.fail(f"axis = {axis}: it must be in {-rank}..{rank}")
        axis += rank if axis < 0 else 0
        return view.reshape((math.prod(view.shape[:axis]), math.prod(view.shape[axis:])))

    return relayout(state, node, state.results.operand(node, 0), change)


@operator("Squeeze", "Unsqueeze")
def squeeze(state: LoweringState, node: Node) -> Value:
    """Takes an activation or a constant. The axes are constant, given as an input or an
    attribute."""
    axes = node.integers("axes", None)
    if axes is None:
        given = state.results.const(node, 1, "axes")
        axes = None if given is None else tuple(int(a) for a in given.reshape(-1))

    def change(view: OnnxView) -> OnnxView:
        shape = list(view.shape)
        if node.op_type == "Squeeze":
            gone = range(len(shape)) if axes is None else _axes(node, axes, len(shape))
            if axes is not None and any(shape[a] != 1 for a in gone):
                raise node.fail(f"axes = {list(axes)} of operand {shape}: each must have size 1")
            return view.reshape([d for i, d in enumerate(shape) if d != 1 or i not in gone])
        for axis in sorted(_axes(node, axes or (), len(shape) + len(axes or ()))):
            shape.insert(axis, 1)
        return view.reshape(shape)

    return relayout(state, node, state.results.operand(node, 0), change)


def _axes(node: Node, axes: tuple[int, ...], rank: int) -> list[int]:
    if any(not -rank <= a < rank for a in axes):
        raise node.fail(f"axes = {list(axes)}: each must be in {-rank}..{rank - 1}")
    return [a % rank for a in axes]
