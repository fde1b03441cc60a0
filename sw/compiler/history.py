"""The history of a memory: which command wrote each word last, and which have read it since."""

from __future__ import annotations

from bisect import bisect_left

NEVER = -1
"""The number of no command: nothing has written a word yet."""


class History:
    """The last accesses to the words of one memory, by the numbers of the commands.

    Words that have been accessed alike lie together in segments, as commands mostly take whole
    tiles, rows or pieces of weights."""

    def __init__(self) -> None:
        # By segment, in order: its first word, its last writer, and by engine its last reader since
        # then.
        self._starts = [0]
        self._writers = [NEVER]
        self._readers: list[dict[int, int]] = [{}]

    def read(self, command: int, engine: int, words: tuple[int, int], before: set[int]) -> None:
        """Note that a command reads words (first, end). Adds to ``before`` the commands that wrote
        them last, which may be NEVER."""
        low, high = self._segments(*words)
        for readers in self._readers[low:high]:
            readers[engine] = command
        before.update(self._writers[low:high])

    def write(self, command: int, words: tuple[int, int], before: set[int]) -> None:
        """Note that a command writes words (first, end). Adds to ``before`` the commands that wrote
        them last, which may be NEVER, and those that have read them since."""
        low, high = self._segments(*words)
        before.update(self._writers[low:high])
        for readers in self._readers[low:high]:
            before.update(readers.values())
        if low < high:
            self._starts[low:high] = words[:1]
            self._writers[low:high] = [command]
            self._readers[low:high] = [{}]

    def _segments(self, first: int, end: int) -> tuple[int, int]:
        """The segments that are exactly these words: the number of the first, and of the one behind
        the last."""
        low, starts = self._begin(first), self._starts
        if low + 1 < len(starts) and starts[low + 1] == end:
            return low, low + 1  # the usual case
        return low, self._begin(end)

    def _begin(self, word: int) -> int:
        """The number of the segment that begins with a word; another is divided for it."""
        starts = self._starts
        number = bisect_left(starts, word)
        if number == len(starts) or starts[number] != word:
            starts.insert(number, word)
            self._writers.insert(number, self._writers[number - 1])
            self._readers.insert(number, dict(self._readers[number - 1]))
        return number
