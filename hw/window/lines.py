"""The WINDOW engine's reduction data path: line memory, shift window, nine MACs a lane."""

from __future__ import annotations

from typing import NamedTuple

from amaranth.hdl import Cat, Module, Mux, Signal, Value, signed
from amaranth.lib import data, memory, wiring
from amaranth.lib.wiring import In, Out

from systole.isa import Config
from systole.isa.config import bits_for
from systole.isa.timing import CORNER, REDUCE_LATENCY, WINDOW_MACS, window_part_positions

INDEX_BITS = 12
"""Index of a position in a row of the region, or of a tap."""


def pixel_layout() -> data.StructLayout:
    """What to do with a word: ``index`` is its column in the region's row (fast) or its tap
    (general); ``mac``: reduce ``part`` of the window it completes; ``first``/``last`` of an output.
    Parts but 0 come without a word."""
    return data.StructLayout({"index": INDEX_BITS, "mac": 1, "part": 2, "first": 1, "last": 1})


def weight_layout() -> data.StructLayout:
    """Where a word of weights goes: into the line memory at tap ``index``, or, unless ``store``,
    into the window's row ``y``, column ``x``."""
    return data.StructLayout({"store": 1, "y": 3, "x": 3, "index": INDEX_BITS})


class Operand(NamedTuple):
    """A window position of the part at hand: its word, its weights, and whether it is used."""

    word: Signal
    weight: Signal
    used: Signal


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

    LATENCY = REDUCE_LATENCY

    en: Signal
    fast: Signal
    maximum: Signal
    stored: Signal
    used: Signal
    clear: Signal
    ones: Signal
    issue: Signal
    index: Signal
    pixel_valid: Signal
    pixel: data.View
    weight_valid: Signal
    weight: data.View
    word: Signal
    kept: Signal
    keep: Signal
    held: Signal
    o_valid: Signal
    acc: Signal

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
        size, bits = config.window_kernel, 8 * config.rows
        self._parts = window_part_positions(size)
        # By row and column.
        self._window, self._weights = (
            [
                [Signal(bits, name=f"{name}_{y}{x}", reset_less=True) for x in range(size)]
                for y in range(size)
            ]
            for name in ("window", "weights")
        )
        self._shift = Signal()  # a word enters the line memory and the window
        # The newest words of the rows before at the column at hand, newest row first.
        self._before: list[Value] = []
        # The stages that have something to do: the second, third and fourth; and do it.
        self._multiplies = Signal()
        self._totals = Signal()
        self._multiply = Signal()
        self._total = Signal()
        self._add_up = Signal()
        self._first = Signal(3)
        self._last = Signal(4)
        self._part = Signal(range(len(self._parts)))

    def elaborate(self, platform: object) -> Module:
        m = Module()
        self._keep_lines(m)
        self._shift_window(m)
        self._load_weights(m)
        self._advance(m)
        operands = self._choose_operands(m)
        for lane in range(self.config.rows):
            self._reduce_lane(m, lane, operands)
        return m

    def _keep_lines(self, m: Module) -> None:
        """The line memory: rows before, taps' weights, or words lent out."""
        bits, depth = 8 * self.config.rows, self.config.window_width
        count = self.config.window_kernel - 1
        lines: memory.Memory = memory.Memory(shape=count * bits, depth=depth, init=[])
        m.submodules.lines = lines
        read, write = lines.read_port(), lines.write_port()
        address = bits_for(depth)
        self._before = [read.data.word_select(y, bits) for y in range(count)]
        stores = self.en & self.weight_valid & self.weight.store
        m.d.comb += [
            self._shift.eq(self.en & self.pixel_valid & (self.pixel.part == 0)),
            read.en.eq(self.en & self.issue),
            read.addr.eq(self.index[:address]),
            write.en.eq((self.en & self.keep) | Mux(self.fast, self._shift, stores)),
            write.addr.eq(
                Mux(self.fast | self.keep, self.pixel.index, self.weight.index)[:address]
            ),
            write.data.eq(Mux(self.keep, self.held, Cat(self.word, *self._before[:-1]))),
            self.kept.eq(read.data),
        ]

    def _shift_window(self, m: Module) -> None:
        """Stage 1: a new column enters the window."""
        with m.If(self._shift):
            column = (*reversed(self._before), self.word)
            for line, new in zip(self._window, column, strict=True):
                m.d.sync += [a.eq(b) for a, b in zip(line, (*line[1:], new), strict=True)]

    def _load_weights(self, m: Module) -> None:
        """Stage 1: weights enter the window; those that are stored with the word of their tap."""
        size = self.config.window_kernel
        positions = [(y, x) for y in range(size) for x in range(size)]
        with m.If(self.clear):
            for y, x in positions:
                one = Cat(self.ones[size * y + x], *([0] * 7))
                m.d.sync += self._weights[y][x].eq(one.replicate(self.config.rows))
        with m.If(self.en & self.weight_valid & ~self.weight.store):
            for y, x in positions:
                with m.If((self.weight.y == y) & (self.weight.x == x)):
                    m.d.sync += self._weights[y][x].eq(self.word)
        with m.If(self._shift & self.stored):
            m.d.sync += self._weights[-1][-1].eq(self._before[0])

    def _advance(self, m: Module) -> None:
        """What goes along with the words through the stages."""
        valid = Signal(self.LATENCY)
        with m.If(self.en):
            m.d.sync += [
                valid.eq(
                    Cat(self.pixel_valid & self.pixel.mac, valid[:2], valid[2] & self._last[2])
                ),
                self._first.eq(Cat(self.pixel.first, self._first)),
                self._last.eq(Cat(self.pixel.last, self._last)),
                self._part.eq(self.pixel.part),
            ]
        m.d.comb += [
            self.o_valid.eq(valid[3]),
            self._multiplies.eq(valid[0]),
            self._totals.eq(valid[1]),
            self._multiply.eq(self.en & valid[0]),
            self._total.eq(self.en & valid[1]),
            self._add_up.eq(self.en & valid[2]),
        ]

    def _choose_operands(self, m: Module) -> list[Operand]:
        """The positions of the part at hand. Those that no multiplier is left for are not used."""
        size, bits = self.config.window_kernel, 8 * self.config.rows
        operands = []
        for n in range(WINDOW_MACS):
            word = Signal(bits, name=f"operand{n}")
            weight = Signal(bits, name=f"weight{n}")
            used = Signal(name=f"takes{n}")
            with m.Switch(self._part):
                for part, positions in enumerate(self._parts):
                    with m.Case(part):
                        if n < len(positions):
                            y, x = positions[n]
                            m.d.comb += [
                                word.eq(self._window[y][x]),
                                weight.eq(self._weights[y][x]),
                                used.eq(self.used[size * y + x]),
                            ]
            operands.append(Operand(word, weight, used))
        return operands

    def _reduce_lane(self, m: Module, lane: int, operands: list[Operand]) -> None:
        """Stages 2 to 4 of a lane: products, their sum, and the sum over parts and taps; or the
        maxima of every three, of these, and of all."""

        def of_lane(word: Value) -> Value:
            return word.word_select(lane, 8).as_signed()

        def register(name: str, bits: int) -> Signal:
            return Signal(signed(bits), name=f"{name}_{lane}", reset_less=True)

        products = [register(f"product{n}", 16) for n in range(WINDOW_MACS)]
        columns = [register(f"column{x}", 8) for x in range(CORNER)]
        with m.If(self._multiply & ~self.maximum):
            for product, operand in zip(products, operands, strict=True):
                m.d.sync += product.eq(of_lane(operand.word) * of_lane(operand.weight))
        for x, column in enumerate(columns):
            values = [Signal(signed(8), name=f"value{y}{x}_{lane}") for y in range(CORNER)]
            largest = Signal(signed(8), name=f"largest{x}_{lane}")
            with m.If(self._multiplies & self.maximum):
                for value, operand in zip(values, operands[x::CORNER], strict=True):
                    m.d.comb += value.eq(Mux(operand.used, of_lane(operand.word), -128))
                m.d.comb += largest.eq(_largest(m, f"largest{x}_{lane}", values))
            with m.If(self._multiply & self.maximum):
                m.d.sync += column.eq(largest)

        partial = register("partial", 20)
        with m.If(self._total & ~self.maximum):
            m.d.sync += partial.eq(sum(products))
        largest = Signal(signed(8), name=f"largest_{lane}")
        with m.If(self._totals & self.maximum):
            m.d.comb += largest.eq(_largest(m, f"largest_{lane}", columns))
        with m.If(self._total & self.maximum):
            m.d.sync += partial.eq(largest)

        acc = register("acc", 32)
        with m.If(self._add_up & ~self.maximum):
            m.d.sync += acc.eq(Mux(self._first[2], 0, acc) + partial)
        is_larger = self._first[2] | (partial[:8].as_signed() > acc[:8].as_signed())
        with m.If(self._add_up & self.maximum & is_larger):
            m.d.sync += acc.eq(partial)
        m.d.comb += self.acc[32 * lane :][:32].eq(acc)


def _largest(m: Module, name: str, values: list[Signal]) -> Value:
    """The largest of three signed bytes."""
    a, b, c = values
    ab = Signal(signed(8), name=f"{name}_ab")
    m.d.comb += ab.eq(Mux(a > b, a, b))
    return Mux(ab > c, ab, c)
