"""WINDOW commands of Softmax and normalisation."""

from __future__ import annotations

from collections.abc import Iterator

from systole.isa import Opcode
from systole.isa.commands import ROW_POSITIONS
from systole.sw.compiler.emission import fields
from systole.sw.compiler.emission.context import EmissionContext, OutputGroup
from systole.sw.compiler.emission.views import BufferView
from systole.sw.compiler.regions import Extent, Region, cuts
from systole.sw.compiler.stages import POINTWISE, RowStage
from systole.sw.compiler.stream import StreamMemory, run


class RowEmitter:
    """Emits the WINDOW commands of row stages."""

    def __init__(self, context: EmissionContext):
        self.context = context

    def group(self, group: OutputGroup, stage: RowStage, x: BufferView) -> None:
        """A region: a command for every piece of it."""
        for extent, features in _pieces(stage, group.region):
            self._command(group, stage, x, extent, features)

    def _command(
        self, group: OutputGroup, stage: RowStage, x: BufferView, extent: Extent, features: int
    ) -> None:
        """One command; ``features``: channels that count at its first position."""
        out = group.out
        params = self.context.fixed_word(group.index, "params")
        values = fields.window(
            op=stage.row_op,
            blocks=stage.blocks,
            features=features,
            causal=bool(stage.period),
            src=x.at(extent.y, extent.x),
            src_block=x.block,
            pad=stage.sources[0].zero,
            out=out.at(extent.y, extent.x),
            out_block=out.block,
            out_w=extent.w,
            out_h=1,
            params=params,
            **fields.sliding(POINTWISE, extent),
            **fields.requantisation(stage.requant),
        )
        reads = [
            x.words(extent, blocks=stage.blocks),
            run(StreamMemory.SCRATCHPAD, params, len(stage.params)),
        ]
        written = out.words(extent, blocks=stage.blocks)
        self.context.stream.emit(Opcode.WINDOW, values, reads, [written], stage=group.index)


def _pieces(stage: RowStage, region: Region) -> Iterator[tuple[Extent, int]]:
    """Parts of a row of the region that one command takes, each with the channels that count at
    its first position."""
    for y in range(region.y, region.y + region.h):
        x, end = region.x, region.x + region.w
        while x < end:
            first = stage.w * y + x
            stop = end
            if stage.period:
                stop = min(end, x + stage.period - first % stage.period)
            for at, w in cuts(stop - x, ROW_POSITIONS):
                features = (first + at) % stage.period + 1 if stage.period else stage.channels
                yield Extent(y, x + at, 1, w), features
            x = stop
