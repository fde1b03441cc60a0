"""What the commands share: progress on terminals and in pipes."""

from contextlib import contextmanager
from io import StringIO
from types import SimpleNamespace

from rich.console import Console

from systole.sw.cli import common


def progress_of(console, monkeypatch, seconds):
    """What is written while a step reports its share at these times."""
    times = iter([0.0, *seconds])
    monkeypatch.setattr(common.time, "monotonic", lambda: next(times))
    with common.shown_progress(console)("running on verilator") as share:
        for n in range(len(seconds)):
            share((n + 1) / len(seconds))
    return console.file.getvalue()


def test_a_pipe_gets_a_line_of_progress_now_and_then(monkeypatch):
    console = Console(file=StringIO(), force_terminal=False)
    text = progress_of(console, monkeypatch, [common.PIPE_SECONDS, 2 * common.PIPE_SECONDS])
    assert text == "running on verilator: 50%\nrunning on verilator: 100%\n"


def test_a_pipe_gets_a_line_of_many_short_steps(monkeypatch):
    """What counts is the time since the last line, not since a step began."""
    console = Console(file=StringIO(), force_terminal=False)
    times = iter([0.0, *(n * common.PIPE_SECONDS / 3 for n in range(1, 6))])
    monkeypatch.setattr(common.time, "monotonic", lambda: next(times))
    progress = common.shown_progress(console)
    for n in range(5):
        with progress(f"step {n}") as share:
            share(0.5)
    assert console.file.getvalue() == "step 2: 50%\n"


def test_a_pipe_gets_no_line_of_short_work(monkeypatch):
    console = Console(file=StringIO(), force_terminal=False)
    assert progress_of(console, monkeypatch, [common.PIPE_SECONDS / 2]) == ""


def test_a_terminal_shows_the_share(monkeypatch):
    console, shown = Console(file=StringIO(), force_terminal=True), []

    @contextmanager
    def status(what):
        shown.append(what)
        yield SimpleNamespace(update=shown.append)

    monkeypatch.setattr(console, "status", status)
    with common.shown_progress(console)("running on verilator") as share:
        share(0.5)
    assert shown == ["running on verilator", "running on verilator: 50%"]
