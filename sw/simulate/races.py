"""Finds commands that are not ordered by tokens but touch the same word: races.

Every engine has a vector clock: for each engine, the latest command known to have ended. The k-th
wait on a pair of engines takes the token of its k-th signal, so a command happens after all earlier
ones of its engine, after the commands that gave it its tokens, and after everything before those.
For every word the latest read and write of each engine are remembered (as in FastTrack, Flanagan
and Freund 2009, without its epochs); a conflicting access that the clock of the command at hand
does not cover is a race, whatever the order in which the commands happen to be executed here.

Times are indices of commands in the program plus 1; 0 means never.
"""

from __future__ import annotations

import enum
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import SupportsInt

import numpy as np

from systole.isa import Config, Engine, Fault
from systole.isa.csr import TOKEN_BITS
from systole.sw.runtime.device import DeviceError
from systole.sw.runtime.driver import waiting_text


class CommandError(DeviceError):
    """A program that the hardware would execute wrongly, mostly without noticing. ``index`` is that
    of the command in the program, ``command`` its text, ``field`` what it concerns ("" if none)."""

    name = ""
    """What it is; where the hardware notices, the name of its :class:`isa.Fault`."""

    def __init__(self, index: int, command: str, message: str, field: str = ""):
        self.index = index
        self.command = command
        self.field = field
        at = f"{field}: " if field else ""
        super().__init__(f"command {index} ({command}): {at}{message}")


class MissingToken(CommandError):  # noqa: N818
    """A command waits for a token that no earlier command gave."""

    name = Fault.WATCHDOG.name


class TokenOverflow(CommandError):  # noqa: N818
    """Executed one by one, the program already exceeds what a token counter holds. (Other timings
    may have more tokens outstanding than this one; the hardware detects that.)"""

    name = Fault.TOKEN_OVERFLOW.name


class UninitialisedRead(CommandError):  # noqa: N818
    """A command reads a word that no command of this program wrote."""

    name = "UNINITIALISED_READ"


class Race(CommandError):  # noqa: N818
    """Two commands touch the same word, one of them writing, and no tokens order them.
    ``other`` is the earlier one's index."""

    name = "RACE"

    def __init__(self, index: int, command: str, message: str, field: str, other: int):
        self.other = other
        super().__init__(index, command, message, field)


class TrackedMemory(enum.Enum):
    """What is watched; the value names a word of it."""

    SCRATCHPAD = "scratchpad word"
    WEIGHTS = "weight word"
    ACCUMULATORS = "accumulator word"
    """Watched for uninitialised reads only: races follow from the halves."""
    HALVES = "accumulator half"
    """CONV and POST exclude one another: every use is a write."""
    DRAM = "DRAM vector"
    """Of ``dram_unit`` bytes; never uninitialised."""


@dataclass(frozen=True)
class Box:
    """The words ``start + i * steps[0] + j * steps[1] + ...`` for all i, j, ... below ``counts``
    (>= 1)."""

    start: int
    counts: tuple[int, ...]
    steps: tuple[int, ...]

    @property
    def last(self) -> int:
        """The highest word (steps are not negative)."""
        return self.start + sum((c - 1) * s for c, s in zip(self.counts, self.steps))

    def view(self, words: np.ndarray) -> np.ndarray:
        """The box in a one-dimensional array of all words."""
        size = words.itemsize
        steps = tuple(s * size for s in self.steps)
        return np.ndarray(self.counts, words.dtype, words, self.start * size, steps)

    def word(self, place: Sequence[SupportsInt]) -> int:
        """The word at an index of the view."""
        return self.start + sum(int(i) * s for i, s in zip(place, self.steps))


def span(start: int, count: int) -> Box:
    """Consecutive words."""
    return Box(start, (count,), (1,))


def progressions(values: np.ndarray) -> list[tuple[int, int, int]]:
    """Increasing integers as arithmetic progressions (first, count, step): a single one if they
    are one, else a progression for each run of consecutive integers."""
    if len(values) < 2:
        return [(int(v), 1, 1) for v in values]
    gaps = np.diff(values)
    if (gaps == gaps[0]).all():
        return [(int(values[0]), len(values), int(gaps[0]))]
    runs = np.split(values, np.flatnonzero(gaps != 1) + 1)
    return [(int(r[0]), len(r), 1) for r in runs]


class _Accesses:
    """The latest access of each engine to each word of one memory."""

    def __init__(self, words: int):
        self.words = words
        self.times: dict[Engine, np.ndarray] = {}
        self.latest: dict[Engine, int] = {}

    def add(self, engine: Engine, time: int, box: Box) -> None:
        if engine not in self.times:
            self.times[engine] = np.zeros(self.words, np.int32)
        box.view(self.times[engine])[...] = time
        self.latest[engine] = time

    def unordered(self, engine: Engine, clock: Sequence[int], box: Box) -> tuple[int, int] | None:
        """Time and word of an access of another engine to ``box`` that ``clock`` does not cover;
        None: there is none."""
        for other, latest in self.latest.items():
            if other == engine or latest <= clock[other]:
                continue
            times = box.view(self.times[other])
            late = times > clock[other]
            if late.any():
                place = np.unravel_index(int(late.argmax()), late.shape)
                return int(times[place]), box.word(place)
        return None


class Tracker:
    """Follows one run of a program in program order: ``begin``, accesses, ``end`` for each command.

    ``describe`` gives the text of a command by its index. Without ``check_races`` only tokens and
    uninitialised reads are checked.
    """

    def __init__(
        self, config: Config, dram_bytes: int, describe: Callable[[int], str], check_races: bool
    ):
        self.dram_unit = min(config.vector_bytes, config.weight_vector_bytes)
        self._describe = describe
        self._check_races = check_races
        words = {
            TrackedMemory.SCRATCHPAD: config.scratchpad_words,
            TrackedMemory.WEIGHTS: config.weight_words,
            TrackedMemory.ACCUMULATORS: config.acc_words,
        }
        self._initialised = {memory: np.zeros(n, bool) for memory, n in words.items()}
        del words[TrackedMemory.ACCUMULATORS]
        words |= {TrackedMemory.HALVES: 2, TrackedMemory.DRAM: -(-dram_bytes // self.dram_unit)}
        self._reads = {memory: _Accesses(n) for memory, n in words.items()}
        self._writes = {memory: _Accesses(n) for memory, n in words.items()}
        self._clocks = {e: [0] * len(Engine) for e in Engine}
        self._tokens: dict[tuple[Engine, Engine], deque[list[int]]] = defaultdict(deque)
        self._index = 0
        self._engine = Engine(0)

    def error(self, kind: type[CommandError], field: str, message: str) -> CommandError:
        """An error that names the current command."""
        return kind(self._index, self._describe(self._index), message, field)

    def begin(self, index: int, engine: Engine, wait: int) -> None:
        """Begin a command: it takes its tokens. Raises :class:`MissingToken`."""
        self._index, self._engine = index, engine
        clock = self._clocks[engine]
        givers = [giver for giver in Engine if wait >> giver & 1]
        if missing := [giver for giver in givers if not self._tokens[giver, engine]]:
            waits = waiting_text(engine, index, missing)
            raise self.error(MissingToken, "wait", f"{waits}, never given before (WATCHDOG)")
        for giver in givers:
            clock = [max(pair) for pair in zip(clock, self._tokens[giver, engine].popleft())]
        self._clocks[engine] = clock

    def read(self, memory: TrackedMemory, box: Box, field: str) -> None:
        """Note that the command reads ``box``, which ``field`` addresses.

        Raises :class:`UninitialisedRead`, :class:`Race`."""
        if memory in self._initialised:
            known = box.view(self._initialised[memory])
            if not known.all():
                place = np.unravel_index(int(known.argmin()), known.shape)
                raise self.error(
                    UninitialisedRead,
                    field,
                    f"reads {memory.value} {box.word(place)}, which was never written",
                )
        if self._check_races and memory in self._reads:
            self._require_order(
                self._writes[memory], memory, box, field, was="written", does="reads"
            )
            self._reads[memory].add(self._engine, self._index + 1, box)

    def write(self, memory: TrackedMemory, box: Box, field: str) -> None:
        """Note that the command writes ``box``, which ``field`` addresses. Raises :class:`Race`."""
        if memory in self._initialised:
            box.view(self._initialised[memory])[...] = True
        if self._check_races and memory in self._writes:
            for earlier, was in ((self._writes, "written"), (self._reads, "read")):
                self._require_order(earlier[memory], memory, box, field, was=was, does="writes")
            self._writes[memory].add(self._engine, self._index + 1, box)

    def _require_order(
        self,
        earlier: _Accesses,
        memory: TrackedMemory,
        box: Box,
        field: str,
        *,
        was: str,
        does: str,
    ) -> None:
        """Raise :class:`Race` if tokens do not order the command behind one of the ``earlier``
        accesses to ``box``. ``was``, ``does``: what the earlier and this command do there."""
        unordered = earlier.unordered(self._engine, self._clocks[self._engine], box)
        if unordered is None:
            return
        time, word = unordered
        other = time - 1
        if memory is TrackedMemory.HALVES:
            was, does = "used", "uses"
        if memory is TrackedMemory.DRAM:
            where = f"{self.dram_unit} bytes at {word * self.dram_unit:#x} of the DRAM window"
        else:
            where = f"{memory.value} {word}"
        raise Race(
            self._index,
            self._describe(self._index),
            f"{does} {where}, {was} by command {other} ({self._describe(other)}); no tokens order "
            "the two",
            field,
            other,
        )

    def end(self, signal: int) -> None:
        """End the command: it gives its tokens. Raises :class:`TokenOverflow`."""
        clock = self._clocks[self._engine]
        clock[self._engine] = self._index + 1
        for taker in Engine:
            if signal >> taker & 1:
                tokens = self._tokens[self._engine, taker]
                if len(tokens) == (1 << TOKEN_BITS) - 1:
                    raise self.error(
                        TokenOverflow,
                        "signal",
                        f"gives {taker.name} token {len(tokens) + 1} of {self._engine.name}; its "
                        f"counter has {TOKEN_BITS} bits (TOKEN_OVERFLOW)",
                    )
                tokens.append(list(clock))
