"""Events the trace unit writes to DRAM: 128 bits each, little-endian, in order of occurrence."""

from __future__ import annotations

import enum

from systole.isa.commands import Engine, Field


class TraceKind(enum.IntEnum):
    START = 1
    """The command took its tokens and was accepted by its engine."""
    END = 2
    """All effects of the command are visible; its tokens are given."""


TRACE_EVENT = (
    Field("cycle", 40, "cycle counter, 0 at the start of the program"),
    Field("kind", 4, "what happened", enum=TraceKind),
    Field("engine", 4, "where", enum=Engine),
    Field("index", 24, "index of the command in the program, from 0"),
    Field("waited", 24, "START: cycles the command waited for tokens at the head of its queue"),
    Field("missing", 8, "START: the tokens missing in the last cycle of that wait"),
    Field("stalled", 24, "END: cycles since the engine's previous END in which memory held it up"),
)
"""Fields packed from bit 0, 128 bits in all."""

TRACE_EVENT_BYTES = 16
