"""The control and status registers: 32 bits each, on AXI4-Lite."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from systole.isa.commands import Engine, Field


class Control(enum.IntFlag):
    """Bits of CONTROL."""

    START = 1
    """Write 1: run the program (ignored while BUSY or FAULT)."""
    SOFT_RESET = 2
    """Write 1: stop, drain AXI, clear engines, tokens, DONE and FAULT. Memories keep their content.
    Reads as 1 until the reset is over."""
    TRACE = 4
    """Write trace events while this is set."""
    IRQ_ENABLE = 8
    """Raise the interrupt line while IRQ is not 0."""


class Status(enum.IntFlag):
    """Bits of STATUS."""

    BUSY = 1
    """A program is running."""
    DONE = 2
    """The last program reached END; cleared by START."""
    FAULT = 4
    """A fault stopped the program; cleared by SOFT_RESET."""


class Irq(enum.IntFlag):
    """Bits of IRQ."""

    DONE = 1
    FAULT = 2


class Fault(enum.IntEnum):
    """Values of FAULT_CODE."""

    NONE = 0
    ILLEGAL_COMMAND = 1
    """Illegal opcode or engine."""
    DRAM_WINDOW = 2
    """A transfer or the program leaves the DRAM window."""
    AXI_READ = 3
    """SLVERR or DECERR on a read."""
    AXI_WRITE = 4
    """SLVERR or DECERR on a write."""
    TOKEN_OVERFLOW = 5
    """A token counter overflowed."""
    WATCHDOG = 6
    """No command ended for WATCHDOG cycles."""
    ILLEGAL_FIELD = 7
    """A field breaks a limit of its command. The command was not started; all before it of its
    engine have ended, and the tokens it waits for have been there."""


NO_ENGINE = 15
"""Value of FAULT_ENGINE when no engine failed: a fault of the fetch or trace unit, or none."""

TOKEN_BITS = 8
"""Width of each token counter."""


class EngineState(enum.IntEnum):
    """Low 2 bits of ENGINE_STATE."""

    IDLE = 0
    """Queue empty, nothing in flight."""
    BUSY = 1
    """A command is in flight and none waits for tokens."""
    WAITING = 2
    """The command at the head of the queue waits for tokens."""


ENGINE_STATE = (
    Field("state", 2, "see EngineState", enum=EngineState),
    Field("reserved", 6, "0"),
    Field("missing", 8, "engines whose tokens are missing, one bit each"),
    Field("head", 16, "low bits of the index of the command at the head of the queue"),
)
"""Fields of an engine's STATE register, packed from bit 0."""


@dataclass(frozen=True)
class Csr:
    """One register: byte offset, access (``ro``, ``rw``, ``w1c``), meaning, and the bits of a plain
    ``rw`` register that keep what is written; the others read as 0."""

    name: str
    offset: int
    access: str
    doc: str
    mask: int = 0


def _build() -> dict[str, Csr]:
    out: dict[str, Csr] = {}

    def add(name: str, access: str, doc: str, aligned: int = 1) -> None:
        mask = -aligned & 0xFFFF_FFFF if access == "rw" and name != "CONTROL" else 0
        out[name] = Csr(name, 4 * len(out), access, doc, mask)

    add("ID", "ro", "0x53595354")
    add("VERSION", "ro", "version of the command set and of this map")
    add("CONFIG_HASH", "ro", "hash of the configuration the hardware was generated from")
    add("CONTROL", "rw", "see Control")
    add("STATUS", "ro", "see Status")
    add("IRQ", "w1c", "see Irq; write 1 to clear")
    add("DRAM_BASE_LO", "rw", "address of the DRAM window, a multiple of 4096", aligned=4096)
    add("DRAM_BASE_HI", "rw", "its upper 32 bits")
    add("DRAM_LIMIT", "rw", "bytes in the DRAM window")
    add(
        "PROGRAM",
        "rw",
        "byte offset of the commands in the DRAM window, a multiple of 64",
        aligned=64,
    )
    add("PROGRAM_WORDS", "rw", "64-bit words in the program, END included")
    add("WATCHDOG", "rw", "cycles without a command ending before WATCHDOG faults; 0: never")
    add(
        "TRACE_ADDR",
        "rw",
        "byte offset of the trace buffer in the DRAM window, a multiple of 64",
        aligned=64,
    )
    add("TRACE_EVENTS", "rw", "events the trace buffer holds")
    add("TRACE_COUNT", "ro", "events written since START; all of them when DONE")
    add("TRACE_DROPPED", "ro", "events lost since START: the buffer or the trace queue was full")
    add("FAULT_CODE", "ro", "see Fault")
    add("FAULT_INDEX", "ro", "index of the command that failed (WATCHDOG: of the last one fetched)")
    add("FAULT_ENGINE", "ro", "engine that failed; 15: the fetch unit or none")
    add("FAULT_ADDRESS", "ro", "DRAM_WINDOW, AXI_*: byte offset in the DRAM window (low 32 bits)")
    add("COMMANDS", "ro", "commands ended since START")
    add(
        "CYCLES_LO",
        "ro",
        "cycles from START until all engines have run dry (or until now), so that writing out the "
        "trace is not counted",
    )
    add("CYCLES_HI", "ro", "its upper 32 bits")
    add("READ_BEATS", "ro", "AXI read beats received since START")
    add("WRITE_BEATS", "ro", "AXI write beats sent since START, trace excluded")
    for e in Engine:
        add(
            f"{e.name}_STATE",
            "ro",
            "bits 1:0 EngineState, bits 15:8 tokens missing, bits 31:16 low bits of the index of "
            "the command at the head of the queue",
        )
    # These are the last: they read as 0 if the configuration has no counters.
    for e in Engine:
        add(f"{e.name}_BUSY", "ro", "cycles with a command in flight and not held up by memory")
        add(f"{e.name}_MEMORY", "ro", "cycles with a command in flight, held up by memory")
        for other in Engine:
            add(
                f"{e.name}_WAIT_{other.name}",
                "ro",
                f"cycles with none in flight, waiting for a token of {other.name} (lowest missing)",
            )
    return out


CSRS: dict[str, Csr] = _build()
"""Every register by name, at consecutive word offsets."""

CSR_ADDR_BITS = (4 * len(CSRS) - 1).bit_length()
