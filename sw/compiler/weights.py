"""The weight buffer: pieces of the reduction, and which of them it holds."""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

from systole.sw.compiler.regions import Extent, cuts

CHUNK_WORDS = 512
"""Weight words one WLOAD brings, about: the grain at which CONV can follow the load."""

TOGETHER_WORDS = 256
"""Weight words up to which pieces are loaded together; more would keep the first waiting."""


class WeightRing:
    """The weight buffer as a ring of loaded pieces; the oldest are overwritten."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._next = 0
        self._at: dict[Hashable, int] = {}
        """By piece, its address."""
        # The same pieces in order of addresses; they do not overlap.
        self._keys: list[Hashable] = []
        self._begins: list[int] = []
        self._ends: list[int] = []

    def find(self, key: Hashable) -> int | None:
        """Address of the piece, if it is still there."""
        return self._at.get(key)

    def place(self, pieces: Sequence[tuple[Hashable, int]]) -> int:
        """Make room for pieces, (key, words) each, one behind the other. The address of the
        first."""
        words = sum(n for _, n in pieces)
        if self._next + words > self.capacity:
            self._next = 0
        begins = list(itertools.accumulate((n for _, n in pieces), initial=self._next))
        gone = slice(
            bisect.bisect_right(self._ends, begins[0]), bisect.bisect_left(self._begins, begins[-1])
        )
        for key in self._keys[gone]:
            del self._at[key]
        keys = [key for key, _ in pieces]
        self._keys[gone], self._begins[gone], self._ends[gone] = keys, begins[:-1], begins[1:]
        self._at.update(zip(keys, begins[:-1], strict=True))
        self._next = begins[-1]
        return begins[0]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Part of the reduction of one column block that lies together in its weights: whole channel
    blocks, or kernel rows of one, or taps of one row."""

    block: int
    """First channel block."""
    blocks: int
    ky: int = 0
    """First kernel row."""
    kernel_h: int
    """Kernel rows."""
    kx: int = 0
    """First tap of a row."""
    kernel_w: int
    """Taps of a row."""

    @functools.cached_property
    def taps(self) -> Extent:
        """The rectangle of the kernel."""
        return Extent(self.ky, self.kx, self.kernel_h, self.kernel_w)

    def words(self, rows: int) -> int:
        """Weight words."""
        return self.blocks * self.kernel_h * self.kernel_w * rows

    def offset(self, kernel_h: int, kernel_w: int, rows: int) -> int:
        """Weight words before it in its column block."""
        return ((self.block * kernel_h + self.ky) * kernel_w + self.kx) * rows


@functools.cache
def pieces(blocks: int, kernel: tuple[int, int], rows: int, limit: int) -> tuple[Piece, ...]:
    """The reduction in pieces of at most ``limit`` weight words, at least ``rows``: whole channel
    blocks, or kernel rows of one block where a block is larger, or taps where a row is larger."""
    kh, kw = kernel
    tiles = limit // rows
    if kh * kw <= tiles:
        parts = cuts(blocks, tiles // (kh * kw))
        return tuple(Piece(block=b, blocks=n, kernel_h=kh, kernel_w=kw) for b, n in parts)
    if kw <= tiles:
        of_block = [
            Piece(block=0, blocks=1, ky=ky, kernel_h=n, kernel_w=kw)
            for ky, n in cuts(kh, tiles // kw)
        ]
    else:
        of_block = [
            Piece(block=0, blocks=1, ky=ky, kernel_h=1, kx=kx, kernel_w=n)
            for ky in range(kh)
            for kx, n in cuts(kw, tiles)
        ]
    return tuple(replace(part, block=b) for b in range(blocks) for part in of_block)
