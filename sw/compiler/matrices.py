"""Emission of products of activations and of transposition."""

from __future__ import annotations

from systole.isa import Engine, LoadTarget, Opcode, WindowOp
from systole.sw.compiler.moves import BufferView, Mover
from systole.sw.compiler.plan import Region, cuts
from systole.sw.compiler.stages import Stage
from systole.sw.compiler.stream import Span, StreamMemory, run
from systole.sw.compiler.weights import WeightRing


class MatrixEmitter(Mover):
    """The part of :class:`~sw.compiler.emit.Emitter` for these stages."""

    ring: WeightRing
    _half: int
    _piece_limit: int

    # Products ------------------------------------------------------------------------------------

    def product(self, i: int, column: int, tile: Region, x: BufferView) -> None:
        """The CONV commands of one tile of a product."""
        stage = self.stages[i]
        product, spread = stage.product, stage.sources[0].spread
        rows, lane = self.config.rows, product.lanes[tile.n]
        accumulate = False
        for first, count in cuts(spread.blocks[tile.n], self._piece_limit // rows):
            at = self._matrix_rows(i, product.tensor, column, tile.n, first, count)
            self._multiply(i, tile, x, first, count, at, accumulate, None)
            accumulate = True
            for pad in product.pads:
                at = self._matrix_rows(i, product.tensors[-1], column, tile.n, first, count)
                self._multiply(i, tile, x, first, count, at, accumulate, pad)
            for offset in product.zeros[lane]:
                at = self._constant_rows(i, offset + first * rows, count * rows)
                self._multiply(i, tile, x, first, count, at, accumulate, None)

    def _matrix_rows(
        self, i: int, tensor: str, column: int, image: int, first: int, count: int
    ) -> int:
        """Weight-buffer address of the rows that go with ``count`` blocks of the input, zeros
        around the matrix; loaded if they are not there any more."""
        product = self.stages[i].product
        rows, lane = self.config.rows, product.lanes[image]
        start = product.spread.starts[image] + column * product.spread.step
        key = (i, tensor, start, lane, first)
        at = self.ring.find(key)
        if at is not None:
            return at
        words = count * rows
        at = self.ring.place([(key, words)])
        # Rows of the matrix that lie in this part of it.
        low = max(first * rows - lane, 0)
        high = min((first + count) * rows - lane, product.depth)
        head = low + lane - first * rows
        self._load_weights(i, self.constants[(i, "weights")], at, head)
        self._load_weights(
            i, self.dram[tensor] + (start + low) * self.vector, at + head, high - low
        )
        tail = words - head - (high - low)
        self._load_weights(i, self.constants[(i, "weights")], at + words - tail, tail)
        return at

    def _constant_rows(self, i: int, offset: int, words: int) -> int:
        key = (i, "zero", offset)
        at = self.ring.find(key)
        if at is None:
            at = self.ring.place([(key, words)])
            address = self.constants[(i, "weights")] + offset * self.config.weight_vector_bytes
            self._load_weights(i, address, at, words)
        return at

    def _load_weights(self, i: int, address: int, at: int, words: int) -> None:
        if words == 0:
            return
        fields = dict(
            target=LoadTarget.WEIGHTS, dram=address, count0=words, count1=1, count2=1, local=at
        )
        self.stream.emit(
            Opcode.LOAD,
            fields,
            [self.stream.dram(address, words * self.config.weight_vector_bytes)],
            [run(StreamMemory.WEIGHTS, at, words)],
            layer=i,
            engine=Engine.WLOAD,
        )

    def _multiply(
        self,
        i: int,
        tile: Region,
        x: BufferView,
        first: int,
        count: int,
        weights: int,
        accumulate: bool,
        pad: int | None,
    ) -> None:
        """One CONV command over ``count`` blocks from block ``first`` of the input, or of ``pad``
        alone, in every lane."""
        fields = dict(
            accumulate=int(accumulate),
            weights=weights,
            acc=self._half * self.config.acc_half,
            blocks=count,
            src=x.at(x.y, tile.x, first),
            src_pitch=x.pitch,
            src_block=x.block,
            in_w=tile.w,
            in_h=1,
            # Wholly to the left of the input: nothing of it is read.
            x0=0 if pad is None else -tile.w,
            y0=0,
            out_w=tile.w,
            out_h=1,
            kernel_w=1,
            kernel_h=1,
            stride_x=1,
            stride_y=1,
            dilation_x=1,
            dilation_y=1,
            pad=pad or 0,
        )
        reads = [run(StreamMemory.WEIGHTS, weights, count * self.config.rows)]
        if pad is None:
            reads.append(x.span(first, count, 0, tile.x - x.x, 1, tile.w))
        acc = run(StreamMemory.ACCUMULATORS, self._half, 1)
        self.stream.emit(Opcode.CONV, fields, reads, [acc], layer=i)

    # Transposition -------------------------------------------------------------------------------

    def transpose(self, i: int, region: Region) -> None:
        """A range of channels, some words of positions at a time."""
        stage = self.stages[i]
        for group in range(stage.groups):
            x = self._positions(i, stage, region, group)
            out = self.output(i, region, group)
            words = min(stage.group_words, stage.blocks - group * stage.group_words)
            for channel, width, height in self._channels(region):
                self._transpose(i, words, x, out, channel, width, height)
            self.store(i, region, group, out)

    def _channels(self, region: Region) -> list[tuple[int, int, int]]:
        """The region's channels as rectangles of (width) channels in (height) blocks: first
        channel, width, height."""
        rows, end = self.config.rows, region.x + region.w
        out, at = [], region.x
        while at < end:
            width, height = min(rows - at % rows, end - at), 1
            if width == rows:
                height = (end - at) // rows
            out.append((at, width, height))
            at += width * height
        return out

    def _positions(self, i: int, stage: Stage, region: Region, group: int) -> BufferView:
        """The positions of a group, of the channel blocks that a region meets; y counts blocks."""
        (source,) = stage.sources
        rows = self.config.rows
        first, end = region.x // rows, -(-(region.x + region.w) // rows)
        most = stage.group_words * rows
        position = group * most
        count = min(most, source.w - position)
        if source.tensor in self.plan.resident:
            whole = self.resident_view(source, region.n)
            base = whole.at(0, position, first)
            return BufferView(base, whole.block, 0, first, position, end - first, count)
        view = BufferView(self.slot(0, i), most, 0, first, position, end - first, count)
        word = (region.n * source.blocks + first) * source.w + position
        self._transfer(
            Engine.LOAD,
            i,
            self.dram[source.tensor] + word * self.vector,
            view.base,
            (1, end - first, count),
            (0, source.w * self.vector),
            (0, view.pitch),
        )
        return view

    def _transpose(
        self,
        i: int,
        words: int,
        x: BufferView,
        out: BufferView,
        channel: int,
        width: int,
        height: int,
    ) -> None:
        """Of ``height`` blocks of ``width`` channels. An output word takes one byte of each of
        ``rows`` words of the input; a row of the window is a block of it."""
        rows, zero = self.config.rows, self.stages[i].sources[0].zero
        block, lane = divmod(channel, rows)
        src = x.at(block, x.x)
        fields = dict(
            op=WindowOp.IM2COL,
            blocks=1,
            run=1,
            src=src,
            src_pitch=x.pitch,
            in_w=x.w * rows,
            in_h=height,
            x0=lane,
            y0=0,
            out_w=width,
            out_h=height,
            kernel_w=rows * words,
            kernel_h=1,
            stride_x=1,
            stride_y=1,
            dilation_x=rows,
            dilation_y=1,
            pad=zero,
            out=out.at(0, channel),
            out_pitch=rows,
            out_block=out.block,
        )
        read = Span(StreamMemory.SCRATCHPAD, src, (1, height, x.w), (0, x.pitch))
        written = Span(
            StreamMemory.SCRATCHPAD, fields["out"], (1, words, width * height), (0, out.block)
        )
        self.stream.emit(Opcode.WINDOW, fields, [read], [written], layer=i)
