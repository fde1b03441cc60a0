"""Where tensors lie in the scratchpad."""

from __future__ import annotations

from typing import NamedTuple

from systole.sw.compiler.regions import Extent
from systole.sw.compiler.stream import Span, StreamMemory


class BufferView(NamedTuple):
    """A rectangle of a tensor in the scratchpad."""

    base: int
    """Word of the rectangle's first pixel in block 0."""
    pitch: int
    """Words from one row to the next."""
    block: int
    """Words from one block to the next."""
    h: int
    w: int
    y: int = 0
    """First row, in the tensor."""
    x: int = 0
    """First column, in the tensor."""

    @staticmethod
    def of(base: int, extent: Extent) -> BufferView:
        """A rectangle of which nothing else lies between its rows and blocks."""
        y, x, h, w = extent
        return BufferView(base=base, pitch=w, block=h * w, y=y, x=x, h=h, w=w)

    @property
    def extent(self) -> Extent:
        return Extent(self.y, self.x, self.h, self.w)

    def from_block(self, block: int) -> BufferView:
        """The same without the first blocks."""
        return self._replace(base=self.base + block * self.block)

    def at(self, y: int, x: int, block: int = 0) -> int:
        """Word of position (y, x) of the tensor."""
        return self.base + block * self.block + (y - self.y) * self.pitch + (x - self.x)

    def words(self, extent: Extent, block: int = 0, blocks: int = 1) -> Span:
        """The words of some blocks of a rectangle of the tensor."""
        start = self.at(extent.y, extent.x, block)
        counts = (blocks, extent.h, extent.w)
        return Span(StreamMemory.SCRATCHPAD, start, counts, (self.block, self.pitch))
