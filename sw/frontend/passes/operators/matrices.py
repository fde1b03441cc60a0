"""Products of two activations: where the matrices of their operands lie."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace

import numpy as np

from systole.sw.frontend.passes.layout import LayoutError, OnnxView, merge
from systole.sw.frontend.passes.state import LoweringState
from systole.sw.frontend.passes.values import Dequantised, Node, Pending
from systole.sw.ir.graph import MatMul, Matrices

MAX_DEPTH = (2**31 - 1) // 255**2
"""Terms of a sum of products of int8 less their zero points that int32 holds, whatever they are."""


def activation_product(state: LoweringState, node: Node, a: Dequantised, b: Dequantised) -> Pending:
    """``a`` (..., M, K) times ``b`` (..., K, N), as numpy's matmul; if fewer operands have to be
    transposed then, as the transpose of their transposes' product."""
    rows, columns = len(a.view.shape) > 1, len(b.view.shape) > 1
    if not a.view.shape or not b.view.shape:
        raise node.fail(
            f"operands of rank {len(a.view.shape)} and {len(b.view.shape)}; each must be at least 1"
        )
    if not rows:
        a = replace(a, view=a.view.reshape((1, *a.view.shape)))
    if not columns:
        b = replace(b, view=b.view.reshape((*b.view.shape, 1)))
    (*a_lead, m, k), (*b_lead, depth, n) = a.view.shape, b.view.shape
    if k != depth:
        raise node.fail(
            f"operands {list(a.view.shape)} and {list(b.view.shape)} do not fit: {k} "
            f"columns, {depth} rows"
        )
    if k > MAX_DEPTH:
        raise node.fail(f"each sum has {k} products; {MAX_DEPTH} is the limit")
    try:
        lead = np.broadcast_shapes(tuple(a_lead), tuple(b_lead))
    except ValueError:
        raise node.fail(f"batches {a_lead} and {b_lead} cannot be broadcast") from None
    turned = _turned(b), _turned(a)
    if sum(_lies_turned(state, x) for x in (a, b)) > sum(_lies_turned(state, x) for x in turned):
        pending = _product(state, node, *turned, lead)
        view = _swap(pending.view)
    else:
        pending = _product(state, node, a, b, lead)
        view = pending.view
    view = view.reshape((*lead, *([m] if rows else []), *([n] if columns else [])))
    return replace(pending, view=view)


def _swap(view: OnnxView) -> OnnxView:
    """With the last two axes swapped."""
    *lead, rows, columns = range(len(view.shape))
    return view.transpose((*lead, columns, rows))


def _turned(x: Dequantised) -> Dequantised:
    return replace(x, view=_swap(x.view))


def _lies_turned(state: LoweringState, x: Dequantised) -> bool:
    """Whether the columns of the matrices of ``x`` are positions: a transposition away from what a
    product takes."""
    if not state.tensors.has_layout(x.tensor):
        return False
    shape = state.tensors.shape(x.tensor)
    *own, rows, columns = x.view.shape
    index = state.tensors.positions(x).reshape(math.prod(own), rows, columns)
    return _places(index, shape) is None and _places(index.transpose(0, 2, 1), shape) is not None


def _product(
    state: LoweringState, node: Node, a: Dequantised, b: Dequantised, lead: tuple[int, ...]
) -> Pending:
    """The product of matrices (..., M, K) and (..., K, N), batches broadcast to ``lead``."""
    (m, k), n = a.view.shape[-2:], b.view.shape[-1]
    left, right = _matrices(state, node, a, lead), _matrices(state, node, b, lead)
    count = len(right.places)
    places = np.stack([np.arange(count), *np.zeros((2, count), np.int64)], 1)
    shape = (count, n, 1, m)
    view = _view(places, shape, (*lead, m, n))
    if right.tensor == b.tensor:
        # As the operand's matrices lie: heads become features again.
        alike = _alike(right, state.tensors.shape(right.tensor), (m, k, n))
        other = _view(*alike, (*lead, m, n)) if alike else None
        if alike and other:
            (places, shape), view = alike, other
    assert view is not None, "matrices one behind another have an order of strides"
    op = MatMul(
        **node.fields(),
        a=left,
        b=right,
        places=places,
        rows=m,
        depth=k,
        columns=n,
        scale=a.scale * b.scale,
    )
    return Pending(op, shape, view)


def _alike(
    b: Matrices, shape: tuple[int, int, int, int], sizes: tuple[int, int, int]
) -> tuple[np.ndarray, tuple[int, int, int, int]] | None:
    """Places and shape of a result whose matrices lie to each other as those of the right operand,
    of ``shape``, if these are all of it."""
    m, k, n = sizes
    images, channels, h, w = shape
    cells = b.places // (1, n, k)
    whole = len(cells) * n * k == images * channels * h * w and len(cells) == len(
        np.unique(cells, axis=0)
    )
    if not whole or (cells * (1, n, k) != b.places).any():
        return None
    return cells * (1, n, m), (images, channels, 1, h * w // k * m)


def _view(
    places: np.ndarray, stored: tuple[int, int, int, int], shape: tuple[int, ...]
) -> OnnxView | None:
    """The view of ``shape`` (..., M, N) on matrices at ``places``; None if their order is none of
    strides."""
    *lead, m, n = shape
    size = stored[2] * stored[3]
    first = ((places[:, 0] * stored[1] + places[:, 1]) * size + places[:, 2]).reshape(lead)
    strides = [
        int(first[tuple(int(i == axis) for i in range(len(lead)))]) if length > 1 else 0
        for axis, length in enumerate(lead)
    ]
    strided = sum(index * stride for index, stride in zip(np.indices(lead), strides))
    if first.size > 1 and not np.array_equal(first, strided):
        return None
    atoms = [*zip(lead, strides), (m, 1), (n, size)]
    return OnnxView(tuple(shape), tuple(merge([atom]) for atom in atoms))


def _matrices(state: LoweringState, node: Node, x: Dequantised, lead: tuple[int, ...]) -> Matrices:
    """The matrices (..., positions, channels) of ``x``, their batch broadcast to ``lead``; moved
    where they do not lie as needed."""
    *own, positions, channels = x.view.shape
    count = math.prod(own)
    _bind(state, x, count)
    index = state.tensors.positions(x).reshape(count, positions, channels)
    n, c, h, w = shape = state.tensors.shape(x.tensor)
    name, places = x.tensor, _places(index, shape)
    if places is None:
        image, rest = np.divmod(index, c * h * w)
        channel, position = np.divmod(rest, h * w)
        swapped = (image * (h * w) + position) * c + channel
        places = _places(swapped, (n, h * w, 1, c))
        name = x.tensor if places is None else state.mover.transposed(node, x)
    if places is None:
        together = index.transpose(2, 0, 1)[None]
        name = state.mover.rearranged(node, x, np.ascontiguousarray(together)).tensor
        places = np.array([(0, 0, i * positions) for i in range(count)])
    which = np.broadcast_to(np.arange(count).reshape(own), lead).reshape(-1)
    return Matrices(name, places[which])


def _bind(state: LoweringState, x: Dequantised, count: int) -> None:
    """Lays a graph input out so that its matrices lie as needed, if an order of its axes does
    that: as images, or all rows and features of the model's array."""
    if state.tensors.has_layout(x.tensor):
        return
    *own, positions, channels = x.view.shape
    with contextlib.suppress(LayoutError):
        across = OnnxView(tuple(own), x.view.dims[:-2]).reshape((count,)).dims
        dims = (*across, x.view.dims[-1], (), x.view.dims[-2])
        state.tensors.stored_view(x, OnnxView((count, channels, 1, positions), dims))
        return
    with contextlib.suppress(LayoutError):
        *rows, features = state.tensors.model_shape(x.tensor)
        matrix = OnnxView.contiguous((math.prod(rows), features))
        layout = OnnxView(
            (1, features, 1, math.prod(rows)), ((), matrix.dims[1], (), matrix.dims[0])
        )
        state.tensors.stored_view(x, layout)


def _places(index: np.ndarray, shape: tuple[int, int, int, int]) -> np.ndarray | None:
    """Places of matrices ``index`` (count, positions, channels) of elements of an array of
    ``shape``; None if one does not have consecutive positions and channels of one image."""
    _, c, h, w = shape
    _, positions, channels = index.shape
    first = index[:, 0, 0]
    steps = np.arange(positions)[:, None] + np.arange(channels) * (h * w)
    if not np.array_equal(index, first[:, None, None] + steps):
        return None
    image, rest = np.divmod(first, c * h * w)
    channel, position = np.divmod(rest, h * w)
    if (channel + channels > c).any() or (position + positions > h * w).any():
        return None
    return np.stack([image, channel, position], 1).astype(np.int64)
