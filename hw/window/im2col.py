"""The WINDOW engine's IM2COL data path: collects runs of bytes into words."""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Mux, Signal
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from systole.isa import Config


def segment_layout(config: Config) -> data.StructLayout:
    """What happens to a new source word and the two that are held.

    The words held are those of the segment before, with ``reload`` those kept. With ``fetch`` a new
    word comes, whose bytes from ``limit`` on are outside the input and read as ``pad``, and takes
    the place of the older. The segment's bytes below ``split`` are the newest word's, the others
    the older's. After rotation right by ``rotate`` it lies at bytes ``fill``..``stop - 1`` of the
    word being collected, those beyond ``rows`` at the start of the next. ``emit``: the word at hand
    is complete; ``last``: it is its pixel's last, filled up from ``stop`` with ``pad``.
    """
    rows = config.rows
    return data.StructLayout(
        {
            "reload": 1,
            "fetch": 1,
            "limit": range(rows + 1),
            "split": range(rows + 1),
            "rotate": range(rows),
            "fill": range(rows),
            "stop": range(2 * rows),
            "emit": 1,
            "last": 1,
        }
    )


class Collector(wiring.Component):
    """Collects segments into words, one segment a cycle.

    A segment is taken when ``en`` and ``valid``; the word it completes is on ``o`` with ``o_valid``
    one cycle with ``en`` later. While ``en`` is low everything holds still.
    ``kept`` are two words (the newer first) to go on with, ``held`` those to keep, in that cycle.
    """

    en: Signal
    valid: Signal
    segment: data.View
    word: Signal
    pad: Signal
    kept: Signal
    held: Signal
    o_valid: Signal
    o: Signal

    def __init__(self, config: Config):
        self.config = config
        word = 8 * config.rows
        super().__init__(
            {
                "en": In(1),
                "valid": In(1),
                "segment": In(segment_layout(config)),
                "word": In(word),
                "pad": In(8),
                "kept": In(2 * word),
                "held": Out(2 * word),
                "o_valid": Out(1),
                "o": Out(word),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        rows = self.config.rows

        # 1: pad, join two words, rotate.
        valid = Signal()
        segment = Signal.like(self.segment)
        rotated = Signal(8 * rows, reset_less=True)
        word, before = Signal(8 * rows), Signal(16 * rows)
        newest, older = self.held[: 8 * rows], self.held[8 * rows :]
        last_held = Signal(16 * rows, reset_less=True)
        take = self.en & self.valid
        value = Signal(8 * rows)
        with m.If(self.valid):
            m.d.comb += [
                word.eq(
                    Cat(
                        Mux(i < self.segment.limit, self.word.word_select(i, 8), self.pad)
                        for i in range(rows)
                    )
                ),
                before.eq(Mux(self.segment.reload, self.kept, last_held)),
                self.held.eq(Mux(self.segment.fetch, Cat(word, before), before)),
                value.eq(
                    Cat(
                        Mux(
                            i < self.segment.split,
                            newest.word_select(i, 8),
                            older.word_select(i, 8),
                        )
                        for i in range(rows)
                    )
                ),
            ]
            for i in range(len(self.segment.rotate)):
                stage = Signal(8 * rows, name=f"rotate{i}")
                turned = value.rotate_right(8 * (1 << i))
                m.d.comb += stage.eq(Mux(self.segment.rotate[i], turned, value))
                value = stage
        with m.If(self.en):
            m.d.sync += valid.eq(self.valid)
        with m.If(take):
            m.d.sync += [
                last_held.eq(self.held),
                segment.eq(self.segment),
                rotated.eq(value),
            ]

        # 2: merge with the bytes collected before.
        collected = Signal(8 * rows, reset_less=True)
        m.d.comb += self.o_valid.eq(valid & segment.emit)
        for i in range(rows):
            new, old = rotated.word_select(i, 8), collected.word_select(i, 8)
            is_old = i < segment.fill
            is_pad = segment.last & (i >= segment.stop)
            with m.If(self.o_valid):
                m.d.comb += self.o.word_select(i, 8).eq(
                    Mux(is_old, old, Mux(is_pad, self.pad, new))
                )
            # Bytes from ``stop`` on are rubbish until a later segment overwrites them.
            with m.If(self.en & valid & (segment.emit | ~is_old)):
                m.d.sync += old.eq(new)
        return m
