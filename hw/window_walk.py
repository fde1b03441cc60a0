"""The WINDOW engine's address generators: the walk over taps and the walk over outputs.

Both follow their loop nests with running sums. The products that start them (``y0 * src_pitch`` and
the like) and IM2COL's divisions of byte columns into words are made bit by bit before the walk.
"""

from __future__ import annotations

from amaranth.hdl import Const, Module, Mux, Signal, signed
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from hw.interfaces import command_layout
from isa import Config, Opcode, WindowOp
from isa.config import bits_for

COORDINATE_BITS = 26
"""Holds any ``x0 + ox * stride_x + kx * dilation_x`` of a command."""

DIVIDEND_BITS = 17


class TapWalk(wiring.Component):
    """Walks over the source words that a WINDOW command reads, one a cycle.

    ``start`` begins the command held in ``cmd`` (stable until the next ``start``). Some cycles later
    (as many as the longest of ``|y0|``, ``stride_y``, ``dilation_y``, ``kernel_h`` has bits, plus 2;
    IM2COL: 19) ``ready`` rises and the outputs describe the first word; ``step`` goes on to the next.

    * General walk (``fast`` low): for every block, output and tap (kx innermost) one word.
      IM2COL: for every output and tap the words its run touches; a word is a *segment* of ``count``
      bytes from ``byte``.
    * Fast walk: for every block the padded input region in raster order, every word once; ``mac``
      marks those that complete an output's window. Taken by DEPTHWISE, SUM and MAX if the kernel is
      at most 3x3, no axis has a stride above its kernel or is dilated, and the padded row takes
      2..``window_width`` words.

    A column is kept as a word and a byte (``rows`` bytes to a word; the byte is 0 but for IM2COL).
    """

    def __init__(self, config: Config):
        self.config = config
        rows = config.rows
        super().__init__(
            {
                "cmd": In(command_layout(Opcode.WINDOW)),
                "start": In(1),
                "step": In(1),
                "ready": Out(1),
                "fast": Out(1),
                "taps": Out(12),  # kernel_w * kernel_h
                "addr": Out(20),  # scratchpad word, meaningless when limit is 0
                "limit": Out(range(rows + 1)),  # bytes of the word inside the input; others: pad
                "byte": Out(range(rows)),  # first byte of the segment
                "count": Out(range(rows + 1)),  # bytes of the segment (IM2COL)
                "mac": Out(1),  # goes into an output
                "first": Out(1),  # first word of an output (general)
                "last": Out(1),  # last word of an output (general)
                "row_end": Out(1),  # last word of the region's row (fast)
                "block_end": Out(1),  # last word of the block
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        rows = self.config.rows
        cmd = self.cmd
        im2col = Signal()
        m.d.comb += im2col.eq(cmd.op == WindowOp.IM2COL)

        # Columns are (word, byte) pairs.
        column = data.StructLayout({"word": COORDINATE_BITS, "byte": bits_for(rows)})
        x0, pixel_x, tap_x, x = (Signal(column, name=n) for n in ("x0", "pixel_x", "tap_x", "x"))
        stride_x, dilation_x, width = (
            Signal(column, name=n) for n in ("stride_x", "dilation_x", "width")
        )

        def add(name: str, a: data.View, b: data.View) -> data.View:
            byte = Signal(range(2 * rows), name=f"{name}_byte")
            carry = Signal(name=f"{name}_carry")
            total = Signal(column, name=name)
            m.d.comb += [
                byte.eq(a.byte + b.byte),
                carry.eq(byte >= rows),
                total.byte.eq(Mux(carry, byte - rows, byte)),
                total.word.eq(a.word + b.word + carry),
            ]
            return total

        # Set-up: serial products and quotients ---------------------------------------------------
        addend = Signal(20)
        factors = []
        for name, bits in (("y0", 16), ("stride_y", 8), ("dilation_y", 8)):
            factors.append((Signal(bits, name=f"{name}_left"), Signal(20, name=f"{name}_rows")))
        (y0_left, y0_rows), (stride_left, stride_rows), (dilation_left, dilation_rows) = factors
        kernel_addend = Signal(12)
        kernel_left = Signal(6)
        multiplied = Signal()
        m.d.comb += multiplied.eq(
            ~(y0_left.any() | stride_left.any() | dilation_left.any() | kernel_left.any())
        )

        # Floor division of a negative x0: make it positive with a multiple of rows.
        offset = -(-(1 << 15) // rows)
        dividends = [
            (x0, cmd.x0 + Mux(im2col, offset * rows, 0), offset, cmd.x0),
            (stride_x, cmd.stride_x, 0, Mux(self.fast, 1, cmd.stride_x)),
            (dilation_x, cmd.dilation_x, 0, cmd.dilation_x),
            (width, cmd.in_w, 0, cmd.in_w),
        ]
        quotients = [Signal(DIVIDEND_BITS, name=f"quotient{i}") for i in range(len(dividends))]
        remainders = [Signal(range(rows), name=f"remainder{i}") for i in range(len(dividends))]
        divide_left = Signal(range(DIVIDEND_BITS + 1))

        def padded(count: Signal, stride: Signal, kernel: Signal) -> object:
            """Last index of the input span of ``count`` outputs, for strides up to 3."""
            span = Mux(stride[1], (count - 1) << 1, 0) + Mux(stride[0], count - 1, 0)
            return span + kernel - 1

        last_px = Signal(18)
        last_py = Signal(18)
        fast = Signal()
        m.d.comb += fast.eq(
            ~im2col
            & (cmd.kernel_w <= 3)
            & (cmd.kernel_h <= 3)
            & ((cmd.dilation_x == 1) | (cmd.kernel_w == 1))
            & ((cmd.dilation_y == 1) | (cmd.kernel_h == 1))
            & (cmd.stride_x <= cmd.kernel_w)
            & (cmd.stride_y <= cmd.kernel_h)
            & (last_px != 0)
            & (last_px < self.config.window_width)
        )

        # The walk's state and the loops' lengths --------------------------------------------------
        y = Signal(COORDINATE_BITS)
        pixel_y = Signal(COORDINATE_BITS)
        row, pixel_row, block_row = (Signal(20, name=n) for n in ("row", "pixel_row", "block_row"))
        left = Signal(8)
        kx_left, ky_left = Signal(6), Signal(6)
        ox_left, oy_left = Signal(18), Signal(18)
        kx_from, ky_from = Signal(6), Signal(6)
        ox_from, oy_from = Signal(18), Signal(18)
        row_step = Signal(20)
        y_step = Signal(8)
        # Words (rows) of the region until the next one that completes an output's column (row).
        column_wait, row_wait = Signal(2), Signal(2)

        m.d.comb += [
            kx_from.eq(Mux(self.fast, 0, cmd.kernel_w - 1)),
            ky_from.eq(Mux(self.fast, 0, cmd.kernel_h - 1)),
            ox_from.eq(Mux(self.fast, last_px, cmd.out_w - 1)),
            oy_from.eq(Mux(self.fast, last_py, cmd.out_h - 1)),
            row_step.eq(Mux(self.fast, cmd.src_pitch, stride_rows)),
            y_step.eq(Mux(self.fast, 1, cmd.stride_y)),
        ]

        with m.FSM():
            with m.State("IDLE"):
                pass
            with m.State("MULTIPLY"):
                m.d.sync += addend.eq(addend << 1)
                for factor, product in factors:
                    m.d.sync += factor.eq(factor >> 1)
                    with m.If(factor[0]):
                        m.d.sync += product.eq(product + addend)
                m.d.sync += [kernel_addend.eq(kernel_addend << 1), kernel_left.eq(kernel_left >> 1)]
                with m.If(kernel_left[0]):
                    m.d.sync += self.taps.eq(self.taps + kernel_addend)
                with m.If(divide_left != 0):
                    m.d.sync += divide_left.eq(divide_left - 1)
                    for quotient, remainder in zip(quotients, remainders, strict=True):
                        shifted = (remainder << 1) | quotient[-1]
                        fits = shifted >= rows
                        m.d.sync += [
                            remainder.eq(Mux(fits, shifted - rows, shifted)),
                            quotient.eq((quotient << 1) | fits),
                        ]
                m.d.sync += self.fast.eq(fast)
                with m.If(multiplied & (divide_left == 0)):
                    m.next = "POSITION"
            with m.State("POSITION"):
                first_row = Signal(20)
                m.d.comb += first_row.eq(
                    Mux(cmd.y0[-1], cmd.src - y0_rows, cmd.src + y0_rows)
                )
                for (target, _, bias, plain), quotient, remainder in zip(
                    dividends, quotients, remainders, strict=True
                ):
                    with m.If(im2col):
                        m.d.sync += [
                            target.word.eq(quotient - bias),
                            target.byte.eq(remainder),
                        ]
                    with m.Else():
                        m.d.sync += [target.word.eq(plain), target.byte.eq(0)]
                for target in (pixel_x, tap_x, x):
                    with m.If(im2col):
                        m.d.sync += [
                            target.word.eq(quotients[0] - offset),
                            target.byte.eq(remainders[0]),
                        ]
                    with m.Else():
                        m.d.sync += [target.word.eq(cmd.x0), target.byte.eq(0)]
                m.d.sync += [
                    y.eq(cmd.y0),
                    pixel_y.eq(cmd.y0),
                    row.eq(first_row),
                    pixel_row.eq(first_row),
                    block_row.eq(first_row),
                    left.eq(cmd.run),
                    kx_left.eq(kx_from),
                    ky_left.eq(ky_from),
                    ox_left.eq(ox_from),
                    oy_left.eq(oy_from),
                    column_wait.eq(cmd.kernel_w - 1),
                    row_wait.eq(cmd.kernel_h - 1),
                    self.first.eq(1),
                    self.ready.eq(1),
                ]
                m.next = "IDLE"
            # From any state: a new command.
        raise NotImplementedError
