"""The command stream: commands appended in an order that is legal to execute one by one, tokens
derived from what each command reads and writes.

For every memory, the last writer of each word and each engine's last reader are remembered. A new
command depends on the commands of other engines that it conflicts with; as engines run in order,
only the latest of each engine matters, and none that earlier tokens already imply (vector clocks).
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from systole.isa import COMMANDS, Config, Encoder, Engine, Opcode
from systole.isa.csr import TOKEN_BITS
from systole.sw.ir.graph import ModelError

(DRAM_AT,) = {COMMANDS[o].places["dram"][1] for o in (Opcode.LOAD, Opcode.STORE)}
"""Bit of a command's first word where its DRAM address begins."""
assert DRAM_AT + COMMANDS[Opcode.LOAD].places["dram"][0].bits <= 64

MAX_TOKENS = (1 << TOKEN_BITS) - 1
"""Tokens a counter holds."""

AHEAD = MAX_TOKENS // 2
"""Tokens one engine may have given another that it has not taken: beyond, it waits for the other.
Queues are in order and seldom as deep, so that this costs nothing."""


class StreamMemory(enum.Enum):
    """What tokens are derived for. Accumulators count in halves: CONV and POST never share one."""

    DRAM = "dram"
    SCRATCHPAD = "scratchpad"
    WEIGHTS = "weights"
    ACCUMULATORS = "accumulators"


@dataclass(frozen=True)
class Span:
    """``count[2] x count[1]`` runs of ``count[0]`` words: start + i * step[0] + j * step[1] + k."""

    memory: StreamMemory
    start: int
    counts: tuple[int, int, int]
    """Outer, middle, inner (inner contiguous)."""
    steps: tuple[int, int] = (0, 0)
    """Words from one outer and one middle to the next."""

    def indices(self) -> np.ndarray | slice:
        """What to index a per-word array with."""
        outer, middle, inner = self.counts
        outer_step, middle_step = self.steps
        if middle == 1 or middle_step == inner:
            inner, middle = inner * middle, 1
        if middle == 1 and (outer == 1 or outer_step == inner):
            return slice(self.start, self.start + inner * outer)
        i = np.arange(outer)[:, None, None] * outer_step
        j = np.arange(middle)[None, :, None] * middle_step
        return (self.start + i + j + np.arange(inner)[None, None, :]).ravel()


def run(memory: StreamMemory, start: int, count: int) -> Span:
    """A contiguous span."""
    return Span(memory, start, (1, 1, count))


@dataclass
class Emitted:
    """One command before encoding."""

    opcode: Opcode
    engine: Engine
    fields: Mapping[str, int]
    stage: int
    """Number of the stage that it belongs to."""
    wait: int
    clock: np.ndarray
    """For each engine, the latest command (stream index) that happens before this one ends."""
    signal: int = 0


class TokenError(ModelError):
    """More tokens than a counter holds may be outstanding."""


class CommandStream:
    """Collects commands and derives their tokens."""

    def __init__(self, config: Config, dram_bytes: int, dram_unit: int):
        """``dram_bytes``: length of the DRAM window. ``dram_unit``: bytes of DRAM that tokens are
        derived for together; all transfers are multiples of it."""
        self.dram_unit = dram_unit
        words = {
            StreamMemory.DRAM: -(-dram_bytes // dram_unit),
            StreamMemory.SCRATCHPAD: config.scratchpad_words,
            StreamMemory.WEIGHTS: config.weight_words,
            StreamMemory.ACCUMULATORS: 2,
        }
        self._writer = {m: np.full(n, -1, np.int32) for m, n in words.items()}
        self._readers = {m: np.full((len(Engine), n), -1, np.int32) for m, n in words.items()}
        self.commands: list[Emitted] = []
        self._engine_of: list[int] = []
        self._known = [np.full(len(Engine), -1) for _ in Engine]
        # By pair of engines (from, to), in order: the commands that give and take each token.
        self._waits: dict[tuple[int, int], list[tuple[int, int]]] = {}
        # How many of these tokens (from) knows to have been taken.
        self._taken: dict[tuple[int, int], int] = {}

    def dram(self, address: int, size: int) -> Span:
        """The span of ``size`` bytes of DRAM."""
        first = address // self.dram_unit
        return run(StreamMemory.DRAM, first, -(-(address + size) // self.dram_unit) - first)

    def _dependencies(self, me: Engine, reads: list[Span], writes: list[Span]) -> dict[int, int]:
        """Latest conflicting command of each other engine."""
        latest: dict[int, int] = {}

        def note(commands: np.ndarray) -> None:
            # Mostly they are all the same one.
            newest = int(np.maximum.reduce(commands, initial=-1))
            oldest = int(np.minimum.reduce(commands, initial=newest))
            for c in (newest,) if oldest == newest else np.unique(commands).tolist():
                if c >= 0:
                    e = self._engine_of[c]
                    if e != me:
                        latest[e] = max(latest.get(e, -1), c)

        for span in reads:
            note(self._writer[span.memory][span.indices()])
        for span in writes:
            at = span.indices()
            note(self._writer[span.memory][at])
            readers = np.maximum.reduce(self._readers[span.memory][:, at], axis=1, initial=-1)
            for e, command in enumerate(readers.tolist()):
                if e != me and command >= 0:
                    latest[e] = max(latest.get(e, -1), command)
        return latest

    def _hold_back(self, me: Engine, needed: dict[int, int]) -> None:
        """Where ``me`` may have given AHEAD tokens that nobody has taken, let its next command need
        a taker's: half of them are gone then."""
        for other in range(len(Engine)):
            pairs = self._waits.get((me, other), [])
            taken = self._taken.get((me, other), 0)
            if len(pairs) - taken < AHEAD:
                continue
            while taken < len(pairs) and pairs[taken][1] <= self._known[me][other]:
                taken += 1
            self._taken[(me, other)] = taken
            if len(pairs) - taken >= AHEAD:
                taker = pairs[taken + AHEAD // 2][1]
                needed[other] = max(needed.get(other, -1), taker)

    def emit(
        self,
        opcode: Opcode,
        fields: Mapping[str, int],
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
        needed = self._dependencies(me, reads, writes)
        self._hold_back(me, needed)
        # Latest first: its clock may imply the others.
        for e, producer in sorted(needed.items(), key=lambda item: -item[1]):
            if producer > known[e]:
                wait |= 1 << e
                self.commands[producer].signal |= 1 << me
                self._waits.setdefault((e, me), []).append((producer, index))
                np.maximum(known, self.commands[producer].clock, out=known)
        known[me] = index
        command = Emitted(
            opcode=opcode, engine=me, fields=fields, stage=stage, wait=wait, clock=known.copy()
        )
        self.commands.append(command)
        self._engine_of.append(int(me))
        for span in reads:
            self._readers[span.memory][me][span.indices()] = index
        for span in writes:
            self._writer[span.memory][span.indices()] = index
        return index

    def check_tokens(self) -> None:
        """Raises :class:`TokenError` when some timing could overflow a token counter.

        A producer may have ended while the consumer has only gone as far as what must happen before
        the producer."""
        for (source, target), pairs in self._waits.items():
            consumers = np.array([c for _, c in pairs])
            for count, (producer, _) in enumerate(pairs, 1):
                done = self.commands[producer].clock[target]
                taken = int(np.searchsorted(consumers, done, side="right"))
                if count - taken > MAX_TOKENS:
                    raise TokenError(
                        f"up to {count - taken} tokens from {Engine(source).name} to "
                        f"{Engine(target).name} outstanding: a counter holds {MAX_TOKENS}"
                    )

    def words(self, move_to: Callable[[int], int] = lambda words: 0) -> list[int]:
        """The encoded program, END appended. ``move_to``: how far the DRAM addresses are to be
        moved, in bytes, for a program of so many words."""
        out: list[int] = []
        transfers: list[int] = []
        encoder = Encoder()
        for c in self.commands:
            if c.opcode in (Opcode.LOAD, Opcode.STORE):
                transfers.append(len(out))
            out += encoder.encode(c.opcode, c.engine, wait=c.wait, signal=c.signal, **c.fields)
        out += encoder.encode(Opcode.END)
        # Addresses are in the commands' first words, which are always there: the length stays.
        distance = move_to(len(out)) << DRAM_AT
        for at in transfers:
            out[at] += distance
        return out
