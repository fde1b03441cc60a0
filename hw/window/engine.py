"""The WINDOW engine: depthwise convolution, pooling, im2col and operations on rows, scratchpad to
scratchpad."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from amaranth.hdl import Cat, Module, Mux, Signal, Value
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out, connect, flipped

from systole.hw.arithmetic.requantise import SHIFTED, Requantise
from systole.hw.bus.interfaces import (
    CommandInterface,
    CommandPort,
    ReadInterface,
    ScratchpadRead,
    ScratchpadWrite,
    WriteInterface,
    record,
)
from systole.hw.window.im2col import Collector
from systole.hw.window.issue import Kind, TokenIssue, token_layout
from systole.hw.window.lines import WindowReduce, window_positions
from systole.hw.window.row_lanes import RowLanes
from systole.hw.window.rows import is_row
from systole.hw.window.walk import spans
from systole.hw.window.writeback import WriteBack
from systole.isa import Config, Opcode, WindowOp
from systole.isa.params import CHANNEL_FLAGS, PARAM_BYTES
from systole.isa.timing import FAST_DILATION


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

    With several ``window_passes`` a block is done once for each, with its weights and a part of its
    parameters; each pass reduces other channels of its words, and writes these alone (but for
    IM2COL).

    With ``row_ops``, a row operation's tokens are those of :class:`~hw.window.rows.RowSequencer`;
    :class:`~hw.window.row_lanes.RowLanes` stands in place of the reduction. It only begins when the
    pipeline has run dry. Its cycles are those of :func:`systole.isa.timing.row_cycles`, and some 30
    for set-up and pipeline.

    A command is prepared while the one before is at work and follows it as a block would, after two
    cycles (MAX, IM2COL: three); only when the pipeline has run dry if it does something else
    (operation, kernel, requantisation, ``pad`` or way). A word that is still to be written is read
    when it has been. A command alone takes its tokens' cycles and some 20 for set-up and pipeline
    (IM2COL: 30).

    ::

        command -> issue -> read -> reduce ----> requantise -> write back
                      |       |        `---(MAX)----------------^
                      |       |-> collect (IM2COL) -------------|
                      |       `-> row lanes -> requantise ------|
                      `-- announces every word to be written ---'
    """

    command: CommandInterface
    scratchpad_read: ReadInterface
    scratchpad_write: WriteInterface

    def __init__(self, config: Config):
        self.config = config
        super().__init__(
            {
                "command": In(CommandPort(Opcode.WINDOW)),
                "scratchpad_read": Out(ScratchpadRead(config)),
                "scratchpad_write": Out(ScratchpadWrite(config)),
            }
        )
        self._issue = TokenIssue(config)
        self._reduce = WindowReduce(config)
        self._rows = RowLanes(config) if config.row_ops else None
        self._requantise = Requantise(lanes=config.reduced_lanes, held=True, rows=config.row_ops)
        self._collector = Collector(config)
        self._write_back = WriteBack(config)
        self._en = self._write_back.en
        self._take = Signal()  # the token at hand goes on its way
        # The token whose word comes from the scratchpad; a stage later, with its word.
        self._reading = record(token_layout(config), reset_less=True)
        self._is_reading = Signal()
        self._token = record(token_layout(config))
        self._token_valid = Signal()
        self._word = Signal(8 * config.rows, reset_less=True)
        self._params = Signal(
            config.pass_param_words * 8 * config.rows, name="params", reset_less=True
        )
        # The channels of the word that the pass at hand reduces.
        self._channels = self._word
        if config.window_passes > 1:
            self._channels = Signal(8 * config.reduced_lanes, name="channels", reset_less=True)

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.issue = self._issue
        m.submodules.reduce = self._reduce
        if self._rows is not None:
            m.submodules.rows = self._rows
            self._carry_out_rows(m, self._rows)
        m.submodules.requantise = self._requantise
        m.submodules.collector = self._collector
        m.submodules.write_back = self._write_back
        connect(m, flipped(self.command).cmd, self._issue.command)
        self._read_word(m)
        self._reduce_word(m)
        self._requantise_sums(m)
        self._collect_segment(m)
        self._write_results(m)
        read = self.scratchpad_read
        m.d.comb += self.command.stalled.eq((read.valid & ~read.ready) | ~self._en)
        return m

    def _read_word(self, m: Module) -> None:
        """Stages 1 and 2: the token's word, from the scratchpad or of ``pad``."""
        issue, read, write_back, en = (
            self._issue,
            self.scratchpad_read,
            self._write_back,
            self._en,
        )
        tokens, token = issue.tokens, issue.tokens.payload
        m.d.comb += [
            write_back.checks.eq(issue.checks),
            write_back.check.eq(issue.check),
            write_back.follows.eq(issue.follows),
            issue.clash.eq(write_back.clash),
            read.valid.eq(tokens.valid & token.read & en & ~issue.blocked),
            read.addr.eq(token.addr),
            tokens.ready.eq(en & ~issue.blocked & (~token.read | read.ready)),
            self._take.eq(tokens.valid & tokens.ready),
        ]
        # A word that came while the pipeline stood still.
        kept, is_kept = Signal(8 * self.config.rows, reset_less=True), Signal()
        pad = issue.current.cmd.pad.replicate(self.config.rows)
        with m.If(en):
            m.d.sync += [
                self._is_reading.eq(self._take),
                self._token_valid.eq(self._is_reading),
                is_kept.eq(0),
            ]
            with m.If(self._take):
                m.d.sync += self._reading.eq(token)
            with m.If(self._is_reading):
                word = Mux(self._reading.read, Mux(is_kept, kept, read.data), pad)
                m.d.sync += self._token.eq(self._reading)
                with self._unless_kept(m):
                    m.d.sync += self._word.eq(word)
                    if self.config.window_passes > 1:
                        own = word.word_select(self._reading.number, len(self._channels))
                        m.d.sync += self._channels.eq(own)
        with m.Elif(self._is_reading & self._reading.read & ~is_kept):
            m.d.sync += [kept.eq(read.data), is_kept.eq(1)]

    def _unless_kept(self, m: Module) -> AbstractContextManager[None]:
        """Where the token that is read does not keep the word at hand, as one of a row may."""
        if not self.config.row_ops:
            return nullcontext()
        return m.If(self._reading.read | ~self._reading.is_row)

    def _arrives(self, kind: Kind) -> Value:
        """Whether the word at hand is of this kind."""
        arrives = self._token_valid & (self._token.kind == kind)
        if self.config.row_ops and kind == Kind.PARAMS:
            return arrives & ~self._token.is_row
        return arrives

    def _positions(self, m: Module) -> Signal:
        """The window positions in use, a bit each: the kernel in the corner of the newest word; by
        columns, its newest column."""
        current, config = self._issue.current, self.config
        width, height = config.window_square, config.window_kernel
        kernel_x, kernel_y = Signal(width), Signal(height)
        used = Signal(window_positions(config))
        axes = zip((kernel_x, kernel_y), spans(current, config), ("x", "y"), strict=True)
        for kernel, size, axis in axes:
            inside = [current.fast & (size > n) for n in range(len(kernel) - 1, 0, -1)]
            if config.window_by_columns:
                taps = self._taps(current.cmd[f"dilation_{axis}"])[-len(inside) :]
                inside = [is_in & tap for is_in, tap in zip(inside, taps, strict=True)]
            if config.window_by_columns and axis == "x":
                inside = [is_in & ~current.columns for is_in in inside]
            m.d.comb += kernel.eq(Cat(*inside, 1))
        older, newer = kernel_y[:-width], kernel_y[-width:]
        square = (row & column for row in newer for column in kernel_x)
        m.d.comb += used.eq(Cat(*square, older))
        return used

    def _taps(self, dilation: Value) -> list[Value]:
        """Whether a tap may lie so many positions before the newest, farthest first."""
        distances = range(self.config.window_kernel - 1, 0, -1)
        dilations = range(1, FAST_DILATION + 1)
        return [
            Cat(dilation == d for d in dilations if distance % d == 0).any()
            for distance in distances
        ]

    def _reduce_word(self, m: Module) -> None:
        """Stages 3 to 8: sums of products, or maxima."""
        reduce, issue, token = self._reduce, self._issue, self._reading
        op, columns = issue.current.cmd.op, issue.current.columns
        m.d.comb += [
            reduce.en.eq(self._en),
            reduce.fast.eq(issue.current.fast),
            reduce.maximum.eq(op == WindowOp.MAX),
            reduce.stored.eq(issue.stored),
            reduce.used.eq(self._positions(m)),
            reduce.ones.eq(op != WindowOp.DEPTHWISE),
            reduce.issue.eq(
                self._is_reading
                & (
                    ((token.kind == Kind.PIXEL) & ((token.what.pixel.part == 0) | columns))
                    | (token.kind == Kind.SEGMENT)
                )
            ),
            reduce.columns.eq(columns),
            reduce.next_index.eq(token.index),
            reduce.index.eq(self._token.index),
            reduce.pixel_valid.eq(self._arrives(Kind.PIXEL)),
            reduce.pixel.eq(self._token.what.pixel),
            reduce.weight_valid.eq(self._arrives(Kind.WEIGHT)),
            reduce.weight.eq(self._token.what.weight),
            reduce.word.eq(self._channels),
        ]
        if self.config.zero_points:
            m.d.comb += reduce.weight_zero.eq(issue.current.cmd.weight_zero)

    def _requantise_sums(self, m: Module) -> None:
        """Stages 9 to 17. Parameters are taken over in the stage in which their block's first
        accumulators will come."""
        requantise, cmd = self._requantise, self._issue.current.cmd
        count, word = self.config.pass_param_words, len(self._word)
        params = self._params
        load = WindowReduce.LATENCY - 1
        # Words of new parameters come no earlier than three cycles with ``en`` after the old ones
        # are free: the token is taken, its word read, and at hand.
        complete = Signal(load + 1 + SHIFTED - 3)
        with m.If(self._en & self._arrives(Kind.PARAMS)):
            m.d.sync += params.eq(Cat(params[word:], self._word))
        with m.If(self._en):
            last = self._token.what.params == count - 1
            m.d.sync += complete.eq(Cat(self._arrives(Kind.PARAMS) & last, complete))
        m.d.comb += [
            self._issue.params_taken.eq(self._en & complete[-1]),
            requantise.en.eq(self._en),
            requantise.i_valid.eq(self._reduce.o_valid & ~self._reduce.maximum),
            requantise.acc.eq(self._reduce.acc),
            requantise.load.eq(complete[load]),
            requantise.params.eq(params),
            requantise.zero.eq(cmd.zero),
            requantise.low.eq(cmd.low),
            requantise.high.eq(cmd.high),
        ]
        if self._rows is not None:
            rows, is_of_rows = self._rows, is_row(cmd)
            m.d.comb += [
                rows.load_flags.eq(complete[RowLanes.LATENCY - 2]),
                requantise.i_valid.eq(
                    (self._reduce.o_valid & ~self._reduce.maximum) | rows.o_valid
                ),
                requantise.acc.eq(Mux(is_of_rows, rows.acc, self._reduce.acc)),
                requantise.load.eq(
                    Mux(is_of_rows, rows.row_load | complete[RowLanes.LATENCY - 1], complete[load])
                ),
                requantise.row.eq(cmd.op == WindowOp.SOFTMAX),
                requantise.row_multiplier.eq(rows.multiplier),
                requantise.row_shift.eq(rows.shift),
            ]

    def _carry_out_rows(self, m: Module, rows: RowLanes) -> None:
        """Row operations: from the word at hand to what is requantised."""
        issue, token = self._issue, self._issue.tokens.payload
        lane = 8 * PARAM_BYTES
        flags = [
            self._params[end - len(CHANNEL_FLAGS) : end]
            for end in range(lane, len(self._params) + 1, lane)
        ]
        m.d.comb += [
            rows.cmd.eq(issue.current.cmd),
            rows.en.eq(self._en),
            rows.took.eq(self._take & token.is_row),
            rows.taken_row.eq(token.what.row),
            rows.moves.eq(self._en & self._is_reading & self._reading.is_row),
            rows.valid.eq(self._token_valid & self._token.is_row),
            rows.row.eq(self._token.what.row),
            rows.word.eq(self._word),
            rows.channels.eq(self._channels),
            rows.flags.eq(Cat(flags)),
            issue.row_taken.eq(rows.taken),
            issue.rows_complete.eq(rows.complete),
        ]

    def _collect_segment(self, m: Module) -> None:
        """IM2COL, stages 3 and 4. Words kept from output to output are in the line memory."""
        collector, reduce = self._collector, self._reduce
        arrives = self._arrives(Kind.SEGMENT)
        m.d.comb += [
            collector.en.eq(self._en),
            collector.valid.eq(arrives),
            collector.segment.eq(self._token.what.segment),
            collector.word.eq(self._word),
            collector.pad.eq(self._issue.current.cmd.pad),
            collector.kept.eq(reduce.kept),
            reduce.keep.eq(arrives & self._token.what.segment.fetch),
            reduce.held.eq(collector.held),
        ]

    def _write_results(self, m: Module) -> None:
        """The last stage, and the announcement of every result when its token is taken."""
        write_back, issue, reduce = self._write_back, self._issue, self._reduce
        connect(m, flipped(self.scratchpad_write), write_back.scratchpad)
        m.d.comb += [
            write_back.cmd.eq(issue.current.cmd),
            write_back.start.eq(issue.begun),
            write_back.announce.eq(self._take & issue.tokens.payload.emits),
            write_back.last_word.eq(issue.tokens.payload.what.segment.last),
            write_back.requantised.valid.eq(self._requantise.o_valid),
            write_back.requantised.payload.eq(self._requantise.o),
            write_back.maxima.valid.eq(reduce.o_valid & reduce.maximum),
            write_back.maxima.payload.eq(reduce.acc),
            write_back.collected.valid.eq(self._collector.o_valid),
            write_back.collected.payload.eq(self._collector.o),
            issue.drained.eq(write_back.drained),
            self.command.retire.eq(write_back.retire),
        ]
