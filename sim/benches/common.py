"""Base of the cocotb benches of single blocks: the clocked loop, agents at a block's ports, random
commands, and the model that results are compared with (the engines of the command-level simulator).

The simulated design is :mod:`sim.blocks`. Every agent acts twice a cycle: ``drive`` sets a block's
inputs while the clock is low; ``sample`` reads its outputs once they have settled, before the edge.
The configuration comes as JSON in ``SYSTOLE_CONFIG``; the random seed is cocotb's.
"""

from __future__ import annotations

import abc
import copy
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import cocotb
import numpy as np
from cocotb.clock import Clock
from cocotb.triggers import FallingEdge, ReadOnly

from systole.isa import COMMANDS, Fault, Opcode, encode
from systole.isa.params import PARAM_BYTES, pack_param
from systole.sim.benches.environment import CONFIG, PERIOD_NS, Handle
from systole.sim.blocks import Blocks
from systole.sw.simulate.engines import Engines, IllegalField, Memories, OutsideWindow
from systole.sw.simulate.races import CommandError, TrackedMemory, Tracker, span

DRAM_BYTES = 8192
"""The DRAM window of the model."""
INPUTS = Blocks(CONFIG).inputs()

Command = SimpleNamespace
"""A command's fields, as ``isa.Decoder`` names them."""


def pick(rng: np.random.Generator, low: int, high: int) -> int:
    """A random integer in ``low .. high - 1``."""
    return int(rng.integers(low, high))


def pack(values: np.ndarray) -> int:
    """An array as one number, the first element lowest."""
    return int.from_bytes(np.ascontiguousarray(values).tobytes(), "little")


def pack_params(bias: np.ndarray, multiplier: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """The requantisation parameters of channels, 64 bits each."""
    params = (pack_param(*map(int, channel)) for channel in zip(bias, multiplier, shift))
    return np.fromiter(params, "<i8", len(bias))


class Ports:
    """Some ports ``prefix__name`` of a block, each an attribute by the last part of its name.

    ``names`` are separated by spaces.
    """

    def __init__(self, bench: Bench, prefix: str, names: str):
        self.rng = bench.rng
        for name in names.split():
            setattr(self, name.split("__")[-1], getattr(bench.dut, f"{prefix}__{name}"))

    def __getattr__(self, name: str) -> Handle:
        raise AttributeError(f"{type(self).__name__} was not given a port {name!r}")


class Agent(Ports, abc.ABC):
    """The environment of a block at some of its ports."""

    @abc.abstractmethod
    def drive(self) -> None:
        """Set the block's inputs for this cycle."""

    @abc.abstractmethod
    def sample(self) -> None:
        """Read the block's outputs at the end of this cycle."""


class Bench:
    """The simulated blocks and their clock."""

    def __init__(self, dut: Handle):
        self.dut = dut
        self.rng = np.random.default_rng(cocotb.RANDOM_SEED)
        self.cycles = 0

    @classmethod
    async def started(cls, dut: Handle) -> Bench:
        """A bench whose clock runs and whose blocks have been reset."""
        bench = cls(dut)
        await bench.reset()
        return bench

    async def reset(self) -> None:
        """Start the clock if it does not run; reset all blocks, their inputs 0."""
        for name in INPUTS:
            getattr(self.dut, name).value = 0
        self.dut.rst.value = 1
        if not self.cycles:
            self.dut.clk.value = 0
            Clock(self.dut.clk, PERIOD_NS, unit="ns").start(start_high=False)
        for _ in range(3):
            await FallingEdge(self.dut.clk)
        self.dut.rst.value = 0

    async def run(self, *agents: Agent, until: Callable[[], object], timeout: int = 20_000) -> None:
        """Clock the agents, in this order, until ``until()`` holds at the end of a cycle.

        Raises ``AssertionError`` after ``timeout`` cycles.
        """
        for _ in range(timeout):
            for agent in agents:
                agent.drive()
            await ReadOnly()
            for agent in agents:
                agent.sample()
            await FallingEdge(self.dut.clk)
            self.cycles += 1
            if until():
                return
        raise AssertionError(f"not finished after {timeout} cycles")


# Agents -------------------------------------------------------------------------------------------


class CommandDriver(Agent):
    """Driver of a block's command port: pauses at random, calls ``check`` with each command that
    retires.

    Sample it before the agents of the memories if a command may write in the cycle in which the one
    before it retires; sample it after them if a command's last write may come with ``retire``.
    """

    def __init__(
        self,
        bench: Bench,
        prefix: str,
        commands: Sequence[Command],
        check: Callable[[Command], None],
        pause: float = 0.3,
    ):
        names = "cmd__valid cmd__ready cmd__payload retire stalled fault fault_code fault_address"
        super().__init__(bench, f"{prefix}__command", names)
        self.commands, self.check, self.pause = commands, check, pause
        self.offered = False
        self.accepted = self.retired = self.stalls = 0
        self.failure: tuple[Fault, int] | None = None
        """Code and address of the fault."""

    def drive(self) -> None:
        if not self.offered and self.accepted < len(self.commands):
            self.offered = self.rng.random() >= self.pause
            if self.offered:
                words = encode(**vars(self.commands[self.accepted]))
                self.payload.value = sum(word << (64 * i) for i, word in enumerate(words))
        self.valid.value = self.offered

    def sample(self) -> None:
        if self.offered and self.ready.value:
            self.accepted += 1
            self.offered = False
        if self.stalled.value:
            assert self.accepted > self.retired, "stalled with nothing in flight"
            self.stalls += 1
        if self.fault.value:
            assert self.failure is None, "two faults"
            self.failure = Fault(int(self.fault_code.value)), int(self.fault_address.value)
        if self.retire.value:
            assert self.retired < self.accepted, "retires a command that it has not taken"
            assert self.failure is None, "retires after a fault"
            self.check(self.commands[self.retired])
            self.retired += 1

    def done(self) -> bool:
        """Whether every command has retired, or one has failed."""
        return self.failure is not None or self.retired == len(self.commands)


class ReadServer(Agent):
    """Memory behind a block's ScratchpadRead: refuses reads at random, and shows a word only in the
    cycle after its read."""

    def __init__(self, bench: Bench, prefix: str, memory: np.ndarray, refuse: float = 0.3):
        super().__init__(bench, prefix, "valid ready addr data")
        self.memory, self.refuse = memory, refuse
        self.accept = False
        self.word: np.ndarray | None = None
        self.refused = 0

    def drive(self) -> None:
        junk = self.rng.integers(-128, 128, self.memory.shape[1], np.int8)
        self.data.value = pack(junk if self.word is None else self.word)
        self.accept = bool(self.rng.random() >= self.refuse)
        self.ready.value = self.accept

    def sample(self) -> None:
        self.word = None
        if self.valid.value:
            self.refused += not self.accept
            if self.accept:
                self.word = self.memory[int(self.addr.value)].copy()


class WriteServer(Agent):
    """Memory behind a block's ScratchpadWrite (``lanes`` bytes per bit of its mask) or WeightWrite
    (``lanes`` 0: no mask); refuses writes at random."""

    def __init__(
        self, bench: Bench, prefix: str, memory: np.ndarray, lanes: int = 0, refuse: float = 0.3
    ):
        super().__init__(bench, prefix, "valid ready addr data" + " mask" * bool(lanes))
        self.memory, self.lanes, self.refuse = memory, lanes or memory.shape[1], refuse
        self.masked = bool(lanes)
        self.accept = False
        self.refused = 0

    def drive(self) -> None:
        self.accept = bool(self.rng.random() >= self.refuse)
        self.ready.value = self.accept

    def sample(self) -> None:
        if not self.valid.value:
            return
        if not self.accept:
            self.refused += 1
            return
        width, mask = self.memory.shape[1], int(self.mask.value) if self.masked else 1
        data = np.frombuffer(int(self.data.value).to_bytes(width, "little"), np.int8)
        for i, at in enumerate(range(0, width, self.lanes)):
            if mask >> i & 1:
                part = slice(at, at + self.lanes)
                self.memory[int(self.addr.value), part] = data[part]


# Model --------------------------------------------------------------------------------------------


class Model:
    """Memories with random content, and the engines that execute commands on them."""

    def __init__(self, rng: np.random.Generator):
        self.memories = Memories(CONFIG)
        self.dram = rng.integers(0, 256, DRAM_BYTES, np.uint8)
        tracker = Tracker(CONFIG, DRAM_BYTES, lambda _: "", check_races=False)
        for kind, memory in (
            (TrackedMemory.SCRATCHPAD, self.memories.scratchpad),
            (TrackedMemory.WEIGHTS, self.memories.weights),
        ):
            memory[...] = rng.integers(-128, 128, memory.shape, np.int8)
            tracker.write(kind, span(0, len(memory)), "")
        accumulators = self.memories.accumulators
        shape = accumulators.shape
        accumulators[...] = rng.integers(-(1 << 31), 1 << 31, shape) >> rng.integers(0, 31, shape)
        tracker.write(TrackedMemory.ACCUMULATORS, span(0, len(accumulators)), "")
        self.engines = Engines(CONFIG, self.memories, self.dram, tracker, (0, 0))

    def fill_parameters(
        self, rng: np.random.Generator, end: int, words: int, channels: int, shift: int
    ) -> None:
        """Write random requantisation parameters to the scratchpad's words from 0 to ``end``: sets
        of ``words`` words for ``channels`` channels, shifts within 5 of ``shift``."""
        for first in range(0, end - words + 1, words):
            bias = rng.integers(-1000, 1000, channels)
            multiplier = rng.integers(1 << 23, 1 << 24, channels)
            shifts = rng.integers(shift - 5, shift + 6, channels)
            packed = pack_params(bias, multiplier, shifts)
            used = self.memories.scratchpad[first : first + words].reshape(-1)
            used[: PARAM_BYTES * channels] = packed.view(np.int8)

    def execute(self, command: Command) -> None:
        """Carry out a command. Raises :class:`CommandError`, :class:`IllegalField` or
        :class:`OutsideWindow` if it is illegal."""
        self.engines.execute(command)

    def draw(
        self, rng: np.random.Generator, count: int, random: Callable[[np.random.Generator], Command]
    ) -> list[Command]:
        """``count`` of the commands that ``random(rng)`` gives, legal one after the other."""
        trial = copy.deepcopy(self)
        out: list[Command] = []
        for _ in range(100 * count):
            command = random(rng)
            try:
                trial.execute(command)
            except (CommandError, IllegalField, OutsideWindow):
                continue
            out.append(command)
            if len(out) == count:
                return out
        raise AssertionError("too few of the random commands are legal")


def command(opcode: Opcode, **values: int) -> Command:
    """A command for the first engine that takes it; fields not named are 0."""
    values |= {"opcode": opcode, "engine": COMMANDS[opcode].engines[0]}
    out = Command()
    for field in COMMANDS[opcode].fields:
        value = values.pop(field.name, 0)
        setattr(out, field.name, value if field.enum is None else field.enum(value))
    assert not values, f"{opcode.name}: no field {next(iter(values))!r}"
    return out


def assert_equal(actual: np.ndarray, expected: np.ndarray, what: object) -> None:
    """Raise ``AssertionError`` if arrays differ after ``what``, naming the first element."""
    wrong = np.argwhere(actual != expected)
    assert not len(wrong), (
        f"{len(wrong)} elements differ after {what}: at {wrong[0]} {actual[tuple(wrong[0])]}, "
        f"expected {expected[tuple(wrong[0])]}"
    )
