"""The words that the WINDOW engine reads at each step of its walk, and those it still holds."""

from __future__ import annotations

from amaranth.hdl import Module, Mux, Signal, Value
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from systole.hw.bus.interfaces import record
from systole.hw.bus.registers import StreamRegisters
from systole.hw.window.walk import prepared_layout, tap_layout, word_name
from systole.isa import Config, WindowOp
from systole.isa.commands import ADDRESS_BITS
from systole.isa.timing import im2col_keeps_words


class SourceWords(wiring.Component):
    """Finds the source word of every step of :class:`~hw.window.walk.TapWalk`, one a cycle.

    It holds up to two steps: ``next_tap`` is taken when ``takes`` is high. While ``valid`` is high,
    the other outputs describe the first of them; ``step`` goes on to the next. ``start`` drops what
    is held: in the next cycle the first step of ``current`` is in ``next_tap``.

    Without IM2COL every step has a word. IM2COL holds the last two words: ``fetch`` says that the
    step brings one more. The segment's first ``split`` bytes of the word (all, if it lies within
    the newest word) are from the newest word held (``fetch``: the new one), the others from the one
    before. A step that brings two words takes two cycles; in the first, ``prefetch``, nothing is
    collected. With ``kernel_w`` 1, the words held for every tap ``line`` are those of the same tap
    of the output before: ``reload`` marks the steps that start from them.
    """

    current: data.View
    next_tap: data.View
    takes: Signal
    start: Signal
    step: Signal
    valid: Signal
    tap: data.View
    addr: Signal
    limit: Signal
    fetch: Signal
    prefetch: Signal
    reload: Signal
    split: Signal
    first: Signal

    def __init__(self, config: Config):
        self.config = config
        rows = config.rows
        super().__init__(
            {
                "current": In(prepared_layout(config)),
                "next_tap": In(tap_layout(config)),
                "takes": Out(1),
                "start": In(1),
                "step": In(1),
                "valid": Out(1),
                "tap": Out(tap_layout(config)),  # ends nothing in a cycle with prefetch
                "addr": Out(ADDRESS_BITS),  # scratchpad word, meaningless when limit is 0
                "limit": Out(range(rows + 1)),  # bytes of the word inside the input; others: pad
                "fetch": Out(1),
                "prefetch": Out(1),
                "reload": Out(1),
                "split": Out(range(rows + 1)),
                "first": Out(1),  # first step of an output (fast: of a word)
            }
        )
        held = data.StructLayout({"newest": word_name(config), "words": 2})
        # IM2COL: the newest word held, and how many are.
        self._holds, self._pixel_holds, self._next_holds = (
            record(held, name=n) for n in ("holds", "pixel_holds", "next_holds")
        )
        self._run_starts = Signal()
        self._taps = StreamRegisters(tap_layout(config))

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.taps = taps = self._taps
        self._find_word(m)
        m.d.comb += [
            taps.input.valid.eq(1),
            taps.input.payload.eq(self.next_tap),
            taps.output.ready.eq(self.step & ~self.prefetch),
            taps.flush.eq(self.start),
            self.takes.eq(taps.input.ready),
            self.tap.eq(taps.output.payload),
            self.valid.eq(taps.output.valid),
            self.reload.eq(self._run_starts & (self.current.cmd.kernel_h != 1)),
        ]
        with m.If(self.step):
            m.d.sync += [
                self.first.eq(self.tap.last & ~self.prefetch),
                self._run_starts.eq(self.tap.run_end & ~self.prefetch),
                self._holds.eq(self._next_holds),
            ]
            with m.If(self.tap.run_end & ~self.prefetch):
                self._end_run(m)
        with m.If(self.start):
            m.d.sync += [self.first.eq(1), self._run_starts.eq(1)]
            self._drop_words(m)
        return m

    def _find_word(self, m: Module) -> None:
        """The word to be read, and (IM2COL) which of the words held serve the segment."""
        tap, holds = self.tap, self._holds
        im2col, holds_first, holds_second = Signal(), Signal(), Signal()
        goes_on = im2col & holds_first  # with the word behind
        m.d.comb += [
            im2col.eq(self.current.cmd.op == WindowOp.IM2COL),
            holds_first.eq(holds.words.any() & (Value.cast(holds.newest) == Value.cast(tap.word))),
            holds_second.eq(
                holds.words[1] & (Value.cast(holds.newest) == Value.cast(tap.following))
            ),
            self.prefetch.eq(im2col & tap.spills & ~holds_first & ~holds_second),
            self.fetch.eq(~im2col | (~holds_second & (tap.spills | ~holds_first))),
            self.addr.eq(Mux(goes_on, tap.following_addr, tap.addr)),
            self.split.eq(Mux(tap.spills | holds_second, tap.byte, self.config.rows)),
            self._next_holds.eq(holds),
        ]
        with m.If(self.fetch):
            m.d.comb += [
                self.limit.eq(Mux(goes_on, tap.following_limit, tap.limit)),
                Value.cast(self._next_holds.newest).eq(Mux(goes_on, tap.following, tap.word)),
                self._next_holds.words.eq(Mux(holds_first, 2, 1)),
            ]

    def _end_run(self, m: Module) -> None:
        """The words that the next run finds held."""
        cmd, tap = self.current.cmd, self.tap
        keeps = Signal()  # words are held from output to output
        m.d.comb += keeps.eq(
            im2col_keeps_words(self.config, kernel_w=cmd.kernel_w, kernel_h=cmd.kernel_h)
        )
        with m.If(tap.kernel_row_end):
            m.d.sync += self._holds.eq(self._pixel_holds)
        with m.If(tap.last):
            m.d.sync += self._pixel_holds.eq(self._next_holds)
        with m.If(tap.row_end | ~keeps):
            self._drop_words(m)

    def _drop_words(self, m: Module) -> None:
        m.d.sync += [self._holds.words.eq(0), self._pixel_holds.words.eq(0)]
