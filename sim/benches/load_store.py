"""cocotb benches of ``LoadEngine`` and ``StoreEngine`` between models of the AXI managers and of
the local memories; the last command of some runs fails."""

from __future__ import annotations

from collections import deque

import cocotb
import numpy as np

from systole.isa import Fault, LoadTarget, Opcode
from systole.sim.benches.common import (
    DRAM_BYTES,
    Agent,
    Bench,
    Command,
    CommandDriver,
    Model,
    Ports,
    ReadServer,
    WriteServer,
    assert_equal,
    command,
    pick,
)
from systole.sim.benches.environment import CONFIG, Handle

COMMANDS = 24
SAFE = DRAM_BYTES - 512
"""Beats from here on carry an error; only a run's last command touches them."""
BEAT = CONFIG.beat_bytes


class Manager(Agent):
    """Base of both managers: takes requests, and denies those outside the window a cycle later."""

    def __init__(self, bench: Bench, prefix: str, names: str = ""):
        super().__init__(bench, prefix, f"req__valid req__ready req__payload denied {names}")
        self.beat = Ports(bench, prefix, "beats__valid beats__ready beats__payload")
        self.deny = self.taking = False
        self.waited = 0
        """Cycles in which the engine could not go on because of this manager."""

    def drive(self) -> None:
        self.denied.value = self.deny
        self.taking = bool(self.rng.random() < 0.7)
        self.ready.value = self.taking

    def take(self) -> tuple[int, int] | None:
        """First byte and number of bytes of a request that was taken in this cycle."""
        self.deny = False
        if not (self.taking and self.valid.value):
            return None
        raw = int(self.payload.value)
        address, size = raw & 0xFFFF_FFFF, raw >> 32
        self.deny = address + size > DRAM_BYTES
        return None if self.deny else (address, size)


class MemoryReader(Manager):
    """Read manager: answers a LOAD engine's requests with beats, in order, at random times."""

    def __init__(self, bench: Bench, dram: np.ndarray):
        super().__init__(bench, "load__memory")
        self.dram = dram
        self.beats: deque[int] = deque()
        self.offered = False

    def drive(self) -> None:
        super().drive()
        if self.beats and not self.offered:
            self.offered = bool(self.rng.random() < 0.7)
            self.beat.payload.value = self.beats[0]
        self.beat.valid.value = self.offered

    def sample(self) -> None:
        if self.offered:
            if self.beat.ready.value:
                self.beats.popleft()
                self.offered = False
            else:
                self.waited += 1
        request = self.take()
        if request is not None:
            address, size = request
            starts = range(address // BEAT * BEAT, address + size, BEAT)
            for at in starts:
                data = int.from_bytes(self.dram[at : at + BEAT].tobytes(), "little")
                last, error = at == starts[-1], at >= SAFE
                self.beats.append(data | last << 8 * BEAT | error << 8 * BEAT + 1)


class MemoryWriter(Manager):
    """Write manager: takes a STORE engine's requests and beats, and responds in order, at random
    times."""

    def __init__(self, bench: Bench, dram: np.ndarray):
        super().__init__(bench, "store__memory", "done error")
        self.dram = dram
        self.open: deque[tuple[int, int, bool]] = deque()
        """First byte and strobe of every beat to come, and whether it is its request's last."""
        self.responses: deque[bool] = deque()
        """Whether each request whose beats have all come fails."""
        self.accept = False

    def drive(self) -> None:
        super().drive()
        respond = bool(self.responses) and self.rng.random() < 0.1
        self.done.value = respond
        self.error.value = self.responses.popleft() if respond else False
        self.accept = bool(self.open) and bool(self.rng.random() < 0.7)
        self.beat.ready.value = self.accept

    def sample(self) -> None:
        if self.beat.valid.value:
            self.waited += not self.accept
            if self.accept:
                at, expected, last = self.open.popleft()
                raw = int(self.beat.payload.value)
                strobe = raw >> 8 * BEAT
                assert strobe == expected, f"strobes {strobe:b} at {at:#x}, not {expected:b}"
                data = (raw % (1 << 8 * BEAT)).to_bytes(BEAT, "little")
                for i in range(BEAT):
                    if strobe >> i & 1:
                        self.dram[at + i] = data[i]
                if last:
                    self.responses.append(at >= SAFE)
        request = self.take()
        if request is not None:
            address, size = request
            starts = range(address // BEAT * BEAT, address + size, BEAT)
            for at in starts:
                inside = (address <= at + i < address + size for i in range(BEAT))
                strobe = sum(bit << i for i, bit in enumerate(inside))
                self.open.append((at, strobe, at == starts[-1]))


def _transfer(rng: np.random.Generator, opcode: Opcode, dram: int | None = None) -> Command:
    """A transfer that is legal or leaves a memory; a single run at ``dram`` if given."""
    target = LoadTarget(pick(rng, 0, 2)) if opcode == Opcode.LOAD else LoadTarget.SCRATCHPAD
    weights = target == LoadTarget.WEIGHTS
    vector = CONFIG.weight_vector_bytes if weights else CONFIG.vector_bytes
    words = CONFIG.weight_words if weights else CONFIG.scratchpad_words
    count0, count1, count2 = pick(rng, 1, 20), pick(rng, 1, 4), pick(rng, 1, 3)
    if dram is not None:
        first, count1, count2 = dram, 1, 1
    else:
        first = pick(rng, 0, SAFE // vector) * vector
    step1 = pick(rng, 0, 24) * vector
    step2 = pick(rng, 0, 64) * vector
    if first < SAFE <= first + (count2 - 1) * step2 + (count1 - 1) * step1 + count0 * vector:
        return _transfer(rng, opcode)
    return command(
        opcode,
        dram=first,
        count0=count0,
        count1=count1,
        count2=count2,
        dram1=step1,
        dram2=step2,
        local=pick(rng, 0, words),
        local1=pick(rng, 0, 24),
        local2=pick(rng, 0, 64),
        **({"target": target} if opcode == Opcode.LOAD else {}),
    )


def _runs(error: Fault) -> tuple[tuple[int | None, Fault | None], ...]:
    """Where each run's last command goes, and the fault it leads to."""
    beyond = DRAM_BYTES - CONFIG.vector_bytes
    return (None, None), (SAFE, error), (beyond, Fault.DRAM_WINDOW)


def _commands(model: Model, bench: Bench, opcode: Opcode, bad: int | None) -> list[Command]:
    """Legal commands, and one at ``bad`` (if given) that fails."""
    commands = model.draw(bench.rng, COMMANDS, lambda rng: _transfer(rng, opcode))
    if bad is not None:
        last = _transfer(bench.rng, opcode, bad)
        last.count0 = max(2, last.count0)
        commands.append(last)
    return commands


def _verdict(driver: CommandDriver, fault: Fault | None) -> None:
    """Assert that all commands have retired but the one that had to fail."""
    assert driver.retired == COMMANDS
    expected = None if fault is None else (fault, driver.commands[-1].dram)
    assert driver.failure == expected, f"{driver.failure}, not {expected}"
    assert driver.stalls > 20


@cocotb.test()
async def load_random(dut: Handle) -> None:
    """Covers both targets and both kinds of faults; each word is there when its command retires."""
    bench = Bench(dut)
    for bad, fault in _runs(Fault.AXI_READ):
        await bench.reset()
        model = Model(bench.rng)
        expected = model.memories.scratchpad, model.memories.weights
        actual = [memory.copy() for memory in expected]
        targets: set[LoadTarget] = set()

        def check(
            c: Command, model=model, expected=expected, actual=actual, targets=targets
        ) -> None:
            model.execute(c)
            targets.add(c.target)
            for memory, reference in zip(actual, expected, strict=True):
                assert_equal(memory, reference, c)

        driver = CommandDriver(bench, "load", _commands(model, bench, Opcode.LOAD, bad), check)
        memory = MemoryReader(bench, model.dram)
        scratchpad = WriteServer(bench, "load__scratchpad", actual[0], CONFIG.written_lanes)
        weights = WriteServer(bench, "load__weights", actual[1])
        await bench.run(driver, memory, scratchpad, weights, until=driver.done)
        _verdict(driver, fault)
        assert len(targets) == 2
        assert memory.waited > 20 and scratchpad.refused > 20 and weights.refused > 20


@cocotb.test()
async def store_random(dut: Handle) -> None:
    """Covers both kinds of faults; exactly the bytes of each run are written."""
    bench = Bench(dut)
    for bad, fault in _runs(Fault.AXI_WRITE):
        await bench.reset()
        model = Model(bench.rng)
        actual = model.dram.copy()
        commands = _commands(model, bench, Opcode.STORE, bad)
        driver = CommandDriver(bench, "store", commands, model.execute)
        memory = MemoryWriter(bench, actual)
        scratchpad = ReadServer(bench, "store__scratchpad", model.memories.scratchpad)
        await bench.run(driver, memory, scratchpad, until=driver.done)
        _verdict(driver, fault)
        assert_equal(actual[:SAFE], model.dram[:SAFE], "all commands")
        assert memory.waited > 20 and scratchpad.refused > 20
