"""Two registers between the giver and the taker of a stream."""

from __future__ import annotations

from amaranth.hdl import Module, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from systole.hw.bus.interfaces import record


class StreamRegisters(wiring.Component):
    """Passes a stream on, a cycle later, as fast as it comes.

    ``output.valid``, ``output.payload`` and ``input.ready`` all come from registers: nothing that
    the taker needs time for reaches the giver in the same cycle. The second register holds what the
    giver sends in the cycle in which the taker first refuses. ``waiting``: it is in use.
    ``flush`` forgets both, and what is given in that cycle.
    """

    input: stream.Interface
    output: stream.Interface
    waiting: Signal
    flush: Signal

    def __init__(self, layout: data.StructLayout):
        self.layout = layout
        super().__init__(
            {
                "input": In(stream.Signature(layout)),
                "output": Out(stream.Signature(layout)),
                "waiting": Out(1),
                "flush": In(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        giver, taker, waiting = self.input, self.output, self.waiting
        first, second = (record(self.layout, name=n, reset_less=True) for n in ("first", "second"))
        m.d.comb += [giver.ready.eq(~waiting), taker.payload.eq(first)]
        with m.If(~taker.valid | taker.ready):
            m.d.sync += [taker.valid.eq(waiting | giver.valid), waiting.eq(0)]
            with m.If(waiting):
                m.d.sync += first.eq(second)
            with m.Elif(giver.valid):
                m.d.sync += first.eq(giver.payload)
        with m.Elif(giver.valid & ~waiting):
            m.d.sync += [waiting.eq(1), second.eq(giver.payload)]
        with m.If(self.flush):
            m.d.sync += [taker.valid.eq(0), waiting.eq(0)]
        return m
