"""POST: accumulators or scratchpad words, requantised, combined, looked up, into the scratchpad."""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Mux, Signal, Value
from amaranth.lib import data, wiring
from amaranth.lib.fifo import SyncFIFO
from amaranth.lib.wiring import In, Out

from systole.hw.arithmetic.requantise import Requantise
from systole.hw.bus.interfaces import (
    AccumulatorInterface,
    AccumulatorRead,
    CommandInterface,
    CommandPort,
    ReadInterface,
    ScratchpadRead,
    ScratchpadWrite,
    WriteInterface,
    command_layout,
    mask_of,
    record,
)
from systole.hw.bus.registers import StreamRegisters
from systole.hw.post.combine import PostCombine
from systole.hw.post.parameters import ParameterPrefetch
from systole.hw.post.queue import RegisteredQueue
from systole.hw.post.table import PostTable
from systole.hw.post.walk import PostWalk
from systole.isa import Config, Opcode, PostOp, PostSource
from systole.isa.commands import ACC_ADDRESS_BITS, ADDRESS_BITS
from systole.isa.params import PARAM_BYTES
from systole.isa.timing import post_keeps_operand, post_overlaps

IN_FLIGHT = 26
"""Words between being issued and being written: more than the longest way takes (24 cycles)."""


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

    ::

        walk -> requests > accumulators -> requantise --------> combine -> table -> results -> write
                         > scratchpad ---> waiting a, b, addends --^                            ^
             -> issued: where each word goes ---------------------------------------------------'

    What the walk asks for stands in registers, ``requests``, until it is taken: an address that
    came from the walk's conditions would reach the scratchpad's arbiter late in the cycle, and the
    arbiter's answer the walk.
    """

    command: CommandInterface
    scratchpad_read: ReadInterface
    scratchpad_write: WriteInterface
    accumulators: AccumulatorInterface

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
        lanes = config.lanes
        self._walk = PostWalk(config)
        self._parameters = ParameterPrefetch(config)
        self._table = PostTable(config)
        self._requantise = Requantise(lanes=lanes)
        self._combine = PostCombine(lanes=lanes)
        # One entry for every word issued and not yet written, so that no other queue overflows.
        self._target = data.StructLayout(
            {"addr": ADDRESS_BITS, "place": range(max(config.word_groups, 2)), "last": 1}
        )
        self._issued = RegisteredQueue(width=self._target.size, depth=IN_FLIGHT)
        self._results = RegisteredQueue(width=8 * lanes, depth=IN_FLIGHT)
        self._addends = SyncFIFO(width=8 * lanes, depth=Requantise.LATENCY + 2)
        # The command whose words are issued.
        self._cmd = record(command_layout(Opcode.POST), reset_less=True)
        self._from_scratchpad = self._cmd.source == PostSource.SCRATCHPAD
        self._combines = self._cmd.op != PostOp.NONE
        self._keeps_b = Signal()  # source SCRATCHPAD with one word of ``b`` for the whole image
        self._active = Signal()  # words of the command are still to be issued
        self._accept = Signal()
        self._start = Signal()  # a group starts
        self._going = Signal()  # the current group may issue words
        self._issue = Signal()  # the current word goes on its way, with its last operand
        # What is read next: a word of ``a`` or of ``b``, of the accumulators (``sums``), or both.
        self._requests = StreamRegisters(
            data.StructLayout(
                {
                    "sums": 1,
                    "a": 1,
                    "b": 1,
                    "acc": ACC_ADDRESS_BITS,
                    "addr": ADDRESS_BITS,
                    "place": self._walk.place.shape(),
                    "group": self._walk.group.shape(),
                }
            )
        )
        self._request = self._requests.output.payload
        self._reads = Signal()  # it has a word of the scratchpad
        self._taken = Signal()  # that word is read
        # The word of ``a`` or ``b`` that was read two cycles ago.
        self._a_comes = Signal()
        self._b_comes = Signal()
        self._operand = Signal(8 * lanes, reset_less=True)

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.walk = self._walk
        m.submodules.parameters = self._parameters
        m.submodules.requantise = self._requantise
        m.submodules.combine = self._combine
        m.submodules.table = self._table
        m.submodules.requests = self._requests
        m.submodules.issued = self._issued
        m.submodules.results = self._results
        m.submodules.addends = self._addends
        self._accept_command(m)
        self._read_ahead(m)
        self._start_group(m)
        self._issue_word(m)
        self._request_operand(m)
        self._share_read_port(m)
        self._receive_operand(m)
        self._requantise_sums(m)
        self._combine_operands(m)
        self._queue_result(m)
        self._write_result(m)
        return m

    def _accept_command(self, m: Module) -> None:
        offered, cmd, walk = self.command.cmd, self._cmd, self._walk
        head = offered.p
        overlaps = Signal()  # the command may be followed before its words are written
        head_overlaps = post_overlaps(head.source, head.op, head.lut)
        m.d.comb += [
            offered.ready.eq(~self._active & (~self._issued.r_rdy | (overlaps & head_overlaps))),
            self._accept.eq(offered.valid & offered.ready),
            walk.head.eq(head),
            walk.cmd.eq(cmd),
            walk.accept.eq(self._accept),
            walk.step.eq(self._issue),
        ]
        with m.If(self._accept):
            m.d.sync += [
                cmd.eq(head),
                overlaps.eq(head_overlaps),
                self._keeps_b.eq(
                    (head.source == PostSource.SCRATCHPAD)
                    & (head.op != PostOp.NONE)
                    & post_keeps_operand(head.b_step, head.b_pitch)
                ),
            ]

    def _read_ahead(self, m: Module) -> None:
        """Read parameters and table before they are needed."""
        offered, table, parameters = self.command.cmd, self._table, self._parameters
        head = offered.p
        table_ahead = Signal()  # the reading for the offered command has begun
        lookups_to_come = self._cmd.lut & (self._active | self._issued.r_rdy)
        m.d.comb += [
            parameters.offered.eq(offered.valid & (head.source == PostSource.ACCUMULATOR)),
            parameters.first.eq(head.params),
            parameters.accept.eq(self._accept),
            parameters.take.eq(self._start & ~self._from_scratchpad),
            parameters.last_group.eq(self._walk.last_group),
            table.load.eq(offered.valid & head.lut & ~table_ahead & ~lookups_to_come),
            table.table.eq(head.table),
        ]
        with m.If(self._accept):
            m.d.sync += table_ahead.eq(0)
        with m.Elif(table.load):
            m.d.sync += table_ahead.eq(1)

    def _start_group(self, m: Module) -> None:
        """Start a group when the command, its parameters and its table are there, and issue its
        words while there is room for the results. It loads its parameters in the next cycle, in
        which no word of the group before may be left to be read."""
        walk = self._walk
        streaming = Signal()  # the current group has started
        read = ~self._requests.waiting & ~self._reads  # all words of the group before
        prepared = self._parameters.ready & ~self._requantise.loading & read
        m.d.comb += [
            self._start.eq(
                self._active
                & ~streaming
                & (self._from_scratchpad | prepared)
                & (~self._cmd.lut | self._table.loaded)
            ),
            self._going.eq(
                (self._start | streaming) & self._requests.input.ready & self._issued.w_rdy
            ),
        ]
        with m.If(self._start):
            m.d.sync += streaming.eq(1)
        with m.If(self._issue & walk.group_ends):
            m.d.sync += streaming.eq(0)
        with m.If(self._issue & walk.command_ends):
            m.d.sync += self._active.eq(0)
        with m.If(self._accept):
            m.d.sync += self._active.eq(1)

    def _issue_word(self, m: Module) -> None:
        """Ask for the current word's operands; it is issued with the last of them."""
        walk, keeps_b, asked = self._walk, self._keeps_b, self._requests.input
        second = Signal()  # ``a`` has been asked for, ``b`` not yet
        held = Signal()  # the one ``b`` has been asked for in this group
        a_next, b_next, more = Signal(), Signal(), Signal()
        pair = self._from_scratchpad & self._combines & ~keeps_b
        m.d.comb += [
            a_next.eq(self._from_scratchpad & Mux(keeps_b, held, ~second)),
            b_next.eq(self._combines & ~a_next),
            more.eq(Mux(keeps_b, b_next, pair & a_next)),
            asked.valid.eq(self._going),
            asked.payload.sums.eq(self._issue & ~self._from_scratchpad),
            asked.payload.a.eq(a_next),
            asked.payload.b.eq(b_next),
            asked.payload.acc.eq(walk.acc),
            asked.payload.addr.eq(Mux(a_next, walk.a_word, walk.b_word)),
            asked.payload.place.eq(walk.place),
            asked.payload.group.eq(walk.group),
            self._issue.eq(self._going & ~more),
            self._issued.w_en.eq(self._issue),
            self._issued.w_data.eq(Cat(walk.out_word, walk.place, walk.command_ends)),
        ]
        with m.If(pair & self._going):
            m.d.sync += second.eq(~second)
        with m.If(keeps_b & self._going):
            m.d.sync += held.eq(~(self._issue & walk.group_ends))

    def _request_operand(self, m: Module) -> None:
        """Read what is requested: the accumulators together with the scratchpad's word, if there is
        one."""
        requested, request, sums = self._requests.output, self._request, self.accumulators
        m.d.comb += [
            self._reads.eq(requested.valid & (request.a | request.b)),
            self._taken.eq(
                self._reads
                & ~self._parameters.read.valid
                & ~self._table.read.valid
                & self.scratchpad_read.ready
            ),
            requested.ready.eq(self._taken | ~(request.a | request.b)),
            sums.en.eq(requested.valid & request.sums & requested.ready),
            sums.addr.eq(request.acc),
        ]

    def _share_read_port(self, m: Module) -> None:
        """The scratchpad's read port: parameters go first, then the table, then operands."""
        read = self.scratchpad_read
        parameters, table = self._parameters.read, self._table.read
        m.d.comb += [
            parameters.ready.eq(read.ready),
            parameters.data.eq(read.data),
            table.ready.eq(read.ready & ~parameters.valid),
            table.data.eq(read.data),
            read.valid.eq(parameters.valid | table.valid | self._reads),
            read.addr.eq(self._request.addr),
        ]
        with m.If(parameters.valid):
            m.d.comb += read.addr.eq(parameters.addr)
        with m.Elif(table.valid):
            m.d.comb += read.addr.eq(table.addr)

    def _receive_operand(self, m: Module) -> None:
        """The operand read in the cycle before: its group of lanes, into a register."""
        request, word, lanes = self._request, self.scratchpad_read.data, self.config.lanes
        a_read, b_read = Signal(), Signal()
        m.d.sync += [
            a_read.eq(self._taken & request.a),
            b_read.eq(self._taken & request.b),
            self._a_comes.eq(a_read),
            self._b_comes.eq(b_read),
        ]
        operand: Value = word
        if self.config.word_groups > 1:
            read_place = Signal.like(request.place)
            with m.If(self._taken):
                m.d.sync += read_place.eq(request.place)
            operand = word.word_select(read_place, 8 * lanes)
        with m.If(a_read | b_read):
            m.d.sync += self._operand.eq(operand)

    def _requantise_sums(self, m: Module) -> None:
        """The accumulators read in the cycle before: their group of lanes, requantised."""
        requantise, cmd, sums = self._requantise, self._cmd, self.accumulators
        lanes, arrive, load = self.config.lanes, Signal(), Signal()
        # A group starts when the last word of the one before is read: the load is as late as that.
        m.d.sync += [arrive.eq(sums.en), load.eq(self._start & ~self._from_scratchpad)]
        if self.config.groups == 1:
            m.d.comb += requantise.acc.eq(sums.data)
        else:
            read_group = Signal.like(self._request.group)
            with m.If(sums.en):
                m.d.sync += read_group.eq(self._request.group)
            m.d.comb += requantise.acc.eq(sums.data.word_select(read_group, 32 * lanes))
        m.d.comb += [
            requantise.en.eq(1),
            requantise.i_valid.eq(arrive),
            requantise.load.eq(load),
            requantise.params.eq(self._parameters.params[: 8 * PARAM_BYTES * lanes]),
            requantise.zero.eq(cmd.zero),
            requantise.low.eq(cmd.low),
            requantise.high.eq(cmd.high),
        ]

    def _combine_operands(self, m: Module) -> None:
        """Bring ``a`` and ``b`` together: ``b`` waits for the requantisation, or ``a`` for its
        ``b``, or the one ``b`` for all ``a``."""
        combine, addends, head = self._combine, self._addends, self.command.cmd.p
        sums, sums_valid = self._requantise.o, self._requantise.o_valid
        from_scratchpad, keeps_b = self._from_scratchpad, self._keeps_b
        operand, waiting = self._operand, Signal(8 * self.config.lanes, reset_less=True)
        with m.If(Mux(keeps_b, self._b_comes, self._a_comes)):
            m.d.sync += waiting.eq(operand)
        complete = Mux(keeps_b, self._a_comes, self._b_comes)
        m.d.comb += [
            addends.w_en.eq(self._b_comes & ~from_scratchpad),
            addends.w_data.eq(operand),
            addends.r_en.eq(sums_valid & self._combines),
            combine.setup.eq(self._accept),
            combine.shift.eq(head.shift),
            combine.cmd.eq(self._cmd),
            combine.i_valid.eq(self._combines & Mux(from_scratchpad, complete, sums_valid)),
            combine.a.eq(Mux(from_scratchpad, Mux(keeps_b, operand, waiting), sums)),
            combine.b.eq(Mux(from_scratchpad, Mux(keeps_b, waiting, operand), addends.r_data)),
        ]

    def _queue_result(self, m: Module) -> None:
        """Choose the command's result, look it up if it has a table, and queue it."""
        table, results, lut = self._table, self._results, self._cmd.lut
        result, result_comes = Signal(8 * self.config.lanes), Signal()
        with m.If(self._combines):
            m.d.comb += [result_comes.eq(self._combine.o_valid), result.eq(self._combine.o)]
        with m.Elif(self._from_scratchpad):
            m.d.comb += [result_comes.eq(self._a_comes), result.eq(self._operand)]
        with m.Else():
            m.d.comb += [
                result_comes.eq(self._requantise.o_valid),
                result.eq(self._requantise.o),
            ]
        m.d.comb += [
            table.i_valid.eq(result_comes & lut),
            table.i.eq(result),
            results.w_en.eq(Mux(lut, table.o_valid, result_comes)),
            results.w_data.eq(Mux(lut, table.o, result)),
        ]

    def _write_result(self, m: Module) -> None:
        read, write, groups = self.scratchpad_read, self.scratchpad_write, self.config.word_groups
        target = data.View(self._target, self._issued.r_data)
        written = write.valid & write.ready
        # The arbiter answers late in the cycle, and the shell has much to do at a command's end.
        m.d.sync += self.command.retire.eq(written & target.last)
        m.d.comb += [
            write.valid.eq(self._results.r_rdy),
            write.addr.eq(target.addr),
            write.data.eq(self._results.r_data.replicate(groups)),
            write.mask.eq(mask_of(target.place, groups, self.config)),
            self._results.r_en.eq(write.ready),
            self._issued.r_en.eq(written),
            self.command.stalled.eq((write.valid & ~write.ready) | (read.valid & ~read.ready)),
        ]
