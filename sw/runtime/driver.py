"""The driver: runs programs on a device, reports its faults, reads its counters and its trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from systole.isa import (
    CSRS,
    DEVICE_ID,
    TRACE_EVENT,
    VERSION,
    Control,
    Engine,
    Fault,
    Irq,
    Status,
    broken_limit,
    command_at,
)
from systole.isa.csr import EngineState
from systole.isa.trace import TRACE_EVENT_BYTES
from systole.sw.runtime.device import Device, DeviceError

DEFAULT_TIMEOUT = 1 << 32
"""Cycles a program may take."""
DEFAULT_WATCHDOG = 10_000_000
"""Cycles a command may take; the longest legal one takes less than this."""
NO_ENGINE = 15
"""Value of FAULT_ENGINE for the fetch unit or none."""
RESET_POLLS = 10_000
"""Reads of CONTROL after which a soft reset counts as failed."""
PROGRAM_ALIGN = 64
"""Bytes whose multiples programs and traces begin at."""
MAX_MEMORY = 1 << 32
"""Bytes of the address space of a DRAM window; a window has less."""
_PAGE = 4096


@dataclass(frozen=True)
class Waiting:
    """Someone who wants to hear of a program while it runs."""

    every: int
    """How many cycles pass from one time to the next, at least 1."""
    tell: Callable[[int], None]
    """Called with the cycles that have passed."""


@dataclass(frozen=True)
class EngineReport:
    """What an engine was doing."""

    engine: Engine
    state: EngineState
    missing: tuple[Engine, ...]
    """WAITING: the engines whose tokens are missing."""
    head: int
    """Index (modulo 2^16) of the command at the head of its queue; meaningless when IDLE."""

    @classmethod
    def decode(cls, engine: Engine, value: int) -> EngineReport:
        """From the engine's STATE register."""
        mask = value >> 8 & 0xFF
        missing = tuple(e for e in Engine if mask >> e & 1)
        return cls(engine, EngineState(value & 3), missing, value >> 16)

    def __str__(self) -> str:
        if self.state == EngineState.WAITING:
            return waiting_text(self.engine, self.head, self.missing)
        if self.state == EngineState.BUSY:
            return f"{self.engine.name} busy"
        return f"{self.engine.name} idle"


def waiting_text(engine: Engine, command: int, missing: Sequence[Engine]) -> str:
    """That an engine waits before a command, and for whose tokens."""
    tokens = ", ".join(e.name for e in missing) or "none"
    return f"{engine.name} waits before command {command}, missing token: {tokens}"


class DeviceFault(DeviceError):  # noqa: N818
    """A program stopped with a fault, or did not end in time. The device has been soft-reset since.

    ``name`` is that of :class:`isa.Fault`, or ``TIMEOUT``. ``index`` is the command's (WATCHDOG:
    that of the last one fetched, TIMEOUT: None), ``engine`` None if it was the fetch unit or none,
    ``address`` a byte offset in the DRAM window. ``why``: what is wrong with the command, if that
    is known.
    """

    def __init__(
        self,
        name: str,
        *,
        index: int | None,
        engine: Engine | None,
        address: int,
        engines: tuple[EngineReport, ...],
        cycles: int,
        why: str = "",
    ):
        self.name = name
        self.index = index
        self.engine = engine
        self.address = address
        self.engines = engines
        self.cycles = cycles
        self.why = why
        what = f"{name} after {cycles} cycles"
        if index is not None:
            last = "last fetched " if name == Fault.WATCHDOG.name else ""
            what += f", {last}command {index}"
        if engine is not None:
            what += f", engine {engine.name}"
        if name in ("DRAM_WINDOW", "AXI_READ", "AXI_WRITE"):
            what += f", byte {address:#x} of the DRAM window"
        if why:
            what += f", {why}"
        super().__init__(f"{what}: {'; '.join(map(str, engines))}")


class Driver:
    """Drives one device. Raises :class:`DeviceError` at once if it is not the hardware that
    ``device.config`` describes.

    ``base``: address in device memory of the DRAM window, a multiple of 4096. All other addresses
    are byte offsets in the window.
    """

    def __init__(self, device: Device, *, base: int = 0):
        if base % _PAGE:
            raise ValueError(f"DRAM window at {base:#x} is not at a multiple of {_PAGE}")
        self.device = device
        self.base = base
        self.program_bytes = 0
        self.trace_capacity = 0
        self._start = self._words = 0
        for name, expected, what in (
            ("ID", DEVICE_ID, "it is not a Systole device"),
            ("VERSION", VERSION, "it speaks another version of the command set"),
            ("CONFIG_HASH", device.config.hash, "it was generated from another configuration"),
        ):
            value = self.read(name)
            if value != expected:
                raise DeviceError(f"device refused, {name} = {value:#x}, not {expected:#x}: {what}")

    def read(self, name: str) -> int:
        """A register by name."""
        return self.device.read_csr(CSRS[name].offset)

    def write(self, name: str, value: int) -> None:
        """Write a register by name."""
        self.device.write_csr(CSRS[name].offset, value)

    # Programs -------------------------------------------------------------------------------------

    def load(
        self, image: bytes, *, command_offset: int, command_words: int, memory_bytes: int
    ) -> None:
        """Load a program: ``image`` is the start of a DRAM window of ``memory_bytes`` bytes and
        holds, at ``command_offset``, ``command_words`` 64-bit words of commands."""
        if command_offset % PROGRAM_ALIGN:
            raise ValueError(f"commands at {command_offset:#x}: not a multiple of {PROGRAM_ALIGN}")
        if not len(image) <= memory_bytes < MAX_MEMORY:
            raise ValueError(
                f"a DRAM window of {memory_bytes} bytes does not hold the image of {len(image)} "
                "bytes or exceeds 4 GiB"
            )
        self._check_room(memory_bytes)
        self.program_bytes = memory_bytes
        self._start, self._words = command_offset, command_words
        self.write_data(0, image)

    def write_data(self, offset: int, data: bytes) -> None:
        """Write inputs (or anything else) into the DRAM window."""
        self._check_window(offset, len(data))
        self.device.write_memory(self.base + offset, data)

    def read_data(self, offset: int, n: int) -> bytes:
        """Read outputs (or anything else) from the DRAM window."""
        self._check_window(offset, n)
        return self.device.read_memory(self.base + offset, n)

    def run(
        self,
        *,
        timeout_cycles: int = DEFAULT_TIMEOUT,
        watchdog: int = DEFAULT_WATCHDOG,
        trace_events: int = 0,
        waiting: Waiting | None = None,
    ) -> int:
        """Run the loaded program (again) and return the cycles it took.

        ``trace_events``: record up to that many events, in DRAM behind the program's window.
        ``waiting``: what is told while the program runs.
        Raises :class:`DeviceFault` if it faults or takes longer than ``timeout_cycles``; the device
        can be used again afterwards.
        """
        if trace_events and not self.device.config.trace:
            raise ValueError("the configuration has no trace unit")
        limit = self._trace_address + TRACE_EVENT_BYTES * trace_events
        if not trace_events:
            limit = self.program_bytes
        self._check_room(limit)
        self.trace_capacity = trace_events
        for name, value in (
            ("IRQ", Irq.DONE | Irq.FAULT),
            ("DRAM_BASE_LO", self.base & 0xFFFF_FFFF),
            ("DRAM_BASE_HI", self.base >> 32),
            ("DRAM_LIMIT", limit),
            ("PROGRAM", self._start),
            ("PROGRAM_WORDS", self._words),
            ("WATCHDOG", watchdog),
            ("TRACE_ADDR", self._trace_address if trace_events else 0),
            ("TRACE_EVENTS", trace_events),
            (
                "CONTROL",
                Control.START | Control.IRQ_ENABLE | (Control.TRACE if trace_events else 0),
            ),
        ):
            self.write(name, value)
        raised = self._wait(timeout_cycles, waiting)
        status = self.read("STATUS")
        if not raised or status & Status.FAULT:
            fault = self._fault(status)
            self.reset()
            raise fault
        if not status & Status.DONE:
            raise DeviceError(
                f"device interrupted with STATUS = {status:#x}: neither DONE nor FAULT"
            )
        self.write("IRQ", Irq.DONE | Irq.FAULT)
        return self._wide("CYCLES")

    def _wait(self, timeout_cycles: int, waiting: Waiting | None) -> bool:
        """Whether the interrupt came within the time."""
        passed = 0
        while waiting is not None and passed + waiting.every < timeout_cycles:
            if self.device.wait_interrupt(waiting.every):
                return True
            passed += waiting.every
            waiting.tell(passed)
        return self.device.wait_interrupt(timeout_cycles - passed)

    def reset(self) -> None:
        """Soft reset: stops what runs, clears faults and the interrupt; DRAM keeps its content."""
        self.write("CONTROL", Control.SOFT_RESET)
        for _ in range(RESET_POLLS):
            if not self.read("CONTROL") & Control.SOFT_RESET:
                self.write("IRQ", Irq.DONE | Irq.FAULT)
                return
        raise DeviceError("device hung: its soft reset does not end")

    # What happened --------------------------------------------------------------------------------

    def counters(self) -> dict[str, int]:
        """The performance counters of the last run by register name; CYCLES is one of 64 bits.
        Those of the engines are not among them if the hardware has none."""
        names = ["COMMANDS", "READ_BEATS", "WRITE_BEATS", "TRACE_COUNT", "TRACE_DROPPED"]
        for e in Engine if self.device.config.counters else ():
            names += [f"{e.name}_BUSY", f"{e.name}_MEMORY"]
            names += [f"{e.name}_WAIT_{other.name}" for other in Engine]
        return {"CYCLES": self._wide("CYCLES")} | {name: self.read(name) for name in names}

    def engines(self) -> tuple[EngineReport, ...]:
        """What every engine is doing."""
        return tuple(EngineReport.decode(e, self.read(f"{e.name}_STATE")) for e in Engine)

    def trace(self) -> np.ndarray:
        """The events of the last run in order of occurrence: a structured array with the fields of
        ``isa.TRACE_EVENT`` (int64). Events lost are counted by TRACE_DROPPED."""
        count = min(self.read("TRACE_COUNT"), self.trace_capacity)
        address = self.base + self._trace_address
        data = self.device.read_memory(address, count * TRACE_EVENT_BYTES) if count else b""
        return decode_trace(data)

    # Private --------------------------------------------------------------------------------------

    @property
    def _trace_address(self) -> int:
        return -(-self.program_bytes // PROGRAM_ALIGN) * PROGRAM_ALIGN

    def _wide(self, name: str) -> int:
        return self.read(f"{name}_HI") << 32 | self.read(f"{name}_LO")

    def _check_room(self, limit: int) -> None:
        if limit >= MAX_MEMORY or self.base + limit > self.device.memory_bytes:
            raise DeviceError(
                f"the program needs a DRAM window of {limit} bytes at {self.base:#x}; the device "
                f"has {self.device.memory_bytes} bytes of memory"
            )

    def _check_window(self, offset: int, n: int) -> None:
        if offset < 0 or offset + n > self.program_bytes:
            raise ValueError(
                f"bytes {offset:#x} to {offset + n:#x} lie outside the program's window of "
                f"{self.program_bytes} bytes"
            )

    def _fault(self, status: int) -> DeviceFault:
        engines, cycles = self.engines(), self._wide("CYCLES")
        if not status & Status.FAULT:
            return DeviceFault(
                "TIMEOUT", index=None, engine=None, address=0, engines=engines, cycles=cycles
            )
        engine, index = self.read("FAULT_ENGINE"), self.read("FAULT_INDEX")
        code = Fault(self.read("FAULT_CODE"))
        return DeviceFault(
            code.name,
            index=index,
            engine=None if engine == NO_ENGINE else Engine(engine),
            address=self.read("FAULT_ADDRESS"),
            engines=engines,
            cycles=cycles,
            why=self._broken_limit(index) if code is Fault.ILLEGAL_FIELD else "",
        )

    def _broken_limit(self, index: int) -> str:
        """What is wrong with a command's field, by the program as it is in DRAM now; "" if nothing
        is to be seen there."""
        inside = min(self._words, (self.program_bytes - self._start) // 8)
        words = np.frombuffer(self.read_data(self._start, 8 * inside), "<u8").tolist()
        try:
            broken = broken_limit(command_at(words, index), self.device.config)
        except (ValueError, IndexError):
            return ""
        return " ".join(broken or ())


def decode_trace(data: bytes) -> np.ndarray:
    """Trace events as they lie in DRAM, as a structured array of int64 fields."""
    low, high = np.frombuffer(data, "<u8").reshape(-1, 2).T
    out = np.zeros(len(low), [(f.name, np.int64) for f in TRACE_EVENT])
    at = 0
    for f in TRACE_EVENT:
        if at >= 64:
            value = high >> np.uint64(at - 64)
        else:
            value = low >> np.uint64(at)
            if at + f.bits > 64:
                value = value | high << np.uint64(64 - at)
        out[f.name] = value & np.uint64((1 << f.bits) - 1)
        at += f.bits
    return out
