"""The weight buffer: pieces of the reduction, and which of them it holds."""

from __future__ import annotations

from dataclasses import dataclass

from systole.sw.compiler.plan import cuts

CHUNK_WORDS = 512
"""Weight words one WLOAD brings, about: the grain at which CONV can follow the load."""

JOINED_WORDS = 256
"""Weight words up to which pieces are loaded together; more would keep the first waiting."""


class WeightRing:
    """The weight buffer as a ring of loaded pieces; the oldest are overwritten."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._next = 0
        self._held: dict[tuple, tuple[int, int]] = {}

    def find(self, key: tuple) -> int | None:
        """Where the piece is, if it still is."""
        held = self._held.get(key)
        return held[0] if held else None

    def place(self, pieces: list[tuple[tuple, int]]) -> int:
        """Make room for pieces, (key, words) each, one behind the other; the first's address."""
        words = sum(n for _, n in pieces)
        if self._next + words > self.capacity:
            self._next = 0
        first = at = self._next
        self._held = {
            k: (a, n) for k, (a, n) in self._held.items() if a + n <= at or at + words <= a
        }
        for key, n in pieces:
            self._held[key] = (at, n)
            at += n
        self._next = at
        return first


@dataclass(frozen=True)
class Piece:
    """Part of the reduction of one column block that lies together in its weights: whole channel
    blocks, or kernel rows of one, or taps of one row."""

    block: int
    blocks: int
    ky: int
    kernel_h: int
    kx: int
    kernel_w: int

    def words(self, rows: int) -> int:
        return self.blocks * self.kernel_h * self.kernel_w * rows

    def offset(self, kernel_h: int, kernel_w: int, rows: int) -> int:
        """Weight words before it in its column block."""
        return ((self.block * kernel_h + self.ky) * kernel_w + self.kx) * rows


def pieces(blocks: int, kernel: tuple[int, int], rows: int, limit: int) -> list[Piece]:
    """The reduction in pieces of at most ``limit`` weight words, at least ``rows``: whole channel
    blocks, or kernel rows of one block where a block is larger, or taps where a row is larger."""
    kh, kw = kernel
    tiles = limit // rows
    if kh * kw <= tiles:
        return [Piece(b, n, 0, kh, 0, kw) for b, n in cuts(blocks, tiles // (kh * kw))]
    if kw <= tiles:
        parts = [(ky, n, 0, kw) for ky, n in cuts(kh, tiles // kw)]
    else:
        parts = [(ky, 1, kx, n) for ky in range(kh) for kx, n in cuts(kw, tiles)]
    return [Piece(b, 1, *part) for b in range(blocks) for part in parts]
