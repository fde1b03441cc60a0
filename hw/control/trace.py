"""The trace unit: writes the engines' START and END events to DRAM."""

from __future__ import annotations

from amaranth.hdl import Array, Cat, Const, Module, Mux, Shape, Signal, Value
from amaranth.lib import data, wiring
from amaranth.lib.fifo import SyncFIFOBuffered
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from systole.hw.bus.interfaces import (
    INDEX_BITS,
    MemoryWrite,
    MemoryWriteInterface,
    layout_of,
    record,
)
from systole.hw.control.choice import chosen_of
from systole.hw.control.fetch import FAULT_REPORT
from systole.hw.control.shell import END_EVENT, START_EVENT
from systole.isa import TRACE_EVENT, Config, Engine, Fault, TraceKind
from systole.isa.csr import NO_ENGINE
from systole.isa.trace import TRACE_EVENT_BYTES

EVENT = layout_of(TRACE_EVENT)
SNAPSHOTS = 8
"""Cycles with events that may wait to be put into the queue one by one; a power of two."""
QUEUE = 64
"""Events that may wait for the bus."""
GROUP = 8
"""Events written with one request: few, long writes load the bus least."""


class Captured(wiring.Component):
    """A queue of cycles with events, from which the events are taken one by one.

    ``w_data`` (a ``Snapshot``) is taken with ``w_en`` and ``w_rdy`` if it has events, which are
    then those of ``happened``: END of each engine, START of each engine. ``now`` has the bit of
    the oldest event, of ``snapshot``, if there is one (``some``); ``next`` goes on to the one
    behind it.
    """

    w_data: data.View
    w_en: Signal
    w_rdy: Signal
    happened: Signal
    now: Signal
    some: Signal
    next: Signal
    snapshot: data.View
    empty: Signal

    def __init__(self, cycle: Shape):
        kinds = 2 * len(Engine)
        layout = data.StructLayout(
            {
                "cycle": cycle,
                "ends": data.ArrayLayout(END_EVENT, len(Engine)),
                "starts": data.ArrayLayout(START_EVENT, len(Engine)),
            }
        )
        super().__init__(
            {
                "w_data": In(layout),
                "w_en": In(1),
                "w_rdy": Out(1),
                "happened": Out(kinds),
                "now": Out(kinds),
                "some": Out(1),
                "next": In(1),
                "snapshot": Out(layout),
                "empty": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        new, kinds = self.w_data, len(self.happened)
        # Wide, but of a few words: tools would build it of logic, with a register for every bit.
        snapshots: Memory = Memory(
            shape=len(Value.cast(new)), depth=SNAPSHOTS, init=[], attrs={"ram_style": "block"}
        )
        # What has happened, also on its own: the choice does not wait for the memory.
        happenings: Memory = Memory(shape=kinds, depth=SNAPSHOTS, init=[])
        m.submodules.snapshots, m.submodules.happenings = snapshots, happenings
        taken, left, following = Signal(), Signal(), Signal(range(2 * SNAPSHOTS))
        looked = Signal.like(following)
        first, end = Signal.like(following), Signal.like(following)  # where it begins and ends
        # Of the events of the oldest cycle, those behind ``now``, and what they are to be.
        behind, pending = Signal(kinds), Signal(kinds)
        m.d.comb += [
            self.happened.eq(Cat(e.valid for e in [*new.ends, *new.starts])),
            self.w_rdy.eq((end ^ first) != SNAPSHOTS),
            taken.eq(self.w_en & self.w_rdy & self.happened.any()),
            left.eq(self.next & ~behind.any()),
            following.eq(first + left),
            self.empty.eq(first == end),
        ]
        m.d.sync += [first.eq(following), end.eq(end + taken)]
        for memory, written in ((snapshots, new), (happenings, self.happened)):
            write = memory.write_port()
            # Whether anything happens comes late: what did not is written over.
            m.d.comb += write.en.eq(self.w_en & self.w_rdy)
            m.d.comb += [write.addr.eq(end), write.data.eq(written)]
        read, look = snapshots.read_port(), happenings.read_port(domain="comb")
        m.d.comb += [
            read.addr.eq(following),
            # If ``next`` takes the last event of a cycle, or there is none.
            looked.eq(first + self.some),
            look.addr.eq(looked),
            Value.cast(self.snapshot).eq(read.data),
        ]
        with m.If(behind.any()):
            m.d.comb += pending.eq(behind)
        with m.Elif(looked != end):
            m.d.comb += pending.eq(look.data)
        # Not by a subtraction, which would be a chain of carries.
        first_of = Cat(bit & ~pending[:i].any() for i, bit in enumerate(pending))
        with m.If(self.next | ~self.some):
            m.d.sync += [
                self.now.eq(first_of),
                behind.eq(pending & ~first_of),
                self.some.eq(pending.any()),
            ]
        return m


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

        captured = Captured(self.cycle.shape())
        m.submodules.captured = captured
        lost_capture = Signal(len(captured.now))  # events for which there was no room
        m.d.comb += [
            captured.w_data.eq(Cat(self.cycle, *self.ends, *self.starts)),
            captured.w_en.eq(self.enable),
        ]
        m.d.sync += lost_capture.eq(Mux(self.enable & ~captured.w_rdy, captured.happened, 0))

        # One event a cycle into the queue.
        snapshot, now = captured.snapshot, captured.now
        ending, starting = now[: len(Engine)], now[len(Engine) :]
        event = record(EVENT)
        m.d.comb += [
            event.cycle.eq(snapshot.cycle),
            event.kind.eq(Mux(ending.any(), TraceKind.END, TraceKind.START)),
            event.engine.eq(chosen_of(ending | starting, list(Engine))),
            event.index.eq(
                chosen_of(ending, [e.index for e in snapshot.ends])
                | chosen_of(starting, [e.index for e in snapshot.starts])
            ),
            event.stalled.eq(chosen_of(ending, [e.stalled for e in snapshot.ends])),
            event.waited.eq(chosen_of(starting, [e.waited for e in snapshot.starts])),
            event.missing.eq(chosen_of(starting, [e.missing for e in snapshot.starts])),
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
            moved.eq(captured.some & (~is_chosen | queue.w_rdy | ~room)),
            captured.next.eq(moved),
        ]
        with m.If(moved):
            m.d.sync += [chosen.eq(event), is_chosen.eq(1)]
        with m.Elif(queue.w_rdy | ~room):
            m.d.sync += is_chosen.eq(0)
        with m.If(queue.w_en & queue.w_rdy):
            m.d.sync += [places.eq(places - 1), room.eq(places != 1)]
        # Counted in the cycle after the next.
        lost = Signal(range(2 * len(Engine) + 2))
        m.d.sync += [
            lost_buffer.eq(is_chosen & ~room),
            lost.eq(sum(lost_capture[i] for i in range(len(lost_capture))) + lost_buffer),
        ]
        with m.If(lost != 0):
            m.d.sync += self.dropped.eq(self.dropped + lost)

        writing = self._write(m, queue)
        m.d.comb += self.idle.eq(captured.empty & ~is_chosen & (queue.r_level == 0) & ~writing)
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
                memory.req.payload.addr.eq(self.address + self.count * TRACE_EVENT_BYTES),
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
            m.d.sync += [writing.eq(0), self.count.eq(self.count + events)]
        with m.If(self.fault.valid):
            m.d.sync += [writing.eq(0), broken.eq(1), left.eq(0)]
        return writing
