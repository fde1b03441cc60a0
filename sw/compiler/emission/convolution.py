"""CONV commands of convolutions: a tile's passes, run by run of their weights."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

from systole.isa import Opcode
from systole.sw.compiler.emission import fields
from systole.sw.compiler.emission.activations import ActivationMover, ChannelBlocks
from systole.sw.compiler.emission.context import EmissionContext, accumulators
from systole.sw.compiler.emission.tiles import ArrayTile, TileRun
from systole.sw.compiler.emission.views import BufferView
from systole.sw.compiler.emission.weights import WantedPiece, WeightLoader
from systole.sw.compiler.regions import Extent, cuts, part_of
from systole.sw.compiler.stages import Geometry
from systole.sw.compiler.stream import StreamMemory, run
from systole.sw.compiler.weights import Piece, pieces

EAGER_PIECES = 8
"""Commands into which the first column block of a tile is cut at most."""

SLOW_TILE = 2
"""Tiles of this many times ``rows`` outputs keep the array busier than their weights the bus: the
weights of column blocks to come may then be loaded with theirs."""


class ConvolutionEmitter:
    """Emits the CONV commands of convolutions, and the loads of their weights."""

    def __init__(
        self, context: EmissionContext, activations: ActivationMover, weights: WeightLoader
    ):
        self.context = context
        self.activations = activations
        self.weights = weights

    def emit(self, tile: ArrayTile, views: Mapping[int, BufferView]) -> None:
        """All passes over a tile. Sources without a view are loaded part by part."""
        accumulate = False
        for each in tile.runs(tile.column):
            view = views.get(each.convolution.source)
            if view is None:
                self._emit_split(each, accumulate)
            else:
                self._emit_run(each, view, accumulate)
            accumulate = True

    def preload(self, tile: ArrayTile) -> None:
        """Load the first weights of a tile, before anything that may have to wait for space."""
        first = next(tile.runs(0), None)
        if first is not None:
            _, todo = self._pieces(first)
            self.weights.fetch(self._wanted(first, todo))

    def _emit_run(self, each: TileRun, x: BufferView, accumulate: bool) -> None:
        """One command, or one per piece of the reduction where the pieces arrive, or lie, one by
        one."""
        eager, todo = self._pieces(each)
        at = None if eager else self._held_in_a_row(each, todo)
        if at is not None:
            (kernel_h, kernel_w), blocks = each.kernel, each.weights.blocks
            whole = Piece(block=0, blocks=blocks, kernel_h=kernel_h, kernel_w=kernel_w)
            self._command(each, whole, x, at, accumulate)
            return
        for n, piece in enumerate(todo):
            at = self.weights.fetch(self._wanted(each, todo[n:]))
            self._command(each, piece, x, at, accumulate)
            accumulate = True

    def _pieces(self, each: TileRun) -> tuple[bool, tuple[Piece, ...]]:
        """Whether the input of a run is awaited block by block, and the run's pieces. The first
        column block of a tile follows its input as that is computed."""
        rows, limit = self.context.config.rows, self.weights.piece_limit
        eager = each.key.column == 0 and each.tile.region.pixels >= rows
        if eager:
            blocks = -(-each.weights.blocks // EAGER_PIECES)
            limit = min(limit, max(blocks * each.kernel[0] * each.kernel[1], 1) * rows)
        return eager, pieces(each.weights.blocks, each.kernel, rows, limit)

    def _held_in_a_row(self, each: TileRun, todo: tuple[Piece, ...]) -> int | None:
        """Address of a run's pieces, if all of them are in the weight buffer one behind the
        other."""
        first, following = None, 0
        for piece in todo:
            wanted = self._want(each, piece)
            at = self.weights.ring.find(wanted)
            if at is None or (first is not None and at != following):
                return None
            first = at if first is None else first
            following = at + wanted.words
        return first

    def _wanted(self, each: TileRun, todo: tuple[Piece, ...]) -> Iterator[WantedPiece]:
        """The pieces of a run, and where the array needs longer for them than the load those of the
        following runs."""
        tile = each.tile
        for piece in todo:
            yield self._want(each, piece)
        if tile.region.pixels >= SLOW_TILE * self.context.config.rows:
            for following in tile.runs_behind(each.key):
                for piece in self._pieces(following)[1]:
                    yield self._want(following, piece)

    def _want(self, each: TileRun, piece: Piece) -> WantedPiece:
        rows = self.context.config.rows
        start = each.weights.offset + piece.offset(*each.kernel, rows)
        return WantedPiece(each.tile.index, start, piece.words(rows))

    def _emit_split(self, each: TileRun, accumulate: bool) -> None:
        """A run whose source is loaded part by part, every command behind the load of its part."""
        tile, kernel = each.tile, each.kernel
        rows, limit = self.context.config.rows, self.weights.piece_limit
        split = self.context.plan.stages[tile.index].split
        assert split is not None
        for block, count in cuts(each.weights.blocks, split.blocks):
            for ky, kernel_rows in cuts(kernel[0], split.kernel_rows):
                x = self._part(
                    each, ChannelBlocks(each.weights.block + block, count), ky, kernel_rows
                )
                for inner in pieces(count, (kernel_rows, kernel[1]), rows, limit):
                    piece = replace(inner, block=block + inner.block, ky=ky + inner.ky)
                    at = self.weights.fetch([self._want(each, piece)])
                    self._command(each, piece, x, at, accumulate)
                    accumulate = True

    def _part(self, each: TileRun, blocks: ChannelBlocks, ky: int, kernel_rows: int) -> BufferView:
        """A view of a source in which some blocks, read by some kernel rows, are present."""
        tile, number = each.tile, each.convolution.source
        source = tile.stage.sources[number]
        if source.tensor in self.context.plan.resident:
            return self.activations.resident_view(source, tile.region.n)
        part = part_of(source, each.convolution.geometry, ky, kernel_rows)
        x = self.activations.load_part(tile.index, number, part, tile.region, blocks)
        return x.from_block(-blocks.first)

    def _command(
        self, each: TileRun, piece: Piece, x: BufferView, at: int, accumulate: bool
    ) -> None:
        """The CONV command of one piece of a run, whose weights begin at address ``at``."""
        config, tile = self.context.config, each.tile
        region, block = tile.region, piece.block + each.weights.block
        window = _window(each.convolution.geometry, piece.taps, region.extent, x.extent)
        values = fields.conv(
            accumulate=int(accumulate),
            weights=at,
            acc=tile.half * config.acc_half,
            blocks=piece.blocks,
            src=x.base + block * x.block,
            src_pitch=x.pitch,
            src_block=x.block,
            pad=tile.stage.sources[each.convolution.source].zero,
            weight_zero=each.convolution.weight_zero,
            out_w=region.w,
            out_h=region.h,
            **window.fields,
        )
        self.context.stream.emit(
            Opcode.CONV,
            values,
            [
                x.words(window.read, block, piece.blocks),
                run(StreamMemory.WEIGHTS, at, piece.words(config.rows)),
            ],
            [accumulators(tile.half)],
            stage=tile.index,
        )


class _Window(NamedTuple):
    """How a CONV command slides over its input."""

    fields: dict[str, int]
    read: Extent
    """What it reads of the tensor."""


@functools.lru_cache(4096)
def _window(g: Geometry, taps: Extent, out: Extent, view: Extent) -> _Window:
    """The window of some ``taps`` of the kernel over a view of the input, for the outputs ``out``;
    kept, as most commands of a stage differ in their weights alone."""
    y0 = out.y * g.strides[0] - g.pads[0] + taps.y * g.dilations[0] - view.y
    x0 = out.x * g.strides[1] - g.pads[1] + taps.x * g.dilations[1] - view.x
    part = Geometry((taps.h, taps.w), g.strides, (-y0, -x0), g.dilations)
    top, bottom = part.span(0, 0, out.h, view.h)
    left, right = part.span(1, 0, out.w, view.w)
    read = Extent(view.y + top, view.x + left, bottom - top, right - left)
    return _Window(fields.sliding(part, view), read)
