"""A bench for ``hw.control.control``: engines, program memory and trace memory played in Python."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass
from typing import Any

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
from tests.helpers.legal_commands import made_legal
from tests.helpers.simulation import Inputs, simulation

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
        self._design = simulation(ControlUnit, self.config)
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
        self._driven: dict[str, int] = {}
        """Values of the inputs by name."""

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

        self._design.run(testbench, background=(self._model,))
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

    def _inputs(self) -> dict[str, Any]:
        """The inputs that the bench drives, by name."""
        dut = self.dut
        ports = {"axi_idle": dut.axi_idle, "program_ready": dut.program.req.ready}
        for name in ("valid", "payload"):
            ports[f"program_{name}"] = getattr(dut.program.beats, name)
        ports["program_denied"] = dut.program.denied
        if self.config.trace:
            ports |= {f"trace_{n}": getattr(dut.trace, n) for n in ("done", "denied", "error")}
            ports |= {"trace_ready": dut.trace.req.ready, "trace_beat": dut.trace.beats.ready}
        for engine in dut.engines:
            port = getattr(dut, port_name(engine))
            ports[f"{engine.name}_ready"] = port.cmd.ready
            for name in ("retire", "stalled", "fault", "fault_code", "fault_address"):
                ports[f"{engine.name}_{name}"] = getattr(port, name)
        return ports

    async def _model(self, ctx):
        """In every cycle, drive all inputs, then see what the coming clock edge will do."""
        ports = self._inputs()
        inputs = Inputs(*ports.values())
        self._driven = dict.fromkeys(ports, 0)
        commands = {e: getattr(self.dut, port_name(e)).cmd for e in self.dut.engines}
        settled: dict[str, int] = {}
        while True:
            self._driven["axi_idle"] = self.axi_idle
            if ctx.get(self.dut.reset):
                for core in self._cores.values():
                    core.clear()
                self._reads.clear()
                self._writes.clear()
            self._drive_program()
            if self.config.trace:
                self._drive_trace()
            for engine in self.dut.engines:
                self._drive_core(engine)
            if self._driven != settled:
                inputs.set(ctx, *self._driven.values())
                settled = dict(self._driven)
            self._take_program(ctx)
            if self.config.trace:
                self._take_trace(ctx)
            for engine, cmd in commands.items():
                if self._driven[f"{engine.name}_ready"] and ctx.get(cmd.valid):
                    self._take_command(engine)
            await ctx.tick()
            self.now += 1
            assert self.now < self.timeout, "the bench has run out of time"

    def _drive_program(self) -> None:
        driven = self._driven
        driven["program_denied"] = 0
        if self._reads and self._reads[0] == "denied":
            self._reads.popleft()
            driven["program_denied"] = 1
        driven["program_ready"] = not self._stalls()
        driven["program_valid"] = 0
        if self._reads and self._reads[0][0] <= self.now and not self._stalls():
            _, at, last = self._reads.popleft()
            size = self.config.beat_bytes
            beat = int.from_bytes(self.dram[at : at + size], "little")
            error = self.bad_read is not None and at <= self.bad_read < at + size
            layout = self.dut.program.beats.payload.shape()
            payload = layout.const({"data": beat, "last": last, "error": error})
            driven |= {"program_valid": 1, "program_payload": payload.as_bits()}

    def _take_program(self, ctx) -> None:
        port = self.dut.program
        if self._driven["program_valid"]:
            assert ctx.get(port.beats.ready), "the fetch unit has asked for more than it can take"
        if self._driven["program_ready"] and ctx.get(port.req.valid):
            at, length = ctx.get(port.req.payload.addr), ctx.get(port.req.payload.bytes)
            assert length > 0
            if at + length > self.limit:
                self._reads.appendleft("denied")
            else:
                size = self.config.beat_bytes
                for a in range(at, at + length, size):
                    self._reads.append((self.now + self.latency, a, a + size >= at + length))

    def _drive_trace(self) -> None:
        driven = self._driven
        driven |= dict.fromkeys(("trace_done", "trace_denied", "trace_error", "trace_beat"), 0)
        blocked = self.trace_blocked
        if self._writes:
            at, left, due = self._writes[0]
            if at >= self.limit:
                driven["trace_denied"] = 1
                self._writes.clear()
            elif left <= 0 and due <= self.now:
                driven |= {"trace_done": 1, "trace_error": self.trace_fails}
                self._writes.clear()
            elif left > 0:
                driven["trace_beat"] = not blocked and not self._stalls()
        driven["trace_ready"] = not self._writes and not blocked

    def _take_trace(self, ctx) -> None:
        port = self.dut.trace
        size = self.config.beat_bytes
        if self._driven["trace_beat"] and ctx.get(port.beats.valid):
            at, left, _ = self._writes[0]
            beat = ctx.get(port.beats.payload.data).to_bytes(size, "little")
            strobe = ctx.get(port.beats.payload.strobe)
            assert strobe == (1 << min(left, size)) - 1
            for i in range(min(left, size)):
                self.dram[at + i] = beat[i]
            self._writes = [(at + size, left - size, self.now + self.latency)]
        if self._driven["trace_ready"] and ctx.get(port.req.valid):
            at, length = ctx.get(port.req.payload.addr), ctx.get(port.req.payload.bytes)
            self._writes = [(at, length, 0)]
            self.trace_requests += 1

    def _drive_core(self, engine: Engine) -> None:
        driven, name, core = self._driven, engine.name, self._cores[engine]
        driven[f"{name}_ready"] = len(core) < self.capacity and not self._stalls()
        retire = stalled = fault = False
        if core:
            index, left, work = core[0]
            if left == 0 and work.fault is not None:
                fault = True
                driven[f"{name}_fault_code"], driven[f"{name}_fault_address"] = work.fault
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
        driven |= {f"{name}_retire": retire, f"{name}_stalled": stalled, f"{name}_fault": fault}

    def _take_command(self, engine: Engine) -> None:
        index = self.next_index[engine].popleft() if hasattr(self, "next_index") else 0
        work = self.work(engine, index)
        self._cores[engine].append((index, work.cycles, work))
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
            fields = dict(wait=wait, signal=signal, present=present)
            fields |= made_legal(command.opcode, {}, self.config)
            out.append(encoder.encode(command.opcode, engine, **fields))
        return [*out, encoder.encode(Opcode.END)]
