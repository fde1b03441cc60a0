"""CONV commands of products of two activations: one of them comes as weights."""

from __future__ import annotations

from typing import NamedTuple

from systole.isa import Opcode
from systole.sw.compiler.emission import fields
from systole.sw.compiler.emission.activations import ChannelBlocks
from systole.sw.compiler.emission.context import EmissionContext, accumulators
from systole.sw.compiler.emission.tiles import ArrayTile
from systole.sw.compiler.emission.views import BufferView
from systole.sw.compiler.emission.weights import WeightLoader
from systole.sw.compiler.regions import Extent, cuts
from systole.sw.compiler.stages import POINTWISE, Geometry, Product
from systole.sw.compiler.stream import StreamMemory, run


class MatrixKey(NamedTuple):
    """Names rows of a matrix in the weight buffer."""

    stage: int
    tensor: str
    start: int
    """Word of weights of the matrix' first row in its tensor."""
    lane: int
    """Lane of the input that the first row goes with."""
    block: int
    """First block of the input that the rows go with."""


class ConstantKey(NamedTuple):
    """Names rows of a constant matrix in the weight buffer."""

    stage: int
    offset: int
    """First word in the stage's weights."""


class ProductEmitter:
    """Emits the CONV commands of products, and the loads of their matrices."""

    def __init__(self, context: EmissionContext, weights: WeightLoader):
        self.context = context
        self.weights = weights

    def emit(self, tile: ArrayTile, product: Product, x: BufferView) -> None:
        """One tile of a product."""
        image, rows = tile.region.n, self.context.config.rows
        spread = tile.stage.sources[0].spread
        assert spread is not None
        accumulate = False
        for part in cuts(spread.blocks[image], self.weights.piece_limit // rows):
            blocks = ChannelBlocks(*part)
            at = self._matrix_rows(tile, product, product.tensor, blocks)
            self._multiply(
                tile,
                x,
                blocks,
                at,
                accumulate=accumulate,
                zero_points=(product.input_zero, product.weight_zero),
            )
            accumulate = True
            for pad in product.pads:
                at = self._matrix_rows(tile, product, product.tensors[-1], blocks)
                self._multiply(tile, x, blocks, at, pad=pad)
            for offset in product.zeros[product.lanes[image]]:
                at = self._constant_rows(tile, offset, blocks)
                self._multiply(tile, x, blocks, at)

    def _matrix_rows(
        self, tile: ArrayTile, product: Product, tensor: str, blocks: ChannelBlocks
    ) -> int:
        """Weight-buffer address of the rows that go with some blocks of the input, zeros around the
        matrix; loaded if they are not there any more."""
        i, image, rows = tile.index, tile.region.n, self.context.config.rows
        lane = product.lanes[image]
        start = product.spread.starts[image] + tile.column * product.spread.step
        key = MatrixKey(i, tensor, start, lane, blocks.first)
        at = self.weights.ring.find(key)
        if at is not None:
            return at
        words = blocks.count * rows
        at = self.weights.ring.place([(key, words)])
        # Rows of the matrix that lie in this part of it.
        low = max(blocks.first * rows - lane, 0)
        high = min((blocks.first + blocks.count) * rows - lane, product.depth)
        head = low + lane - blocks.first * rows
        tail = words - head - (high - low)
        zeros = self.context.weight_address(i)
        self.weights.load(i, zeros, at, head)
        matrix = self.context.matrix_address(tensor, start + low)
        self.weights.load(i, matrix, at + head, high - low)
        self.weights.load(i, zeros, at + words - tail, tail)
        return at

    def _constant_rows(self, tile: ArrayTile, offset: int, blocks: ChannelBlocks) -> int:
        """Weight-buffer address of the rows of a constant matrix that go with some blocks."""
        rows = self.context.config.rows
        start = offset + blocks.first * rows
        key = ConstantKey(tile.index, start)
        at = self.weights.ring.find(key)
        if at is None:
            words = blocks.count * rows
            at = self.weights.ring.place([(key, words)])
            self.weights.load(tile.index, self.context.weight_address(tile.index, start), at, words)
        return at

    def _multiply(
        self,
        tile: ArrayTile,
        x: BufferView,
        blocks: ChannelBlocks,
        at: int,
        *,
        accumulate: bool = True,
        pad: int | None = None,
        zero_points: tuple[int, int] = (0, 0),
    ) -> None:
        """One CONV command of some blocks of the input, or of ``pad`` alone in every lane, by the
        rows at address ``at``, both less their ``zero_points``."""
        config, region = self.context.config, tile.region
        row = Extent(x.y, region.x, 1, region.w)
        src = x.at(row.y, row.x, blocks.first)
        # For ``pad`` the window is wholly to the left of the input: nothing of it is read.
        window = POINTWISE if pad is None else Geometry(pads=(0, region.w))
        values = fields.conv(
            accumulate=int(accumulate),
            weights=at,
            acc=tile.half * config.acc_half,
            blocks=blocks.count,
            src=src,
            src_pitch=x.pitch,
            src_block=x.block,
            out_w=region.w,
            out_h=1,
            pad=pad or 0,
            input_zero=zero_points[0],
            weight_zero=zero_points[1],
            **fields.sliding(window, BufferView.of(src, row)),
        )
        reads = [run(StreamMemory.WEIGHTS, at, blocks.count * config.rows)]
        if pad is None:
            reads.append(x.words(row, blocks.first, blocks.count))
        self.context.stream.emit(
            Opcode.CONV, values, reads, [accumulators(tile.half)], stage=tile.index
        )
