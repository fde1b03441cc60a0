"""Processes that tests start."""

from __future__ import annotations

import signal


def hear_interrupts() -> None:
    """For ``preexec_fn``: SIGINT as a command has it that is started in a terminal. What a shell
    starts in the background ignores it, and so would all its children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
