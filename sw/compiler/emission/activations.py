"""Activations: where stages find their inputs and put their outputs; loads and stores."""

from __future__ import annotations

from dataclasses import dataclass

from systole.isa import Engine
from systole.sw.compiler.emission.context import EmissionContext, OutputGroup
from systole.sw.compiler.emission.post import PostEmitter
from systole.sw.compiler.emission.transfers import TransferBox, transfer
from systole.sw.compiler.emission.views import BufferView
from systole.sw.compiler.plan import CopyKey
from systole.sw.compiler.regions import Region, cuts, input_extent, output_extent
from systole.sw.compiler.stageplan import Role
from systole.sw.compiler.stages import Source

LOAD_WORDS = 1024
"""Activation words one LOAD brings, about."""

STORE_WORDS = 8
"""Activation words for which one STORE waits."""

RESIDENT_LOADS = 8
"""LOADs, about, that bring a resident graph input: what reads its beginning need not wait for all
of it."""

MIN_RESIDENT_LOAD = 128
"""Words that one of these brings at least."""


@dataclass(frozen=True)
class ChannelBlocks:
    """Consecutive channel blocks."""

    first: int
    count: int


class ActivationMover:
    """Loads, stores and addresses of a plan's activations."""

    def __init__(self, context: EmissionContext, post: PostEmitter):
        """``post``: what copies within the scratchpad."""
        self.context = context
        self.post = post
        plan = context.plan
        self._next_copy: dict[tuple[Role, int], int] = {}
        self._computed = {s.op.output for s in context.stages}
        self._loaded: set[str] = set()
        self._origins: dict[str, int] = dict.fromkeys(plan.rolls, 0)

    # Buffers -------------------------------------------------------------------------------------

    def slot(self, role: Role, i: int) -> int:
        """The first word of the next copy of a stage's buffer."""
        plan = self.context.plan
        copies = plan.stages[i].buffers[role].copies
        copy = self._next_copy.get((role, i), 0)
        self._next_copy[role, i] = (copy + 1) % copies
        return plan.addresses[CopyKey(role, i, copy)]

    def resident_view(self, source: Source, n: int) -> BufferView:
        """A whole resident image."""
        base = self.context.tensor_word(source.tensor)
        if source.spread is not None:
            start, step = source.spread.starts[n], source.spread.step
        else:
            step = source.h * source.w
            start = n * source.blocks * step
        return BufferView(base=base + start, pitch=source.w, block=step, h=source.h, w=source.w)

    def _rolling_view(self, tensor: str, y: int, h: int) -> BufferView:
        """Rows of a tensor that slides through the scratchpad."""
        roll = self.context.plan.rolls[tensor]
        base = self.context.tensor_word(tensor) + (y - self._origins[tensor]) * roll.width
        block = roll.rows * roll.width
        return BufferView(base=base, pitch=roll.width, block=block, y=y, h=h, w=roll.width)

    def slide(self, i: int, stripe: int) -> None:
        """Make room for a stripe of a stage's output; rows still to be read come along."""
        stage = self.context.stages[i]
        tensor = stage.op.output
        roll = self.context.plan.rolls[tensor]
        y, end = roll.kept[stripe]
        old = self._rolling_view(tensor, y, end - y) if y < end else None
        self._origins[tensor] = roll.origins[stripe]
        if old is not None:
            self.post.copy(i, old, self._rolling_view(tensor, y, end - y), stage.blocks)

    # Inputs --------------------------------------------------------------------------------------

    def load_resident_inputs(self, i: int) -> None:
        """Bring a stage's resident graph inputs into the scratchpad, once."""
        context, resident = self.context, self.context.plan.resident
        stage = context.stages[i]
        for source in stage.sources:
            name = source.tensor
            if name in self._computed or name in self._loaded or name not in resident:
                continue
            self._loaded.add(name)
            words, base = source.tensor_words(stage.batch), context.tensor_word(name)
            step = min(LOAD_WORDS, max(MIN_RESIDENT_LOAD, -(-words // RESIDENT_LOADS)))
            for at, count in cuts(words, step):
                address = context.dram_address(name, at)
                box = TransferBox(address=address, local=base + at, counts=(1, 1, count))
                transfer(context, Engine.LOAD, i, box)

    def input(self, i: int, k: int, region: Region, group: int = 0) -> BufferView:
        """The part of source ``k`` that a region (and output group, for sources read by group)
        needs, in the scratchpad; loaded now unless it is resident. Its block 0 is the group's
        first."""
        plan, stage = self.context.plan, self.context.stages[i]
        source = stage.sources[k]
        blocks = ChannelBlocks(0, source.blocks)
        if source.per_group:
            first = group * stage.group_words
            blocks = ChannelBlocks(first, min(stage.group_words, source.blocks - first))
        if source.tensor in plan.resident:
            return self.resident_view(source, region.n).from_block(blocks.first)
        if source.tensor in plan.rolls:
            y, _, h, _ = input_extent(source, region)
            return self._rolling_view(source.tensor, y, h).from_block(blocks.first)
        return self.load_part(i, k, source, region, blocks)

    def load_part(
        self, i: int, k: int, source: Source, region: Region, blocks: ChannelBlocks
    ) -> BufferView:
        """Load what a region needs of some blocks of a source, number ``k``; block 0 is their
        first."""
        context, first, count = self.context, blocks.first, blocks.count
        y, x, h, w = extent = input_extent(source, region)
        view = BufferView.of(self.slot(k, i), extent)
        start, block = region.n * source.blocks * source.h * source.w, source.h * source.w
        if source.spread is not None:
            start, block = source.spread.starts[region.n], source.spread.step
            count = min(count, source.spread.blocks[region.n] - first)
        step = max(1, min(LOAD_WORDS, -(-count * h * w // 8)) // (h * w))
        vector = context.config.vector_bytes
        for b, n in cuts(count, step):
            word = start + (first + b) * block + y * source.w + x
            box = TransferBox(
                address=context.dram_address(source.tensor, word),
                local=view.base + b * view.block,
                counts=(n, h, w),
                dram_steps=(block * vector, source.w * vector),
                local_steps=(view.block, view.pitch),
            )
            transfer(context, Engine.LOAD, i, box)
        return view

    # Outputs -------------------------------------------------------------------------------------

    def output(self, i: int, region: Region, group: int) -> OutputGroup:
        """Where the group of a region goes."""
        plan, stage = self.context.plan, self.context.stages[i]
        tensor = stage.op.output
        extent = output_extent(stage, region)
        if tensor in plan.resident:
            start, size = stage.image_place(region.n)
            base = self.context.tensor_word(tensor) + start
            h, w = stage.out_h, stage.out_w
            view = BufferView(base=base, pitch=w, block=size, h=h, w=w)
            view = view.from_block(group * stage.group_words)
        elif tensor in plan.rolls:
            view = self._rolling_view(tensor, extent.y, extent.h)
            view = view.from_block(group * stage.group_words)
        else:
            view = BufferView.of(self.slot("out", i), extent)
        return OutputGroup(i, region, group, view)

    def store(self, done: OutputGroup) -> None:
        """Store a finished group where DRAM needs it; small ones of a resident tensor several at a
        time."""
        context, i, region = self.context, done.index, done.region
        stage, group, view = context.stages[i], done.group, done.out
        name, groups = stage.op.output, 1
        if name in context.plan.rolls and name not in context.stored:
            return
        y, x, h, w = output_extent(stage, region)
        if name in context.plan.resident:
            if name not in context.stored:
                return
            together = max(1, STORE_WORDS // (stage.group_words * h * w))
            groups = group % together + 1
            if groups < together and group + 1 < stage.groups:
                return
            view = self.output(i, region, group + 1 - groups).out
        first = (group + 1 - groups) * stage.group_words
        count = min(groups * stage.group_words, stage.blocks - first)
        start, block = stage.image_place(region.n)
        vector = context.config.vector_bytes
        box = TransferBox(
            address=context.dram_address(name, start + first * block + y * stage.out_w + x),
            local=view.at(y, x),
            counts=(count, h, w),
            dram_steps=(block * vector, stage.out_w * vector),
            local_steps=(view.block, view.pitch),
        )
        transfer(context, Engine.STORE, i, box)
