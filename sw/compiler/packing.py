"""Packing: addresses of buffers that are in use for some of the stages only."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Buffer(Generic[Key]):
    """Words in use during stages ``first``..``last``."""

    key: Key
    words: int
    first: int
    last: int


def words_in_use(buffers: Iterable[Buffer[Key]], stages: int) -> np.ndarray:
    """The words that buffers take during each of so many stages."""
    change = np.zeros(stages + 1, np.int64)
    for b in buffers:
        change[b.first] += b.words
        change[b.last + 1] -= b.words
    return np.cumsum(change[:-1])


def pack(
    buffers: Sequence[Buffer[Key]], pause: int = 0, room: float = math.inf
) -> tuple[dict[Key, int], int]:
    """Addresses by key such that buffers alive together do not overlap, and the words needed: the
    largest first, each in the lowest gap that holds it. ``pause``: for how many stages after its
    last the words of a buffer are left alone. It gives up at the first buffer that would end beyond
    ``room`` words: then so many are needed at least, and addresses are missing."""
    addresses: dict[Key, int] = {}
    top = 0
    # Of the buffers placed so far, in order of their addresses: first stage, stage behind the
    # pause, begin and end.
    placed = np.zeros((4, len(buffers)), np.int64)
    for n, b in enumerate(sorted(buffers, key=lambda b: (-b.words, b.first))):
        first, free, begins, ends = placed[:, :n]
        together = (first <= b.last + pause) & (b.first < free)
        below = np.maximum.accumulate(np.concatenate([[0], ends[together]]))
        gaps = np.flatnonzero(begins[together] - below[:-1] >= b.words)
        at = int(below[gaps[0] if len(gaps) else -1])
        place = int(np.searchsorted(begins, at))
        placed[:, place + 1 : n + 1] = placed[:, place:n]
        placed[:, place] = b.first, b.last + pause + 1, at, at + b.words
        addresses[b.key] = at
        top = max(top, at + b.words)
        if top > room:
            break
    return addresses, top
