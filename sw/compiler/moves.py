"""Moving activations between DRAM and scratchpad, and where they lie there."""

from __future__ import annotations

from dataclasses import dataclass, replace

from systole.isa import Config, Engine, LoadTarget, Opcode, PostOp, PostSource
from systole.sw.compiler.plan import Plan, Region, cuts, input_extent, output_extent
from systole.sw.compiler.stages import Source, Stage
from systole.sw.compiler.stream import CommandStream, Span, StreamMemory

LOAD_WORDS = 1024
"""Activation words one LOAD brings, about."""

STORE_WORDS = 8
"""Activation words for which one STORE waits."""

MAX_COUNT = 0xFFFF
MAX_GROUPS = 0xFF
"""Of one POST command."""


@dataclass(frozen=True)
class BufferView:
    """Where a rectangle of a tensor lies in the scratchpad: word of its (0, 0), block 0."""

    base: int
    pitch: int
    block: int
    y: int
    x: int
    h: int
    w: int

    def span(self, block: int, blocks: int, y: int, x: int, h: int, w: int) -> Span:
        """Words of a rectangle, in the view's own coordinates."""
        start = self.base + block * self.block + y * self.pitch + x
        return Span(StreamMemory.SCRATCHPAD, start, (blocks, h, w), (self.block, self.pitch))

    def at(self, y: int, x: int, block: int = 0) -> int:
        """Word of position (y, x) of the tensor."""
        return self.base + block * self.block + (y - self.y) * self.pitch + (x - self.x)


class Mover:
    """Loads, stores and addresses of a plan's activations."""

    def __init__(
        self,
        config: Config,
        stages: list[Stage],
        plan: Plan,
        stream: CommandStream,
        dram: dict[str, int],
        constants: dict[tuple, int],
        stored: set[str],
    ):
        """``dram``: byte offsets of tensors; ``constants``: byte offsets by (stage, role)."""
        self.config = config
        self.stages = stages
        self.plan = plan
        self.stream = stream
        self.dram = dram
        self.constants = constants
        self.stored = stored
        self.vector = config.vector_bytes
        self._slots: dict[tuple, int] = {}
        self._made: set[str] = {s.op.output for s in stages}
        self._loaded: set[str] = set()
        self._origins: dict[str, int] = dict.fromkeys(plan.rolls, 0)

    def _transfer(
        self,
        engine: Engine,
        layer: int,
        address: int,
        local: int,
        counts: tuple[int, int, int],
        dram_steps: tuple[int, int],
        local_steps: tuple[int, int],
    ) -> None:
        """LOAD or STORE between DRAM and scratchpad; counts and steps are (outer, middle[, inner]).
        Contiguous runs are joined."""
        n2, n1, n0 = counts
        d2, d1 = dram_steps
        l2, l1 = local_steps
        if n1 > 1 and d1 == n0 * self.vector and l1 == n0 and n0 * n1 <= MAX_COUNT:
            n0, n1 = n0 * n1, 1
        if n1 == 1:
            n1, d1, l1, n2, d2, l2 = n2, d2, l2, 1, 0, 0
            if n1 > 1 and d1 == n0 * self.vector and l1 == n0 and n0 * n1 <= MAX_COUNT:
                n0, n1 = n0 * n1, 1
        fields = dict(
            dram=address,
            count0=n0,
            count1=n1,
            count2=n2,
            dram1=d1 if n1 > 1 else 0,
            dram2=d2 if n2 > 1 else 0,
            local=local,
            local1=l1 if n1 > 1 else 0,
            local2=l2 if n2 > 1 else 0,
        )
        unit = self.vector // self.stream.dram_unit
        memory = Span(
            StreamMemory.DRAM,
            address // self.stream.dram_unit,
            (n2, n1, n0 * unit),
            (d2 // self.stream.dram_unit, d1 // self.stream.dram_unit),
        )
        scratchpad = Span(StreamMemory.SCRATCHPAD, local, (n2, n1, n0), (l2, l1))
        if engine == Engine.STORE:
            self.stream.emit(Opcode.STORE, fields, [scratchpad], [memory], layer=layer)
        else:
            fields["target"] = LoadTarget.SCRATCHPAD
            self.stream.emit(
                Opcode.LOAD, fields, [memory], [scratchpad], layer=layer, engine=engine
            )

    def _linear(self, engine: Engine, layer: int, address: int, local: int, words: int) -> None:
        """A contiguous transfer."""
        self._transfer(engine, layer, address, local, (1, 1, words), (0, 0), (0, 0))

    def load_resident_inputs(self, i: int, stage: Stage) -> None:
        """Bring a resident graph input into the scratchpad, once."""
        for source in stage.sources:
            name = source.tensor
            if name in self._made or name in self._loaded or name not in self.plan.resident:
                continue
            self._loaded.add(name)
            words = source.tensor_words(stage.batch)
            base = self.plan.addresses[("tensor", name)]
            step = min(LOAD_WORDS, max(128, -(-words // 8)))
            for at, count in cuts(words, step):
                self._linear(Engine.LOAD, i, self.dram[name] + at * self.vector, base + at, count)

    def load_fixed(self, i: int, stage: Stage) -> None:
        """Bring the parameters, window weights and table of a stage into the scratchpad."""
        if not stage.fixed_words:
            return
        base, address = self.fixed(i), self.constants[(i, "fixed")]
        for at, count in cuts(stage.fixed_words, MAX_COUNT):
            self._linear(Engine.WLOAD, i, address + at * self.vector, base + at, count)

    def fixed(self, i: int, role: str | None = None) -> int:
        """Scratchpad word of one of the stage's fixed parts (None: of the first)."""
        at = self.plan.addresses[("fixed", i)]
        for name, words in self.stages[i].fixed:
            if role is None or name == role:
                return at
            at += len(words)
        raise KeyError(role)

    # Views ---------------------------------------------------------------------------------------

    def slot(self, role: str | int, i: int) -> int:
        """The next copy of a stage's buffer."""
        copies = self.plan.stages[i].buffers[role][1]
        copy = self._slots.get((role, i), 0)
        self._slots[(role, i)] = (copy + 1) % copies
        return self.plan.addresses[(role, i, copy)]

    def resident_view(self, source: Source, n: int) -> BufferView:
        """A whole resident image."""
        base = self.plan.addresses[("tensor", source.tensor)]
        if source.spread is not None:
            start, step = source.spread.starts[n], source.spread.step
            return BufferView(base + start, source.w, step, 0, 0, source.h, source.w)
        size = source.h * source.w
        return BufferView(base + n * source.blocks * size, source.w, size, 0, 0, source.h, source.w)

    def input(self, i: int, k: int, region: Region, group: int = 0) -> BufferView:
        """The part of source ``k`` that a region (and output group, for sources read by group)
        needs, in the scratchpad; loaded now unless it is resident. Its block 0 is the group's
        first."""
        stage = self.stages[i]
        source = stage.sources[k]
        first, count = 0, source.blocks
        if source.per_group:
            first = group * stage.group_words
            count = min(stage.group_words, source.blocks - first)
        if source.tensor in self.plan.resident:
            view = self.resident_view(source, region.n)
            return replace(view, base=view.base + first * view.block)
        if source.tensor in self.plan.rolls:
            y, _, h, _ = input_extent(source, region)
            view = self._rolling_view(source.tensor, y, h)
            return replace(view, base=view.base + first * view.block)
        return self.load_part(i, k, source, region, first, count)

    def _rolling_view(self, tensor: str, y: int, h: int) -> BufferView:
        """Rows of a tensor that slides through the scratchpad."""
        roll = self.plan.rolls[tensor]
        base = self.plan.addresses[("tensor", tensor)] + (y - self._origins[tensor]) * roll.width
        return BufferView(base, roll.width, roll.rows * roll.width, y, 0, h, roll.width)

    def slide(self, i: int, stripe: int) -> None:
        """Make room for a stripe of a stage's output; rows still to be read come along."""
        stage = self.stages[i]
        tensor = stage.op.output
        roll = self.plan.rolls[tensor]
        y, end = roll.kept[stripe]
        old = self._rolling_view(tensor, y, end - y) if y < end else None
        self._origins[tensor] = roll.origins[stripe]
        if old is not None:
            self.copy(i, old, self._rolling_view(tensor, y, end - y), stage.blocks)

    def copy(self, i: int, source: BufferView, out: BufferView, blocks: int) -> None:
        """Copy a rectangle of a tensor within the scratchpad."""
        per_word = self.config.rows // self.config.lanes
        for block, count in cuts(blocks, MAX_GROUPS // per_word):
            fields = dict(
                source=PostSource.SCRATCHPAD,
                op=PostOp.NONE,
                groups=count * per_word,
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
            self.stream.emit(
                Opcode.POST,
                fields,
                [source.span(block, count, 0, 0, out.h, out.w)],
                [out.span(block, count, 0, 0, out.h, out.w)],
                layer=i,
            )

    def load_part(
        self, i: int, k: int, source: Source, region: Region, first: int, count: int
    ) -> BufferView:
        """Load what a region needs of ``count`` blocks of a source; block 0 is block ``first``."""
        y, x, h, w = input_extent(source, region)
        view = BufferView(self.slot(k, i), w, h * w, y, x, h, w)
        start, block = region.n * source.blocks * source.h * source.w, source.h * source.w
        if source.spread is not None:
            start, block = source.spread.starts[region.n], source.spread.step
            count = min(count, source.spread.blocks[region.n] - first)
        step = max(1, min(LOAD_WORDS, -(-count * h * w // 8)) // (h * w))
        for b, n in cuts(count, step):
            self._transfer(
                Engine.LOAD,
                i,
                self._address(source.tensor, start + (first + b) * block + y * source.w + x),
                view.base + b * view.block,
                (n, h, w),
                (block * self.vector, source.w * self.vector),
                (view.block, view.pitch),
            )
        return view

    def _address(self, tensor: str, word: int) -> int:
        """DRAM byte address of a word of a tensor."""
        return self.dram[tensor] + word * self.vector

    def output(self, i: int, region: Region, group: int) -> BufferView:
        """Where the group of a region goes; block 0 is the group's first."""
        stage = self.stages[i]
        if stage.op.output in self.plan.resident:
            start, size = stage.image_place(region.n)
            base = self.plan.addresses[("tensor", stage.op.output)]
            base += start + group * stage.group_words * size
            return BufferView(base, stage.out_w, size, 0, 0, stage.out_h, stage.out_w)
        y, x, h, w = output_extent(stage, region)
        if stage.op.output in self.plan.rolls:
            view = self._rolling_view(stage.op.output, y, h)
            return replace(view, base=view.base + group * stage.group_words * view.block)
        return BufferView(self.slot("out", i), w, h * w, y, x, h, w)

    def store(self, i: int, region: Region, group: int, view: BufferView) -> None:
        """Store a finished group where DRAM needs it; small ones of a resident tensor several at a
        time."""
        stage = self.stages[i]
        name, groups = stage.op.output, 1
        if name in self.plan.rolls and name not in self.stored:
            return
        y, x, h, w = output_extent(stage, region)
        if name in self.plan.resident:
            if name not in self.stored:
                return
            together = max(1, STORE_WORDS // (stage.group_words * h * w))
            groups = group % together + 1
            if groups < together and group + 1 < stage.groups:
                return
            view = self.output(i, region, group + 1 - groups)
        first = (group + 1 - groups) * stage.group_words
        count = min(groups * stage.group_words, stage.blocks - first)
        start, block = stage.image_place(region.n)
        word = start + first * block + y * stage.out_w + x
        self._transfer(
            Engine.STORE,
            i,
            self._address(name, word),
            view.at(y, x),
            (count, h, w),
            (block * self.vector, stage.out_w * self.vector),
            (view.block, view.pitch),
        )
