"""Packing: addresses of buffers that are in use for some of the stages only."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Buffer(Generic[Key]):
    """Words in use during stages ``first``..``last``."""

    key: Key
    words: int
    first: int
    last: int

    def alive(self, i: int) -> bool:
        """It is in use during stage ``i``."""
        return self.first <= i <= self.last


def pack(buffers: Sequence[Buffer[Key]]) -> tuple[dict[Key, int], int]:
    """Addresses by key such that buffers alive together do not overlap, and the words needed."""
    placed: list[tuple[Buffer[Key], int]] = []
    addresses: dict[Key, int] = {}
    top = 0
    for b in sorted(buffers, key=lambda b: (-b.words, b.first)):
        taken = sorted(
            (at, at + p.words) for p, at in placed if p.first <= b.last and b.first <= p.last
        )
        at = 0
        for start, end in taken:
            if start - at >= b.words:
                break
            at = max(at, end)
        placed.append((b, at))
        addresses[b.key] = at
        top = max(top, at + b.words)
    return addresses, top
