"""Benches of the whole accelerator on the simulator device, through the driver.

A bench is a function of a device and a random generator; its docstring says what it checks. It
fails with an exception. :mod:`sim.benches.suite` runs all in ``BENCHES``.
"""

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
ERROR_AT = 4096
"""Address in the DRAM window of the beat on which the memory reports an error."""


def memory_models(device: RtlDevice, rng: random.Random) -> None:
    """Round trips from LOAD to STORE with a plain, a slow and a hostile memory, each program
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
    """The trace has a START and an END of every command, in causal order. A trace buffer that is
    too small loses events, counts them, and overwrites nothing."""
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class FaultCase:
    """A program that fails: the fault's code and, where they are certain, its command, engine and
    address. The memory answers beats at ``ERROR_AT`` with ``response`` as the flags say."""

    name: str
    commands: list[list[int]]
    code: Fault
    index: int | None = None
    engine: Engine | None = None
    address: int | None = None
    error_read: bool = False
    error_write: bool = False
    response: int = 2
    """2: SLVERR, 3: DECERR."""

    def memory(self, plain: MemoryModel) -> MemoryModel:
        """``plain`` with the errors of this case."""
        return dataclasses.replace(
            plain,
            error_first=BASE + ERROR_AT,
            error_last=BASE + ERROR_AT,
            error_response=self.response,
            error_read=self.error_read,
            error_write=self.error_write,
        )

    def check(self, fault: DeviceFault, config: Config) -> None:
        """Assert that ``fault`` is the one expected."""
        where = f"{self.name}: {fault}"
        assert fault.name == self.code.name, where
        assert self.index is None or fault.index == self.index, where
        assert self.engine is None or fault.engine == self.engine, where
        assert self.address is None or _same_burst(fault.address, self.address, config), where


def _illegal_cases(load: list[int], store: list[int], no_runs: list[int]) -> list[FaultCase]:
    """Illegal commands; ``load`` and ``store`` are legal, ``no_runs`` is a load with a field out of
    its limits."""
    bad_engine = [load[0] | Engine.CONV << 3, *load[1:]]
    return [
        FaultCase(
            name="illegal opcode",
            commands=[load, store, [0]],
            code=Fault.ILLEGAL_COMMAND,
            index=2,
        ),
        FaultCase(
            name="illegal engine",
            commands=[load, bad_engine],
            code=Fault.ILLEGAL_COMMAND,
            index=1,
        ),
        FaultCase(
            name="illegal field",
            commands=[load, store, no_runs],
            code=Fault.ILLEGAL_FIELD,
            index=2,
            engine=Engine.LOAD,
            address=0,
        ),
    ]


def _fault_cases(beyond: int) -> list[FaultCase]:
    """A case of every fault. Transfers at ``beyond`` leave the DRAM window."""
    shape = {"count0": 4, "count1": 1, "count2": 1}

    def load(dram: int = 0, engine: Engine = Engine.LOAD, runs: int = 1) -> list[int]:
        fields = shape | {"target": LoadTarget.SCRATCHPAD, "dram": dram, "count1": runs}
        return encode(Opcode.LOAD, engine, signal=1 << Engine.STORE, **fields)

    def store(dram: int) -> list[int]:
        return encode(Opcode.STORE, Engine.STORE, dram=dram, wait=1 << Engine.LOAD, **shape)

    first, second = load(), store(1024)
    return [
        *_illegal_cases(first, second, load(runs=0)),
        FaultCase(
            name="LOAD beyond the window",
            commands=[first, second, load(beyond)],
            code=Fault.DRAM_WINDOW,
            index=2,
            engine=Engine.LOAD,
            address=beyond,
        ),
        FaultCase(
            name="STORE beyond the window",
            commands=[first, store(beyond)],
            code=Fault.DRAM_WINDOW,
            index=1,
            engine=Engine.STORE,
            address=beyond,
        ),
        FaultCase(
            name="error on a read",
            commands=[first, second, load(ERROR_AT)],
            code=Fault.AXI_READ,
            index=2,
            engine=Engine.LOAD,
            address=ERROR_AT,
            error_read=True,
        ),
        FaultCase(
            name="error on a read, DECERR",
            commands=[load(ERROR_AT, Engine.WLOAD)],
            code=Fault.AXI_READ,
            index=0,
            engine=Engine.WLOAD,
            address=ERROR_AT,
            error_read=True,
            response=3,
        ),
        FaultCase(
            name="error on a write",
            commands=[first, store(ERROR_AT)],
            code=Fault.AXI_WRITE,
            index=1,
            engine=Engine.STORE,
            address=ERROR_AT,
            error_write=True,
        ),
        FaultCase(name="watchdog", commands=[first, second, second], code=Fault.WATCHDOG),
        FaultCase(
            name="token overflow",
            commands=[first] * ((1 << TOKEN_BITS) + 1),
            code=Fault.TOKEN_OVERFLOW,
        ),
    ]


def faults(device: RtlDevice, rng: random.Random) -> None:
    """Every fault is reported with its code, command, engine and address; nothing is written
    outside the window; after the soft reset the next program runs."""
    driver = Driver(device, base=BASE)
    good = round_trip(device.config, rng, copies=2)
    size = 1 << 16
    for case in _fault_cases(size - 2 * device.config.vector_bytes):
        plain = MemoryModel.hostile(rng.getrandbits(32))
        device.set_memory_model(case.memory(plain))
        outside = rng.randbytes(256)
        # Commands lie behind the data, so that no error hits the fetch unit.
        image, offset, words = assemble(case.commands, bytearray(8192))
        driver.load(image, command_offset=offset, command_words=words, memory_bytes=size)
        device.write_memory(BASE + size, outside)
        try:
            driver.run(watchdog=WATCHDOG, timeout_cycles=TIMEOUT)
        except DeviceFault as fault:
            case.check(fault, device.config)
            if case.code == Fault.WATCHDOG:
                report = fault.engines[Engine.STORE]
                assert report.state == EngineState.WAITING, str(fault)
                assert report.missing == (Engine.LOAD,) and report.head == 2, str(fault)
        else:
            raise AssertionError(f"{case.name}: no fault")
        assert driver.read("FAULT_CODE") == 0 and driver.read("IRQ") == 0, case.name
        assert device.read_memory(BASE + size, 256) == outside, case.name
        device.set_memory_model(plain)
        _run(driver, good)


def soft_reset_at_any_time(device: RtlDevice, rng: random.Random) -> None:
    """A soft reset stops a running program after a random number of cycles, with AXI transfers in
    flight: the reset ends, the bus stays legal, and the next program runs."""
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
    """Run ``program`` and compare all of its memory; returns the cycles it took."""
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
    """Whether a fault's address is near enough: that of the transfer, its burst or its beat."""
    return abs(reported - address) < config.axi_burst_beats * config.beat_bytes


BENCHES = (memory_models, trace, faults, soft_reset_at_any_time)
