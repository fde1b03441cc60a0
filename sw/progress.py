"""What long work says of itself: which step it is at, and what share of that is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import cast

Progress = Callable[[str], AbstractContextManager[object]]
"""Called with what is being done; the context that it returns lasts as long as that. If entering it
gives a function, that is called with the share that is done, 0 to 1, whenever it is known."""
Share = Callable[[float], None]
"""Takes the share of a step that is done."""


def silent(_: str) -> AbstractContextManager[object]:
    """The :data:`Progress` that shows nothing."""
    return nullcontext()


def unseen(_: float) -> None:
    """The :data:`Share` that nobody sees."""


def part(share: Share, start: float, end: float) -> Share:
    """What takes the share of a part of a step, which begins and ends at these shares of it."""
    return lambda done: share(start + done * (end - start))


@contextmanager
def step(progress: Progress, what: str) -> Iterator[Share]:
    """One step; given is what takes its share, whether ``progress`` shows that or not."""
    with progress(what) as shown:
        yield cast(Share, shown) if callable(shown) else unseen
