"""Damaged programs, replayable by seed: bits, fields, tokens, commands, words."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from systole.isa import COMMANDS, Encoder, Engine, Opcode
from systole.isa.commands import ENGINE_BITS, HEADER
from systole.sw.runtime.program import Program

Commands = list[dict[str, int]]
NOT_CHANGED = {f.name for f in HEADER} - {"wait", "signal"}


def encoded(commands: list[Mapping[str, int]]) -> list[int]:
    """The words of commands, END behind them."""
    words, encoder = [], Encoder()
    for command in commands:
        values = {k: v for k, v in command.items() if k not in NOT_CHANGED}
        words += encoder.encode(Opcode(command["opcode"]), Engine(command["engine"]), **values)
    return words + encoder.encode(Opcode.END)


def with_words(program: Program, words: list[int]) -> Program:
    """The program with other commands, at most as many words."""
    data = np.array(words, "<u8").tobytes()
    image = data + program.image[len(data) :]
    return dataclasses.replace(program, image=image, command_words=len(words))


def damaged(rng: np.random.Generator, program: Program) -> Program:
    """The program with a few bits of its commands changed, or one command's field, tokens or place,
    or words missing."""
    words, kind = program.commands(), rng.integers(10)
    if kind < 3:
        for _ in range(kind + 1):
            words[rng.integers(len(words))] ^= 1 << int(rng.integers(64))
    elif kind == 3:
        del words[rng.integers(len(words))]
    elif kind == 4:
        del words[rng.integers(len(words)) :]
    else:
        commands = [dict(c) for c in program.decoded()]
        (_change_field, _change_tokens, _move, _change_field, _change_tokens)[kind - 5](
            rng, commands
        )
        changed = encoded(commands)
        # What makes it longer than it was would be in the place of constants.
        words = changed if len(changed) <= len(words) else words[:-1]
    return with_words(program, words)


def _change_field(rng: np.random.Generator, commands: Commands) -> None:
    """One that is used, if the first drawn is not."""
    command = commands[rng.integers(len(commands))]
    fields = COMMANDS[Opcode(command["opcode"])].own_fields
    field = fields[rng.integers(len(fields))]
    if not command[field.name]:
        field = fields[rng.integers(len(fields))]
    value = command[field.name]
    near = (value - 1, value + 1, 2 * value, value ^ 1 << int(rng.integers(field.bits)))
    values = (*near, *near, 0, field.high, int(rng.integers(field.low, field.high + 1)))
    command[field.name] = min(max(values[rng.integers(len(values))], field.low), field.high)


def _change_tokens(rng: np.random.Generator, commands: Commands) -> None:
    command = commands[rng.integers(len(commands))]
    command[str(rng.choice(["wait", "signal"]))] ^= 1 << int(rng.integers(ENGINE_BITS))


def _move(rng: np.random.Generator, commands: Commands) -> None:
    """One command to another place, or away."""
    command = commands.pop(rng.integers(len(commands)))
    if rng.integers(3):
        commands.insert(rng.integers(len(commands) + 1), command)


def removed_waits(program: Program) -> list[tuple[int, Engine, Program]]:
    """For every token that a command waits for: the command, the token's giver, and the program
    that does not wait for it."""
    commands = list(program.decoded())
    out = []
    for index, command in enumerate(commands):
        for giver in Engine:
            if command["wait"] >> giver & 1:
                fewer = {**command, "wait": command["wait"] & ~(1 << giver)}
                words = encoded([*commands[:index], fewer, *commands[index + 1 :]])
                out.append((index, giver, with_words(program, words)))
    return out
