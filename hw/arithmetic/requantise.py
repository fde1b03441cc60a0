"""Requantisation of int32 to int8, ``lanes`` values a cycle: the arithmetic of ``isa.params``."""

from __future__ import annotations

from collections.abc import Sequence

from amaranth.hdl import Cat, Const, Module, Mux, ShapeLike, Signal, Value, signed
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from systole.hw.arithmetic.hints import active
from systole.hw.bus.interfaces import layout_of
from systole.isa.params import PARAM_BYTES, REQUANT_PARAMS
from systole.isa.timing import REQUANTISE_LATENCY

PARAMS = layout_of(REQUANT_PARAMS)

INTEGER = 9
"""Bits kept of the result's integer part: a magnitude of 2^9 is beyond every clamp."""
FRACTION = 25
"""Bits kept of its fraction (besides the sticky bit): the finest half-ulp that matters, 2^-25."""
SIGNIFICAND = 24
"""Significant bits of a float32."""
FINE = 3
"""Bits of the right shift that are left to its second stage."""
MOST_BITS = (1 << FINE) - 1
"""The most by which the second stage shifts."""
MULTIPLIER = 18
"""Bits of a multiplier in FPGAs: products of more are sums of several."""
RELAY = 4
"""The stage with whose first vector the later stages' parameters are relayed."""
SHIFTED = 6
"""The last stage that takes a part of ``params`` for its own."""


def _fill(m: Module, name: str, value: Value) -> Value:
    """``value`` with all bits below its highest 1 set too: 2^bitlen - 1."""
    width = len(value)
    step = 1
    while step < width:
        filled = Signal(width, name=f"{name}_{step}")
        m.d.comb += filled.eq(value | (value >> step))
        value = filled
        step *= 2
    return value


def _ones(count: Value, most: int) -> Value:
    """A number whose lowest ``count`` bits are set, at most ``most`` of them."""
    return (Const((1 << most) - 1, most) << count) >> most


def _choose(ways: Sequence[Value], index: Value) -> Value:
    """``ways[index]``, as a tree of multiplexers: smaller and faster than a one-hot choice."""
    for bit in index:
        ways = [Mux(bit, odd, even) for even, odd in zip(ways[::2], ways[1::2], strict=True)]
    return ways[0]


def ordered_low(low: Value, high: Value) -> Value:
    """The lower limit for :func:`clamped_to`: ``low``, at most ``high``."""
    return Mux(low > high, high, low)


def clamped_to(low: Value, high: Value, value: Value) -> Value:
    """``value`` between limits in order, which it may be compared with at once."""
    return Mux(value < low, low, Mux(value > high, high, value))


class Requantise(wiring.Component):
    """Maps int32 to int8 exactly as ``isa.numerics.requantise``, pipelined, ``lanes`` at a time.

    One vector a cycle: ``acc`` is taken when ``en`` and ``i_valid``; its result is on ``o`` with
    ``o_valid`` after ``LATENCY`` cycles with ``en``. While ``en`` is low everything holds still
    (``o`` and ``o_valid`` included). ``o`` keeps its value until the next result.

    Parameters are buffered here. In a cycle with ``en`` and ``load``, ``params``, ``zero``,
    ``low`` and ``high`` are taken for the vectors of *later* cycles; vectors taken in the same
    cycle or before still use the earlier ones, wherever in the pipeline they are. So a load costs
    no cycle, and the user's parameter registers are free again in the next. ``load`` must not be
    raised while ``loading`` is high, which it is for the ``RELAY - 1`` cycles with ``en`` after a
    load.
    With ``held``, the user keeps ``params`` for the ``SHIFTED`` cycles with ``en`` after a load and
    the limits for as long as there are vectors, and they are not buffered here.
    ``params`` is lane 0 lowest, 64 bits a lane in the layout of ``isa.params.REQUANT_PARAMS``.
    With ``rows`` (and ``held``), there are parameters for all lanes besides, which may change with
    every vector: while ``row`` is high, which only changes without vectors, a load takes no bias,
    ``row_multiplier`` as it is three cycles with ``en`` later, and of ``row_shift`` the bits from
    ``FINE`` on as they are five, the others as they are six cycles later.

    In simulation, nothing between the registers of a stage is computed while it has no vector
    (``m.If(works[...])`` around combinational signals): for its speed. ``en`` is no part of these
    conditions, as it comes late: it only enables registers.

    Stages (register after each): sum with the bias; magnitude; the same rounded to 24 bits; partial
    products; their sum; shift by whole bytes; shift by bits; rounding and zero point; clamp.
    """

    LATENCY = REQUANTISE_LATENCY

    en: Signal
    i_valid: Signal
    acc: Signal
    load: Signal
    loading: Signal
    params: Signal
    zero: Signal
    low: Signal
    high: Signal
    row: Signal
    row_multiplier: Signal
    row_shift: Signal
    o_valid: Signal
    o: Signal

    def __init__(self, *, lanes: int, held: bool = False, rows: bool = False):
        self.lanes = lanes
        self._held = held
        self._rows = rows
        of_rows = {
            "row": In(1),
            "row_multiplier": In(SIGNIFICAND),
            "row_shift": In(PARAMS["shift"].width),
        }
        super().__init__(
            {
                "en": In(1),
                "i_valid": In(1),
                "acc": In(32 * lanes),
                "load": In(1),
                "loading": Out(1),
                "params": In(8 * PARAM_BYTES * lanes),
                "zero": In(signed(8)),
                "low": In(signed(8)),
                "high": In(signed(8)),
                **(of_rows if rows else {}),
                "o_valid": Out(1),
                "o": Out(8 * lanes),
            }
        )
        # A vector is before stage i; there is something to compute (always so in hardware); it
        # advances.
        self._valid = [Signal(name=f"valid{i}") for i in range(self.LATENCY)]
        self._works: list[Signal] = []
        self._take = [Signal(name=f"take{i}") for i in range(self.LATENCY)]
        # New parameters enter stage i.
        self._reach = [Signal(name=f"reach{i}") for i in range(self.LATENCY)]
        self._zero, self._low, self._high = (
            Signal(signed(8), name=f"_{n}", reset_less=True) for n in ("zero", "low", "high")
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        self._advance(m)
        self._works = [active(m, f"active{i}", v) for i, v in enumerate(self._valid)]
        self._load_limits(m)
        for i in range(self.lanes):
            lane = _Lane(m, i, self._works, self._take)
            params = data.View(PARAMS, self.params[8 * PARAM_BYTES * i :][: PARAMS.size])
            self._load_params(lane, params)
            lane.add_bias(self.acc[32 * i :][:32])
            lane.find_magnitude()
            lane.round_magnitude()
            lane.multiply()
            lane.add_products()
            lane.shift_bytes()
            lane.shift_bits()
            lane.round_to_integer(self._zero)
            lane.clamp(self._low, self._high, self.o[8 * i :][:8])
        return m

    def _advance(self, m: Module) -> None:
        valid = Signal(self.LATENCY)  # after each stage
        mark = Signal(self.LATENCY - 1)  # travels ahead of the first vector of new parameters
        m.d.comb += [self.o_valid.eq(valid[-1]), self.loading.eq(mark[: RELAY - 1].any())]
        with m.If(self.en):
            m.d.sync += [valid.eq(Cat(self.i_valid, valid)), mark.eq(Cat(self.load, mark))]
        m.d.comb += [
            *(s.eq(v) for s, v in zip(self._valid, Cat(self.i_valid, valid[:-1]))),
            *(s.eq(self.en & v) for s, v in zip(self._take, self._valid)),
            *(s.eq(self.en & v) for s, v in zip(self._reach, Cat(self.load, mark))),
        ]

    def _load_limits(self, m: Module) -> None:
        """Zero point and clamp: as loaded, as relayed, and as the last stages have them."""
        loaded, relayed = (
            [
                Signal(signed(8), name=f"{stage}_{n}", reset_less=True)
                for n in ("zero", "low", "high")
            ]
            for stage in ("loaded", "relayed")
        )
        given = (self.zero, self.low, self.high)
        zero, low, high = given if self._held else relayed
        with m.If(self._reach[0]):
            m.d.sync += [new.eq(value) for new, value in zip(loaded, given, strict=True)]
        with m.If(self._reach[RELAY]):
            m.d.sync += [new.eq(value) for new, value in zip(relayed, loaded, strict=True)]
        with m.If(self._reach[7]):
            m.d.sync += self._zero.eq(zero)
        with m.If(self._reach[8]):
            m.d.sync += [self._low.eq(ordered_low(low, high)), self._high.eq(high)]

    def _load_params(self, lane: _Lane, params: data.View) -> None:
        """A lane's parameters: as loaded, and where the current vector needs them."""
        m = lane.m
        loaded_multiplier = lane.register("loaded_multiplier", SIGNIFICAND)
        loaded_shift, relayed_shift = (
            lane.register(f"{stage}_shift", PARAMS["shift"].width)
            for stage in ("loaded", "relayed")
        )
        with m.If(self._reach[0]):
            m.d.sync += [
                lane.bias.eq(params.bias),
                loaded_multiplier.eq(params.multiplier),
                loaded_shift.eq(params.shift),
            ]
        if self._rows:
            with m.If(self._reach[0] & self.row):
                m.d.sync += lane.bias.eq(0)
        multiplier: Value = params.multiplier if self._held else loaded_multiplier
        shift: Value = params.shift if self._held else relayed_shift
        if self._rows:
            multiplier = Mux(self.row, self.row_multiplier, multiplier)
            shift = Mux(self.row, self.row_shift, shift)
        with m.If(self._reach[3]):
            m.d.sync += lane.multiplier.eq(multiplier)
        with m.If(self._reach[RELAY]):
            m.d.sync += relayed_shift.eq(loaded_shift)
        with m.If(self._reach[5]):
            m.d.sync += lane.bytes_to_shift.eq(shift[FINE:])
        with m.If(self._reach[SHIFTED]):
            m.d.sync += lane.bits_to_shift.eq(shift[:FINE])


class _Lane:
    """The number path of a lane, a method for each stage.

    ``works``: a stage's combinational signals are looked at.
    ``take``: it advances, so the stage's registers load."""

    def __init__(self, m: Module, index: int, works: list[Signal], take: list[Signal]):
        self.m, self.index, self.works, self.take = m, index, works, take
        register = self.register
        # Parameters.
        self.bias = register("bias", 32)
        self.multiplier = register("multiplier", SIGNIFICAND)
        self.bytes_to_shift = register("bytes_to_shift", PARAMS["shift"].width - FINE)
        self.bits_to_shift = register("bits_to_shift", FINE)
        # After each stage.
        self.total = register("total", 32)
        self.size = register("size", 32)
        self.magnitude = register("magnitude", 32)
        self.partial = [
            [
                register(f"partial{x}{y}", width + multiplier_width)
                for y, multiplier_width in enumerate((MULTIPLIER, SIGNIFICAND - MULTIPLIER))
            ]
            for x, width in enumerate((MULTIPLIER, 32 - MULTIPLIER))
        ]
        self.product = register("product", 32 + SIGNIFICAND)
        self.moved = register("moved", INTEGER + FRACTION + MOST_BITS)
        self.dropped = register("dropped", 1)
        self.overflow = register("overflow", 1)
        self.fixed = register("fixed", INTEGER + FRACTION)
        self.offset = register("offset", signed(INTEGER + 2))
        self.carry = register("carry", 1)
        self.beyond = register("beyond", 1)
        self.result = register("result", signed(INTEGER + 3))
        # The sign, after stages 2 to 7.
        self.negative = [register(f"negative{i}", 1) for i in range(2, 8)]

    def register(self, name: str, shape: ShapeLike) -> Signal:
        return Signal(shape, name=f"{name}_{self.index}", reset_less=True)

    def add_bias(self, acc: Value) -> None:
        """1: sum, modulo 2^32."""
        m = self.m
        with m.If(self.take[0]):
            m.d.sync += self.total.eq(acc + self.bias)

    def _keep_sign(self, stage: int, sign: Value) -> None:
        """The sign goes along through the stage, counted from 1."""
        m = self.m
        with m.If(self.take[stage - 1]):
            m.d.sync += self.negative[stage - 2].eq(sign)

    def find_magnitude(self) -> None:
        """2: magnitude (all rounding is symmetric)."""
        m, sign = self.m, self.total[-1]
        with m.If(self.take[1]):
            m.d.sync += self.size.eq((self.total ^ sign.replicate(32)) + sign)
        self._keep_sign(2, sign)

    def round_magnitude(self) -> None:
        """3: the magnitude, rounded to 24 significant bits."""
        m, size, rounded = self.m, self.size, self.register("rounded_size", 32)
        with m.If(self.works[2]):
            # Ones in all bits that are rounded away.
            below = _fill(m, f"below_{self.index}", size[SIGNIFICAND:])
            is_odd = (size[1 : 1 + len(below)] & (below ^ (below >> 1))).any()
            m.d.comb += rounded.eq(
                (size + (below >> 1) + is_odd) & Cat(~below, Const(-1, SIGNIFICAND))
            )
        with m.If(self.take[2]):
            m.d.sync += self.magnitude.eq(rounded)
        self._keep_sign(3, self.negative[0])

    def multiply(self) -> None:
        """4: products of the parts of magnitude and multiplier."""
        m = self.m
        with m.If(self.take[3]):
            for x, row in enumerate(self.partial):
                for y, product in enumerate(row):
                    a, b = (
                        v[MULTIPLIER:] if high else v[:MULTIPLIER]
                        for v, high in ((self.magnitude, x), (self.multiplier, y))
                    )
                    m.d.sync += product.eq(a * b)
        self._keep_sign(4, self.negative[1])

    def add_products(self) -> None:
        """5: product."""
        m, product = self.m, self.register("sum_of_products", 32 + SIGNIFICAND)
        (low, middle), (other_middle, high) = self.partial
        with m.If(self.works[4]):
            middles = (middle + other_middle) << MULTIPLIER
            m.d.comb += product.eq(Cat(low, high) + middles)
        with m.If(self.take[4]):
            m.d.sync += self.product.eq(product)
        self._keep_sign(5, self.negative[2])

    def shift_bytes(self) -> None:
        """6: the product, FRACTION bits to the left, to the right by the shift's whole bytes.

        Of what leaves the register on either side it is kept whether it was 0."""
        m, product, width = self.m, self.product, len(self.moved)
        moved = self.register("moved_bytes", width)
        dropped, overflow = self.register("drops", 1), self.register("overflows", 1)
        with m.If(self.works[5]):
            ways = []
            for i in range(1 << len(self.bytes_to_shift)):
                first = (i << FINE) - FRACTION  # bit of the product that comes lowest
                low = max(first, 0)
                inside = Cat(Const(0, low - first), product[low : first + width])
                lost = product[:low].any() if low else Const(0)
                over = product[first + width :].any() if first + width < len(product) else Const(0)
                ways.append(Cat(inside, Const(0, width - len(inside)), lost, over))
            m.d.comb += Cat(moved, dropped, overflow).eq(_choose(ways, self.bytes_to_shift))
        with m.If(self.take[5]):
            m.d.sync += [
                self.moved.eq(moved),
                self.dropped.eq(dropped),
                self.overflow.eq(overflow),
            ]
        self._keep_sign(6, self.negative[3])

    def shift_bits(self) -> None:
        """7: fixed point with INTEGER and FRACTION bits, by the rest of the shift; and what its
        rounding adds to the fraction (see :meth:`round_to_integer`)."""
        m, window = self.m, INTEGER + FRACTION
        fixed, next_power = self.register("shifted", window), self.register("next_power", 10)
        sticky, beyond = self.register("sticky", 1), self.register("is_beyond", 1)
        with m.If(self.works[6]):
            shifted = self.register("moved_bits", len(self.moved))
            lost = self.moved & _ones(self.bits_to_shift, MOST_BITS)
            m.d.comb += [
                shifted.eq(self.moved >> self.bits_to_shift),
                fixed.eq(shifted),
                sticky.eq(self.dropped | lost.any()),
                beyond.eq(self.overflow | shifted[window:].any()),
            ]
            # 2^bitlen(integer).
            below = _fill(m, f"below_integer_{self.index}", fixed[FRACTION:])
            m.d.comb += next_power.eq(Cat(1, below) & ~Cat(below, 0))
        is_even = ~fixed[FRACTION]
        with m.If(self.take[6]):
            m.d.sync += [
                self.fixed.eq(fixed),
                self.offset.eq(Cat(next_power, 0) ^ is_even.replicate(len(self.offset))),
                self.carry.eq(is_even & sticky),
                self.beyond.eq(beyond),
            ]
        self._keep_sign(7, self.negative[4])

    def round_to_integer(self, zero: Value) -> None:
        """8: rounding, first to 24 significant bits, then half to even to an integer; zero point.

        The first moves every fraction within half a unit in the last place of 1/2 (in steps of
        2^-FRACTION: 2^bitlen(integer)) onto 1/2, because 1/2 is even at that precision. So an odd
        integer is rounded up from the lower end of that interval on, an even one above it: where
        the fraction, with 2^bitlen(integer) added or taken away, reaches 1/2, or exceeds it."""
        m = self.m
        near = self.register("near", signed(FRACTION + 2))
        result = self.register("result_of_rounding", signed(INTEGER + 3))
        up, negative = self.register("up", 1), self.negative[-1]
        with m.If(self.works[7]):
            # Beyond, any large number does.
            integer = self.fixed[FRACTION:] | self.beyond.replicate(INTEGER)
            addend = Cat(integer ^ negative.replicate(INTEGER), negative).as_signed()
            m.d.comb += [
                near.eq(self.fixed[:FRACTION] + self.offset + self.carry),
                up.eq(~near[-1] & near[FRACTION - 1 : -1].any()),
                # -n = ~n + 1: a negative number is one lower if its magnitude is rounded up.
                result.eq(zero + addend + (up ^ negative)),
            ]
        with m.If(self.take[7]):
            m.d.sync += self.result.eq(result)

    def clamp(self, low: Value, high: Value, o: Value) -> None:
        """9: clamp."""
        m, result, clamped = self.m, self.result, self.register("clamped", 8)
        with m.If(self.works[8]):
            m.d.comb += clamped.eq(clamped_to(low, high, result))
        with m.If(self.take[8]):
            m.d.sync += o.eq(clamped)
