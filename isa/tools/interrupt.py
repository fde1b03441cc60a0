"""How Ctrl-C ends a command line: one line on stderr and the status that shells give it."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

INTERRUPTED = 128 + signal.SIGINT
"""Exit status after Ctrl-C, as that of a shell's own commands."""


@contextmanager
def interruptible() -> Iterator[None]:
    """What a command does from its imports to its end. SIGTERM ends it as orderly, in silence."""
    signal.signal(signal.SIGTERM, _end)
    try:
        yield
    except KeyboardInterrupt:
        _report()
    except SystemExit as e:
        if e.code != INTERRUPTED:
            raise
        _report()  # typer has met the interrupt before.


def _end(number: int, _: object) -> NoReturn:
    raise SystemExit(128 + number)


def _report() -> NoReturn:
    print("interrupted", file=sys.stderr)
    raise SystemExit(INTERRUPTED) from None
