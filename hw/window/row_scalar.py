"""The few numbers of a row, from its sums: the serial arithmetic of WINDOW's row operations."""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, signed
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from systole.isa.commands import MAX_FEATURES
from systole.isa.numerics import MAX_SHIFT, MULTIPLIER_BITS
from systole.isa.params import REQUANT_PARAMS
from systole.isa.rows import (
    EPSILON_BITS,
    FACTOR_BITS,
    MAX_FACTOR,
    NORMAL_BITS,
    NORMAL_WIDTH,
    QUOTIENT_BITS,
    ROOT_BITS,
    SUM_BITS,
    VARIANCE_BITS,
)
from systole.isa.timing import ROW_MULTIPLIER_BITS as BITS
from systole.isa.timing import ROW_QUOTIENT_BITS

FEATURES_BITS = MAX_FEATURES.bit_length()
TOTAL_BITS = 1 + (255 * MAX_FEATURES).bit_length()
"""Of the signed sum of a row's elements, each less its zero point."""
SQUARES_BITS = (255 * 255 * MAX_FEATURES).bit_length()
"""Of the sum of their squares."""
DIGIT = 18
"""Bits of each of the two signed digits of a factor: what multipliers in FPGAs take."""
DROPPED = FACTOR_BITS - NORMAL_BITS
OFFSET_BITS = NORMAL_WIDTH + DROPPED
"""Of the offset, and of all sums up to the normal number."""
SHIFT_BITS = next(f.bits for f in REQUANT_PARAMS if f.name == "shift")
EARLY_BITS = 2 * DIGIT
"""Numbers that the elements meet first: the factor's digits; or the row's largest element."""
LATE_BITS = OFFSET_BITS
"""Numbers that they meet later: the offset, negative; or multiplier and shift of the row."""

_INVERSE = ROOT_BITS + 1
_MAGNITUDE = TOTAL_BITS - 1
_PAIRS = VARIANCE_BITS // 2
_RAISED = FACTOR_BITS + EPSILON_BITS // 2 - ROOT_BITS
"""Bits by which the products are to the left of where the least shift has them."""


class RowScalar(wiring.Component):
    """Finds the numbers of each row of SOFTMAX and NORMALISE as :mod:`systole.isa.rows` has them.

    A row comes with a pulse of ``valid``; ``sums`` (of its exponentials, or squares) and ``total``
    (of its elements, NORMALISE) must hold until ``taken``, and ``valid`` may come again from the
    next cycle on. Its numbers are on ``early`` and ``late`` with ``o_valid``, in the order of rows:

    * SOFTMAX: ``late`` has the multiplier, then the shift, within what the requantisation takes.
    * NORMALISE: ``early`` has the factor's digits: the lower one, signed, then the upper one,
      negated. ``late`` has half of what is dropped from normal numbers, less the offset.

    The other inputs are the command's; ``own_shift`` and ``numerator`` SOFTMAX's parameters.

    A pipeline of four stages, each with a row of its own: variance, alignment and root, reciprocal,
    factor and offset. Products take ``BITS`` bits of a factor a cycle; root and reciprocal give one
    a cycle. SOFTMAX takes the second, of which it only needs the alignment, and the third: a row
    every ``ROW_QUOTIENT_BITS`` + 1 cycles. NORMALISE: a row every ``ROOT_BITS`` + 3 cycles and
    those of the alignment, some 5, at most 14.
    """

    softmax: Signal
    features: Signal
    epsilon: Signal
    numerator: Signal
    own_shift: Signal
    valid: Signal
    sums: Signal
    total: Signal
    taken: Signal
    o_valid: Signal
    early: Signal
    late: Signal

    def __init__(self) -> None:
        super().__init__(
            {
                "softmax": In(1),
                "features": In(FEATURES_BITS),
                "epsilon": In(VARIANCE_BITS),
                "numerator": In(MULTIPLIER_BITS),
                "own_shift": In(signed(8)),
                "valid": In(1),
                "sums": In(SUM_BITS),
                "total": In(signed(TOTAL_BITS)),
                "taken": Out(1),
                "o_valid": Out(1),
                "early": Out(EARLY_BITS),
                "late": Out(LATE_BITS),
            }
        )
        self._waiting = Signal()  # a row's sums are there
        # Variance: products on their way down, and whether they are complete.
        self._products = [
            Signal(width + BITS + _MAGNITUDE, name=f"product_{n}", reset_less=True)
            for n, width in (("squares", SQUARES_BITS), ("total", _MAGNITUDE))
        ]
        self._multiplied = Signal()
        # Alignment and root.
        self._root_free, self._root_ready = Signal(), Signal()
        self._radicand = Signal(VARIANCE_BITS, reset_less=True)
        self._half = Signal(range(_PAIRS + 1), reset_less=True)  # of the number's bits, rounded up
        self._root = Signal(ROOT_BITS, reset_less=True)
        self._root_total = Signal(signed(TOTAL_BITS), reset_less=True)
        # Reciprocal.
        self._takes_root = Signal()
        self._quotient_ready, self._takes_quotient = Signal(), Signal()
        self._quotient = Signal(ROW_QUOTIENT_BITS, reset_less=True)
        self._length = Signal(range(VARIANCE_BITS + 1), reset_less=True)
        self._divided_half = Signal(range(_PAIRS + 1), reset_less=True)
        self._divided_zero = Signal()
        self._divided_total = Signal(signed(TOTAL_BITS), reset_less=True)
        # The numbers.
        self._factor = Signal(MAX_FACTOR.bit_length(), reset_less=True)
        self._late = Signal(LATE_BITS, reset_less=True)

    def elaborate(self, platform: object) -> Module:
        m = Module()
        with m.If(self.taken):
            m.d.sync += self._waiting.eq(0)
        with m.If(self.valid):
            m.d.sync += self._waiting.eq(1)
        m.d.comb += self.taken.eq(
            self._root_free & Mux(self.softmax, self._waiting, self._multiplied)
        )
        self._multiply_sums(m)
        self._find_root(m)
        self._divide(m)
        self._find_numbers(m)
        return m

    def _multiply_sums(self, m: Module) -> None:
        """``features * squares`` and ``total * total``; multipliers lose bits at their lower end,
        products are shifted in from above."""
        magnitude = Signal(_MAGNITUDE, reset_less=True)
        left = Signal(range(_MAGNITUDE // BITS + 1))
        starts = self._waiting & ~self.softmax & ~self._multiplied & (left == 0)
        negative = self.total[-1]
        absolute = ((self.total ^ negative.replicate(TOTAL_BITS)) + negative)[:_MAGNITUDE]
        with m.If(starts):
            m.d.sync += [
                magnitude.eq(absolute),
                self._products[0].eq(self.features),
                self._products[1].eq(absolute),
                left.eq(_MAGNITUDE // BITS),
            ]
        with m.Elif(left != 0):
            for product, addend in zip(
                self._products, (self.sums[:SQUARES_BITS], magnitude), strict=True
            ):
                m.d.sync += product.eq(_multiply_step(product, product[:BITS], addend, _MAGNITUDE))
            m.d.sync += [left.eq(left - 1), self._multiplied.eq(left == 1)]
        with m.If(self.taken):
            m.d.sync += self._multiplied.eq(0)

    def _variance(self) -> Value:
        squares, total = self._products
        difference = (squares - total)[: VARIANCE_BITS - EPSILON_BITS]
        return (Cat(Const(0, EPSILON_BITS), difference) + self.epsilon)[:VARIANCE_BITS]

    def _find_root(self, m: Module) -> None:
        """Align the sum or the variance, two pairs of bits a cycle; then NORMALISE's root, a bit a
        cycle."""
        radicand, half, root = self._radicand, self._half, self._root
        remainder = Signal(ROOT_BITS + 2, reset_less=True)
        left = Signal(range(ROOT_BITS + 1))
        with m.FSM():
            with m.State("IDLE"):
                m.d.comb += self._root_free.eq(1)
                m.d.sync += [
                    radicand.eq(
                        Mux(self.softmax, self.sums << (VARIANCE_BITS - SUM_BITS), self._variance())
                    ),
                    half.eq(_PAIRS),
                    root.eq(0),
                    remainder.eq(0),
                    left.eq(ROOT_BITS),
                    self._root_total.eq(self.total),
                ]
                with m.If(self.taken):
                    m.next = "ALIGN"
            with m.State("ALIGN"):
                # ``half`` is even, but for when the highest pair is not zero.
                with m.If(~radicand[-4:].any() & half[2:].any()):
                    m.d.sync += [radicand.eq(radicand << 4), half.eq(half - 2)]
                with m.Elif(~radicand[-2:].any() & half[1:].any()):
                    m.d.sync += [radicand.eq(radicand << 2), half.eq(half - 1)]
                with m.Elif(self.softmax):
                    m.next = "READY"
                with m.Else():
                    m.next = "ROOT"
            with m.State("ROOT"):
                whole = Cat(radicand[-2:], remainder)[: len(remainder)]
                less = Signal(len(remainder) + 1, name="root_less")
                m.d.comb += less.eq(whole - Cat(Const(1, 2), root))
                fits = ~less[-1]
                m.d.sync += [
                    root.eq(Cat(fits, root)),
                    remainder.eq(Mux(fits, less, whole)),
                    radicand.eq(radicand << 2),
                    left.eq(left - 1),
                ]
                with m.If(left == 1):
                    m.next = "READY"
            with m.State("READY"):
                m.d.comb += self._root_ready.eq(1)
                with m.If(self._takes_root):
                    m.next = "IDLE"

    def _divide(self, m: Module) -> None:
        """``numerator * 2**QUOTIENT_BITS`` by the aligned sum, or the same with 2^24 by the root in
        its place: 2^(2 * ROOT_BITS) by the root."""
        divisor = Signal(SUM_BITS, reset_less=True)
        remainder = Signal(SUM_BITS, reset_less=True)
        left = Signal(range(ROW_QUOTIENT_BITS + 1))
        odd = ~self._radicand[-1]
        aligned = Mux(odd, self._radicand[-SUM_BITS - 1 : -1], self._radicand[-SUM_BITS:])
        root = self._root
        is_free = ~self._quotient_ready | self._takes_quotient
        m.d.comb += self._takes_root.eq(self._root_ready & (left == 0) & is_free)
        with m.If(self._takes_root):
            m.d.sync += [
                divisor.eq(Mux(self.softmax, aligned, root << (SUM_BITS - ROOT_BITS))),
                remainder.eq(
                    Mux(self.softmax, self.numerator, 1 << MULTIPLIER_BITS)
                    << (QUOTIENT_BITS - ROW_QUOTIENT_BITS)
                ),
                left.eq(ROW_QUOTIENT_BITS),
                self._length.eq((self._half << 1) - odd),
                self._divided_half.eq(self._half),
                self._divided_zero.eq(~root[-1]),
                self._divided_total.eq(self._root_total),
            ]
        with m.Elif(left != 0):
            less = Signal(SUM_BITS + 2)
            m.d.comb += less.eq((remainder << 1) - divisor)
            fits = ~less[-1]
            m.d.sync += [
                remainder.eq(Mux(fits, less, remainder << 1)),
                self._quotient.eq(Cat(fits, self._quotient)),
                left.eq(left - 1),
            ]
        with m.If(self._takes_quotient):
            m.d.sync += self._quotient_ready.eq(0)
        with m.Elif(left == 1):
            m.d.sync += self._quotient_ready.eq(1)

    def _find_numbers(self, m: Module) -> None:
        """SOFTMAX's multiplier and shift; NORMALISE's products with the inverse, and their
        rounding."""
        quotient, inverse = self._quotient, Signal(_INVERSE + 1, reset_less=True)
        width = _INVERSE + _RAISED
        factor = Signal(FEATURES_BITS + BITS + width, reset_less=True)
        offset = Signal(signed(TOTAL_BITS + BITS + width), reset_less=True)
        factor_half, offset_half = Signal(reset_less=True), Signal(reset_less=True)
        # A digit that is left over shifts the products without adding to them.
        left = Signal(range(_INVERSE // BITS + _PAIRS // BITS + 1))
        total, zero = Signal(signed(TOTAL_BITS), reset_less=True), Signal(reset_less=True)
        with m.FSM():
            with m.State("IDLE"):
                rounded = (quotient + 1)[1 : 1 + _INVERSE]
                m.d.sync += [
                    *(p.eq(0) for p in (factor, offset, factor_half, offset_half)),
                    inverse.eq(Mux(self._divided_half[0], rounded, rounded << 1)),
                    total.eq(self._divided_total),
                    zero.eq(self._divided_zero),
                    left.eq(_INVERSE // BITS + (self._divided_half >> 1)),
                ]
                m.d.comb += self._takes_quotient.eq(self._quotient_ready)
                with m.If(self._quotient_ready):
                    with m.If(self.softmax):
                        self._round_multiplier(m)
                        m.next = "WRITE"
                    with m.Else():
                        m.next = "MULTIPLY"
            with m.State("MULTIPLY"):
                digit = inverse[:BITS]
                m.d.sync += [
                    factor.eq(_multiply_step(factor, digit, self.features, width)),
                    offset.eq(_multiply_step(offset, digit, total, width)),
                    factor_half.eq(factor[BITS - 1]),
                    offset_half.eq(offset[BITS - 1]),
                    inverse.eq(inverse >> BITS),
                    left.eq(left - 1),
                ]
                with m.If(left == 1):
                    m.next = "ROUND"
            with m.State("ROUND"):
                # A factor that is too large leaves its highest bit set.
                places = len(self._factor) - 1
                rounded = factor[:places] + factor_half
                over = factor[places:].any() | rounded[places] | zero
                m.d.sync += [
                    self._factor.eq(Cat(rounded[:places], over)),
                    self._late.eq(~offset[:LATE_BITS] + (1 << (DROPPED - 1)) + ~offset_half),
                ]
                m.next = "WRITE"
            with m.State("WRITE"):
                m.d.comb += self.o_valid.eq(1)
                m.next = "IDLE"
        self._show_numbers(m)

    def _round_multiplier(self, m: Module) -> None:
        """SOFTMAX: the quotient as 24 bits and a carry, and the shift without it."""
        quotient, wide = self._quotient, self._quotient[MULTIPLIER_BITS + 1]
        rounded = Mux(wide, quotient[1:], quotient)[: MULTIPLIER_BITS + 1] + 1
        # Those of the sum and of its reciprocal.
        constant = QUOTIENT_BITS - SUM_BITS - (VARIANCE_BITS - SUM_BITS) - 1
        m.d.sync += [
            self._factor.eq(rounded >> 1),
            self._late.eq(self._length + constant - wide + self.own_shift),
        ]

    def _show_numbers(self, m: Module) -> None:
        factor, over = self._factor[:-1], self._factor[-1]
        low, high = factor[:DIGIT], factor[DIGIT:]
        # The lower digit is signed: what it lacks is in the upper one. Negated, that fits.
        negated = (~Cat(high, Const(0, 1)) + ~low[-1])[:DIGIT]
        carry = self._factor[MULTIPLIER_BITS]
        shift, bounded = Signal(signed(10)), Signal(SHIFT_BITS)
        m.d.comb += [
            shift.eq(self._late[:10].as_signed() - carry),
            bounded.eq(Mux(shift < 0, 0, Mux(shift > MAX_SHIFT, MAX_SHIFT, shift))),
        ]
        multiplier = Cat(
            self._factor[: MULTIPLIER_BITS - 1], self._factor[MULTIPLIER_BITS - 1] | carry
        )
        with m.If(self.softmax):
            m.d.comb += self.late.eq(Cat(multiplier, bounded))
        with m.Elif(over):
            m.d.comb += self.late.eq(1 << (DROPPED - 1))
        with m.Else():
            m.d.comb += [self.late.eq(self._late), self.early.eq(Cat(low, negated))]


def _multiply_step(product: Signal, digit: Value, addend: Value, width: int) -> Value:
    """``product``, whose lowest ``width`` bits are shifted out, with ``digit * addend`` above
    them, then ``BITS`` to the right."""
    high = product[width:]
    signed_addend = addend.shape().signed
    total: Value = high.as_signed() if signed_addend else high
    for i, bit in enumerate(digit):
        total = total + (Mux(bit, addend, 0) << i)
    total = total[: len(high)]
    filling = total[-1].replicate(BITS) if signed_addend else Const(0, BITS)
    return Cat(product[BITS:width], total, filling)
