"""Softmax and normalisation over the channels of every position."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from systole.isa.commands import MAX_FEATURES
from systole.sw.frontend.passes.layout import LayoutError, OnnxView
from systole.sw.frontend.passes.masks import UNDERFLOW, MaskedSoftmax, highest_masking
from systole.sw.frontend.passes.norms import Norm
from systole.sw.frontend.passes.operators.registry import operator
from systole.sw.frontend.passes.state import LoweringState
from systole.sw.frontend.passes.values import (
    Const,
    Dequantised,
    Node,
    Pending,
    Quant,
    QuantConst,
    RealInput,
    Value,
)
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


@operator("IsNaN", "Where")
def around_softmax(state: LoweringState, node: Node) -> Value:
    """Around a Softmax, on machines with row operations (``row_ops = true``): Where(condition,
    scores, constant) and its like in front of it, which masks scores, and Where(IsNaN(x), 0, x)
    behind it."""
    raise node.fail("it neither masks the scores of a Softmax nor guards the result of one")


def masked_softmax(
    state: LoweringState, node: Node, masked: MaskedSoftmax, computed: Mapping[str, float]
) -> Pending:
    """A Softmax with what masks its scores and guards its result; ``node`` is the last of these.
    ``computed``: masks that are inputs of the graph, and the highest number of each that masks."""
    own = Node(masked.softmax)
    x = state.operands.real(own, state.results.get(masked.scores.name or ""), 0)
    axis = _axis(own, own.integer("axis", -1), len(x.view.shape))
    x = _in_rows(state, own, x, axis)
    limit = UNDERFLOW - 255 * float(x.scale)
    inside: np.ndarray = np.ones(x.view.shape, bool)
    inputs: list[Dequantised] = []
    for mask in masked.masks:
        highest = computed.get(mask.name or "", None)
        highest = highest_masking(mask) if highest is None else highest
        if highest is not None and highest > limit:
            raise own.fail(f"its mask has {highest:g}, with these scores at most {limit:g} masks")
        value = state.results.get(mask.name or "")
        if isinstance(value, Const):
            inside = inside & (value.array == 0)
        elif isinstance(value, RealInput):
            inputs.append(_sign(state, own, value))
        else:
            raise own.fail(f"its mask {mask.name!r} is neither constant nor computed by the host")
    if not (masked.guarded or inside.any(axis=axis).all()):
        raise own.fail("a constant mask leaves nothing of a row")
    op = Softmax(
        **own.fields("+".join(n.op_type for n in masked.nodes), name=node.name),
        x=x.tensor,
        x_scale=x.scale,
        y_scale=np.float32(1),
    )
    op = _with_mask(state, own, op, x=x, inside=inside, inputs=inputs)
    return _result(state, op, x)


def _sign(state: LoweringState, node: Node, value: RealInput) -> Dequantised:
    """A mask that the host gives, as int8: 0, or the lowest number."""
    quant = Quant(np.float32(1), 0, False)
    result = state.quantiser.quantise(
        node.with_output(state.tensors.free_name(f"{value.name}:sign")), value, quant
    )
    return Dequantised(result.tensor, result.view, quant.scale)


def _with_mask(
    state: LoweringState,
    node: Node,
    op: Softmax,
    *,
    x: Dequantised,
    inside: np.ndarray,
    inputs: list[Dequantised],
) -> Softmax:
    """``op`` with the elements ``inside``, in the shape of ``x``, and with a mask that is an
    input."""
    if len(inputs) > 1:
        raise node.fail(f"it has {len(inputs)} masks that depend on inputs; 1 is possible")
    places = _stored(state, x, np.arange(inside.size, dtype=np.int32).reshape(inside.shape))
    inside = inside.reshape(-1)[places]
    n, c, h, w = inside.shape
    causal = np.arange(c) <= np.arange(h * w)[:, None] % w
    if (inside.reshape(n, c, h * w).transpose(0, 2, 1) == causal).all() and c > 1:
        op, inside = replace(op, period=w), np.ones((1, 1, 1, 1), bool)
    if inside.all():
        return _with_input(state, node, op, x, inputs[0]) if inputs else op
    if inputs:
        raise node.fail("it has a constant mask that is not causal, and one that depends on inputs")
    array = _once(np.where(inside, np.int8(0), np.int8(-128)))
    quant = Quant(np.float32(1), 0, False)
    return replace(op, mask=state.tensors.add_constant(node, array, quant, stored=True))


def _with_input(
    state: LoweringState, node: Node, op: Softmax, x: Dequantised, mask: Dequantised
) -> Softmax:
    """``op`` with ``mask``, an input of the graph, in the layout of ``x``."""
    own = np.arange(math.prod(mask.view.shape), dtype=np.int32).reshape(mask.view.shape)
    index = _once(_stored(state, x, np.broadcast_to(own, x.view.shape)))
    layout = OnnxView.of_indices(index)
    if not state.tensors.has_layout(mask.tensor) and layout is not None:
        with contextlib.suppress(LayoutError):
            state.tensors.stored_view(mask, layout)
    positions = state.tensors.positions(mask).reshape(-1)[index]
    if state.tensors.shape(mask.tensor) != index.shape or (np.diff(positions.ravel()) != 1).any():
        moved = state.mover.moved(node, [mask], positions.reshape(index.shape), plain=True)
        settled = state.emitter.settle(moved)
        assert settled is not None, "a mask keeps its quantisation"
        mask = settled
    return replace(op, mask=mask.tensor)


def _stored(state: LoweringState, x: Dequantised, values: np.ndarray) -> np.ndarray:
    """``values``, one for every element of ``x``, as ``x`` is stored: (N, C, H, W)."""
    shape = state.tensors.shape(x.tensor)
    out = np.empty(math.prod(shape), values.dtype)
    out[state.tensors.positions(x).reshape(-1)] = values.reshape(-1)
    return out.reshape(shape)


def _once(array: np.ndarray) -> np.ndarray:
    """(N, C, H, W) with one image if all are the same, and one position if all are."""
    if (array == array[:1]).all():
        array = array[:1]
    if (array == array[:, :, :1, :1]).all():
        array = array[:, :, :1, :1]
    return array


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
