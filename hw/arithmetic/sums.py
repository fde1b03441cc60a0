"""Sums that synthesis is to make of plain adders."""

from __future__ import annotations

from amaranth.hdl import Module, Signal, Value

from systole.hw.verilog import APART


def sum_of_three(m: Module, name: str, a: Value, b: Value, c: Value) -> Value:
    """``a + b + c`` by two adders; ``name`` is part of that of ``a + b``.

    Left to itself, synthesis makes one adder of three operands, which are two first by two tables
    of logic a bit: more than another carry chain takes."""
    pair = Signal((a + b).shape(), name=f"{APART}{name}")
    m.d.comb += pair.eq(a + b)
    return pair + c
