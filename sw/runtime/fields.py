"""JSON objects read value by value, each checked for its type and its limits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

SHOWN = 60
"""Characters of a wrong value that an error shows."""


class FieldError(ValueError):
    """A value that is missing, of another type, or outside its limits; the message names it."""


class Fields:
    """A JSON object, called ``where`` in errors. Raises :class:`FieldError` unless it has exactly
    the keys of ``names``."""

    def __init__(self, value: object, where: str, names: Iterable[str]):
        self._where = where
        if not isinstance(value, dict):
            raise FieldError(f"{where} is {_short(value)}; it must be an object")
        self._values = value
        known = set(names)
        if odd := sorted(known ^ value.keys(), key=str):
            what = "lacks" if odd[0] in known else "has an unknown"
            raise FieldError(f"{where} {what} field {_short(odd[0])}")

    def need(self, key: str, ok: bool, limit: str) -> None:
        """Raises :class:`FieldError` unless ``ok``; ``limit`` says what the value must be."""
        if not ok:
            raise FieldError(
                f"{self._where}: {key} is {_short(self._values[key])}; it must be {limit}"
            )

    def text(self, key: str) -> str:
        """Any text."""
        value = self._values[key]
        self.need(key, isinstance(value, str), "text")
        return value

    def choice(self, key: str, known: Sequence[str]) -> str:
        """One of some texts."""
        value = self._values[key]
        self.need(key, isinstance(value, str) and value in known, f"one of {', '.join(known)}")
        return value

    def flag(self, key: str) -> bool:
        """true or false."""
        value = self._values[key]
        self.need(key, isinstance(value, bool), "true or false")
        return value

    def positive(self, key: str, high: float) -> float:
        """A number above 0 and up to ``high``."""
        value = self._values[key]
        ok = type(value) in (int, float) and 0 < value <= high
        self.need(key, ok, f"a number above 0 and up to {high:g}")
        return value

    def whole(self, key: str, low: int, high: int) -> int:
        """A whole number from ``low`` to ``high``."""
        value = self._values[key]
        self.need(key, _is_whole(value, low, high), f"a whole number from {low} to {high}")
        return value

    def wholes(
        self, key: str, low: int, high: int, counts: Sequence[int] | range
    ) -> tuple[int, ...]:
        """So many whole numbers from ``low`` to ``high``; ``counts`` holds the numbers of them
        that are possible."""
        value = self._values[key]
        ok = isinstance(value, list) and len(value) in counts
        many = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        limit = f"{many} whole numbers from {low} to {high}"
        self.need(key, ok and all(_is_whole(v, low, high) for v in value), limit)
        return tuple(value)

    def missing(self, key: str) -> bool:
        """Whether it is null."""
        return self._values[key] is None

    def table(self, key: str) -> dict[str, object]:
        """An object inside, whose content is not checked."""
        value = self._values[key]
        self.need(key, isinstance(value, dict), "an object")
        return value

    def inner(self, key: str, names: Iterable[str]) -> Fields:
        """An object inside, with exactly the keys of ``names``."""
        return Fields(self._values[key], f"{self._where}: {key}", names)

    def each(self, key: str, names: Sequence[str]) -> list[Fields]:
        """The objects of a list inside."""
        value = self._values[key]
        self.need(key, isinstance(value, list), "a list")
        return [Fields(v, f"{self._where}: {key}[{i}]", names) for i, v in enumerate(value)]

    def named(self, key: str, names: Sequence[str]) -> dict[str, Fields]:
        """The objects of an object inside, by name."""
        where = f"{self._where}: {key}"
        return {
            name: Fields(value, f"{where}[{_short(name)}]", names)
            for name, value in self.table(key).items()
        }

    def lists(self, key: str) -> list[list]:
        """A list of lists, whose content is not checked."""
        value = self._values[key]
        ok = isinstance(value, list) and all(isinstance(v, list) for v in value)
        self.need(key, ok, "a list of lists")
        return value


def _is_whole(value: object, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _short(value: object) -> str:
    """A value as an error shows it: on one line, and not all of a long one."""
    if isinstance(value, int) and value.bit_length() > 4 * SHOWN:
        return f"a number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
