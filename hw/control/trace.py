"""The trace unit: writes the engines' START and END events to DRAM."""

from __future__ import annotations

from amaranth.hdl import Array, Cat, Const, Module, Mux, Signal
from amaranth.lib import data, wiring
from amaranth.lib.fifo import SyncFIFOBuffered
from amaranth.lib.wiring import In, Out

from systole.hw.bus.interfaces import (
    INDEX_BITS,
    MemoryWrite,
    MemoryWriteInterface,
    layout_of,
    record,
)
from systole.hw.control.fetch import FAULT_REPORT
from systole.hw.control.shell import END_EVENT, START_EVENT
from systole.isa import TRACE_EVENT, Config, Engine, Fault, TraceKind
from systole.isa.csr import NO_ENGINE
from systole.isa.trace import TRACE_EVENT_BYTES

EVENT = layout_of(TRACE_EVENT)
SNAPSHOTS = 8
"""Cycles with events that may wait to be put into the queue one by one."""
QUEUE = 64
"""Events that may wait for the bus."""
GROUP = 8
"""Events written with one request: few, long writes load the bus least."""


class Trace(wiring.Component):
    """Writes events to the ``limit`` events at byte ``address`` of the DRAM window.

    All events of a cycle in which ``enable`` is set are captured together, then queued one a cycle:
    END before START, within these by engine; so the order in memory is that of the cycles. What
    finds no room in the queue or in the buffer is lost and counted in ``dropped``; ``count`` are
    those whose write is complete. Events are written in groups of 8, and with ``flush`` set,
    whatever is there. ``idle``: nothing is left to write. ``start`` zeroes counts and goes back to
    the buffer's start; ``cycle`` is the time of the events. A failed write pulses ``fault`` with
    index ``last_index`` (the last command fetched) and stops writing until reset.
    """

    start: Signal
    enable: Signal
    flush: Signal
    address: Signal
    limit: Signal
    cycle: Signal
    last_index: Signal
    starts: list[data.View]
    ends: list[data.View]
    memory: MemoryWriteInterface
    idle: Signal
    count: Signal
    dropped: Signal
    fault: data.View

    def __init__(self, config: Config):
        self.config = config
        super().__init__(
            {
                "start": In(1),
                "enable": In(1),
                "flush": In(1),
                "address": In(32),
                "limit": In(32),
                "cycle": In(EVENT["cycle"].shape),
                "last_index": In(INDEX_BITS),
                "starts": In(START_EVENT).array(len(Engine)),
                "ends": In(END_EVENT).array(len(Engine)),
                "memory": Out(MemoryWrite(config)),
                "idle": Out(1),
                "count": Out(32),
                "dropped": Out(32),
                "fault": Out(FAULT_REPORT),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        engines = range(len(Engine))

        # Capture: one entry for a cycle with events.
        sources = data.StructLayout(
            {
                "cycle": self.cycle.shape(),
                "ends": data.ArrayLayout(END_EVENT, len(Engine)),
                "starts": data.ArrayLayout(START_EVENT, len(Engine)),
            }
        )
        m.submodules.captured = captured = SyncFIFOBuffered(width=sources.size, depth=SNAPSHOTS)
        happened = Signal(2 * len(Engine))
        lost_capture = Signal.like(happened)  # events for which there was no room
        m.d.comb += [
            happened.eq(Cat(e.valid for e in [*self.ends, *self.starts])),
            captured.w_data.eq(Cat(self.cycle, *self.ends, *self.starts)),
            captured.w_en.eq(self.enable & happened.any()),
        ]
        refused = self.enable & ~captured.w_rdy
        m.d.sync += lost_capture.eq(Mux(refused, happened, 0))

        # One event a cycle into the queue. ``handled`` are those of the captured cycle already
        # there.
        snapshot = data.View(sources, captured.r_data)
        pending = Signal.like(happened)
        handled = Signal.like(happened)
        now = Signal.like(happened)
        event = record(EVENT)
        with m.If(captured.r_rdy):
            m.d.comb += pending.eq(
                Cat(
                    *(snapshot.ends[i].valid for i in engines),
                    *(snapshot.starts[i].valid for i in engines),
                )
                & ~handled
            )
        m.d.comb += [
            now.eq(pending & (~pending + 1)),
            event.cycle.eq(snapshot.cycle),
        ]
        with m.If(captured.r_rdy):
            for i in engines:
                with m.If(now[i]):
                    m.d.comb += [
                        event.kind.eq(TraceKind.END),
                        event.engine.eq(i),
                        event.index.eq(snapshot.ends[i].index),
                        event.stalled.eq(snapshot.ends[i].stalled),
                    ]
                with m.If(now[len(Engine) + i]):
                    m.d.comb += [
                        event.kind.eq(TraceKind.START),
                        event.engine.eq(i),
                        event.index.eq(snapshot.starts[i].index),
                        event.waited.eq(snapshot.starts[i].waited),
                        event.missing.eq(snapshot.starts[i].missing),
                    ]
        m.submodules.queue = queue = SyncFIFOBuffered(width=EVENT.size, depth=QUEUE)
        places = Signal(32)  # Events that the trace buffer still has room for.
        room = Signal()  # It is not 0.
        lost_buffer = Signal()  # the event chosen found no room in the buffer
        # The event chosen in a cycle before.
        chosen, is_chosen = record(EVENT, reset_less=True), Signal()
        moved = Signal()
        m.d.comb += [
            queue.w_data.eq(chosen),
            queue.w_en.eq(is_chosen & room),
            moved.eq(captured.r_rdy & (~is_chosen | queue.w_rdy | ~room)),
            captured.r_en.eq(moved & (pending == now)),
        ]
        with m.If(moved):
            m.d.sync += [
                handled.eq(Mux(captured.r_en, 0, handled | now)),
                chosen.eq(event),
                is_chosen.eq(1),
            ]
        with m.Elif(queue.w_rdy | ~room):
            m.d.sync += is_chosen.eq(0)
        with m.If(queue.w_en & queue.w_rdy):
            m.d.sync += [places.eq(places - 1), room.eq(places != 1)]
        # Counted in the cycle after the next.
        lost = Signal(range(2 * len(Engine) + 2))
        m.d.sync += [
            lost_buffer.eq(is_chosen & ~room),
            lost.eq(sum(lost_capture[i] for i in range(len(happened))) + lost_buffer),
        ]
        with m.If(lost != 0):
            m.d.sync += self.dropped.eq(self.dropped + lost)

        writing = self._write(m, queue)
        m.d.comb += self.idle.eq(
            (captured.r_level == 0) & ~is_chosen & (queue.r_level == 0) & ~writing
        )
        with m.If(self.start):
            m.d.sync += [self.count.eq(0), self.dropped.eq(0)]
            m.d.sync += [places.eq(self.limit), room.eq(self.limit != 0)]
        return m

    def _write(self, m: Module, queue: SyncFIFOBuffered) -> Signal:
        """The writing side: requests of up to ``GROUP`` events, one at a time. Returns the signal
        that is high while one is under way."""
        memory = self.memory
        events = Signal(range(GROUP + 1))  # Events of the request.
        left = Signal(range(GROUP + 1))  # Of these, still to be packed into beats.
        offset = Signal(32)
        writing = Signal()
        broken = Signal()

        size = Signal.like(events)
        m.d.comb += size.eq(Mux(queue.r_level < GROUP, queue.r_level, GROUP))
        with m.If(~writing & ~broken & ((size == GROUP) | (self.flush & (size != 0)))):
            m.d.sync += [
                writing.eq(1),
                events.eq(size),
                left.eq(size),
                memory.req.valid.eq(1),
                memory.req.payload.addr.eq(self.address + offset),
                memory.req.payload.bytes.eq(size * TRACE_EVENT_BYTES),
            ]
        with m.If(memory.req.valid & memory.req.ready):
            m.d.sync += memory.req.valid.eq(0)

        sent = Signal()
        beat = memory.beats
        m.d.comb += sent.eq(beat.valid & beat.ready)
        if self.config.axi_data_bits <= EVENT.size:
            parts = EVENT.size // self.config.axi_data_bits
            part = Signal(range(parts))
            m.d.comb += [
                beat.valid.eq(writing & (left != 0) & queue.r_rdy),
                beat.payload.data.eq(queue.r_data.word_select(part, self.config.axi_data_bits)),
                beat.payload.strobe.eq(~Const(0, len(beat.payload.strobe))),
                queue.r_en.eq(sent & (part == parts - 1)),
            ]
            with m.If(sent):
                m.d.sync += part.eq(Mux(part == parts - 1, 0, part + 1))
            with m.If(queue.r_en):
                m.d.sync += left.eq(left - 1)
        else:
            # Groups start at multiples of the beat, so only a request's last beat may be partial.
            slots = self.config.axi_data_bits // EVENT.size
            place = Array(beat.payload.data.word_select(i, EVENT.size) for i in range(slots))
            strobe = Array(
                beat.payload.strobe.word_select(i, TRACE_EVENT_BYTES) for i in range(slots)
            )
            slot = Signal(range(slots))
            m.d.comb += queue.r_en.eq(writing & (left != 0) & ~beat.valid)
            with m.If(sent):
                m.d.sync += [beat.valid.eq(0), beat.payload.strobe.eq(0)]
            with m.If(queue.r_en & queue.r_rdy):
                m.d.sync += [
                    place[slot].eq(queue.r_data),
                    strobe[slot].eq(~Const(0, TRACE_EVENT_BYTES)),
                    left.eq(left - 1),
                    slot.eq(slot + 1),
                ]
                with m.If((left == 1) | (slot == slots - 1)):
                    m.d.sync += [beat.valid.eq(1), slot.eq(0)]

        m.d.comb += [
            self.fault.engine.eq(NO_ENGINE),
            self.fault.index.eq(self.last_index),
            self.fault.address.eq(memory.req.payload.addr),
            self.fault.code.eq(Mux(memory.denied, Fault.DRAM_WINDOW, Fault.AXI_WRITE)),
            self.fault.valid.eq(memory.denied | (memory.done & memory.error)),
        ]
        with m.If(memory.done & ~memory.error):
            m.d.sync += [
                writing.eq(0),
                offset.eq(offset + events * TRACE_EVENT_BYTES),
                self.count.eq(self.count + events),
            ]
        with m.If(self.fault.valid):
            m.d.sync += [writing.eq(0), broken.eq(1), left.eq(0)]
        with m.If(self.start):
            m.d.sync += offset.eq(0)
        return writing
