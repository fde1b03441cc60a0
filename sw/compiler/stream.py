"""The command stream: commands appended in an order that is legal to execute one by one, tokens
derived from what each command reads and writes.

For every memory, the last writer of each word and each engine's last reader since are remembered
(:mod:`~sw.compiler.history`). A new command depends on the commands of other engines that it
conflicts with; as engines run in order, only the latest of each engine matters, and none that
earlier tokens already imply (vector clocks).
"""

from __future__ import annotations

import enum
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from systole.isa import COMMANDS, Engine, Opcode
from systole.isa.csr import TOKEN_BITS
from systole.isa.streams import StreamCommand, encode_stream
from systole.sw.compiler.history import NEVER, History
from systole.sw.ir.graph import ModelError

_TRANSFERS = (Opcode.LOAD, Opcode.STORE)
(DRAM_AT,) = {COMMANDS[o].places["dram"][1] for o in _TRANSFERS}
"""Bit of a command's first word where its DRAM address begins."""
assert DRAM_AT + COMMANDS[Opcode.LOAD].places["dram"][0].bits <= 64

MAX_TOKENS = (1 << TOKEN_BITS) - 1
"""Tokens a counter holds."""

AHEAD = MAX_TOKENS // 2
"""Tokens one engine may have given another that it has not taken: beyond, it waits for the other.
Queues are in order and seldom as deep, so that this costs nothing."""


class StreamMemory(enum.IntEnum):
    """What tokens are derived for. Accumulators count in halves: CONV and POST never share one."""

    DRAM = 0
    SCRATCHPAD = 1
    WEIGHTS = 2
    ACCUMULATORS = 3


class Span(NamedTuple):
    """``count[2] x count[1]`` runs of ``count[0]`` words: start + i * step[0] + j * step[1] + k."""

    memory: StreamMemory
    start: int
    counts: tuple[int, int, int]
    """Outer, middle, inner (inner contiguous)."""
    steps: tuple[int, int] = (0, 0)
    """Words from one outer and one middle to the next."""

    def runs(self) -> list[tuple[int, int]]:
        """The words in contiguous runs: the first of each, and the one behind its last."""
        _, start, (outer, middle, inner), (outer_step, middle_step) = self
        if middle == 1 or middle_step == inner:
            inner, middle = inner * middle, 1
            if outer == 1 or outer_step == inner:
                return [(start, start + inner * outer)]
        firsts = [
            start + i * outer_step + j * middle_step for i in range(outer) for j in range(middle)
        ]
        return [(first, first + inner) for first in firsts]


def run(memory: StreamMemory, start: int, count: int) -> Span:
    """A contiguous span."""
    return Span(memory, start, (1, 1, count))


@dataclass(slots=True)
class Emitted(StreamCommand):
    """One command before encoding."""

    stage: int
    """Number of the stage that it belongs to."""
    clock: tuple[int, ...]
    """For each engine, the latest command (stream index) that happens before this one ends."""


@dataclass(slots=True)
class _Tokens:
    """All tokens that one engine gives another, in order."""

    givers: list[int] = field(default_factory=list)
    """The commands that give them."""
    takers: list[int] = field(default_factory=list)
    """The commands that take them."""
    taken: int = 0
    """How many of them the giving engine knows to have been taken."""


class TokenError(ModelError):
    """More tokens than a counter holds may be outstanding."""


class CommandStream:
    """Collects commands and derives their tokens."""

    def __init__(self, dram_unit: int):
        """``dram_unit``: bytes of DRAM that tokens are derived for together; all transfers are
        multiples of it."""
        self.dram_unit = dram_unit
        self._history = [History() for _ in StreamMemory]
        self.commands: list[Emitted] = []
        self._engine_of: list[int] = []
        self._known = [[NEVER] * len(Engine) for _ in Engine]
        """By engine, the clock of its last command."""
        self._tokens: list[dict[int, _Tokens]] = [{} for _ in Engine]
        """``_tokens[giver][taker]``."""

    def dram(self, address: int, size: int) -> Span:
        """The span of ``size`` bytes of DRAM."""
        first = address // self.dram_unit
        return run(StreamMemory.DRAM, first, -(-(address + size) // self.dram_unit) - first)

    def _accessed(self, me: Engine, reads: list[Span], writes: list[Span]) -> set[int]:
        """Note what the next command reads and writes; the commands that it conflicts with, which
        may be NEVER."""
        index, conflicts = len(self.commands), set[int]()
        for span in reads:
            history = self._history[span.memory]
            for words in span.runs():
                history.read(index, me, words, conflicts)
        for span in writes:
            history = self._history[span.memory]
            for words in span.runs():
                history.write(index, words, conflicts)
        return conflicts

    def _hold_back(self, me: Engine) -> Iterator[int]:
        """Where ``me`` may have given AHEAD tokens that nobody has taken, a command that takes one
        of them: if the next command of ``me`` needs it, half of them are gone then."""
        for other, tokens in self._tokens[me].items():
            takers = tokens.takers
            if len(takers) - tokens.taken < AHEAD:
                continue
            while tokens.taken < len(takers) and takers[tokens.taken] <= self._known[me][other]:
                tokens.taken += 1
            if len(takers) - tokens.taken >= AHEAD:
                yield takers[tokens.taken + AHEAD // 2]

    def emit(
        self,
        opcode: Opcode,
        values: Mapping[str, int],
        reads: list[Span],
        writes: list[Span],
        *,
        stage: int,
        engine: Engine | None = None,
    ) -> int:
        """Append a command; its stream index."""
        me = COMMANDS[opcode].engines[0] if engine is None else engine
        index, wait = len(self.commands), 0
        known = self._known[me]
        needed = self._accessed(me, reads, writes)
        needed.update(self._hold_back(me))
        known[me] = index
        self._engine_of.append(me)
        # Latest first: its clock may imply the others.
        for producer in sorted(needed, reverse=True):
            e = self._engine_of[producer]
            if producer > known[e]:
                wait |= 1 << e
                given = self.commands[producer]
                given.signal |= 1 << me
                tokens = self._tokens[e].setdefault(me, _Tokens())
                tokens.givers.append(producer)
                tokens.takers.append(index)
                known[:] = map(max, known, given.clock)
        clock = tuple(known)
        self.commands.append(Emitted(opcode, me, wait, 0, values, stage=stage, clock=clock))
        return index

    def check_tokens(self) -> None:
        """Raises :class:`TokenError` when some timing could overflow a token counter.

        A producer may have ended while the consumer has only gone as far as what must happen before
        the producer."""
        for source, by_target in enumerate(self._tokens):
            for target, tokens in by_target.items():
                for count, producer in enumerate(tokens.givers, 1):
                    done = self.commands[producer].clock[target]
                    left = count - bisect_right(tokens.takers, done)
                    if left > MAX_TOKENS:
                        raise TokenError(
                            f"up to {left} tokens from {Engine(source).name} to "
                            f"{Engine(target).name} outstanding: a counter holds {MAX_TOKENS}"
                        )

    def words(self, move_to: Callable[[int], int] = lambda words: 0) -> np.ndarray:
        """The encoded program, uint64, END appended. ``move_to``: how far the DRAM addresses are to
        be moved, in bytes, for a program of so many words."""
        words, starts = encode_stream(self.commands)
        # Addresses are in the commands' first words, which are always there: the length stays.
        transfers = [i for i, c in enumerate(self.commands) if c.opcode in _TRANSFERS]
        words[starts[transfers]] += np.uint64(move_to(len(words)) << DRAM_AT)
        return words
