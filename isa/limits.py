"""The limits of the commands' fields, with the numbers of a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from systole.isa.commands import COMMANDS, Field, Limit, Opcode, Size
from systole.isa.config import Config


@dataclass(frozen=True)
class FieldLimit:
    """A limit of one field of a command, in numbers."""

    field: Field
    least: int
    most: int
    multiple: int
    selector: str
    """The field that says whether the limit is one; "": it always is."""
    selected: tuple[int, ...]
    """The values of ``selector`` with which it is."""
    doc: str
    """The names of these values."""

    def refusal(self, value: int) -> str | None:
        """What is wrong with a value, which the limit is one for; None: nothing."""
        if value < self.least:
            must = f"at least {self.least}"
        elif value > self.most:
            must = f"at most {self.most}"
        elif value % self.multiple:
            must = f"a multiple of {self.multiple}"
        else:
            return None
        return f"is {value}; it must be {must}" + (f" for {self.doc}" if self.doc else "")


@cache
def field_limits(opcode: Opcode, config: Config) -> tuple[FieldLimit, ...]:
    """All limits of a kind of command in a configuration, but for those of operations that it does
    not have."""

    def number(size: Size) -> int:
        return getattr(config, size) if isinstance(size, str) else size

    command = COMMANDS[opcode]

    def selected(limit: Limit) -> tuple[int, ...]:
        if not limit.where:
            return ()
        selector, _ = command.places[command.field_of(type(limit.where[0]))]
        most = [number(own.most) for own in selector.limits if own.most is not None]
        return tuple(value for value in limit.where if value <= min(most, default=selector.high))

    return tuple(
        FieldLimit(
            field,
            least=field.low if limit.least is None else number(limit.least),
            most=field.high if limit.most is None else number(limit.most),
            multiple=number(limit.multiple),
            selector=command.field_of(type(limit.where[0])) if limit.where else "",
            selected=selected(limit),
            doc=" or ".join(w.name for w in limit.where),
        )
        for field in command.own_fields
        for limit in field.limits
        if selected(limit) or not limit.where
    )


def broken_limit(command: Mapping[str, int], config: Config) -> tuple[str, str] | None:
    """The first field of a decoded command that breaks a limit, and how: ``is 0; it must be at
    least 1``. None: the command is legal."""
    for limit in field_limits(Opcode(command["opcode"]), config):
        if limit.selector and command[limit.selector] not in limit.selected:
            continue
        name = limit.field.name
        if refusal := limit.refusal(command[name]):
            return name, refusal
    return None
