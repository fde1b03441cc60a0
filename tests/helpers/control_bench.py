"""A bench for ``hw.control.control``: engines, program memory and trace memory played in Python."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass

from systole.hw.bus.interfaces import layout_of
from systole.hw.control.control import OPCODE_OF, ControlUnit, port_name
from systole.isa import (
    COMMANDS,
    CSRS,
    TRACE_EVENT,
    Config,
    Encoder,
    Engine,
    Fault,
    Opcode,
    Status,
    TraceKind,
)
from systole.isa import Control as ControlBits
from tests.helpers.simulation import simulation

PROGRAM = 0x1000
TRACE = 0x8000
DRAM_BYTES = 0x10000


@dataclass
class Work:
    """What a dummy core does with a command: cycles it takes, of which the first ``stalled`` are
    held up by memory; ``fault``: it fails instead of ending."""

    cycles: int = 5
    stalled: int = 0
    fault: tuple[Fault, int] | None = None


class Bench:
    """A ``ControlUnit`` with dummy cores, program and trace memory, all stalling at random."""

    def __init__(self, *, seed: int = 1, latency: int = 6, stall: float = 0.0, **config):
        self.config = Config(**config)
        self._design = simulation(ControlUnit, self.config, (True, False))
        self.dut = self._design.dut
        self.random = random.Random(seed)
        self.latency = latency
        self.stall = stall
        self.dram = bytearray(DRAM_BYTES)
        self.limit = DRAM_BYTES
        self.bad_read: int | None = None
        self.trace_blocked = False
        self.trace_fails = False
        self.work = lambda engine, index: Work()
        self.capacity = 2
        self.axi_idle = True
        self.now = 0
        self.log: list[tuple[int, TraceKind, Engine, int]] = []
        self.busy = dict.fromkeys(Engine, 0)
        self.memory = dict.fromkeys(Engine, 0)
        self.trace_requests = 0
        self.dispatched = 0
        self._cores = {e: deque() for e in self.dut.engines}
        self._reads: deque = deque()
        self._writes: list = []
        self._driven: dict = {}

    # Programs ------------------------------------------------------------------------------------

    def program(self, *commands: list[int]) -> int:
        """Put the commands (lists of words) into memory; returns the number of words."""
        words = [w for c in commands for w in c]
        for i, w in enumerate(words):
            at = PROGRAM + 8 * i
            self.dram[at : at + 8] = int(w).to_bytes(8, "little")
        return len(words)

    def run(self, main, *, cycles: int = 20_000) -> None:
        """Run the coroutine ``main(ctx)`` against the bench."""
        self.timeout = cycles
        finished = []

        async def testbench(ctx):
            self.ctx = ctx
            await main(ctx)
            finished.append(True)

        self._design.run(self._model, testbench)
        assert finished

    async def read(self, name: str) -> int:
        ctx, bus = self.ctx, self.dut.s_axil
        ctx.set(bus.araddr, CSRS[name].offset)
        ctx.set(bus.arvalid, 1)
        ctx.set(bus.rready, 1)
        await ctx.tick().until(bus.arready)
        ctx.set(bus.arvalid, 0)
        value, response = await ctx.tick().sample(bus.rdata, bus.rresp).until(bus.rvalid)
        assert response == 0
        return value

    async def write(self, name: str, value: int, strobe: int = 15) -> None:
        ctx, bus = self.ctx, self.dut.s_axil
        for signal, v in ((bus.awaddr, CSRS[name].offset), (bus.wdata, value)):
            ctx.set(signal, v)
        ctx.set(bus.wstrb, strobe)
        ctx.set(bus.bready, 1)
        first, second = (bus.awvalid, bus.awready), (bus.wvalid, bus.wready)
        if self.random.random() < 0.5:
            first, second = second, first
        for valid, ready in (first, second):
            ctx.set(valid, 1)
            await ctx.tick().until(ready)
            ctx.set(valid, 0)
        (response,) = await ctx.tick().sample(bus.bresp).until(bus.bvalid)
        assert response == 0

    async def start(self, words: int, *, control: int = 0, events: int = 1000, **registers) -> None:
        values = {
            "DRAM_BASE_LO": 0,
            "DRAM_LIMIT": self.limit,
            "PROGRAM": PROGRAM,
            "PROGRAM_WORDS": words,
            "TRACE_ADDR": TRACE,
            "TRACE_EVENTS": events,
        } | registers
        for name, value in values.items():
            await self.write(name, value)
        await self.write("CONTROL", ControlBits.START | ControlBits.IRQ_ENABLE | control)

    async def finish(self) -> int:
        """Wait for the interrupt, acknowledge it; returns STATUS."""
        await self.ctx.tick().until(self.dut.irq)
        status = await self.read("STATUS")
        assert not status & Status.BUSY
        await self.write("IRQ", await self.read("IRQ"))
        assert not self.ctx.get(self.dut.irq)
        return status

    async def soft_reset(self) -> None:
        await self.write("CONTROL", ControlBits.SOFT_RESET)
        while await self.read("CONTROL") & ControlBits.SOFT_RESET:
            pass
        assert await self.read("STATUS") == 0

    async def fault(self) -> tuple[Fault, int, int]:
        assert await self.finish() == Status.FAULT
        code, index, engine = [await self.read(f"FAULT_{n}") for n in ("CODE", "INDEX", "ENGINE")]
        return Fault(code), index, engine

    def events(self, count: int) -> list[dict[str, int]]:
        out = []
        layout = layout_of(TRACE_EVENT)
        for i in range(count):
            raw = int.from_bytes(self.dram[TRACE + 16 * i : TRACE + 16 * (i + 1)], "little")
            value = layout.from_bits(raw)
            out.append({f.name: value[f.name] for f in TRACE_EVENT})
        return out

    # The world around the device -----------------------------------------------------------------

    def _stalls(self) -> bool:
        return self.random.random() < self.stall

    def _drive(self, ctx, signal, value) -> None:
        """Set an input, unless it has that value already: settling the design takes time."""
        if self._driven.get(id(signal)) != value:
            self._driven[id(signal)] = value
            ctx.set(signal, value)

    async def _model(self, ctx):
        """Every cycle: drive all inputs, then see what the coming clock edge will do."""
        while True:
            self._drive(ctx, self.dut.axi_idle, self.axi_idle)
            if ctx.get(self.dut.reset):
                for core in self._cores.values():
                    core.clear()
                self._reads.clear()
                self._writes.clear()
            self._read_memory(ctx)
            if self.config.trace:
                self._write_memory(ctx)
            for engine in self.dut.engines:
                self._core(ctx, engine)
            await ctx.tick()
            self.now += 1
            assert self.now < self.timeout, "the bench has run out of time"

    def _read_memory(self, ctx):
        port = self.dut.program
        size = self.config.beat_bytes
        self._drive(ctx, port.denied, 0)
        if self._reads and self._reads[0] == "denied":
            self._reads.popleft()
            self._drive(ctx, port.denied, 1)
        self._drive(ctx, port.req.ready, not self._stalls())
        if self._reads and self._reads[0][0] <= self.now and not self._stalls():
            _, at, last = self._reads[0]
            beat = int.from_bytes(self.dram[at : at + size], "little")
            error = self.bad_read is not None and at <= self.bad_read < at + size
            self._drive(ctx, port.beats.payload, {"data": beat, "last": last, "error": error})
            self._drive(ctx, port.beats.valid, 1)
            assert ctx.get(port.beats.ready), "the fetch unit has asked for more than it can take"
            self._reads.popleft()
        else:
            self._drive(ctx, port.beats.valid, 0)
        if ctx.get(port.req.valid) and ctx.get(port.req.ready):
            at, length = ctx.get(port.req.payload.addr), ctx.get(port.req.payload.bytes)
            assert length > 0
            if at + length > self.limit:
                self._reads.appendleft("denied")
            else:
                for a in range(at, at + length, size):
                    self._reads.append((self.now + self.latency, a, a + size >= at + length))

    def _write_memory(self, ctx):
        port = self.dut.trace
        size = self.config.beat_bytes
        for signal in (port.done, port.denied, port.error):
            self._drive(ctx, signal, 0)
        blocked = self.trace_blocked
        beat_ready = False
        if self._writes:
            at, left, due = self._writes[0]
            if at >= self.limit:
                self._drive(ctx, port.denied, 1)
                self._writes.clear()
            elif left <= 0 and due <= self.now:
                self._drive(ctx, port.done, 1)
                self._drive(ctx, port.error, self.trace_fails)
                self._writes.clear()
            elif left > 0:
                beat_ready = not blocked and not self._stalls()
        self._drive(ctx, port.req.ready, not self._writes and not blocked)
        self._drive(ctx, port.beats.ready, beat_ready)
        if beat_ready and ctx.get(port.beats.valid):
            beat = ctx.get(port.beats.payload.data).to_bytes(size, "little")
            strobe = ctx.get(port.beats.payload.strobe)
            assert strobe == (1 << min(left, size)) - 1
            for i in range(min(left, size)):
                self.dram[at + i] = beat[i]
            self._writes = [(at + size, left - size, self.now + self.latency)]
        if ctx.get(port.req.valid) and ctx.get(port.req.ready):
            at, length = ctx.get(port.req.payload.addr), ctx.get(port.req.payload.bytes)
            self._writes = [(at, length, 0)]
            self.trace_requests += 1

    def _core(self, ctx, engine):
        port = getattr(self.dut, port_name(engine))
        core = self._cores[engine]
        self._drive(ctx, port.cmd.ready, len(core) < self.capacity and not self._stalls())
        retire = stalled = fault = False
        if core:
            index, left, work = core[0]
            if left == 0 and work.fault is not None:
                fault = True
                self._drive(ctx, port.fault_code, work.fault[0])
                self._drive(ctx, port.fault_address, work.fault[1])
                core[0] = (index, -1, work)
            elif left == 0:
                retire = True
                core.popleft()
                self.log.append((self.now, TraceKind.END, engine, index))
            elif left > 0:
                stalled = work.cycles - left < work.stalled
                core[0] = (index, left - 1, work)
            self.memory[engine] += stalled
            self.busy[engine] += not stalled
        self._drive(ctx, port.retire, retire)
        self._drive(ctx, port.stalled, stalled)
        self._drive(ctx, port.fault, fault)
        if ctx.get(port.cmd.valid) and ctx.get(port.cmd.ready):
            index = self.next_index[engine].popleft() if hasattr(self, "next_index") else 0
            work = self.work(engine, index)
            core.append((index, work.cycles, work))
            self.log.append((self.now, TraceKind.START, engine, index))

    def expect(
        self, commands: list[tuple[Engine, int, int]], *, complete: bool = False
    ) -> list[list[int]]:
        """Encode (engine, wait, signal), END added, and remember which index each engine gets.
        ``complete``: leave no words out."""
        self.next_index = {e: deque() for e in Engine}
        out, encoder = [], Encoder()
        for i, (engine, wait, signal) in enumerate(commands):
            self.next_index[engine].append(i)
            command = COMMANDS[OPCODE_OF[engine]]
            present = command.complete if complete else None
            tokens = dict(wait=wait, signal=signal, present=present)
            out.append(encoder.encode(command.opcode, engine, **tokens))
        return [*out, encoder.encode(Opcode.END)]
