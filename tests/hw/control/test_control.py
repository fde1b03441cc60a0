"""Fetch, shells, tokens, registers and trace, in the bench of ``control_bench``."""

from __future__ import annotations

import random

import numpy as np
import pytest

from systole.hw.control.control import OPCODE_OF, port_name
from systole.isa import (
    COMMANDS,
    CSRS,
    DEVICE_ID,
    VERSION,
    Encoder,
    Engine,
    Fault,
    Irq,
    Opcode,
    Status,
    TraceKind,
    encode,
)
from systole.isa import Control as ControlBits
from systole.isa.csr import CSR_ADDR_BITS, EngineState
from tests.helpers.control_bench import DRAM_BYTES, PROGRAM, TRACE, Bench, Work
from tests.helpers.legal_commands import broken_fields, made_legal, random_fields


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


@pytest.mark.parametrize(("complete", "most"), [(True, 7), (False, 3)])
@pytest.mark.parametrize("latency", [6, 80])
def test_fetch_keeps_up(latency: int, complete: bool, most: int) -> None:
    """A command leaves the fetch unit in as many cycles as it has words in the stream, memory
    latency or not; a core of the bench takes 3."""
    bench = Bench(latency=latency)
    count = 60
    program = [(Engine.POST, 0, 0)] * count
    bench.work = lambda engine, index: Work(cycles=2)

    async def main(ctx):
        await bench.start(bench.program(*bench.expect(program, complete=complete)))
        assert await bench.finish() == Status.DONE
        starts = [cycle for cycle, kind, _, _ in bench.log if kind is TraceKind.START]
        assert len(starts) == count
        assert (starts[-1] - starts[0]) / (count - 1) <= most + 0.1

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


NOP = encode(Opcode.LOAD, count0=1, count1=1, count2=1)
AGAIN = encode(Opcode.LOAD, present=0)[:1]
END = encode(Opcode.END)


@pytest.mark.parametrize(
    ("commands", "index"),
    [
        ([NOP, [0], END], 1),
        ([NOP, NOP, [7 | 3 << 18], END], 2),
        ([[NOP[0] ^ Engine.CONV << 3, 0, 0, 0], END], 0),
        ([[NOP[0] | 7 << 3, 0, 0, 0], END], 0),
        ([encode(Opcode.WINDOW), END], 0),
        ([NOP, encode(Opcode.STORE, wait=1 << Engine.WINDOW), END], 1),
        ([NOP, encode(Opcode.STORE, signal=1 << Engine.WINDOW), END], 1),
        ([NOP, NOP], 2),
        ([NOP, NOP[:2]], 1),
        ([], 0),
        ([AGAIN, END], 0),
        ([NOP, [AGAIN[0] | Engine.WLOAD << 3], END], 1),
        ([NOP, AGAIN, encode(Opcode.STORE, present=3)[:3], END], 2),
        ([NOP, AGAIN, [AGAIN[0] | 1 << 21, 0], END], 2),
        ([NOP, AGAIN, [END[0] | 1 << 18, 0], END], 2),
        ([NOP, AGAIN, NOP[:3]], 2),
    ],
)
def test_illegal_commands(commands: list[list[int]], index: int) -> None:
    bench = Bench(window=False)

    async def main(ctx):
        await bench.start(bench.program(*commands))
        assert await bench.fault() == (Fault.ILLEGAL_COMMAND, index, 15)
        await bench.soft_reset()
        assert await bench.read("FAULT_CODE") == Fault.NONE
        # Nothing is kept over the reset, and nothing over a start.
        for _ in range(2):
            await bench.start(bench.program(NOP, AGAIN, END))
            assert await bench.finish() == Status.DONE
            await bench.start(bench.program(AGAIN, END))
            assert await bench.fault() == (Fault.ILLEGAL_COMMAND, 0, 15)
            await bench.soft_reset()

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


def test_the_engines_counters_read_zero_without_counters() -> None:
    """All else is counted and traced as with them."""
    program = [(Engine.LOAD, 0, 1 << Engine.CONV), (Engine.CONV, 1 << Engine.LOAD, 0)]
    found = {}
    for counters in (False, True):
        bench = Bench(counters=counters)
        bench.work = lambda engine, index: Work(cycles=40, stalled=5)

        async def main(ctx, bench=bench, counters=counters):
            await bench.start(bench.program(*bench.expect(program)), control=ControlBits.TRACE)
            assert await bench.finish() == Status.DONE
            read = {name: await bench.read(name) for name in CSRS if name != "CONFIG_HASH"}
            first = list(read).index("LOAD_BUSY")
            engines = {name: read.pop(name) for name in list(read)[first:]}
            assert len(engines) == 8 * len(Engine)
            assert any(engines.values()) == counters
            assert read["COMMANDS"] == 2 and read["CYCLES_LO"] > 80
            found[counters] = read, bench.events(4)

        bench.run(main)
    assert found[False] == found[True]


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
        program = bench.expect([(Engine.WLOAD, 0, 0)] * 20, complete=True)
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
        program = bench.expect([(Engine.WLOAD, 0, 0)] * 20, complete=True)
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


@pytest.mark.parametrize("engine", [e for e in Engine if e is not Engine.WLOAD])
def test_illegal_fields(engine: Engine) -> None:
    """A command with a field that breaks a limit never reaches its core, whether it comes complete
    or only with the words that change; those before it do. Each field once; the tests of the
    system have more."""
    bench = Bench(axi_data_bits=64, scratchpad_bytes=1 << 18, rows=8, cols=4)
    rng, opcode = np.random.default_rng(engine), OPCODE_OF[engine]
    legal = random_fields(rng, opcode, bench.config)
    cases = dict(broken_fields(rng, opcode, bench.config, legal))

    async def main(ctx):
        for i, (name, values) in enumerate(cases.items()):
            bench.log.clear()
            bench.expect([(engine, 0, 0)])
            encoder = Encoder()
            words = [encoder.encode(opcode, engine, **legal)]
            before = made_legal(opcode, values, bench.config)
            if i % 2:
                words.append(encoder.encode(opcode, engine, **before))
                bench.expect([(engine, 0, 0)] * 2)
            complete = COMMANDS[opcode].complete if i % 3 else None
            words.append(encoder.encode(opcode, engine, present=complete, **values))
            await bench.start(bench.program(*words, END))
            index = len(words) - 1
            assert await bench.fault() == (Fault.ILLEGAL_FIELD, index, engine), (name, values)
            assert await bench.read("FAULT_ADDRESS") == 0
            ran = [index for _, kind, _, index in bench.log if kind is TraceKind.END]
            assert ran == list(range(index)) and len(bench.log) == 2 * index
            await bench.soft_reset()
        await bench.start(bench.program(*bench.expect([(engine, 0, 0)]), END))
        assert await bench.finish() == Status.DONE

    bench.run(main, cycles=200_000)


def test_an_illegal_field_is_reported_in_its_turn() -> None:
    """After the tokens it waits for have come and all before it has ended: what goes wrong earlier
    in the program goes first."""
    bench = Bench()
    fields = made_legal(Opcode.LOAD, {}, bench.config)
    bad = fields | {"count1": 0}

    def program(wait: int) -> int:
        bench.expect([(Engine.LOAD, 0, 0), (Engine.POST, 0, 0)])
        post = made_legal(Opcode.POST, {}, bench.config)
        return bench.program(
            encode(Opcode.LOAD, **fields),
            encode(Opcode.POST, signal=1 << Engine.LOAD, **post),
            encode(Opcode.LOAD, wait=wait, **bad),
            END,
        )

    async def main(ctx):
        for load, post in ((60, 5), (5, 60)):
            bench.log.clear()
            bench.work = lambda engine, index: Work(cycles=(load, post)[index])  # noqa: B023
            await bench.start(program(1 << Engine.POST))
            assert await bench.fault() == (Fault.ILLEGAL_FIELD, 2, Engine.LOAD)
            assert [index for _, k, _, index in bench.log if k is TraceKind.END] in ([0, 1], [1, 0])
            await bench.soft_reset()
        bench.work = lambda engine, index: Work(
            60, fault=(Fault.AXI_READ, 4) if not index else None
        )
        await bench.start(program(0))
        assert await bench.fault() == (Fault.AXI_READ, 0, Engine.LOAD)
        await bench.soft_reset()
        bench.work = lambda engine, index: Work()
        await bench.start(program(1 << Engine.STORE), WATCHDOG=100)
        assert await bench.fault() == (Fault.WATCHDOG, 3, 15)
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
    """Random field values of every kind of command arrive as they were encoded, some of them words
    of the engine's last command."""
    rng = random.Random(5)
    bench = Bench(axi_data_bits=64)
    sent, got = [], []

    async def main(ctx):
        words, encoder, last = [], Encoder(), {}
        for _ in range(8):
            for command in COMMANDS.values():
                for engine in command.engines:
                    values = {f.name: rng.randint(f.low, f.high) for f in command.own_fields}
                    for name in rng.sample(list(values), rng.randrange(len(values) + 1)):
                        values[name] = last.get(engine, values)[name]
                    values = made_legal(command.opcode, values, bench.config)
                    sent.append((engine, values))
                    words.append(encoder.encode(command.opcode, engine, **values))
                    last[engine] = values
        assert len({len(w) for w in words}) > 5
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
