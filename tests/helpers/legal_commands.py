"""Commands within all limits, and just outside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from systole.isa import COMMANDS, Config, Opcode, broken_limit
from systole.isa.limits import FieldLimit, field_limits


def made_legal(opcode: Opcode, values: Mapping[str, int], config: Config) -> dict[str, int]:
    """``values``, with the nearest legal ones for those that break a limit; fields not named are
    0."""
    out = dict(values)
    for limit in field_limits(opcode, config):
        if not limit.selector or out.get(limit.selector, 0) in limit.selected:
            value = max(limit.least, min(limit.most, out.get(limit.field.name, 0)))
            out[limit.field.name] = value - value % limit.multiple
    return out


def random_fields(rng: np.random.Generator, opcode: Opcode, config: Config) -> dict[str, int]:
    """Any legal values of a command's fields."""
    fields = COMMANDS[opcode].own_fields
    drawn = {f.name: int(rng.integers(f.low, f.high + 1)) for f in fields}
    return made_legal(opcode, drawn, config)


def broken_fields(
    rng: np.random.Generator, opcode: Opcode, config: Config, values: Mapping[str, int]
) -> Iterator[tuple[str, dict[str, int]]]:
    """For every limit of a command: the field's name, and ``values``, legal but for this field,
    which is 0, all ones, next to the limit or anything else outside."""
    for limit in field_limits(opcode, config):
        legal = dict(values)
        if limit.selector:
            legal[limit.selector] = int(rng.choice(limit.selected))
        legal = made_legal(opcode, legal, config)
        for value in _outside(rng, limit):
            out = legal | {limit.field.name: value}
            assert broken_limit({"opcode": opcode} | out, config) is not None
            yield limit.field.name, out


def _outside(rng: np.random.Generator, limit: FieldLimit) -> list[int]:
    """Values of a field that its limit excludes."""
    field = limit.field
    anything = [int(v) for v in rng.integers(field.low, field.high + 1, 4)]
    near = [0, field.high, limit.least - 1, limit.most + 1, limit.multiple - 1, *anything]
    return sorted({v for v in near if field.low <= v <= field.high and limit.refusal(v)})
