"""The WINDOW engine's reduction data path: line memory, shift window, nine MACs a lane."""

from __future__ import annotations

from typing import NamedTuple

from amaranth.hdl import Cat, Module, Mux, Signal, Value, signed
from amaranth.lib import data, memory, wiring
from amaranth.lib.wiring import In, Out

from systole.isa import Config
from systole.isa.config import bits_for
from systole.isa.timing import REDUCE_LATENCY, WINDOW_MACS, window_part_positions

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
    All in order: a pixel sees the weights that came before it. ``LATENCY`` ``en`` cycles after the
    last word of an output, ``o_valid`` with the accumulators on ``acc``, 32 bits a lane, lane 0
    lowest. While ``en`` is low everything holds still.

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
        # The stages from the second on that have something to do, and those that do it.
        self._has = [Signal(name=f"has{n}") for n in range(2, self.LATENCY + 1)]
        self._does = [Signal(name=f"does{n}") for n in range(2, self.LATENCY + 1)]
        self._first = Signal(self.LATENCY - 1)
        self._last = Signal(self.LATENCY)
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
                    Cat(self.pixel_valid & self.pixel.mac, valid[:-2], valid[-2] & self._last[-2])
                ),
                self._first.eq(Cat(self.pixel.first, self._first)),
                self._last.eq(Cat(self.pixel.last, self._last)),
                self._part.eq(self.pixel.part),
            ]
        m.d.comb += [
            self.o_valid.eq(valid[-1]),
            *(has.eq(v) for has, v in zip(self._has, valid[:-1], strict=True)),
            *(does.eq(self.en & v) for does, v in zip(self._does, valid[:-1], strict=True)),
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
        """Stages 2 to 5 of a lane."""
        acc = Signal(signed(32), name=f"acc_{lane}", reset_less=True)
        # The parts' sums or maxima.
        partial = Signal(signed(20), name=f"partial_{lane}", reset_less=True)
        self._sum_products(m, lane, operands, partial)
        self._find_maximum(m, lane, operands, partial)
        with m.If(self._does[3] & ~self.maximum):
            m.d.sync += acc.eq(Mux(self._first[-1], 0, acc) + partial)
        is_larger = self._first[-1] | (partial[:8].as_signed() > acc[:8].as_signed())
        with m.If(self._does[3] & self.maximum & is_larger):
            m.d.sync += acc.eq(partial)
        m.d.comb += self.acc[32 * lane :][:32].eq(acc)

    def _sum_products(self, m: Module, lane: int, operands: list[Operand], partial: Signal) -> None:
        """Stages 2 to 4: products, sums of every three, their sum."""

        def register(name: str, bits: int) -> Signal:
            return Signal(signed(bits), name=f"{name}_{lane}", reset_less=True)

        products = [register(f"product{n}", 16) for n in range(WINDOW_MACS)]
        sums = [register(f"sum{n}", 18) for n in range(0, WINDOW_MACS, 3)]
        with m.If(self._does[0] & ~self.maximum):
            for product, operand in zip(products, operands, strict=True):
                a, b = (v.word_select(lane, 8).as_signed() for v in (operand.word, operand.weight))
                m.d.sync += product.eq(a * b)
        with m.If(self._does[1] & ~self.maximum):
            for n, total in enumerate(sums):
                m.d.sync += total.eq(sum(products[3 * n : 3 * n + 3]))
        with m.If(self._does[2] & ~self.maximum):
            m.d.sync += partial.eq(sum(sums))

    def _find_maximum(self, m: Module, lane: int, operands: list[Operand], partial: Signal) -> None:
        """Stages 2 to 4: maxima of pairs, of pairs of these, of all."""
        values: list[Signal] = []
        with m.If(self._has[0] & self.maximum):
            for n, operand in enumerate(operands):
                value = Signal(signed(8), name=f"value{n}_{lane}")
                m.d.comb += value.eq(
                    Mux(operand.used, operand.word.word_select(lane, 8).as_signed(), -128)
                )
                values.append(value)
        # Halved once in each of the first two stages; the third does what is left.
        for stage in range(2):
            name = f"stage{stage + 2}_largest{{}}_{lane}"
            largest = self._halve(m, name, values, self._has[stage])
            values = [Signal.like(v, name=f"{v.name}_kept", reset_less=True) for v in largest]
            with m.If(self._does[stage] & self.maximum):
                m.d.sync += [kept.eq(v) for kept, v in zip(values, largest, strict=True)]
        while len(values) > 1:
            name = f"stage4_of{len(values)}_largest{{}}_{lane}"
            values = self._halve(m, name, values, self._has[2])
        with m.If(self._does[2] & self.maximum):
            m.d.sync += partial.eq(values[0])

    def _halve(self, m: Module, name: str, values: list[Signal], active: Signal) -> list[Signal]:
        """The larger of every two; an odd one is left as it is."""
        out = []
        with m.If(active & self.maximum):
            for n, (a, b) in enumerate(zip(values[::2], values[1::2], strict=False)):
                larger = Signal(signed(8), name=name.format(n))
                m.d.comb += larger.eq(Mux(a > b, a, b))
                out.append(larger)
        return out + ([values[-1]] if len(values) % 2 else [])
