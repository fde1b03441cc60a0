"""POST: accumulators or scratchpad words, requantised, combined, looked up, into the scratchpad."""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Mux, Signal, Value
from amaranth.lib import data, wiring
from amaranth.lib.fifo import SyncFIFO
from amaranth.lib.wiring import In, Out

from systole.hw.arithmetic.requantise import Requantise
from systole.hw.bus.interfaces import AccumulatorRead, CommandPort, ScratchpadRead, ScratchpadWrite
from systole.hw.post.combine import PostCombine
from systole.hw.post.table import PostTable
from systole.isa import Config, Opcode, PostOp, PostSource
from systole.isa.params import PARAM_BYTES

IN_FLIGHT = 16
"""Words between being issued and being written: more than the longest way takes (15 cycles)."""


class PostEngine(wiring.Component):
    """The POST engine's core; semantics in ``isa.commands``.

    Rates without bank conflicts: one output word (of ``lanes`` channels) a cycle, across rows and
    groups; two cycles a word with source SCRATCHPAD and a ``b``, which needs two reads, but where
    one word of ``b`` stands for the whole image: it is read once for every group. Words are
    issued in order; ``IN_FLIGHT`` of them may be under way, so that nothing behind the issue ever
    waits except the write itself, and a result finds its place whenever the write is refused.

    Parameters are read ahead, before any data read: for the next group when the current one starts,
    for the next command as soon as it is offered and the current one has started its last group. A
    table is read when its command is offered and the current one uses none, or else when the
    current one is done. So neither must be written by a POST command that has not retired when the
    command is offered. Otherwise commands see what earlier ones wrote: a command starts when the
    writes before it are done; only accumulator to scratchpad with op NONE and without a table
    follows its like at once. From an idle engine the first word is issued 1 cycle after the command
    is offered; with parameters or a table, their number of reads and 2 cycles (``param_words``,
    ``PostTable.load_words``).

    ``lane`` must be below ``rows / lanes``.
    """

    def __init__(self, config: Config):
        self.config = config
        super().__init__(
            {
                "command": In(CommandPort(Opcode.POST)),
                "scratchpad_read": Out(ScratchpadRead(config)),
                "scratchpad_write": Out(ScratchpadWrite(config)),
                "accumulators": Out(AccumulatorRead(config)),
            }
        )

    def elaborate(self, platform) -> Module:
        m = Module()
        config = self.config
        lanes, places = config.lanes, config.rows // config.lanes
        read, write, accumulators = (
            self.scratchpad_read,
            self.scratchpad_write,
            self.accumulators,
        )
        m.submodules.requantise = requantise = Requantise(lanes=lanes)
        m.submodules.combine = combine = PostCombine(lanes=lanes)
        m.submodules.table = table = PostTable(config)
        where = data.StructLayout({"addr": 20, "place": range(max(places, 2)), "last": 1})
        # One entry for every word issued and not yet written. The others cannot overflow then.
        m.submodules.issued = issued = SyncFIFO(width=where.size, depth=IN_FLIGHT)
        m.submodules.results = results = SyncFIFO(width=8 * lanes, depth=IN_FLIGHT)
        m.submodules.addends = addends = SyncFIFO(width=8 * lanes, depth=Requantise.LATENCY + 2)

        # Commands ------------------------------------------------------------------------------
        offered = self.command.cmd
        head = offered.p
        cmd = Signal(head.shape())
        active = Signal()  # words of cmd are still to be issued
        overlaps = Signal()  # cmd may be followed before its words are written
        head_overlaps = (
            (head.source == PostSource.ACCUMULATOR) & (head.op == PostOp.NONE) & ~head.lut
        )
        accept = Signal()
        m.d.comb += [
            offered.ready.eq(~active & (~issued.r_rdy | (overlaps & head_overlaps))),
            accept.eq(offered.valid & offered.ready),
        ]
        from_scratchpad = cmd.source == PostSource.SCRATCHPAD
        combines = cmd.op != PostOp.NONE

        # Walk over words -------------------------------------------------------------------------
        issue = Signal()  # the current word goes on its way; the walk advances
        columns, rows = Signal(16), Signal(16)  # left, the current one included
        groups = Signal(8)
        place = Signal(range(max(places, 2)))
        acc = Signal(16)
        row_ends, group_ends, command_ends = Signal(), Signal(), Signal()
        word_ends = place == places - 1
        m.d.comb += [
            row_ends.eq(columns == 1),
            group_ends.eq(row_ends & (rows == 1)),
            command_ends.eq(group_ends & (groups == 1)),
        ]
        with m.If(accept):
            m.d.sync += [
                cmd.eq(head),
                overlaps.eq(head_overlaps),
                columns.eq(head.out_w),
                rows.eq(head.out_h),
                groups.eq(head.groups),
                place.eq(head.lane),
                acc.eq(head.acc),
            ]
        with m.If(issue):
            m.d.sync += [
                columns.eq(Mux(row_ends, cmd.out_w, columns - 1)),
                acc.eq(Mux(group_ends, cmd.acc, acc + 1)),
            ]
            with m.If(row_ends):
                m.d.sync += rows.eq(Mux(group_ends, cmd.out_h, rows - 1))
            with m.If(group_ends):
                m.d.sync += [groups.eq(groups - 1), place.eq(Mux(word_ends, 0, place + 1))]

        def walk(name: str, first: Value, step: Value | int, pitch: Value, block: Value) -> Signal:
            """The address of a tensor's current word, by running sums."""
            word, row, base = (Signal(20, name=f"{name}_{n}") for n in ("word", "row", "base"))
            with m.If(accept):
                m.d.sync += [word.eq(first), row.eq(first), base.eq(first)]
            with m.If(issue):
                with m.If(~row_ends):
                    m.d.sync += word.eq(word + step)
                with m.Elif(~group_ends):
                    m.d.sync += [word.eq(row + pitch), row.eq(row + pitch)]
                with m.Else():
                    next_base = (base + Mux(word_ends, block, 0))[:20]
                    m.d.sync += [word.eq(next_base), row.eq(next_base), base.eq(next_base)]
            return word

        out_word = walk("out", head.out, cmd.out_step, cmd.out_pitch, cmd.out_block)
        a_word = walk("a", head.a, 1, cmd.a_pitch, cmd.a_block)
        b_word = walk("b", head.b, cmd.b_step, cmd.b_pitch, cmd.b_block)

        # Parameters, read ahead ------------------------------------------------------------------
        count = config.param_words
        start = Signal()  # a group starts
        params_addr = Signal(20)
        params_left = Signal(range(count + 1))  # words to ask for
        params_index = Signal(range(max(count, 2)))  # of the word that comes next
        params_come, params_ready = Signal(), Signal()
        params = Signal(8 * config.rows * count)
        ahead = Signal()  # the reading for the offered command has begun
        ask_params, ask_data = Signal(), Signal()
        m.d.comb += ask_params.eq(params_left != 0)
        params_free = ~ask_params & ~params_come & ~params_ready
        wanted = offered.valid & (head.source == PostSource.ACCUMULATOR) & ~ahead
        with m.If(ask_params & read.ready):
            m.d.sync += [params_addr.eq(params_addr + 1), params_left.eq(params_left - 1)]
        m.d.sync += params_come.eq(ask_params & read.ready)
        with m.If(params_come):
            for i in range(count):
                with m.If(params_index == i):
                    m.d.sync += params.word_select(i, 8 * config.rows).eq(read.data)
            m.d.sync += params_index.eq(params_index + 1)
            with m.If(params_index == count - 1):
                m.d.sync += [params_index.eq(0), params_ready.eq(1)]
        with m.If(start & ~from_scratchpad):
            m.d.sync += params_ready.eq(0)
            with m.If(groups != 1):
                m.d.sync += params_left.eq(count)
        with m.If(wanted & params_free):
            m.d.sync += [params_addr.eq(head.params), params_left.eq(count), ahead.eq(1)]
        with m.If(accept):
            m.d.sync += ahead.eq(0)

        # Table, read ahead -----------------------------------------------------------------------
        table_ahead = Signal()  # the reading for the offered command has begun
        m.d.comb += [
            table.load.eq(
                offered.valid
                & head.lut
                & ~table_ahead
                & ~(cmd.lut & (active | issued.r_rdy))  # lookups to come
            ),
            table.table.eq(head.table),
            table.read.data.eq(read.data),
        ]
        with m.If(accept):
            m.d.sync += table_ahead.eq(0)
        with m.Elif(table.load):
            m.d.sync += table_ahead.eq(1)

        # Issue -----------------------------------------------------------------------------------
        streaming = Signal()  # the current group has started
        going = Signal()
        second = Signal()  # source SCRATCHPAD with ``b``: ``a`` has been read, ``b`` not yet
        still = Signal()  # source SCRATCHPAD with one word of ``b`` for the whole image
        held = Signal()  # which has been read for this group
        pair = from_scratchpad & combines & ~still
        reads = from_scratchpad | combines
        a_next, b_next = Signal(), Signal()
        with m.If(accept):
            m.d.sync += still.eq(
                (head.source == PostSource.SCRATCHPAD)
                & (head.op != PostOp.NONE)
                & (head.b_pitch == 0)
                & (head.b_step == 0)
            )
        m.d.comb += [
            start.eq(
                active
                & ~streaming
                & (from_scratchpad | (params_ready & ~requantise.loading))
                & (~cmd.lut | table.loaded)
            ),
            going.eq((start | streaming) & issued.w_rdy),
            table.read.ready.eq(read.ready & ~ask_params),
            ask_data.eq(going & reads & ~ask_params & ~table.read.valid),
            a_next.eq(from_scratchpad & Mux(still, held, ~second)),
            b_next.eq(combines & ~a_next),
            issue.eq(Mux(reads, ask_data & read.ready & ~Mux(still, b_next, pair & a_next), going)),
            read.valid.eq(ask_params | table.read.valid | ask_data),
            read.addr.eq(Mux(a_next, a_word, b_word)),
            accumulators.en.eq(issue & ~from_scratchpad),
            accumulators.addr.eq(acc),
            issued.w_en.eq(issue),
            issued.w_data.eq(Cat(out_word, place, command_ends)),
        ]
        with m.If(ask_params):
            m.d.comb += read.addr.eq(params_addr)
        with m.Elif(table.read.valid):
            m.d.comb += read.addr.eq(table.read.addr)
        with m.If(start):
            m.d.sync += streaming.eq(1)
        with m.If(issue & group_ends):
            m.d.sync += streaming.eq(0)
        with m.If(issue & command_ends):
            m.d.sync += active.eq(0)
        with m.If(accept):
            m.d.sync += active.eq(1)
        taken = ask_data & read.ready
        with m.If(pair & taken):
            m.d.sync += second.eq(~second)
        with m.If(still & taken):
            m.d.sync += held.eq(~(issue & group_ends))

        # Arrival: data of the reads accepted in the cycle before ----------------------------------
        acc_comes, a_comes, b_comes = Signal(), Signal(), Signal()
        m.d.sync += [
            acc_comes.eq(accumulators.en),
            a_comes.eq(taken & a_next),
            b_comes.eq(taken & b_next),
        ]
        part = Signal(8 * lanes)
        if places == 1:
            m.d.comb += part.eq(read.data)
        else:
            read_place = Signal.like(place)
            with m.If(taken):
                m.d.sync += read_place.eq(place)
            m.d.comb += part.eq(read.data.word_select(read_place, 8 * lanes))
        if config.groups == 1:
            m.d.comb += requantise.acc.eq(accumulators.data)
        else:
            group, read_group = Signal(range(config.groups)), Signal(range(config.groups))
            with m.If(accept):
                m.d.sync += group.eq(0)
            with m.If(issue & group_ends):
                m.d.sync += group.eq(group + 1)
            with m.If(accumulators.en):
                m.d.sync += read_group.eq(group)
            m.d.comb += requantise.acc.eq(accumulators.data.word_select(read_group, 32 * lanes))
        m.d.comb += [
            requantise.en.eq(1),
            requantise.i_valid.eq(acc_comes),
            requantise.load.eq(start & ~from_scratchpad),
            requantise.params.eq(params[: 8 * PARAM_BYTES * lanes]),
            requantise.zero.eq(cmd.zero),
            requantise.low.eq(cmd.low),
            requantise.high.eq(cmd.high),
        ]

        # ``b`` waits for the requantisation; ``a`` for its ``b``, or one ``b`` for all ``a`` ------
        waiting = Signal(8 * lanes)
        with m.If(Mux(still, b_comes, a_comes)):
            m.d.sync += waiting.eq(part)
        m.d.comb += [
            addends.w_en.eq(b_comes & ~from_scratchpad),
            addends.w_data.eq(part),
            addends.r_en.eq(requantise.o_valid & combines),
            combine.setup.eq(accept),
            combine.shift.eq(head.shift),
            combine.cmd.eq(cmd),
            combine.i_valid.eq(
                combines & Mux(from_scratchpad, Mux(still, a_comes, b_comes), requantise.o_valid)
            ),
            combine.a.eq(Mux(from_scratchpad, Mux(still, part, waiting), requantise.o)),
            combine.b.eq(Mux(from_scratchpad, Mux(still, waiting, part), addends.r_data)),
        ]

        # Results ---------------------------------------------------------------------------------
        result, result_comes = Signal(8 * lanes), Signal()
        with m.If(combines):
            m.d.comb += [result_comes.eq(combine.o_valid), result.eq(combine.o)]
        with m.Elif(from_scratchpad):
            m.d.comb += [result_comes.eq(a_comes), result.eq(part)]
        with m.Else():
            m.d.comb += [result_comes.eq(requantise.o_valid), result.eq(requantise.o)]
        m.d.comb += [
            table.i_valid.eq(result_comes & cmd.lut),
            table.i.eq(result),
            results.w_en.eq(Mux(cmd.lut, table.o_valid, result_comes)),
            results.w_data.eq(Mux(cmd.lut, table.o, result)),
        ]
        target = data.View(where, issued.r_data)
        written = write.valid & write.ready
        m.d.comb += [
            write.valid.eq(results.r_rdy),
            write.addr.eq(target.addr),
            write.data.eq(results.r_data.replicate(places)),
            write.mask.eq(1 if places == 1 else 1 << target.place),
            results.r_en.eq(write.ready),
            issued.r_en.eq(written),
            self.command.retire.eq(written & target.last),
            self.command.stalled.eq(
                (write.valid & ~write.ready) | (read.valid & ~read.ready & ~issue)
            ),
        ]
        return m
