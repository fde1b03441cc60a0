"""The WINDOW engine: depthwise convolution, pooling and im2col, scratchpad to scratchpad."""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, signed
from amaranth.lib import data, enum, wiring
from amaranth.lib.wiring import In, Out, connect, flipped

from systole.hw.arithmetic.requantise import Requantise
from systole.hw.bus.interfaces import CommandPort, ScratchpadRead, ScratchpadWrite
from systole.hw.window.im2col import Collector, segment_layout
from systole.hw.window.lines import WindowReduce, pixel_layout, weight_layout
from systole.hw.window.walk import OutputWalk, TapWalk, WalkSetup
from systole.isa import Config, Opcode, WindowOp
from systole.isa.params import PARAM_BYTES


class Kind(enum.Enum, shape=2):
    """What the word of a token is."""

    PIXEL = 0
    WEIGHT = 1
    PARAMS = 2
    SEGMENT = 3


IN_FLIGHT = 16
"""Words that a token can have been issued for and that are not yet written: more than the longest
way through the pipeline (data, reduction, requantisation, result: 12 cycles) and a result that
waits."""


class PendingWrites(wiring.Component):
    """Where the results under way will be written, oldest first.

    ``push`` appends ``addr`` and ``end``; there must never be more than ``IN_FLIGHT``. ``pop``
    removes the oldest, which is at ``o_addr`` and ``o_end``. ``clash``: ``check`` is one of the
    addresses (with ``checks``, or else 0).
    """

    def __init__(self) -> None:
        super().__init__(
            {
                "push": In(1),
                "addr": In(20),
                "end": In(1),
                "pop": In(1),
                "o_addr": Out(20),
                "o_end": Out(1),
                "empty": Out(1),
                "checks": In(1),
                "check": In(20),
                "clash": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        entry = data.StructLayout({"addr": 20, "end": 1})
        entries = [Signal(entry, name=f"entry{i}", reset_less=True) for i in range(IN_FLIGHT)]
        used = Signal(IN_FLIGHT)
        first, free = Signal(range(IN_FLIGHT)), Signal(range(IN_FLIGHT))
        one = Const(1, IN_FLIGHT)
        place = Signal(IN_FLIGHT)
        with m.If(self.push | self.pop):
            popped = Mux(self.pop, (one << first)[:IN_FLIGHT], 0)
            m.d.sync += used.eq((used & ~popped) | place)
        with m.If(self.push):
            m.d.comb += place.eq(one << free)
            m.d.sync += free.eq(free + 1)
        for chosen, e in zip(place, entries, strict=True):
            with m.If(chosen):
                m.d.sync += [e.addr.eq(self.addr), e.end.eq(self.end)]
        with m.If(self.pop):
            m.d.sync += first.eq(first + 1)
        with m.If(~self.empty), m.Switch(first):
            for i, e in enumerate(entries):
                with m.Case(i):
                    m.d.comb += [self.o_addr.eq(e.addr), self.o_end.eq(e.end)]
        hits = Signal(IN_FLIGHT)
        with m.If(self.checks):
            m.d.comb += hits.eq(used & Cat(e.addr == self.check for e in entries))
        m.d.comb += [self.empty.eq(~used.any()), self.clash.eq(hits.any())]
        return m


class WindowEngine(wiring.Component):
    """Carries out WINDOW commands by a stream of *tokens*.

    A token is one source word (a scratchpad word, or ``pad`` without a read) and what to do with
    it: load as weights or parameters, reduce, or collect bytes. One token a cycle is issued; all
    that follows is one pipeline that takes them in order, so the weights and parameters of a block
    are loaded behind the last words of the block before and nothing needs to drain. The
    pipeline stands still while two results wait for the scratchpad; a read that waits leaves a
    bubble.

    Tokens of a block: DEPTHWISE its tap weights, then (also SUM) 8 of parameters, then the words of
    :class:`~hw.window.walk.TapWalk`: the padded region (fast way) or every output's taps (general
    way). Weights of more than ``window_width`` taps (general way) are instead read again before
    every tap. IM2COL: one token for a run of up to ``rows`` bytes whose words, but for one, are
    held from the output before (always, once in the row, if the outputs are no more than ``rows``
    bytes apart and the run no longer than that); one more for every other word to be read, for
    every ``rows`` bytes more, and for a pixel whose last run ends in its next word.

    A command is prepared while the one before is at work and follows it as a block would, after one
    cycle; only when the pipeline has run dry if it does something else (operation, kernel,
    requantisation, ``pad`` or way). A word that is still to be written is read when it has been. A
    command alone takes its tokens' cycles and some 20 for set-up and pipeline (IM2COL: 30).
    """

    def __init__(self, config: Config):
        self.config = config
        super().__init__(
            {
                "command": In(CommandPort(Opcode.WINDOW)),
                "scratchpad_read": Out(ScratchpadRead(config)),
                "scratchpad_write": Out(ScratchpadWrite(config)),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config = self.config
        rows = config.rows
        word_bits = 8 * rows

        m.submodules.setup = setup = WalkSetup(config)
        m.submodules.walk = walk = TapWalk(config)
        m.submodules.outputs = outputs = OutputWalk()
        m.submodules.pending = pending = PendingWrites()
        m.submodules.reduce = reduce = WindowReduce(config)
        m.submodules.requantise = requantise = Requantise(lanes=rows)
        m.submodules.collector = collector = Collector(config)

        cmd, fast = walk.current.cmd, walk.current.fast
        depthwise, maximum, im2col = Signal(), Signal(), Signal()
        begun, en = Signal(), Signal()
        connect(m, flipped(self.command).cmd, setup.cmd)
        m.d.comb += [
            depthwise.eq(cmd.op == WindowOp.DEPTHWISE),
            maximum.eq(cmd.op == WindowOp.MAX),
            im2col.eq(cmd.op == WindowOp.IM2COL),
            walk.prepared.eq(setup.prepared),
            walk.start.eq(setup.take),
            outputs.cmd.eq(cmd),
            outputs.start.eq(begun),
        ]
        m.d.sync += begun.eq(setup.take)

        # Issue -----------------------------------------------------------------------------------
        token_layout = data.StructLayout(
            {
                "kind": Kind,
                "read": 1,
                "addr": 20,
                "emits": 1,  # completes a word of the result
                "pixel": pixel_layout(),
                "weight": weight_layout(),
                "params": 3,
                "segment": segment_layout(config),
            }
        )
        token, following = Signal(token_layout), Signal(token_layout)
        token_valid, push, free, take = Signal(), Signal(), Signal(), Signal()
        m.d.comb += [
            pending.checks.eq(token_valid & token.read),
            pending.check.eq(token.addr),
            self.scratchpad_read.valid.eq(token_valid & token.read & en & ~pending.clash),
            self.scratchpad_read.addr.eq(token.addr),
            take.eq(
                token_valid & en & (~token.read | (self.scratchpad_read.ready & ~pending.clash))
            ),
            free.eq(~token_valid | take),
        ]
        with m.If(free):
            m.d.sync += token_valid.eq(push)
            with m.If(push):
                m.d.sync += token.eq(following)

        def way(of: data.View) -> tuple[Value, Value, Value]:
            """Where a command's weights are: in the window, in the line memory (``stored``), or
            read before every tap (``again``)."""
            weighs = of.cmd.op == WindowOp.DEPTHWISE
            fits = of.taps <= config.window_width
            return weighs & of.fast, weighs & ~of.fast & fits, weighs & ~of.fast & ~fits

        in_window, stored, again = (Signal(name=n) for n in ("in_window", "stored", "again"))
        m.d.comb += [s.eq(v) for s, v in zip((in_window, stored, again), way(walk.current))]
        # Window positions in use: the kernel in the corner of the newest word.
        width = config.window_kernel
        kernel_x, kernel_y = Signal(width), Signal(width)
        used = Signal(width * width)
        for kernel, size in ((kernel_x, cmd.kernel_w), (kernel_y, cmd.kernel_h)):
            m.d.comb += kernel.eq(Cat(*(fast & (size > n) for n in range(width - 1, 0, -1)), 1))
        m.d.comb += used.eq(
            Cat(kernel_y[y] & kernel_x[x] for y in range(width) for x in range(width))
        )

        def corner(of: data.View) -> tuple[Value, Value]:
            """The window's column and row of the first tap."""
            sizes = (of.cmd.kernel_w, of.cmd.kernel_h)
            return tuple(Mux(of.fast, width - size, width - 1)[:3] for size in sizes)

        left_column, top_row = corner(walk.current)

        blocks_left = Signal(12)
        weight_addr, block_weights, params_addr = Signal(20), Signal(20), Signal(20)
        index = Signal(12)  # of the tap, or of the column in the region's row
        slot_x, slot_y = Signal(3), Signal(3)
        params_index = Signal(3)
        params_held = Signal()  # parameters wait in the pipeline to be taken over
        weight_first = Signal()  # ``again``: the tap's weights come next
        fill = Signal(range(rows))
        stop = Signal(range(2 * rows))
        unrotated = Signal(signed(len(fill) + 1))
        flush_is_end = Signal()
        m.d.comb += [
            stop.eq(fill + walk.count),
            unrotated.eq(walk.byte - fill),
        ]

        # A command follows without draining the pipeline if these are the same.
        modes = ("op", "pad", "zero", "low", "high", "kernel_w", "kernel_h")
        equal, same, empty = Signal(len(modes) + 1), Signal(), Signal()
        fresh = Signal()  # the command began with an empty pipeline
        with m.If(setup.ready):
            m.d.comb += equal.eq(
                Cat(
                    setup.prepared.fast == fast,
                    *(setup.prepared.cmd[f] == cmd[f] for f in modes),
                )
            )
        m.d.comb += [
            same.eq(equal.all()),
            empty.eq(~token_valid & pending.empty),
            reduce.clear.eq(begun & fresh),
        ]

        def begin_block(of: data.View) -> None:
            op, (in_window, stored, _) = of.cmd.op, way(of)
            with m.If(in_window | stored):
                m.next = "WEIGHTS"
            with m.Elif((op == WindowOp.MAX) | (op == WindowOp.IM2COL)):
                m.next = "WALK"
            with m.Else():
                m.next = "PARAMETERS"

        def read_weight() -> None:
            m.d.comb += [
                push.eq(1),
                following.kind.eq(Kind.WEIGHT),
                following.read.eq(1),
                following.addr.eq(weight_addr),
                following.weight.index.eq(index),
                following.weight.store.eq(stored),
                following.weight.x.eq(slot_x),
                following.weight.y.eq(slot_y),
            ]
            with m.If(free):
                m.d.sync += weight_addr.eq(weight_addr + 1)

        with m.FSM():
            with m.State("BEGIN"), m.If(setup.ready & free & (empty | same)):
                new = setup.prepared.cmd
                m.d.comb += setup.take.eq(1)
                m.d.sync += [
                    fresh.eq(empty),
                    blocks_left.eq(new.blocks - 1),
                    weight_addr.eq(new.weights),
                    block_weights.eq(new.weights),
                    params_addr.eq(new.params),
                    index.eq(0),
                    weight_first.eq(1),
                    fill.eq(0),
                    *(s.eq(c) for s, c in zip((slot_x, slot_y), corner(setup.prepared))),
                ]
                begin_block(setup.prepared)

            with m.State("WEIGHTS"):
                read_weight()
                with m.If(free):
                    m.d.sync += index.eq(index + 1)
                    with m.If(slot_x == width - 1):
                        m.d.sync += [slot_x.eq(left_column), slot_y.eq(slot_y + 1)]
                    with m.Else():
                        m.d.sync += slot_x.eq(slot_x + 1)
                    with m.If(index == walk.current.taps - 1):
                        m.d.sync += [index.eq(0), slot_y.eq(top_row)]
                        m.next = "PARAMETERS"

            with m.State("PARAMETERS"):
                m.d.comb += [
                    push.eq(~params_held),
                    following.kind.eq(Kind.PARAMS),
                    following.read.eq(1),
                    following.addr.eq(params_addr),
                    following.params.eq(params_index),
                ]
                with m.If(free & push):
                    m.d.sync += [
                        params_addr.eq(params_addr + 1),
                        params_index.eq(params_index + 1),
                    ]
                    with m.If(params_index == PARAM_BYTES - 1):
                        m.d.sync += params_held.eq(1)
                        m.next = "WALK"

            with m.State("WALK"):
                with m.If(again & weight_first):
                    read_weight()
                    with m.If(free):
                        m.d.sync += weight_first.eq(0)
                with m.Else():
                    m.d.comb += [
                        push.eq(1),
                        walk.step.eq(free),
                        following.kind.eq(Mux(im2col, Kind.SEGMENT, Kind.PIXEL)),
                        following.read.eq(walk.limit != 0),
                        following.addr.eq(walk.addr),
                        following.emits.eq(
                            Mux(
                                im2col,
                                following.segment.emit,
                                walk.mac & walk.last,
                            )
                        ),
                        following.pixel.index.eq(Mux(im2col, walk.line, index)),
                        following.pixel.mac.eq(walk.mac),
                        following.pixel.part.eq(walk.part),
                        following.pixel.first.eq(walk.first),
                        following.pixel.last.eq(walk.last),
                        following.segment.reload.eq(walk.reload),
                        following.segment.fetch.eq(walk.fetch),
                        following.segment.limit.eq(walk.limit),
                        following.segment.split.eq(walk.split),
                        following.segment.rotate.eq(
                            Mux(unrotated < 0, unrotated + rows, unrotated)
                        ),
                        following.segment.fill.eq(fill),
                        following.segment.stop.eq(stop),
                        following.segment.emit.eq(walk.last | (stop >= rows)),
                        following.segment.last.eq(walk.last & (stop <= rows)),
                    ]
                    with m.If(free):
                        m.d.sync += weight_first.eq(1)
                        with m.If(~fast | walk.last):
                            m.d.sync += index.eq(
                                Mux(Mux(fast, walk.row_end, walk.last), 0, index + 1)
                            )
                        with m.If(stop > rows):
                            m.d.sync += fill.eq(stop - rows)
                        with m.Elif(walk.last | (stop == rows)):
                            m.d.sync += fill.eq(0)
                        with m.Else():
                            m.d.sync += fill.eq(stop)
                        # The weights read again: the block's for the next output, too.
                        with m.If(again & walk.last):
                            with m.If(walk.block_end):
                                m.d.sync += block_weights.eq(weight_addr)
                            with m.Else():
                                m.d.sync += weight_addr.eq(block_weights)
                        with m.If(im2col & walk.last & (stop > rows)):
                            m.d.sync += flush_is_end.eq(walk.block_end)
                            m.next = "FLUSH"
                        with m.Elif(walk.block_end):
                            m.d.sync += blocks_left.eq(blocks_left - 1)
                            with m.If(blocks_left == 0):
                                m.next = "BEGIN"
                            with m.Else():
                                begin_block(walk.current)

            with m.State("FLUSH"):
                m.d.comb += [
                    push.eq(1),
                    following.kind.eq(Kind.SEGMENT),
                    following.emits.eq(1),
                    following.segment.fill.eq(fill),
                    following.segment.stop.eq(fill),
                    following.segment.emit.eq(1),
                    following.segment.last.eq(1),
                ]
                with m.If(free):
                    m.d.sync += fill.eq(0)
                    with m.If(flush_is_end):
                        m.next = "BEGIN"
                    with m.Else():
                        m.next = "WALK"

        # 1: data ---------------------------------------------------------------------------------
        data_token, data_valid = Signal(token_layout), Signal()
        kept, is_kept = (
            Signal(word_bits, reset_less=True),
            Signal(),
        )  # data that came while the pipeline stood still
        word = Signal(word_bits)
        read_data = Mux(is_kept, kept, self.scratchpad_read.data)
        with m.If(data_valid):
            m.d.comb += word.eq(Mux(data_token.read, read_data, cmd.pad.replicate(rows)))
        with m.If(en):
            m.d.sync += [data_valid.eq(take), is_kept.eq(0)]
            with m.If(take):
                m.d.sync += data_token.eq(token)
        with m.Elif(data_valid & data_token.read & ~is_kept):
            m.d.sync += [kept.eq(self.scratchpad_read.data), is_kept.eq(1)]

        def arrives(kind: Kind) -> Value:
            return data_valid & (data_token.kind == kind)

        # 2..5: reduction -------------------------------------------------------------------------
        m.d.comb += [
            reduce.en.eq(en),
            reduce.fast.eq(fast),
            reduce.maximum.eq(maximum),
            reduce.stored.eq(stored),
            reduce.used.eq(used),
            reduce.ones.eq(Mux(depthwise, 0, used)),
            reduce.issue.eq(
                take
                & (
                    ((token.kind == Kind.PIXEL) & (token.pixel.part == 0))
                    | (token.kind == Kind.SEGMENT)
                )
            ),
            reduce.index.eq(token.pixel.index),
            reduce.pixel_valid.eq(arrives(Kind.PIXEL)),
            reduce.pixel.eq(data_token.pixel),
            reduce.weight_valid.eq(arrives(Kind.WEIGHT)),
            reduce.weight.eq(data_token.weight),
            reduce.word.eq(word),
        ]

        # Parameters are taken over in the stage where their block's first accumulators will come.
        params = Signal(PARAM_BYTES * word_bits, reset_less=True)
        with m.If(en & arrives(Kind.PARAMS)):
            m.d.sync += params.eq(Cat(params[word_bits:], word))
        complete = Signal(WindowReduce.LATENCY)
        with m.If(en):
            m.d.sync += complete.eq(
                Cat(arrives(Kind.PARAMS) & (data_token.params == PARAM_BYTES - 1), complete)
            )
            with m.If(complete[-1]):
                m.d.sync += params_held.eq(0)

        # 6..: requantisation ---------------------------------------------------------------------
        m.d.comb += [
            requantise.en.eq(en),
            requantise.i_valid.eq(reduce.o_valid & ~maximum),
            requantise.acc.eq(reduce.acc),
            requantise.load.eq(complete[-1]),
            requantise.params.eq(params),
            requantise.zero.eq(cmd.zero),
            requantise.low.eq(cmd.low),
            requantise.high.eq(cmd.high),
        ]

        # 2..3: im2col ----------------------------------------------------------------------------
        m.d.comb += [
            collector.en.eq(en),
            collector.valid.eq(arrives(Kind.SEGMENT)),
            collector.segment.eq(data_token.segment),
            collector.word.eq(word),
            collector.pad.eq(cmd.pad),
            collector.kept.eq(reduce.kept),
            reduce.keep.eq(arrives(Kind.SEGMENT) & data_token.segment.fetch),
            reduce.held.eq(collector.held),
        ]

        # Results ---------------------------------------------------------------------------------
        result = Signal(word_bits, reset_less=True)
        result_valid = Signal()
        maximum_valid = Signal()
        # A result that was refused makes way for the next one.
        waiting, waits = Signal(word_bits, reset_less=True), Signal()
        m.d.comb += [
            maximum_valid.eq(reduce.o_valid & maximum),
            en.eq(~result_valid | ~waits | self.scratchpad_write.ready),
        ]
        with m.If(en):
            m.d.sync += [
                result_valid.eq(requantise.o_valid | maximum_valid | collector.o_valid),
            ]
            with m.If(requantise.o_valid):
                m.d.sync += result.eq(requantise.o)
            with m.If(collector.o_valid):
                m.d.sync += result.eq(collector.o)
            with m.If(maximum_valid):
                for i in range(rows):
                    value = reduce.acc[32 * i :][:8].as_signed()
                    raised = Signal(signed(8), name=f"raised_{i}")
                    m.d.comb += raised.eq(Mux(value < cmd.low, cmd.low, value))
                    m.d.sync += result.word_select(i, 8).eq(
                        Mux(raised > cmd.high, cmd.high, raised)
                    )

        written = Signal()
        m.d.sync += waits.eq(Mux(written, waits & result_valid, waits | result_valid))
        with m.If(en & result_valid):
            m.d.sync += waiting.eq(result)
        m.d.comb += [
            self.scratchpad_write.valid.eq(result_valid | waits),
            self.scratchpad_write.addr.eq(pending.o_addr),
            self.scratchpad_write.data.eq(Mux(waits, waiting, result)),
            self.scratchpad_write.mask.eq(~0),
            written.eq(self.scratchpad_write.valid & self.scratchpad_write.ready),
            outputs.step.eq(take & token.emits),
            outputs.last_word.eq(token.segment.last),
            pending.push.eq(outputs.step),
            pending.addr.eq(outputs.addr),
            pending.end.eq(outputs.end),
            pending.pop.eq(written),
            self.command.stalled.eq(
                (self.scratchpad_read.valid & ~self.scratchpad_read.ready) | ~en
            ),
        ]
        m.d.sync += self.command.retire.eq(written & pending.o_end)
        return m
