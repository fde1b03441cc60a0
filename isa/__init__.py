"""The contract between hardware and software: configuration, commands, CSRs, faults, trace events.

Pure Python, no amaranth, no onnx. Everything else imports this package and never the reverse.
"""

from systole.isa.commands import (
    COMMANDS,
    Command,
    Decoder,
    Encoder,
    Engine,
    Field,
    Limit,
    LoadTarget,
    Opcode,
    PostOp,
    PostSource,
    WindowOp,
    command_at,
    encode,
)
from systole.isa.config import Config, ConfigError
from systole.isa.csr import CSRS, Control, Csr, Fault, Irq, Status
from systole.isa.limits import broken_limit
from systole.isa.trace import TRACE_EVENT, TraceKind

VERSION = 3
"""Version of the command set and CSR map; hardware and program must agree on it."""

DEVICE_ID = 0x5359_5354
"""Value of the ID register: ``SYST`` in ASCII."""

__all__ = [
    "COMMANDS",
    "CSRS",
    "DEVICE_ID",
    "TRACE_EVENT",
    "VERSION",
    "Command",
    "Config",
    "ConfigError",
    "Control",
    "Csr",
    "Decoder",
    "Encoder",
    "Engine",
    "Fault",
    "Field",
    "Irq",
    "Limit",
    "LoadTarget",
    "Opcode",
    "PostOp",
    "PostSource",
    "Status",
    "TraceKind",
    "WindowOp",
    "broken_limit",
    "command_at",
    "encode",
]
