"""Whole command streams at once: what :class:`~isa.commands.Encoder` does command by command."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from systole.isa.commands import COMMANDS, HEADER, Engine, Opcode, encode


class StreamCommand(NamedTuple):
    """A command of a stream, complete."""

    opcode: Opcode
    engine: Engine
    wait: int
    signal: int
    values: Mapping[str, int]
    """The other fields that are not 0, by name."""


class EncodedStream(NamedTuple):
    """The words of a stream."""

    words: np.ndarray
    """uint64."""
    starts: np.ndarray
    """By command, the number of its first word."""


def encode_stream(commands: Sequence[StreamCommand]) -> EncodedStream:
    """The words of a stream of commands and END, as short as they can be. Raises ``ValueError`` as
    :func:`~isa.commands.encode` does."""
    longest = max(command.words for command in COMMANDS.values())
    words = np.zeros((len(commands) + 1, longest), np.uint64)
    present = np.zeros((len(commands) + 1, longest), bool)
    by_engine: dict[Engine, list[int]] = {}
    for i, c in enumerate(commands):
        by_engine.setdefault(c.engine, []).append(i)
    for own in by_engine.values():
        complete = _complete([commands[i] for i in own])
        kept = np.ones_like(complete, bool)
        kept[1:, 1:] = complete[1:, 1:] != complete[:-1, 1:]
        bits = np.uint64(1) << np.arange(_PRESENT_AT, _PRESENT_AT + kept.shape[1] - 1).astype("u8")
        complete[:, 0] |= kept[:, 1:] @ bits
        words[own, : kept.shape[1]] = complete
        present[own, : kept.shape[1]] = kept
    words[-1, 0], present[-1, 0] = encode(Opcode.END)[0], True
    lengths = present.sum(axis=1)
    return EncodedStream(words[present], np.cumsum(lengths) - lengths)


_PRESENT_AT = COMMANDS[Opcode.END].places["present"][1]


def _complete(commands: Sequence[StreamCommand]) -> np.ndarray:
    """All words, uint64 (commands, words), of the commands of one engine, which are of one kind;
    ``present`` is still 0."""
    command = COMMANDS[commands[0].opcode]
    out = np.zeros((len(commands), command.words), np.uint64)
    values = [c.values for c in commands]
    columns = {f.name: [v.get(f.name, 0) for v in values] for f in command.own_fields}
    if not set().union(*values) <= columns.keys():
        _refuse(commands)
    columns |= {name: [getattr(c, name) for c in commands] for name in _IN_HEADER}
    for name, listed in columns.items():
        field, at = command.places[name]
        if min(listed) < field.low or max(listed) > field.high:
            _refuse(commands)
        bits = np.array(listed, np.int64).astype(np.uint64) & np.uint64((1 << field.bits) - 1)
        word, low = divmod(at, 64)
        out[:, word] |= bits << np.uint64(low)
        if low + field.bits > 64:
            out[:, word + 1] |= bits >> np.uint64(64 - low)
    return out


_IN_HEADER = [f.name for f in HEADER if f.name != "present"]


def _refuse(commands: Sequence[StreamCommand]) -> None:
    """Raises ``ValueError`` for the first of the commands that has no encoding."""
    for c in commands:
        encode(c.opcode, c.engine, wait=c.wait, signal=c.signal, **c.values)
