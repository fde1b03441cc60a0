"""Benches of the whole accelerator on the simulator device, through the driver.

A bench is a function of a device and a random generator; its docstring says what it checks. It
fails with an exception. :mod:`sim.benches.regress` runs all in ``BENCHES``."""

from __future__ import annotations

import dataclasses
import random

from systole.isa import Config, Engine, Fault, LoadTarget, Opcode, TraceKind, encode
from systole.isa.csr import TOKEN_BITS, EngineState
from systole.isa.trace import TRACE_EVENT_BYTES
from systole.sim.benches.programs import BenchProgram, assemble, round_trip
from systole.sim.device import MemoryModel, RtlDevice
from systole.sw.runtime.driver import DeviceFault, Driver

BASE = 0x1_0000
WATCHDOG = 20_000
TIMEOUT = 400_000


def memory_models(device: RtlDevice, rng: random.Random) -> None:
    """LOAD to STORE round trips with a plain, a slow and a hostile memory; the same program
    twice."""
    driver = Driver(device, base=BASE)
    models = [
        MemoryModel(),
        MemoryModel(read_latency=300, write_latency=200, rate_beats=1, rate_cycles=3),
        *(MemoryModel.hostile(rng.getrandbits(32)) for _ in range(3)),
    ]
    for model in models:
        device.set_memory_model(model)
        device.reset()
        program = round_trip(device.config, rng, copies=4)
        for _ in range(2):
            _run(driver, program)


def trace(device: RtlDevice, rng: random.Random) -> None:
    """Trace events: a START and an END of every command, in causal order, none lost; and a trace
    buffer that is too small, which loses events, counts them, and overwrites nothing."""
    device.set_memory_model(MemoryModel.hostile(rng.getrandbits(32)))
    driver = Driver(device, base=BASE)
    program = round_trip(device.config, rng, copies=5)
    cycles = _run(driver, program, trace_events=100)
    events = driver.trace()
    assert len(events) == 2 * program.commands and driver.read("TRACE_DROPPED") == 0
    assert list(events["cycle"]) == sorted(events["cycle"]) and events["cycle"][-1] <= cycles
    # All commands of this program depend on each other, so they end one after the other.
    assert list(events["index"]) == [i // 2 for i in range(2 * program.commands)]
    assert list(events["kind"]) == [TraceKind.START, TraceKind.END] * program.commands
    assert set(events["engine"][2::4]) == {Engine.STORE}
    # The buffer lies at the next multiple of 64 bytes behind the program.
    guard = BASE + -(-len(program.image) // 64) * 64 + 3 * TRACE_EVENT_BYTES
    device.write_memory(guard, b"\xa5" * 256)
    _run(driver, program, trace_events=3)
    assert len(driver.trace()) == 3
    assert driver.read("TRACE_DROPPED") == 2 * program.commands - 3
    assert device.read_memory(guard, 256) == b"\xa5" * 256


def faults(device: RtlDevice, rng: random.Random) -> None:
    """Every fault: reported with code, command, engine and address; nothing is written outside the
    window; after the soft reset the next program runs."""
    driver = Driver(device, base=BASE)
    vector = device.config.vector_bytes
    good = round_trip(device.config, rng, copies=2)
    size = 1 << 16
    load = {"count0": 4, "count1": 1, "count2": 1, "target": LoadTarget.SCRATCHPAD}
    store = {"count0": 4, "count1": 1, "count2": 1}
    token = {"signal": 1 << Engine.STORE}
    wait = {"wait": 1 << Engine.LOAD}
    first = encode(Opcode.LOAD, **load, **token)
    second = encode(Opcode.STORE, dram=1024, **store, **wait)
    bad_engine = list(first)
    bad_engine[0] |= Engine.CONV << 3
    at, beyond = 4096, size - 2 * vector
    error = {"error_first": BASE + at, "error_last": BASE + at}
    many = [encode(Opcode.LOAD, **load, **token)] * ((1 << TOKEN_BITS) + 1)
    cases = [
        ("illegal opcode", [first, second, [0]], Fault.ILLEGAL_COMMAND, 2, None, None, {}),
        ("illegal engine", [first, bad_engine], Fault.ILLEGAL_COMMAND, 1, None, None, {}),
        (
            "LOAD beyond the window",
            [first, second, encode(Opcode.LOAD, dram=beyond, **load)],
            *(Fault.DRAM_WINDOW, 2, Engine.LOAD, beyond, {}),
        ),
        (
            "STORE beyond the window",
            [first, encode(Opcode.STORE, dram=beyond, **store, **wait)],
            *(Fault.DRAM_WINDOW, 1, Engine.STORE, beyond, {}),
        ),
        (
            "error on a read",
            [first, second, encode(Opcode.LOAD, dram=at, **load)],
            *(Fault.AXI_READ, 2, Engine.LOAD, at, error | {"error_read": True}),
        ),
        (
            "error on a read, DECERR",
            [encode(Opcode.LOAD, Engine.WLOAD, dram=at, **load)],
            *(Fault.AXI_READ, 0, Engine.WLOAD, at),
            error | {"error_read": True, "error_response": 3},
        ),
        (
            "error on a write",
            [first, encode(Opcode.STORE, dram=at, **store, **wait)],
            *(Fault.AXI_WRITE, 1, Engine.STORE, at, error | {"error_write": True}),
        ),
        ("watchdog", [first, second, second], Fault.WATCHDOG, None, None, None, {}),
        ("token overflow", many, Fault.TOKEN_OVERFLOW, None, None, None, {}),
    ]
    for name, commands, code, index, engine, address, knobs in cases:
        plain = MemoryModel.hostile(rng.getrandbits(32))
        device.set_memory_model(dataclasses.replace(plain, **knobs))
        outside = rng.randbytes(256)
        # Commands lie behind the data, so that no error hits the fetch unit.
        image, offset, words = assemble(commands, bytearray(8192))
        driver.load(image, command_offset=offset, command_words=words, memory_bytes=size)
        device.write_memory(BASE + size, outside)
        try:
            driver.run(watchdog=WATCHDOG, timeout_cycles=TIMEOUT)
        except DeviceFault as fault:
            assert fault.name == code.name, f"{name}: {fault}"
            assert index is None or fault.index == index, f"{name}: {fault}"
            assert engine is None or fault.engine == engine, f"{name}: {fault}"
            assert address is None or _same_burst(fault.address, address, device.config), (
                f"{name}: {fault}"
            )
            if code == Fault.WATCHDOG:
                report = fault.engines[Engine.STORE]
                assert report.state == EngineState.WAITING, str(fault)
                assert report.missing == (Engine.LOAD,) and report.head == 2, str(fault)
        else:
            raise AssertionError(f"{name}: no fault")
        assert driver.read("FAULT_CODE") == 0 and driver.read("IRQ") == 0, name
        assert device.read_memory(BASE + size, 256) == outside, name
        device.set_memory_model(plain)
        _run(driver, good)


def soft_reset_at_any_time(device: RtlDevice, rng: random.Random) -> None:
    """A running program stopped by a soft reset after a random number of cycles, AXI transfers in
    flight: the reset ends, the bus stays legal, the next program runs."""
    driver = Driver(device, base=BASE)
    program = round_trip(device.config, rng, copies=4)
    for _ in range(12):
        device.set_memory_model(MemoryModel.hostile(rng.getrandbits(32)))
        driver.load(
            program.image,
            command_offset=program.command_offset,
            command_words=program.command_words,
            memory_bytes=len(program.image),
        )
        try:
            driver.run(timeout_cycles=rng.randrange(1, 1500))
        except DeviceFault as fault:
            assert fault.name == "TIMEOUT", str(fault)
        _run(driver, program)


def _run(driver: Driver, program: BenchProgram, *, trace_events: int = 0) -> int:
    """Run ``program``, compare all of its memory; the cycles it took."""
    driver.load(
        program.image,
        command_offset=program.command_offset,
        command_words=program.command_words,
        memory_bytes=len(program.image),
    )
    cycles = driver.run(watchdog=WATCHDOG, timeout_cycles=TIMEOUT, trace_events=trace_events)
    assert driver.read_data(0, len(program.expected)) == program.expected
    assert (
        driver.read_data(len(program.expected), len(program.image) - len(program.expected))
        == (program.image[len(program.expected) :])
    ), "the commands were overwritten"
    assert driver.counters()["COMMANDS"] == program.commands
    return cycles


def _same_burst(reported: int, address: int, config: Config) -> bool:
    """A fault's address may be that of the transfer, its burst or its beat."""
    return abs(reported - address) < config.axi_burst_beats * config.beat_bytes


BENCHES = (memory_models, trace, faults, soft_reset_at_any_time)
