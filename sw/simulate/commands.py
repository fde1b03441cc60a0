"""The command-level simulator: executes the very DRAM image that the RTL executes, one command at a
time in program order, and refuses programs whose result depends on timing.

:func:`run_program` runs one program; :class:`CommandDevice` is the same behind the CSRs. What the
hardware would report as a fault is a :class:`HardwareFault`; what it would notice late (missing
tokens, token counters that overflow, commands without an end) or not at all (races, uninitialised
or absent words, a command that reads its own results) is a
:class:`~sw.simulate.races.CommandError` naming command and field.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace

import numpy as np

from systole.isa import (
    COMMANDS,
    CSRS,
    DEVICE_ID,
    VERSION,
    Config,
    Control,
    Csr,
    Decoder,
    Engine,
    Fault,
    Irq,
    Opcode,
    Status,
    command_at,
)
from systole.isa.commands import header_of
from systole.isa.csr import NO_ENGINE
from systole.isa.timing import FETCH_REQUEST_WORDS
from systole.isa.tools.assembler import format_command
from systole.sw.runtime.device import Device, DeviceError
from systole.sw.simulate.engines import Engines, IllegalField, Memories, OutsideWindow
from systole.sw.simulate.races import Tracker

OnCommand = Callable[[int, Mapping[str, int], Memories], None]
"""Called after every command, with its index, its fields and the memories."""


class HardwareFault(Exception):  # noqa: N818
    """A fault with which the hardware would stop; the attributes are the FAULT_* registers."""

    def __init__(self, code: Fault, index: int, engine: int, address: int = 0, why: str = ""):
        self.code = code
        self.index = index
        self.engine = engine
        self.address = address
        super().__init__(
            f"{code.name} at command {index}" + (why or f", DRAM window byte {address:#x}")
        )

    @property
    def commands(self) -> int:
        """The number of commands that ended before it."""
        return self.index


class _FetchUnit:
    """The fetch unit: hands out a program's commands one after the other."""

    def __init__(self, config: Config, memory: np.ndarray, offset: int, words: int):
        existing = [e for e in Engine if e is not Engine.WINDOW or config.window]
        self._existing = sum(1 << e for e in existing)
        inside = max(0, min(words, (len(memory) - offset) // 8))
        if inside < words:  # What it asks for at a time is all in the DRAM window or denied.
            inside -= inside % FETCH_REQUEST_WORDS
        self._words: list[int] = memory[offset : offset + 8 * inside].view("<u8").tolist()
        # Where the DRAM window cuts the program off, if it does.
        self._cut = offset + 8 * inside if inside < words else None
        self._at = 0
        self._decoder = Decoder()
        self._known: set[int] = set()  # Engines that have had a command.
        self.index = -1

    def describe(self, index: int) -> str:
        """The text of command ``index``, which has been fetched."""
        return format_command(command_at(self._words, index))

    def _fault(self, code: Fault, address: int = 0) -> HardwareFault:
        return HardwareFault(code, self.index, NO_ENGINE, address)

    def next(self) -> SimpleNamespace | None:
        """The next command's fields; ``None`` at END.

        Raises :class:`HardwareFault` where the fetch unit would."""
        self.index += 1
        ended = self._at == len(self._words)
        head = None if ended else header_of(self._words[self._at])
        if head is not None and head["opcode"] not in COMMANDS:
            raise self._fault(Fault.ILLEGAL_COMMAND)
        if head is None or self._at + head["present"].bit_count() >= len(self._words):
            if self._cut is not None:
                raise self._fault(Fault.DRAM_WINDOW, self._cut)
            raise self._fault(Fault.ILLEGAL_COMMAND)
        command, engine = COMMANDS[Opcode(head["opcode"])], head["engine"]
        if head["present"] & ~command.complete:
            raise self._fault(Fault.ILLEGAL_COMMAND)
        if command.opcode is Opcode.END:
            return None
        if (
            engine not in command.engines
            or (1 << engine | head["wait"] | head["signal"]) & ~self._existing
            or (engine not in self._known and head["present"] != command.complete)
        ):
            raise self._fault(Fault.ILLEGAL_COMMAND)
        self._known.add(engine)
        fields, self._at = self._decoder.decode(self._words, self._at)
        return SimpleNamespace(**fields)


def run_program(
    config: Config,
    memory: np.ndarray,
    program_offset: int,
    words: int,
    *,
    check_races: bool = True,
    on_command: OnCommand | None = None,
    memories: Memories | None = None,
) -> int:
    """Run the program of ``words`` 64-bit words at byte ``program_offset`` of ``memory``, the DRAM
    window (uint8, changed in place). Return the number of commands that ended, without END.

    ``memories``: internal memories with the content of an earlier run. It still counts as never
    written.

    Raises :class:`HardwareFault` and :class:`~sw.simulate.races.CommandError`.
    """
    fetch = _FetchUnit(config, memory, program_offset, words)
    memories = memories or Memories(config)
    tracker = Tracker(config, len(memory), fetch.describe, check_races)
    program = program_offset, program_offset + 8 * words
    engines = Engines(config, memories, memory, tracker, program)
    while (c := fetch.next()) is not None:
        tracker.begin(fetch.index, c.engine, c.wait)
        try:
            engines.execute(c)
        except IllegalField as e:
            why = f" ({fetch.describe(fetch.index)}): {e}"
            code = Fault.ILLEGAL_FIELD
            raise HardwareFault(code, fetch.index, c.engine, why=why) from None
        except OutsideWindow as e:
            raise HardwareFault(Fault.DRAM_WINDOW, fetch.index, c.engine, e.address) from None
        tracker.end(c.signal)
        if on_command is not None:
            on_command(fetch.index, vars(c), memories)
    return fetch.index


class CommandDevice(Device):
    """The command-level simulator as a device. Programs take no time: the counters of cycles, beats
    and trace events read 0.

    A program runs in ``wait_interrupt``, which raises :class:`~sw.simulate.races.CommandError` for
    what the hardware could not report; the device then stays BUSY until a soft reset.
    """

    def __init__(self, config: Config, memory_bytes: int = 64 << 20, *, check_races: bool = True):
        self.config = config
        self.memory_bytes = memory_bytes
        self.check_races = check_races
        self.memory = np.zeros(memory_bytes, np.uint8)
        self.memories = Memories(config)
        self._registers = dict.fromkeys(CSRS, 0)
        self._registers.update(ID=DEVICE_ID, VERSION=VERSION, CONFIG_HASH=config.hash)
        self._registers["FAULT_ENGINE"] = NO_ENGINE
        self._names = {csr.offset: csr for csr in CSRS.values()}
        self._started = False

    def write_memory(self, addr: int, data: bytes) -> None:
        self.check_range(addr, len(data))
        self.memory[addr : addr + len(data)] = np.frombuffer(data, np.uint8)

    def read_memory(self, addr: int, n: int) -> bytes:
        self.check_range(addr, n)
        return self.memory[addr : addr + n].tobytes()

    def _csr(self, offset: int) -> Csr:
        if offset not in self._names:
            raise DeviceError(f"no register at byte {offset:#x}")
        return self._names[offset]

    def read_csr(self, offset: int) -> int:
        return self._registers[self._csr(offset).name]

    def write_csr(self, offset: int, value: int) -> None:
        csr, registers = self._csr(offset), self._registers
        if csr.access == "w1c":
            registers[csr.name] &= ~value
        elif csr.name == "CONTROL":
            registers["CONTROL"] = value & (Control.TRACE | Control.IRQ_ENABLE)
            if value & Control.SOFT_RESET:
                registers.update(STATUS=0, FAULT_CODE=0, FAULT_INDEX=0, FAULT_ADDRESS=0)
                registers["FAULT_ENGINE"] = NO_ENGINE
                self._started = False
            elif value & Control.START and not registers["STATUS"] & (Status.BUSY | Status.FAULT):
                registers.update(STATUS=int(Status.BUSY), COMMANDS=0)
                self._started = True
        elif csr.access == "rw":
            registers[csr.name] = value & csr.mask

    def wait_interrupt(self, timeout_cycles: int) -> bool:
        if self._started:
            self._started = False
            self._run()
        return bool(self._registers["IRQ"] and self._registers["CONTROL"] & Control.IRQ_ENABLE)

    def _run(self) -> None:
        registers = self._registers
        base = registers["DRAM_BASE_HI"] << 32 | registers["DRAM_BASE_LO"]
        limit = registers["DRAM_LIMIT"]
        if base + limit > self.memory_bytes:
            raise DeviceError(
                f"a DRAM window of {limit} bytes at {base:#x} exceeds the device's "
                f"{self.memory_bytes} bytes of memory"
            )
        try:
            registers["COMMANDS"] = run_program(
                self.config,
                self.memory[base : base + limit],
                registers["PROGRAM"],
                registers["PROGRAM_WORDS"],
                check_races=self.check_races,
                memories=self.memories,
            )
        except HardwareFault as fault:
            registers.update(
                STATUS=int(Status.FAULT),
                FAULT_CODE=int(fault.code),
                FAULT_INDEX=fault.index,
                FAULT_ENGINE=int(fault.engine),
                FAULT_ADDRESS=fault.address,
                COMMANDS=fault.commands,
            )
            registers["IRQ"] |= Irq.FAULT
        else:
            registers["STATUS"] = int(Status.DONE)
            registers["IRQ"] |= Irq.DONE
