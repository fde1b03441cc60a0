"""The WINDOW engine's reduction data path: line memory, 3x3 shift window, nine MACs a lane."""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Mux, Signal, signed
from amaranth.lib import data, memory, wiring
from amaranth.lib.wiring import In, Out

from isa import Config
from isa.config import bits_for

INDEX_BITS = 12
"""Index of a position in a row of the region, or of a tap."""


def pixel_layout() -> data.StructLayout:
    """What to do with a word: ``index`` is its column in the region's row (fast) or its tap
    (general); ``mac``: reduce the window it completes; ``first``/``last`` word of an output."""
    return data.StructLayout({"index": INDEX_BITS, "mac": 1, "first": 1, "last": 1})


def weight_layout() -> data.StructLayout:
    """Where a word of weights goes: into the line memory at tap ``index``, or, unless ``store``,
    into the window's row ``y``, column ``x``."""
    return data.StructLayout({"store": 1, "y": 2, "x": 2, "index": INDEX_BITS})


class WindowReduce(wiring.Component):
    """Reduces words to int32 accumulators (or maxima), ``rows`` lanes side by side.

    Two ways, by ``fast``:

    * Fast: words come in raster order. A line memory keeps the two rows before, a 3x3 window the
      last three columns; newest word at (2, 2). Small kernels lie in that corner. One output for
      every word with ``mac``.
    * General: a word is one tap; only (2, 2) works, with the tap's weights from the line memory
      (``stored``) or as loaded just before. Taps add up from ``first`` to ``last``.

    The window's weights are kept between commands' words: ``clear`` sets those that ``ones`` (bit
    3 * y + x) marks to 1 and the others to 0. ``used`` marks the positions that take part in MAX.

    ``issue`` with ``en`` announces the word of the next ``en`` cycle, a pixel at ``index``, for the
    line memory to be read. In that cycle ``word`` comes with ``pixel_valid`` or ``weight_valid``.
    All in order: a pixel sees the weights that came before it. Four ``en`` cycles after the last
    word of an output, ``o_valid`` with the accumulators on ``acc``, 32 bits a lane, lane 0 lowest.
    While ``en`` is low everything holds still.

    In the fast way a row must have two words or more (the line memory is read one ahead).

    The line memory is also lent out: ``kept`` is what it has at the ``index`` of the last ``issue``
    and ``keep`` writes ``held`` to the index of ``pixel``. For that no valid must be high.
    """

    LATENCY = 4

    def __init__(self, config: Config):
        self.config = config
        word = 8 * config.rows
        super().__init__(
            {
                "en": In(1),
                "fast": In(1),
                "maximum": In(1),
                "stored": In(1),
                "used": In(9),
                "clear": In(1),
                "ones": In(9),
                "issue": In(1),
                "index": In(INDEX_BITS),
                "pixel_valid": In(1),
                "pixel": In(pixel_layout()),
                "weight_valid": In(1),
                "weight": In(weight_layout()),
                "word": In(word),
                "kept": Out(2 * word),
                "keep": In(1),
                "held": In(2 * word),
                "o_valid": Out(1),
                "acc": Out(32 * config.rows),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        rows = self.config.rows
        bits = 8 * rows
        width = self.config.window_width

        m.submodules.lines = lines = memory.Memory(shape=2 * bits, depth=width, init=[])
        read, write = lines.read_port(), lines.write_port()
        address = bits_for(width)
        before, oldest = read.data[:bits], read.data[bits:]  # one row and two rows before
        take_pixel, take_weight = Signal(), Signal()
        m.d.comb += [
            take_pixel.eq(self.en & self.pixel_valid),
            take_weight.eq(self.en & self.weight_valid),
            read.en.eq(self.en & self.issue),
            read.addr.eq(self.index[:address]),
            write.en.eq(
                (self.en & self.keep) | Mux(self.fast, take_pixel, take_weight & self.weight.store)
            ),
            write.addr.eq(
                Mux(self.fast | self.keep, self.pixel.index, self.weight.index)[:address]
            ),
            write.data.eq(Mux(self.keep, self.held, Cat(self.word, before))),
            self.kept.eq(read.data),
        ]

        # 1: window and weights.
        window = [
            [Signal(bits, name=f"window_{y}{x}", reset_less=True) for x in range(3)]
            for y in range(3)
        ]
        weights = [
            [Signal(bits, name=f"weights_{y}{x}", reset_less=True) for x in range(3)]
            for y in range(3)
        ]
        with m.If(take_pixel):
            for line, new in zip(window, (oldest, before, self.word), strict=True):
                m.d.sync += [line[0].eq(line[1]), line[1].eq(line[2]), line[2].eq(new)]
        with m.If(self.clear):
            for y in range(3):
                for x in range(3):
                    one = Cat(self.ones[3 * y + x], *([0] * 7))
                    m.d.sync += weights[y][x].eq(one.replicate(rows))
        with m.If(take_weight & ~self.weight.store):
            for y in range(3):
                for x in range(3):
                    with m.If((self.weight.y == y) & (self.weight.x == x)):
                        m.d.sync += weights[y][x].eq(self.word)
        with m.If(take_pixel & self.stored):
            m.d.sync += weights[2][2].eq(before)

        valid = Signal(self.LATENCY)
        first, last = Signal(3), Signal(4)
        with m.If(self.en):
            m.d.sync += [
                valid.eq(Cat(self.pixel_valid & self.pixel.mac, valid[:2], valid[2] & last[2])),
                first.eq(Cat(self.pixel.first, first)),
                last.eq(Cat(self.pixel.last, last)),
            ]
        m.d.comb += self.o_valid.eq(valid[3])
        reduce, total, add_up = Signal(), Signal(), Signal()
        m.d.comb += [
            reduce.eq(self.en & valid[0]),
            total.eq(self.en & valid[1]),
            add_up.eq(self.en & valid[2]),
        ]

        for i in range(rows):

            def lane(word: Signal, i: int = i) -> object:
                return word.word_select(i, 8).as_signed()

            # 2: products, or the maximum of every column.
            products = [
                Signal(signed(16), name=f"product{n}_{i}", reset_less=True) for n in range(9)
            ]
            column = [Signal(signed(8), name=f"column{x}_{i}", reset_less=True) for x in range(3)]
            with m.If(reduce & ~self.maximum):
                for n, product in enumerate(products):
                    y, x = divmod(n, 3)
                    m.d.sync += product.eq(lane(window[y][x]) * lane(weights[y][x]))
            with m.If(reduce & self.maximum):
                for x in range(3):
                    parts = [Signal(signed(8), name=f"part{y}{x}_{i}") for y in range(3)]
                    for y, part in enumerate(parts):
                        m.d.comb += part.eq(Mux(self.used[3 * y + x], lane(window[y][x]), -128))
                    m.d.sync += column[x].eq(_largest(m, f"column{x}_{i}", parts))

            # 3: sum of the products, or maximum of the columns.
            partial = Signal(signed(20), name=f"partial_{i}", reset_less=True)
            with m.If(total & ~self.maximum):
                m.d.sync += partial.eq(sum(products))
            with m.If(total & self.maximum):
                m.d.sync += partial.eq(_largest(m, f"largest_{i}", column))

            # 4: over the taps.
            acc = Signal(signed(32), name=f"acc_{i}", reset_less=True)
            with m.If(add_up & ~self.maximum):
                m.d.sync += acc.eq(Mux(first[2], 0, acc) + partial)
            with m.If(add_up & self.maximum & (first[2] | (partial > acc))):
                m.d.sync += acc.eq(partial)
            m.d.comb += self.acc[32 * i :][:32].eq(acc)
        return m


def _largest(m: Module, name: str, values: list[Signal]) -> Signal:
    """The largest of three signed bytes."""
    a, b, c = values
    ab = Signal(signed(8), name=f"{name}_ab")
    m.d.comb += ab.eq(Mux(a > b, a, b))
    return Mux(ab > c, ab, c)
