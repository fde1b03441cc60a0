"""What the number paths tell synthesis and simulation beside what they compute."""

from __future__ import annotations

from typing import Any

from amaranth.hdl import Module, Signal, Value
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

ACTIVE = "systole_active"
"""The Verilog module behind :func:`active`."""
APART = "apart_"
"""How the names of signals begin that synthesis must not merge with what they feed."""


class _Active(wiring.Component):
    """A condition, or what the platform makes of it."""

    i: Signal
    o: Signal

    def __init__(self) -> None:
        super().__init__({"i": In(1), "o": Out(1)})

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        if hasattr(platform, "get_active"):
            m.submodules.active = platform.get_active(self.i, self.o)
        else:
            m.d.comb += self.o.eq(self.i)
        return m


def active(m: Module, name: str, condition: Value) -> Signal:
    """``condition`` for an ``m.If`` around combinational logic, in simulation; always, in hardware.

    What the logic feeds must only be kept under the condition. ``name``: a submodule's."""
    m.submodules[name] = found = _Active()
    m.d.comb += found.i.eq(condition)
    return found.o


def sum_of_three(m: Module, name: str, a: Value, b: Value, c: Value) -> Value:
    """``a + b + c`` by two adders; ``name`` is part of that of ``a + b``.

    Left to itself, synthesis makes one adder of three operands, which are two first by two tables
    of logic a bit: more than another carry chain takes."""
    pair = Signal((a + b).shape(), name=f"{APART}{name}")
    m.d.comb += pair.eq(a + b)
    return pair + c
