"""POST commands: accumulators or scratchpad to scratchpad."""

from __future__ import annotations

from collections.abc import Mapping

from systole.isa import Opcode, PostOp, PostSource
from systole.sw.compiler.emission import fields
from systole.sw.compiler.emission.context import EmissionContext, OutputGroup, accumulators
from systole.sw.compiler.emission.tiles import ArrayTile
from systole.sw.compiler.emission.views import BufferView
from systole.sw.compiler.limits import largest
from systole.sw.compiler.regions import Extent, cuts
from systole.sw.compiler.stages import ArrayStage, VectorStage
from systole.sw.compiler.stream import Span, StreamMemory, run

MAX_GROUPS = largest(Opcode.POST, "groups")
"""Groups of ``lanes`` channels that one command processes."""


class PostEmitter:
    """Emits POST commands."""

    def __init__(self, context: EmissionContext):
        self.context = context
        self._per_word = context.config.rows // context.config.lanes
        """Groups of ``lanes`` channels in a scratchpad word."""

    def requantise(
        self, tile: ArrayTile, group: OutputGroup, views: Mapping[int, BufferView]
    ) -> None:
        """A tile's accumulators to its place in the output."""
        config, stage, region, out = self.context.config, tile.stage, tile.region, group.out
        phase = stage.phases[tile.phase]
        first = tile.column * config.cols
        lane_groups = -(-min(config.cols, stage.channels - first) // config.lanes)
        # Position within the group of words that the view starts at.
        position = first // config.lanes - group.group * stage.group_words * self._per_word
        block, lane = divmod(position, self._per_word)
        words = -(-(lane + lane_groups) // self._per_word)
        params = self.context.fixed_word(tile.index, "params") + phase.params
        params += (first // config.lanes) * config.param_words
        reads = [
            accumulators(tile.half),
            run(StreamMemory.SCRATCHPAD, params, lane_groups * config.param_words),
        ]
        steps_y, steps_x = stage.steps
        y, x = region.y * steps_y + phase.y, region.x * steps_x + phase.x
        values = fields.post(
            source=PostSource.ACCUMULATOR,
            acc=tile.half * config.acc_half,
            groups=lane_groups,
            lane=lane,
            out_w=region.w,
            out_h=region.h,
            out=out.at(y, x, block),
            out_pitch=out.pitch * steps_y,
            out_step=steps_x,
            out_block=out.block,
            params=params,
            **fields.requantisation(stage.requant),
            **self._other_operand(tile, views, block),
        )
        if stage.combine is not None:
            reads.append(views[len(stage.sources) - 1].words(region.extent, block, words))
        # Interleaved outputs: the rectangle between the first and the last counts as written; its
        # other words are POST's too.
        written = Extent(y, x, (region.h - 1) * steps_y + 1, (region.w - 1) * steps_x + 1)
        self._emit(tile.index, stage, values, reads, out.words(written, block, words))

    def _other_operand(
        self, tile: ArrayTile, views: Mapping[int, BufferView], block: int
    ) -> dict[str, int]:
        """The fields of what a tile is combined with: the stage's last source."""
        if tile.stage.combine is None:
            return dict(op=PostOp.NONE)
        other = views[len(tile.stage.sources) - 1]
        return fields.combination(tile.stage.combine) | dict(
            b=other.at(tile.region.y, tile.region.x, block),
            b_pitch=other.pitch,
            b_step=1,
            b_block=other.block,
        )

    def vector(
        self, group: OutputGroup, stage: VectorStage, views: Mapping[int, BufferView]
    ) -> None:
        """A group from the scratchpad: ``a`` is the first source, ``b`` the second."""
        region, out, a = group.region, group.out, views[0]
        values = dict(
            source=PostSource.SCRATCHPAD,
            groups=self._per_word,
            out_w=region.w,
            out_h=region.h,
            out=out.at(region.y, region.x),
            out_pitch=out.pitch,
            out_step=1,
            out_block=out.block,
            a=a.at(region.y, region.x),
            a_pitch=a.pitch,
            a_block=a.block,
            **fields.combination(stage.combine),
        )
        reads = [a.words(region.extent)]
        if len(stage.sources) > 1:
            b = views[1]
            # Only b can stand still; the loader sees to that.
            still = stage.sources[1].broadcast
            values |= dict(
                b=b.base if still else b.at(region.y, region.x),
                b_pitch=0 if still else b.pitch,
                b_block=b.block,
                b_step=0 if still else 1,
            )
            reads.append(b.words(Extent(b.y, b.x, 1, 1) if still else region.extent))
        values = fields.post(**values)
        self._emit(group.index, stage, values, reads, out.words(region.extent))

    def copy(self, i: int, source: BufferView, out: BufferView, blocks: int) -> None:
        """Copy a rectangle of a tensor within the scratchpad."""
        for block, count in cuts(blocks, MAX_GROUPS // self._per_word):
            values = fields.post(
                source=PostSource.SCRATCHPAD,
                op=PostOp.NONE,
                groups=count * self._per_word,
                out_w=out.w,
                out_h=out.h,
                out=out.at(out.y, out.x, block),
                out_pitch=out.pitch,
                out_step=1,
                out_block=out.block,
                a=source.at(out.y, out.x, block),
                a_pitch=source.pitch,
                a_block=source.block,
            )
            read = source.words(out.extent, block, count)
            written = out.words(out.extent, block, count)
            self.context.stream.emit(Opcode.POST, values, [read], [written], stage=i)

    def _emit(
        self,
        i: int,
        stage: ArrayStage | VectorStage,
        values: dict[str, int],
        reads: list[Span],
        written: Span,
    ) -> None:
        """A POST command, with the stage's table if it has one."""
        if stage.table is not None:
            table = self.context.fixed_word(i, "table")
            values |= fields.post(lut=1, table=table)
            reads = [*reads, run(StreamMemory.SCRATCHPAD, table, len(stage.table))]
        self.context.stream.emit(Opcode.POST, values, reads, [written], stage=i)
