"""The control and status registers, and what follows from writing them: start, soft reset, faults,
watchdog, interrupt."""

from __future__ import annotations

from amaranth.hdl import Array, C, Cat, Module, Mux, Signal
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from systole.hw.bus.axi import Axi4Lite
from systole.hw.bus.interfaces import INDEX_BITS
from systole.hw.control.fetch import FAULT_REPORT
from systole.hw.control.shell import COUNTERS, ENGINES
from systole.isa import CSRS, DEVICE_ID, VERSION, Config, Control, Engine, Fault, Irq
from systole.isa.csr import CSR_ADDR_BITS, NO_ENGINE

RESP_OKAY = 0
RESP_SLVERR = 2
REPORTERS = 2 + ENGINES
"""Sources of fault reports: fetch unit, trace unit, the shells."""
RESET_CYCLES = 2

COUNTERS_FIRST = CSRS[f"{Engine(0).name}_BUSY"].offset // 4
"""Word address of the engines' counters, which come last, ``COUNTERS`` an engine."""

PLAIN = {
    "DRAM_BASE_LO": 0xFFFF_F000,
    "DRAM_BASE_HI": 0xFFFF_FFFF,
    "DRAM_LIMIT": 0xFFFF_FFFF,
    "PROGRAM": 0xFFFF_FFC0,
    "PROGRAM_WORDS": 0xFFFF_FFFF,
    "WATCHDOG": 0xFFFF_FFFF,
    "TRACE_ADDR": 0xFFFF_FFC0,
    "TRACE_EVENTS": 0xFFFF_FFFF,
}
"""Plain registers and the bits they keep; the others read as 0."""


class RegisterBus(wiring.Component):
    """AXI4-Lite subordinate: one write and one read at a time.

    ``write`` pulses with ``write_word`` (the word address), ``write_data`` and ``write_mask`` (the
    bits to write). ``read`` pulses with ``read_word``; ``read_data`` is taken in the next cycles,
    until the following read. Addresses of ``words`` and more answer SLVERR.
    """

    def __init__(self, *, addr_bits: int, words: int):
        self.words = words
        super().__init__(
            {
                "bus": In(Axi4Lite(addr_bits)),
                "write": Out(1),
                "write_word": Out(addr_bits - 2),
                "write_data": Out(32),
                "write_mask": Out(32),
                "read": Out(1),
                "read_word": Out(addr_bits - 2),
                "read_data": In(32),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        bus = self.bus
        address_held = Signal()
        data_held = Signal()
        strobe = Signal(4)
        m.d.comb += [
            bus.awready.eq(~address_held),
            bus.wready.eq(~data_held),
            self.write.eq(address_held & data_held & ~bus.bvalid),
        ]
        with m.If(self.write):
            m.d.comb += self.write_mask.eq(Cat(bit.replicate(8) for bit in strobe))
        with m.If(bus.awvalid & bus.awready):
            m.d.sync += [address_held.eq(1), self.write_word.eq(bus.awaddr[2:])]
        with m.If(bus.wvalid & bus.wready):
            m.d.sync += [data_held.eq(1), self.write_data.eq(bus.wdata), strobe.eq(bus.wstrb)]
        with m.If(bus.bready):
            m.d.sync += bus.bvalid.eq(0)
        with m.If(self.write):
            m.d.sync += [
                address_held.eq(0),
                data_held.eq(0),
                bus.bvalid.eq(1),
                bus.bresp.eq(Mux(self.write_word < self.words, RESP_OKAY, RESP_SLVERR)),
            ]

        m.d.comb += [bus.arready.eq(~self.read & ~bus.rvalid), bus.rdata.eq(self.read_data)]
        m.d.sync += self.read.eq(bus.arvalid & bus.arready)
        with m.If(bus.arvalid & bus.arready):
            m.d.sync += self.read_word.eq(bus.araddr[2:])
        with m.If(bus.rready):
            m.d.sync += bus.rvalid.eq(0)
        with m.If(self.read):
            m.d.sync += [
                bus.rvalid.eq(1),
                bus.rresp.eq(Mux(self.read_word < self.words, RESP_OKAY, RESP_SLVERR)),
            ]
        return m


class ControlStatus(wiring.Component):
    """The registers of ``isa.csr`` on AXI4-Lite, and the state of the whole machine.

    Byte strobes are honoured; writes to read-only registers are ignored.

    ``start`` pulses when a program begins; ``fetch_start`` one cycle later. The counters take 8
    cycles to become zero, fewer than the first command takes to arrive. ``running`` is BUSY.
    ``finished`` (input) says that END has been fetched and everything is idle: DONE; ``drained``
    (input) that all but the trace is, which stops the cycle counter. The first valid report of
    ``faults`` (lowest index first) ends the program with FAULT.

    ``halt`` is high from a fault or soft reset on: no further command is handed out. A soft reset
    raises ``drain`` until ``axi_idle``, then ``reset`` for some cycles: everything but this unit
    and the contents of memories is reset.
    """

    def __init__(self, config: Config):
        self.config = config
        super().__init__(
            {
                "bus": In(Axi4Lite(CSR_ADDR_BITS)),
                "irq": Out(1),
                # To the machine.
                "base": Out(config.axi_addr_bits),
                "limit": Out(32),
                "program": Out(32),
                "words": Out(32),
                "trace_address": Out(32),
                "trace_limit": Out(32),
                "trace_enable": Out(1),
                "start": Out(1),
                "fetch_start": Out(1),
                "running": Out(1),
                "fault": Out(1),
                "halt": Out(1),
                "drain": Out(1),
                "reset": Out(1),
                "cycle": Out(64),
                "counter_select": Out(range(COUNTERS)),
                # From the machine.
                "axi_idle": In(1),
                "finished": In(1),
                "drained": In(1),
                "ended": In(ENGINES),
                "read_beat": In(1),
                "write_beat": In(1),
                "last_index": In(INDEX_BITS),
                "trace_count": In(32),
                "trace_dropped": In(32),
                "states": In(32).array(ENGINES),
                "counters": In(32).array(ENGINES),
                "faults": In(FAULT_REPORT).array(REPORTERS),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.registers = bus = RegisterBus(addr_bits=CSR_ADDR_BITS, words=len(CSRS))
        wiring.connect(m, wiring.flipped(self.bus), bus.bus)

        writable = [name for name, csr in CSRS.items() if csr.access != "ro"]
        chosen = Signal(len(writable))
        with m.If(bus.write):
            m.d.comb += chosen.eq(Cat(bus.write_word == CSRS[n].offset // 4 for n in writable))
        written = dict(zip(writable, chosen, strict=True))
        plain = {name: Signal(32, name=name.lower()) for name in PLAIN}
        for name, register in plain.items():
            with m.If(written[name]):
                new = (register & ~bus.write_mask) | (bus.write_data & bus.write_mask)
                m.d.sync += register.eq(new & PLAIN[name])
        m.d.comb += [
            self.base.eq(Cat(plain["DRAM_BASE_LO"], plain["DRAM_BASE_HI"])),
            self.limit.eq(plain["DRAM_LIMIT"]),
            self.program.eq(plain["PROGRAM"]),
            self.words.eq(plain["PROGRAM_WORDS"]),
            self.trace_address.eq(plain["TRACE_ADDR"]),
            self.trace_limit.eq(plain["TRACE_EVENTS"]),
        ]

        # CONTROL: its bits all lie in the first byte.
        irq_enable = Signal()
        order = Signal(Control)
        m.d.comb += order.eq(
            Mux(written["CONTROL"] & bus.write_mask[0], bus.write_data[: len(order)], 0)
        )
        with m.If(written["CONTROL"] & bus.write_mask[0]):
            m.d.sync += [
                self.trace_enable.eq((order & Control.TRACE).any()),
                irq_enable.eq((order & Control.IRQ_ENABLE).any()),
            ]
        start_order = (order & Control.START).any()
        reset_order = (order & Control.SOFT_RESET).any()

        # Soft reset. Clients' requests just being taken show in ``axi_idle`` one cycle later.
        resetting = Signal()
        settled = Signal()
        reset_left = Signal(range(RESET_CYCLES + 1))
        reset_over = Signal()
        m.d.comb += [
            self.drain.eq(resetting),
            self.reset.eq(reset_left != 0),
            reset_over.eq(reset_left == 1),
            self.halt.eq(self.fault | resetting),
        ]
        with m.If(reset_order & ~resetting):
            m.d.sync += [resetting.eq(1), settled.eq(0)]
        with m.Elif(reset_over):
            m.d.sync += [resetting.eq(0), reset_left.eq(0)]
        with m.Elif(self.reset):
            m.d.sync += reset_left.eq(reset_left - 1)
        with m.Elif(resetting):
            m.d.sync += settled.eq(1)
            with m.If(settled & self.axi_idle):
                m.d.sync += reset_left.eq(RESET_CYCLES)

        # A program's run, from START to DONE, FAULT or soft reset.
        m.d.comb += self.start.eq(start_order & ~reset_order & ~self.running & ~self.halt)
        m.d.sync += self.fetch_start.eq(self.start)
        # Until the fetch unit starts, it still shows the end of the last program.
        counters = self._counters(m, counting=self.running & (~self.drained | self.fetch_start))
        report = self._report(m, watchdog=plain["WATCHDOG"])
        done = Signal()
        failure = Signal(FAULT_REPORT, init={"engine": NO_ENGINE})
        irq = Signal(Irq)
        irq_set = Signal(Irq)
        with m.If(self.start):
            m.d.sync += [self.running.eq(1), done.eq(0)]
        with m.Elif((reset_order & ~resetting) | reset_over):
            m.d.sync += [
                self.running.eq(0),
                done.eq(0),
                self.fault.eq(0),
                failure.eq(FAULT_REPORT.const({"engine": NO_ENGINE})),
            ]
        with m.Elif(report.valid & ~self.halt):
            m.d.comb += irq_set.eq(Irq.FAULT)
            m.d.sync += [self.running.eq(0), self.fault.eq(1), failure.eq(report)]
        with m.Elif(self.finished & self.running & ~self.fetch_start):
            m.d.comb += irq_set.eq(Irq.DONE)
            m.d.sync += [self.running.eq(0), done.eq(1)]
        irq_clear = Mux(written["IRQ"], bus.write_data & bus.write_mask, 0)[: len(irq)]
        m.d.sync += irq.eq((irq & ~irq_clear) | irq_set)
        m.d.comb += self.irq.eq(irq_enable & irq.any())

        # In the order of the bits of Status and Control; START reads as 0.
        status = Cat(self.running, done, self.fault)
        control = Cat(C(0), resetting, self.trace_enable, irq_enable)
        values = {
            "ID": DEVICE_ID,
            "VERSION": VERSION,
            "CONFIG_HASH": self.config.hash,
            "CONTROL": control,
            "STATUS": status,
            "IRQ": irq,
            "TRACE_COUNT": self.trace_count,
            "TRACE_DROPPED": self.trace_dropped,
            "FAULT_CODE": failure.code,
            "FAULT_INDEX": failure.index,
            "FAULT_ENGINE": failure.engine,
            "FAULT_ADDRESS": failure.address,
            **{f"{e.name}_STATE": self.states[e] for e in Engine},
            **plain,
            **counters,
        }
        # The engines' counters: one lookup for all of them.
        place = Signal(range(len(CSRS)))
        m.d.comb += [
            place.eq(bus.read_word - COUNTERS_FIRST),
            self.counter_select.eq(place % COUNTERS),
        ]
        with m.If(bus.read):
            with m.If(bus.read_word >= COUNTERS_FIRST):
                m.d.sync += bus.read_data.eq(Array(self.counters)[place // COUNTERS])
            with m.Else(), m.Switch(bus.read_word):
                for name, value in values.items():
                    with m.Case(CSRS[name].offset // 4):
                        m.d.sync += bus.read_data.eq(value)
                with m.Default():
                    m.d.sync += bus.read_data.eq(0)
        return m

    def _counters(self, m: Module, *, counting: object) -> dict[str, object]:
        """The registers that count for the machine as a whole; the cycle counter counts while
        ``counting``."""
        commands = Signal(32)
        reads = Signal(32)
        writes = Signal(32)
        with m.If(self.start):
            m.d.sync += [commands.eq(0), reads.eq(0), writes.eq(0), self.cycle.eq(0)]
        with m.Else():
            with m.If(counting):
                m.d.sync += self.cycle.eq(self.cycle + 1)
            with m.If(self.ended.any()):
                number = Signal(range(ENGINES + 1))
                m.d.comb += number.eq(sum(self.ended[i] for i in range(ENGINES)))
                m.d.sync += commands.eq(commands + number)
            with m.If(self.read_beat):
                m.d.sync += reads.eq(reads + 1)
            with m.If(self.write_beat):
                m.d.sync += writes.eq(writes + 1)
        return {
            "COMMANDS": commands,
            "CYCLES_LO": self.cycle[:32],
            "CYCLES_HI": self.cycle[32:],
            "READ_BEATS": reads,
            "WRITE_BEATS": writes,
        }

    def _report(self, m: Module, *, watchdog: Signal) -> data.View:
        """The report of this cycle's first fault, the watchdog's last."""
        quiet = Signal(32)  # Cycles since a command ended.
        report = Signal(FAULT_REPORT)
        with m.If(self.start | self.ended.any()):
            m.d.sync += quiet.eq(0)
        with m.Elif(self.running):
            m.d.sync += quiet.eq(quiet + 1)
        with m.If(self.running & (watchdog != 0) & (quiet >= watchdog)):
            m.d.comb += [
                report.valid.eq(1),
                report.code.eq(Fault.WATCHDOG),
                report.index.eq(self.last_index),
                report.engine.eq(NO_ENGINE),
            ]
        for candidate in reversed(list(self.faults)):
            with m.If(candidate.valid):
                m.d.comb += report.eq(candidate)
        return report
