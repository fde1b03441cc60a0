"""POST: accumulators or scratchpad words, requantised, added, clamped, into the scratchpad."""

from __future__ import annotations

from amaranth.hdl import C, Cat, Const, Module, Mux, Signal, Value, signed
from amaranth.lib import data, wiring
from amaranth.lib.fifo import SyncFIFO
from amaranth.lib.wiring import In, Out

from hw.interfaces import (
    AccumulatorRead,
    CommandPort,
    ScratchpadRead,
    ScratchpadWrite,
    command_layout,
)
from hw.requantise import Requantise
from isa import Config, Opcode, PostOp, PostSource
from isa.params import PARAM_BYTES

IN_FLIGHT = 16
"""Words between being issued and being written: more than the longest way takes (12 cycles)."""

TOTAL = 34
"""Bits of ADD's sum: two products of signed 9 and unsigned 24 bits."""

SUM = 12
"""Bits of ADD's shifted and rounded sum; beyond is beyond every clamp."""


class PostAdd(wiring.Component):
    """ADD's arithmetic on ``lanes`` channels: ``sw.numerics.add``, in ``LATENCY`` stages.

    ``a`` and ``b`` are taken with ``i_valid``, every cycle if need be; ``o`` is valid with
    ``o_valid`` ``LATENCY`` cycles later. ``cmd`` is the POST command whose fields apply; it must
    hold still while values are in flight. ``setup`` marks the cycle before the first in which
    ``cmd`` is looked at; ``shift`` is the command's in that cycle.

    Stages: zero points; products; sum; shift and rounding. Zero point and clamp follow the last
    register.
    """

    LATENCY = 4

    def __init__(self, *, lanes: int):
        self.lanes = lanes
        super().__init__(
            {
                "setup": In(1),
                "shift": In(6),
                "cmd": In(command_layout(Opcode.POST)),
                "i_valid": In(1),
                "a": In(8 * lanes),
                "b": In(8 * lanes),
                "o_valid": Out(1),
                "o": Out(8 * lanes),
            }
        )

    def elaborate(self, platform) -> Module:
        m = Module()
        valid = Signal(self.LATENCY)
        m.d.sync += valid.eq(Cat(self.i_valid, valid))
        m.d.comb += self.o_valid.eq(valid[-1])
        point = Signal(6)  # position of the sum's bit worth one half
        below = Signal(TOTAL)  # mask of the bits under it
        with m.If(self.setup):
            to_point = (self.shift - 1)[:6]
            m.d.sync += [
                point.eq(to_point),
                below.eq(C((1 << TOTAL) - 1) >> Mux(to_point < TOTAL, TOTAL - to_point, 0)[:6]),
            ]

        for i in range(self.lanes):

            def reg(name, shape, lane=i):
                return Signal(shape, name=f"{name}_{lane}")

            da, db = reg("da", signed(9)), reg("db", signed(9))
            pa, pb = reg("pa", signed(33)), reg("pb", signed(33))
            total, scaled = reg("total", signed(TOTAL)), reg("scaled", signed(TOTAL))
            result = reg("result", signed(SUM))
            with m.If(self.i_valid):
                m.d.sync += [
                    da.eq(_lane(self.a, i) - self.cmd.za),
                    db.eq(_lane(self.b, i) - self.cmd.zb),
                ]
            with m.If(valid[0]):
                m.d.sync += [pa.eq(da * self.cmd.ma), pb.eq(db * self.cmd.mb)]
            with m.If(valid[1]):
                m.d.sync += total.eq(pa + pb)
            m.d.comb += scaled.eq(total >> point)  # in halves
            up = scaled[0] & (scaled[1] | (total & below).any())
            fits = ~scaled[SUM - 1 :].any() | scaled[SUM - 1 :].all()
            limit = (1 << (SUM - 2)) - 1
            with m.If(valid[2]):
                m.d.sync += result.eq(
                    Mux(
                        fits,
                        scaled[1:SUM].as_signed() + up,
                        Mux(scaled[-1], Const(~limit, signed(SUM)), Const(limit, signed(SUM))),
                    )
                )
            moved = reg("moved", signed(SUM + 1))
            raised = reg("raised", signed(SUM + 1))
            m.d.comb += [
                moved.eq(result + self.cmd.zo),
                raised.eq(Mux(moved < self.cmd.low2, self.cmd.low2, moved)),
                self.o[8 * i :][:8].eq(Mux(raised > self.cmd.high2, self.cmd.high2, raised)),
            ]
        return m


def _lane(vector: Value, i: int) -> Value:
    return vector[8 * i :][:8].as_signed()


class PostEngine(wiring.Component):
    """The POST engine's core; semantics in ``isa.commands``.

    Rates without bank conflicts: one output word (of ``lanes`` channels) a cycle, across rows and
    groups; two cycles a word with source SCRATCHPAD and op ADD, which needs two reads. Words are
    issued in order; ``IN_FLIGHT`` of them may be under way, so that nothing behind the issue ever
    waits except the write itself, and a result finds its place whenever the write is refused.

    Parameters are read ahead, before any data read: for the next group when the current one starts,
    for the next command as soon as it is offered and the current one has started its last group. So
    they must not be written by a POST command that has not retired when the command is offered.
    Otherwise commands see what earlier ones wrote: a command starts when the writes before it are
    done; only accumulator to scratchpad without ADD follows its like at once. From an idle engine
    the first word is issued ``param_words + 2`` cycles after the command is offered (without
    parameters: 1 cycle).

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
        m.submodules.add = add = PostAdd(lanes=lanes)
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
        head_overlaps = (head.source == PostSource.ACCUMULATOR) & (head.op == PostOp.NONE)
        accept = Signal()
        m.d.comb += [
            offered.ready.eq(~active & (~issued.r_rdy | (overlaps & head_overlaps))),
            accept.eq(offered.valid & offered.ready),
        ]
        from_scratchpad = cmd.source == PostSource.SCRATCHPAD
        adds = cmd.op == PostOp.ADD

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

        def walk(name: str, first: Value, pitch: Value, block: Value) -> Signal:
            """The address of a tensor's current word, by running sums."""
            word, row, base = (Signal(20, name=f"{name}_{n}") for n in ("word", "row", "base"))
            with m.If(accept):
                m.d.sync += [word.eq(first), row.eq(first), base.eq(first)]
            with m.If(issue):
                with m.If(~row_ends):
                    m.d.sync += word.eq(word + 1)
                with m.Elif(~group_ends):
                    m.d.sync += [word.eq(row + pitch), row.eq(row + pitch)]
                with m.Else():
                    next_base = (base + Mux(word_ends, block, 0))[:20]
                    m.d.sync += [word.eq(next_base), row.eq(next_base), base.eq(next_base)]
            return word

        out_word = walk("out", head.out, cmd.out_pitch, cmd.out_block)
        a_word = walk("a", head.a, cmd.a_pitch, cmd.a_block)
        b_word = walk("b", head.b, cmd.b_pitch, cmd.b_block)

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

        # Issue -----------------------------------------------------------------------------------
        streaming = Signal()  # the current group has started
        going = Signal()
        second = Signal()  # source SCRATCHPAD, op ADD: ``a`` has been read, ``b`` not yet
        pair = from_scratchpad & adds
        reads = from_scratchpad | adds
        m.d.comb += [
            start.eq(
                active & ~streaming & (from_scratchpad | (params_ready & ~requantise.loading))
            ),
            going.eq((start | streaming) & issued.w_rdy),
            ask_data.eq(going & reads & ~ask_params),
            issue.eq(Mux(reads, ask_data & read.ready & (second | ~pair), going)),
            read.valid.eq(ask_params | ask_data),
            read.addr.eq(
                Mux(ask_params, params_addr, Mux(from_scratchpad & ~second, a_word, b_word))
            ),
            accumulators.en.eq(issue & ~from_scratchpad),
            accumulators.addr.eq(acc),
            issued.w_en.eq(issue),
            issued.w_data.eq(Cat(out_word, place, command_ends)),
        ]
        with m.If(start):
            m.d.sync += streaming.eq(1)
        with m.If(issue & group_ends):
            m.d.sync += streaming.eq(0)
        with m.If(issue & command_ends):
            m.d.sync += active.eq(0)
        with m.If(accept):
            m.d.sync += active.eq(1)
        with m.If(pair & ask_data & read.ready):
            m.d.sync += second.eq(~second)

        # Arrival: data of the reads accepted in the cycle before ----------------------------------
        acc_comes, a_comes, b_comes = Signal(), Signal(), Signal()
        taken = ask_data & read.ready
        m.d.sync += [
            acc_comes.eq(accumulators.en),
            a_comes.eq(taken & from_scratchpad & ~second),
            b_comes.eq(taken & (~from_scratchpad | second)),
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

        # ADD: an accumulator's ``b`` waits for the requantisation; an ``a`` for its ``b`` ---------
        a = Signal(8 * lanes)
        with m.If(a_comes):
            m.d.sync += a.eq(part)
        m.d.comb += [
            addends.w_en.eq(b_comes & ~from_scratchpad),
            addends.w_data.eq(part),
            addends.r_en.eq(requantise.o_valid & adds),
            add.setup.eq(accept),
            add.shift.eq(head.shift),
            add.cmd.eq(cmd),
            add.i_valid.eq(adds & Mux(from_scratchpad, b_comes, requantise.o_valid)),
            add.a.eq(Mux(from_scratchpad, a, requantise.o)),
            add.b.eq(Mux(from_scratchpad, part, addends.r_data)),
        ]

        # Results ---------------------------------------------------------------------------------
        with m.If(adds):
            m.d.comb += [results.w_en.eq(add.o_valid), results.w_data.eq(add.o)]
        with m.Elif(from_scratchpad):
            m.d.comb += [results.w_en.eq(a_comes), results.w_data.eq(part)]
        with m.Else():
            m.d.comb += [results.w_en.eq(requantise.o_valid), results.w_data.eq(requantise.o)]
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
