"""Movements that no Select expresses at once, taken one axis at a time or piece by piece."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from systole.sw.frontend.passes.layout import Shape
from systole.sw.frontend.passes.moves import MAX_PHASES

MAX_PIECES = 16
"""Pieces that one Select puts together."""


def axis_step(index: np.ndarray, source: Shape) -> tuple[np.ndarray, np.ndarray] | None:
    """A movement ``index`` (N, C, H, W) of places in an array of shape ``source``, or -1, as two:
    the first moves the rows or the columns of all images alike and nothing else, the second takes
    places in its result. None if rows and columns do not move independently of each other, or
    if one of them moves in a regular order, so that a step of its own gains nothing."""
    n, c, h, w = source
    rows, columns = _lines(index, source)
    if rows is None or columns is None:
        return None
    if _regular(rows) or _regular(columns):
        return None
    channel = index // (h * w)
    own = np.arange(n * c).reshape(n, c, 1, 1)
    if len(rows) * w <= len(columns) * h:
        places = np.where(rows < 0, -1, rows)[:, None] * w + np.arange(w)
        first = np.where(rows[:, None] < 0, -1, own * (h * w) + places)
        row = np.arange(len(rows))[:, None]
        second = (channel * len(rows) + row) * w + columns
    else:
        places = np.arange(h)[:, None] * w + columns
        first = np.where(columns < 0, -1, own * (h * w) + places)
        second = (channel * h + rows[:, None]) * len(columns) + np.arange(len(columns))
    return first.astype(np.int32), np.where(index < 0, -1, second).astype(np.int32)


def _lines(index: np.ndarray, source: Shape) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The row that each row takes, and the column that each column takes, as :func:`_along`."""
    h, w = source[2:]
    return _along(index // w % h, index, 2), _along(index % w, index, 3)


def _regular(places: np.ndarray) -> bool:
    """Whether lines are taken at one distance, with padding around them."""
    taken = np.flatnonzero(places >= 0)
    steps = np.diff(places[taken])
    return bool((np.diff(taken) == 1).all() and (steps == steps[:1]).all() and (steps > 0).all())


def _along(places: np.ndarray, index: np.ndarray, axis: int) -> np.ndarray | None:
    """The place that each line of ``axis`` takes, -1 for one that takes none; None if the elements
    of a line differ."""
    places = np.where(index < 0, -1, places)
    others = tuple(i for i in range(4) if i != axis)
    most = places.max(axis=others)
    wide = most.reshape([-1 if i == axis else 1 for i in range(4)])
    return most if ((places == wide) | (places < 0)).all() else None


def pieces(index: np.ndarray, source: Shape) -> tuple[int, list[np.ndarray]] | None:
    """A movement ``index``, as of :func:`axis_step`, cut into pieces of MAX_PHASES rows or columns,
    and the axis; None if it is one piece or more than MAX_PIECES. A piece takes its lines in any
    order, a phase for each."""
    lengths = [
        0 if lines is not None and _regular(lines) else index.shape[axis]
        for axis, lines in enumerate(_lines(index, source), 2)
    ]
    axis = 2 + int(np.argmax(lengths))
    if not MAX_PHASES < index.shape[axis] <= MAX_PHASES * MAX_PIECES:
        return None
    return axis, list(_cut(index, axis))


def _cut(index: np.ndarray, axis: int) -> Iterator[np.ndarray]:
    for start in range(0, index.shape[axis], MAX_PHASES):
        lines = np.arange(start, min(start + MAX_PHASES, index.shape[axis]))
        yield np.ascontiguousarray(np.take(index, lines, axis=axis))
