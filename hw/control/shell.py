"""The shell around an engine's core: its queue, tokens, events and counters."""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.fifo import SyncFIFO, SyncFIFOBuffered
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from systole.hw.bus.interfaces import INDEX_BITS, CommandPort, command_layout
from systole.hw.control.fetch import FAULT_REPORT
from systole.isa import TRACE_EVENT, Config, Engine, Fault, Opcode
from systole.isa.csr import TOKEN_BITS, EngineState

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


class Shell(wiring.Component):
    """Queue, token counters, event source and performance counters of one engine.

    * ``push`` takes commands into the queue of ``queue_depth``; the oldest waits at its head.
    * ``core`` gets the head as soon as every token it waits for is there; the tokens are taken in
      the cycle in which the core accepts. A token given in one cycle lets the command start in the
      next.
    * ``given[f]``: engine ``f`` gives this engine a token. ``overflow[f]``: there is no room
      for it. ``give[t]``: this engine gives engine ``t`` one; ``overflows[t]`` is that engine's
      ``overflow``.
    * ``start_event`` and ``end_event`` pulse ``valid`` as commands are accepted and end.
    * ``counter`` is counter ``counter_select`` (see COUNTERS), in the same cycle. In every cycle of
      ``running`` at most one of them counts.
    * ``clear`` (the start of a program, nothing queued or in flight) zeroes tokens at once and
      counters over the next 8 cycles, in which no command may be pushed.
    * ``halt`` keeps commands not yet offered to the core from being offered.
    * ``idle``: nothing queued, nothing in flight. ``state``: the engine's STATE register.
    """

    def __init__(self, config: Config, engine: Engine, opcode: Opcode):
        self.config = config
        self.engine = engine
        self.opcode = opcode
        entry = data.StructLayout({"index": INDEX_BITS, "command": command_layout(opcode)})
        super().__init__(
            {
                "push": In(stream.Signature(entry)),
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

    def elaborate(self, platform: object) -> Module:
        m = Module()
        core = self.core

        m.submodules.queue = queue = SyncFIFOBuffered(
            width=self.push.payload.shape().size, depth=self.config.queue_depth
        )
        head = data.View(self.push.payload.shape(), queue.r_data)
        m.d.comb += [
            queue.w_data.eq(self.push.payload),
            queue.w_en.eq(self.push.valid),
            self.push.ready.eq(queue.w_rdy),
        ]

        flight_entry = data.StructLayout({"index": INDEX_BITS, "signal": ENGINES})
        m.submodules.flight = flight = SyncFIFO(width=flight_entry.size, depth=IN_FLIGHT)
        oldest = data.View(flight_entry, flight.r_data)

        # Tokens. ``missing`` is 0 when the head may start.
        available = Signal(ENGINES)
        missing = Signal(ENGINES)
        accepted = Signal()
        taken = Signal(ENGINES)
        m.d.comb += [
            missing.eq(Mux(queue.r_rdy, head.command["wait"] & ~available, 0)),
            taken.eq(Mux(accepted, head.command["wait"], 0)),
        ]
        counts = [Signal(TOKEN_BITS, name=f"tokens_{e.name.lower()}") for e in Engine]
        m.d.comb += available.eq(Cat(tokens != 0 for tokens in counts))
        with m.If(self.given.any()):
            full = Cat(tokens.all() for tokens in counts)
            m.d.comb += self.overflow.eq(self.given & full & ~taken)
        with m.If(self.clear | accepted | self.given.any()):
            up = self.given & ~self.overflow
            for i, tokens in enumerate(counts):
                m.d.sync += tokens.eq(Mux(self.clear, 0, tokens + up[i] - taken[i]))

        # To the core. An offer once made stands, whatever ``halt`` says.
        offered = Signal()
        m.d.comb += [
            core.cmd.payload.eq(head.command),
            core.cmd.valid.eq(queue.r_rdy & ~missing.any() & flight.w_rdy & (~self.halt | offered)),
            accepted.eq(core.cmd.valid & core.cmd.ready),
            queue.r_en.eq(accepted),
            flight.w_en.eq(accepted),
            flight.w_data.eq(Cat(head.index, head.command["signal"][:ENGINES])),
            flight.r_en.eq(core.retire),
        ]
        m.d.sync += offered.eq(core.cmd.valid & ~core.cmd.ready)

        retired = Signal()
        in_flight = flight.r_rdy
        m.d.comb += [
            retired.eq(core.retire & in_flight),
            self.give.eq(Mux(retired, oldest.signal, 0)),
            self.idle.eq((queue.level == 0) & ~in_flight),
        ]

        # Events.
        waited = Signal(START_EVENT["waited"].shape)
        last_missing = Signal(ENGINES)
        with m.If(accepted):
            m.d.sync += [waited.eq(0), last_missing.eq(0)]
        with m.Elif(missing.any()):
            m.d.sync += [waited.eq(waited + ~waited.all()), last_missing.eq(missing)]
        stalled_now = Signal()
        stalled = Signal(END_EVENT["stalled"].shape)
        m.d.comb += stalled_now.eq(core.stalled & in_flight)
        with m.If(retired):
            m.d.sync += stalled.eq(stalled_now)
        with m.Elif(stalled_now):
            m.d.sync += stalled.eq(stalled + ~stalled.all())
        with m.If(self.clear):
            m.d.sync += stalled.eq(0)
        m.d.comb += [
            self.start_event.valid.eq(accepted),
            self.end_event.valid.eq(retired),
        ]
        with m.If(accepted):
            m.d.comb += [
                self.start_event.index.eq(head.index),
                self.start_event.waited.eq(waited),
                self.start_event.missing.eq(last_missing),
            ]
        with m.If(retired):
            m.d.comb += [
                self.end_event.index.eq(oldest.index),
                self.end_event.stalled.eq(stalled),
            ]

        # Counters: one memory with one increment a cycle.
        m.submodules.counters = counters = Memory(shape=32, depth=COUNTERS, init=[])
        write = counters.write_port()
        current = counters.read_port(domain="comb")
        csr = counters.read_port(domain="comb")
        counting = Signal()
        counted = Signal(range(COUNTERS))
        with m.If(in_flight):
            m.d.comb += [counting.eq(self.running), counted.eq(stalled_now)]
        with m.Elif(missing.any()):
            m.d.comb += counting.eq(self.running)
            for i in reversed(range(ENGINES)):
                with m.If(missing[i]):
                    m.d.comb += counted.eq(2 + i)
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

        state = Signal(EngineState)
        with m.If(missing.any()):
            m.d.comb += state.eq(EngineState.WAITING)
        with m.Elif(in_flight | queue.r_rdy):
            m.d.comb += state.eq(EngineState.BUSY)
        m.d.comb += [
            self.state[0:2].eq(state),
            self.state[8:16].eq(missing),
            self.state[16:32].eq(Mux(queue.r_rdy, head.index, 0)),
        ]

        lost = Signal(ENGINES)
        with m.If(retired):
            m.d.comb += lost.eq(oldest.signal & self.overflows)
        m.d.comb += [
            self.fault.index.eq(oldest.index),
            self.fault.engine.eq(self.engine),
        ]
        with m.If(core.fault):
            m.d.comb += [
                self.fault.valid.eq(1),
                self.fault.code.eq(core.fault_code),
                self.fault.address.eq(core.fault_address),
            ]
        with m.Elif(lost.any()):
            m.d.comb += [self.fault.valid.eq(1), self.fault.code.eq(Fault.TOKEN_OVERFLOW)]
        return m
