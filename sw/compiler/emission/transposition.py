"""WINDOW IM2COL commands that exchange channels and positions."""

from __future__ import annotations

from systole.isa import Engine, Opcode, WindowOp
from systole.sw.compiler.emission import fields
from systole.sw.compiler.emission.activations import ActivationMover
from systole.sw.compiler.emission.context import EmissionContext, OutputGroup
from systole.sw.compiler.emission.transfers import TransferBox, transfer
from systole.sw.compiler.emission.views import BufferView
from systole.sw.compiler.regions import Extent, Region
from systole.sw.compiler.stages import TransposeStage
from systole.sw.compiler.stream import Span, StreamMemory


class TransposeEmitter:
    """Emits transposition stages: a range of channels, some words of positions at a time."""

    def __init__(self, context: EmissionContext, activations: ActivationMover):
        self.context = context
        self.activations = activations

    def region(self, i: int, stage: TransposeStage, region: Region) -> None:
        """All groups of a region."""
        for number in range(stage.groups):
            x = self._positions(i, stage, region, number)
            group = self.activations.output(i, region, number)
            words = min(stage.group_words, stage.blocks - number * stage.group_words)
            for channels in self._channels(stage, region):
                self._command(group, stage, x, channels, words)
            self.activations.store(group)

    def _channels(self, stage: TransposeStage, region: Region) -> list[Extent]:
        """The region's channels as rectangles: ``y`` and ``h`` count blocks, ``x`` and ``w``
        channels within each."""
        rows, at = self.context.config.rows, stage.first + region.x
        out, end = [], at + region.w
        while at < end:
            block, lane = divmod(at, rows)
            width, height = min(rows - lane, end - at), 1
            if width == rows:
                height = (end - at) // rows
            out.append(Extent(block, lane, height, width))
            at += width * height
        return out

    def _positions(self, i: int, stage: TransposeStage, region: Region, group: int) -> BufferView:
        """The positions of a group, of the channel blocks that a region meets; y counts blocks."""
        (source,) = stage.sources
        context, rows = self.context, self.context.config.rows
        channel = stage.first + region.x
        first, end = channel // rows, -(-(channel + region.w) // rows)
        most = stage.group_words * rows
        position = group * most
        count = min(most, source.w - position)
        if source.tensor in context.plan.resident:
            whole = self.activations.resident_view(source, region.n)
            base, pitch = whole.at(0, position, first), whole.block
        else:
            base, pitch = self.activations.slot(0, i), most
            word = (region.n * source.blocks + first) * source.w + position
            box = TransferBox(
                address=context.dram_address(source.tensor, word),
                local=base,
                counts=(1, end - first, count),
                dram_steps=(0, source.w * context.config.vector_bytes),
                local_steps=(0, pitch),
            )
            transfer(context, Engine.LOAD, i, box)
        return BufferView(
            base=base, pitch=pitch, block=0, y=first, x=position, h=end - first, w=count
        )

    def _command(
        self,
        group: OutputGroup,
        stage: TransposeStage,
        x: BufferView,
        channels: Extent,
        words: int,
    ) -> None:
        """A command that makes ``words`` words of some channels. An output word takes one byte of
        each of ``rows`` words of the input; a row of the window is a block of it."""
        i, out, rows = group.index, group.out, self.context.config.rows
        block, lane, height, width = channels
        src, at = x.at(block, x.x), out.at(0, block * rows + lane - stage.first)
        values = fields.window(
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
            pad=stage.sources[0].zero,
            out=at,
            out_pitch=rows,
            out_block=out.block,
        )
        memory = StreamMemory.SCRATCHPAD
        read = Span(memory, src, (1, height, x.w), (0, x.pitch))
        written = Span(memory, at, (1, words, width * height), (0, out.block))
        self.context.stream.emit(Opcode.WINDOW, values, [read], [written], stage=i)
