"""The arithmetic of POST's ADD, SUB and MUL."""

from __future__ import annotations

from amaranth.hdl import C, Cat, Const, Module, Mux, ShapeLike, Signal, Value, signed
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from systole.hw.bus.interfaces import command_layout
from systole.isa import Opcode, PostOp
from systole.isa.timing import COMBINE_LATENCY

TOTAL = 41
"""Bits of what is shifted: MUL's product of two signed 9 and an unsigned 24 bits. (The sum of two
products of signed 9 and unsigned 24 bits has 34.)"""

RESULT = 12
"""Bits of the shifted and rounded total; beyond is beyond every clamp."""


class PostCombine(wiring.Component):
    """``isa.numerics.combine`` on ``lanes`` channels, in ``LATENCY`` stages; MUL takes one more.

    ``a`` and ``b`` are taken with ``i_valid``, every cycle if need be; ``o`` is valid with
    ``o_valid``, that many cycles later, and 0 otherwise. ``cmd`` is the POST command whose fields
    apply; it must hold still while values are in flight. ``setup`` marks the cycle before the first
    in which ``cmd`` is looked at; ``shift`` is the command's in that cycle.

    Stages: zero points; MUL: product of the two; products with the multipliers; sum; shift;
    rounding and zero point. The clamp follows the last register.
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

    def elaborate(self, platform: object) -> Module:
        m = Module()
        subtracts, multiplies = Signal(), Signal()
        moved_by_zero, multiplied = Signal(), Signal()  # after the first, after MUL's own stage
        operands = Signal()  # what the multipliers are for is there
        valid = Signal(self.LATENCY - 1)  # after each stage behind it
        m.d.sync += [
            moved_by_zero.eq(self.i_valid),
            multiplied.eq(moved_by_zero & multiplies),
            valid.eq(Cat(operands, valid)),
        ]
        m.d.comb += [
            subtracts.eq(self.cmd.op == PostOp.SUB),
            multiplies.eq(self.cmd.op == PostOp.MUL),
            operands.eq(Mux(multiplies, multiplied, moved_by_zero)),
            self.o_valid.eq(valid[-1]),
        ]
        point = Signal(6)  # position of the total's bit worth one half
        below = Signal(TOTAL)  # mask of the bits under it
        with m.If(self.setup):
            to_point = (self.shift - 1)[:6]
            m.d.sync += [
                point.eq(to_point),
                below.eq(C((1 << TOTAL) - 1) >> Mux(to_point < TOTAL, TOTAL - to_point, 0)[:6]),
            ]

        for i in range(self.lanes):

            def reg(name: str, shape: ShapeLike, lane: int = i) -> Signal:
                return Signal(shape, name=f"{name}_{lane}")

            da, db = reg("da", signed(9)), reg("db", signed(9))
            product = reg("product", signed(17))
            pa, pb = reg("pa", signed(TOTAL)), reg("pb", signed(33))
            total, scaled = reg("total", signed(TOTAL)), reg("scaled", signed(TOTAL))
            shifted, up = reg("shifted", signed(RESULT - 1)), reg("up", 1)
            moved = reg("moved", signed(RESULT + 1))
            b = _lane(self.b, i)
            with m.If(self.i_valid):
                m.d.sync += [
                    da.eq(_lane(self.a, i) - self.cmd.za),
                    db.eq(Mux(subtracts, self.cmd.zb - b, b - self.cmd.zb)),
                ]
            with m.If(moved_by_zero & multiplies):
                m.d.sync += product.eq(da * db)
            with m.If(operands):
                m.d.sync += [
                    pa.eq(Mux(multiplies, product, da) * self.cmd.ma),
                    pb.eq(db * self.cmd.mb),
                ]
            with m.If(valid[0]):
                m.d.sync += total.eq(pa + Mux(multiplies, 0, pb))
            with m.If(valid[1]):
                m.d.comb += scaled.eq(total >> point)  # in halves
            fits = ~scaled[RESULT - 1 :].any() | scaled[RESULT - 1 :].all()
            limit = Const((1 << (RESULT - 2)) - 1, RESULT - 1)
            with m.If(valid[1]):
                m.d.sync += [
                    shifted.eq(
                        Mux(fits, scaled[1:RESULT], limit ^ scaled[-1].replicate(RESULT - 1))
                    ),
                    up.eq(fits & scaled[0] & (scaled[1] | (total & below).any())),
                ]
            with m.If(valid[2]):
                m.d.sync += moved.eq(shifted + self.cmd.zo + up)
            raised = reg("raised", signed(RESULT + 1))
            with m.If(self.o_valid):
                m.d.comb += [
                    raised.eq(Mux(moved < self.cmd.low2, self.cmd.low2, moved)),
                    self.o[8 * i :][:8].eq(Mux(raised > self.cmd.high2, self.cmd.high2, raised)),
                ]
        return m


def _lane(vector: Value, i: int) -> Value:
    return vector[8 * i :][:8].as_signed()
