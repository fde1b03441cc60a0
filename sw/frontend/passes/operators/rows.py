"""Softmax and normalisation over the channels of every position."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from systole.isa.commands import MAX_FEATURES
from systole.sw.frontend.passes.layout import OnnxView
from systole.sw.frontend.passes.operators.registry import operator
from systole.sw.frontend.passes.state import LoweringState
from systole.sw.frontend.passes.values import Const, Dequantised, Node, Pending, QuantConst, Value
from systole.sw.ir.graph import Normalise, Softmax

EPSILON = 1e-5
"""What is added to a variance by default."""
ROWS_FROM = 13
"""The first opset in which Softmax has one axis."""


ROW_OPERATORS = frozenset(
    ("Softmax", "LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
)
"""What only machines with row operations do."""


@operator("Softmax")
def softmax(state: LoweringState, node: Node) -> Value:
    """Takes a dequantised activation.
    Its axis has at most 4096 elements; before opset 13 it is the last."""
    x = state.operands.activation(node, 0)
    rank, old = len(x.view.shape), state.opsets.get("", ROWS_FROM) < ROWS_FROM
    axis = node.integer("axis", 1 if old else -1)
    if not -rank <= axis < rank:
        raise node.fail(f"axis = {axis}: it must be in {-rank}..{rank - 1}")
    axis %= rank
    if old and axis != rank - 1 and math.prod(x.view.shape[axis + 1 :]) > 1:
        raise node.fail(f"axis = {axis}: before opset 13 it must be the last, {rank - 1}")
    x = _in_rows(state, node, x, axis)
    one = np.float32(1)
    op = Softmax(**node.fields(), x=x.tensor, x_scale=x.scale, y_scale=one)
    return _result(state, op, x)


@operator("LayerNormalization")
def layer_normalisation(state: LoweringState, node: Node) -> Value:
    """Takes a dequantised activation.
    Scale and bias are constants. The axes from ``axis`` on have at most 4096 elements. Only the
    first output is used."""
    return _normalised(state, node, centred=True)


@operator("RMSNormalization", "SimplifiedLayerNormalization")
def rms_normalisation(state: LoweringState, node: Node) -> Value:
    """Takes a dequantised activation.
    Scale is a constant. The axes from ``axis`` on have at most 4096 elements. Only the first output
    is used."""
    return _normalised(state, node, centred=False)


def _normalised(state: LoweringState, node: Node, *, centred: bool) -> Pending:
    if any(output.uses() or output.is_graph_output() for output in node.raw.outputs[1:]):
        raise node.fail("its mean or deviation is used: only its first output may be")
    x = state.operands.activation(node, 0)
    rank, shape = len(x.view.shape), x.view.shape
    axis = node.integer("axis", -1)
    if not -rank <= axis < rank:
        raise node.fail(f"axis = {axis}: it must be in {-rank}..{rank - 1}")
    axis %= rank
    features = math.prod(shape[axis:])
    together = replace(x, view=x.view.reshape((*shape[:axis], features)))
    rows = _in_rows(state, node, together, axis)
    gain = _parameter(state, node, 1, "scale", shape[axis:])
    shift = _parameter(state, node, 2, "bias", shape[axis:]) if centred else np.zeros(features)
    op = Normalise(
        **node.fields(),
        x=rows.tensor,
        gain=gain,
        shift=shift,
        epsilon=node.real("epsilon", EPSILON),
        centred=centred,
        x_scale=rows.scale,
        y_scale=np.float32(1),
    )
    result = _result(state, op, rows)
    return replace(result, view=result.view.reshape(shape))


def _parameter(
    state: LoweringState, node: Node, index: int, name: str, shape: tuple[int, ...]
) -> np.ndarray:
    """A parameter of a normalisation, float64 by channel; a bias may be left out."""
    value = state.results.operand(node, index)
    if value is None and index > 1:
        return np.zeros(math.prod(shape))
    if isinstance(value, QuantConst):
        array = value.real
    elif isinstance(value, Const) and np.issubdtype(value.array.dtype, np.floating):
        array = value.array.astype(np.float64)
    else:
        raise node.fail(f"its {name} must be a constant")
    try:
        return np.broadcast_to(array, shape).reshape(-1)
    except ValueError:
        raise node.fail(
            f"its {name} {list(array.shape)} cannot be broadcast to {list(shape)}"
        ) from None


def _in_rows(state: LoweringState, node: Node, x: Dequantised, axis: int) -> Dequantised:
    """``x`` in a tensor whose channels are its dimension ``axis``: its own, or one that its
    elements are moved to."""
    features = x.view.shape[axis]
    if features > MAX_FEATURES:
        raise node.fail(f"rows of {features} elements; at most {MAX_FEATURES} are possible")
    others = [i for i in range(len(x.view.shape)) if i != axis]
    matrix = x.view.transpose((*others, axis))
    if state.tensors.has_layout(x.tensor):
        channels = OnnxView.contiguous(state.tensors.shape(x.tensor)).dims[1]
        if state.tensors.checked_view(node, x).dims[axis] == channels:
            return x
    flat = matrix.reshape((math.prod(matrix.shape[:-1]), features))
    moved = state.mover.plain(node, replace(x, view=flat))
    back = moved.view.reshape(matrix.shape).transpose(tuple(np.argsort((*others, axis))))
    return replace(moved, view=back)


def _result(state: LoweringState, op: Softmax | Normalise, x: Dequantised) -> Pending:
    """The result of ``op``, stored as its operand is."""
    return Pending(op, state.tensors.shape(x.tensor), state.tensors.stored_view(x))
