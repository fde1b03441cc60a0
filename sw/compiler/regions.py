"""Regions: the rectangles of a stage's output that are worked on at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

from systole.isa import Config
from systole.sw.compiler.stages import Geometry, Source, Stage

TILE = 256
"""Outputs of one CONV command: long enough to hide the next tile's weights, short enough that the
last POST of a layer is soon over."""


class Extent(NamedTuple):
    """A rectangle of an image."""

    y: int
    x: int
    h: int
    w: int

    @property
    def pixels(self) -> int:
        return self.h * self.w


class Region(NamedTuple):
    """A rectangle of output pixels of one image of the batch."""

    n: int
    y: int
    x: int
    h: int
    w: int

    @property
    def pixels(self) -> int:
        return self.h * self.w

    @property
    def extent(self) -> Extent:
        """The rectangle without the image's number."""
        return Extent(self.y, self.x, self.h, self.w)


def input_extent(source: Source, region: Region) -> Extent:
    """The part of ``source`` that a region needs; packed rows are taken whole."""
    if source.broadcast:
        return Extent(0, 0, 1, 1)
    y0, y1 = source.span(0, region.y, region.h)
    x0, x1 = (0, source.w) if source.packed else source.span(1, region.x, region.w)
    return Extent(y0, x0, y1 - y0, x1 - x0)


def output_extent(stage: Stage, region: Region) -> Extent:
    """The rectangle of the output that a region makes, all phases together."""
    (fh, fw), y, x = stage.steps, region.y * stage.steps[0], region.x * stage.steps[1]
    return Extent(y, x, min(region.h * fh, stage.out_h - y), min(region.w * fw, stage.out_w - x))


def part_of(source: Source, g: Geometry, ky: int, rows: int) -> Source:
    """The source as read by one pass, ``rows`` kernel rows from row ``ky`` alone."""
    rows = min(rows, g.kernel[0] - ky)
    pads = (g.pads[0] - ky * g.dilations[0], g.pads[1])
    part = dataclasses.replace(g, kernel=(rows, g.kernel[1]), pads=pads)
    return dataclasses.replace(source, geometries=(part,))


def cuts(size: int, step: int) -> list[tuple[int, int]]:
    """``size`` in equal pieces of at most ``step``: (start, length)."""
    pieces = -(-size // step)
    edges = [size * i // pieces for i in range(pieces + 1)]
    return [(a, b - a) for a, b in zip(edges, edges[1:])]


def tiles(region: Region, config: Config) -> Iterator[Region]:
    """The region in pieces of about TILE outputs that an accumulator half holds."""
    limit = min(TILE, config.acc_half)
    if region.w > limit:
        rows, columns = 1, limit
    else:
        rows, columns = max(1, limit // region.w), region.w
    for y, h in cuts(region.h, rows):
        for x, w in cuts(region.w, columns):
            yield Region(region.n, region.y + y, region.x + x, h, w)


def grid(stage: Stage, h: int, w: int) -> list[Region]:
    """The stage's output in regions of at most ``h`` x ``w``."""
    return [
        Region(n, y, x, rh, rw)
        for n in range(stage.batch)
        for y, rh in cuts(stage.h, h)
        for x, rw in cuts(stage.w, w)
    ]


def region_sizes(stage: Stage, most: int) -> Iterator[tuple[int, int]]:
    """Rows and columns of regions of at most about ``most`` outputs, largest first: whole rows,
    then parts of a row."""
    pieces = -(-stage.h // max(1, min(stage.h, most // stage.w)))
    last = 0
    while pieces <= stage.h and (stage.h > 1 or stage.w <= most):
        rows = -(-stage.h // pieces)
        if rows != last:
            yield rows, stage.w
            last = rows
        pieces += max(1, pieces // 4)
    if last > 1:
        yield 1, stage.w
    pieces = max(2, -(-stage.w // most))
    while pieces < 2 * stage.w:
        yield 1, -(-stage.w // pieces)
        pieces += max(1, pieces // 4)
