"""Limits of single commands, read from the command set."""

from __future__ import annotations

from systole.isa import COMMANDS, Opcode


def largest(opcode: Opcode, field: str) -> int:
    """The largest value of a command's field."""
    return COMMANDS[opcode].places[field][0].high
