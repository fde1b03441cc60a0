"""Whole command streams at once: what :class:`~isa.commands.Encoder` and
:class:`~isa.commands.Decoder` do command by command."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from systole.isa.commands import COMMANDS, HEADER, Decoder, Engine, Field, Opcode, encode

_PLACES = COMMANDS[Opcode.END].places
_PRESENT_AT = _PLACES["present"][1]


@dataclass(slots=True)
class StreamCommand:
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


def _complete(commands: Sequence[StreamCommand]) -> np.ndarray:
    """All words, uint64 (commands, words), of the commands of one engine, which are of one kind;
    ``present`` is still 0."""
    command = COMMANDS[commands[0].opcode]
    out = np.zeros((len(commands), command.words), np.uint64)
    for name, column in _columns(commands).items():
        field, at = command.places[name]
        if column.min() < field.low or column.max() > field.high:
            _refuse(commands)
        bits = column.astype(np.uint64) & np.uint64((1 << field.bits) - 1)
        word, low = divmod(at, 64)
        out[:, word] |= bits << np.uint64(low)
        if low + field.bits > 64:
            out[:, word + 1] |= bits >> np.uint64(64 - low)
    return out


def _columns(commands: Sequence[StreamCommand]) -> dict[str, np.ndarray]:
    """By name, the values of all fields but ``present``, int64."""
    own = COMMANDS[commands[0].opcode].own_fields
    columns = {f.name: np.zeros(len(commands), np.int64) for f in own}
    # Most commands are made in few places, each of which names the same fields in the same order.
    alike: dict[tuple[str, ...], list[int]] = {}
    for i, c in enumerate(commands):
        alike.setdefault(tuple(c.values), []).append(i)
    for names, numbers in alike.items():
        if not columns.keys() >= set(names):
            _refuse(commands)
        try:
            listed = np.array([tuple(commands[i].values.values()) for i in numbers], np.int64)
        except OverflowError:
            _refuse(commands)
            raise
        for name, values in zip(names, listed.T, strict=True):
            columns[name][numbers] = values
    columns |= {n: np.array([getattr(c, n) for c in commands], np.int64) for n in _IN_HEADER}
    return columns


_IN_HEADER = [f.name for f in HEADER if f.name != "present"]


def _refuse(commands: Sequence[StreamCommand]) -> None:
    """Raises ``ValueError`` for the first of the commands that has no encoding."""
    for c in commands:
        encode(c.opcode, c.engine, wait=c.wait, signal=c.signal, **c.values)


def decode_stream(words: np.ndarray) -> Iterator[Mapping[str, int]]:
    """The fields of every command of a stream (uint64), END excluded. Raises ``ValueError`` as a
    :class:`~isa.commands.Decoder` does, and where there is no END."""
    starts = _starts(words.tolist())
    fields: list[Mapping[str, int] | None] = [None] * len(starts)
    engines = _column(*_PLACES["engine"], words[starts][:, None])
    for engine in np.unique(engines).tolist():
        own = np.flatnonzero(engines == engine)
        decoded = _fields_of_engine(engine, words, starts[own])
        if decoded is None:
            break
        for i, values in zip(own.tolist(), decoded, strict=True):
            fields[i] = values
    legal = [values for values in fields if values is not None]
    if len(starts) and len(legal) == len(starts):
        yield from legal
    else:
        yield from _one_by_one(words.tolist())


def _one_by_one(words: list[int]) -> Iterator[Mapping[str, int]]:
    """:func:`decode_stream`, up to the first command that is illegal."""
    at, decoder = 0, Decoder()
    while at < len(words):
        command, at = decoder.decode(words, at)
        if command["opcode"] == Opcode.END:
            return
        yield command
    raise ValueError("there is no END")


def _starts(words: list[int]) -> np.ndarray:
    """By command in front of END, the number of its first word; none where there is no END."""
    (opcode, opcode_at), (present, present_at) = _PLACES["opcode"], _PLACES["present"]
    at, starts = 0, list[int]()
    while at < len(words):
        head = words[at]
        if head >> opcode_at & ((1 << opcode.bits) - 1) == Opcode.END:
            return np.array(starts, np.int64)
        starts.append(at)
        at += 1 + (head >> present_at & ((1 << present.bits) - 1)).bit_count()
    return np.array([], np.int64)


def _fields_of_engine(
    engine: int, words: np.ndarray, starts: np.ndarray
) -> list[Mapping[str, int]] | None:
    """The fields of the commands of one engine, which begin at ``starts``; None if one of them is
    illegal."""
    heads = words[starts][:, None]
    opcodes = np.unique(_column(*_PLACES["opcode"], heads)).tolist()
    present = _column(*_PLACES["present"], heads)
    command = next((c for c in COMMANDS.values() if [c.opcode] == opcodes), None)
    if command is None or engine not in command.engines:
        return None
    if present[0] != command.complete or (present & ~command.complete).any():
        return None
    complete, next_word = [heads[:, 0]], starts + 1
    for i in range(command.words - 1):
        # A word that is not there is that of the last command that has it.
        there = (present >> i & 1).astype(bool)
        last = np.maximum.accumulate(np.where(there, np.arange(len(there)), 0))
        complete.append(words[next_word[last]])
        next_word = next_word + there
    whole = np.stack(complete, axis=1)
    columns = []
    for field, at in command.places.values():
        listed = _column(field, at, whole).tolist()
        if field.enum is not None:
            members = {int(member): member for member in field.enum}
            if not members.keys() >= set(listed):
                return None
            listed = [members[value] for value in listed]
        columns.append(listed)
    return [dict(zip(command.places, values)) for values in zip(*columns)]


def _column(field: Field, at: int, words: np.ndarray) -> np.ndarray:
    """The values, int64, of a field that begins at bit ``at`` of the commands ``words`` (commands,
    words)."""
    word, low = divmod(at, 64)
    bits = words[:, word] >> np.uint64(low)
    if low + field.bits > 64:
        bits = bits | words[:, word + 1] << np.uint64(64 - low)
    values = (bits & np.uint64((1 << field.bits) - 1)).astype(np.int64)
    if field.signed:
        values -= (values > field.high).astype(np.int64) << field.bits
    return values
