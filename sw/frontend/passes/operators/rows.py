"""Softmax and normalisation over the channels of every position."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from systole.isa.commands import MAX_FEATURES
from systole.sw.frontend.passes.layout import OnnxView
from systole.sw.frontend.passes.norms import Norm
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
    """Takes a dequantised activation, on machines with row operations (``row_ops = true``).
    Its axis has at most 4096 elements; before opset 13 it is the last."""
    x = state.operands.activation(node, 0)
    rank, old = len(x.view.shape), state.opsets.get("", ROWS_FROM) < ROWS_FROM
    axis = _axis(node, node.integer("axis", 1 if old else -1), rank)
    if old and axis != rank - 1 and math.prod(x.view.shape[axis + 1 :]) > 1:
        raise node.fail(f"axis = {axis}: before opset 13 it must be the last, {rank - 1}")
    x = _in_rows(state, node, x, axis)
    one = np.float32(1)
    op = Softmax(**node.fields(), x=x.tensor, x_scale=x.scale, y_scale=one)
    return _result(state, op, x)


@operator("LayerNormalization")
def layer_normalisation(state: LoweringState, node: Node) -> Value:
    """Takes a dequantised activation, on machines with row operations (``row_ops = true``).
    Scale and bias are constants. The axes from ``axis`` on have at most 4096 elements. Only the
    first output is used."""
    return _normalised(state, node, centred=True)


@operator("RMSNormalization", "SimplifiedLayerNormalization")
def rms_normalisation(state: LoweringState, node: Node) -> Value:
    """Takes a dequantised activation, on machines with row operations (``row_ops = true``).
    Scale is a constant. The axes from ``axis`` on have at most 4096 elements. Only the first output
    is used."""
    return _normalised(state, node, centred=False)


def _normalised(state: LoweringState, node: Node, *, centred: bool) -> Pending:
    """A normalisation that is one node."""
    if any(output.uses() or output.is_graph_output() for output in node.raw.outputs[1:]):
        raise node.fail("its mean or deviation is used: only its first output may be")
    x = state.operands.activation(node, 0)
    shape = x.view.shape
    axis = _axis(node, node.integer("axis", -1), len(shape))
    gain = _parameter(state, node, 1, "scale", shape[axis:])
    shift = _parameter(state, node, 2, "bias", shape[axis:]) if centred else np.zeros(gain.shape)
    together = replace(x, view=x.view.reshape((*shape[:axis], gain.size)))
    rows = _in_rows(state, node, together, axis)
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


def written_out(state: LoweringState, node: Node, norm: Norm) -> Pending:
    """A normalisation of several nodes, the last of which is ``node``."""
    x = state.operands.real(node, state.results.get(norm.x.name or ""), 0)
    shape = x.view.shape
    axis = _axis(node, norm.axis, len(shape))
    rows = _in_rows(state, node, x, axis)
    op = Normalise(
        **node.fields("LayerNormalization" if norm.centred else "RMSNormalization"),
        x=rows.tensor,
        gain=_of_channels(node, norm.gain, shape, axis),
        shift=_of_channels(node, norm.shift, shape, axis),
        epsilon=norm.epsilon,
        centred=norm.centred,
        x_scale=rows.scale,
        y_scale=np.float32(1),
    )
    return _result(state, op, rows)


def _axis(node: Node, axis: int, rank: int) -> int:
    """An axis counted from the front."""
    if not -rank <= axis < rank:
        raise node.fail(f"axis = {axis}: it must be in {-rank}..{rank - 1}")
    return axis % rank


def _of_channels(node: Node, array: np.ndarray, shape: tuple[int, ...], axis: int) -> np.ndarray:
    """A constant that is broadcast to ``shape``, by channel, which are ``axis``."""
    whole = np.reshape(array, (1,) * (len(shape) - array.ndim) + array.shape)
    if any(size != 1 for i, size in enumerate(whole.shape) if i != axis):
        raise node.fail(f"its constant {list(array.shape)} varies along other axes than {axis}")
    return np.broadcast_to(whole.reshape(-1).astype(np.float64), (shape[axis],))


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
