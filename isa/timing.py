"""The timing contract: pipeline depths, and the rules that decide how many cycles a command takes.

The hardware takes its latencies and rules from here, and so do the compiler's estimates and the
cycle model. What a command *means* is in :mod:`systole.isa.commands`.

Functions that are documented to take *ints or hardware values* use only operators that both have.
Pass them ints for an answer, or Amaranth values for the logic that computes it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from systole.isa.commands import COMMANDS, TABLE_BYTES, Opcode, PostOp, PostSource, WindowOp
from systole.isa.config import LARGEST_SQUARE, Config
from systole.isa.rows import EPSILON_BITS, ROOT_BITS, VARIANCE_BITS

# Units that engines share -----------------------------------------------------------------------

REQUANTISE_LATENCY = 9
"""Cycles from an accumulator to its int8 (``hw.arithmetic.Requantise``)."""

# Fetch unit and transfers -----------------------------------------------------------------------

FETCH_REQUEST_WORDS = 32
"""64-bit words of the program that the fetch unit asks for at a time."""
FETCH_BUFFER_BYTES = 1024
"""Bytes of the program that may be requested or waiting: this hides some 100 cycles of memory
latency at the highest rate at which commands can be handed out."""
FETCH_BUFFER_WORDS = FETCH_BUFFER_BYTES // 8
"""64-bit words of the program that may be requested or waiting."""
END_WORDS = COMMANDS[Opcode.END].words
"""64-bit words of the END command."""
FETCH_START = 1
"""Cycles from the start of a program to the first request for its commands."""
FETCH_RETURN = 7
"""Cycles from a word's beat to when its command may be handed out."""
TRANSFER_START = 2
"""Cycles from the start of a LOAD or STORE to its first burst."""
READ_RETURN = 2
"""Cycles that a read takes between bus and engine, beside the memory's latency."""
STORE_DEPTH = 5
"""Cycles from the first burst of a STORE to its first beat, and from last response to end."""

# CONV -------------------------------------------------------------------------------------------

CONV_START = 2
"""Cycles from the start of a CONV on an idle engine to the capture of its first weights."""
SWAP_LEAD = 2
"""Cycles from the swap of the array's weights, which comes with the read of a tile's first vector,
to that vector's entry into the array."""
ACCUMULATE_LATENCY = 2
"""Cycles from the read of an accumulator to the write of its sum. So many must lie between two
vectors that add to the same word."""
FAST_STAGES = 2
"""Cycles that the fast inner product takes beside the plain one: the operands' sums, and what is
subtracted at the foot of the column."""
EDGE_STAGES = 1
"""Cycles by which ``zero_points`` delays everything that enters the array."""


def array_lead(config: Config) -> int:
    """Cycles from the read of a vector to its entry into the array."""
    return SWAP_LEAD + (EDGE_STAGES if config.zero_points else 0)


def capture_lead(config: Config) -> int:
    """Cycles from the capture of a tile's weights to when they may be swapped in, at least: until
    the wave of captures is far enough ahead. The next tile is captured from the swap on, so tiles
    start so far apart, too; more than ``ACCUMULATE_LATENCY``, so that none meets its own words."""
    return max(config.rows - config.rows // config.cell_rows, ACCUMULATE_LATENCY) + 1


def conv_lead(config: Config) -> int:
    """Cycles from the start of a CONV on an idle engine to its first vector: its first weights and
    its addresses are prepared at the same time."""
    return max(CONV_START + capture_lead(config), 5)


def array_latency(config: Config, column: int) -> int:
    """Cycles from a vector's entry into the systolic array to its sum of ``column``: one for the
    products, one for each cell that it passes, and those of the fast inner product."""
    further = FAST_STAGES if config.fast else 0
    return 1 + config.rows // config.cell_rows + column // config.cell_cols + further


# POST -------------------------------------------------------------------------------------------

COMBINE_LATENCY = 9
"""Cycles that ADD, SUB and MUL take for two operands."""
TABLE_LATENCY = 2
"""Cycles of a lookup in POST's table."""
TABLE_WIDTH = 16
"""Most bytes of the words of POST's table. Wider words only waste memory (16 words are as shallow
as small memories come), and multiplexers behind it."""
READ_AHEAD = 2
"""Cycles, beside its reads, from when POST may read parameters or a table to its first word."""
POST_READ = 2
"""Cycles from when POST issues a word to its sum from the accumulators."""
POST_RETIRE = 1
"""Cycles from POST's last write to the end of the command."""
POST_DEPTH = {
    op: POST_READ + REQUANTISE_LATENCY + latency + POST_RETIRE
    for op, latency in {
        PostOp.NONE: 0,
        PostOp.ADD: COMBINE_LATENCY,
        PostOp.SUB: COMBINE_LATENCY,
        PostOp.MUL: COMBINE_LATENCY,
    }.items()
}
"""Cycles from the last word that POST issues to the end of the command, as the cycle model counts
them: for accumulators, without a table."""


def post_keeps_operand(b_step: Any, b_pitch: Any) -> Any:
    """Whether one word of ``b`` stands for the whole image: POST with source SCRATCHPAD then reads
    it once for each group. Takes ints or hardware values of the command's fields."""
    return (b_pitch == 0) & (b_step == 0)


def post_overlaps(source: Any, op: Any, lut: Any) -> Any:
    """Whether POST follows a command of this kind at once with another such, before its words are
    written. Takes ints or hardware values of the command's fields."""
    return (source == PostSource.ACCUMULATOR) & (op == PostOp.NONE) & (lut == 0)


def post_group_reads(pixels: int, *, op: int, keeps_operand: bool) -> int:
    """Cycles in which POST reads the operands of a group of ``pixels`` outputs from the scratchpad,
    one in each."""
    if op == PostOp.NONE:
        return pixels
    return pixels + 1 if keeps_operand else 2 * pixels


def table_parts(config: Config) -> int:
    """Words of POST's table memory that one scratchpad word fills; the last may be filled in part.
    Each takes a read of its own."""
    return -(-config.rows // TABLE_WIDTH)


def table_reads(config: Config) -> int:
    """Scratchpad reads of a whole table, one a cycle."""
    return -(-TABLE_BYTES // config.rows) * table_parts(config)


# WINDOW -----------------------------------------------------------------------------------------

REDUCE_LATENCY = 6
"""Cycles from the last source word of an output to its accumulators."""
ROW_LATENCY = 3
"""Cycles from a word of a row operation's last pass to what is requantised."""
ROW_TREE_LEVELS = 2
"""Levels between two registers of the trees that reduce a word of a row."""
COLLECT_LATENCY = 1
"""Cycles from the segment that completes an IM2COL word to that word."""
_ISSUE_TO_END = 6
"""Cycles that every WINDOW result takes beside its operation: issue, check, read, word, result,
end."""
WINDOW_DEPTH = {
    WindowOp.DEPTHWISE: _ISSUE_TO_END + REDUCE_LATENCY + REQUANTISE_LATENCY,
    WindowOp.SUM: _ISSUE_TO_END + REDUCE_LATENCY + REQUANTISE_LATENCY,
    WindowOp.MAX: _ISSUE_TO_END + REDUCE_LATENCY,
    WindowOp.IM2COL: _ISSUE_TO_END + COLLECT_LATENCY,
    WindowOp.SOFTMAX: _ISSUE_TO_END + ROW_LATENCY + REQUANTISE_LATENCY,
    WindowOp.NORMALISE: _ISSUE_TO_END + ROW_LATENCY + REQUANTISE_LATENCY,
}
"""Cycles from the last token that WINDOW issues to the end of the command."""
WINDOW_SET_UP = 4
"""Cycles from the start of a WINDOW command on an idle engine to its first token, beside those of
:func:`window_set_up_bits` and :func:`window_walk_start`."""
WINDOW_DRAIN = 1
"""Cycles from WINDOW's last write to when a command of another mode may begin: that nothing is
under way is seen a cycle later."""
WINDOW_GAP = 3
"""Cycles between the last token of a WINDOW command and the first of one that follows it before the
pipeline is empty, beside those of :func:`window_walk_start`."""
DIVIDEND_BITS = 17
"""Bits of the byte columns that IM2COL divides into words and bytes, one bit a cycle."""
WINDOW_LEAD = 3
"""Cycles from the start of WINDOW's walk to its first read."""
WINDOW_MACS = 9
"""Multipliers of a lane: the most window positions reduced in a cycle."""
CORNER = 3
"""Height and width of the part of a window that is reduced in the cycle of its newest word."""
FAST_DILATION = 3
"""Largest dilation of the fast path, where kernels are reduced by columns; of two bits."""
FAST_STRIDE_BITS = 3
"""Bits of the strides that the fast path takes: none is above ``window_kernel``."""
COLUMN_STRIDE = 4
"""Largest stride of a kernel that is reduced by columns. With a larger one a cycle for each word of
the input and each column soon is more than one for each tap."""


def window_set_up_bits(c: Mapping[str, int]) -> int:
    """Cycles of the bit-serial products and divisions that prepare a WINDOW command."""
    # Only the fast path multiplies by ``stride_x``.
    stride_x = c["stride_x"] % (1 << FAST_STRIDE_BITS)
    factors = (abs(c["y0"]), c["stride_y"], c["dilation_y"], c["kernel_h"], stride_x)
    bits = max(factors).bit_length()
    return max(bits, DIVIDEND_BITS) if c["op"] == WindowOp.IM2COL else bits


def window_walk_start(op: int) -> int:
    """Cycles until the first word of WINDOW's walk is found. Other operations read their weights or
    parameters meanwhile."""
    return int(op in (WindowOp.MAX, WindowOp.IM2COL))


def window_span(*, kernel: Any, dilation: Any) -> Any:
    """Input positions from the first to the last tap of an axis, for dilations of the fast path.
    Takes ints or hardware values."""
    # A product, for which hardware shall not take a multiplier.
    return 1 + sum(((kernel - 1) & -(dilation >> bit & 1)) << bit for bit in range(2))


def window_axis_is_fast(
    config: Config, *, kernel: Any, span: Any, stride: Any, dilation: Any, last: Any
) -> Any:
    """Whether an axis of a window suits the fast path: every word of the input is read once, in
    raster order. ``span``: as :func:`window_span` gives it. ``last``: its last output, from 0.
    Takes ints or hardware values. See :meth:`WindowShape.is_fast`."""
    undilated = (dilation == 1) | (kernel == 1)
    if not config.window_by_columns:
        return (kernel <= config.window_kernel) & undilated & (stride <= kernel)
    # Fewer outputs lie apart from each other: each would read words of its own.
    close = undilated | ((dilation <= FAST_DILATION) & (last >= dilation))
    return (span <= config.window_kernel) & close & (stride <= kernel)


def window_line_fits(config: Config, last_column: Any) -> Any:
    """Whether the line memory can hold a padded input row whose last column is given (from 0).
    It is read one word ahead, which takes two words. Takes ints or hardware values."""
    return (last_column != 0) & (last_column < config.window_width)


def window_needs_columns(*, span_h: Any, span_w: Any) -> Any:
    """Whether a kernel of these spans is reduced a column a cycle on the fast path: the window in
    registers is too small for it. Takes ints or hardware values."""
    return (span_h > LARGEST_SQUARE) | (span_w > LARGEST_SQUARE)


def window_columns_pay(*, kernel_h: Any, stride_y: Any, stride_x: Any, rows: Any, cols: Any) -> Any:
    """Whether a kernel that is reduced by columns suits the fast path, beside what every kernel
    must: otherwise the path of a tap a cycle is as quick. ``rows`` and ``cols`` are those of the
    output, counted from 0. Takes ints or hardware values."""
    strides = (stride_y <= COLUMN_STRIDE) & (stride_x <= COLUMN_STRIDE)
    return (kernel_h > 1) & strides & ((rows != 0) | (cols != 0))


def window_part_positions(size: int) -> list[list[tuple[int, int]]]:
    """The positions (y, x) of a window of ``size`` x ``size`` that are reduced together, a list for
    each cycle, each at most ``WINDOW_MACS`` long: the newest corner, then what wider kernels have
    besides, then what higher ones have. ``size`` is 3 or 5; larger kernels go by columns."""
    old, corner = range(size - CORNER), range(size - CORNER, size)
    parts = [[(y, x) for y in corner for x in corner]]
    if size > CORNER:
        rest = [(y, x) for y in old for x in old]
        wide = [(y, x) for y in corner for x in old]
        spare = WINDOW_MACS - len(wide)
        parts.append(wide + rest[:spare])
        parts.append([(y, x) for y in old for x in corner] + rest[spare:])
    return parts


def window_modes(config: Config) -> tuple[str, ...]:
    """Fields of a WINDOW command that must be the same, as must its path, for it to follow another
    before that one's pipeline is empty."""
    dilations = ("dilation_x", "dilation_y") if config.window_by_columns else ()
    zeros = ("weight_zero",) if config.zero_points else ()
    return ("op", "pad", "zero", "low", "high", "kernel_w", "kernel_h", *dilations, *zeros)


def im2col_keeps_words(config: Config, *, kernel_w: Any, kernel_h: Any) -> Any:
    """Whether IM2COL holds the words of every kernel row from one output to the next. Takes ints or
    hardware values."""
    return (kernel_w == 1) & (kernel_h <= config.window_width)


@dataclass(frozen=True, kw_only=True)
class WindowShape:
    """The window of a DEPTHWISE, SUM or MAX command. All pairs are (vertical, horizontal)."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    out: tuple[int, int]
    """Output rows and columns."""

    @classmethod
    def of_command(cls, c: Mapping[str, int]) -> WindowShape:
        """The shape in the fields of a decoded command."""
        return cls(
            kernel=(c["kernel_h"], c["kernel_w"]),
            stride=(c["stride_y"], c["stride_x"]),
            dilation=(c["dilation_y"], c["dilation_x"]),
            out=(c["out_h"], c["out_w"]),
        )

    @property
    def pixels(self) -> int:
        """Outputs of a block."""
        return math.prod(self.out)

    @property
    def taps(self) -> int:
        """Positions of the kernel."""
        return math.prod(self.kernel)

    @property
    def region(self) -> tuple[int, int]:
        """Rows and columns of the padded input under the window."""
        height, width = (
            (n - 1) * stride + span
            for n, stride, span in zip(self.out, self.stride, self.span, strict=True)
        )
        return height, width

    @property
    def span(self) -> tuple[int, int]:
        """Rows and columns from the first to the last tap."""
        height, width = (
            (kernel - 1) * dilation + 1
            for kernel, dilation in zip(self.kernel, self.dilation, strict=True)
        )
        return height, width

    def is_fast(self, config: Config) -> bool:
        """Whether WINDOW takes its fast path: no axis has a kernel above ``window_kernel``, a
        stride above its kernel or a dilation, and a row of the region takes 2..``window_width``
        words. With ``window_kernel`` 7, a kernel may be dilated up to ``FAST_DILATION`` if it spans
        no more and there are more outputs than that; one that is reduced by columns must be worth
        it (:func:`window_columns_pay`). Otherwise WINDOW reads a word for every tap of every
        output."""
        axes = zip(self.kernel, self.span, self.stride, self.dilation, self.out, strict=True)
        return (
            window_line_fits(config, self.region[1] - 1)
            and all(
                window_axis_is_fast(
                    config, kernel=kernel, span=span, stride=stride, dilation=dilation, last=out - 1
                )
                for kernel, span, stride, dilation, out in axes
            )
            and (not self.by_columns or self._columns_pay)
        )

    @property
    def by_columns(self) -> bool:
        """Whether the fast path reduces the kernel a column a cycle."""
        height, width = self.span
        return bool(window_needs_columns(span_h=height, span_w=width))

    @property
    def further_parts(self) -> int:
        """Cycles of the fast path for each output beside the cycle of its newest word: one for what
        the window is wider than ``CORNER``, one for what it is higher; by columns, one for each of
        the kernel's columns but the newest."""
        if self.by_columns:
            return self.kernel[1] - 1
        return sum(size > CORNER for size in self.span)

    @property
    def _columns_pay(self) -> bool:
        (stride_y, stride_x), (rows, cols) = self.stride, self.out
        return bool(
            window_columns_pay(
                kernel_h=self.kernel[0],
                stride_y=stride_y,
                stride_x=stride_x,
                rows=rows - 1,
                cols=cols - 1,
            )
        )

    def rereads_weights(self, config: Config) -> bool:
        """Whether DEPTHWISE reads the tap's weights before every tap: the general path with more
        taps than the line memory has words."""
        return not self.is_fast(config) and self.taps > config.window_width

    def block_words(self, config: Config) -> int:
        """Tokens of a pass over one channel block: source words and further parts."""
        if self.is_fast(config):
            return math.prod(self.region) + self.further_parts * self.pixels
        return self.pixels * self.taps

    def block_tokens(self, config: Config, op: int) -> int:
        """Tokens of one channel block, a cycle each: those of :meth:`block_words` and the weights
        (DEPTHWISE) in each pass over it, and the requantisation parameters (all but MAX)."""
        tokens = self.block_words(config)
        if op == WindowOp.DEPTHWISE:
            tokens += tokens if self.rereads_weights(config) else self.taps
        tokens *= config.window_passes
        if op != WindowOp.MAX:
            tokens += config.window_param_words
        return tokens


# Rows --------------------------------------------------------------------------------------------


ROW_QUOTIENT_BITS = 27
"""Bits of a row's reciprocal that are found, one a cycle."""
ROW_MULTIPLIER_BITS = 2
"""Bits of a factor that the products of a row's numbers take a cycle."""
ROW_LARGEST_DEPTH = 6
"""Cycles from the last word in which SOFTMAX looks for a largest element to the first that it adds
up, beside the trees."""
ROW_NUMBERS_DEPTH = {WindowOp.SOFTMAX: 43, WindowOp.NORMALISE: 88}
"""Cycles from the last word that a row operation adds up to the first of its last pass, beside the
trees and what the size of the row's variance decides."""
ROW_BLOCK_GAP = 1
"""Cycles before the parameters of a block of NORMALISE."""
ROW_PARAMS_DEPTH = 13
"""Cycles from the first word of such parameters to when the next may be read, beside the words."""
_SPREAD_BITS = 11
"""Bits of the variance of an element that are counted with, in steps. What differs from that by
some bits takes NORMALISE a cycle for each row more or less."""


def row_interval(c: Mapping[str, int]) -> int:
    """Cycles from one row's sums to the next, at least."""
    if c["op"] == WindowOp.SOFTMAX:
        return ROW_QUOTIENT_BITS + 1
    return ROOT_BITS + 3 + _row_align(c)


def _row_align(c: Mapping[str, int]) -> int:
    """Cycles for which a row's sum or variance is shifted."""
    if c["op"] == WindowOp.SOFTMAX:
        return 2
    bits = 2 * c["features"].bit_length() + _SPREAD_BITS + EPSILON_BITS
    return max(0, -(-(VARIANCE_BITS - bits) // 4))


def row_output_cycles(c: Mapping[str, int], config: Config) -> int:
    """Cycles of the last pass."""
    words, positions = c["blocks"] * config.window_passes, c["out_w"]
    if c["op"] == WindowOp.SOFTMAX:
        return positions * words * (1 + c["masked"])
    parameters = config.pass_param_words
    return words * (parameters + max(ROW_BLOCK_GAP + 2 * positions, ROW_PARAMS_DEPTH))


def row_cycles(c: Mapping[str, int], config: Config) -> int:
    """Cycles in which a row operation issues words or waits for its rows' numbers: parameters,
    then the passes."""
    positions, op = c["out_w"], WindowOp(c["op"])
    levels = (config.reduced_lanes - 1).bit_length()
    tree = -(-levels // ROW_TREE_LEVELS)
    row = c["blocks"] * config.window_passes
    if op == WindowOp.SOFTMAX:
        row *= 1 + c["masked"]
        align = _row_align(c)
        largest_tree = 1 + levels // ROW_TREE_LEVELS if levels else 0
        before = TABLE_BYTES + positions * row + ROW_LARGEST_DEPTH + largest_tree
    else:
        # What the root takes less for a larger variance, the products take more.
        align, before = VARIANCE_BITS // 4, 0
    sums = row + (positions - 1) * max(row, row_interval(c))
    numbers = tree + ROW_NUMBERS_DEPTH[op] + align
    return config.row_param_words + before + sums + numbers + row_output_cycles(c, config)
