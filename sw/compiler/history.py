"""The history of a memory: which command wrote each word last, and which have read it since."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

NEVER = -1
"""The number of no command: nothing has written a word yet."""


@dataclass(slots=True)
class _Segment:
    """Words that have been accessed alike."""

    end: int | None
    """The word behind the last; None: there is no last."""
    writer: int
    """The command that wrote them last."""
    readers: dict[int, int] = field(default_factory=dict)
    """By engine, the last command that has read them since."""


class History:
    """The last accesses to the words of one memory, by the numbers of the commands.

    Words that have been accessed alike lie together in segments, as commands mostly take whole
    tiles, rows or pieces of weights."""

    def __init__(self) -> None:
        self._segments = {0: _Segment(None, NEVER)}
        """By their first words."""
        self._starts = [0]
        """These, in order."""

    def read(self, command: int, engine: int, words: tuple[int, int], before: set[int]) -> None:
        """Note that a command reads words (first, end). Adds to ``before`` the commands that wrote
        them last, which may be NEVER."""
        for segment in self._within(*words):
            segment.readers[engine] = command
            before.add(segment.writer)

    def write(self, command: int, words: tuple[int, int], before: set[int]) -> None:
        """Note that a command writes words (first, end). Adds to ``before`` the commands that wrote
        them last, which may be NEVER, and those that have read them since."""
        first, end = words
        segments = self._within(first, end)
        for segment in segments:
            before.add(segment.writer)
            before.update(segment.readers.values())
        if len(segments) > 1:
            at = bisect_left(self._starts, first) + 1
            for start in self._starts[at : at + len(segments) - 1]:
                del self._segments[start]
            del self._starts[at : at + len(segments) - 1]
        if segments:
            self._segments[first] = _Segment(end, command)

    def _within(self, first: int, end: int) -> list[_Segment]:
        """The segments that are exactly these words, in order."""
        segment = self._segments.get(first)
        if segment is not None and segment.end == end:
            return [segment]  # the usual case
        low, high = self._begin(first), self._begin(end)
        return [self._segments[start] for start in self._starts[low:high]]

    def _begin(self, word: int) -> int:
        """The number of the segment that begins with a word; another is divided for it."""
        number = bisect_left(self._starts, word)
        if word not in self._segments:
            before = self._segments[self._starts[number - 1]]
            self._segments[word] = _Segment(before.end, before.writer, dict(before.readers))
            before.end = word
            self._starts.insert(number, word)
        return number
