"""Emission: the planned stages as commands."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from isa import Config, Engine, LoadTarget, Opcode, PostOp, PostSource, WindowOp
from sw.compiler.plan import TILE, Plan, Region, StagePlan, cuts, input_extent, part_of
from sw.compiler.stages import POINTWISE, Geometry, Source, Stage
from sw.compiler.stream import CommandStream, Memory, Span, run

CHUNK_WORDS = 512
"""Weight words one WLOAD brings, about: the grain at which CONV can follow the load."""

LOAD_WORDS = 1024
"""Activation words one LOAD brings, about."""

MAX_COUNT = 0xFFFF


@dataclass(frozen=True)
class View:
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
        return Span(Memory.SCRATCHPAD, start, (blocks, h, w), (self.block, self.pitch))

    def at(self, y: int, x: int, block: int = 0) -> int:
        """Word of position (y, x) of the tensor."""
        return self.base + block * self.block + (y - self.y) * self.pitch + (x - self.x)


class WeightRing:
    """The weight buffer as a ring of loaded pieces; the oldest are overwritten."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._next = 0
        self._held: dict[tuple, tuple[int, int]] = {}

    def find(self, key: tuple) -> int | None:
        """Where the piece is, if it still is."""
        held = self._held.get(key)
        return held[0] if held else None

    def place(self, key: tuple, words: int) -> int:
        """Make room for a piece; its address."""
        if self._next + words > self.capacity:
            self._next = 0
        at = self._next
        self._held = {
            k: (a, n) for k, (a, n) in self._held.items() if a + n <= at or at + words <= a
        }
        self._held[key] = (at, words)
        self._next = at + words
        return at


@dataclass(frozen=True)
class Piece:
    """Part of the reduction of one column block: channel blocks and kernel rows."""

    block: int
    blocks: int
    ky: int
    kernel_h: int

    def words(self, kernel_w: int, rows: int) -> int:
        return self.blocks * self.kernel_h * kernel_w * rows

    def offset(self, kernel_h: int, kernel_w: int, rows: int) -> int:
        """Weight words before it in its column block."""
        return (self.block * kernel_h + self.ky) * kernel_w * rows


def pieces(blocks: int, kernel: tuple[int, int], rows: int, limit: int) -> list[Piece]:
    """The reduction in pieces of about ``limit`` weight words at most: whole channel blocks, or
    kernel rows of one block where a block is larger."""
    kh, kw = kernel
    block_words = kh * kw * rows
    if block_words <= limit:
        return [Piece(b, n, 0, kh) for b, n in cuts(blocks, limit // block_words)]
    per = max(1, limit // (kw * rows))
    return [Piece(b, 1, ky, n) for b in range(blocks) for ky, n in cuts(kh, per)]


class Emitter:
    """Emits all stages into a command stream."""

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
        self.ring = WeightRing(config.weight_words)
        self.vector = config.vector_bytes
        self._half = 0
        self._slots: dict[tuple, int] = {}
        self._made: set[str] = {s.op.output for s in stages}
        self._loaded: set[str] = set()

    def emit(self) -> None:
        for i, stage in enumerate(self.stages):
            self._load_resident_inputs(i, stage)
            self._load_fixed(i, stage)
            self._emit_stage(i, stage, self.plan.stages[i])

    # Transfers -----------------------------------------------------------------------------------

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
            Memory.DRAM,
            address // self.stream.dram_unit,
            (n2, n1, n0 * unit),
            (d2 // self.stream.dram_unit, d1 // self.stream.dram_unit),
        )
        scratchpad = Span(Memory.SCRATCHPAD, local, (n2, n1, n0), (l2, l1))
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

    def _load_resident_inputs(self, i: int, stage: Stage) -> None:
        """Bring a resident graph input into the scratchpad, once."""
        for source in stage.sources:
            name = source.tensor
            if name in self._made or name in self._loaded or name not in self.plan.resident:
                continue
            self._loaded.add(name)
            words = stage.batch * source.blocks * source.h * source.w
            base = self.plan.addresses[("tensor", name)]
            step = min(LOAD_WORDS, max(128, -(-words // 8)))
            for at, count in cuts(words, step):
                self._linear(Engine.LOAD, i, self.dram[name] + at * self.vector, base + at, count)

    def _load_fixed(self, i: int, stage: Stage) -> None:
        """Bring the parameters and window weights of a stage into the scratchpad."""
        if not stage.fixed_words:
            return
        words = stage.fixed_words
        base = self.plan.addresses[("fixed", i)]
        for at, count in cuts(words, MAX_COUNT):
            self._linear(
                Engine.WLOAD,
                i,
                self.constants[(i, "fixed")] + at * self.vector,
                base + at,
                count,
            )

    def _params(self, i: int) -> int:
        return self.plan.addresses[("fixed", i)]

    def _window_weights(self, i: int, stage: Stage) -> int:
        return self.plan.addresses[("fixed", i)] + (
            len(stage.params) if stage.params is not None else 0
        )

    # Views ---------------------------------------------------------------------------------------

    def _slot(self, role: str, i: int) -> int:
        """The next copy of a stage's buffer."""
        copies = self.plan.stages[i].buffers[role][1]
        copy = self._slots.get((role, i), 0)
        self._slots[(role, i)] = (copy + 1) % copies
        return self.plan.addresses[(role, i, copy)]

    def _resident_view(self, source: Source, n: int) -> View:
        base = self.plan.addresses[("tensor", source.tensor)]
        size = source.h * source.w
        return View(base + n * source.blocks * size, source.w, size, 0, 0, source.h, source.w)

    def _input(self, i: int, role: str, source: Source, region: Region, group: int) -> View:
        """The part of a source that a region (and output group, for sources read by group) needs,
        in the scratchpad; loaded now unless it is resident. Its block 0 is the group's first."""
        stage = self.stages[i]
        first = group * stage.group_words if source.per_group else 0
        count = min(stage.group_words, source.blocks - first) if source.per_group else source.blocks
        if source.tensor in self.plan.resident:
            view = self._resident_view(source, region.n)
            return replace(view, base=view.base + first * view.block)
        return self._load_part(i, role, source, region, first, count)

    def _load_part(
        self, i: int, role: str, source: Source, region: Region, first: int, count: int
    ) -> View:
        """Load what a region needs of ``count`` blocks of a source; block 0 is block ``first``."""
        y, x, h, w = input_extent(source, region)
        view = View(self._slot(role, i), w, h * w, y, x, h, w)
        image = source.h * source.w
        address = self.dram[source.tensor]
        step = max(1, min(LOAD_WORDS, -(-count * h * w // 8)) // (h * w))
        for b, n in cuts(count, step):
            self._transfer(
                Engine.LOAD,
                i,
                address
                + ((region.n * source.blocks + first + b) * image + y * source.w + x) * self.vector,
                view.base + b * view.block,
                (n, h, w),
                (image * self.vector, source.w * self.vector),
                (view.block, view.pitch),
            )
        return view

    def _output(self, i: int, region: Region, group: int) -> View:
        """Where the group of a region goes; block 0 is the group's first."""
        stage = self.stages[i]
        if stage.op.output in self.plan.resident:
            size = stage.h * stage.w
            base = self.plan.addresses[("tensor", stage.op.output)]
            base += (region.n * stage.blocks + group * stage.group_words) * size
            return View(base, stage.w, size, 0, 0, stage.h, stage.w)
        return View(
            self._slot("out", i), region.w, region.pixels, region.y, region.x, region.h, region.w
        )

    def _store(self, i: int, region: Region, group: int, view: View) -> None:
        """Store a finished group where DRAM needs it."""
        stage = self.stages[i]
        name = stage.op.output
        if name in self.plan.resident and name not in self.stored:
            return
        first = group * stage.group_words
        count = min(stage.group_words, stage.blocks - first)
        image = stage.h * stage.w
        self._transfer(
            Engine.STORE,
            i,
            self.dram[name]
            + ((region.n * stage.blocks + first) * image + region.y * stage.w + region.x)
            * self.vector,
            view.at(region.y, region.x),
            (count, region.h, region.w),
            (image * self.vector, stage.w * self.vector),
            (view.block, view.pitch),
        )

    # Stages --------------------------------------------------------------------------------------

    def _emit_stage(self, i: int, stage: Stage, plan: StagePlan) -> None:
        """Region by region, group by group; the next region's input is asked for behind the first
        group, when the queues hold work enough to hide it."""
        ahead: View | None = None
        main = stage.sources[0]
        for r, region in enumerate(plan.regions):
            following = plan.regions[r + 1] if r + 1 < len(plan.regions) else None
            x = ahead
            ahead = None
            whole = not main.per_group and plan.split is None
            if whole and x is None:
                x = self._prepare(i, stage, region)
            for group in range(stage.groups):
                if main.per_group:
                    x = self._input(i, "x", main, region, group)
                other = None
                if len(stage.sources) > 1:
                    other = self._input(i, "other", stage.sources[1], region, group)
                out = self._output(i, region, group)
                if stage.kind == "array":
                    self._array(i, stage, region, group, x, other, out)
                elif stage.kind == "window":
                    assert x is not None
                    self._window(i, stage, region, group, x, out)
                else:
                    assert x is not None and other is not None
                    self._add(i, stage, region, group, x, other, out)
                self._store(i, region, group, out)
                if group == 0 and following is not None and whole:
                    ahead = self._prepare(i, stage, following)

    def _prepare(self, i: int, stage: Stage, region: Region) -> View:
        """The array's input for a region: the source itself, or its im2col."""
        view = self._input(i, "x", stage.sources[0], region, 0)
        if stage.fold is None:
            return view
        fold = stage.fold
        g = fold.geometry
        out = View(
            self._slot("im2col", i),
            region.w,
            region.pixels,
            region.y,
            region.x,
            region.h,
            region.w,
        )
        y0 = region.y * g.strides[0] - g.pads[0] - view.y
        fields = dict(
            op=WindowOp.IM2COL,
            blocks=1,
            run=fold.run,
            src=view.base,
            src_pitch=view.pitch,
            in_w=fold.in_w,
            in_h=view.h,
            x0=(region.x * g.strides[1] - g.pads[1]) * fold.channels,
            y0=y0,
            out_w=region.w,
            out_h=region.h,
            kernel_w=fold.runs,
            kernel_h=g.kernel[0],
            stride_x=g.strides[1] * fold.channels,
            stride_y=g.strides[0],
            dilation_x=g.dilations[1] * fold.channels,
            dilation_y=g.dilations[0],
            pad=stage.sources[0].zero,
            out=out.base,
            out_pitch=out.pitch,
            out_block=out.block,
        )
        rows, _, count, _ = input_extent(stage.sources[0], region)
        self.stream.emit(
            Opcode.WINDOW,
            fields,
            [view.span(0, 1, rows - view.y, 0, count, view.w)],
            [out.span(0, fold.words, 0, 0, region.h, region.w)],
            layer=i,
        )
        return out

    def _tiles(self, region: Region) -> Iterator[Region]:
        """The region in pieces of about TILE outputs that an accumulator half holds."""
        limit = min(TILE, self.config.acc_half)
        if region.w > limit:
            rows, columns = 1, limit
        else:
            rows, columns = max(1, limit // region.w), region.w
        for y, h in cuts(region.h, rows):
            for x, w in cuts(region.w, columns):
                yield Region(region.n, region.y + y, region.x + x, h, w)

    def _array(
        self,
        i: int,
        stage: Stage,
        region: Region,
        group: int,
        x: View | None,
        other: View | None,
        out: View,
    ) -> None:
        """The group's column blocks, tile by tile. ``x`` None: the reduction is split."""
        config = self.config
        column_blocks = config.rows // config.lanes
        total = stage.array_weights.shape[0]
        for column in range(group * column_blocks, min((group + 1) * column_blocks, total)):
            for tile in self._tiles(region):
                self._half ^= 1
                if x is None:
                    self._conv_split(i, stage, column, tile)
                else:
                    self._conv(i, stage, column, tile, x)
                self._post(i, stage, group, column, tile, other, out)

    def _weights(self, i: int, stage: Stage, column: int, piece: Piece) -> int:
        """Weight-buffer address of a piece, loaded if it is not there any more."""
        key = (i, column, piece)
        at = self.ring.find(key)
        if at is not None:
            return at
        _, blocks, kh, kw, rows, _ = stage.array_weights.shape
        words = piece.words(kw, rows)
        at = self.ring.place(key, words)
        size = self.config.weight_vector_bytes
        offset = column * blocks * kh * kw * rows + piece.offset(kh, kw, rows)
        address = self.constants[(i, "weights")] + offset * size
        fields = dict(
            target=LoadTarget.WEIGHTS, dram=address, count0=words, count1=1, count2=1, local=at
        )
        self.stream.emit(
            Opcode.LOAD,
            fields,
            [self.stream.dram(address, words * size)],
            [run(Memory.WEIGHTS, at, words)],
            layer=i,
            engine=Engine.WLOAD,
        )
        return at

    def _conv(self, i: int, stage: Stage, column: int, tile: Region, x: View) -> None:
        """The CONV commands of one tile: one, or one per piece of the reduction where the pieces
        arrive, or lie, one by one."""
        _, blocks, kh, kw, rows, _ = stage.array_weights.shape
        todo = pieces(blocks, (kh, kw), rows, self._chunk_limit(rows))
        whole = Piece(0, blocks, 0, kh)
        held = [self.ring.find((i, column, p)) for p in todo]
        joined = all(a is not None for a in held) and all(
            b == a + p.words(kw, rows) for a, b, p in zip(held, held[1:], todo)
        )
        if joined:
            self._conv_piece(i, stage, tile, x, whole, held[0], False)
            return
        for n, piece in enumerate(todo):
            at = self._weights(i, stage, column, piece)
            self._conv_piece(i, stage, tile, x, piece, at, n > 0)

    def _conv_split(self, i: int, stage: Stage, column: int, tile: Region) -> None:
        """The CONV commands of one tile, each behind the load of its part of the input."""
        source = stage.sources[0]
        most, kernel_rows = self.plan.stages[i].split
        _, blocks, kh, kw, rows, _ = stage.array_weights.shape
        limit = self._chunk_limit(rows)
        done = 0
        for block, count in cuts(blocks, most):
            for ky, n in cuts(kh, kernel_rows):
                part = part_of(source, ky, n)
                if source.tensor in self.plan.resident:
                    x = self._resident_view(source, tile.n)
                else:
                    x = self._load_part(i, "x", part, tile, block, count)
                    x = replace(x, base=x.base - block * x.block)
                for inner in pieces(count, (n, kw), rows, limit):
                    piece = Piece(block + inner.block, inner.blocks, ky + inner.ky, inner.kernel_h)
                    at = self._weights(i, stage, column, piece)
                    self._conv_piece(i, stage, tile, x, piece, at, done > 0)
                    done += 1

    def _chunk_limit(self, rows: int) -> int:
        """Weight words of one piece."""
        return max(rows, min(CHUNK_WORDS, self.config.weight_words // 4))

    def _conv_piece(
        self,
        i: int,
        stage: Stage,
        tile: Region,
        x: View,
        piece: Piece,
        weights: int,
        accumulate: bool,
    ) -> None:
        source = stage.sources[0]
        # The folded input is already gathered: pointwise from here on.
        g = POINTWISE if stage.fold is not None else source.geometry
        rows = self.config.rows
        kw = g.kernel[1]
        y0 = tile.y * g.strides[0] - g.pads[0] + piece.ky * g.dilations[0] - x.y
        x0 = tile.x * g.strides[1] - g.pads[1] - x.x
        fields = dict(
            accumulate=int(accumulate),
            weights=weights,
            acc=self._half * self.config.acc_half,
            blocks=piece.blocks,
            src=x.base + piece.block * x.block,
            src_pitch=x.pitch,
            src_block=x.block,
            in_w=x.w,
            in_h=x.h,
            x0=x0,
            y0=y0,
            out_w=tile.w,
            out_h=tile.h,
            kernel_w=kw,
            kernel_h=piece.kernel_h,
            stride_x=g.strides[1],
            stride_y=g.strides[0],
            dilation_x=g.dilations[1],
            dilation_y=g.dilations[0],
            pad=source.zero,
        )
        part = Geometry((piece.kernel_h, kw), g.strides, (-y0, -x0), g.dilations)
        top, bottom = part.span(0, 0, tile.h, x.h)
        left, right = part.span(1, 0, tile.w, x.w)
        self.stream.emit(
            Opcode.CONV,
            fields,
            [
                x.span(piece.block, piece.blocks, top, left, bottom - top, right - left),
                run(Memory.WEIGHTS, weights, piece.words(kw, rows)),
            ],
            [run(Memory.ACCUMULATORS, self._half, 1)],
            layer=i,
        )

    def _post(
        self,
        i: int,
        stage: Stage,
        group: int,
        column: int,
        tile: Region,
        other: View | None,
        out: View,
    ) -> None:
        config = self.config
        lanes = config.lanes
        first = column * config.cols
        groups = -(-min(config.cols, stage.channels - first) // lanes)
        per_word = config.rows // lanes
        # Position within the group of words that the view starts at.
        position = first // lanes - group * stage.group_words * per_word
        block, lane = divmod(position, per_word)
        words = -(-(lane + groups) // per_word)
        params = self._params(i) + (first // lanes) * config.param_words
        fields = dict(
            source=PostSource.ACCUMULATOR,
            acc=self._half * config.acc_half,
            groups=groups,
            lane=lane,
            out_w=tile.w,
            out_h=tile.h,
            out=out.at(tile.y, tile.x, block),
            out_pitch=out.pitch,
            out_block=out.block,
            params=params,
            zero=stage.requant.zero,
            low=stage.requant.low,
            high=stage.requant.high,
        )
        reads = [
            run(Memory.ACCUMULATORS, self._half, 1),
            run(Memory.SCRATCHPAD, params, groups * config.param_words),
        ]
        rectangle = (block, words, tile.y, tile.x, tile.h, tile.w)
        if other is not None:
            reads.append(self._rectangle(other, *rectangle))
            fields |= dict(
                op=PostOp.ADD,
                b=other.at(tile.y, tile.x, block),
                b_pitch=other.pitch,
                b_block=other.block,
                **vars(stage.add),
            )
        self.stream.emit(Opcode.POST, fields, reads, [self._rectangle(out, *rectangle)], layer=i)

    def _rectangle(
        self, view: View, block: int, blocks: int, y: int, x: int, h: int, w: int
    ) -> Span:
        """A rectangle given in tensor coordinates."""
        return view.span(block, blocks, y - view.y, x - view.x, h, w)

    def _window(self, i: int, stage: Stage, region: Region, group: int, x: View, out: View) -> None:
        source = stage.sources[0]
        g = source.geometry
        kh, kw = g.kernel
        y0 = region.y * g.strides[0] - g.pads[0] - x.y
        x0 = region.x * g.strides[1] - g.pads[1] - x.x
        fields = dict(
            op=stage.window_op,
            blocks=1,
            src=x.base,
            src_pitch=x.pitch,
            src_block=x.block,
            in_w=x.w,
            in_h=x.h,
            x0=x0,
            y0=y0,
            out_w=region.w,
            out_h=region.h,
            kernel_w=kw,
            kernel_h=kh,
            stride_x=g.strides[1],
            stride_y=g.strides[0],
            dilation_x=g.dilations[1],
            dilation_y=g.dilations[0],
            pad=source.zero,
            out=out.at(region.y, region.x),
            out_pitch=out.pitch,
            out_block=out.block,
            zero=stage.requant.zero,
            low=stage.requant.low,
            high=stage.requant.high,
        )
        y, left, h, w = input_extent(source, region)
        reads = [self._rectangle(x, 0, 1, y, left, h, w)]
        if stage.params is not None:
            at = self._params(i) + group * self.config.window_param_words
            fields["params"] = at
            reads.append(run(Memory.SCRATCHPAD, at, self.config.window_param_words))
        if stage.window_weights is not None:
            at = self._window_weights(i, stage) + group * kh * kw
            fields["weights"] = at
            reads.append(run(Memory.SCRATCHPAD, at, kh * kw))
        self.stream.emit(
            Opcode.WINDOW,
            fields,
            reads,
            [self._rectangle(out, 0, 1, region.y, region.x, region.h, region.w)],
            layer=i,
        )

    def _add(
        self, i: int, stage: Stage, region: Region, group: int, a: View, b: View, out: View
    ) -> None:
        rectangle = (0, 1, region.y, region.x, region.h, region.w)
        at = (region.y, region.x)
        fields = dict(
            source=PostSource.SCRATCHPAD,
            op=PostOp.ADD,
            groups=self.config.rows // self.config.lanes,
            out_w=region.w,
            out_h=region.h,
            out=out.at(*at),
            out_pitch=out.pitch,
            out_block=out.block,
            a=a.at(*at),
            a_pitch=a.pitch,
            a_block=a.block,
            b=b.at(*at),
            b_pitch=b.pitch,
            b_block=b.block,
            **vars(stage.add),
        )
        self.stream.emit(
            Opcode.POST,
            fields,
            [self._rectangle(a, *rectangle), self._rectangle(b, *rectangle)],
            [self._rectangle(out, *rectangle)],
            layer=i,
        )
