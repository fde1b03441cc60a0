"""cocotb bench of the whole accelerator at its AXI ports, against cocotbext-axi's models.

It shares nothing with the testbench of :mod:`sim.device`: its clock, memory and manager are its
own. The configuration comes as JSON in ``SYSTOLE_CONFIG``; the random seed is cocotb's.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import cocotb
from cocotb.clock import Clock
from cocotb.triggers import ClockCycles, RisingEdge, Timer, with_timeout
from cocotbext.axi import AxiBus, AxiLiteBus, AxiLiteMaster, AxiRam, AxiResp

from systole.isa import CSRS, DEVICE_ID, VERSION, Control, Irq, Status
from systole.isa.csr import CSR_ADDR_BITS, NO_ENGINE
from systole.sim.benches.environment import CONFIG, PERIOD_NS, Handle
from systole.sim.benches.programs import round_trip

BASE = 0x3000
"""Address of the DRAM window in the memory."""


def stalls(rng: random.Random, probability: float) -> Iterator[bool]:
    """An endless random pattern of pauses."""
    while True:
        yield rng.random() < probability


class TopBench:
    """The accelerator with its clock, a manager at its registers and a memory at its AXI port."""

    def __init__(self, dut: Handle):
        self.dut = dut
        self.rng = random.Random(cocotb.RANDOM_SEED)
        dut.clk.value = 0
        dut.rst.value = 1
        # cocotbext-axi carries no types.
        self.host: Any = AxiLiteMaster(AxiLiteBus.from_prefix(dut, "s_axil_"), dut.clk, dut.rst)
        self.ram: Any = AxiRam(AxiBus.from_prefix(dut, "m_axi_"), dut.clk, dut.rst, size=1 << 20)

    async def start(self) -> None:
        """Start the clock, once the models drive their ports, and release the reset."""
        await Timer(PERIOD_NS, "ns")
        Clock(self.dut.clk, PERIOD_NS, unit="ns").start()
        await ClockCycles(self.dut.clk, 4)
        self.dut.rst.value = 0
        await ClockCycles(self.dut.clk, 2)

    def stall(self, probability: float) -> None:
        """Give every channel of both ports random backpressure."""
        for model in (self.host, self.ram):
            for channel in (
                model.read_if.ar_channel,
                model.read_if.r_channel,
                model.write_if.aw_channel,
                model.write_if.w_channel,
                model.write_if.b_channel,
            ):
                channel.set_pause_generator(stalls(self.rng, probability))

    async def read(self, name: str) -> int:
        """Read a register."""
        return await self.host.read_dword(CSRS[name].offset)

    async def write(self, name: str, value: int) -> None:
        """Write a register."""
        await self.host.write_dword(CSRS[name].offset, value)

    async def finish(self, cycles: int) -> None:
        """Wait for the interrupt, at most ``cycles``."""
        if not self.dut.irq.value:
            await with_timeout(RisingEdge(self.dut.irq), cycles * PERIOD_NS, "ns")


@cocotb.test()
async def csr_map(dut: Handle) -> None:
    """Checks every register's reset value and access, byte strobes, and addresses beyond the map,
    under backpressure."""
    bench = TopBench(dut)
    await bench.start()
    bench.stall(0.3)
    reset = {
        "ID": DEVICE_ID,
        "VERSION": VERSION,
        "CONFIG_HASH": CONFIG.hash,
        "FAULT_ENGINE": NO_ENGINE,
    }
    for name in CSRS:
        assert await bench.read(name) == reset.get(name, 0), name
    patterns = {}
    for name, csr in CSRS.items():
        if name != "CONTROL":
            patterns[name] = bench.rng.getrandbits(32)
            await bench.write(name, patterns[name])
        else:
            await bench.write(name, Control.IRQ_ENABLE)
        assert csr.offset == 4 * list(CSRS).index(name)
    for name, csr in CSRS.items():
        expected = reset.get(name, 0)
        if name == "CONTROL":
            expected = Control.IRQ_ENABLE
        elif csr.access == "rw":
            expected = patterns[name] & csr.mask
        assert await bench.read(name) == expected, name
    await bench.write("WATCHDOG", 0x11223344)
    await bench.host.write(CSRS["WATCHDOG"].offset + 2, b"\xaa")
    assert await bench.read("WATCHDOG") == 0x11AA3344
    for offset in range(4 * len(CSRS), 1 << CSR_ADDR_BITS, 4):
        assert (await bench.host.read(offset, 4)).resp == AxiResp.SLVERR
        assert (await bench.host.write(offset, bytes(4))).resp == AxiResp.SLVERR
    assert not dut.irq.value


@cocotb.test()
async def loads_and_stores(dut: Handle) -> None:
    """Checks round trips from LOAD to STORE under backpressure; interrupt, status and counters."""
    bench = TopBench(dut)
    await bench.start()
    for probability in (0.0, 0.4):
        bench.stall(probability)
        program = round_trip(CONFIG, bench.rng, copies=6)
        bench.ram.write(BASE, program.image)
        for name, value in (
            ("DRAM_BASE_LO", BASE),
            ("DRAM_BASE_HI", 0),
            ("DRAM_LIMIT", len(program.image)),
            ("PROGRAM", program.command_offset),
            ("PROGRAM_WORDS", program.command_words),
            ("WATCHDOG", 50_000),
            ("CONTROL", Control.START | Control.IRQ_ENABLE),
        ):
            await bench.write(name, value)
        assert await bench.read("STATUS") in (Status.BUSY, Status.DONE)
        await bench.finish(100_000)
        assert await bench.read("STATUS") == Status.DONE
        assert await bench.read("IRQ") == Irq.DONE
        await bench.write("IRQ", Irq.DONE)
        assert await bench.read("IRQ") == 0 and not dut.irq.value
        assert await bench.read("COMMANDS") == program.commands
        assert bench.ram.read(BASE, len(program.expected)) == program.expected
        beat = CONFIG.beat_bytes
        assert await bench.read("READ_BEATS") >= 8 * program.command_words // beat
        assert 0 < await bench.read("WRITE_BEATS") <= len(program.expected) // beat
