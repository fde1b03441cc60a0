"""The WINDOW engine's reduction data path: line memory, shift window, nine MACs a lane."""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Mux, Signal, signed
from amaranth.lib import data, memory, wiring
from amaranth.lib.wiring import In, Out

from systole.isa import Config
from systole.isa.config import bits_for

INDEX_BITS = 12
"""Index of a position in a row of the region, or of a tap."""


MACS = 9
"""Per lane."""


def window_parts(size: int) -> list[list[tuple[int, int]]]:
    """The positions (y, x) of a window of ``size`` x ``size`` that are reduced in each cycle: its
    newest 3x3 corner; then what wider, then what higher kernels have besides, at most ``MACS``."""
    old, corner = range(size - 3), range(size - 3, size)
    parts = [[(y, x) for y in corner for x in corner]]
    if size > 3:
        rest = [(y, x) for y in old for x in old]
        wide = [(y, x) for y in corner for x in old]
        spare = MACS - len(wide)
        parts.append(wide + rest[:spare])
        parts.append([(y, x) for y in old for x in corner] + rest[spare:])
    return parts


def pixel_layout() -> data.StructLayout:
    """What to do with a word: ``index`` is its column in the region's row (fast) or its tap
    (general); ``mac``: reduce ``part`` of the window it completes; ``first``/``last`` of an output.
    Parts but 0 come without a word."""
    return data.StructLayout({"index": INDEX_BITS, "mac": 1, "part": 2, "first": 1, "last": 1})


def weight_layout() -> data.StructLayout:
    """Where a word of weights goes: into the line memory at tap ``index``, or, unless ``store``,
    into the window's row ``y``, column ``x``."""
    return data.StructLayout({"store": 1, "y": 3, "x": 3, "index": INDEX_BITS})


class WindowReduce(wiring.Component):
    """Reduces words to int32 accumulators (or maxima), ``rows`` lanes side by side.

    Two ways, by ``fast``:

    * Fast: words come in raster order. A line memory keeps the rows before, a window of
      ``window_kernel`` squared the last columns; newest word at its last position. Small kernels
      lie in that corner. One output for every word with ``mac`` and the parts that follow it.
    * General: a word is one tap; only the last position works, with the tap's weights from the line
      memory (``stored``) or as loaded just before.

    Parts and taps add up from ``first`` to ``last``. The window's weights are kept between
    commands' words: ``clear`` sets those that ``ones`` (bit ``window_kernel`` * y + x) marks to 1
    and the others to 0. ``used`` marks the positions that take part in MAX.

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
        positions = config.window_kernel**2
        super().__init__(
            {
                "en": In(1),
                "fast": In(1),
                "maximum": In(1),
                "stored": In(1),
                "used": In(positions),
                "clear": In(1),
                "ones": In(positions),
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
        width, size = self.config.window_width, self.config.window_kernel
        parts = window_parts(size)

        m.submodules.lines = lines = memory.Memory(shape=(size - 1) * bits, depth=width, init=[])
        read, write = lines.read_port(), lines.write_port()
        address = bits_for(width)
        before = [read.data.word_select(y, bits) for y in range(size - 1)]  # newest first
        shift, take_weight = Signal(), Signal()
        m.d.comb += [
            shift.eq(self.en & self.pixel_valid & (self.pixel.part == 0)),
            take_weight.eq(self.en & self.weight_valid),
            read.en.eq(self.en & self.issue),
            read.addr.eq(self.index[:address]),
            write.en.eq(
                (self.en & self.keep) | Mux(self.fast, shift, take_weight & self.weight.store)
            ),
            write.addr.eq(
                Mux(self.fast | self.keep, self.pixel.index, self.weight.index)[:address]
            ),
            write.data.eq(Mux(self.keep, self.held, Cat(self.word, *before[:-1]))),
            self.kept.eq(read.data),
        ]

        # 1: window and weights.
        window = [
            [Signal(bits, name=f"window_{y}{x}", reset_less=True) for x in range(size)]
            for y in range(size)
        ]
        weights = [
            [Signal(bits, name=f"weights_{y}{x}", reset_less=True) for x in range(size)]
            for y in range(size)
        ]
        with m.If(shift):
            for line, new in zip(window, (*reversed(before), self.word), strict=True):
                m.d.sync += [a.eq(b) for a, b in zip(line, (*line[1:], new), strict=True)]
        with m.If(self.clear):
            for y in range(size):
                for x in range(size):
                    one = Cat(self.ones[size * y + x], *([0] * 7))
                    m.d.sync += weights[y][x].eq(one.replicate(rows))
        with m.If(take_weight & ~self.weight.store):
            for y in range(size):
                for x in range(size):
                    with m.If((self.weight.y == y) & (self.weight.x == x)):
                        m.d.sync += weights[y][x].eq(self.word)
        with m.If(shift & self.stored):
            m.d.sync += weights[-1][-1].eq(before[0])

        valid = Signal(self.LATENCY)
        first, last = Signal(3), Signal(4)
        part = Signal(range(len(parts)))
        with m.If(self.en):
            m.d.sync += [
                valid.eq(Cat(self.pixel_valid & self.pixel.mac, valid[:2], valid[2] & last[2])),
                first.eq(Cat(self.pixel.first, first)),
                last.eq(Cat(self.pixel.last, last)),
                part.eq(self.pixel.part),
            ]
        m.d.comb += self.o_valid.eq(valid[3])
        reduce, total, add_up = Signal(), Signal(), Signal()
        m.d.comb += [
            reduce.eq(self.en & valid[0]),
            total.eq(self.en & valid[1]),
            add_up.eq(self.en & valid[2]),
        ]

        # The positions of the part at hand: a word, its weights, and whether it is used. Those that
        # no multiplier is left for are not.
        chosen = []
        for n in range(MACS):
            operand = Signal(bits, name=f"operand{n}")
            weight = Signal(bits, name=f"weight{n}")
            takes = Signal(name=f"takes{n}")
            with m.Switch(part):
                for k, positions in enumerate(parts):
                    with m.Case(k):
                        if n < len(positions):
                            y, x = positions[n]
                            m.d.comb += [
                                operand.eq(window[y][x]),
                                weight.eq(weights[y][x]),
                                takes.eq(self.used[size * y + x]),
                            ]
            chosen.append((operand, weight, takes))

        for i in range(rows):

            def lane(word: Signal, i: int = i) -> object:
                return word.word_select(i, 8).as_signed()

            # 2: products, or the maximum of every three.
            products = [
                Signal(signed(16), name=f"product{n}_{i}", reset_less=True) for n in range(MACS)
            ]
            column = [Signal(signed(8), name=f"column{x}_{i}", reset_less=True) for x in range(3)]
            with m.If(reduce & ~self.maximum):
                for product, (operand, weight, _) in zip(products, chosen, strict=True):
                    m.d.sync += product.eq(lane(operand) * lane(weight))
            with m.If(reduce & self.maximum):
                for x in range(3):
                    values = [Signal(signed(8), name=f"value{y}{x}_{i}") for y in range(3)]
                    for value, (operand, _, takes) in zip(values, chosen[x::3], strict=True):
                        m.d.comb += value.eq(Mux(takes, lane(operand), -128))
                    m.d.sync += column[x].eq(_largest(m, f"column{x}_{i}", values))

            # 3: sum of the products, or maximum of the columns.
            partial = Signal(signed(20), name=f"partial_{i}", reset_less=True)
            with m.If(total & ~self.maximum):
                m.d.sync += partial.eq(sum(products))
            with m.If(total & self.maximum):
                largest = Signal(signed(8), name=f"largest_{i}")
                m.d.comb += largest.eq(_largest(m, f"largest_{i}", column))
                m.d.sync += partial.eq(largest)

            # 4: over the taps.
            acc = Signal(signed(32), name=f"acc_{i}", reset_less=True)
            with m.If(add_up & ~self.maximum):
                m.d.sync += acc.eq(Mux(first[2], 0, acc) + partial)
            with m.If(add_up & self.maximum):
                is_larger = Signal(name=f"is_larger_{i}")
                m.d.comb += is_larger.eq(first[2] | (partial > acc))
                with m.If(is_larger):
                    m.d.sync += acc.eq(partial)
            m.d.comb += self.acc[32 * i :][:32].eq(acc)
        return m


def _largest(m: Module, name: str, values: list[Signal]) -> Signal:
    """The largest of three signed bytes."""
    a, b, c = values
    ab = Signal(signed(8), name=f"{name}_ab")
    m.d.comb += ab.eq(Mux(a > b, a, b))
    return Mux(ab > c, ab, c)
