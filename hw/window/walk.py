"""The WINDOW engine's address generators: the walk over taps and the walk over outputs.

Both follow their loop nests with running sums. The products that start them (``y0 * src_pitch`` and
the like) and IM2COL's divisions of byte columns into words are made bit by bit beforehand, while
the command before is still walked.
"""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Mux, Signal, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from systole.hw.bus.interfaces import command_layout
from systole.isa import Config, Opcode, WindowOp

COORDINATE_BITS = 26
"""Holds any ``x0 + ox * stride_x + kx * dilation_x`` of a command."""

DIVIDEND_BITS = 17


def prepared_layout(config: Config) -> data.StructLayout:
    """A command with what its walk needs beside its fields.

    A column is a word and a byte (``rows`` bytes to a word; the byte is 0 but for IM2COL)."""
    column = data.StructLayout({"word": COORDINATE_BITS, "byte": range(config.rows)})
    return data.StructLayout(
        {
            "cmd": command_layout(Opcode.WINDOW),
            "fast": 1,
            "taps": 12,  # kernel_w * kernel_h
            "last_px": 19,  # of the region, fast
            "last_py": 19,
            "wide": 1,  # kernels of more than 3 columns or rows, fast
            "tall": 1,
            "x0": column,
            "stride_x": column,
            "dilation_x": column,
            "width": column,
            "first_row": 20,  # address of row y0
            "stride_rows": 20,
            "dilation_rows": 20,
        }
    )


class WalkSetup(wiring.Component):
    """Prepares commands for :class:`TapWalk`, one ahead of it.

    A command is accepted from ``cmd`` when the one before has been taken. As many cycles later as
    the longest of ``|y0|``, ``stride_y``, ``dilation_y``, ``kernel_h`` has bits, plus 3 (IM2COL: 20
    in all), ``ready`` rises and ``prepared`` holds until ``take``.
    """

    def __init__(self, config: Config):
        self.config = config
        super().__init__(
            {
                "cmd": In(stream.Signature(command_layout(Opcode.WINDOW))),
                "ready": Out(1),
                "prepared": Out(prepared_layout(config)),
                "take": In(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        rows = self.config.rows
        prepared, cmd = self.prepared, self.prepared.cmd
        im2col = Signal()
        m.d.comb += im2col.eq(cmd.op == WindowOp.IM2COL)

        # Serial products and quotients.
        addend, kernel_addend = Signal(20), Signal(12)
        kernel_left = Signal(6)
        factors, products = [], []
        for name, bits in (("y0", 16), ("stride_y", 8), ("dilation_y", 8)):
            factors.append(Signal(bits, name=f"{name}_left"))
            products.append(Signal(20, name=f"{name}_rows"))
        y0_rows, stride_rows, dilation_rows = products

        # The division floors: a multiple of rows makes x0 positive.
        offset = -(-(1 << 15) // rows)
        columns = (prepared.x0, prepared.stride_x, prepared.dilation_x, prepared.width)
        undivided = (cmd.x0, Mux(prepared.fast, 1, cmd.stride_x), cmd.dilation_x, cmd.in_w)
        dividends = (cmd.x0 + offset * rows, cmd.stride_x, cmd.dilation_x, cmd.in_w)
        offsets = (offset, 0, 0, 0)
        quotients = [Signal(DIVIDEND_BITS, name=f"quotient{i}") for i in range(4)]
        remainders = [Signal(range(rows), name=f"remainder{i}") for i in range(4)]
        divide_left = Signal(range(DIVIDEND_BITS + 1))

        def span(count: Value, stride: Value, kernel: Value) -> Value:
            """Last index of the input span of ``count`` outputs, for strides up to 7."""
            steps = count - 1
            return sum((Mux(stride[i], steps << i, 0) for i in range(3)), kernel - 1)

        with m.FSM():
            with m.State("IDLE"):
                m.d.comb += self.cmd.ready.eq(1)
                m.d.sync += cmd.eq(self.cmd.payload)
                with m.If(self.cmd.valid):
                    m.next = "START"

            with m.State("START"):
                m.d.sync += [
                    addend.eq(cmd.src_pitch),
                    factors[0].eq(Mux(cmd.y0[-1], -cmd.y0, cmd.y0)),
                    factors[1].eq(cmd.stride_y),
                    factors[2].eq(cmd.dilation_y),
                    *(p.eq(0) for p in products),
                    kernel_addend.eq(cmd.kernel_w),
                    kernel_left.eq(cmd.kernel_h),
                    prepared.taps.eq(0),
                    *(q.eq(d) for q, d in zip(quotients, dividends, strict=True)),
                    *(r.eq(0) for r in remainders),
                    divide_left.eq(Mux(im2col, DIVIDEND_BITS, 0)),
                    prepared.last_px.eq(span(cmd.out_w, cmd.stride_x, cmd.kernel_w)),
                    prepared.last_py.eq(span(cmd.out_h, cmd.stride_y, cmd.kernel_h)),
                ]
                m.next = "MULTIPLY"

            with m.State("MULTIPLY"):
                m.d.sync += [addend.eq(addend << 1), kernel_addend.eq(kernel_addend << 1)]
                for factor, product, shifted in (
                    *((f, p, addend) for f, p in zip(factors, products, strict=True)),
                    (kernel_left, prepared.taps, kernel_addend),
                ):
                    m.d.sync += factor.eq(factor >> 1)
                    with m.If(factor[0]):
                        m.d.sync += product.eq(product + shifted)
                with m.If(divide_left != 0):
                    m.d.sync += divide_left.eq(divide_left - 1)
                    for quotient, remainder in zip(quotients, remainders, strict=True):
                        partial = Cat(quotient[-1], remainder)
                        fits = partial >= rows
                        m.d.sync += [
                            remainder.eq(Mux(fits, partial - rows, partial)),
                            quotient.eq(Cat(fits, quotient)),
                        ]
                m.d.sync += prepared.fast.eq(
                    ~im2col
                    & (cmd.kernel_w <= self.config.window_kernel)
                    & (cmd.kernel_h <= self.config.window_kernel)
                    & ((cmd.dilation_x == 1) | (cmd.kernel_w == 1))
                    & ((cmd.dilation_y == 1) | (cmd.kernel_h == 1))
                    & (cmd.stride_x <= cmd.kernel_w)
                    & (cmd.stride_y <= cmd.kernel_h)
                    & (prepared.last_px != 0)
                    & (prepared.last_px < self.config.window_width)
                )
                multiplied = ~Cat(*factors, kernel_left).any()
                with m.If(multiplied & (divide_left == 0)):
                    m.next = "FINISH"

            with m.State("FINISH"):
                for target, quotient, remainder, bias, plain in zip(
                    columns, quotients, remainders, offsets, undivided, strict=True
                ):
                    m.d.sync += [
                        target.word.eq(Mux(im2col, quotient - bias, plain)),
                        target.byte.eq(Mux(im2col, remainder, 0)),
                    ]
                m.d.sync += [
                    prepared.first_row.eq(Mux(cmd.y0[-1], cmd.src - y0_rows, cmd.src + y0_rows)),
                    prepared.stride_rows.eq(stride_rows),
                    prepared.dilation_rows.eq(dilation_rows),
                    prepared.wide.eq(prepared.fast & (cmd.kernel_w > 3)),
                    prepared.tall.eq(prepared.fast & (cmd.kernel_h > 3)),
                ]
                m.next = "READY"

            with m.State("READY"):
                m.d.comb += self.ready.eq(1)
                with m.If(self.take):
                    m.next = "IDLE"
        return m


class TapWalk(wiring.Component):
    """Walks over the source words that a WINDOW command reads, one a cycle.

    ``start`` begins the command in ``prepared``, which then is in ``current``: from the next cycle
    on the outputs describe the first word; ``step`` goes on to the next.

    * General walk (``current.fast`` low): for every block, output and tap (kx innermost) one word.
    * Fast walk: for every block the padded input region in raster order, every word once; ``mac``
      marks those that complete an output's window. Each of these has a step for each ``part`` of
      the window that the kernel needs (:func:`~hw.window.lines.window_parts`), only the first with
      the word. Taken by DEPTHWISE, SUM and MAX if the kernel is at most ``window_kernel`` high and
      wide, no axis has a stride above its kernel or is dilated, and the padded row takes
      2..``window_width`` words.
    * IM2COL: for every output and tap its run, in *segments* of ``rows`` bytes from the run's
      start; ``count`` bytes from ``byte`` of a word, which go on in the next word when it ends.
      The last two words are held; ``fetch`` says that the step brings one more. The segment's first
      ``split`` bytes of the word (all, if it lies within the newest word) are from the newest word
      held (``fetch``: the new one), the others from the one before. A step that only fetches has
      ``count`` 0. With ``kernel_w`` 1, the words held for every tap ``line`` are those of the same
      tap of the output before: ``reload`` marks the steps that start from them.
    """

    def __init__(self, config: Config):
        self.config = config
        rows = config.rows
        super().__init__(
            {
                "prepared": In(prepared_layout(config)),
                "current": Out(prepared_layout(config)),
                "start": In(1),
                "step": In(1),
                "addr": Out(20),  # scratchpad word, meaningless when limit is 0
                "limit": Out(range(rows + 1)),  # bytes of the word inside the input; others: pad
                "fetch": Out(1),  # a word is needed (always but for IM2COL)
                "reload": Out(1),
                "line": Out(6),
                "split": Out(range(rows + 1)),
                "byte": Out(range(rows)),  # first byte of the segment
                "count": Out(range(rows + 1)),  # bytes of the segment (IM2COL)
                "mac": Out(1),  # goes into an output
                "part": Out(2),  # of the window (fast)
                "first": Out(1),  # first step of an output (fast: of a word)
                "last": Out(1),  # last step of an output (fast: of a word)
                "row_end": Out(1),  # last word of the region's row (fast)
                "block_end": Out(1),  # last word of the block
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        rows = self.config.rows
        current, cmd = self.current, self.current.cmd
        fast = current.fast
        im2col = Signal()
        m.d.comb += im2col.eq(cmd.op == WindowOp.IM2COL)

        # The walk's state, and the loops' lengths -------------------------------------------------
        column = current.x0.shape()
        pixel_x, tap_x, x = (Signal(column, name=n) for n in ("pixel_x", "tap_x", "x"))
        y, pixel_y = Signal(COORDINATE_BITS), Signal(COORDINATE_BITS)
        row, pixel_row, block_row = (Signal(20, name=n) for n in ("row", "pixel_row", "block_row"))
        left = Signal(8)
        kx_left, ky_left = Signal(6), Signal(6)
        ox_left, oy_left = Signal(19), Signal(19)
        # Words (rows) of the region before the next that completes a window.
        column_wait, row_wait = Signal(3), Signal(3)
        more, next_part = Signal(), Signal(2)

        def counts(of: data.View) -> list[Value]:
            """Steps of the loops over kx, ky, ox, oy beyond the first."""
            return [
                Mux(of.fast, 0, of.cmd.kernel_w - 1),
                Mux(of.fast, 0, of.cmd.kernel_h - 1),
                Mux(of.fast, of.last_px, of.cmd.out_w - 1),
                Mux(of.fast, of.last_py, of.cmd.out_h - 1),
            ]

        kx_count, ky_count, ox_count, oy_count = counts(current)

        # Outputs ---------------------------------------------------------------------------------
        # IM2COL: the newest word held, and how many are.
        held = data.StructLayout({"newest": COORDINATE_BITS, "words": 2})
        holds, pixel_holds, next_holds = (
            Signal(held, name=n) for n in ("holds", "pixel_holds", "next_holds")
        )
        keeps, run_starts = Signal(), Signal()  # words are held from output to output
        whole, end = Signal(range(rows + 1)), Signal(range(2 * rows + 1))
        spills, holds_first, holds_second, prefetch = Signal(), Signal(), Signal(), Signal()
        following_word = Signal(COORDINATE_BITS)
        segment_end, tap_end = Signal(), Signal()
        word = Signal(COORDINATE_BITS)
        m.d.comb += [
            keeps.eq((cmd.kernel_w == 1) & (cmd.kernel_h <= self.config.window_width)),
            whole.eq(Mux(left <= rows, left, rows)),
            end.eq(x.byte + whole),
            spills.eq(end > rows),
            following_word.eq(x.word + 1),
            holds_first.eq(holds.words.any() & (holds.newest == x.word)),
            holds_second.eq(holds.words[1] & (holds.newest == following_word)),
            prefetch.eq(im2col & spills & ~holds_first & ~holds_second),
            self.fetch.eq(~im2col | (~holds_second & (spills | ~holds_first))),
            word.eq(Mux(im2col & holds_first, following_word, x.word)),
            self.reload.eq(run_starts & (cmd.kernel_h != 1)),
            self.line.eq(ky_left),
            self.split.eq(Mux(spills | holds_second, x.byte, rows)),
            self.byte.eq(x.byte),
            self.count.eq(Mux(prefetch, 0, whole)),
            next_part.eq(Mux(current.wide & (self.part == 0), 1, 2)),
            more.eq(
                self.mac & ((current.wide & (self.part == 0)) | (current.tall & (self.part != 2)))
            ),
            segment_end.eq(Mux(im2col, ~prefetch & (left <= rows), ~more)),
            self.addr.eq(row + word),
            tap_end.eq(segment_end & (kx_left == 0)),
            self.last.eq(tap_end & (ky_left == 0)),
            self.row_end.eq(self.last & (ox_left == 0)),
            self.block_end.eq(self.row_end & (oy_left == 0)),
            self.mac.eq(~fast | ((column_wait == 0) & (row_wait == 0))),
            next_holds.eq(holds),
        ]
        with m.If(self.fetch):
            m.d.comb += [
                next_holds.newest.eq(word),
                next_holds.words.eq(Mux(holds_first, 2, 1)),
            ]
        # Unsigned comparisons: a negative coordinate is a large one.
        with m.If((y < cmd.in_h) & self.fetch & (self.part == 0)):
            with m.If(word < current.width.word):
                m.d.comb += self.limit.eq(rows)
            with m.Elif(word == current.width.word):
                m.d.comb += self.limit.eq(current.width.byte)

        # Steps -----------------------------------------------------------------------------------
        def add(name: str, a: data.View, b: data.View) -> data.View:
            byte = Signal(range(2 * rows), name=f"{name}_byte")
            total = Signal(column, name=name)
            carry = byte >= rows
            m.d.comb += [
                byte.eq(a.byte + b.byte),
                total.byte.eq(Mux(carry, byte - rows, byte)),
                total.word.eq(a.word + b.word + carry),
            ]
            return total

        next_tap_x = add("next_tap_x", tap_x, current.dilation_x)
        next_pixel_x = add("next_pixel_x", pixel_x, current.stride_x)
        next_y, next_row, next_block_row = Signal.like(y), Signal(20), Signal(20)
        m.d.comb += [
            next_y.eq(pixel_y + Mux(fast, 1, cmd.stride_y)),
            next_row.eq(pixel_row + Mux(fast, cmd.src_pitch, current.stride_rows)),
            next_block_row.eq(block_row + cmd.src_block),
        ]
        with m.If(self.step):
            m.d.sync += [
                self.first.eq(self.last),
                run_starts.eq(segment_end),
                holds.eq(next_holds),
                self.part.eq(Mux(more, next_part, 0)),
            ]
            with m.If(im2col & ~segment_end & ~prefetch):
                m.d.sync += [x.word.eq(following_word), left.eq(left - rows)]
            with m.Elif(segment_end):
                m.d.sync += left.eq(cmd.run)
                with m.If(kx_left != 0):
                    m.d.sync += [kx_left.eq(kx_left - 1), tap_x.eq(next_tap_x), x.eq(next_tap_x)]
                with m.Elif(ky_left != 0):
                    m.d.sync += [
                        kx_left.eq(kx_count),
                        ky_left.eq(ky_left - 1),
                        *(c.eq(pixel_x) for c in (tap_x, x)),
                        y.eq(y + cmd.dilation_y),
                        row.eq(row + current.dilation_rows),
                        holds.eq(pixel_holds),
                    ]
                with m.Else():
                    m.d.sync += [
                        kx_left.eq(kx_count),
                        ky_left.eq(ky_count),
                        pixel_holds.eq(next_holds),
                    ]
                    with m.If(ox_left != 0):
                        m.d.sync += [
                            ox_left.eq(ox_left - 1),
                            *(c.eq(next_pixel_x) for c in (pixel_x, tap_x, x)),
                            y.eq(pixel_y),
                            row.eq(pixel_row),
                            column_wait.eq(
                                Mux(column_wait == 0, cmd.stride_x - 1, column_wait - 1)
                            ),
                        ]
                    with m.Else():
                        m.d.sync += [
                            ox_left.eq(ox_count),
                            *(c.eq(current.x0) for c in (pixel_x, tap_x, x)),
                            column_wait.eq(cmd.kernel_w - 1),
                            *(h.words.eq(0) for h in (holds, pixel_holds)),
                        ]
                        with m.If(oy_left != 0):
                            m.d.sync += [
                                oy_left.eq(oy_left - 1),
                                *(c.eq(next_y) for c in (pixel_y, y)),
                                *(r.eq(next_row) for r in (pixel_row, row)),
                                row_wait.eq(Mux(row_wait == 0, cmd.stride_y - 1, row_wait - 1)),
                            ]
                        with m.Else():
                            m.d.sync += [
                                oy_left.eq(oy_count),
                                *(c.eq(cmd.y0) for c in (pixel_y, y)),
                                *(r.eq(next_block_row) for r in (block_row, pixel_row, row)),
                                row_wait.eq(cmd.kernel_h - 1),
                            ]
                with m.If(~keeps):
                    m.d.sync += [h.words.eq(0) for h in (holds, pixel_holds)]

        with m.If(self.start):
            new = self.prepared
            m.d.sync += [
                current.eq(new),
                *(c.eq(new.x0) for c in (pixel_x, tap_x, x)),
                *(c.eq(new.cmd.y0) for c in (pixel_y, y)),
                *(r.eq(new.first_row) for r in (block_row, pixel_row, row)),
                left.eq(new.cmd.run),
                *(
                    n.eq(c)
                    for n, c in zip((kx_left, ky_left, ox_left, oy_left), counts(new), strict=True)
                ),
                column_wait.eq(new.cmd.kernel_w - 1),
                row_wait.eq(new.cmd.kernel_h - 1),
                self.first.eq(1),
                run_starts.eq(1),
                *(h.words.eq(0) for h in (holds, pixel_holds)),
            ]
        return m


class OutputWalk(wiring.Component):
    """Walks over the words that a WINDOW command writes; ``step`` goes on to the next.

    ``start`` begins the command in ``cmd``, which must be there from the next cycle on until the
    next ``start``. ``last_word`` is only looked at for IM2COL: the word at hand is its pixel's
    last. ``end`` marks the command's last word.
    """

    def __init__(self) -> None:
        super().__init__(
            {
                "cmd": In(command_layout(Opcode.WINDOW)),
                "start": In(1),
                "step": In(1),
                "last_word": In(1),
                "addr": Out(20),
                "end": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        cmd = self.cmd
        im2col = Signal()
        m.d.comb += im2col.eq(cmd.op == WindowOp.IM2COL)

        # Inner, middle, outer loop: columns, rows, blocks; IM2COL: words, columns, rows.
        steps = [Signal(20, name=f"step{i}") for i in range(3)]
        base = [self.addr, Signal(20, name="middle"), Signal(20, name="outer")]
        count = [Signal(16, name=f"count{i}") for i in range(3)]
        left = [Signal(16, name=f"left{i}") for i in range(3)]
        m.d.comb += [
            steps[0].eq(Mux(im2col, cmd.out_block, 1)),
            steps[1].eq(Mux(im2col, 1, cmd.out_pitch)),
            steps[2].eq(Mux(im2col, cmd.out_pitch, cmd.out_block)),
            count[0].eq(cmd.out_w - 1),
            count[1].eq(Mux(im2col, cmd.out_w, cmd.out_h) - 1),
            count[2].eq(Mux(im2col, cmd.out_h, cmd.blocks) - 1),
        ]
        last = [Mux(im2col, self.last_word, left[0] == 0), left[1] == 0, left[2] == 0]
        m.d.comb += self.end.eq(last[0] & last[1] & last[2])
        with m.If(self.start):
            m.d.sync += [*(b.eq(cmd.out) for b in base)]
            m.d.sync += [*(n.eq(c) for n, c in zip(left, count, strict=True))]
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
                    following = base[2] + steps[2]
                    m.d.sync += [*(b.eq(following) for b in base)]
                    m.d.sync += [left[1].eq(count[1]), left[2].eq(left[2] - 1)]
        return m
