"""The WINDOW engine's loops: the walk over taps and the walk over outputs.

Both follow their loop nests with running sums. The products that start them (``y0 * src_pitch`` and
the like) and IM2COL's divisions of byte columns into words are made bit by bit beforehand, while
the command before is still walked.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from amaranth.hdl import Cat, Const, Module, Mux, ShapeLike, Signal, Value, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from systole.hw.bus.interfaces import command_layout, record
from systole.isa import COMMANDS, Config, Opcode, WindowOp
from systole.isa.commands import ADDRESS_BITS
from systole.isa.config import bits_for
from systole.isa.timing import (
    CORNER,
    DIVIDEND_BITS,
    FAST_DILATION,
    FAST_STRIDE_BITS,
    window_axis_is_fast,
    window_columns_pay,
    window_line_fits,
    window_needs_columns,
    window_span,
)

if TYPE_CHECKING:
    from amaranth.hdl._ast import Assign

COORDINATE_BITS = 26
"""Holds any ``x0 + ox * stride_x + kx * dilation_x`` of a command."""
REGION_BITS = 19
"""Holds the last row and column of any region that a fast path's strides and kernels reach."""
MAX_WIDTH = COMMANDS[Opcode.WINDOW].high("in_w")
"""Columns of the widest input."""
OFFSET = 1 << 15
"""The division of columns floors: a multiple of ``rows`` from here on makes every x0 positive."""


def column_layout(config: Config, word: ShapeLike = COORDINATE_BITS) -> data.StructLayout:
    """A column as a word and a byte: ``rows`` bytes to a word; the byte is 0 but for IM2COL."""
    return data.StructLayout({"word": word, "byte": range(config.rows)})


def prepared_layout(config: Config) -> data.StructLayout:
    """A command with what its walk needs beside its fields.

    Columns have the bits that differ, and no others: bits that are always alike would be seen by
    Verilator as a loop of the whole record, which it then compares in every cycle."""
    column = column_layout(config, DIVIDEND_BITS)
    return data.StructLayout(
        {
            "cmd": command_layout(Opcode.WINDOW),
            "fast": 1,
            "taps": 12,  # kernel_w * kernel_h
            "last_px": REGION_BITS,  # of the region, fast; else of the outputs
            "last_py": REGION_BITS,
            "wide": 1,  # kernels of more than 3 columns or rows, fast
            "tall": 1,
            "columns": 1,  # the kernel is reduced by columns, fast
            "span_x": 3,  # columns and rows of the window, fast; of dilated kernels, too
            "span_y": 3,
            "x0": column_layout(config, signed(DIVIDEND_BITS + 1)),
            "stride_x": column,
            "dilation_x": column,
            "width": column,
            "first_row": ADDRESS_BITS,  # address of row y0
            "stride_rows": ADDRESS_BITS,
            "dilation_rows": ADDRESS_BITS,
        }
    )


def word_name(config: Config) -> data.StructLayout:
    """A word of a row, for IM2COL to know it again. Words outside the row need not be told from
    each other: they are all pad."""
    return data.StructLayout({"inside": 1, "low": bits_for(MAX_WIDTH // config.rows + 1)})


def tap_layout(config: Config) -> data.StructLayout:
    """A step of the walk, see :class:`TapWalk`."""
    return data.StructLayout(
        {
            "word": word_name(config),
            "following": word_name(config),  # the word behind it
            "byte": range(config.rows),  # first byte of the segment
            "bytes": range(config.rows + 1),  # of the segment (IM2COL)
            "spills": 1,  # the segment goes on in the following word
            # Of the word and of the one behind it: where they lie in the scratchpad, and their
            # bytes inside the input; those beyond are pad.
            "addr": ADDRESS_BITS,
            "limit": range(config.rows + 1),
            "following_addr": ADDRESS_BITS,
            "following_limit": range(config.rows + 1),
            "line": 6,  # of the kernel, counted from its end
            "mac": 1,  # goes into an output
            "part": 2,  # of the window (fast); but for 0, it comes without a word
            "column": 3,  # of the window, if by columns
            "run_end": 1,  # last step of a tap (fast: of a word)
            "kernel_row_end": 1,  # last tap of a row of the kernel, but not of the kernel
            "last": 1,  # last step of an output (fast: of a word)
            "row_end": 1,  # last word of the region's row (fast)
            "block_end": 1,  # last word of the block's pass
        }
    )


def spans(command: data.View, config: Config) -> tuple[Value, Value]:
    """Columns and rows from a kernel's first to its last tap (fast)."""
    if config.window_by_columns:
        return command.span_x, command.span_y
    return command.cmd.kernel_w, command.cmd.kernel_h


def is_last(number: Signal, config: Config) -> Value:
    """It is a block's last pass."""
    return Const(1) if config.window_passes == 1 else number == config.window_passes - 1


def following_pass(number: Signal, config: Config) -> Value:
    """The pass behind it, of the same block or of the next."""
    return Mux(is_last(number, config), 0, number + 1)


class WalkSetup(wiring.Component):
    """Prepares commands for :class:`TapWalk`, one ahead of it.

    A command is accepted from ``cmd`` when the one before has been taken. As many cycles later as
    the longest of ``|y0|``, ``stride_y``, ``dilation_y``, ``kernel_h`` and the lowest
    ``FAST_STRIDE_BITS`` of ``stride_x`` has bits, plus 3 (IM2COL: 20 in all), ``ready`` rises and
    ``prepared`` holds until ``take``. ``decided`` rises a cycle before: the command's path and
    fields are there.
    """

    cmd: stream.Interface
    decided: Signal
    ready: Signal
    prepared: data.View
    take: Signal

    def __init__(self, config: Config):
        self.config = config
        super().__init__(
            {
                "cmd": In(stream.Signature(command_layout(Opcode.WINDOW))),
                "decided": Out(1),
                "ready": Out(1),
                "prepared": Out(prepared_layout(config)),
                "take": In(1),
            }
        )
        self._prepared = record(prepared_layout(config), name="_prepared", reset_less=True)
        longest = 1 + FAST_DILATION * (1 << len(self._prepared.cmd.kernel_w))
        self._spans = [
            Signal(range(longest), name=f"span_{axis}", reset_less=True) for axis in "xy"
        ]
        # Products: factors lose a bit a cycle, addends gain one.
        self._addend = Signal(ADDRESS_BITS, reset_less=True)
        self._kernel_addend = Signal(12, reset_less=True)
        self._kernel_left = Signal(6, reset_less=True)
        self._factors, self._products = [], []
        for name, bits in (("y0", 16), ("stride_y", 8), ("dilation_y", 8)):
            self._factors.append(Signal(bits, name=f"{name}_left", reset_less=True))
            self._products.append(Signal(ADDRESS_BITS, name=f"{name}_rows", reset_less=True))
        # Outputs of a row and of a column beyond the first, times the strides.
        self._steps_x, self._steps_y = (
            Signal(REGION_BITS, name=f"steps_{a}", reset_less=True) for a in "xy"
        )
        self._stride_x_left = Signal(FAST_STRIDE_BITS, reset_less=True)
        # Quotients and remainders of x0, stride_x, dilation_x, width.
        self._quotients = [
            Signal(DIVIDEND_BITS, name=f"quotient{i}", reset_less=True) for i in range(4)
        ]
        self._remainders = [
            Signal(range(config.rows), name=f"remainder{i}", reset_less=True) for i in range(4)
        ]
        self._divide_left = Signal(range(DIVIDEND_BITS + 1))
        self._im2col = Signal()

    def elaborate(self, platform: object) -> Module:
        m = Module()
        cmd = self._prepared.cmd
        m.d.comb += [
            self.prepared.eq(self._prepared),
            self._im2col.eq(cmd.op == WindowOp.IM2COL),
        ]
        with m.FSM():
            with m.State("IDLE"):
                m.d.comb += self.cmd.ready.eq(1)
                m.d.sync += cmd.eq(self.cmd.payload)
                self._measure_spans(m, self.cmd.payload)
                with m.If(self.cmd.valid):
                    m.next = "START"
            with m.State("START"):
                self._load_operands(m)
                m.next = "MULTIPLY"
            with m.State("MULTIPLY"):
                self._multiply(m)
                self._divide(m)
                self._choose_path(m)
                factors = (*self._factors, self._kernel_left, self._stride_x_left)
                multiplied = ~Cat(*factors).any()
                with m.If(multiplied & (self._divide_left == 0)):
                    m.next = "FINISH"
            with m.State("FINISH"):
                m.d.comb += self.decided.eq(1)
                self._finish_columns(m)
                self._finish_rows(m)
                m.next = "READY"
            with m.State("READY"):
                m.d.comb += [self.decided.eq(1), self.ready.eq(1)]
                with m.If(self.take):
                    m.next = "IDLE"
        return m

    @property
    def _offset(self) -> int:
        """Words that are added to x0 for its division."""
        return -(-OFFSET // self.config.rows)

    def _load_operands(self, m: Module) -> None:
        prepared, cmd = self._prepared, self._prepared.cmd
        x0 = cmd.x0 + self._offset * self.config.rows
        dividends = (x0, cmd.stride_x, cmd.dilation_x, cmd.in_w)
        span_x, span_y = self._spans
        m.d.sync += [
            self._addend.eq(cmd.src_pitch),
            self._factors[0].eq(Mux(cmd.y0[-1], -cmd.y0, cmd.y0)),
            self._factors[1].eq(cmd.stride_y),
            self._factors[2].eq(cmd.dilation_y),
            *(p.eq(0) for p in self._products),
            self._kernel_addend.eq(cmd.kernel_w),
            self._kernel_left.eq(cmd.kernel_h),
            prepared.taps.eq(0),
            *(q.eq(d) for q, d in zip(self._quotients, dividends, strict=True)),
            *(r.eq(0) for r in self._remainders),
            self._divide_left.eq(Mux(self._im2col, DIVIDEND_BITS, 0)),
            self._steps_x.eq(cmd.out_w - 1),
            self._steps_y.eq(cmd.out_h - 1),
            self._stride_x_left.eq(cmd.stride_x),
            # The last index of the input under the outputs is as many steps more.
            prepared.last_px.eq(span_x - 1),
            prepared.last_py.eq(span_y - 1),
        ]

    def _multiply(self, m: Module) -> None:
        """One bit of every product."""
        m.d.sync += [
            self._addend.eq(self._addend << 1),
            self._kernel_addend.eq(self._kernel_addend << 1),
            self._steps_x.eq(self._steps_x << 1),
            self._steps_y.eq(self._steps_y << 1),
        ]
        for factor, product, addend in (
            *((f, p, self._addend) for f, p in zip(self._factors, self._products, strict=True)),
            (self._kernel_left, self._prepared.taps, self._kernel_addend),
            (self._stride_x_left, self._prepared.last_px, self._steps_x),
            (self._factors[1], self._prepared.last_py, self._steps_y),
        ):
            m.d.sync += factor.eq(factor >> 1)
            with m.If(factor[0]):
                m.d.sync += product.eq(product + addend)

    def _divide(self, m: Module) -> None:
        """IM2COL: one bit of every quotient."""
        rows = self.config.rows
        with m.If(self._divide_left != 0):
            m.d.sync += self._divide_left.eq(self._divide_left - 1)
            for quotient, remainder in zip(self._quotients, self._remainders, strict=True):
                partial = Cat(quotient[-1], remainder)
                fits = partial >= rows
                m.d.sync += [
                    remainder.eq(Mux(fits, partial - rows, partial)),
                    quotient.eq(Cat(fits, quotient)),
                ]

    def _choose_path(self, m: Module) -> None:
        config, prepared, cmd = self.config, self._prepared, self._prepared.cmd
        x_is_fast, y_is_fast = (
            window_axis_is_fast(
                config,
                kernel=cmd[f"kernel_{size}"],
                span=span,
                stride=cmd[f"stride_{axis}"],
                dilation=cmd[f"dilation_{axis}"],
                last=cmd[f"out_{size}"] - 1,
            )
            for size, axis, span in zip("wh", "xy", self._spans, strict=True)
        )
        fits = window_line_fits(config, prepared.last_px)
        pays: Value = Const(1)
        if config.window_by_columns:
            pays = ~self._by_columns | window_columns_pay(
                kernel_h=cmd.kernel_h,
                stride_y=cmd.stride_y,
                stride_x=cmd.stride_x,
                rows=cmd.out_h - 1,
                cols=cmd.out_w - 1,
            )
        m.d.sync += prepared.fast.eq(~self._im2col & x_is_fast & y_is_fast & fits & pays)

    def _measure_spans(self, m: Module, cmd: data.View) -> None:
        """Columns and rows from the first to the last tap, for dilations of the fast path."""
        spans = [cmd.kernel_w, cmd.kernel_h]
        if self.config.window_by_columns:
            spans = [
                window_span(kernel=cmd.kernel_w, dilation=cmd.dilation_x),
                window_span(kernel=cmd.kernel_h, dilation=cmd.dilation_y),
            ]
        m.d.sync += [register.eq(span) for register, span in zip(self._spans, spans, strict=True)]

    @property
    def _by_columns(self) -> Value:
        span_x, span_y = self._spans
        return window_needs_columns(span_h=span_y, span_w=span_x)

    def _finish_columns(self, m: Module) -> None:
        """Columns as words and bytes: divided for IM2COL, as they are for the others."""
        prepared, cmd = self._prepared, self._prepared.cmd
        columns = (prepared.x0, prepared.stride_x, prepared.dilation_x, prepared.width)
        undivided = (cmd.x0, Mux(prepared.fast, 1, cmd.stride_x), cmd.dilation_x, cmd.in_w)
        offsets = (self._offset, 0, 0, 0)
        for column, quotient, remainder, offset, plain in zip(
            columns, self._quotients, self._remainders, offsets, undivided, strict=True
        ):
            m.d.sync += [
                column.word.eq(Mux(self._im2col, quotient - offset, plain)),
                column.byte.eq(Mux(self._im2col, remainder, 0)),
            ]

    def _finish_rows(self, m: Module) -> None:
        prepared, cmd = self._prepared, self._prepared.cmd
        with m.If(~prepared.fast):
            m.d.sync += [prepared.last_px.eq(cmd.out_w - 1), prepared.last_py.eq(cmd.out_h - 1)]
        y0_rows, stride_rows, dilation_rows = self._products
        square, (span_x, span_y) = prepared.fast, self._spans
        if self.config.window_by_columns:
            square = prepared.fast & ~self._by_columns
            m.d.sync += [
                prepared.columns.eq(prepared.fast & self._by_columns),
                prepared.span_x.eq(span_x),
                prepared.span_y.eq(span_y),
            ]
        m.d.sync += [
            prepared.first_row.eq(Mux(cmd.y0[-1], cmd.src - y0_rows, cmd.src + y0_rows)),
            prepared.stride_rows.eq(stride_rows),
            prepared.dilation_rows.eq(dilation_rows),
            prepared.wide.eq(square & (span_x > CORNER)),
            prepared.tall.eq(square & (span_y > CORNER)),
        ]


class _StepsLeft:
    """The steps of a loop beyond the current one. Whether there are none is a register of its own:
    many conditions begin with it."""

    def __init__(self, bits: int, name: str):
        self.left = Signal(bits, name=f"{name}_left")
        self.none = Signal(name=f"{name}_none")

    def restart(self, steps: Value) -> list[Assign]:
        return [self.left.eq(steps), self.none.eq(steps == 0)]

    def count_down(self) -> list[Assign]:
        return [self.left.eq(self.left - 1), self.none.eq(self.left == 1)]


class TapWalk(wiring.Component):
    """Walks over the taps of a WINDOW command, one a cycle.

    ``start`` begins the command in ``prepared``, which then is in ``current``: from the next cycle
    on ``tap`` describes the first; ``step`` goes on to the next.

    * General walk (``current.fast`` low): for every block, output and tap (kx innermost) one word.
    * With several ``window_passes`` every block is walked as often in turn (but for IM2COL), each
      time to ``block_end``.
    * Fast walk: for every block the padded input region in raster order, every word once; ``mac``
      marks those that complete an output's window. Each of these has a step for each ``part`` of
      the window that the kernel needs (:func:`~systole.isa.timing.window_part_positions`), only the
      first with the word; by columns, for each ``column`` that has taps. Which commands take this
      path: :class:`~systole.isa.timing.WindowShape`.
    * IM2COL: for every output and tap its run, in *segments* of ``rows`` bytes from the run's
      start; ``bytes`` bytes from ``byte`` of a word, which go on in the next word if it ``spills``.
    """

    prepared: data.View
    current: data.View
    start: Signal
    step: Signal
    tap: data.View

    def __init__(self, config: Config):
        self.config = config
        super().__init__(
            {
                "prepared": In(prepared_layout(config)),
                "current": Out(prepared_layout(config)),
                "start": In(1),
                "step": In(1),
                "tap": Out(tap_layout(config)),
            }
        )
        self._current = record(prepared_layout(config), name="_current", reset_less=True)
        column = column_layout(config)
        # Where the walk is, and where the loops over pixels and taps return to.
        self._x, self._tap_x, self._pixel_x = (
            record(column, name=n, reset_less=True) for n in ("x", "tap_x", "pixel_x")
        )
        self._y = Signal(COORDINATE_BITS, reset_less=True)
        self._pixel_y = Signal(COORDINATE_BITS, reset_less=True)
        self._row, self._pixel_row, self._block_row = (
            Signal(ADDRESS_BITS, name=n, reset_less=True) for n in ("row", "pixel_row", "block_row")
        )
        # Where it goes: with the next tap, pixel, row and block.
        self._next_tap_x, self._next_pixel_x = (
            record(column, name=n) for n in ("next_tap_x", "next_pixel_x")
        )
        self._following = Signal(COORDINATE_BITS)  # word
        self._next_y = Signal(COORDINATE_BITS)
        self._next_row_addr = Signal(ADDRESS_BITS)
        self._next_block_row = Signal(ADDRESS_BITS)
        self._left = Signal(8)  # bytes of the run
        self._kx, self._ky = _StepsLeft(6, "kx"), _StepsLeft(6, "ky")
        self._ox, self._oy = _StepsLeft(REGION_BITS, "ox"), _StepsLeft(REGION_BITS, "oy")
        # Fast: words (rows) of the region before the next that completes a window.
        self._column_wait = Signal(3)
        self._row_wait = Signal(3)
        self._pass = Signal(range(config.window_passes))
        self._more = Signal()  # the window has another part
        self._part = Signal(self.tap.part.shape())
        self._column = Signal(self.tap.column.shape(), init=config.window_kernel - 1)
        self._im2col = Signal()

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.d.comb += [
            self.current.eq(self._current),
            self._im2col.eq(self._current.cmd.op == WindowOp.IM2COL),
        ]
        self._describe_word(m)
        self._find_ends(m)
        self._find_next(m)
        with m.If(self.step):
            if self.config.window_by_columns:
                newest, step = self.config.window_kernel - 1, self._current.cmd.dilation_x
                m.d.sync += self._column.eq(Mux(self._more, self._column - step, newest))
            m.d.sync += self._part.eq(Mux(self._more, self._next_part(), 0))
            self._go_on(m)
        with m.If(self.start):
            self._begin(m)
        return m

    def _counts(self, command: data.View) -> list[Value]:
        """Steps of the loops over kx, ky, ox, oy beyond the first."""
        fast, cmd = command.fast, command.cmd
        return [
            Mux(fast, 0, cmd.kernel_w - 1),
            Mux(fast, 0, cmd.kernel_h - 1),
            command.last_px,
            command.last_py,
        ]

    def _describe_word(self, m: Module) -> None:
        """Where the tap lies."""
        tap, x, rows = self.tap, self._x, self.config.rows
        m.d.comb += [
            self._following.eq(x.word + 1),
            tap.byte.eq(x.byte),
            tap.bytes.eq(Mux(self._left <= rows, self._left, rows)),
            tap.spills.eq(x.byte + tap.bytes > rows),
            tap.addr.eq(self._row + x.word),
            tap.following_addr.eq(self._row + self._following),
            tap.line.eq(self._ky.left),
            tap.part.eq(self._part),
            tap.column.eq(self._column),
        ]
        self._look_inside(m, x.word, tap.word, tap.limit)
        self._look_inside(m, self._following, tap.following, tap.following_limit)

    def _look_inside(self, m: Module, word: Value, name: data.View, limit: Value) -> None:
        """The name of a word of the row, and how many of its bytes lie inside the input."""
        cmd, width = self._current.cmd, self._current.width
        m.d.comb += name.low.eq(word)
        # Unsigned comparisons: a negative coordinate is a large one.
        with m.If(word < width.word):
            m.d.comb += [name.inside.eq(1), limit.eq(self.config.rows)]
        with m.Elif(word == width.word):
            m.d.comb += [name.inside.eq(1), limit.eq(width.byte)]
        with m.If((self._y >= cmd.in_h) | (self._part != 0)):
            m.d.comb += limit.eq(0)

    def _find_ends(self, m: Module) -> None:
        """What the step ends, and whether an output takes it."""
        current, tap = self._current, self.tap
        tap_end = Signal()
        m.d.comb += [
            tap.mac.eq(~current.fast | ((self._column_wait == 0) & (self._row_wait == 0))),
            self._more.eq(
                tap.mac
                & (
                    (current.wide & (self._part == 0))
                    | (current.tall & (self._part != 2))
                    | (
                        current.columns
                        & (self._column + current.span_x != self.config.window_kernel)
                    )
                )
            ),
            tap.run_end.eq(Mux(self._im2col, self._left <= self.config.rows, ~self._more)),
            tap_end.eq(tap.run_end & self._kx.none),
            tap.kernel_row_end.eq(tap_end & ~self._ky.none),
            tap.last.eq(tap_end & self._ky.none),
            tap.row_end.eq(tap.last & self._ox.none),
            tap.block_end.eq(tap.row_end & self._oy.none),
        ]

    def _next_part(self) -> Value:
        return Mux(self._current.wide & (self._part == 0), 1, 2)

    def _find_next(self, m: Module) -> None:
        """The sums that lead to the next tap, pixel, row and block."""
        current, cmd = self._current, self._current.cmd
        self._add(m, self._next_tap_x, self._tap_x, current.dilation_x)
        self._add(m, self._next_pixel_x, self._pixel_x, current.stride_x)
        pitch = Mux(current.fast, cmd.src_pitch, current.stride_rows)
        m.d.comb += [
            self._next_y.eq(self._pixel_y + Mux(current.fast, 1, cmd.stride_y)),
            self._next_row_addr.eq(self._pixel_row + pitch),
            self._next_block_row.eq(
                Mux(
                    is_last(self._pass, self.config),
                    self._block_row + cmd.src_block,
                    self._block_row,
                )
            ),
        ]

    def _add(self, m: Module, total: data.View, a: data.View, b: data.View) -> None:
        """``total`` is the sum of two columns."""
        rows = self.config.rows
        byte = Signal(range(2 * rows))
        carry = byte >= rows
        m.d.comb += [
            byte.eq(a.byte + b.byte),
            total.byte.eq(Mux(carry, byte - rows, byte)),
            total.word.eq(a.word + b.word + carry),
        ]

    def _restart_columns(self, command: data.View) -> Iterator[Assign]:
        """All columns go to the command's first."""
        for column in (self._pixel_x, self._tap_x, self._x):
            yield column.word.eq(command.x0.word)
            yield column.byte.eq(command.x0.byte)

    def _go_on(self, m: Module) -> None:
        """The next step: of the segment, the run, the taps, the pixels, the rows, the blocks."""
        kx_count, ky_count, *_ = self._counts(self._current)
        with m.If(self._im2col & ~self.tap.run_end):
            m.d.sync += [
                self._x.word.eq(self._following),
                self._left.eq(self._left - self.config.rows),
            ]
        with m.Elif(self.tap.run_end):
            m.d.sync += self._left.eq(self._current.cmd.run)
            with m.If(~self._kx.none):
                self._next_tap(m)
            with m.Elif(~self._ky.none):
                m.d.sync += self._kx.restart(kx_count)
                self._next_tap_row(m)
            with m.Else():
                m.d.sync += [*self._kx.restart(kx_count), *self._ky.restart(ky_count)]
                with m.If(~self._ox.none):
                    self._next_pixel(m)
                with m.Else():
                    self._next_row(m)

    def _next_tap(self, m: Module) -> None:
        x = self._next_tap_x
        m.d.sync += [*self._kx.count_down(), self._tap_x.eq(x), self._x.eq(x)]

    def _next_tap_row(self, m: Module) -> None:
        m.d.sync += [
            *self._ky.count_down(),
            self._tap_x.eq(self._pixel_x),
            self._x.eq(self._pixel_x),
            self._y.eq(self._y + self._current.cmd.dilation_y),
            self._row.eq(self._row + self._current.dilation_rows),
        ]

    def _next_pixel(self, m: Module) -> None:
        """The next pixel of the row (fast: the next word)."""
        x, wait = self._next_pixel_x, self._column_wait
        m.d.sync += [
            *self._ox.count_down(),
            *(c.eq(x) for c in (self._pixel_x, self._tap_x, self._x)),
            self._y.eq(self._pixel_y),
            self._row.eq(self._pixel_row),
            wait.eq(Mux(wait == 0, self._current.cmd.stride_x - 1, wait - 1)),
        ]

    def _next_row(self, m: Module) -> None:
        """The next row of pixels (fast: of words), of this block or the next."""
        current, cmd = self._current, self._current.cmd
        span_x, span_y = spans(current, self.config)
        _, _, ox_count, oy_count = self._counts(current)
        wait = self._row_wait
        m.d.sync += [
            *self._ox.restart(ox_count),
            *self._restart_columns(current),
            self._column_wait.eq(span_x - 1),
        ]
        with m.If(~self._oy.none):
            m.d.sync += [
                *self._oy.count_down(),
                *(c.eq(self._next_y) for c in (self._pixel_y, self._y)),
                *(r.eq(self._next_row_addr) for r in (self._pixel_row, self._row)),
                wait.eq(Mux(wait == 0, cmd.stride_y - 1, wait - 1)),
            ]
        with m.Else():
            m.d.sync += [
                *self._oy.restart(oy_count),
                self._pass.eq(following_pass(self._pass, self.config)),
                *(c.eq(cmd.y0) for c in (self._pixel_y, self._y)),
                *(
                    r.eq(self._next_block_row)
                    for r in (self._block_row, self._pixel_row, self._row)
                ),
                wait.eq(span_y - 1),
            ]

    def _begin(self, m: Module) -> None:
        """The first step of the command that has been prepared."""
        new = self.prepared
        span_x, span_y = spans(new, self.config)
        loops = zip((self._kx, self._ky, self._ox, self._oy), self._counts(new), strict=True)
        m.d.sync += [
            self._current.eq(new),
            *self._restart_columns(new),
            *(c.eq(new.cmd.y0) for c in (self._pixel_y, self._y)),
            *(r.eq(new.first_row) for r in (self._block_row, self._pixel_row, self._row)),
            self._left.eq(new.cmd.run),
            *(statement for loop, n in loops for statement in loop.restart(n)),
            self._column_wait.eq(span_x - 1),
            self._row_wait.eq(span_y - 1),
            self._pass.eq(0),
            self._part.eq(0),
            self._column.eq(self.config.window_kernel - 1),
        ]


class OutputWalk(wiring.Component):
    """Walks over the words that a WINDOW command writes; ``step`` goes on to the next.

    ``start`` begins the command in ``cmd``, which must be there from the next cycle on until the
    next ``start``. ``last_word`` is only looked at for IM2COL: the word at hand is its pixel's
    last. The words of a block come once for each of ``window_passes`` (IM2COL: once); ``number``
    counts these. ``end`` marks the command's last word.
    """

    cmd: data.View
    start: Signal
    step: Signal
    last_word: Signal
    addr: Signal
    number: Signal
    end: Signal

    def __init__(self, config: Config) -> None:
        self.config = config
        super().__init__(
            {
                "cmd": In(command_layout(Opcode.WINDOW)),
                "start": In(1),
                "step": In(1),
                "last_word": In(1),
                "addr": Out(ADDRESS_BITS),
                "number": Out(range(config.window_passes)),
                "end": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        cmd = self.cmd
        im2col = Signal()
        m.d.comb += im2col.eq(cmd.op == WindowOp.IM2COL)

        # Inner, middle, outer loop: columns, rows, blocks; IM2COL: words, columns, rows.
        steps = [Signal(ADDRESS_BITS, name=f"step{i}") for i in range(3)]
        base = [
            self.addr,
            *(Signal(ADDRESS_BITS, name=n, reset_less=True) for n in ("middle", "outer")),
        ]
        count = [Signal(16, name=f"count{i}") for i in range(3)]
        left = [Signal(16, name=f"left{i}", reset_less=True) for i in range(3)]
        m.d.comb += [
            steps[0].eq(Mux(im2col, cmd.out_block, 1)),
            steps[1].eq(Mux(im2col, 1, cmd.out_pitch)),
            steps[2].eq(Mux(im2col, cmd.out_pitch, cmd.out_block)),
            count[0].eq(cmd.out_w - 1),
            count[1].eq(Mux(im2col, cmd.out_w, cmd.out_h) - 1),
            count[2].eq(Mux(im2col, cmd.out_h, cmd.blocks) - 1),
        ]
        last = [Mux(im2col, self.last_word, left[0] == 0), left[1] == 0, left[2] == 0]
        last_pass = im2col | is_last(self.number, self.config)
        m.d.comb += self.end.eq(last[0] & last[1] & last[2] & last_pass)
        with m.If(self.start):
            m.d.sync += [*(b.eq(cmd.out) for b in base)]
            m.d.sync += [*(n.eq(c) for n, c in zip(left, count, strict=True)), self.number.eq(0)]
        with m.Elif(self.step):
            with m.If(~last[0]):
                m.d.sync += [base[0].eq(base[0] + steps[0]), left[0].eq(left[0] - 1)]
            with m.Else():
                m.d.sync += left[0].eq(count[0])
                with m.If(~last[1]):
                    following = base[1] + steps[1]
                    m.d.sync += [*(b.eq(following) for b in base[:2])]
                    m.d.sync += left[1].eq(left[1] - 1)
                with m.Else():
                    m.d.sync += [left[1].eq(count[1]), self.number.eq(self.number + 1)]
                    with m.If(last_pass):
                        following = base[2] + steps[2]
                        m.d.sync += [*(b.eq(following) for b in base), self.number.eq(0)]
                        m.d.sync += left[2].eq(left[2] - 1)
                    with m.Else():
                        m.d.sync += [*(b.eq(base[2]) for b in base[:2])]
        return m
