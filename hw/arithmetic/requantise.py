"""Requantisation of int32 to int8, ``lanes`` values a cycle: the arithmetic of ``isa.params``."""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, signed, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from systole.hw.bus.interfaces import layout_of
from systole.isa.params import PARAM_BYTES, REQUANT_PARAMS

PARAMS = layout_of(REQUANT_PARAMS)

INTEGER = 9
"""Bits kept of the result's integer part: a magnitude of 2^9 is beyond every clamp."""
FRACTION = 25
"""Bits kept of its fraction (besides the sticky bit): the finest half-ulp that matters, 2^-25."""
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

    LATENCY = 6

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

    def elaborate(self, platform) -> Module:
        m = Module()
        valid = Signal(self.LATENCY)  # after each stage
        mark = Signal(self.LATENCY - 1)  # travels ahead of the first vector of new parameters
        zero, low, high = (Signal(signed(8), name=n) for n in ("zero", "low", "high"))
        zero_now, low_now, high_now = (
            Signal(signed(8), name=f"{n}_now") for n in ("zero", "low", "high")
        )
        m.d.comb += [self.o_valid.eq(valid[-1]), self.loading.eq(mark[:-1].any())]
        with m.If(self.en):
            m.d.sync += [valid.eq(Cat(self.i_valid, valid)), mark.eq(Cat(self.load, mark))]
        take = [Signal(name=f"take{i}") for i in range(self.LATENCY)]  # stage i advances
        reach = [Signal(name=f"reach{i}") for i in range(self.LATENCY)]  # parameters enter stage i
        m.d.comb += [
            *(s.eq(self.en & v) for s, v in zip(take, Cat(self.i_valid, valid[:-1]))),
            *(s.eq(self.en & v) for s, v in zip(reach, Cat(self.load, mark))),
        ]

        with m.If(reach[0]):
            m.d.sync += [zero.eq(self.zero), low.eq(self.low), high.eq(self.high)]
        with m.If(reach[5]):
            m.d.sync += [zero_now.eq(zero), low_now.eq(low), high_now.eq(high)]

        for i in range(self.lanes):

            def reg(name, shape, lane=i):
                return Signal(shape, name=f"{name}_{lane}")

            # The parameters, loaded, and where the current vector needs them.
            bits = 8 * PARAM_BYTES
            source = data.View(PARAMS, self.params[bits * i :][: PARAMS.size])
            bias, loaded_multiplier = reg("bias", 32), reg("loaded_multiplier", SIGNIFICAND)
            loaded_shift = reg("loaded_shift", 6)
            with m.If(reach[0]):
                m.d.sync += [
                    bias.eq(source.bias),
                    loaded_multiplier.eq(source.multiplier),
                    loaded_shift.eq(source.shift),
                ]
            multiplier = reg("multiplier", SIGNIFICAND)
            with m.If(reach[2]):
                m.d.sync += multiplier.eq(loaded_multiplier)
            # A product is shifted right by ``shift - FRACTION`` to keep FRACTION bits of fraction.
            # With a smaller shift, it goes FRACTION bits to the left first (``small``).
            small, amount, kept = reg("small", 1), reg("amount", 6), reg("kept", 6)
            with m.If(reach[3]):
                is_small = loaded_shift < FRACTION
                m.d.sync += [
                    small.eq(is_small),
                    amount.eq(Mux(is_small, loaded_shift, loaded_shift - FRACTION)),
                    kept.eq(Mux(is_small, 63 - FRACTION, ~loaded_shift)),
                ]

            # 1: sum, modulo 2^32.
            total = reg("total", 32)
            with m.If(take[0]):
                m.d.sync += total.eq(self.acc[32 * i :][:32] + bias)

            # 2: magnitude (all rounding is symmetric), rounded to 24 significant bits.
            size = reg("size", 32)
            magnitude, negative2 = reg("magnitude", 32), reg("negative2", 1)
            with m.If(take[1]):
                m.d.comb += size.eq(Mux(total[-1], -total, total))
                # Ones in all bits that are rounded away.
                below = _fill(m, f"below_{i}", size[SIGNIFICAND:])
                is_odd = (size[1 : 1 + len(below)] & (below ^ (below >> 1))).any()
                m.d.sync += [
                    magnitude.eq(
                        (size + (below >> 1) + is_odd) & Cat(~below, Const(-1, SIGNIFICAND))
                    ),
                    negative2.eq(total[-1]),
                ]

            # 3: product.
            product, negative3 = reg("product", 32 + SIGNIFICAND), reg("negative3", 1)
            with m.If(take[2]):
                m.d.sync += [product.eq(magnitude * multiplier), negative3.eq(negative2)]

            # 4: fixed point: INTEGER bits, FRACTION bits, sticky.
            window = INTEGER + FRACTION
            wide = reg("wide", len(product) + 3)
            fixed, sticky = reg("fixed", window), reg("sticky", 1)
            beyond, negative4 = reg("beyond", 1), reg("negative4", 1)
            with m.If(take[3]):
                m.d.comb += wide.eq(
                    Mux(small, Cat(Const(0, FRACTION), product[:window]), product) >> amount
                )
                dropped = Const(-1, unsigned(63 - FRACTION)) >> kept
                m.d.sync += [
                    fixed.eq(wide),
                    sticky.eq((product & dropped).any()),
                    beyond.eq(wide[window:].any() | (small & product[window:].any())),
                    negative4.eq(negative3),
                ]

            # 5: rounding, first to 24 significant bits, then half to even to an integer. The first
            # moves every fraction within half a unit in the last place of 1/2 (in steps of
            # 2^-FRACTION: 2^bitlen(integer)) onto 1/2, because 1/2 is even at that precision. So an
            # even integer is rounded up above that interval, an odd one from its lower end on.
            integer = fixed[FRACTION:]
            half = 1 << (FRACTION - 1)
            rounded, negative5 = reg("rounded", INTEGER + 1), reg("negative5", 1)
            with m.If(take[4]):
                around = _fill(m, f"around_{i}", integer)
                threshold = Mux(
                    integer[0], half - 1 - around, (half + 2 + around - sticky)[:FRACTION]
                )
                up = fixed[:FRACTION] >= threshold
                m.d.sync += [
                    rounded.eq(Mux(beyond, (1 << INTEGER) - 1, integer + up)),
                    negative5.eq(negative4),
                ]

            # 6: zero point and clamp.
            moved = reg("moved", signed(INTEGER + 3))
            raised = reg("raised", signed(INTEGER + 3))
            with m.If(take[5]):
                m.d.comb += [
                    moved.eq(zero_now + Mux(negative5, -rounded, rounded)),
                    raised.eq(Mux(moved < low_now, low_now, moved)),
                ]
                m.d.sync += self.o[8 * i :][:8].eq(Mux(raised > high_now, high_now, raised))

        return m
