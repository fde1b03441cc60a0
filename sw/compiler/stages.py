"""Stages: what the compiler lowers operators to. Each runs on one engine chain.

* *array*: CONV commands into the accumulators, then POST. Its output is made of interleaved phases
  (one, but for transposed convolutions and resizing); each phase sums one or more passes, each a
  convolution of one source.
* *window*: WINDOW commands.
* *vector*: POST from the scratchpad.
* *transpose*: WINDOW IM2COL, a byte at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from systole.isa import PostOp, WindowOp
from systole.sw.ir.graph import Op

MAX_DIM = (1 << 15) - 1
"""Largest image dimension: x0, y0 are 16 bits, signed."""


@dataclass(frozen=True)
class Geometry:
    """A sliding window: (y, x) pairs; pads are top and left only."""

    kernel: tuple[int, int] = (1, 1)
    strides: tuple[int, int] = (1, 1)
    pads: tuple[int, int] = (0, 0)
    dilations: tuple[int, int] = (1, 1)

    def span(self, axis: int, first: int, count: int, size: int) -> tuple[int, int]:
        """The input positions, clipped to ``size`` and at least one, under ``count`` outputs from
        ``first``: start and end."""
        low = first * self.strides[axis] - self.pads[axis]
        high = (first + count - 1) * self.strides[axis] - self.pads[axis]
        high += (self.kernel[axis] - 1) * self.dilations[axis] + 1
        low, high = max(low, 0), min(high, size)
        if low >= high:  # wholly in the padding
            low = min(max(low, 0), size - 1)
            high = low + 1
        return low, high


POINTWISE = Geometry()


@dataclass(frozen=True)
class Spread:
    """Where images one pixel high lie in a tensor that has not one after the other."""

    starts: tuple[int, ...]
    """By image, word of its first pixel in its first block."""
    blocks: tuple[int, ...]
    """By image, words side by side per pixel."""
    step: int
    """Words from one block to the next."""
    words: int
    """Of the whole tensor."""


@dataclass(frozen=True)
class Source:
    """An activation that a stage reads, as the stage sees it."""

    tensor: str
    h: int
    w: int
    blocks: int
    """Words side by side per pixel; packed: 1."""
    geometries: tuple[Geometry, ...]
    """How it is read: one for each pass over it."""
    zero: int
    """What is read outside it."""
    per_group: bool
    """Read one output group at a time (else all its channels are needed for every group)."""
    packed: bool = False
    """``w`` counts the words of a row."""
    broadcast: bool = False
    """One pixel stands for all."""
    spread: Spread | None = None

    def tensor_words(self, batch: int) -> int:
        """Of the whole tensor."""
        return self.spread.words if self.spread else batch * self.blocks * self.h * self.w

    def span(self, axis: int, first: int, count: int) -> tuple[int, int]:
        """The positions needed for ``count`` outputs from ``first``: start and end."""
        size = (self.h, self.w)[axis]
        spans = [g.span(axis, first, count, size) for g in self.geometries]
        return min(low for low, _ in spans), max(high for _, high in spans)


@dataclass(frozen=True)
class Fold:
    """IM2COL of a packed input: byte-wise geometry of the runs."""

    runs: int
    """Runs per kernel row."""
    run: int
    """Bytes per run."""
    geometry: Geometry
    """x in pixels, as in the model."""
    channels: int
    in_w: int
    """Bytes of an image row."""
    words: int
    """Reduction words per output."""
    by_row: bool
    """Each input row is gathered once, for a kernel one column wide; else every output gathers all
    kernel rows, for a 1x1 kernel."""


@dataclass(frozen=True)
class Requant:
    """Clamps and zero point of POST and WINDOW."""

    zero: int
    low: int
    high: int


@dataclass(frozen=True)
class Combine:
    """POST's operation on two operands; the fields are POST's."""

    op: PostOp
    za: int = 0
    zb: int = 0
    zo: int = 0
    ma: int = 0
    mb: int = 0
    shift: int = 1
    low2: int = -128
    high2: int = 127


@dataclass(frozen=True)
class WeightRun:
    """Consecutive channel blocks of one column block with weights that are not all zero."""

    block: int
    blocks: int
    offset: int
    """Word of its first tile in the stage's weights."""


@dataclass(frozen=True)
class Pass:
    """One convolution into the accumulators. Blocks of zero weights are left out."""

    source: int
    geometry: Geometry
    runs: tuple[tuple[WeightRun, ...], ...]
    """By column block."""


@dataclass(frozen=True)
class Phase:
    """The outputs (y + i * steps[0], x + j * steps[1])."""

    y: int
    x: int
    passes: tuple[Pass, ...]
    params: int
    """Word of its parameters in the stage's."""


@dataclass(frozen=True)
class Product:
    """An activation as the weights of an array stage, another matrix for every image: its words in
    DRAM, channels in the lanes, are weight words. (Then ``rows`` is ``cols``.)

    Accumulated are x * w, x * (minus the zero point of w), constant weights, and (minus the zero
    point of x) * w, for which the input is read outside itself."""

    tensor: str
    complement: str | None
    """The tensor of -1 - w, for a zero point of x of -128: what ``pads`` go with."""
    spread: Spread
    """Blocks are column blocks, pixels the rows of the matrix."""
    depth: int
    """Rows of the matrix."""
    lanes: tuple[int, ...]
    """By image, the lane of the input that the matrix' first row goes with."""
    pads: tuple[int, ...]
    """int8 numbers that add up to minus the zero point of the input, with a complement to it."""
    zeros: dict[int, tuple[int, ...]]
    """By lane, the words in ``weights`` of constant matrices that add up to minus the zero point of
    the matrix in its rows. ``weights`` begins with ``rows`` words of zeros."""

    @property
    def tensors(self) -> tuple[str, ...]:
        """What is read from DRAM."""
        return (self.tensor,) if self.complement is None else (self.tensor, self.complement)


@dataclass(frozen=True)
class Stage:
    """One operator on its engines.

    ``h`` and ``w`` count outputs of one phase (the largest); ``out_h``, ``out_w`` are the output's.
    In an array stage with ``other``, that is the last source.
    """

    layer: int
    op: Op
    kind: Literal["array", "window", "vector", "transpose"]
    batch: int
    h: int
    w: int
    out_h: int
    out_w: int
    channels: int
    blocks: int
    """Scratchpad words per output pixel."""
    group_words: int
    """Scratchpad words per output pixel made between two stores."""
    sources: tuple[Source, ...]
    steps: tuple[int, int] = (1, 1)
    phases: tuple[Phase, ...] = ()
    requant: Requant | None = None
    combine: Combine | None = None
    fold: Fold | None = None
    window_op: WindowOp | None = None
    weights: np.ndarray | None = None
    """(words, cols), int8, for the weight buffer."""
    params: np.ndarray | None = None
    """(words, rows), int8; of a window stage for every block, or for one that stands for all."""
    window_weights: np.ndarray | None = None
    """(blocks * kh * kw, rows), int8."""
    table: np.ndarray | None = None
    """(words, rows), int8: 256 bytes."""
    bands: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
    """Window stages with parameters that differ over the image, and not from group to group: the
    kinds of its output rows and of its columns, and the number of the parameters by both."""
    product: Product | None = None
    spread: Spread | None = None
    """Where the output's images lie."""
    striped: bool = True
    """It may be carried out in stripes: its rows are those of the graph's tensors."""

    @property
    def out_words(self) -> int:
        """Of the whole output."""
        if self.spread is not None:
            return self.spread.words
        return self.batch * self.blocks * self.out_h * self.out_w

    @property
    def groups(self) -> int:
        return -(-self.blocks // self.group_words)

    @property
    def fixed(self) -> list[tuple[str, np.ndarray]]:
        """What the stage needs in the scratchpad besides activations, in order."""
        roles = ("params", "window_weights", "table")
        return [(r, getattr(self, r)) for r in roles if getattr(self, r) is not None]

    @property
    def fixed_words(self) -> int:
        return sum(len(words) for _, words in self.fixed)

    @property
    def weight_words(self) -> int:
        """What the weight buffer would have to hold for one image to be loaded once."""
        words = 0 if self.weights is None else len(self.weights)
        if self.product is not None:
            words += self.blocks * self.product.depth * len(self.product.tensors)
        return words

    @property
    def mains(self) -> list[tuple[int, Source]]:
        """The sources that are read whole for every group."""
        return [(k, s) for k, s in enumerate(self.sources) if not s.per_group]
