"""Emission: the planned stages as commands."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace

import numpy as np

from systole.isa import Config, Engine, LoadTarget, Opcode, PostOp, PostSource, WindowOp
from systole.sw.compiler.matrices import MatrixEmitter
from systole.sw.compiler.moves import BufferView
from systole.sw.compiler.plan import Plan, Region, cuts, input_extent, part_of, tiles
from systole.sw.compiler.stages import ArrayStage, Geometry, Pass, Phase, Stage, WeightRun
from systole.sw.compiler.stream import CommandStream, Span, StreamMemory, run
from systole.sw.compiler.weights import CHUNK_WORDS, JOINED_WORDS, Piece, WeightRing, pieces

EAGER_PIECES = 8
"""Commands into which the first column block of a tile is cut at most."""

SLOW_TILE = 2
"""Tiles of this many times ``rows`` outputs keep the array busier than their weights the bus: the
weights of column blocks to come may then be loaded with theirs."""


class Emitter(MatrixEmitter):
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
        super().__init__(config, stages, plan, stream, dram, constants, stored)
        self.ring = WeightRing(config.weight_words)
        self._half = 0
        self._gathered: dict[int, tuple[int, int]] = {}
        self._ahead: dict[int, dict[int, BufferView]] = {}
        self._weights_loaded = 0
        self._piece_limit = max(config.rows, min(CHUNK_WORDS, config.weight_words // 4))

    def emit(self) -> None:
        for i, r in self.plan.order:
            if r == 0:
                stage, plan = self.stages[i], self.plan.stages[i]
                self.load_resident_inputs(i, stage)
                if stage.kind == "array" and plan.split is None:
                    self._preload(i, stage, plan.regions[0])
                self.load_fixed(i, stage)
            self._emit_region(i, r)

    def _emit_region(self, i: int, r: int) -> None:
        """Group by group; the next region's inputs are asked for behind the first, when the queues
        hold work enough to hide it."""
        stage, plan, chain = self.stages[i], self.plan.stages[i], self.plan.chain[i]
        region = plan.regions[r]
        if stage.kind == "transpose":
            return self.transpose(i, region)
        whole = plan.split is None and bool(stage.whole_sources)
        # A single copy is still being read by the groups to come, and what the chain itself makes
        # has not been made.
        prepared = ("im2col", *(k for k, _ in stage.whole_sources))
        early = all(plan.buffers[k][1] > 1 for k in prepared if k in plan.buffers) and not any(
            self.stages[k].op.output == s.tensor
            for k in chain.stages
            for _, s in stage.whole_sources
        )
        if stage.op.output in self.plan.rolls:
            self.slide(i, r % chain.stripes)
        views = self._ahead.pop(i, {})
        if whole and not views:
            views = self._prepare(i, stage, region)
        for group in range(stage.groups):
            for k, source in enumerate(stage.sources):
                if source.per_group:
                    views[k] = self.input(i, k, region, group)
            out = self.output(i, region, group)
            if stage.kind == "array":
                self._array(i, stage, region, group, views, out)
            elif stage.kind == "window":
                self._window(i, stage, region, group, views[0], out)
            else:
                self._vector(i, stage, region, group, views, out)
            self.store(i, region, group, out)
            if group == 0 and whole and early and r + 1 < len(plan.regions):
                self._ahead[i] = self._prepare(i, stage, plan.regions[r + 1])

    def _prepare(self, i: int, stage: Stage, region: Region) -> dict[int, BufferView]:
        """The sources that a region reads whole, in the scratchpad; folded: their im2col."""
        views = {k: self.input(i, k, region) for k, _ in stage.whole_sources}
        if not isinstance(stage, ArrayStage):
            return views
        if stage.fold is not None and stage.fold.by_row:
            views[0] = self._gather_rows(i, stage, region, views[0])
        elif stage.fold is not None:
            y, x, h, w = region.y, region.x, region.h, region.w
            views[0], out = BufferView(self.slot("im2col", i), w, h * w, y, x, h, w), views[0]
            g = stage.fold.geometry
            window = replace(g, pads=(g.pads[0] - y * g.strides[0], g.pads[1]))
            self._im2col(i, stage, region, window, out, views[0])
        return views

    def _gather_rows(self, i: int, stage: Stage, region: Region, view: BufferView) -> BufferView:
        """Gather the input rows that the region needs and that are not held yet, each for a kernel
        one row high; the view of the gathered rows, which slide through their buffer."""
        source, fold = stage.sources[0], stage.fold
        g, w = fold.geometry, stage.w
        base = self.plan.addresses[("im2col", i, 0)]
        rows = self.plan.stages[i].buffers["im2col"][0] // (w * fold.words)
        y, _, count, _ = input_extent(source, region)
        origin, first = self._gathered.get(i, (0, 0))
        if region.y == 0 or y + count - origin > rows:
            origin = first = y
        self._gathered[i] = origin, y + count
        # Of the buffer, only what is held: the rest must not count as padding.
        out = BufferView(base + (y - origin) * w, w, rows * w, y, 0, count, w)
        first = max(first, y)
        if first < y + count:
            part = Region(region.n, first, 0, y + count - first, w)
            window = Geometry((1, g.kernel[1]), (1, g.strides[1]), (-first, g.pads[1]))
            window = replace(window, dilations=(1, g.dilations[1]))
            self._im2col(i, stage, part, window, view, out)
        return out

    def _im2col(
        self, i: int, stage: Stage, region: Region, g: Geometry, view: BufferView, out: BufferView
    ) -> None:
        """Gather a rectangle of ``out``. ``g``: the window; its row padding is the rectangle's, so
        that row 0 of the window is row ``-pads[0]`` of the input."""
        fold, source = stage.fold, stage.sources[0]
        fields = dict(
            op=WindowOp.IM2COL,
            blocks=1,
            run=fold.run,
            src=view.base,
            src_pitch=view.pitch,
            in_w=fold.in_w,
            in_h=view.h,
            x0=(region.x * g.strides[1] - g.pads[1]) * fold.channels,
            y0=-g.pads[0] - view.y,
            out_w=region.w,
            out_h=region.h,
            kernel_w=fold.runs,
            kernel_h=g.kernel[0],
            stride_x=g.strides[1] * fold.channels,
            stride_y=g.strides[0],
            dilation_x=g.dilations[1] * fold.channels,
            dilation_y=g.dilations[0],
            pad=source.zero,
            out=out.at(region.y, region.x),
            out_pitch=out.pitch,
            out_block=out.block,
        )
        y, end = g.span(0, 0, region.h, source.h)
        self.stream.emit(
            Opcode.WINDOW,
            fields,
            [view.span(0, 1, y - view.y, 0, end - y, view.w)],
            [out.span(0, fold.words, region.y - out.y, region.x - out.x, region.h, region.w)],
            layer=i,
        )

    # CONV and POST -------------------------------------------------------------------------------

    def _array(
        self,
        i: int,
        stage: Stage,
        region: Region,
        group: int,
        views: dict[int, BufferView],
        out: BufferView,
    ) -> None:
        """The group's column blocks, phase by phase, tile by tile."""
        config = self.config
        per_group = config.rows // config.lanes
        total = -(-stage.channels // config.cols)
        for p, phase in enumerate(stage.phases):
            # Phases beyond the output's edge make one row or column less.
            rows = -(-(stage.out_h - phase.y) // stage.steps[0]) - region.y
            columns = -(-(stage.out_w - phase.x) // stage.steps[1]) - region.x
            part = replace(region, h=min(region.h, rows), w=min(region.w, columns))
            if part.h <= 0 or part.w <= 0:
                continue
            for column in range(group * per_group, min((group + 1) * per_group, total)):
                for tile in tiles(part, config):
                    self._half ^= 1
                    self._conv(i, stage, p, column, tile, views)
                    self._post(i, stage, phase, group, column, tile, views, out)

    def _weights(
        self, i: int, kernel: tuple[int, int], wanted: Iterable[tuple[tuple, Piece, int]]
    ) -> int:
        """Weight-buffer address of the first piece wanted, loaded if it is not there any more, and
        with it as many of the next as fit into one command; at first few, for the array to start
        soon. For each its key, itself and the word of its run in the stage's weights."""
        rows, size = self.config.rows, self.config.weight_vector_bytes
        found: list[tuple[tuple, int]] = []
        first = words = 0
        for key, piece, offset in wanted:
            at = self.ring.find((key, piece))
            if at is not None and not found:
                return at
            start, n = offset + piece.offset(*kernel, rows), piece.words(rows)
            if not found:
                first = start
            elif (
                at is not None
                or start != first + words
                or words + n > min(JOINED_WORDS, self._piece_limit, self._weights_loaded)
            ):
                break
            found.append(((key, piece), n))
            words += n
        self._weights_loaded += words
        at = self.ring.place(found)
        address = self.constants[(i, "weights")] + first * size
        fields = dict(
            target=LoadTarget.WEIGHTS, dram=address, count0=words, count1=1, count2=1, local=at
        )
        self.stream.emit(
            Opcode.LOAD,
            fields,
            [self.stream.dram(address, words * size)],
            [run(StreamMemory.WEIGHTS, at, words)],
            layer=i,
            engine=Engine.WLOAD,
        )
        return at

    def _conv(
        self,
        i: int,
        stage: Stage,
        phase: int,
        column: int,
        tile: Region,
        views: dict[int, BufferView],
    ) -> None:
        """The CONV commands of one tile: every run of every pass."""
        if stage.product is not None:
            return self.product(i, column, tile, views[0])
        accumulate = False
        for n, each in enumerate(stage.phases[phase].passes):
            for weights in each.runs[column]:
                key = (i, phase, n, column, weights.block)
                if each.source in views:
                    view = views[each.source]
                    self._conv_run(i, stage, key, each, weights, tile, view, accumulate)
                else:
                    self._conv_split(i, stage, key, each, weights, tile, accumulate)
                accumulate = True

    def _conv_run(
        self,
        i: int,
        stage: Stage,
        key: tuple,
        each: Pass,
        weights: WeightRun,
        tile: Region,
        x: BufferView,
        accumulate: bool,
    ) -> None:
        """One command, or one per piece of the reduction where the pieces arrive, or lie, one by
        one."""
        kernel, rows = each.geometry.kernel, self.config.rows
        eager, todo = self._pieces(key, weights, kernel, tile)
        held = [self.ring.find((key, p)) for p in todo]
        if (
            not eager
            and all(a is not None for a in held)
            and all(b == a + p.words(rows) for a, b, p in zip(held, held[1:], todo))
        ):
            todo, held = [Piece(0, weights.blocks, 0, kernel[0], 0, kernel[1])], held[:1]
        else:
            held = [None] * len(todo)
        for n, (piece, at) in enumerate(zip(todo, held)):
            if at is None:
                at = self._weights(i, kernel, self._wanted(stage, key, weights, todo[n:], tile))
            placed = replace(piece, block=piece.block + weights.block)
            self._conv_piece(i, stage, each, tile, x, placed, at, accumulate)
            accumulate = True

    def _pieces(
        self, key: tuple, weights: WeightRun, kernel: tuple[int, int], tile: Region
    ) -> tuple[bool, list[Piece]]:
        """The pieces of a run, and whether their inputs arrive one by one: the first column block
        follows its input as that is made, block by block."""
        rows, limit = self.config.rows, self._piece_limit
        eager = key[3] == 0 and tile.pixels >= rows
        if eager:
            some = -(-weights.blocks // EAGER_PIECES)
            limit = min(limit, max(some * kernel[0] * kernel[1], 1) * rows)
        return eager, pieces(weights.blocks, kernel, rows, limit)

    def _wanted(
        self, stage: Stage, key: tuple, weights: WeightRun, todo: list[Piece], tile: Region
    ) -> Iterator[tuple[tuple, Piece, int]]:
        """What ``_weights`` may load: pieces of a run, and where the array needs longer for them
        than the load those of the following runs."""
        for piece in todo:
            yield key, piece, weights.offset
        if tile.pixels >= SLOW_TILE * self.config.rows:
            yield from self._next_runs(stage, key, tile)

    def _preload(self, i: int, stage: Stage, region: Region) -> None:
        """Load the first weights of a stage, before anything that may have to wait for space."""
        tile = next(iter(tiles(region, self.config)))
        for n, each in enumerate(stage.phases[0].passes):
            for weights in each.runs[0]:
                key, kernel = (i, 0, n, 0, weights.block), each.geometry.kernel
                _, todo = self._pieces(key, weights, kernel, tile)
                self._weights(i, kernel, self._wanted(stage, key, weights, todo, tile))
                return

    def _next_runs(
        self, stage: Stage, key: tuple, tile: Region
    ) -> Iterator[tuple[tuple, Piece, int]]:
        """The pieces of the runs that a tile's phase takes behind one, as ``_weights`` wants
        them."""
        i, phase, n, column, block = key
        passes = stage.phases[phase].passes
        for following in range(column, len(passes[0].runs)):
            for k, each in enumerate(passes):
                for weights in each.runs[following]:
                    if (following, k, weights.block) <= (column, n, block):
                        continue
                    own = (i, phase, k, following, weights.block)
                    _, todo = self._pieces(own, weights, each.geometry.kernel, tile)
                    for piece in todo:
                        yield own, piece, weights.offset

    def _conv_split(
        self,
        i: int,
        stage: Stage,
        key: tuple,
        each: Pass,
        weights: WeightRun,
        tile: Region,
        accumulate: bool,
    ) -> None:
        """As ``_conv_run``, every part behind the load of its part of the input."""
        source = stage.sources[each.source]
        most, kernel_rows = self.plan.stages[i].split
        kernel, rows = each.geometry.kernel, self.config.rows
        for block, count in cuts(weights.blocks, most):
            for ky, n in cuts(kernel[0], kernel_rows):
                first = weights.block + block
                if source.tensor in self.plan.resident:
                    x = self.resident_view(source, tile.n)
                else:
                    part = part_of(source, each.geometry, ky, n)
                    x = self.load_part(i, each.source, part, tile, first, count)
                    x = replace(x, base=x.base - first * x.block)
                for inner in pieces(count, (n, kernel[1]), rows, self._piece_limit):
                    piece = replace(inner, block=block + inner.block, ky=ky + inner.ky)
                    at = self._weights(i, kernel, [(key, piece, weights.offset)])
                    placed = replace(piece, block=piece.block + weights.block)
                    self._conv_piece(i, stage, each, tile, x, placed, at, accumulate)
                    accumulate = True

    def _conv_piece(
        self,
        i: int,
        stage: Stage,
        each: Pass,
        tile: Region,
        x: BufferView,
        piece: Piece,
        weights: int,
        accumulate: bool,
    ) -> None:
        g = each.geometry
        y0 = tile.y * g.strides[0] - g.pads[0] + piece.ky * g.dilations[0] - x.y
        x0 = tile.x * g.strides[1] - g.pads[1] + piece.kx * g.dilations[1] - x.x
        part = Geometry((piece.kernel_h, piece.kernel_w), g.strides, (-y0, -x0), g.dilations)
        fields = dict(
            accumulate=int(accumulate),
            weights=weights,
            acc=self._half * self.config.acc_half,
            blocks=piece.blocks,
            src=x.base + piece.block * x.block,
            src_pitch=x.pitch,
            src_block=x.block,
            pad=stage.sources[each.source].zero,
            out_w=tile.w,
            out_h=tile.h,
            **_window_fields(part, x),
        )
        top, bottom = part.span(0, 0, tile.h, x.h)
        left, right = part.span(1, 0, tile.w, x.w)
        self.stream.emit(
            Opcode.CONV,
            fields,
            [
                x.span(piece.block, piece.blocks, top, left, bottom - top, right - left),
                run(StreamMemory.WEIGHTS, weights, piece.words(self.config.rows)),
            ],
            [run(StreamMemory.ACCUMULATORS, self._half, 1)],
            layer=i,
        )

    def _post(
        self,
        i: int,
        stage: Stage,
        phase: Phase,
        group: int,
        column: int,
        tile: Region,
        views: dict[int, BufferView],
        out: BufferView,
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
        params = self.fixed(i, "params") + phase.params + (first // lanes) * config.param_words
        (fh, fw), y, x = stage.steps, phase.y, phase.x
        fields = dict(
            source=PostSource.ACCUMULATOR,
            acc=self._half * config.acc_half,
            groups=groups,
            lane=lane,
            out_w=tile.w,
            out_h=tile.h,
            out=out.at(tile.y * fh + y, tile.x * fw + x, block),
            out_pitch=out.pitch * fh,
            out_step=fw,
            out_block=out.block,
            params=params,
            **asdict(stage.requant),
        )
        reads = [
            run(StreamMemory.ACCUMULATORS, self._half, 1),
            run(StreamMemory.SCRATCHPAD, params, groups * config.param_words),
        ]
        if stage.combine is not None:
            other = views[len(stage.sources) - 1]
            reads.append(_rectangle(other, block, words, tile))
            fields |= asdict(stage.combine) | dict(
                b=other.at(tile.y, tile.x, block),
                b_pitch=other.pitch,
                b_step=1,
                b_block=other.block,
            )
        # Interleaved outputs: the rectangle between the first and the last counts as written; its
        # other words are POST's too.
        size = ((tile.h - 1) * fh + 1, (tile.w - 1) * fw + 1)
        written = Region(0, tile.y * fh + y, tile.x * fw + x, *size)
        self._emit_post(i, stage, fields, reads, [_rectangle(out, block, words, written)])

    def _vector(
        self,
        i: int,
        stage: Stage,
        region: Region,
        group: int,
        views: dict[int, BufferView],
        out: BufferView,
    ) -> None:
        """POST from the scratchpad: ``a`` is the first source, ``b`` the second."""
        at = (region.y, region.x)
        fields = dict(
            source=PostSource.SCRATCHPAD,
            groups=self.config.rows // self.config.lanes,
            out_w=region.w,
            out_h=region.h,
            out=out.at(*at),
            out_pitch=out.pitch,
            out_step=1,
            out_block=out.block,
            **asdict(stage.combine),
        )
        reads = []
        for letter, (k, view) in zip("ab", views.items()):
            if stage.sources[k].broadcast:
                # Only b can stand still; the loader sees to that.
                fields |= dict(b=view.base, b_pitch=0, b_block=view.block, b_step=0)
                reads.append(view.span(0, 1, 0, 0, 1, 1))
                continue
            fields |= {
                letter: view.at(*at),
                f"{letter}_pitch": view.pitch,
                f"{letter}_block": view.block,
            }
            if letter == "b":
                fields["b_step"] = 1
            reads.append(_rectangle(view, 0, 1, region))
        self._emit_post(i, stage, fields, reads, [_rectangle(out, 0, 1, region)])

    def _emit_post(
        self, i: int, stage: Stage, fields: dict[str, int], reads: list[Span], writes: list[Span]
    ) -> None:
        """A POST command, with the stage's table if it has one."""
        if stage.table is not None:
            table = self.fixed(i, "table")
            fields |= dict(lut=1, table=table)
            reads = [*reads, run(StreamMemory.SCRATCHPAD, table, len(stage.table))]
        fields.setdefault("op", PostOp.NONE)
        self.stream.emit(Opcode.POST, fields, reads, writes, layer=i)

    # WINDOW --------------------------------------------------------------------------------------

    def _window(
        self, i: int, stage: Stage, region: Region, group: int, x: BufferView, out: BufferView
    ) -> None:
        if stage.bands is None:
            self._window_part(i, stage, region, group, x, out)
            return
        rows, columns, sets = stage.bands.rows, stage.bands.columns, stage.bands.sets
        for y, h in _runs(rows, region.y, region.h):
            for at, w in _runs(columns, region.x, region.w):
                part = Region(region.n, y, at, h, w)
                params = int(sets[rows[y], columns[at]])
                self._window_part(i, stage, part, group, x, out, params)

    def _window_part(
        self,
        i: int,
        stage: Stage,
        region: Region,
        group: int,
        x: BufferView,
        out: BufferView,
        params: int | None = None,
    ) -> None:
        """``params``: number of the parameters, where all groups have the same."""
        source = stage.sources[0]
        (g,) = source.geometries
        y0 = region.y * g.strides[0] - g.pads[0] - x.y
        x0 = region.x * g.strides[1] - g.pads[1] - x.x
        fields = dict(
            op=stage.window_op,
            blocks=1,
            src=x.base,
            src_pitch=x.pitch,
            src_block=x.block,
            pad=source.zero,
            out_w=region.w,
            out_h=region.h,
            out=out.at(region.y, region.x),
            out_pitch=out.pitch,
            out_block=out.block,
            **_window_fields(replace(g, pads=(-y0, -x0)), x),
            **asdict(stage.requant),
        )
        y, left, h, w = input_extent(source, region)
        reads = [_rectangle(x, 0, 1, Region(0, y, left, h, w))]
        taps = g.kernel[0] * g.kernel[1]
        if stage.params is not None:
            words = self.config.window_param_words
            place = group * words % len(stage.params) if params is None else params * words
            fields["params"] = self.fixed(i, "params") + place
            reads.append(run(StreamMemory.SCRATCHPAD, fields["params"], words))
        if stage.window_weights is not None:
            fields["weights"] = self.fixed(i, "window_weights") + group * taps
            reads.append(run(StreamMemory.SCRATCHPAD, fields["weights"], taps))
        self.stream.emit(Opcode.WINDOW, fields, reads, [_rectangle(out, 0, 1, region)], layer=i)


def _runs(kinds: np.ndarray, first: int, count: int) -> list[tuple[int, int]]:
    """Start and length of the runs of equal ``kinds`` within ``count`` from ``first``."""
    cuts = np.flatnonzero(np.diff(kinds[first : first + count])) + 1
    edges = [0, *cuts.tolist(), count]
    return [(first + a, b - a) for a, b in zip(edges, edges[1:], strict=False)]


def _window_fields(g: Geometry, view: BufferView) -> dict[str, int]:
    """The fields of a window whose pads are relative to a view."""
    return dict(
        in_w=view.w,
        in_h=view.h,
        x0=-g.pads[1],
        y0=-g.pads[0],
        kernel_w=g.kernel[1],
        kernel_h=g.kernel[0],
        stride_x=g.strides[1],
        stride_y=g.strides[0],
        dilation_x=g.dilations[1],
        dilation_y=g.dilations[0],
    )


def _rectangle(view: BufferView, block: int, blocks: int, region: Region) -> Span:
    """The words of a rectangle given in tensor coordinates."""
    return view.span(block, blocks, region.y - view.y, region.x - view.x, region.h, region.w)
