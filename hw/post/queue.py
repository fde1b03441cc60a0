"""A queue whose oldest entry is in a register."""

from __future__ import annotations

from amaranth.hdl import Module, Signal
from amaranth.lib import wiring
from amaranth.lib.fifo import SyncFIFO
from amaranth.lib.wiring import In, Out


class RegisteredQueue(wiring.Component):
    """A queue of ``depth`` entries with the ports of Amaranth's ``SyncFIFO``, as fast, but with
    ``r_rdy`` and ``r_data`` from registers: what follows has them at the start of the cycle, and
    ``r_en`` only enables registers."""

    w_rdy: Signal
    w_en: Signal
    w_data: Signal
    r_rdy: Signal
    r_en: Signal
    r_data: Signal

    def __init__(self, *, width: int, depth: int):
        self.width, self.depth = width, depth
        super().__init__(
            {
                "w_rdy": Out(1),
                "w_en": In(1),
                "w_data": In(width),
                "r_rdy": Out(1),
                "r_en": In(1),
                "r_data": Out(width),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.behind = behind = SyncFIFO(width=self.width, depth=self.depth - 1)
        free = Signal()  # the register takes the next entry
        m.d.comb += [
            free.eq(self.r_en | ~self.r_rdy),
            self.w_rdy.eq(behind.w_rdy),
            behind.r_en.eq(free),
            behind.w_data.eq(self.w_data),
            # Without others before it, an entry goes straight to the register.
            behind.w_en.eq(self.w_en & ~(free & ~behind.r_rdy)),
        ]
        with m.If(free):
            m.d.sync += self.r_rdy.eq(behind.r_rdy | self.w_en)
            with m.If(behind.r_rdy):
                m.d.sync += self.r_data.eq(behind.r_data)
            with m.Elif(self.w_en):
                m.d.sync += self.r_data.eq(self.w_data)
        return m
