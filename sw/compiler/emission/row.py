"""WINDOW commands of Softmax and normalisation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

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

    def group(self, group: OutputGroup, stage: RowStage, views: Mapping[int, BufferView]) -> None:
        """A region: a command for every piece of it. ``views``: its sources."""
        for piece in _pieces(stage, group.region):
            self._command(group, stage, views, piece)

    def _command(
        self, group: OutputGroup, stage: RowStage, views: Mapping[int, BufferView], piece: _Piece
    ) -> None:
        """One command."""
        out, extent, x = group.out, piece.extent, views[0]
        params = self.context.fixed_word(group.index, "params")
        values = fields.window(
            op=stage.row_op,
            blocks=stage.blocks,
            features=piece.features,
            causal=piece.causal,
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
        if len(stage.sources) > 1:
            single = stage.sources[1].broadcast
            used = Extent(0, 0, 1, 1) if single else extent
            values |= dict(
                masked=1,
                weights=views[1].at(used.y, used.x),
                mask_step=int(not single),
                mask_block=views[1].block,
            )
            reads.append(views[1].words(used, blocks=stage.blocks))
        written = out.words(extent, blocks=stage.blocks)
        self.context.stream.emit(Opcode.WINDOW, values, reads, [written], stage=group.index)


class _Piece(NamedTuple):
    """What one command takes: positions in a row of the region."""

    extent: Extent
    features: int
    """Channels that count at its first position."""
    causal: bool
    """One more counts at every further position."""


def _pieces(stage: RowStage, region: Region) -> Iterator[_Piece]:
    """The region, piece by piece."""
    for y in range(region.y, region.y + region.h):
        x, end = region.x, region.x + region.w
        while x < end:
            stop, features, causal = end, stage.channels, False
            if stage.period:
                # Where there are more positions than channels, the last ones take all of these.
                at = (stage.w * y + x) % stage.period
                causal = at + 1 < stage.channels
                stop = min(end, x + (stage.channels if causal else stage.period) - at)
                stop = min(stop, x + stage.period - at)
                features = min(at + 1, stage.channels)
            for first, w in cuts(stop - x, ROW_POSITIONS):
                yield _Piece(Extent(y, x + first, 1, w), features + causal * first, causal)
            x = stop
