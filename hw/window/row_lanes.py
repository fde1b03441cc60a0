"""The data path of WINDOW's row operations: from words to the numbers of rows, and to what is
requantised."""

from __future__ import annotations

import operator
from collections.abc import Callable

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, signed
from amaranth.lib import data, memory, wiring
from amaranth.lib.memory import ReadPort, WritePort
from amaranth.lib.wiring import In, Out

from systole.hw.bus.interfaces import command_layout, layout_of
from systole.hw.window.row_scalar import (
    DIGIT,
    DROPPED,
    EARLY_BITS,
    LATE_BITS,
    OFFSET_BITS,
    SHIFT_BITS,
    TOTAL_BITS,
    RowScalar,
)
from systole.hw.window.rows import RowKind, kept_words, row_layout
from systole.isa import Config, Opcode, WindowOp
from systole.isa.commands import ROW_POSITIONS, TABLE_BYTES
from systole.isa.config import bits_for
from systole.isa.numerics import MULTIPLIER_BITS
from systole.isa.params import CHANNEL_FLAGS, NORMALISE_PARAMS, SOFTMAX_PARAMS
from systole.isa.rows import COARSE_BITS, EXP_BITS, NORMAL_WIDTH, SUM_BITS
from systole.isa.timing import ROW_LATENCY, ROW_TREE_LEVELS

_ELEMENT = 9
"""Bits of an element less a zero point."""
_SQUARE = 16
"""Bits of its square."""


class RowLanes(wiring.Component):
    """Carries out the tokens of :class:`~hw.window.rows.RowSequencer`, one a cycle.

    A token (``row``) is at hand with ``valid``: with it ``word`` and, of that, the ``channels`` of
    the pass. Two stages before, ``took`` says that it is taken (``taken_row``); in the next,
    ``moves`` that it becomes the one at hand. While ``en`` is low everything but the rows' numbers
    holds still.

    * Parameters and table entries are kept as they come; a mask for the next token.
    * Largest elements and sums go through trees and are added up to those of a row, whose numbers
      are written to a memory of ``ROW_POSITIONS`` entries as :class:`RowScalar` finds them.
      ``taken``: of the row whose last token came; so long no last token of another may come.
      ``complete``: all numbers of this pass are written.
    * In the last pass, ``o_valid`` with ``acc``, ``LATENCY`` cycles after the token: SOFTMAX's
      entries, NORMALISE's normal numbers with the channel's sign and precision (``flags``, as
      loaded when ``load_flags`` was high two cycles before). ``row_load`` is high a cycle before
      SOFTMAX's; ``multiplier`` and the parts of ``shift`` are there when
      :class:`~hw.arithmetic.requantise.Requantise` takes them.

    A lane has a multiplier of 9 by 18 bits, which squares an element, or multiplies it by one of
    the two digits of the row's factor; and a memory of its own for the table.

    Stages: element less the zero point, or the row's largest; product; entry of the table, or
    normal number.
    """

    LATENCY = ROW_LATENCY

    cmd: data.View
    en: Signal
    took: Signal
    taken_row: data.View
    moves: Signal
    valid: Signal
    row: data.View
    word: Signal
    channels: Signal
    flags: Signal
    load_flags: Signal
    o_valid: Signal
    acc: Signal
    row_load: Signal
    multiplier: Signal
    shift: Signal
    taken: Signal
    complete: Signal

    def __init__(self, config: Config):
        self.config = config
        lanes = self._lanes = config.reduced_lanes
        super().__init__(
            {
                "cmd": In(command_layout(Opcode.WINDOW)),
                "en": In(1),
                "took": In(1),
                "taken_row": In(row_layout(config)),
                "moves": In(1),
                "valid": In(1),
                "row": In(row_layout(config)),
                "word": In(8 * config.rows),
                "channels": In(8 * lanes),
                "flags": In(len(CHANNEL_FLAGS) * lanes),
                "load_flags": In(1),
                "o_valid": Out(1),
                "acc": Out(32 * lanes),
                "row_load": Out(1),
                "multiplier": Out(MULTIPLIER_BITS),
                "shift": Out(SHIFT_BITS),
                "taken": Out(1),
                "complete": Out(1),
            }
        )
        self._softmax = Signal()
        self._scalar = RowScalar()
        # Of the row's position: as the token at hand needs them, and two stages later.
        self._early = Signal(EARLY_BITS, reset_less=True)
        self._late = Signal(LATE_BITS, reset_less=True)
        # What comes of lanes, one stage after the other.
        self._biased: list[Value] = []
        self._leaves: list[Value] = []
        # Bits of the squares' sum in a word's sum; above it is the elements' own.
        self._squares = _SQUARE + (lanes - 1).bit_length()
        # The largest element of a row, and its sums, as far as they are.
        self._largest = Signal(8, reset_less=True)
        self._has_largest, self._has_sums = Signal(), Signal()
        self._sums = Signal(SUM_BITS, reset_less=True)
        self._total = Signal(signed(TOTAL_BITS), reset_less=True)

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.scalar = self._scalar
        m.d.comb += self._softmax.eq(self.cmd.op == WindowOp.SOFTMAX)
        self._keep_parameters(m)
        self._keep_numbers(m)
        entry = self._table_entry(m)
        counts = self._lanes_that_count(m)
        digit = Mux(self.row.kind == RowKind.HIGH, self._early[DIGIT:], self._early[:DIGIT])
        digit = Mux(self._softmax, 0, digit).as_signed()
        high, _ = self._kinds(m, RowKind.HIGH, 2)
        looks_up = Signal()
        summed, out = (self._kinds(m, kind, 1)[0][1] for kind in (RowKind.SUM, RowKind.OUT))
        m.d.comb += looks_up.eq(self.en & self._softmax & (summed | out))
        for i in range(self._lanes):
            lane = _RowLane(m, self, i)
            lane.find_element(counts[i], digit)
            lane.multiply()
            lane.look_up(looks_up, *entry)
            lane.find_normal(Mux(self._softmax, 0, self._late), high[2] | self._softmax)
            lane.show()
        self._reduce(m)
        self._finish_words(m)
        return m

    def _kinds(self, m: Module, kind: RowKind, stages: int) -> tuple[list[Signal], list[Signal]]:
        """Whether the token at hand, and in each of so many later stages, is of a kind; and that
        and its position's last."""
        is_kind, is_last = (
            [Signal(name=f"{kind.name.lower()}{n}_{i}") for i in range(stages + 1)]
            for n in ("", "_last")
        )
        m.d.comb += [
            is_kind[0].eq(self.valid & (self.row.kind == kind)),
            is_last[0].eq(self.row.last),
        ]
        with m.If(self.en):
            for flags in (is_kind, is_last):
                m.d.sync += [b.eq(a) for a, b in zip(flags, flags[1:])]
        return is_kind, is_last

    # Parameters ----------------------------------------------------------------------------------

    def _keep_parameters(self, m: Module) -> None:
        """The command's own parameters."""
        count, word, scalar = kept_words(self.config), len(self.word), self._scalar
        layouts = [layout_of(fields) for fields in (SOFTMAX_PARAMS, NORMALISE_PARAMS)]
        own = Signal(count * word if count > 1 else layouts[1].size, reset_less=True)
        with m.If(self.en & self.valid & (self.row.kind == RowKind.OWN)):
            m.d.sync += own.eq(Cat(own[word:], self.word) if count > 1 else self.word)
        softmax, normalise = (data.View(layout, own[: layout.size]) for layout in layouts)
        m.d.comb += [
            scalar.softmax.eq(self._softmax),
            scalar.features.eq(self.cmd.features),
            scalar.epsilon.eq(normalise.epsilon),
            scalar.numerator.eq(softmax.numerator),
            scalar.own_shift.eq(softmax.shift),
        ]
        # The sums of a row, from when they are complete until the next row's are.
        held_sums = Signal(SUM_BITS, reset_less=True)
        held_total = Signal(signed(TOTAL_BITS), reset_less=True)
        with m.If(self._has_sums):
            m.d.sync += [
                held_sums.eq(self._sums),
                held_total.eq(Mux(normalise.centred, self._total, 0)),
            ]
        m.d.sync += scalar.valid.eq(self._has_sums)
        m.d.comb += [
            scalar.sums.eq(held_sums),
            scalar.total.eq(held_total),
            self.taken.eq(scalar.taken),
        ]

    def _table_entry(self, m: Module) -> tuple[Signal, Signal, Signal]:
        """A new entry of the table: whether there is one, its place, its value. The entry for
        elements ``d`` below the largest is at ``-d``."""
        rows, word = self.config.rows, self.word
        comes = Signal()
        place = Signal(range(TABLE_BYTES))
        value = Signal(EXP_BITS, reset_less=True)
        last = EXP_BITS // 8 - 1  # byte of an entry
        before = Signal(8 * last, reset_less=True)
        stream = Cat(before, word)
        arrives = self.en & self.valid & (self.row.kind == RowKind.ENTRY)
        m.d.sync += comes.eq(arrives)
        with m.If(arrives):
            if rows % 4:
                m.d.sync += before.eq(word[-len(before) :])
            with m.Switch(self.row.at):
                for at in sorted({(4 * i + last) % rows for i in range(rows)}):
                    with m.Case(at):
                        m.d.sync += value.eq(stream[8 * at :][:EXP_BITS])
        with m.If(comes):
            m.d.sync += place.eq(place - 1)
        return comes, place, value

    def _lanes_that_count(self, m: Module) -> list[Value]:
        """Of the token at hand."""
        mask = Signal(self._lanes)
        signs = Cat(self.channels[8 * i + 7] for i in range(self._lanes))
        with m.If(self.en & self.valid):
            m.d.sync += mask.eq(Mux(self.row.kind == RowKind.MASK, signs, 0))
        return [(self.row.limit > i) & ~mask[i] for i in range(self._lanes)]

    # Rows' numbers -------------------------------------------------------------------------------

    def _keep_numbers(self, m: Module) -> None:
        """The memories of every position's numbers. They are written in the order of positions, and
        read in it once in every pass."""
        scalar, softmax = self._scalar, self._softmax
        last = (self.cmd.out_w - 1)[: bits_for(ROW_POSITIONS)]
        writes = Signal()
        m.d.comb += writes.eq(self._has_largest | scalar.o_valid)
        number = _counter(m, "written", writes, last)
        m.d.comb += self.complete.eq(writes & (number == last))
        early_write, early_read = self._numbers(m, "early", EARLY_BITS)
        late_write, late_read = self._numbers(m, "late", LATE_BITS)
        largest = Cat(self._largest[:-1], ~self._largest[-1])
        out, _ = self._kinds(m, RowKind.OUT, 3)
        high, _ = self._kinds(m, RowKind.HIGH, 0)
        kind = self.taken_row.kind
        has_early = Mux(
            softmax, (kind == RowKind.SUM) | (kind == RowKind.OUT), kind == RowKind.HIGH
        )
        m.d.comb += [
            early_write.en.eq(Mux(softmax, self._has_largest, scalar.o_valid)),
            early_write.addr.eq(number),
            early_write.data.eq(Mux(softmax, largest, scalar.early)),
            late_write.en.eq(scalar.o_valid),
            late_write.addr.eq(number),
            late_write.data.eq(scalar.late),
            early_read.en.eq(self.took & has_early),
            early_read.addr.eq(_counter(m, "early", self.took & self.taken_row.last, last)),
            late_read.en.eq(self.en & Mux(softmax, out[3], high[0])),
            late_read.addr.eq(_counter(m, "late", self.en & Mux(softmax, out[3], out[0]), last)),
        ]
        with m.If(self.moves):
            m.d.sync += self._early.eq(early_read.data)
        shift = [Signal(SHIFT_BITS, name=f"shift{i}") for i in range(1, 4)]
        multiplier, new_shift = self._late[:MULTIPLIER_BITS], self._late[MULTIPLIER_BITS:]
        with m.If(self.en):
            m.d.sync += self._late.eq(late_read.data)
            m.d.sync += [b.eq(a) for a, b in zip((new_shift[:SHIFT_BITS], *shift), shift)]
        fine = 3
        m.d.comb += [
            self.multiplier.eq(multiplier),
            self.shift.eq(Cat(shift[2][:fine], shift[1][fine:])),
        ]

    def _numbers(self, m: Module, name: str, bits: int) -> tuple[WritePort, ReadPort]:
        """A memory of numbers of every position; nothing is read that is written meanwhile."""
        numbers: memory.Memory = memory.Memory(shape=bits, depth=ROW_POSITIONS, init=[])
        m.submodules[f"{name}_numbers"] = numbers
        return numbers.write_port(), numbers.read_port()

    # Reduction -----------------------------------------------------------------------------------

    def _reduce(self, m: Module) -> None:
        """The largest element and the sums of a row."""
        # Whether lanes count is found in front of the first level.
        found, stages = self._tree(m, "largest", self._biased, _larger, first=1)
        comes, last = self._kinds(m, RowKind.LARGEST, stages)
        first = Signal(init=1)
        m.d.sync += self._has_largest.eq(self.en & comes[-1] & last[-1])
        with m.If(self.en & comes[-1]):
            m.d.sync += [
                self._largest.eq(Mux(first, found, _larger(found, self._largest))),
                first.eq(last[-1]),
            ]
        self._add_up(m)

    def _add_up(self, m: Module) -> None:
        """The sums of a row."""
        softmax, squares = self._softmax, self._squares
        levels = (self._lanes - 1).bit_length()
        found, stages = self._tree(m, "sums", self._leaves, operator.add)
        comes, last = self._kinds(m, RowKind.SUM, stages + 3)
        now, ends = (Mux(softmax, flags[-1], flags[-2]) for flags in (comes, last))
        first = Signal(init=1)
        m.d.sync += self._has_sums.eq(self.en & now & ends)
        exponentials = found[: EXP_BITS + levels]
        with m.If(self.en & now):
            m.d.sync += [
                self._sums.eq(
                    Mux(first, 0, self._sums) + Mux(softmax, exponentials, found[:squares])
                ),
                self._total.eq(Mux(first, 0, self._total) + found[squares:].as_signed()),
                first.eq(ends),
            ]

    def _tree(
        self,
        m: Module,
        name: str,
        values: list[Value],
        join: Callable[[Value, Value], Value],
        first: int = ROW_TREE_LEVELS,
    ) -> tuple[Value, int]:
        """All values joined, and the stages that this takes: registers after the ``first`` levels,
        then after every ``ROW_TREE_LEVELS``."""
        stage = 0
        while len(values) > 1:
            for _ in range(ROW_TREE_LEVELS if stage else first):
                odd = values[len(values) & ~1 :]
                values = [join(a, b) for a, b in zip(values[::2], values[1::2])] + odd
            registers: list[Value] = [
                Signal(v.shape(), name=f"{name}{stage}_{i}", reset_less=True)
                for i, v in enumerate(values)
            ]
            with m.If(self.en):
                m.d.sync += [r.eq(v) for r, v in zip(registers, values)]
            values, stage = registers, stage + 1
        return values[0], stage

    def _finish_words(self, m: Module) -> None:
        """The words that go to the requantisation."""
        out, _ = self._kinds(m, RowKind.OUT, self.LATENCY)
        m.d.comb += [
            self.o_valid.eq(out[-1]),
            self.row_load.eq(out[-2] & self._softmax),
        ]


class _RowLane:
    """The number path of a lane, a method for each stage."""

    def __init__(self, m: Module, rows: RowLanes, index: int):
        self.m, self.rows, self.index = m, rows, index
        self.element, self.later_element = (
            Signal(signed(_ELEMENT), name=f"{n}_{index}", reset_less=True)
            for n in ("element", "later_element")
        )
        self.factor = Signal(signed(DIGIT), name=f"factor_{index}", reset_less=True)
        self.product = Signal(signed(_ELEMENT + DIGIT), name=f"product_{index}", reset_less=True)
        # Whether there is an entry, in this stage and the next.
        self.counts = Signal(2, name=f"counts_{index}")
        self.entry = Signal(EXP_BITS, name=f"entry_{index}", reset_less=True)
        self.upper = Signal(OFFSET_BITS - DIGIT, name=f"upper_{index}", reset_less=True)
        self.normal = Signal(signed(NORMAL_WIDTH), name=f"normal_{index}", reset_less=True)
        self.negate, self.coarse = (
            Signal(name=f"{n}_{index}", reset_less=True) for n in ("negate", "coarse")
        )

    def find_element(self, counts: Value, digit: Value) -> None:
        """1: the element less the zero point (SOFTMAX: the row's largest), and its factor."""
        m, rows = self.m, self.rows
        given = rows.channels[8 * self.index :][:8]
        base = Mux(rows._softmax, rows._early[:8].as_signed(), rows.cmd.pad)
        element = Signal(signed(_ELEMENT), name=f"found_{self.index}")
        m.d.comb += element.eq(Mux(counts, given.as_signed() - base, 0))
        with m.If(rows.en):
            m.d.sync += [
                self.element.eq(element),
                self.factor.eq(
                    Mux((rows.row.kind == RowKind.SUM) & ~rows._softmax, element, digit)
                ),
                self.counts.eq(Cat(counts & rows._softmax, self.counts[0])),
            ]
        biased = Cat(given[:7], ~given[7])
        rows._biased.append(biased & counts.replicate(8))

    def multiply(self) -> None:
        """2: product."""
        m = self.m
        with m.If(self.rows.en):
            m.d.sync += [
                self.product.eq(self.element * self.factor),
                self.later_element.eq(self.element),
            ]

    def look_up(self, looks_up: Signal, comes: Signal, place: Signal, value: Signal) -> None:
        """2 and 3: the table's entry; none where the lane does not count. And what a word of the
        row adds to its sums: that, or (a stage before) square and element."""
        m, rows = self.m, self.rows
        table: memory.Memory = memory.Memory(shape=EXP_BITS, depth=TABLE_BYTES, init=[])
        m.submodules[f"table_{self.index}"] = table
        write, read = table.write_port(), table.read_port()
        m.d.comb += [
            write.en.eq(comes),
            write.addr.eq(place),
            write.data.eq(value),
            read.en.eq(looks_up),
            read.addr.eq(self.element[:8]),
        ]
        with m.If(rows.en):
            m.d.sync += self.entry.eq(Mux(self.counts[1], read.data, 0))
        element = Mux(rows._softmax, 0, self.later_element)[:_ELEMENT]
        both = Cat(self.product[:_SQUARE], Const(0, rows._squares - _SQUARE), element)
        rows._leaves.append((self.entry | both).as_signed())

    def find_normal(self, late: Value, is_high: Value) -> None:
        """3: the product with the upper digit; then, with the lower one, the normal number, and
        what the channel's sign and precision add. 0 for SOFTMAX, all of whose products count as
        upper ones."""
        m, rows = self.m, self.rows
        with m.If(rows.en & is_high):
            m.d.sync += self.upper.eq(late[DIGIT:] - self.product[: len(self.upper)])
        flags = rows.flags[len(CHANNEL_FLAGS) * self.index :][: len(CHANNEL_FLAGS)]
        with m.If(rows.en & rows.load_flags):
            m.d.sync += Cat(self.negate, self.coarse).eq(flags)
        whole = Signal(OFFSET_BITS, name=f"whole_{self.index}")
        m.d.comb += whole.eq(Cat(late[:DIGIT], self.upper) + self.product)
        sign = self.negate.replicate(NORMAL_WIDTH)
        half = Cat(self.negate, Const(0, COARSE_BITS - 2), self.coarse)
        with m.If(rows.en):
            m.d.sync += self.normal.eq((whole[DROPPED:] ^ sign) + half)

    def show(self) -> None:
        """The entry, or the normal number in the channel's precision."""
        rows = self.rows
        normal = Mux(self.coarse, self.normal >> COARSE_BITS, self.normal)
        acc = rows.acc[32 * self.index :][:32]
        self.m.d.comb += acc.eq(normal | self.entry)


def _larger(a: Value, b: Value) -> Value:
    return Mux(a > b, a, b)


def _counter(m: Module, name: str, step: Value, last: Value) -> Signal:
    """Counts from 0 to ``last``, then again."""
    count = Signal(len(last), name=f"{name}_position")
    with m.If(step):
        m.d.sync += count.eq(Mux(count == last, 0, count + 1))
    return count
