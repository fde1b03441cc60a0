"""Stages: what the compiler lowers operators to. Each kind runs on one chain of engines.

* :class:`ArrayStage`: CONV commands into the accumulators, then POST. Its output is made of
  interleaved phases (one, but for transposed convolutions and resizing). Each phase sums one or
  more passes, each a convolution of one source.
* :class:`WindowStage`: WINDOW commands.
* :class:`VectorStage`: POST from the scratchpad.
* :class:`RowStage`: WINDOW SOFTMAX and NORMALISE.
* :class:`TransposeStage`: WINDOW IM2COL, a byte at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from systole.isa import Opcode, PostOp, WindowOp
from systole.sw.compiler.limits import largest
from systole.sw.ir.graph import Op

MAX_DIM = largest(Opcode.CONV, "x0")
"""Largest image dimension: that of the signed fields ``x0`` and ``y0``."""


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


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Where images one pixel high lie in a tensor that does not hold them one after the other."""

    starts: tuple[int, ...]
    """By image, word of its first pixel in its first block."""
    blocks: tuple[int, ...]
    """By image, words side by side per pixel."""
    step: int
    """Words from one block to the next."""
    words: int
    """Words of the whole tensor."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """An activation that a stage reads, as the stage sees it."""

    tensor: str
    h: int
    w: int
    blocks: int
    """Words side by side per pixel; packed: 1."""
    geometries: tuple[Geometry, ...]
    """The windows that it is read through, one for each pass over it."""
    zero: int
    """Value read outside it."""
    per_group: bool
    """It is read one output group at a time (else every group needs all its channels)."""
    packed: bool = False
    """``w`` counts the words of a row."""
    broadcast: bool = False
    """One pixel stands for all."""
    spread: Spread | None = None

    def tensor_words(self, batch: int) -> int:
        """Scratchpad words of the whole tensor."""
        return self.spread.words if self.spread else batch * self.blocks * self.h * self.w

    def span(self, axis: int, first: int, count: int) -> tuple[int, int]:
        """The positions needed for ``count`` outputs from ``first``: start and end."""
        size = (self.h, self.w)[axis]
        spans = [g.span(axis, first, count, size) for g in self.geometries]
        return min(low for low, _ in spans), max(high for _, high in spans)


@dataclass(frozen=True, kw_only=True)
class Fold:
    """The im2col of a packed input: byte-wise geometry of the runs."""

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


@dataclass(frozen=True, kw_only=True)
class Combine:
    """POST's operation on its operands ``a`` and ``b``; names are those of POST's fields."""

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
    """One convolution of one source into the accumulators. Blocks of zero weights are left out."""

    source: int
    """Its number among the stage's sources."""
    geometry: Geometry
    runs: tuple[tuple[WeightRun, ...], ...]
    """By column block, the runs of weights."""
    weight_zero: int = 0
    """Zero point of the weights."""


@dataclass(frozen=True)
class Phase:
    """The outputs (y + i * steps[0], x + j * steps[1])."""

    y: int
    x: int
    passes: tuple[Pass, ...]
    params: int
    """First word of its parameters within those of the stage."""


@dataclass(frozen=True, kw_only=True)
class Product:
    """An activation as the weights of an array stage, another matrix for every image: its words in
    DRAM, channels in the lanes, are weight words. (Then ``rows`` is ``cols``.)

    Where the array takes zero points off, ``input_zero`` and ``weight_zero`` are those of x and w,
    and it multiplies once. Elsewhere they are 0, and accumulated are x * w, x * (minus the zero
    point of w), whose weights are constant, and (minus the zero point of x) * w, for which the
    input is read outside itself."""

    tensor: str
    complement: str | None
    """The tensor of -1 - w, which ``pads`` go with; for a zero point of x of -128."""
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
    the matrix in its rows. ``weights`` begins with ``rows`` words of ``weight_zero``."""
    input_zero: int = 0
    weight_zero: int = 0

    @property
    def tensors(self) -> tuple[str, ...]:
        """The tensors read from DRAM."""
        return (self.tensor,) if self.complement is None else (self.tensor, self.complement)


@dataclass(frozen=True)
class ParameterBands:
    """Parameters of a window stage that differ over the image, but not from group to group."""

    rows: np.ndarray
    """By output row, its kind."""
    columns: np.ndarray
    """By output column, its kind."""
    sets: np.ndarray
    """By kind of row and kind of column, the number of the parameter set."""


FixedRole = Literal["params", "window_weights", "table"]
"""What a stage may need in the scratchpad besides activations."""


@dataclass(frozen=True, kw_only=True, eq=False)
class BaseStage:
    """What stages of every kind have: one operator on its engines."""

    layer: int
    """Number of the graph's operator that the stage belongs to."""
    op: Op
    batch: int
    h: int
    """Output rows of one phase (the largest)."""
    w: int
    """Output columns of one phase (the largest)."""
    out_h: int
    """Rows of the whole output."""
    out_w: int
    """Columns of the whole output."""
    channels: int
    """Output channels."""
    blocks: int
    """Scratchpad words per output pixel."""
    group_words: int
    """Scratchpad words per output pixel made between two stores: an output group."""
    sources: tuple[Source, ...]
    steps: tuple[int, int] = (1, 1)
    """Interleaved phases along rows and columns."""
    striped: bool = True
    """It may be carried out in stripes: its rows are those of the graph's tensors."""

    @property
    def out_words(self) -> int:
        """Scratchpad words of the whole output."""
        return self.batch * self.blocks * self.out_h * self.out_w

    @property
    def groups(self) -> int:
        """Output groups."""
        return -(-self.blocks // self.group_words)

    @property
    def fixed(self) -> list[tuple[FixedRole, np.ndarray]]:
        """Words (count, rows) that the stage needs in the scratchpad besides activations, in
        order."""
        return []

    @property
    def fixed_words(self) -> int:
        """Scratchpad words of all of ``fixed``."""
        return sum(len(words) for _, words in self.fixed)

    @property
    def weight_words(self) -> int:
        """Words that the weight buffer would have to hold for one image to be loaded once."""
        return 0

    @property
    def whole_sources(self) -> list[tuple[int, Source]]:
        """Numbered, the sources that are read whole for every group."""
        return [(k, s) for k, s in enumerate(self.sources) if not s.per_group]

    def image_place(self, n: int) -> tuple[int, int]:
        """Where image ``n`` of the output lies in its tensor: its first word, and the words from
        one block to the next."""
        size = self.out_h * self.out_w
        return n * self.blocks * size, size


@dataclass(frozen=True, kw_only=True, eq=False)
class ArrayStage(BaseStage):
    """CONV commands into the accumulators, then POST.

    The last source is the other operand of ``combine``, if there is one."""

    kind: ClassVar[Literal["array"]] = "array"
    phases: tuple[Phase, ...]
    requant: Requant
    weights: np.ndarray
    """int8 (words, cols), for the weight buffer."""
    params: np.ndarray
    """int8 (words, rows)."""
    combine: Combine | None = None
    fold: Fold | None = None
    table: np.ndarray | None = None
    """int8 (words, rows): 256 bytes."""
    product: Product | None = None
    spread: Spread | None = None
    """Where the output's images lie, if not one after the other."""

    @property
    def out_words(self) -> int:
        return self.spread.words if self.spread else super().out_words

    @property
    def fixed(self) -> list[tuple[FixedRole, np.ndarray]]:
        return _present(("params", self.params), ("table", self.table))

    @property
    def weight_words(self) -> int:
        words = len(self.weights)
        if self.product is not None:
            words += self.blocks * self.product.depth * len(self.product.tensors)
        return words

    def image_place(self, n: int) -> tuple[int, int]:
        if self.spread is not None:
            return self.spread.starts[n], self.spread.step
        return super().image_place(n)


@dataclass(frozen=True, kw_only=True, eq=False)
class WindowStage(BaseStage):
    """WINDOW commands that reduce every channel by itself."""

    kind: ClassVar[Literal["window"]] = "window"
    window_op: WindowOp
    requant: Requant
    params: np.ndarray | None = None
    """int8 (words, rows), for every block, or for one that stands for all."""
    window_weights: np.ndarray | None = None
    """int8 (blocks * kh * kw, rows)."""
    weight_zero: int = 0
    """Zero point of these weights."""
    bands: ParameterBands | None = None

    @property
    def fixed(self) -> list[tuple[FixedRole, np.ndarray]]:
        return _present(("params", self.params), ("window_weights", self.window_weights))


@dataclass(frozen=True, kw_only=True, eq=False)
class VectorStage(BaseStage):
    """POST commands from the scratchpad: ``a`` is the first source, ``b`` the second."""

    kind: ClassVar[Literal["vector"]] = "vector"
    combine: Combine
    table: np.ndarray | None = None
    """int8 (words, rows): 256 bytes."""

    @property
    def fixed(self) -> list[tuple[FixedRole, np.ndarray]]:
        return _present(("table", self.table))


@dataclass(frozen=True, kw_only=True, eq=False)
class RowStage(BaseStage):
    """WINDOW commands that reduce all channels of a position. The second source, if there is one,
    is SOFTMAX's mask."""

    kind: ClassVar[Literal["row"]] = "row"
    row_op: WindowOp
    requant: Requant
    params: np.ndarray
    """int8 (words, rows)."""
    period: int = 0
    """Positions of one causal matrix; 0: none is."""

    @property
    def fixed(self) -> list[tuple[FixedRole, np.ndarray]]:
        return [("params", self.params)]


@dataclass(frozen=True, kw_only=True, eq=False)
class TransposeStage(BaseStage):
    """WINDOW IM2COL commands that exchange channels and positions, a byte at a time."""

    kind: ClassVar[Literal["transpose"]] = "transpose"
    first: int = 0
    """The channel that becomes column 0."""


Stage = ArrayStage | WindowStage | VectorStage | RowStage | TransposeStage


def _present(
    *parts: tuple[FixedRole, np.ndarray | None],
) -> list[tuple[FixedRole, np.ndarray]]:
    return [(role, words) for role, words in parts if words is not None]
