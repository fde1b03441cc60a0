"""The arithmetic of POST's ADD, SUB and MUL."""

from __future__ import annotations

from amaranth.hdl import C, Cat, Const, Module, Mux, Signal, signed
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from systole.hw.arithmetic.requantise import clamped_to, ordered_low
from systole.hw.bus.interfaces import command_layout
from systole.isa import Opcode, PostOp
from systole.isa.timing import COMBINE_LATENCY

TOTAL = 41
"""Bits of what is shifted: MUL's product of two signed 9 and an unsigned 24 bits. (The sum of two
products of signed 9 and unsigned 24 bits has 34.)"""

HALF = 12
"""Bits of the lower half of a multiplier."""
RESULT = 12
"""Bits of the shifted and rounded total; beyond is beyond every clamp."""


class PostCombine(wiring.Component):
    """``isa.numerics.combine`` on ``lanes`` channels, in ``LATENCY`` stages.

    ``a`` and ``b`` are taken with ``i_valid``, every cycle if need be; ``o`` is valid with
    ``o_valid``, that many cycles later. ``cmd`` is the POST command whose fields apply; it must
    hold still while values are in flight. ``setup`` marks the cycle before the first in which
    ``cmd`` is looked at; ``shift`` is the command's in that cycle.

    Stages: zero points; for MUL the product of the two; products with the halves of the
    multipliers; sums of the products with equal halves; total; shift; rounding; zero point; clamp.
    Nothing is chosen in front of a multiplier in its cycle: ADD and SUB multiply the first operand
    by 1, and MUL adds 0.
    """

    LATENCY = COMBINE_LATENCY

    setup: Signal
    shift: Signal
    cmd: data.View
    i_valid: Signal
    a: Signal
    b: Signal
    o_valid: Signal
    o: Signal

    def __init__(self, *, lanes: int):
        self.lanes = lanes
        super().__init__(
            {
                "setup": In(1),
                "shift": In(6),
                "cmd": In(command_layout(Opcode.POST)),
                "i_valid": In(1),
                "a": In(8 * lanes),
                "b": In(8 * lanes),
                "o_valid": Out(1),
                "o": Out(8 * lanes),
            }
        )
        self._valid = Signal(self.LATENCY)  # after each stage
        self._point = Signal(6, reset_less=True)  # position of the total's bit worth one half
        self._below = Signal(TOTAL, reset_less=True)  # mask of the bits under it
        self._low = Signal(signed(8), reset_less=True)  # at most the upper limit

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.d.sync += self._valid.eq(Cat(self.i_valid, self._valid[:-1]))
        m.d.comb += self.o_valid.eq(self._valid[-1])
        with m.If(self.setup):
            to_point = (self.shift - 1)[:6]
            mask = C((1 << TOTAL) - 1) >> Mux(to_point < TOTAL, TOTAL - to_point, 0)[:6]
            m.d.sync += [self._point.eq(to_point), self._below.eq(mask)]
        low, high = self.cmd.low2, self.cmd.high2
        m.d.sync += self._low.eq(ordered_low(low, high))
        for i in range(self.lanes):
            total = self._add_up(m, i)
            result = self._round(m, i, total)
            self._finish(m, i, result)
        return m

    def _add_up(self, m: Module, lane: int) -> Signal:
        """The first five stages: the total."""

        def reg(name: str, bits: int) -> Signal:
            return Signal(signed(bits), name=f"{name}_{lane}", reset_less=True)

        cmd = self.cmd
        a, b = (vector[8 * lane :][:8].as_signed() for vector in (self.a, self.b))
        da, factor, db = reg("da", 9), reg("factor", 9), reg("db", 9)
        first, second = reg("first", 17), reg("second", 9)
        with m.If(self.i_valid):
            m.d.sync += da.eq(a - cmd.za)
            with m.If(cmd.op == PostOp.MUL):
                m.d.sync += [factor.eq(b - cmd.zb), db.eq(0)]
            with m.Else():
                negated = cmd.op == PostOp.SUB
                m.d.sync += [factor.eq(1), db.eq(Mux(negated, cmd.zb - b, b - cmd.zb))]
        with m.If(self._valid[0]):
            m.d.sync += [first.eq(da * factor), second.eq(db)]
        sums = []
        for half, part in (("low", slice(0, HALF)), ("high", slice(HALF, None))):
            pa, pb = reg(f"pa_{half}", 17 + HALF), reg(f"pb_{half}", 9 + HALF)
            both = reg(half, 18 + HALF)
            with m.If(self._valid[1]):
                m.d.sync += [pa.eq(first * cmd.ma[part]), pb.eq(second * cmd.mb[part])]
            with m.If(self._valid[2]):
                m.d.sync += both.eq(pa + pb)
            sums.append(both)
        total = reg("total", TOTAL)
        with m.If(self._valid[3]):
            m.d.sync += total.eq(sums[0] + (sums[1] << HALF))
        return total

    def _round(self, m: Module, lane: int, total: Signal) -> Signal:
        """The next two stages: shift, rounding half to even."""
        # In halves, if it is not ``wide``.
        scaled = Signal(RESULT, name=f"scaled_{lane}", reset_less=True)
        negative, wide, odd = (
            Signal(name=f"{name}_{lane}", reset_less=True) for name in ("negative", "wide", "odd")
        )
        result = Signal(signed(RESULT), name=f"result_{lane}", reset_less=True)
        # All from the result's sign on must be like it: those ``RESULT - 1`` or more above the
        # bit worth one half.
        unlike = (total.as_unsigned() ^ total[-1].replicate(TOTAL))[RESULT - 1 :]
        with m.If(self._valid[4]):
            m.d.sync += [
                scaled.eq((total >> self._point)[:RESULT]),
                negative.eq(total[-1]),
                wide.eq((unlike & ~self._below[: len(unlike)]).any()),
                odd.eq((total & self._below).any()),
            ]
        up = scaled[0] & (scaled[1] | odd)
        limit = (1 << (RESULT - 2)) - 1
        beyond = Mux(negative, Const(~limit, signed(RESULT)), Const(limit, signed(RESULT)))
        with m.If(self._valid[5]):
            m.d.sync += result.eq(Mux(wide, beyond, scaled[1:].as_signed() + up))
        return result

    def _finish(self, m: Module, lane: int, result: Signal) -> None:
        """The last two stages: zero point, clamp."""
        moved = Signal(signed(RESULT + 1), name=f"moved_{lane}", reset_less=True)
        low, high = self._low, self.cmd.high2
        with m.If(self._valid[6]):
            m.d.sync += moved.eq(result + self.cmd.zo)
        with m.If(self._valid[7]):
            o = clamped_to(low, high, moved)
            m.d.sync += self.o[8 * lane :][:8].eq(o)
