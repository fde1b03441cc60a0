"""The accelerator: control, engines, memories and AXI managers, wired together."""

from __future__ import annotations

from typing import TypeVar

from amaranth.hdl import Module, ResetInserter, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out, connect, flipped

from systole.hw.bus.axi import (
    Axi4,
    Axi4Interface,
    Axi4Lite,
    Axi4LiteInterface,
    ReadManager,
    WriteManager,
    forward,
)
from systole.hw.control.control import ControlUnit, port_name
from systole.hw.conv.engine import ConvEngine
from systole.hw.memory.scratchpad import Scratchpad, WeightArbiter
from systole.hw.post.engine import PostEngine
from systole.hw.transfer.engines import LoadEngine, StoreEngine
from systole.hw.window.engine import WindowEngine
from systole.isa import Config, Engine
from systole.isa.csr import CSR_ADDR_BITS

Block = TypeVar("Block", bound=wiring.Component)

# Clients of the scratchpad and of the managers, in the order of their priority where there is one.
READERS = (Engine.CONV, Engine.POST, Engine.WINDOW, Engine.STORE)
READ_FETCH, READ_LOAD, READ_WLOAD = range(3)
WRITE_STORE, WRITE_TRACE = range(2)


def writers(config: Config) -> tuple[Engine, ...]:
    """The write clients of the scratchpad, in the order of their priority.

    A client that writes every cycle must not stand behind one that writes consecutive words every
    other cycle: refused once, it meets it again at every word and runs at half its rate. So the
    loads, whose refusals cost the bus, go first, but last if a word takes several beats.
    """
    loads, others = (Engine.LOAD, Engine.WLOAD), (Engine.POST, Engine.WINDOW)
    return loads + others if config.beat_bytes >= config.vector_bytes else others + loads


class Systole(wiring.Component):
    """The whole machine: an AXI4 manager to DRAM, an AXI4-Lite subordinate with the registers of
    ``isa.csr``, an interrupt line."""

    m_axi: Axi4Interface
    s_axil: Axi4LiteInterface
    irq: Signal

    def __init__(self, config: Config):
        self.config = config
        super().__init__(
            {
                "m_axi": Out(Axi4(config)),
                "s_axil": In(Axi4Lite(CSR_ADDR_BITS)),
                "irq": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config = self.config
        m.submodules.control = control = ControlUnit(config)
        connect(m, flipped(self.s_axil), control.s_axil)
        m.d.comb += self.irq.eq(control.irq)

        def resettable(name: str, block: Block) -> Block:
            m.submodules[name] = ResetInserter(control.reset)(block)
            return block

        read = resettable("read", ReadManager(config, clients=3))
        write = resettable("write", WriteManager(config, clients=2 if config.trace else 1))
        forward(m, read.bus, self.m_axi)
        forward(m, write.bus, self.m_axi)
        for manager in (read, write):
            m.d.comb += [
                manager.base.eq(control.base),
                manager.limit.eq(control.limit),
                manager.drain.eq(control.drain),
            ]
        m.d.comb += [
            control.axi_idle.eq(read.idle & write.idle),
            control.read_beat.eq(read.beat),
            control.write_beat.eq(write.beat & (write.beat_client == WRITE_STORE)),
        ]
        connect(m, control.program, read.clients[READ_FETCH])
        if config.trace:
            connect(m, control.trace, write.clients[WRITE_TRACE])

        load = resettable("load", LoadEngine(config))
        wload = resettable("wload", LoadEngine(config))
        conv = resettable("conv", ConvEngine(config))
        post = resettable("post", PostEngine(config))
        store = resettable("store", StoreEngine(config))
        connect(m, load.memory, read.clients[READ_LOAD])
        connect(m, wload.memory, read.clients[READ_WLOAD])
        connect(m, store.memory, write.clients[WRITE_STORE])
        connect(m, post.accumulators, conv.accumulators)
        m.submodules.weights = weights = WeightArbiter(config)
        connect(m, load.weights, weights.clients[0])
        connect(m, wload.weights, weights.clients[1])
        connect(m, weights.weights, conv.weight_write)

        cores: dict[Engine, LoadEngine | ConvEngine | PostEngine | StoreEngine | WindowEngine] = {
            Engine.LOAD: load,
            Engine.WLOAD: wload,
            Engine.CONV: conv,
            Engine.POST: post,
            Engine.STORE: store,
        }
        reads = {
            Engine.CONV: conv.scratchpad,
            Engine.POST: post.scratchpad_read,
            Engine.STORE: store.scratchpad,
        }
        writes = {
            Engine.LOAD: load.scratchpad,
            Engine.WLOAD: wload.scratchpad,
            Engine.POST: post.scratchpad_write,
        }
        if config.window:
            window = resettable("window", WindowEngine(config))
            cores[Engine.WINDOW] = window
            reads[Engine.WINDOW] = window.scratchpad_read
            writes[Engine.WINDOW] = window.scratchpad_write

        for engine, core in cores.items():
            connect(m, getattr(control, port_name(engine)), core.command)
        readers = [e for e in READERS if e in reads]
        writer_order = [e for e in writers(config) if e in writes]
        m.submodules.scratchpad = scratchpad = Scratchpad(
            config, readers=len(readers), writers=len(writer_order)
        )
        for i, engine in enumerate(readers):
            connect(m, reads[engine], scratchpad.read[i])
        for i, engine in enumerate(writer_order):
            connect(m, writes[engine], scratchpad.write[i])
        return m
