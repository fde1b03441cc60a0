"""Operators that move elements, as ``sw.graph.Select``: found from where each element comes from.

Whatever the operator, it is run on positions instead of values; the picks are fitted to the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from sw.graph import Pick, Select

MAX_PHASES = 64
"""Phases of a Select that are tried."""
MAX_PICKS = 256
"""Picks of a Select, over all its phases."""
MAX_CHANNELS = 4096
"""Of all images of a tensor together, where elements move between images."""

Shape = tuple[int, int, int, int]
Fit = tuple[tuple[int, int], list[list[Pick]], bool]
"""Steps, phases and ``joined`` of a Select."""


def identity(name: str, shape: Shape, scale: float) -> Pick:
    """The pick that takes all of tensor ``name`` as it stands."""
    return Pick(name, np.arange(shape[1]), scale=scale)


def is_identity(op: Select, shape: Shape) -> bool:
    """Whether a Select takes elements of a single tensor, with an output of the same ``shape``,
    without moving any."""
    if op.joined or op.steps != (1, 1) or len(op.phases[0]) != 1:
        return False
    pick = op.phases[0][0]
    same = np.array_equal(pick.channels, np.arange(shape[1]))
    return same and pick.strides == (1, 1) and pick.offsets == (0, 0)


def fit(
    index: np.ndarray, sources: Sequence[tuple[str, float, Shape]], zero_fill: bool
) -> Fit | None:
    """A Select. ``index`` (N, C, H, W) has for each output element its place in the ``sources``
    (name, scale, shape) flattened and put end to end, or -1: fill, which is the real number zero
    (``zero_fill``) or another. None if there is none of at most MAX_PHASES phases and MAX_PICKS
    picks."""
    cells = _cells(index, [shape for _, _, shape in sources])
    joined = cells is None
    if joined:
        sources = [(name, scale, _joined(shape)) for name, scale, shape in sources]
        index = index.reshape(_joined(index.shape))
        shapes = [shape for _, _, shape in sources]
        if max(c for _, c, _, _ in (index.shape, *shapes)) > MAX_CHANNELS:
            return None
        cells = _cells(index, shapes)
    for sy, sx in _steps(index.shape[2:]):
        phases: list[list[Pick]] = []
        for at in range(sy * sx):
            part = cells[:, :, at // sx :: sy, at % sx :: sx]
            picks = _phase(part, sources, zero_fill)
            if picks is None or sum(map(len, phases)) + len(picks) > MAX_PICKS:
                break
            phases.append(picks)
        else:
            return (sy, sx), phases, joined
    return None


def _joined(shape: Shape) -> Shape:
    return (1, shape[0] * shape[1], *shape[2:])


def _steps(size: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Steps to try, those of fewest phases first."""
    h, w = (min(s, MAX_PHASES) for s in size)
    pairs = ((y, x) for y in range(1, h + 1) for x in range(1, min(w, MAX_PHASES // y) + 1))
    yield from sorted(pairs, key=lambda s: (s[0] * s[1], s))


def _cells(index: np.ndarray, shapes: Sequence[Shape]) -> np.ndarray | None:
    """Source, channel, row and column of the first image's elements, source -1 for fill, as an
    array (4, C, H, W). None if the images do not all move alike."""
    ends = np.cumsum([np.prod(s, dtype=np.int64) for s in shapes])
    which = np.searchsorted(ends, index, side="right")
    which[index < 0] = -1
    if (which[0] != which).any():
        return None
    first = np.full((4, *index.shape[1:]), -1, np.int32)
    first[0] = which[0]
    for s, (n, c, h, w) in enumerate(shapes):
        chosen = which[0] == s
        if not chosen.any():
            continue
        places = index[:, chosen] - (ends[s] - n * c * h * w)
        image = np.arange(len(index))[:, None] * (c * h * w)
        if n != len(index) or (places - image != places[0]).any() or places[0].max() >= c * h * w:
            return None
        first[1:, chosen] = np.stack(np.unravel_index(places[0], (c, h, w)))
    return first


def _phase(
    cells: np.ndarray, sources: Sequence[tuple[str, float, Shape]], zero_fill: bool
) -> list[Pick] | None:
    """The picks that give ``cells`` (4, C, h, w), or None."""
    groups: dict[tuple, np.ndarray] = {}
    for o in range(cells.shape[1]):
        source, channel, rows, columns = cells[:, o]
        valid = source >= 0
        if not valid.any():
            continue
        i, j = (int(np.flatnonzero(valid.any(axis))[0]) for axis in (1, 0))
        if not valid[i, j]:
            return None
        s = source[i, j]
        along = _line(rows[:, j], sources[s][2][2])
        across = _line(columns[i], sources[s][2][3])
        if along is None or across is None:
            return None
        (ry, oy, want_rows), (rx, ox, want_columns) = along, across
        inside = (want_rows >= 0)[:, None] & (want_columns >= 0)
        same = (
            (inside.all() or zero_fill)
            and np.array_equal(inside, valid)
            and (source[valid] == s).all()
            and (channel[valid] == channel[i, j]).all()
            and (rows == np.where(inside, want_rows[:, None], -1)).all()
            and (columns == np.where(inside, want_columns, -1)).all()
        )
        if not same:
            return None
        key = (int(s), (ry, rx), (oy, ox))
        channels = groups.setdefault(key, np.full(cells.shape[1], -1))
        channels[o] = channel[i, j]
    return [
        Pick(sources[s][0], channels, strides, offsets, sources[s][1])
        for (s, strides, offsets), channels in groups.items()
    ]


def _line(places: np.ndarray, size: int) -> tuple[int, int, np.ndarray] | None:
    """Stride and offset of ``places`` (-1: none) along an axis of ``size``, and the places that
    they make. None if no stride of at least 1 does."""
    valid = np.flatnonzero(places >= 0)
    first = int(valid[0])
    strides = [int(places[valid[1]] - places[first])] if len(valid) > 1 else [1, size]
    for stride in strides:
        offset = int(places[first]) - first * stride
        made = np.arange(len(places)) * stride + offset
        made[(made < 0) | (made >= size)] = -1
        if stride >= 1 and np.array_equal(made, places):
            return stride, offset, made
    return None
