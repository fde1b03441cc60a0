"""Operators that move elements, as a ``Select`` fitted to where each element comes from.

Whatever the operator, it is run on positions instead of values; the picks are fitted to the result.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from systole.isa.commands import COMMANDS, Opcode
from systole.sw.frontend.passes.layout import Shape, four
from systole.sw.ir.graph import Pick, Select

LIMITS = {f.name: f for f in COMMANDS[Opcode.CONV].fields}

MAX_PHASES = 64
"""Phases of a Select that are tried."""
MAX_PICKS = 256
"""Picks of a Select, over all its phases."""
MAX_CHANNELS = 4096
"""Channels of all images of a tensor together, where elements move between images."""

CHANNEL_PICKS = ((1, MAX_PHASES), (4, 16), (16, 4))
"""Picks for one channel of a phase that are tried, and of how many phases at most: each more is a
pass over the phase."""
BLOCK = 16
"""Channels that the array takes at a time, by default."""
MAX_STRIDE = LIMITS["stride_x"].high
MAX_OFFSET = LIMITS["x0"].high

Source = tuple[str, float, Shape]
"""Name, scale and shape of a tensor that elements come from."""


class Fit(NamedTuple):
    """The fields of a Select that carries out a movement."""

    steps: tuple[int, int]
    phases: list[list[Pick]]
    flat: bool
    across_images: bool


MAX_KEPT = 10_000
_FITS: dict[tuple[object, ...], Fit | None] = {}
"""Results of :func:`fit`, their sources numbered, by what they depend on."""


def identity(name: str, shape: Shape, scale: float) -> Pick:
    """The pick that takes all of tensor ``name`` as it stands."""
    return Pick(name, np.arange(shape[1]), scale=scale)


def is_identity(op: Select, shape: Shape, source: Shape) -> bool:
    """Whether a Select takes the elements of a single tensor of shape ``source`` as its output of
    ``shape`` without moving any."""
    if op.across_images or op.steps != (1, 1) or len(op.phases[0]) != 1 or shape != source:
        return False
    pick = op.phases[0][0]
    same = np.array_equal(pick.channels, np.arange(shape[1])) and pick.weight == 1
    return same and pick.strides == (1, 1) and pick.offsets == (0, 0)


def fit(index: np.ndarray, sources: Sequence[Source]) -> Fit | None:
    """A Select. ``index`` (N, C, H, W) has for each output element its place in the ``sources``
    (name, scale, shape) flattened and put end to end, or -1: zero. None if there is none of at most
    MAX_PHASES phases and MAX_PICKS picks. Fewest picks of a channel come first, then fewest
    phases; movements across images last.

    A network makes the same movements again and again, and placement asks for them with every
    attempt: results are kept by what they depend on."""
    shapes = tuple(shape for _, _, shape in sources)
    places = np.ascontiguousarray(index, np.int32)
    key = (places.shape, hashlib.sha256(places.tobytes()).digest(), shapes)
    if key not in _FITS:
        if len(_FITS) >= MAX_KEPT:
            _FITS.clear()
        numbered = [(str(i), 1.0, shape) for i, shape in enumerate(shapes)]
        _FITS[key] = _fit(places, numbered)
    known = _FITS[key]
    if known is None:
        return None
    phases = [[_bound(pick, *sources[int(pick.x)][:2]) for pick in phase] for phase in known.phases]
    return known._replace(phases=phases)


def _bound(pick: Pick, name: str, scale: float) -> Pick:
    """A pick of a numbered source as one of the tensor ``name``."""
    return replace(pick, x=name, scale=scale)


class _Form(NamedTuple):
    """A movement as it is seen in one of several ways, in which the same fits take other picks."""

    flat: bool
    alike: _Alike
    bound: _Bound
    sources: list[Source]
    shapes: list[Shape]
    """Those of the sources, and that of the output."""

    def fit(self, most: int, count: int) -> tuple[tuple[int, int], list[list[Pick]]] | None:
        """Steps and phases, at most ``count`` of these, with at most ``most`` picks for a
        channel."""
        cells, bound = self.alike.cells, self.bound
        if most > 1 and bound.hopeless:
            return None
        for steps in _steps(cells, most, count):
            # Of one pick in one phase, nothing has to be known before it is tried.
            single = (most, *steps) == (1, 1, 1)
            if not single and (bound.hopeless or bound.picks(steps) > MAX_PICKS):
                continue
            phases = _phases(cells, steps, self.sources, most)
            if phases is not None:
                return steps, self.alike.spread(phases)
        return None


def _forms(index: np.ndarray, sources: Sequence[Source], across_images: bool) -> list[_Form]:
    """The forms of a movement that a Select can have; not the same one twice."""
    forms: list[_Form] = []
    for flat in (False, True):
        seen = [(name, scale, _seen(shape, flat, across_images)) for name, scale, shape in sources]
        places = index.reshape(_seen(four(index.shape), flat, across_images))
        of_sources = [shape for _, _, shape in seen]
        shapes = [*of_sources, places.shape]
        if forms and shapes == forms[0].shapes:
            continue
        if across_images and max(c for _, c, _, _ in shapes) > MAX_CHANNELS:
            continue
        cells = _cells(places, of_sources)
        if cells is not None and max(s for shape in of_sources for s in shape[2:]) <= MAX_OFFSET:
            alike = _Alike.of(cells)
            forms.append(_Form(flat, alike, _Bound(alike.cells), seen, shapes))
    return forms


def _fit(index: np.ndarray, sources: Sequence[Source]) -> Fit | None:
    """:func:`fit`, computed anew."""
    batched = max(len(index), *(shape[0] for _, _, shape in sources)) > 1
    for across_images in (False, True) if batched else (False,):
        forms = _forms(index, sources, across_images)
        for most, count in CHANNEL_PICKS:
            for form in forms:
                found = form.fit(most, count)
                if found is not None:
                    steps, phases = found
                    return Fit(steps, phases, form.flat, across_images)
    return None


class _Alike(NamedTuple):
    """The cells of one channel for each way in which channels are filled. Most channels differ from
    others only in the number of the channel that they take."""

    cells: np.ndarray
    """(4, ways, H, W)."""
    way: np.ndarray
    """By channel, its way."""
    further: np.ndarray
    """By channel, how much higher the channels that it takes are than those in ``cells``."""

    @staticmethod
    def of(cells: np.ndarray) -> _Alike:
        """The ways of ``cells`` (4, C, H, W)."""
        patterns, first = _patterns(cells)
        number: dict[bytes, int] = {}
        way = np.array([number.setdefault(p.tobytes(), len(number)) for p in patterns])
        shown = np.unique(way, return_index=True)[1]
        return _Alike(cells[:, shown], way, first - first[shown][way])

    def spread(self, phases: list[list[Pick]]) -> list[list[Pick]]:
        """The phases of all channels; ``phases``: those of ``cells``."""
        out = []
        for phase in phases:
            taken = [pick.channels[self.way] for pick in phase]
            every = [np.where(t < 0, -1, t + self.further) for t in taken]
            out.append([replace(pick, channels=c) for pick, c in zip(phase, every, strict=True)])
        return out


def _patterns(cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ``cells`` (4, C, h, w) of every channel, (C, 4, h, w), with channels counted from that of
    its first element; and that channel."""
    patterns = cells.transpose(1, 0, 2, 3).copy()
    valid = patterns[:, 0] >= 0
    at = valid.reshape(len(valid), -1).argmax(axis=1)
    first = patterns[:, 1].reshape(len(valid), -1)[np.arange(len(valid)), at]
    patterns[:, 1] = np.where(valid, patterns[:, 1] - first[:, None, None], 0)
    return patterns, first


class _Bound:
    """What is known of the number of picks that any fit to some cells takes.

    A pick fills a rectangle of the output, the same for every channel: of a channel's row it takes
    elements of one source, channel and row, of its column those of one source, channel and
    column."""

    def __init__(self, cells: np.ndarray):
        """The bound for ``cells`` (4, C, H, W)."""
        self._cells = cells

    @functools.cached_property
    def _largest(self) -> int:
        """Elements of the largest rectangle that a pick could fill."""
        across = _most_alike(_numbered(self._cells[:3]))
        down = _most_alike(_numbered(self._cells[[0, 1, 3]]).transpose(0, 2, 1))
        return max(across * down, 1)

    @functools.cached_property
    def _kinds(self) -> np.ndarray:
        """By row and column of the output, how many places of sources its channels take. A pick
        takes one of them."""
        places = np.sort(_numbered(self._cells[[0, 2, 3]]), axis=0)
        return (places[0] > 0) + (np.diff(places, axis=0) > 0).sum(axis=0)

    @functools.cached_property
    def hopeless(self) -> bool:
        """Whether any fit takes more than MAX_PICKS, whatever its steps."""
        most = MAX_PICKS * self._largest
        # The elements of one channel mostly are enough to tell.
        of_channel = np.count_nonzero(self._cells[0] >= 0, axis=(1, 2)).max()
        return bool(of_channel > most or self._kinds.sum() > most)

    def picks(self, steps: tuple[int, int]) -> int:
        """The number of picks of all phases together, at least."""
        sy, sx = steps
        phases = [self._kinds[y::sy, x::sx] for y in range(sy) for x in range(sx)]
        return sum(
            max(int(k.max()), -(-int(k.sum()) // min(self._largest, k.size))) for k in phases
        )


def _numbered(parts: np.ndarray) -> np.ndarray:
    """One number for each combination of ``parts`` (count, ...), 0 for none of them (-1)."""
    number = parts[0].astype(np.int64) + 1
    for part in parts[1:]:
        number = number * (int(part.max()) + 2) + (part + 1)
    return number


def _most_alike(numbers: np.ndarray) -> int:
    """How often a line, along the last axis, has the same number other than 0, at most."""
    ordered = np.sort(numbers, axis=-1)
    length = ordered.shape[-1]

    def have(times: int) -> bool:
        first, last = ordered[..., : length - times + 1], ordered[..., times - 1 :]
        return bool(((first == last) & (first > 0)).any())

    return bisect.bisect_left(range(1, length + 1), True, key=lambda times: not have(times))


def _seen(shape: Shape, flat: bool, across_images: bool) -> Shape:
    """As :meth:`~sw.ir.graph.Select.seen`."""
    n, c, h, w = shape
    if across_images:
        n, c = 1, n * c
    return (n, c, 1, h * w) if flat else (n, c, h, w)


def cost(fit: Fit, shape: Shape) -> int:
    """Words that the array streams for a Select with an output of ``shape``, about."""
    (sy, sx), phases = fit.steps, fit.phases
    size = shape[2] * shape[3] // (sy * sx) + 1
    blocks = 0
    for pick in (p for picks in phases for p in picks):
        outputs = np.flatnonzero(pick.channels >= 0)
        blocks += len(
            {(o // BLOCK, c // BLOCK) for o, c in zip(outputs, pick.channels[outputs], strict=True)}
        )
    return blocks * size


def least_cost(shape: Shape) -> int:
    """:meth:`cost` of any Select with an output of ``shape`` that has no gaps, at least: one pass
    over every block of channels."""
    return -(-shape[1] // BLOCK) * shape[2] * shape[3]


def gaps(fit: Fit, index: np.ndarray) -> tuple[np.ndarray | None, np.ndarray]:
    """Where channels that a fit takes elements for have none (``index`` is -1): patterns (N, K, H,
    W) of bool, and for each channel of each phase, (phases, channels), the number of its pattern,
    or -1. No patterns if channels of a phase have elements everywhere or nowhere."""
    n, _, h, w = index.shape
    missing = (index < 0).reshape(_seen(four(index.shape), fit.flat, fit.across_images))
    (sy, sx), channels = fit.steps, missing.shape[1]
    partial = np.zeros((sy * sx, channels), bool)
    for at in range(sy * sx):
        phase = missing[0, :, at // sx :: sy, at % sx :: sx].reshape(channels, -1)
        partial[at] = phase.any(axis=1) & ~phase.all(axis=1)
    if not partial.any():
        return None, partial
    kinds, number = np.unique(missing[0].reshape(channels, -1), axis=0, return_inverse=True)
    images = 1 if fit.across_images else n
    patterns = np.broadcast_to(kinds.reshape(1, -1, h, w), (images, len(kinds), h, w))
    return patterns, np.where(partial, number.reshape(-1), -1)


def with_marks(fit: Fit, name: str, numbers: np.ndarray) -> list[list[Pick]]:
    """The phases of a fit, each with a pick of tensor ``name`` as it lies, whose channels are
    ``numbers`` (phases, channels)."""
    sx = fit.steps[1]
    return [
        [*picks, Pick(name, numbers[at], strides=fit.steps, offsets=(at // sx, at % sx))]
        if (numbers[at] >= 0).any()
        else picks
        for at, picks in enumerate(fit.phases)
    ]


def _phases(
    cells: np.ndarray,
    steps: tuple[int, int],
    sources: Sequence[Source],
    most: int,
) -> list[list[Pick]] | None:
    sy, sx = steps
    phases: list[list[Pick]] = []
    for at in range(sy * sx):
        picks = _phase(cells[:, :, at // sx :: sy, at % sx :: sx], sources, most)
        if picks is None or sum(map(len, phases)) + len(picks) > MAX_PICKS:
            return None
        phases.append(picks)
    return phases


def _steps(cells: np.ndarray, most: int, count: int) -> Iterator[tuple[int, int]]:
    """Steps to try for ``cells`` (4, C, H, W), of at most ``count`` phases with at most ``most``
    picks for a channel, those of fewest first. The first row and the first column leave few."""
    h, w = (min(s, count) for s in cells.shape[2:])
    column, row = cells[:, :, :, 0], cells[:, :, 0, :]
    if most == 1:
        fitting_y = set(_regular(column[:3], h))
        fitting_x = set(_regular(row[[0, 1, 3]], w))
    else:
        fitting_y = set(_few(column[[0, 1, 3]], most, h))
        fitting_x = set(_few(row[:3], most, w))
    pairs = ((y, x) for y in fitting_y for x in fitting_x if x * y <= count)
    yield from sorted(pairs, key=lambda s: (s[0] * s[1], s))


def _few(line: np.ndarray, most: int, limit: int) -> Iterator[int]:
    """The steps up to ``limit`` for which in every channel of a ``line`` (source, channel and place
    across the line; channels; length) elements a step apart differ in these three at most ``most``
    times: those of one pick do not differ."""
    number = _numbered(line)
    # Each of a step's phases has no more than ``most`` of all the kinds.
    least = -(-_kinds(number) // most)
    for step in range(max(least, 1), limit + 1):
        if all(_kinds(number[:, phase::step]) <= most for phase in range(step)):
            yield step


def _kinds(numbers: np.ndarray) -> int:
    """The most different numbers other than 0 that a line, along the last axis, has."""
    ordered = np.sort(numbers, axis=-1)
    kinds = (ordered[:, 0] > 0) + (np.diff(ordered, axis=-1) > 0).sum(axis=-1)
    return int(kinds.max())


def _regular(line: np.ndarray, limit: int) -> Iterator[int]:
    """The steps up to ``limit`` for which in every channel of a ``line`` (source, channel and
    place; channels; length) elements a step apart could be of one pick: one source and channel,
    places at one positive distance."""
    steps = np.arange(1, limit + 1)
    # Most steps are ruled out by their first three elements.
    head = line[:, :, : 2 * limit + 1].astype(np.int64)
    short = 2 * limit + 1 - head.shape[2]
    head = np.pad(head, ((0, 0), (0, 0), (0, short)), constant_values=-1)
    a, b, c = head[:, :, :1], head[:, :, steps], head[:, :, 2 * steps]
    uneven = (a[0] >= 0) & (b[0] >= 0) & (c[0] >= 0) & (c[2] - b[2] != b[2] - a[2])
    possible = ~(_differ(a, b) | _differ(b, c) | uneven).any(axis=0)
    for step in steps[possible].tolist():
        if _in_line(line[:, :, ::step]):
            yield step


def _differ(first: np.ndarray, then: np.ndarray) -> np.ndarray:
    """Whether elements cannot be of one pick with later ones."""
    there = (first[0] >= 0) & (then[0] >= 0)
    return there & ((first[:2] != then[:2]).any(axis=0) | (then[2] <= first[2]))


def _in_line(part: np.ndarray) -> bool:
    """Whether, for every channel of a ``part`` of a line, all elements could be of one pick."""
    part = part[:, (part[0] >= 0).any(axis=1)]
    valid = part[0] >= 0
    channels, length = np.arange(len(valid)), valid.shape[1]
    first = valid.argmax(axis=1)
    last = length - 1 - valid[:, ::-1].argmax(axis=1)
    begin, end = (part[:, channels, at].astype(np.int64)[:, :, None] for at in (first, last))
    run, rise = (last - first)[:, None], end[2] - begin[2]
    if ((run > 0) & ((rise <= 0) | (rise % np.maximum(run, 1) != 0))).any():
        return False
    moved = (part[2] - begin[2]) * run == (np.arange(length) - first[:, None]) * rise
    same = (part[:2] == begin[:2]).all(axis=0) & moved
    return bool((same | ~valid).all())


def _cells(index: np.ndarray, shapes: Sequence[Shape]) -> np.ndarray | None:
    """Source, channel, row and column of the first image's elements, source -1 for fill, as an
    array (4, C, H, W). None if the images do not all move alike."""
    images, _, rows, columns = np.array(shapes).T
    sizes = np.prod(shapes, axis=1, dtype=np.int64)
    ends, image = np.cumsum(sizes).astype(np.int32), (sizes // images).astype(np.int32)
    sizes = sizes.astype(np.int32)
    which = np.where(index < 0, np.int32(-1), np.int32(0))
    for end in ends[:-1]:
        which += index >= end
    # Numbers instead of arrays where there is one source: much faster.
    own = which[0] if len(shapes) > 1 else 0
    valid = which[0] >= 0
    if (which[1:] != which[0]).any() or ((images != len(index))[own] & valid).any():
        return None
    places = index - (ends - sizes)[own]
    for n in range(1, len(index)):
        if (places[n] - places[0] != n * image[own])[valid].any():
            return None
    if ((places[0] >= image[own]) & valid).any():
        return None
    if len({shape[2:] for shape in shapes}) == 1:
        h, w = shapes[0][2:]
        # By one number, this is much faster than ``divmod``.
        line = places[0] // w
        channel = line // h
        column, row = places[0] - line * w, line - channel * h
    else:
        line, column = np.divmod(places[0], columns[own])
        channel, row = np.divmod(line, rows[own])
    return np.where(valid, np.stack([which[0], channel, row, column]), np.int32(-1))


def _phase(cells: np.ndarray, sources: Sequence[Source], most: int) -> list[Pick] | None:
    """The picks that give ``cells`` (4, C, h, w), at most ``most`` for a channel, or None."""
    groups: dict[tuple, np.ndarray] = {}
    covers: dict[bytes, list[tuple[tuple, int]] | None] = {}
    # Channels that differ in nothing but their number in this phase are covered alike.
    patterns, firsts = _patterns(cells)
    for o in np.flatnonzero((patterns[:, 0] >= 0).any(axis=(1, 2))):
        key, first = patterns[o].tobytes(), firsts[o]
        if key not in covers:
            covers[key] = _cover(patterns[o], sources, most)
        cover = covers[key]
        if cover is None or len(groups) > MAX_PICKS:
            return None
        for place, offset in cover:
            channels = groups.setdefault(place, np.full(cells.shape[1], -1))
            if channels[o] >= 0:  # the same places of two channels: not in one pick
                return None
            channels[o] = first + offset
    return [
        Pick(
            x=sources[s][0],
            channels=channels,
            strides=strides,
            offsets=offsets,
            scale=sources[s][1],
        )
        for (s, strides, offsets), channels in groups.items()
    ]


def _cover(
    pattern: np.ndarray, sources: Sequence[Source], most: int
) -> list[tuple[tuple, int]] | None:
    """Picks (source, strides, offsets) with their channels that together give a channel (source,
    channel, rows, columns): each the largest that starts with the first element left."""
    source, channel, rows, columns = pattern
    left = source >= 0
    # A pick takes elements of one channel only.
    kinds = source.astype(np.int64) << 32 | (channel + np.abs(channel).max())
    if (kinds[left] != kinds[left][0]).any() if most == 1 else len(np.unique(kinds[left])) > most:
        return None
    out: list[tuple[tuple, int]] = []
    while left.any():
        if len(out) == most:
            return None
        i, j = (int(v) for v in np.unravel_index(np.argmax(left), left.shape))
        s, own = int(source[i, j]), int(channel[i, j])
        mine = left & (source == s) & (channel == own)
        height, width = sources[s][2][2:]
        best: tuple[int, tuple, tuple[np.ndarray, ...]] | None = None
        largest = np.count_nonzero(mine)
        across = list(_lines(columns[i], mine[i], j, width))
        for sy, oy, ys in _lines(rows[:, j], mine[:, j], i, height):
            for sx, ox, xs in across:
                size = len(ys) * len(xs)
                if not (best[0] if best else 0) < size <= largest:
                    continue
                box = np.ix_(ys, xs)
                if (
                    mine[box].all()
                    and (rows[box] == (ys * sy + oy)[:, None]).all()
                    and (columns[box] == xs * sx + ox).all()
                ):
                    best = (size, (s, (sy, sx), (oy, ox)), box)
        if best is None:
            return None
        out.append((best[1], own))
        left[best[2]] = False
    return out


def _lines(
    places: np.ndarray, mine: np.ndarray, first: int, size: int
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Stride and offset of the lines of an axis that start at ``first``, and which places of the
    output they fill: on with the next place of the same source, and alone."""
    strides = {1, size} if 1 in (size, len(places)) else {size}
    behind = np.flatnonzero(mine[first + 1 :])
    if len(behind):
        rise, run = int(places[first + 1 + behind[0]] - places[first]), int(behind[0]) + 1
        if rise > 0 and rise % run == 0:
            strides.add(rise // run)
    for stride in sorted(strides):
        offset = int(places[first]) - first * stride
        taken = np.arange(len(places)) * stride + offset
        if stride <= MAX_STRIDE and np.abs(taken[[0, -1]]).max() <= MAX_OFFSET:
            yield stride, offset, np.flatnonzero((taken >= 0) & (taken < size))
