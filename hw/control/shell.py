"""The shell around an engine's core: its queue, tokens, events and counters."""

from __future__ import annotations

from amaranth.hdl import C, Cat, Module, Mux, Signal, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.fifo import SyncFIFO, SyncFIFOBuffered
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from systole.hw.bus.interfaces import (
    INDEX_BITS,
    CommandInterface,
    CommandPort,
    command_layout,
    layout_of,
    record,
)
from systole.hw.control.fetch import FAULT_REPORT, PLACE_BITS, WORD_BITS
from systole.isa import COMMANDS, TRACE_EVENT, Config, Engine, Fault, Opcode
from systole.isa.csr import ENGINE_STATE, TOKEN_BITS, EngineState
from systole.isa.limits import field_limits

ENGINES = len(Engine)
IN_FLIGHT = 8
"""Commands a core may hold; a shell hands it no more."""
COUNTERS = 2 + ENGINES
"""Counters of an engine in the order of its CSRs: BUSY, MEMORY, WAIT of each engine."""

_EVENT_BITS = {f.name: f.bits for f in TRACE_EVENT}
START_EVENT = data.StructLayout(
    {"valid": 1} | {name: _EVENT_BITS[name] for name in ("index", "waited", "missing")}
)
"""A command was accepted: what its START event says about it."""
END_EVENT = data.StructLayout(
    {"valid": 1} | {name: _EVENT_BITS[name] for name in ("index", "stalled")}
)
"""A command ended: what its END event says about it."""


def _below(value: Value, number: int) -> Value:
    """``value < number`` of an unsigned value. For powers of two it is no subtraction, of which
    tools would make a carry chain."""
    if number.bit_count() == 1:
        return ~value[number.bit_length() - 1 :].any()
    return value < number


class Shell(wiring.Component):
    """Queue, token counters, event source and performance counters of one engine.

    * ``push`` takes commands, by their indices, into the queue of ``queue_depth``; the oldest waits
      at its head. The words of a command that are not as the command before had them come before
      it, with ``write``, ``place`` and ``word``; the first word, at place 0, comes last, with
      ``push``. They wait in a memory and are unpacked into the head one a cycle. A command with a
      field that breaks a limit stays in the head: it is a fault, which is reported once all before
      it have ended and its tokens are there, and stands until the reset.
    * ``core`` gets the head as soon as every token it waits for is there; the tokens are taken in
      the cycle in which the core accepts. A token given in one cycle lets the command start in the
      next.
    * ``given[f]``: engine ``f`` gives this engine a token. ``overflow[f]``: there is no room
      for it. ``give[t]``: this engine gives engine ``t`` one; ``overflows[t]`` is that engine's
      ``overflow``.
    * ``start_event`` and ``end_event`` pulse ``valid`` as commands are accepted and end.
    * ``counter`` is counter ``counter_select`` (see COUNTERS), in the same cycle. In every cycle of
      ``running`` at most one of them counts. Without counters it is 0.
    * ``clear`` (the start of a program, nothing queued or in flight) zeroes tokens at once and
      counters over the next 8 cycles, in which no command may be pushed.
    * ``halt`` keeps commands not yet offered to the core from being offered.
    * ``idle``: nothing queued, nothing in flight. ``state``: the engine's STATE register.
    """

    push: stream.Interface
    write: Signal
    place: Signal
    word: Signal
    core: CommandInterface
    clear: Signal
    running: Signal
    halt: Signal
    given: Signal
    overflow: Signal
    give: Signal
    overflows: Signal
    start_event: data.View
    end_event: data.View
    idle: Signal
    state: Signal
    counter_select: Signal
    counter: Signal
    fault: data.View

    def __init__(self, config: Config, engine: Engine, opcode: Opcode):
        self.config = config
        self.engine = engine
        self.opcode = opcode
        super().__init__(
            {
                "push": In(stream.Signature(INDEX_BITS)),
                "write": In(1),
                "place": In(PLACE_BITS),
                "word": In(WORD_BITS),
                "core": Out(CommandPort(opcode)),
                "clear": In(1),
                "running": In(1),
                "halt": In(1),
                "given": In(ENGINES),
                "overflow": Out(ENGINES),
                "give": Out(ENGINES),
                "overflows": In(ENGINES),
                "start_event": Out(START_EVENT),
                "end_event": Out(END_EVENT),
                "idle": Out(1),
                "state": Out(32),
                "counter_select": In(range(COUNTERS)),
                "counter": Out(32),
                "fault": Out(FAULT_REPORT),
            }
        )
        # Indices of the commands in the queue, and their words, with room for one more command.
        self._queue = SyncFIFO(width=INDEX_BITS, depth=config.queue_depth)
        self._words = SyncFIFOBuffered(
            width=PLACE_BITS + WORD_BITS,
            depth=(config.queue_depth + 1) * COMMANDS[opcode].words,
        )
        self._head = record(command_layout(opcode), reset_less=True)
        self._whole = Signal()  # the command in the head is complete
        self._legal = Signal()  # and within all limits
        flight_entry = data.StructLayout({"index": INDEX_BITS, "signal": ENGINES})
        self._flight = SyncFIFO(width=flight_entry.size, depth=IN_FLIGHT)
        self._oldest = data.View(flight_entry, self._flight.r_data)
        self._accepted = Signal()
        self._retired = Signal()
        self._missing = Signal(ENGINES)  # tokens that the head waits for; 0 when it may start
        self._stalled_before = Signal()  # memory held up a command in the cycle before

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.queue = self._queue
        m.submodules.words = self._words
        m.submodules.flight = self._flight
        m.d.comb += [
            self._queue.w_data.eq(self.push.payload),
            self._queue.w_en.eq(self.push.valid),
            self.push.ready.eq(self._queue.w_rdy),
            self._words.w_data.eq(Cat(self.word, self.place)),
            self._words.w_en.eq(self.write),
        ]
        self._unpack(m)
        self._count_tokens(m)
        self._offer_head(m)
        self._retire_oldest(m)
        self._report_start(m)
        self._report_end(m)
        if self.config.counters:
            self._count_cycles(m)
        self._show_state(m)
        self._report_fault(m)
        return m

    def _unpack(self, m: Module) -> None:
        """Put the words of the next command into the head; it keeps those that do not come."""
        words, head = self._words, Value.cast(self._head)
        word, place = words.r_data[:WORD_BITS], words.r_data[WORD_BITS:]
        # The memory's word comes late in the cycle: a broken limit is seen in the next.
        broken = Signal(4)
        m.d.comb += [
            words.r_en.eq(~self._whole | self._accepted),
            self._legal.eq(self._whole & ~broken.any()),
        ]
        with m.If(self._accepted):
            m.d.sync += self._whole.eq(0)
        with m.If(words.r_rdy & words.r_en):
            # With the first word, the command is what is in the head behind it.
            limits = self._broken_limits(Cat(word, head[WORD_BITS:]))
            m.d.sync += [
                self._whole.eq(place == 0),
                broken.eq(Cat(Cat(limits[i::4]).any() for i in range(4))),
            ]
            for i in range(COMMANDS[self.opcode].words):
                part = head[WORD_BITS * i : WORD_BITS * (i + 1)]
                with m.If(place == i):
                    m.d.sync += part.eq(word)

    def _broken_limits(self, command: Value) -> list[Value]:
        """Whether a field of the command, whose bits these are, breaks each of the limits."""
        fields = data.View(command_layout(self.opcode), command)
        broken: list[Value] = []
        for limit in field_limits(self.opcode, self.config):
            value, field = Value.cast(fields[limit.field.name]), limit.field
            breaks = [_below(value, limit.least)] if limit.least > field.low else []
            breaks += [~_below(value, limit.most + 1)] if limit.most < field.high else []
            breaks += [value % limit.multiple != 0] if limit.multiple > 1 else []
            counts: Value = C(1)
            if limit.selector:
                chosen = Value.cast(fields[limit.selector])
                counts = Cat(chosen == v for v in limit.selected).any()
            broken.append(Cat(breaks).any() & counts)
        return broken

    def _count_tokens(self, m: Module) -> None:
        """A counter for the tokens of each engine."""
        available, taken = Signal(ENGINES), Signal(ENGINES)  # available: the count is not 0
        wait = self._head["wait"]
        m.d.comb += [
            self._missing.eq(Mux(self._whole, wait & ~available, 0)),
            taken.eq(Mux(self._accepted, wait, 0)),
        ]
        for i, engine in enumerate(Engine):
            tokens = Signal(TOKEN_BITS, name=f"tokens_{engine.name.lower()}")
            given, left = self.given[i], Mux(taken[i], tokens[1:].any(), available[i])
            m.d.comb += self.overflow[i].eq(given & tokens.all() & ~taken[i])
            m.d.sync += available[i].eq(~self.clear & (given | left))
            with m.If(self.clear):
                m.d.sync += tokens.eq(0)
            with m.Elif((given ^ taken[i]) & ~self.overflow[i]):
                # One more or one less, by one adder: less one is all ones.
                step = Cat(C(1, 1), taken[i].replicate(TOKEN_BITS - 1))
                m.d.sync += tokens.eq(tokens + step)

    def _offer_head(self, m: Module) -> None:
        """Hand the head to the core. An offer once made stands, whatever ``halt`` says."""
        cmd, queue, flight, head = self.core.cmd, self._queue, self._flight, self._head
        offered = Signal()
        may_start = self._legal & ~self._missing.any() & flight.w_rdy
        m.d.comb += [
            cmd.payload.eq(head),
            cmd.valid.eq(may_start & (~self.halt | offered)),
            self._accepted.eq(cmd.valid & cmd.ready),
            queue.r_en.eq(self._accepted),
            flight.w_en.eq(self._accepted),
            flight.w_data.eq(Cat(queue.r_data, head["signal"][:ENGINES])),
        ]
        m.d.sync += offered.eq(cmd.valid & ~cmd.ready)

    def _retire_oldest(self, m: Module) -> None:
        """Give the tokens of the command that ends."""
        in_flight = self._flight.r_rdy
        m.d.comb += [
            self._flight.r_en.eq(self.core.retire),
            self._retired.eq(self.core.retire & in_flight),
            self.give.eq(Mux(self._retired, self._oldest.signal, 0)),
            self.idle.eq((self._queue.r_level == 0) & ~in_flight),
        ]

    def _report_start(self, m: Module) -> None:
        event, missing = self.start_event, self._missing
        waited = Signal.like(event.waited)
        last_missing = Signal(ENGINES)
        with m.If(self._accepted):
            m.d.sync += [waited.eq(0), last_missing.eq(0)]
        with m.Elif(missing.any()):
            m.d.sync += [waited.eq(waited + ~waited.all()), last_missing.eq(missing)]
        m.d.comb += [
            event.valid.eq(self._accepted),
            event.index.eq(self._queue.r_data),
            event.waited.eq(waited),
            event.missing.eq(last_missing),
        ]

    def _report_end(self, m: Module) -> None:
        event = self.end_event
        stalled = Signal.like(event.stalled)
        # A core's ``stalled`` comes late in the cycle: it is counted in the next.
        total = Signal.like(stalled)
        m.d.sync += self._stalled_before.eq(self.core.stalled & self._flight.r_rdy)
        m.d.comb += total.eq(stalled + (self._stalled_before & ~stalled.all()))
        with m.If(self._retired | self.clear):
            m.d.sync += stalled.eq(0)
        with m.Elif(self._stalled_before):
            m.d.sync += stalled.eq(total)
        m.d.comb += [
            event.valid.eq(self._retired),
            event.index.eq(self._oldest.index),
            event.stalled.eq(total),
        ]

    def _count_cycles(self, m: Module) -> None:
        """The counters: one memory with one increment a cycle."""
        counters: Memory = Memory(shape=32, depth=COUNTERS, init=[])
        m.submodules.counters = counters
        write = counters.write_port()
        current = counters.read_port(domain="comb")
        csr = counters.read_port(domain="comb")
        # What the cycle before was spent with.
        counting, in_flight = Signal(), Signal()
        waits = Signal(range(COUNTERS))
        counted = Signal.like(waits)
        m.d.sync += [
            counting.eq(self.running & (self._flight.r_rdy | self._missing.any())),
            in_flight.eq(self._flight.r_rdy),
        ]
        for i in reversed(range(ENGINES)):
            with m.If(self._missing[i]):
                m.d.sync += waits.eq(2 + i)
        m.d.comb += counted.eq(Mux(in_flight, self._stalled_before, waits))
        clearing = Signal(range(COUNTERS + 1))
        with m.If(self.clear):
            m.d.sync += clearing.eq(COUNTERS)
        with m.Elif(clearing != 0):
            m.d.sync += clearing.eq(clearing - 1)
        m.d.comb += [
            current.addr.eq(counted),
            csr.addr.eq(self.counter_select),
            self.counter.eq(csr.data),
            write.addr.eq(Mux(clearing != 0, clearing - 1, counted)),
            write.data.eq(Mux(clearing != 0, 0, current.data + 1)),
            write.en.eq((clearing != 0) | counting),
        ]

    def _show_state(self, m: Module) -> None:
        """The STATE register."""
        queue = self._queue
        state = Signal(EngineState)
        with m.If(self._missing.any()):
            m.d.comb += state.eq(EngineState.WAITING)
        with m.Elif(self._flight.r_rdy | queue.r_rdy):
            m.d.comb += state.eq(EngineState.BUSY)
        register = data.View(layout_of(ENGINE_STATE), self.state)
        m.d.comb += [
            register.state.eq(state),
            register.missing.eq(self._missing),
            register.head.eq(Mux(queue.r_rdy, queue.r_data, 0)),
        ]

    def _report_fault(self, m: Module) -> None:
        """What is known of the cycle before: the core's fault, that a token given was lost, or that
        the head is illegal and it is its turn, which needs that none is in flight."""
        core, fault, flight = self.core, self.fault, self._flight
        failed, lost, refused = Signal(), Signal(), Signal()
        index = Signal(INDEX_BITS, reset_less=True)  # the command that it is about
        illegal = self._whole & ~self._legal
        m.d.sync += [
            failed.eq(core.fault),
            lost.eq((self.give & self.overflows).any()),
            refused.eq(illegal & ~self._missing.any() & ~flight.r_rdy),
            index.eq(Mux(flight.r_rdy, self._oldest.index, self._queue.r_data)),
        ]
        m.d.comb += [
            fault.engine.eq(self.engine),
            fault.index.eq(index),
            fault.valid.eq(failed | lost | refused),
        ]
        with m.If(failed):
            m.d.comb += [fault.code.eq(core.fault_code), fault.address.eq(core.fault_address)]
        with m.Else():
            m.d.comb += fault.code.eq(Mux(lost, Fault.TOKEN_OVERFLOW, Fault.ILLEGAL_FIELD))
