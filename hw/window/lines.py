"""The WINDOW engine's reduction data path: line memory, shift window, nine MACs a lane."""

from __future__ import annotations

from typing import NamedTuple

from amaranth.hdl import C, Cat, Module, Mux, Signal, Value, signed
from amaranth.lib import data, memory, wiring
from amaranth.lib.wiring import In, Out

from systole.hw.arithmetic.hints import sum_of_three
from systole.isa import Config
from systole.isa.config import bits_for
from systole.isa.timing import (
    CORNER,
    REDUCE_LATENCY,
    WINDOW_MACS,
    window_part_positions,
)

INDEX_BITS = 12
"""Index of a word in the line memory."""


def pixel_layout() -> data.StructLayout:
    """What to do with a word: ``mac``: reduce ``part`` of the window it completes;
    ``first``/``last`` of an output. Parts but 0 come without a word. By columns, each is a
    ``column`` of the window."""
    return data.StructLayout({"mac": 1, "part": 2, "column": 3, "first": 1, "last": 1})


def weight_layout() -> data.StructLayout:
    """Where a word of weights goes: into the line memory, or, unless ``store``, into the window's
    row ``y``, column ``x``."""
    return data.StructLayout({"store": 1, "y": 3, "x": 3})


FIRST_COLUMN = 4
"""Of the memory of a multiplier's weights, the word that is the first column's; parts are before
it."""


class Operand(NamedTuple):
    """A position of the window: its word, and whether it is used."""

    word: Value
    used: Value


class Multiplier(NamedTuple):
    """What a multiplier works on: a word, its weights, and whether the position is used."""

    word: Value
    weight: Value
    used: Value


def window_positions(config: Config) -> int:
    """Positions of the window in registers: a square, and what a longer column has besides."""
    return config.window_square**2 + config.window_kernel - config.window_square


class WindowReduce(wiring.Component):
    """Reduces words to int32 accumulators (or maxima), ``reduced_lanes`` side by side.

    A word is what these lanes take of a scratchpad word.

    Two ways, by ``fast``:

    * Fast: words come in raster order. A line memory keeps the rows before, a window of
      ``window_square`` squared the last columns; newest word at its last position. Small kernels
      lie in that corner. One output for every word with ``mac`` and the parts that follow it.
    * Fast with ``columns``, for larger kernels: of the window there is only one column, as high as
      ``window_kernel``, with each part another: the newest comes with the word, older ones from the
      line memory.
    * General: a word is one tap; only the last position works, with the tap's weights from the line
      memory (``stored``) or as loaded just before.

    Parts and taps add up from ``first`` to ``last``. Of the window, the positions that ``used``
    marks (bit ``window_square`` * y + x, then the rows by which a column is longer) take part. Each
    multiplier has a small memory of the weights of its positions, a word for each part and each
    column; with ``ones`` they are all 1.

    ``issue`` with ``en`` announces the word of the next ``en`` cycle, a pixel, and the line memory
    is read at its index, ``next_index``. In that cycle ``word`` comes with ``pixel_valid`` or
    ``weight_valid``, and ``index``: a pixel's column in the region's row (fast; by columns, that of
    the region's column that lies in the window's) or its tap (general), or the tap of a weight.
    All in order: a pixel sees the weights that came before it. ``LATENCY`` ``en`` cycles after the
    last word of an output, ``o_valid`` with the accumulators on ``acc``, 32 bits a lane, lane 0
    lowest. While ``en`` is low everything holds still.

    With ``zero_points``, ``weight_zero`` is subtracted from weights as they come.

    In the fast way a row must have two words or more (the line memory is read one ahead).

    The line memory is also lent out, for two scratchpad words: ``kept`` is what it has at the
    ``next_index`` of the last ``issue`` and ``keep`` writes ``held`` to ``index``. No valid must be
    high then.
    """

    LATENCY = REDUCE_LATENCY

    en: Signal
    fast: Signal
    columns: Signal
    maximum: Signal
    stored: Signal
    used: Signal
    ones: Signal
    issue: Signal
    next_index: Signal
    index: Signal
    pixel_valid: Signal
    pixel: data.View
    weight_valid: Signal
    weight: data.View
    weight_zero: Signal
    word: Signal
    kept: Signal
    keep: Signal
    held: Signal
    o_valid: Signal
    acc: Signal

    def __init__(self, config: Config):
        self.config = config
        self._lanes = config.reduced_lanes
        word, lent = 8 * self._lanes, 2 * 8 * config.rows
        positions = window_positions(config)
        zero_points = {"weight_zero": In(signed(8))} if config.zero_points else {}
        super().__init__(
            {
                "en": In(1),
                "fast": In(1),
                "columns": In(1),
                "maximum": In(1),
                "stored": In(1),
                "used": In(positions),
                "ones": In(1),
                "issue": In(1),
                "next_index": In(INDEX_BITS),
                "index": In(INDEX_BITS),
                "pixel_valid": In(1),
                "pixel": In(pixel_layout()),
                "weight_valid": In(1),
                "weight": In(weight_layout()),
                **zero_points,
                "word": In(word),
                "kept": Out(lent),
                "keep": In(1),
                "held": In(lent),
                "o_valid": Out(1),
                "acc": Out(32 * self._lanes),
            }
        )
        size = config.window_square
        self._parts = window_part_positions(size)
        # By row and column; and the rows of a column that are older than the square's.
        self._window = [
            [self._register(f"window_{y}{x}", 8) for x in range(size)] for y in range(size)
        ]
        self._older = [self._register(f"older{y}", 8) for y in range(config.window_kernel - size)]
        self._entering: Value = self.word  # weights less their zero point
        self._stored: Value = C(0)  # those of a tap that the line memory holds
        self._shift = Signal()  # a word enters the line memory and the window
        # The newest words of the rows before at the column at hand, newest row first.
        self._before: list[Value] = []
        # The stages from the second on that have something to do, and those that do it.
        self._has = [Signal(name=f"has{n}") for n in range(2, self.LATENCY + 1)]
        self._does = [Signal(name=f"does{n}") for n in range(2, self.LATENCY + 1)]
        self._first = Signal(self.LATENCY - 1)
        self._last = Signal(self.LATENCY)
        self._part = Signal(range(len(self._parts) + config.window_by_columns))
        # Of the weights' memories, the word for the part or column at hand.
        self._slot = Signal(range(self._slots()))

    def _slots(self, *, has_column: bool = True) -> int:
        """Words of the memory of a multiplier's weights: the parts', then the columns'."""
        if self.config.window_by_columns and has_column:
            return FIRST_COLUMN + self.config.window_kernel
        return len(self._parts)

    def _register(self, name: str, bits: int) -> Signal:
        """A register of a word of lanes of ``bits``."""
        return Signal(bits * self._lanes, name=name, reset_less=True)

    def elaborate(self, platform: object) -> Module:
        m = Module()
        if self.config.zero_points:
            self._subtract_zero(m)
        self._keep_lines(m)
        self._shift_window(m)
        if self.config.window_by_columns:
            self._take_column(m)
        self._advance(m)
        operands = self._choose_operands(m, self._keep_weights(m))
        for lane in range(self._lanes):
            self._reduce_lane(m, lane, operands)
        return m

    def _keep_lines(self, m: Module) -> None:
        """The line memory: rows before, taps' weights, or words lent out."""
        bits, depth = 8 * self._lanes, self.config.window_width
        count = self.config.window_square - 1
        width = max(count * bits, len(self.held))
        lines: memory.Memory = memory.Memory(shape=width, depth=depth, init=[])
        m.submodules.lines = lines
        read, write = lines.read_port(), lines.write_port()
        address = bits_for(depth)
        self._before = [read.data.word_select(y, bits) for y in range(count)]
        stores = self.en & self.weight_valid & self.weight.store
        self._stored = read.data[: len(self._entering)]
        line: Value = Cat(self.word, *self._before[:-1])
        if self.config.zero_points:
            line = Mux(self.fast, line, Cat(self._entering, line[len(self._entering) :]))
        m.d.comb += [
            self._shift.eq(self.en & self.pixel_valid & (self.pixel.part == 0)),
            read.en.eq(self.en & self.issue),
            read.addr.eq(self.next_index[:address]),
            write.en.eq((self.en & self.keep) | Mux(self.fast, self._shift, stores)),
            write.addr.eq(self.index[:address]),
            write.data.eq(Mux(self.keep, self.held, line)),
            self.kept.eq(read.data),
        ]
        if self.config.window_by_columns:
            self._keep_older_lines(m, read.addr, write.addr)

    def _keep_older_lines(self, m: Module, read_addr: Value, write_addr: Value) -> None:
        """The rows that only columns reach, in a memory of their own: others leave it alone."""
        bits, newer = 8 * self._lanes, len(self._before)
        count = self.config.window_lines - newer
        lines: memory.Memory = memory.Memory(
            shape=count * bits, depth=self.config.window_width, init=[]
        )
        m.submodules.older_lines = lines
        read, write = lines.read_port(), lines.write_port()
        self._before += [read.data.word_select(y, bits) for y in range(count)]
        m.d.comb += [
            read.en.eq(self.en & self.issue & self.columns),
            read.addr.eq(read_addr),
            write.en.eq(self._shift & self.columns),
            write.addr.eq(write_addr),
            write.data.eq(Cat(*self._before[newer - 1 : -1])),
        ]

    def _shift_window(self, m: Module) -> None:
        """Stage 1: a new column enters the window."""
        with m.If(self._shift):
            size = self.config.window_square
            column = (*reversed(self._before[: size - 1]), self.word)
            for line, new in zip(self._window, column, strict=True):
                m.d.sync += [a.eq(b) for a, b in zip(line, (*line[1:], new), strict=True)]

    def _subtract_zero(self, m: Module) -> None:
        """Stage 1: the word at hand less the zero point."""
        bits = self.config.operand_bits
        self._entering = Signal(bits * self._lanes, name="entering")
        for lane in range(self._lanes):
            weight = self.word.word_select(lane, 8).as_signed()
            m.d.comb += self._entering.word_select(lane, bits).eq(weight - self.weight_zero)

    def _keep_weights(self, m: Module) -> list[Value]:
        """Stage 1: weights enter their multiplier's memory, those that are stored with the word of
        their tap. Stage 2: what each multiplier has for the part or column at hand."""
        loads = self.en & self.weight_valid & ~self.weight.store
        slot, takes = self._place_of_weight()
        newest = self.config.window_square - 1
        kept = []
        for n, multiplier in enumerate(takes):
            # The general way's only position.
            taps = n == self._parts[0].index((newest, newest))
            stored = self.stored if taps else C(0)
            new = Mux(stored, self._stored, self._entering) if taps else self._entering
            enters = (loads & multiplier) | (stored & self._shift)
            depth = self._slots(has_column=n in self._column_multipliers())
            if depth == 1:
                weight: Value = self._register(f"kept_weight{n}", self.config.operand_bits)
                with m.If(enters):
                    m.d.sync += weight.eq(new)
            else:
                weights: memory.Memory = memory.Memory(shape=len(new), depth=depth, init=[])
                m.submodules[f"weights{n}"] = weights
                read, write = weights.read_port(domain="comb"), weights.write_port()
                m.d.comb += [
                    read.addr.eq(self._slot),
                    write.en.eq(enters),
                    write.addr.eq(Mux(stored, 0, slot)),
                    write.data.eq(new),
                ]
                weight = read.data
            kept.append(weight)
        return kept

    def _place_of_weight(self) -> tuple[Value, list[Value]]:
        """The word in which a weight is kept, and a bit for each multiplier: the weight is its."""
        # A kernel's place is counted in the largest window.
        outside = self.config.window_kernel - self.config.window_square
        y_is, x_is = (
            [coordinate == n for n in range(self.config.window_kernel)]
            for coordinate in (self.weight.y, self.weight.x)
        )
        places = [
            [y_is[y + outside] & x_is[x + outside] for y, x in positions]
            for positions in self._parts
        ]
        slot: Value = Cat(*(Cat(*places[n]).any() for n in range(1, len(places))))
        takes = [
            Cat(*(place[n] for place in places if n < len(place))).any() for n in range(WINDOW_MACS)
        ]
        if self.config.window_by_columns:
            slot = Mux(self.columns, FIRST_COLUMN + self.weight.x, slot)
            rows = self._column_multipliers()
            takes = [
                Mux(self.columns, y_is[rows[n]] if n in rows else 0, take)
                for n, take in enumerate(takes)
            ]
        return slot, takes

    def _column_multipliers(self) -> dict[int, int]:
        """The multipliers of a column's positions, and the row of each, oldest first.

        Its newer rows and those of the corner share multipliers. The corner's other positions are
        not used then, and take the other rows' place or keep theirs."""
        if not self.config.window_by_columns:
            return {}
        height, size = self.config.window_kernel, self.config.window_square
        older = iter(range(height - CORNER))
        rows = {}
        for n, (y, x) in enumerate(self._parts[0]):
            row = y + height - size if x == size - 1 else next(older, None)
            if row is not None:
                rows[n] = row
        return rows

    def _column_positions(self) -> list[Operand]:
        """The positions of a column, oldest row first."""
        size = self.config.window_square
        newer = [
            Operand(line[-1], self.used[size * y + size - 1]) for y, line in enumerate(self._window)
        ]
        older = zip(self._older, self.used[size**2 :], strict=True)
        return [*(Operand(*each) for each in older), *newer]

    def _take_column(self, m: Module) -> None:
        """Stage 1: a column takes the place of the one before."""
        newest = self.pixel.part == 0
        lines = [
            Mux(newest, new, line)
            for new, line in zip((self.word, *self._before), self._before, strict=False)
        ]
        with m.If(self.en & self.columns & self.pixel_valid):
            for position, line in zip(self._column_positions(), reversed(lines), strict=True):
                m.d.sync += position.word.eq(line)

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
                self._slot.eq(self.pixel.part),
            ]
            if self.config.window_by_columns:
                with m.If(self.columns):
                    m.d.sync += [
                        self._part.eq(len(self._parts)),
                        self._slot.eq(FIRST_COLUMN + self.pixel.column),
                    ]
        m.d.comb += [
            self.o_valid.eq(valid[-1]),
            *(has.eq(v) for has, v in zip(self._has, valid[:-1], strict=True)),
            *(does.eq(self.en & v) for does, v in zip(self._does, valid[:-1], strict=True)),
        ]

    def _choose_operands(self, m: Module, weights: list[Value]) -> list[Multiplier]:
        """Stage 2: the positions of the part at hand, and their weights. Multipliers that none is
        left for are not used. What is chosen goes through registers: the choice has too many loads
        to lie in one path with the multipliers."""
        bits, lane_bits = 8 * self._lanes, self.config.operand_bits
        parts = self._positions_of_parts()
        multipliers = []
        for n, kept in enumerate(weights):
            word = Signal(bits, name=f"operand{n}", reset_less=True)
            weight = Signal(len(kept), name=f"weight{n}", reset_less=True)
            takes, used = Signal(name=f"takes{n}"), Signal(name=f"uses{n}")
            with m.If(self._does[0]), m.Switch(self._part):
                for part, positions in enumerate(parts):
                    with m.Case(part):
                        unused = Operand(word, C(0))
                        chosen = positions[n] if n < len(positions) else unused
                        m.d.sync += word.eq(chosen.word)
                        m.d.comb += used.eq(chosen.used)
            one = Cat(used, *([0] * (lane_bits - 1))).replicate(self._lanes)
            with m.If(self._does[0]):
                m.d.sync += [
                    weight.eq(Mux(self.ones, one, Mux(used, kept, 0))),
                    takes.eq(used),
                ]
            multipliers.append(Multiplier(word, weight, takes))
        return multipliers

    def _positions_of_parts(self) -> list[list[Operand]]:
        """The positions of every part, one for each multiplier; the last is a column."""
        size = self.config.window_square
        parts = [
            [Operand(self._window[y][x], self.used[size * y + x]) for y, x in positions]
            for positions in self._parts
        ]
        if self.config.window_by_columns:
            column, rows = self._column_positions(), self._column_multipliers()
            parts.append(
                [column[rows[n]] if n in rows else position for n, position in enumerate(parts[0])]
            )
        return parts

    def _reduce_lane(self, m: Module, lane: int, operands: list[Multiplier]) -> None:
        """Stages 3 to 6 of a lane."""
        acc = Signal(signed(32), name=f"acc_{lane}", reset_less=True)
        # The parts' sums or maxima.
        partial = Signal(signed(20), name=f"partial_{lane}", reset_less=True)
        self._sum_products(m, lane, operands, partial)
        self._find_maximum(m, lane, operands, partial)
        with m.If(self._does[4] & ~self.maximum):
            m.d.sync += acc.eq(Mux(self._first[-1], 0, acc) + partial)
        is_larger = self._first[-1] | (partial[:8].as_signed() > acc[:8].as_signed())
        with m.If(self._does[4] & self.maximum & is_larger):
            m.d.sync += acc.eq(partial)
        m.d.comb += self.acc[32 * lane :][:32].eq(acc)

    def _sum_products(
        self, m: Module, lane: int, operands: list[Multiplier], partial: Signal
    ) -> None:
        """Stages 3 to 5: products, sums of every three, their sum. 16 bits hold the products of
        weights of 9 bits, too: these are no less than -255."""
        bits = self.config.operand_bits

        def register(name: str, bits: int) -> Signal:
            return Signal(signed(bits), name=f"{name}_{lane}", reset_less=True)

        products = [register(f"product{n}", 16) for n in range(WINDOW_MACS)]
        sums = [register(f"sum{n}", 18) for n in range(0, WINDOW_MACS, 3)]
        threes = [
            sum_of_three(m, f"pair{n}_{lane}", *products[3 * n : 3 * n + 3])
            for n in range(len(sums))
        ]
        total = sum_of_three(m, f"pair_{lane}", *sums)
        with m.If(self._does[1] & ~self.maximum):
            for product, operand in zip(products, operands, strict=True):
                a = operand.word.word_select(lane, 8).as_signed()
                b = operand.weight.word_select(lane, bits).as_signed()
                m.d.sync += product.eq(a * b)
        with m.If(self._does[2] & ~self.maximum):
            m.d.sync += [total.eq(three) for total, three in zip(sums, threes, strict=True)]
        with m.If(self._does[3] & ~self.maximum):
            m.d.sync += partial.eq(total)

    def _find_maximum(
        self, m: Module, lane: int, operands: list[Multiplier], partial: Signal
    ) -> None:
        """Stages 3 to 5: maxima of pairs, of pairs of these, of all."""
        values: list[Signal] = []
        with m.If(self._has[1] & self.maximum):
            for n, operand in enumerate(operands):
                value = Signal(signed(8), name=f"value{n}_{lane}")
                m.d.comb += value.eq(
                    Mux(operand.used, operand.word.word_select(lane, 8).as_signed(), -128)
                )
                values.append(value)
        # Halved once in each of the first two stages; three are left to the third.
        for stage in (1, 2):
            name = f"stage{stage + 2}_largest{{}}_{lane}"
            largest = self._halve(m, name, values, self._has[stage])
            values = [Signal.like(v, name=f"{v.name}_kept", reset_less=True) for v in largest]
            with m.If(self._does[stage] & self.maximum):
                m.d.sync += [kept.eq(v) for kept, v in zip(values, largest, strict=True)]
        a, b, c = values
        found = Signal(signed(8), name=f"stage5_largest_{lane}")
        with m.If(self._has[3] & self.maximum):
            # Side by side: two comparisons behind each other would be the engine's longest path.
            a_over_b, a_over_c, b_over_c = a > b, a > c, b > c
            m.d.comb += found.eq(Mux(a_over_b, Mux(a_over_c, a, c), Mux(b_over_c, b, c)))
        with m.If(self._does[3] & self.maximum):
            m.d.sync += partial.eq(found)

    def _halve(self, m: Module, name: str, values: list[Signal], active: Signal) -> list[Signal]:
        """The larger of every two; an odd one is left as it is."""
        out = []
        with m.If(active & self.maximum):
            for n, (a, b) in enumerate(zip(values[::2], values[1::2], strict=False)):
                larger = Signal(signed(8), name=name.format(n))
                m.d.comb += larger.eq(Mux(a > b, a, b))
                out.append(larger)
        return out + ([values[-1]] if len(values) % 2 else [])
