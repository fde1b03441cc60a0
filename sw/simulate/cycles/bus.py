"""The bus: bursts of transfers, and the fetch unit's requests among them."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from math import inf

from systole.isa import Config, LoadTarget, Opcode
from systole.isa.timing import (
    FETCH_BUFFER_WORDS,
    FETCH_REQUEST_WORDS,
    FETCH_RETURN,
    FETCH_START,
)


def bursts(c: Mapping[str, int], config: Config) -> tuple[int, ...]:
    """Bus cycles of each burst of a transfer: its beats, or its words if they are more."""
    size = config.vector_bytes
    if c["opcode"] == Opcode.LOAD and c["target"] == LoadTarget.WEIGHTS:
        size = config.weight_vector_bytes
    beat, longest = config.beat_bytes, config.axi_burst_beats
    # Bursts end where the address is a multiple of the longest.
    return _bursts(
        first=c["dram"] % (beat * longest),
        counts=(c["count2"], c["count1"], c["count0"]),
        steps=(c["dram2"], c["dram1"]),
        size=size,
        beat=beat,
        longest=longest,
    )


@lru_cache(4096)
def _bursts(
    *,
    first: int,
    counts: tuple[int, int, int],
    steps: tuple[int, int],
    size: int,
    beat: int,
    longest: int,
) -> tuple[int, ...]:
    slower = max(1, beat // size)  # cycles a beat holds up an engine that takes a word a cycle
    out = []
    for j in range(counts[0]):
        for i in range(counts[1]):
            start = first + i * steps[1] + j * steps[0]
            at, end = start // beat, -(-(start + counts[2] * size) // beat)
            while at < end:
                stop = min(end, (at // longest + 1) * longest)
                out.append((stop - at) * slower)
                at = stop
    return tuple(out)


@dataclass
class BusModel:
    """One direction of the bus: bursts in order of issue, ``outstanding`` of them in flight."""

    outstanding: int
    head: int
    """Cycles from a burst's issue to its first beat."""
    tail: int
    """Cycles from its last beat to when another may be issued in its place."""
    free: float = 0
    flight: deque[float] = field(default_factory=deque)

    def slot(self) -> float:
        """When the next burst may be issued."""
        return self.flight[0] if len(self.flight) == self.outstanding else 0

    def issue(self, at: float, beats: float) -> float:
        """Issue a burst; when its last beat ends."""
        if len(self.flight) == self.outstanding:
            self.flight.popleft()
        self.free = max(self.free, at + self.head) + beats
        self.flight.append(self.free + self.tail)
        return self.free


class FetchModel:
    """Fetches the program over the read bus, ahead of the commands handed out."""

    def __init__(self, words: int, bus: BusModel, config: Config):
        self.words, self.bus = words, bus
        self.beat_words = config.beat_bytes / 8
        self.asked = self.handed = 0
        self.room = deque[float]([FETCH_START] * (FETCH_BUFFER_WORDS // FETCH_REQUEST_WORDS))
        """Since when the buffer has had room for each of the requests to come."""
        self.come: deque[tuple[int, float]] = deque()
        """Requests whose words are not all handed out: the number of the word behind each, and when
        its last word is there."""

    def next(self) -> float:
        """When the next request can be issued; ``inf``: not yet, or never."""
        if self.asked == self.words or not self.room:
            return inf
        return max(self.room[0], self.bus.slot())

    def issue(self, at: float) -> None:
        """Issue the next request."""
        self.room.popleft()
        size = min(FETCH_REQUEST_WORDS, self.words - self.asked)
        end = self.bus.issue(at, -(-size // self.beat_words))
        self.asked += size
        self.come.append((self.asked, end + FETCH_RETURN))

    def _there(self, more: int) -> float:
        """When the first ``handed + more`` words are there; ``handed`` never goes down."""
        while self.come[0][0] < self.handed + more:
            self.come.popleft()
        after, last = self.come[0]
        return last - (after - self.handed - more) // self.beat_words

    def hand(self, size: int, at: float) -> float:
        """When the next ``size`` words, already asked for, have been handed out, from ``at`` on one
        a cycle."""
        handed = self.handed // FETCH_REQUEST_WORDS
        end = max(at, self._there(1) - 1) + size
        self.handed += size
        end = max(end, self._there(0))
        self.room += [end] * (self.handed // FETCH_REQUEST_WORDS - handed)
        return end
