"""A choice by a bit for each value."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import or_

from amaranth.hdl import Mux, Value, ValueLike


def chosen_of(which: Value, values: Sequence[ValueLike]) -> Value:
    """The one of ``values`` whose bit of ``which`` is set; 0 if none is. Each is masked and all are
    joined: less logic than one choice behind the other."""
    return reduce(or_, (Mux(bit, value, 0) for bit, value in zip(which, values, strict=True)))
