"""Fetch, shells, tokens, registers and trace around engines and a DRAM played in Python."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass

import pytest
from amaranth.sim import Simulator

from hw.control import OPCODE_OF, Control, port_name
from hw.interfaces import layout_of
from isa import (
    COMMANDS,
    CSRS,
    DEVICE_ID,
    TRACE_EVENT,
    VERSION,
    Config,
    Engine,
    Fault,
    Irq,
    Opcode,
    Status,
    TraceKind,
    encode,
)
from isa import Control as ControlBits
from isa.csr import CSR_ADDR_BITS, EngineState

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
    """A ``Control`` with dummy cores, program memory and trace memory, all stalling at random."""

    def __init__(self, *, seed: int = 1, latency: int = 6, stall: float = 0.0, **config):
        self.config = Config(**config)
        self.dut = Control(self.config)
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
        simulator = Simulator(self.dut)
        simulator.add_clock(1e-6)
        finished = []

        async def testbench(ctx):
            self.ctx = ctx
            await main(ctx)
            finished.append(True)

        simulator.add_testbench(self._model, background=True)
        simulator.add_testbench(testbench)
        simulator.run()
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

    def expect(self, commands: list[tuple[Engine, int, int]]) -> list[list[int]]:
        """Encode (engine, wait, signal), END added, and remember which index each engine gets."""
        self.next_index = {e: deque() for e in Engine}
        out = []
        for i, (engine, wait, signal) in enumerate(commands):
            self.next_index[engine].append(i)
            out.append(encode(OPCODE_OF[engine], engine, wait=wait, signal=signal))
        return [*out, encode(Opcode.END)]


def random_program(rng: random.Random, count: int) -> list[tuple[Engine, int, int]]:
    """A program legal in program order: every wait is met by an earlier signal."""
    tokens = {(a, b): 0 for a in Engine for b in Engine}
    out = []
    for _ in range(count):
        engine = rng.choice(list(Engine))
        wait = signal = 0
        for other in Engine:
            if tokens[other, engine] and rng.random() < 0.7:
                tokens[other, engine] -= 1
                wait |= 1 << other
        for other in Engine:
            if rng.random() < 0.3:
                tokens[engine, other] += 1
                signal |= 1 << other
        out.append((engine, wait, signal))
    return out


def check_order(program: list[tuple[Engine, int, int]], log: list) -> None:
    """Every command ran once, in its engine's order, after the tokens it took had been given."""
    for kind in TraceKind:
        for engine in Engine:
            ran = [i for _, k, e, i in log if k is kind and e is engine]
            assert ran == [i for i, c in enumerate(program) if c[0] is engine]
    tokens = {(a, b): 0 for a in Engine for b in Engine}
    # A token given in a cycle can be taken in a later one only: starts of a cycle come first.
    for _, kind, engine, index in sorted(log, key=lambda e: (e[0], e[1])):
        _, wait, signal = program[index]
        for other in Engine:
            if kind is TraceKind.START and wait >> other & 1:
                tokens[other, engine] -= 1
                assert tokens[other, engine] >= 0
            if kind is TraceKind.END and signal >> other & 1:
                tokens[engine, other] += 1


@pytest.mark.parametrize(
    ("bits", "stall"), [(32, 0.3), (64, 0.0), (128, 0.0), (128, 0.4), (256, 0.2), (512, 0.3)]
)
def test_random_programs(bits: int, stall: float) -> None:
    """Order, tokens, counters and trace of a random program, run twice without a reset."""
    rng = random.Random(bits)
    program = random_program(rng, 45)
    bench = Bench(
        seed=bits, stall=stall, axi_data_bits=bits, axi_burst_beats=min(64, 32768 // bits)
    )
    work = {i: Work(rng.randrange(1, 25), rng.randrange(0, 8)) for i in range(len(program))}
    bench.work = lambda engine, index: work[index]

    async def main(ctx):
        for _ in range(2):
            bench.log.clear()
            bench.busy = dict.fromkeys(Engine, 0)
            bench.memory = dict.fromkeys(Engine, 0)
            bench.dram[TRACE:] = bytes(DRAM_BYTES - TRACE)
            words = bench.program(*bench.expect(program))
            await bench.start(words, control=ControlBits.TRACE)
            assert await bench.finish() == Status.DONE
            check_order(program, bench.log)
            assert await bench.read("COMMANDS") == len(program)
            assert await bench.read("TRACE_DROPPED") == 0
            assert await bench.read("TRACE_COUNT") == 2 * len(program)

            events = bench.events(2 * len(program))
            skew = bench.log[0][0] - events[0]["cycle"]
            key = lambda e: (e[0], -e[1], e[2])  # noqa: E731
            assert [
                (e["cycle"] + skew, e["kind"], e["engine"], e["index"]) for e in events
            ] == sorted(bench.log, key=key)
            cycles = await bench.read("CYCLES_LO")
            assert await bench.read("CYCLES_HI") == 0
            assert events[-1]["cycle"] < cycles < events[-1]["cycle"] + 200
            for engine in Engine:
                counted = {
                    name: await bench.read(f"{engine.name}_{name}") for name in ("BUSY", "MEMORY")
                }
                assert counted == {"BUSY": bench.busy[engine], "MEMORY": bench.memory[engine]}
                own = [e for e in events if e["engine"] == engine]
                assert bench.memory[engine] == sum(
                    e["stalled"] for e in own if e["kind"] == TraceKind.END
                )
                waits = sum([await bench.read(f"{engine.name}_WAIT_{o.name}") for o in Engine])
                assert waits <= sum(e["waited"] for e in own if e["kind"] == TraceKind.START)
                assert waits + sum(counted.values()) <= cycles
                assert await bench.read(f"{engine.name}_STATE") == EngineState.IDLE
            for e in events:
                if e["kind"] == TraceKind.START:
                    assert bool(e["missing"]) == bool(e["waited"])
                    assert e["missing"] & ~program[e["index"]][1] == 0

    bench.run(main)


def test_waiting_is_measured() -> None:
    """A waiting command starts the cycle after the retirement; its wait is in counter and event."""
    bench = Bench()
    load, conv, post = Engine.LOAD, Engine.CONV, Engine.POST
    program = [
        (load, 0, 1 << conv),
        (post, 0, 1 << conv),
        (conv, 1 << load | 1 << post, 0),
    ]
    bench.work = lambda engine, index: Work(cycles={0: 100, 1: 150, 2: 3}[index])

    async def main(ctx):
        words = bench.program(*bench.expect(program))
        await bench.start(words, control=ControlBits.TRACE)
        await ctx.tick().repeat(80)
        state = await bench.read("CONV_STATE")
        assert state == EngineState.WAITING | (1 << load | 1 << post) << 8 | 2 << 16
        assert await bench.read("LOAD_STATE") == EngineState.BUSY
        assert await bench.read("STATUS") == Status.BUSY
        assert await bench.finish() == Status.DONE
        at = {(kind, index): cycle for cycle, kind, _, index in bench.log}
        assert at[TraceKind.START, 2] == at[TraceKind.END, 1] + 1
        start = next(e for e in bench.events(6) if (e["kind"], e["index"]) == (TraceKind.START, 2))
        assert start["missing"] == 1 << post
        on_load = await bench.read("CONV_WAIT_LOAD")
        on_post = await bench.read("CONV_WAIT_POST")
        assert 50 < on_load < 100 and on_load + on_post == start["waited"]
        assert on_post == at[TraceKind.END, 1] - at[TraceKind.END, 0]
        assert await bench.read("CONV_WAIT_WLOAD") == 0

    bench.run(main)


@pytest.mark.parametrize("latency", [6, 80])
def test_fetch_keeps_up(latency: int) -> None:
    """The longest commands leave the fetch unit every 9 cycles at most, memory latency or not."""
    bench = Bench(latency=latency)
    count = 60
    program = [(Engine.POST, 0, 0)] * count
    bench.work = lambda engine, index: Work(cycles=2)

    async def main(ctx):
        await bench.start(bench.program(*bench.expect(program)))
        assert await bench.finish() == Status.DONE
        starts = [cycle for cycle, kind, _, _ in bench.log if kind is TraceKind.START]
        assert len(starts) == count
        assert (starts[-1] - starts[0]) / (count - 1) <= 9

    bench.run(main)


def test_end_waits_for_the_engines_and_words_after_it_are_ignored() -> None:
    bench = Bench(latency=30)
    bench.work = lambda engine, index: Work(cycles=300)

    async def main(ctx):
        program = bench.expect([(Engine.STORE, 0, 0)])
        for _ in range(2):
            bench.log.clear()
            bench.expect([(Engine.STORE, 0, 0)])
            await bench.start(bench.program(*program, [0] * 200))
            assert await bench.finish() == Status.DONE
            assert [kind for _, kind, _, _ in bench.log] == [TraceKind.START, TraceKind.END]
            assert await bench.read("CYCLES_LO") > 300

    bench.run(main)


NOP = encode(Opcode.LOAD)
END = encode(Opcode.END)


@pytest.mark.parametrize(
    ("commands", "index"),
    [
        ([NOP, [0], END], 1),
        ([NOP, NOP, [15], END], 2),
        ([[Opcode.CONV | Engine.STORE << 4, 0, 0, 0, 0], END], 0),
        ([[Opcode.LOAD | 9 << 4, 0, 0, 0], END], 0),
        ([encode(Opcode.WINDOW), END], 0),
        ([NOP, encode(Opcode.STORE, wait=1 << Engine.WINDOW), END], 1),
        ([NOP, encode(Opcode.STORE, signal=0x80), END], 1),
        ([NOP, NOP], 2),
        ([NOP, NOP[:2]], 1),
        ([], 0),
    ],
)
def test_illegal_commands(commands: list[list[int]], index: int) -> None:
    bench = Bench(window=False)

    async def main(ctx):
        await bench.start(bench.program(*commands))
        assert await bench.fault() == (Fault.ILLEGAL_COMMAND, index, 15)
        await bench.soft_reset()
        assert await bench.read("FAULT_CODE") == Fault.NONE
        await bench.start(bench.program(NOP, END))
        assert await bench.finish() == Status.DONE

    bench.run(main)


def test_window_engine_registers_read_zero_without_the_engine() -> None:
    bench = Bench(window=False, trace=False)

    async def main(ctx):
        await bench.start(bench.program(NOP, END))
        assert await bench.finish() == Status.DONE
        for name in ("WINDOW_STATE", "WINDOW_BUSY", "WINDOW_WAIT_STORE", "TRACE_COUNT"):
            assert await bench.read(name) == 0
        assert await bench.read("LOAD_BUSY") == bench.busy[Engine.LOAD]

    bench.run(main)


def test_a_failing_core_stops_the_machine() -> None:
    """The fault is reported once, nothing more starts, and a soft reset makes all well."""
    bench = Bench()
    program = [
        (Engine.LOAD, 0, 1 << Engine.CONV),
        (Engine.LOAD, 0, 0),
        (Engine.STORE, 0, 0),
        (Engine.STORE, 1 << Engine.STORE, 0),
        (Engine.CONV, 1 << Engine.LOAD, 0),
    ]
    bench.work = lambda engine, index: {
        1: Work(40, fault=(Fault.AXI_READ, 0x1234)),
        2: Work(80, fault=(Fault.AXI_WRITE, 0x99)),
    }.get(index, Work(20))

    async def main(ctx):
        await bench.start(bench.program(*bench.expect(program)), control=ControlBits.TRACE)
        assert await bench.fault() == (Fault.AXI_READ, 1, Engine.LOAD)
        assert await bench.read("FAULT_ADDRESS") == 0x1234
        await ctx.tick().repeat(100)
        assert await bench.read("FAULT_CODE") == Fault.AXI_READ
        # The trace up to the fault is in memory.
        count = await bench.read("TRACE_COUNT")
        assert count == len(bench.log) == len(bench.events(count))
        before = list(bench.log)
        await bench.write("CONTROL", ControlBits.START)
        await ctx.tick().repeat(100)
        assert await bench.read("STATUS") == Status.FAULT
        assert bench.log == before
        await bench.soft_reset()
        assert await bench.read("FAULT_ENGINE") == 15
        bench.log.clear()
        bench.work = lambda engine, index: Work()
        program.pop(3)
        await bench.start(bench.program(*bench.expect(program)))
        assert await bench.finish() == Status.DONE
        check_order(program, bench.log)

    bench.run(main)


def test_nothing_starts_after_a_fault() -> None:
    bench = Bench()
    bench.capacity = 1
    program = [(Engine.LOAD, 0, 1 << Engine.CONV), (Engine.POST, 0, 0), (Engine.CONV, 1, 0)]
    bench.work = lambda engine, index: {
        0: Work(60),
        1: Work(30, fault=(Fault.DRAM_WINDOW, 4)),
    }.get(index, Work())

    async def main(ctx):
        await bench.start(bench.program(*bench.expect(program)))
        assert await bench.fault() == (Fault.DRAM_WINDOW, 1, Engine.POST)
        await ctx.tick().repeat(100)
        ran = [(kind, index) for _, kind, _, index in bench.log]
        assert (TraceKind.END, 0) in ran and (TraceKind.START, 2) not in ran

    bench.run(main)


def test_program_outside_the_window() -> None:
    bench = Bench()
    bench.limit = PROGRAM + 256

    async def main(ctx):
        program = bench.expect([(Engine.WLOAD, 0, 0)] * 20)
        await bench.start(bench.program(*program))
        assert await bench.fault() == (Fault.DRAM_WINDOW, 8, 15)
        assert await bench.read("FAULT_ADDRESS") == PROGRAM + 256

    bench.run(main)


@pytest.mark.parametrize(("bits", "word"), [(32, 33), (64, 32), (64, 33), (128, 33), (512, 33)])
def test_program_read_error(bits: int, word: int) -> None:
    """An error in any word of command 8 is that command's; those before it run."""
    bench = Bench(axi_data_bits=bits)
    bench.bad_read = PROGRAM + 8 * word

    async def main(ctx):
        program = bench.expect([(Engine.WLOAD, 0, 0)] * 20)
        await bench.start(bench.program(*program))
        assert await bench.fault() == (Fault.AXI_READ, 8, 15)
        size = bits // 8
        assert await bench.read("FAULT_ADDRESS") == bench.bad_read // size * size

    bench.run(main)


def test_token_overflow() -> None:
    bench = Bench()
    bench.work = lambda engine, index: Work(cycles=1)

    async def main(ctx):
        fine = [(Engine.STORE, 0, 1 << Engine.CONV)] * 255
        await bench.start(bench.program(*bench.expect(fine)))
        assert await bench.finish() == Status.DONE
        # START takes leftover tokens away; one more is one too many.
        await bench.start(bench.program(*bench.expect([(Engine.LOAD, 0, 0), *fine, fine[0]])))
        assert await bench.fault() == (Fault.TOKEN_OVERFLOW, 256, Engine.STORE)

    bench.run(main)


def test_watchdog() -> None:
    bench = Bench()
    program = [(Engine.LOAD, 0, 0), (Engine.CONV, 1 << Engine.POST, 0), (Engine.LOAD, 0, 0)]
    bench.work = lambda engine, index: Work(cycles=100)

    async def main(ctx):
        await bench.start(bench.program(*bench.expect(program)), WATCHDOG=150)
        assert await bench.fault() == (Fault.WATCHDOG, 3, 15)
        cycles = await bench.read("CYCLES_LO")
        ends = [c for c, kind, _, _ in bench.log if kind is TraceKind.END]
        assert len(ends) == 2 and 350 < cycles < 400
        await bench.soft_reset()
        # The deadlock is the program's; without a watchdog it lasts.
        await bench.start(bench.program(*bench.expect(program)), WATCHDOG=0)
        await ctx.tick().repeat(1000)
        assert await bench.read("STATUS") == Status.BUSY
        await bench.soft_reset()

    bench.run(main)


def test_soft_reset_in_the_middle() -> None:
    """It waits for the AXI managers, forgets queues, tokens and commands in flight."""
    bench = Bench(stall=0.2, latency=20)
    program = [(Engine.LOAD, 0, 1 << Engine.CONV)] * 3 + [(Engine.CONV, 1 << Engine.LOAD, 0)] * 2
    bench.work = lambda engine, index: Work(cycles=30)

    async def main(ctx):
        for delay in range(1, 200, 23):
            words = bench.program(*bench.expect(program))
            await bench.start(words, control=ControlBits.TRACE)
            await ctx.tick().repeat(delay)
            bench.axi_idle = False
            await bench.write("CONTROL", ControlBits.SOFT_RESET | ControlBits.START)
            await ctx.tick().repeat(20)
            assert ctx.get(bench.dut.drain) and not ctx.get(bench.dut.reset)
            assert await bench.read("CONTROL") & ControlBits.SOFT_RESET
            bench.axi_idle = True
            while await bench.read("CONTROL") & ControlBits.SOFT_RESET:
                pass
            assert await bench.read("STATUS") == 0
            assert await bench.read("PROGRAM_WORDS") == words
            await bench.write("IRQ", Irq.DONE)
            bench.log.clear()
            bench.expect(program)
            await bench.start(words)
            assert await bench.finish() == Status.DONE
            check_order(program, bench.log)

    bench.run(main)


def test_trace_off_writes_nothing() -> None:
    bench = Bench()

    async def main(ctx):
        await bench.start(bench.program(*bench.expect([(Engine.LOAD, 0, 0)] * 9)))
        assert await bench.finish() == Status.DONE
        assert await bench.read("TRACE_COUNT") == await bench.read("TRACE_DROPPED") == 0
        assert bench.trace_requests == 0

    bench.run(main)


@pytest.mark.parametrize("bits", [64, 256])
def test_trace_buffer_full(bits: int) -> None:
    bench = Bench(axi_data_bits=bits)

    async def main(ctx):
        count, room = 20, 13
        await bench.start(
            bench.program(*bench.expect([(Engine.LOAD, 0, 0)] * count)),
            control=ControlBits.TRACE,
            events=room,
        )
        assert await bench.finish() == Status.DONE
        assert await bench.read("TRACE_COUNT") == room
        assert await bench.read("TRACE_DROPPED") == 2 * count - room
        assert not any(bench.dram[TRACE + 16 * room :])
        events = bench.events(room)
        assert [(e["kind"], e["index"]) for e in events] == [
            (k, i) for _, k, _, i in sorted(bench.log, key=lambda e: (e[0], -e[1]))[:room]
        ]

    bench.run(main)


def test_trace_queue_full() -> None:
    """While the bus is blocked, 64 events and more are kept; what is lost is counted."""
    bench = Bench()
    bench.trace_blocked = True
    bench.work = lambda engine, index: Work(cycles=1)
    count = 70

    async def main(ctx):
        program = [(Engine(i % 2 * 5), 0, 0) for i in range(count)]
        await bench.start(bench.program(*bench.expect(program)), control=ControlBits.TRACE)
        while len(bench.log) < 2 * count:
            await ctx.tick()
        await ctx.tick().repeat(20)
        assert await bench.read("STATUS") == Status.BUSY
        bench.trace_blocked = False
        assert await bench.finish() == Status.DONE
        kept, dropped = await bench.read("TRACE_COUNT"), await bench.read("TRACE_DROPPED")
        assert kept >= 64 and dropped > 0 and kept + dropped == 2 * count
        assert bench.trace_requests <= kept // 8 + 1
        cycles = [e["cycle"] for e in bench.events(kept)]
        assert cycles == sorted(cycles) and all(e["kind"] for e in bench.events(kept))

    bench.run(main)


@pytest.mark.parametrize("denied", [False, True])
def test_trace_that_cannot_be_written_is_a_fault(denied: bool) -> None:
    bench = Bench()
    bench.trace_fails = not denied
    if denied:
        bench.limit = TRACE

    async def main(ctx):
        program = bench.expect([(Engine.LOAD, 0, 0)] * 9)
        await bench.start(bench.program(*program), control=ControlBits.TRACE)
        code, _, engine = await bench.fault()
        assert (code, engine) == (Fault.DRAM_WINDOW if denied else Fault.AXI_WRITE, 15)
        assert await bench.read("FAULT_ADDRESS") == TRACE

    bench.run(main)


def test_registers() -> None:
    bench = Bench()

    async def main(ctx):
        bus = bench.dut.s_axil
        assert await bench.read("ID") == DEVICE_ID
        assert await bench.read("VERSION") == VERSION
        assert await bench.read("CONFIG_HASH") == bench.config.hash
        assert await bench.read("FAULT_ENGINE") == 15
        await bench.write("WATCHDOG", 0x11223344)
        await bench.write("WATCHDOG", 0xAABBCCDD, strobe=0b0110)
        assert await bench.read("WATCHDOG") == 0x11BBCC44
        await bench.write("ID", 0)
        assert await bench.read("ID") == DEVICE_ID
        for name, kept in (("PROGRAM", 0xFFFFFFC0), ("DRAM_BASE_LO", 0xFFFFF000)):
            await bench.write(name, 0xFFFFFFFF)
            assert await bench.read(name) == kept
        await bench.write("DRAM_BASE_HI", 0x12)
        assert ctx.get(bench.dut.base) == 0x12_FFFF_F000
        await bench.write("CONTROL", ControlBits.TRACE)
        assert await bench.read("CONTROL") == ControlBits.TRACE
        # Without IRQ_ENABLE the line stays low, though the bit is set.
        await bench.write("PROGRAM_WORDS", 0)
        await bench.write("CONTROL", ControlBits.START)
        await ctx.tick().repeat(40)
        assert await bench.read("IRQ") == Irq.FAULT and not ctx.get(bench.dut.irq)
        await bench.write("CONTROL", ControlBits.IRQ_ENABLE)
        await ctx.tick()
        assert ctx.get(bench.dut.irq)
        await bench.write("IRQ", Irq.DONE)
        assert await bench.read("IRQ") == Irq.FAULT
        await bench.write("IRQ", Irq.FAULT)
        assert await bench.read("IRQ") == 0

        ctx.set(bus.araddr, (1 << CSR_ADDR_BITS) - 4)
        ctx.set(bus.arvalid, 1)
        await ctx.tick().until(bus.arready)
        ctx.set(bus.arvalid, 0)
        (response,) = await ctx.tick().sample(bus.rresp).until(bus.rvalid)
        assert response == 2

    bench.run(main)


def test_every_command_reaches_its_core_unchanged() -> None:
    """Random field values of every kind of command arrive as they were encoded."""
    rng = random.Random(5)
    bench = Bench(axi_data_bits=64)
    sent, got = [], []

    async def main(ctx):
        words = []
        for _ in range(4):
            for command in COMMANDS.values():
                for engine in command.engines:
                    values = {f.name: rng.randint(f.low, f.high) for f in command.own_fields}
                    sent.append((engine, values))
                    words.append(encode(command.opcode, engine, **values))
        await bench.start(bench.program(*words, END))
        done = False
        while not done:
            for engine in Engine:
                port = getattr(bench.dut, port_name(engine)).cmd
                if ctx.get(port.valid) and ctx.get(port.ready):
                    fields = COMMANDS[OPCODE_OF[engine]].own_fields
                    got.append((engine, {f.name: ctx.get(port.payload[f.name]) for f in fields}))
            await ctx.tick()
            done = ctx.get(bench.dut.irq)
        for engine in Engine:
            assert [v for e, v in got if e is engine] == [v for e, v in sent if e is engine]

    bench.run(main)
