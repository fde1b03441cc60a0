"""Everything between the buses and the engines' cores: fetch, shells, tokens, trace, registers."""

from __future__ import annotations

from amaranth.hdl import Cat, Module, ResetInserter, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out, flipped

from systole.hw.bus.axi import Axi4Lite, Axi4LiteInterface
from systole.hw.bus.interfaces import (
    CommandPort,
    MemoryRead,
    MemoryReadInterface,
    MemoryWrite,
    MemoryWriteInterface,
)
from systole.hw.control.csr import ControlStatus
from systole.hw.control.fetch import OPCODE_OF, Fetch, engines_of
from systole.hw.control.shell import Shell
from systole.hw.control.trace import Trace
from systole.isa import Config, Engine
from systole.isa.csr import CSR_ADDR_BITS


def port_name(engine: Engine) -> str:
    return f"{engine.name.lower()}_command"


class ControlUnit(wiring.Component):
    """The accelerator without its engines' cores, memories and AXI managers.

    Ports ``load_command``, ``wload_command``, ... lead to the cores of the engines that exist;
    ``program`` reads the commands, ``trace`` (if the trace unit exists) writes the events. ``base``
    and ``limit`` are the DRAM window. ``read_beat`` and ``write_beat`` are counted in READ_BEATS
    and WRITE_BEATS. A soft reset holds ``drain`` until ``axi_idle`` and then resets cores and
    managers (and what is in here) with ``reset``.
    """

    s_axil: Axi4LiteInterface
    irq: Signal
    base: Signal
    limit: Signal
    drain: Signal
    reset: Signal
    axi_idle: Signal
    read_beat: Signal
    write_beat: Signal
    program: MemoryReadInterface
    trace: MemoryWriteInterface  # if the trace unit exists

    def __init__(self, config: Config):
        self.config = config
        self.engines = engines_of(config)
        ports = {
            "s_axil": In(Axi4Lite(CSR_ADDR_BITS)),
            "irq": Out(1),
            "base": Out(config.axi_addr_bits),
            "limit": Out(32),
            "drain": Out(1),
            "reset": Out(1),
            "axi_idle": In(1),
            "read_beat": In(1),
            "write_beat": In(1),
            "program": Out(MemoryRead(config)),
        }
        for engine in self.engines:
            ports[port_name(engine)] = Out(CommandPort(OPCODE_OF[engine]))
        if config.trace:
            ports["trace"] = Out(MemoryWrite(config))
        super().__init__(ports)

    def elaborate(self, platform: object) -> Module:
        m = Module()
        reset = Signal()
        m.submodules.csr = csr = ControlStatus(self.config)
        wiring.connect(m, flipped(self.s_axil), csr.bus)
        m.d.comb += [
            self.irq.eq(csr.irq),
            self.base.eq(csr.base),
            self.limit.eq(csr.limit),
            self.drain.eq(csr.drain),
            self.reset.eq(csr.reset),
            reset.eq(csr.reset),
            csr.axi_idle.eq(self.axi_idle),
            csr.read_beat.eq(self.read_beat),
            csr.write_beat.eq(self.write_beat),
        ]

        fetch = Fetch(self.config)
        m.submodules.fetch = ResetInserter(reset)(fetch)
        wiring.connect(m, flipped(self.program), fetch.memory)
        m.d.comb += [
            fetch.start.eq(csr.fetch_start),
            fetch.halt.eq(csr.halt),
            fetch.program.eq(csr.program),
            fetch.words.eq(csr.words),
            csr.last_index.eq(fetch.last_index),
            csr.faults[0].eq(fetch.fault),
        ]

        shells: dict[Engine, Shell] = {}
        for engine in self.engines:
            shells[engine] = shell = Shell(self.config, engine, OPCODE_OF[engine])
            m.submodules[f"shell_{engine.name.lower()}"] = ResetInserter(reset)(shell)
            wiring.connect(m, flipped(getattr(self, port_name(engine))), shell.core)
            m.d.comb += [
                shell.push.valid.eq(fetch.push[engine]),
                shell.push.payload.eq(fetch.index),
                shell.write.eq(fetch.write[engine]),
                shell.place.eq(fetch.place),
                shell.word.eq(fetch.word),
                fetch.ready[engine].eq(shell.push.ready),
                shell.clear.eq(csr.start),
                shell.running.eq(csr.running),
                shell.halt.eq(csr.halt),
                shell.counter_select.eq(csr.counter_select),
                csr.counters[engine].eq(shell.counter),
                csr.states[engine].eq(shell.state),
                csr.ended[engine].eq(shell.end_event.valid),
                csr.faults[2 + engine].eq(shell.fault),
            ]
        for giver, source in shells.items():
            for taker, sink in shells.items():
                m.d.comb += [
                    sink.given[giver].eq(source.give[taker]),
                    source.overflows[taker].eq(sink.overflow[giver]),
                ]
        done = fetch.ended & fetch.idle & Cat(s.idle for s in shells.values()).all()
        m.d.comb += csr.drained.eq(done)

        if self.config.trace:
            trace = Trace(self.config)
            m.submodules.trace = ResetInserter(reset)(trace)
            wiring.connect(m, flipped(self.trace), trace.memory)
            m.d.comb += [
                trace.start.eq(csr.start),
                trace.enable.eq(csr.trace_enable),
                trace.flush.eq(fetch.ended | csr.fault),
                trace.address.eq(csr.trace_address),
                trace.limit.eq(csr.trace_limit),
                trace.cycle.eq(csr.cycle),
                trace.last_index.eq(fetch.last_index),
                csr.trace_count.eq(trace.count),
                csr.trace_dropped.eq(trace.dropped),
                csr.faults[1].eq(trace.fault),
            ]
            for engine, shell in shells.items():
                m.d.comb += [
                    trace.starts[engine].eq(shell.start_event),
                    trace.ends[engine].eq(shell.end_event),
                ]
            done &= trace.idle
        m.d.comb += csr.finished.eq(done)
        return m
