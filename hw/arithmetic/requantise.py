"""Requantisation of int32 to int8, ``lanes`` values a cycle: the arithmetic of ``isa.params``."""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Module, Mux, ShapeLike, Signal, Value, signed, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from systole.hw.bus.interfaces import layout_of
from systole.isa.params import PARAM_BYTES, REQUANT_PARAMS
from systole.isa.timing import REQUANTISE_LATENCY

PARAMS = layout_of(REQUANT_PARAMS)

INTEGER = 9
"""Bits kept of the result's integer part: a magnitude of 2^9 is beyond every clamp."""
FRACTION = 25
"""Bits kept of its fraction (besides the sticky bit): the finest half-ulp that matters, 2^-25."""
MAX_SHIFT = (1 << PARAMS["shift"].width) - 1
"""Largest right shift."""
SIGNIFICAND = 24
"""Significant bits of a float32."""


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


class Requantise(wiring.Component):
    """Maps int32 to int8 exactly as ``isa.numerics.requantise``, pipelined, ``lanes`` at a time.

    One vector a cycle: ``acc`` is taken when ``en`` and ``i_valid``; its result is on ``o`` with
    ``o_valid`` after ``LATENCY`` cycles with ``en``. While ``en`` is low everything holds still
    (``o`` and ``o_valid`` included). ``o`` keeps its value until the next result.

    Parameters are double-buffered here. In a cycle with ``en`` and ``load``, ``params``, ``zero``,
    ``low`` and ``high`` are taken for the vectors of *later* cycles; vectors taken in the same
    cycle or before still use the earlier ones, wherever in the pipeline they are. So a load costs
    no cycle, and the user's parameter registers are free again in the next. ``load`` must not be
    raised while ``loading`` is high, which it is for the ``LATENCY - 2`` cycles with ``en`` after a
    load.
    ``params`` is lane 0 lowest, 64 bits a lane in the layout of ``isa.params.REQUANT_PARAMS``.

    Between the registers of a stage nothing toggles while it has no vector (``m.If(take[...])``
    around combinational signals): for power, and for the speed of simulation.

    Stages (register after each): sum with the bias; magnitude, rounded to 24 bits; product; shift;
    rounding; zero point and clamp.
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
    o_valid: Signal
    o: Signal

    def __init__(self, *, lanes: int):
        self.lanes = lanes
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
                "o_valid": Out(1),
                "o": Out(8 * lanes),
            }
        )
        self._take = [Signal(name=f"take{i}") for i in range(self.LATENCY)]  # stage i advances
        # New parameters enter stage i.
        self._reach = [Signal(name=f"reach{i}") for i in range(self.LATENCY)]
        self._zero = Signal(signed(8))
        self._low = Signal(signed(8))
        self._high = Signal(signed(8))

    def elaborate(self, platform: object) -> Module:
        m = Module()
        self._advance(m)
        self._load_limits(m)
        for i in range(self.lanes):
            lane = _Lane(m, i)
            params = data.View(PARAMS, self.params[8 * PARAM_BYTES * i :][: PARAMS.size])
            self._load_params(lane, params)
            with m.If(self._take[0]):
                lane.add_bias(self.acc[32 * i :][:32])
            with m.If(self._take[1]):
                lane.round_magnitude()
            with m.If(self._take[2]):
                lane.multiply()
            with m.If(self._take[3]):
                lane.shift()
            with m.If(self._take[4]):
                lane.round_to_integer()
            with m.If(self._take[5]):
                result = lane.clamp(self._zero, self._low, self._high)
                m.d.sync += self.o[8 * i :][:8].eq(result)
        return m

    def _advance(self, m: Module) -> None:
        valid = Signal(self.LATENCY)  # after each stage
        mark = Signal(self.LATENCY - 1)  # travels ahead of the first vector of new parameters
        m.d.comb += [self.o_valid.eq(valid[-1]), self.loading.eq(mark[:-1].any())]
        with m.If(self.en):
            m.d.sync += [valid.eq(Cat(self.i_valid, valid)), mark.eq(Cat(self.load, mark))]
        m.d.comb += [
            *(s.eq(self.en & v) for s, v in zip(self._take, Cat(self.i_valid, valid[:-1]))),
            *(s.eq(self.en & v) for s, v in zip(self._reach, Cat(self.load, mark))),
        ]

    def _load_limits(self, m: Module) -> None:
        """Zero point and clamp: as loaded, and as the last stage has them."""
        zero, low, high = (Signal(signed(8), name=f"loaded_{n}") for n in ("zero", "low", "high"))
        with m.If(self._reach[0]):
            m.d.sync += [zero.eq(self.zero), low.eq(self.low), high.eq(self.high)]
        with m.If(self._reach[5]):
            m.d.sync += [self._zero.eq(zero), self._low.eq(low), self._high.eq(high)]

    def _load_params(self, lane: _Lane, params: data.View) -> None:
        """A lane's parameters: as loaded, and where the current vector needs them."""
        m = lane.m
        loaded_multiplier = lane.register("loaded_multiplier", SIGNIFICAND)
        loaded_shift = lane.register("loaded_shift", PARAMS["shift"].width)
        with m.If(self._reach[0]):
            m.d.sync += [
                lane.bias.eq(params.bias),
                loaded_multiplier.eq(params.multiplier),
                loaded_shift.eq(params.shift),
            ]
        with m.If(self._reach[2]):
            m.d.sync += lane.multiplier.eq(loaded_multiplier)
        # A product is shifted right by ``shift - FRACTION`` to keep FRACTION bits of fraction.
        # With a smaller shift, it goes FRACTION bits to the left first (``small``).
        with m.If(self._reach[3]):
            is_small = loaded_shift < FRACTION
            m.d.sync += [
                lane.small.eq(is_small),
                lane.amount.eq(Mux(is_small, loaded_shift, loaded_shift - FRACTION)),
                lane.kept.eq(Mux(is_small, MAX_SHIFT - FRACTION, ~loaded_shift)),
            ]


class _Lane:
    """The number path of a lane, a method for each stage, which is called while it advances."""

    def __init__(self, m: Module, index: int):
        self.m, self.index = m, index
        register = self.register
        # Parameters.
        self.bias = register("bias", 32)
        self.multiplier = register("multiplier", SIGNIFICAND)
        self.small = register("small", 1)
        self.amount = register("amount", 6)
        self.kept = register("kept", 6)
        # After each stage.
        self.total = register("total", 32)
        self.magnitude = register("magnitude", 32)
        self.negative2 = register("negative2", 1)
        self.product = register("product", 32 + SIGNIFICAND)
        self.negative3 = register("negative3", 1)
        self.fixed = register("fixed", INTEGER + FRACTION)
        self.sticky = register("sticky", 1)
        self.beyond = register("beyond", 1)
        self.negative4 = register("negative4", 1)
        self.rounded = register("rounded", INTEGER + 1)
        self.negative5 = register("negative5", 1)

    def register(self, name: str, shape: ShapeLike) -> Signal:
        return Signal(shape, name=f"{name}_{self.index}")

    def add_bias(self, acc: Value) -> None:
        """1: sum, modulo 2^32."""
        self.m.d.sync += self.total.eq(acc + self.bias)

    def round_magnitude(self) -> None:
        """2: magnitude (all rounding is symmetric), rounded to 24 significant bits."""
        m, total, size = self.m, self.total, self.register("size", 32)
        m.d.comb += size.eq(Mux(total[-1], -total, total))
        # Ones in all bits that are rounded away.
        below = _fill(m, f"below_{self.index}", size[SIGNIFICAND:])
        is_odd = (size[1 : 1 + len(below)] & (below ^ (below >> 1))).any()
        m.d.sync += [
            self.magnitude.eq((size + (below >> 1) + is_odd) & Cat(~below, Const(-1, SIGNIFICAND))),
            self.negative2.eq(total[-1]),
        ]

    def multiply(self) -> None:
        """3: product."""
        self.m.d.sync += [
            self.product.eq(self.magnitude * self.multiplier),
            self.negative3.eq(self.negative2),
        ]

    def shift(self) -> None:
        """4: fixed point: INTEGER bits, FRACTION bits, sticky."""
        m, product, window = self.m, self.product, INTEGER + FRACTION
        wide = self.register("wide", len(product) + 3)
        moved = Mux(self.small, Cat(Const(0, FRACTION), product[:window]), product)
        m.d.comb += wide.eq(moved >> self.amount)
        dropped = Const(-1, unsigned(MAX_SHIFT - FRACTION)) >> self.kept
        m.d.sync += [
            self.fixed.eq(wide),
            self.sticky.eq((product & dropped).any()),
            self.beyond.eq(wide[window:].any() | (self.small & product[window:].any())),
            self.negative4.eq(self.negative3),
        ]

    def round_to_integer(self) -> None:
        """5: rounding, first to 24 significant bits, then half to even to an integer.

        The first moves every fraction within half a unit in the last place of 1/2 (in steps of
        2^-FRACTION: 2^bitlen(integer)) onto 1/2, because 1/2 is even at that precision. So an even
        integer is rounded up above that interval, an odd one from its lower end on."""
        m, integer, half = self.m, self.fixed[FRACTION:], 1 << (FRACTION - 1)
        around = _fill(m, f"around_{self.index}", integer)
        above = (half + 2 + around - self.sticky)[:FRACTION]
        up = self.fixed[:FRACTION] >= Mux(integer[0], half - 1 - around, above)
        m.d.sync += [
            self.rounded.eq(Mux(self.beyond, (1 << INTEGER) - 1, integer + up)),
            self.negative5.eq(self.negative4),
        ]

    def clamp(self, zero: Value, low: Value, high: Value) -> Value:
        """6: zero point and clamp."""
        moved = self.register("moved", signed(INTEGER + 3))
        raised = self.register("raised", signed(INTEGER + 3))
        self.m.d.comb += [
            moved.eq(zero + Mux(self.negative5, -self.rounded, self.rounded)),
            raised.eq(Mux(moved < low, low, moved)),
        ]
        return Mux(raised > high, high, raised)
