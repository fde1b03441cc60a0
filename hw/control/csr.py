"""The control and status registers, and what follows from writing them: start, soft reset, faults,
watchdog, interrupt."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from operator import or_

from amaranth.hdl import Array, C, Cat, Module, Mux, Signal, Value, ValueLike
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from systole.hw.bus.axi import (
    Axi4Lite,
    Axi4LiteInterface,
)
from systole.hw.bus.interfaces import (
    INDEX_BITS,
    record,
)
from systole.hw.control.choice import chosen_of
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

PLAIN = {name: csr.mask for name, csr in CSRS.items() if csr.mask}
"""Plain registers and the bits they keep; the others read as 0."""
WRITABLE = [name for name, csr in CSRS.items() if csr.access != "ro"]


class RegisterBus(wiring.Component):
    """AXI4-Lite subordinate: one write and one read at a time.

    ``write`` pulses with ``write_word`` (the word address), ``write_data`` and ``write_bytes`` (the
    bytes to write). ``read`` pulses with ``read_word``; ``read_data`` is taken from the cycle after
    the next until the following read. Addresses of ``words`` and more answer SLVERR.
    """

    bus: Axi4LiteInterface
    write: Signal
    write_word: Signal
    write_data: Signal
    write_bytes: Signal
    read: Signal
    read_word: Signal
    read_data: Signal

    def __init__(self, *, addr_bits: int, words: int):
        self.words = words
        super().__init__(
            {
                "bus": In(Axi4Lite(addr_bits)),
                "write": Out(1),
                "write_word": Out(addr_bits - 2),
                "write_data": Out(32),
                "write_bytes": Out(4),
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
        taken = Signal()
        m.d.comb += [
            bus.awready.eq(~address_held),
            bus.wready.eq(~data_held),
            taken.eq(address_held & data_held & ~bus.bvalid),
        ]
        m.d.sync += self.write.eq(taken)
        with m.If(bus.awvalid & bus.awready):
            m.d.sync += [address_held.eq(1), self.write_word.eq(bus.awaddr[2:])]
        with m.If(bus.wvalid & bus.wready):
            m.d.sync += [data_held.eq(1), self.write_data.eq(bus.wdata)]
            m.d.sync += self.write_bytes.eq(bus.wstrb)
        with m.If(bus.bready):
            m.d.sync += bus.bvalid.eq(0)
        with m.If(taken):
            m.d.sync += [
                address_held.eq(0),
                data_held.eq(0),
                bus.bvalid.eq(1),
                bus.bresp.eq(Mux(self.write_word < self.words, RESP_OKAY, RESP_SLVERR)),
            ]

        looked_up = Signal()
        m.d.comb += [
            bus.arready.eq(~self.read & ~looked_up & ~bus.rvalid),
            bus.rdata.eq(self.read_data),
        ]
        m.d.sync += [self.read.eq(bus.arvalid & bus.arready), looked_up.eq(self.read)]
        with m.If(bus.arvalid & bus.arready):
            m.d.sync += self.read_word.eq(bus.araddr[2:])
        with m.If(bus.rready):
            m.d.sync += bus.rvalid.eq(0)
        with m.If(looked_up):
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

    bus: Axi4LiteInterface
    irq: Signal
    base: Signal
    limit: Signal
    program: Signal
    words: Signal
    trace_address: Signal
    trace_limit: Signal
    trace_enable: Signal
    start: Signal
    fetch_start: Signal
    running: Signal
    fault: Signal
    halt: Signal
    drain: Signal
    reset: Signal
    cycle: Signal
    counter_select: Signal
    axi_idle: Signal
    finished: Signal
    drained: Signal
    ended: Signal
    read_beat: Signal
    write_beat: Signal
    last_index: Signal
    trace_count: Signal
    trace_dropped: Signal
    states: list[Signal]
    counters: list[Signal]
    faults: list[data.View]

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
        self._registers = RegisterBus(addr_bits=CSR_ADDR_BITS, words=len(CSRS))
        self._chosen = Signal(len(WRITABLE))  # the register that is written
        self._written = dict(zip(WRITABLE, self._chosen, strict=True))
        self._plain = {name: Signal(32, name=name.lower()) for name in PLAIN}
        self._irq_enable = Signal()
        self._start_order = Signal()
        self._reset_order = Signal()
        self._resetting = Signal()
        self._reset_over = Signal()
        self._done = Signal()
        self._failure = record(FAULT_REPORT, init={"engine": NO_ENGINE})
        self._irq = Signal(Irq)
        self._irq_set = Signal(Irq)

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.registers = self._registers
        wiring.connect(m, wiring.flipped(self.bus), self._registers.bus)
        self._write_plain(m)
        self._write_control(m)
        self._soft_reset(m)
        # Until the fetch unit starts, it still shows the end of the last program.
        counters = self._counters(m, counting=self.running & (~self.drained | self.fetch_start))
        self._run(m)
        self._interrupt(m)
        self._read(m, counters)
        return m

    def _write_plain(self, m: Module) -> None:
        bus, plain = self._registers, self._plain
        with m.If(bus.write):
            m.d.comb += self._chosen.eq(
                Cat(bus.write_word == CSRS[name].offset // 4 for name in WRITABLE)
            )
        for name, register in plain.items():
            kept = bus.write_data & PLAIN[name]
            for i in range(4):
                with m.If(self._written[name] & bus.write_bytes[i]):
                    m.d.sync += register.word_select(i, 8).eq(kept.word_select(i, 8))
        m.d.comb += [
            self.base.eq(Cat(plain["DRAM_BASE_LO"], plain["DRAM_BASE_HI"])),
            self.limit.eq(plain["DRAM_LIMIT"]),
            self.program.eq(plain["PROGRAM"]),
            self.words.eq(plain["PROGRAM_WORDS"]),
            self.trace_address.eq(plain["TRACE_ADDR"]),
            self.trace_limit.eq(plain["TRACE_EVENTS"]),
        ]

    def _write_control(self, m: Module) -> None:
        """CONTROL: its bits all lie in the first byte."""
        bus = self._registers
        order = Signal(Control)
        written = self._written["CONTROL"] & bus.write_bytes[0]
        m.d.comb += [
            order.eq(Mux(written, bus.write_data[: len(order)], 0)),
            self._start_order.eq((order & Control.START).any()),
            self._reset_order.eq((order & Control.SOFT_RESET).any()),
        ]
        with m.If(written):
            m.d.sync += [
                self.trace_enable.eq((order & Control.TRACE).any()),
                self._irq_enable.eq((order & Control.IRQ_ENABLE).any()),
            ]

    def _soft_reset(self, m: Module) -> None:
        """Drain AXI, then reset. Clients' requests just being taken show in ``axi_idle`` one cycle
        later."""
        resetting, settled = self._resetting, Signal()
        left = Signal(range(RESET_CYCLES + 1))
        m.d.comb += [
            self.drain.eq(resetting),
            self.reset.eq(left != 0),
            self._reset_over.eq(left == 1),
            self.halt.eq(self.fault | resetting),
        ]
        with m.If(self._reset_order & ~resetting):
            m.d.sync += [resetting.eq(1), settled.eq(0)]
        with m.Elif(self._reset_over):
            m.d.sync += [resetting.eq(0), left.eq(0)]
        with m.Elif(self.reset):
            m.d.sync += left.eq(left - 1)
        with m.Elif(resetting):
            m.d.sync += settled.eq(1)
            with m.If(settled & self.axi_idle):
                m.d.sync += left.eq(RESET_CYCLES)

    def _run(self, m: Module) -> None:
        """A program's run, from START to DONE, FAULT or soft reset."""
        report = self._report(m, watchdog=self._plain["WATCHDOG"])
        m.d.comb += self.start.eq(
            self._start_order & ~self._reset_order & ~self.running & ~self.halt
        )
        m.d.sync += self.fetch_start.eq(self.start)
        with m.If(self.start):
            m.d.sync += [self.running.eq(1), self._done.eq(0)]
        with m.Elif((self._reset_order & ~self._resetting) | self._reset_over):
            m.d.sync += [
                self.running.eq(0),
                self._done.eq(0),
                self.fault.eq(0),
                self._failure.eq(FAULT_REPORT.const({"engine": NO_ENGINE})),
            ]
        with m.Elif(report.valid & ~self.halt):
            m.d.comb += self._irq_set.eq(Irq.FAULT)
            m.d.sync += [self.running.eq(0), self.fault.eq(1), self._failure.eq(report)]
        with m.Elif(self.finished & self.running & ~self.fetch_start):
            m.d.comb += self._irq_set.eq(Irq.DONE)
            m.d.sync += [self.running.eq(0), self._done.eq(1)]

    def _interrupt(self, m: Module) -> None:
        bus, irq = self._registers, self._irq
        clear = Mux(self._written["IRQ"] & bus.write_bytes[0], bus.write_data, 0)[: len(irq)]
        m.d.sync += irq.eq((irq & ~clear) | self._irq_set)
        m.d.comb += self.irq.eq(self._irq_enable & irq.any())

    def _read(self, m: Module, counters: dict[str, Value]) -> None:
        """Read a register, or one of the engines' counters, if there are any: one lookup for all of
        these. Each group is looked up in a cycle, one of the groups is chosen in the next."""
        bus = self._registers
        groups = [self._lookup(m, values) for values in (self._values(), self._plain, counters)]
        if not self.config.counters:
            m.d.sync += bus.read_data.eq(reduce(or_, groups))
            return
        place = Signal(range(len(CSRS)))
        m.d.comb += [
            place.eq(bus.read_word - COUNTERS_FIRST),
            self.counter_select.eq(place % COUNTERS),
        ]
        counter, is_counter = Signal(32, reset_less=True), Signal()
        with m.If(bus.read):
            m.d.sync += [
                counter.eq(Array(self.counters)[place // COUNTERS]),
                is_counter.eq(bus.read_word >= COUNTERS_FIRST),
            ]
        m.d.sync += bus.read_data.eq(Mux(is_counter, counter, reduce(or_, groups)))

    def _lookup(self, m: Module, values: Mapping[str, ValueLike]) -> Signal:
        """The register of ``values`` that was asked for, in the cycle after; 0 if it is none."""
        bus, value_read = self._registers, Signal(32)
        with m.If(bus.read):
            m.d.sync += value_read.eq(0)
            with m.Switch(bus.read_word):
                for name, value in values.items():
                    with m.Case(CSRS[name].offset // 4):
                        m.d.sync += value_read.eq(value)
        return value_read

    def _values(self) -> dict[str, ValueLike]:
        """What the other registers read as."""
        failure = self._failure
        return {
            "ID": DEVICE_ID,
            "VERSION": VERSION,
            "CONFIG_HASH": self.config.hash,
            # In the order of the bits of Control and Status; START reads as 0.
            "CONTROL": Cat(C(0), self._resetting, self.trace_enable, self._irq_enable),
            "STATUS": Cat(self.running, self._done, self.fault),
            "IRQ": self._irq,
            "TRACE_COUNT": self.trace_count,
            "TRACE_DROPPED": self.trace_dropped,
            "FAULT_CODE": failure.code,
            "FAULT_INDEX": failure.index,
            "FAULT_ENGINE": failure.engine,
            "FAULT_ADDRESS": failure.address,
            **{f"{e.name}_STATE": self.states[e] for e in Engine},
        }

    def _counters(self, m: Module, *, counting: Value) -> dict[str, Value]:
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
        report = record(FAULT_REPORT)
        with m.If(self.start | self.ended.any()):
            m.d.sync += quiet.eq(0)
        with m.Elif(self.running):
            m.d.sync += quiet.eq(quiet + 1)
        barks = Signal()
        valid = Cat(*(candidate.valid for candidate in self.faults), barks)
        first = Signal(len(valid))
        m.d.comb += [
            barks.eq(self.running & (watchdog != 0) & (quiet >= watchdog)),
            first.eq(valid & (~valid + 1)),
            report.valid.eq(valid.any()),
        ]
        bark = {"code": Fault.WATCHDOG, "index": self.last_index, "engine": NO_ENGINE, "address": 0}
        for name, of_bark in bark.items():
            values = [*(getattr(candidate, name) for candidate in self.faults), of_bark]
            m.d.comb += getattr(report, name).eq(chosen_of(first, values))
        return report
