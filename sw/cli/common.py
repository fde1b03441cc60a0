"""What all commands share: options, consoles, and how they end.

Exit status everywhere: 0 done, 1 a mismatch, 2 bad input, with one line ``error: ...`` on stderr,
130 after Ctrl-C.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from io import StringIO
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from systole.isa import Config, ConfigError
from systole.sw.files import OutputError, check_writable, write_atomically
from systole.sw.frontend.inputs import InputError, random_inputs, read_inputs
from systole.sw.ir.graph import Graph, ModelError
from systole.sw.progress import Progress, Share
from systole.sw.report.energy import EnergyError
from systole.sw.runtime.device import DeviceError
from systole.sw.runtime.program import ProgramError

BAD_INPUT = (
    ModelError,
    ConfigError,
    InputError,
    DeviceError,
    EnergyError,
    ProgramError,
    OutputError,
)
"""What bad input raises; the message is for the user."""
MISMATCH, BAD = 1, 2
"""Exit status."""
WIDTH = 150
"""Columns of output that is not a terminal: the tables are wide."""
UNLIMITED = 1 << 20
"""More columns than any table has."""

InputOption = Annotated[
    Path | None, typer.Option(help="inputs: .npz, .npy, .png or .jpg; default: random, from --seed")
]
SeedOption = Annotated[int, typer.Option(min=0, help="seed of the random inputs")]
DimOption = Annotated[
    list[str] | None, typer.Option(help="bind a symbolic dimension: NAME=N or INPUT:AXIS=N")
]
RowsOption = Annotated[int | None, typer.Option(help="rows of the array")]
ColsOption = Annotated[int | None, typer.Option(help="columns of the array")]
ConfigOption = Annotated[Path | None, typer.Option(help="TOML file with a configuration")]
MeanOption = Annotated[
    str, typer.Option(help="per channel; a value becomes (value * scale - mean) / std")
]
StdOption = Annotated[str, typer.Option(help="per channel")]
LayoutOption = Annotated[str | None, typer.Option(help="nchw | nhwc; default: by shape")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="write the report as JSON")]


def output_console() -> Console:
    """Standard output, wide enough for tables when it is not a terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)


def print_table(console: Console, table: Table) -> None:
    """Print a table; where the output is no terminal, as plain columns of their full width."""
    if console.is_terminal:
        console.print(table)
        return
    title, table.title = table.title, None
    caption, table.caption = table.caption, None
    table.box, table.pad_edge = None, False
    for column in table.columns:
        column.no_wrap, column.max_width = True, None
    options = console.options.update(max_width=UNLIMITED)
    page = StringIO()
    width = Measurement.get(console, options, table).maximum
    Console(file=page, width=width).print(table)
    lines = [str(title or ""), *page.getvalue().splitlines(), str(caption or "")]
    for line in filter(None, map(str.rstrip, lines)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def progress_console() -> Console:
    """Standard error, for progress and errors."""
    return Console(stderr=True)


PIPE_SECONDS = 10.0
"""Between two lines of progress that go to a pipe; work of a few seconds says nothing there."""


def shown_progress(console: Console) -> Progress:
    """Progress on a console: in a terminal one line, which is what is being done and its share;
    elsewhere a line every PIPE_SECONDS, whatever the steps, of work whose share is known."""
    last: float | None = None

    @contextmanager
    def line(what: str) -> Iterator[Share]:
        with console.status(what) as status:
            yield lambda done: status.update(f"{what}: {done:.0%}")

    @contextmanager
    def lines(what: str) -> Iterator[Share]:
        nonlocal last
        last = time.monotonic() if last is None else last

        def share(done: float) -> None:
            nonlocal last
            now = time.monotonic()
            if last is None or now - last >= PIPE_SECONDS:
                last = now
                console.print(f"{what}: {done:.0%}", markup=False, highlight=False, soft_wrap=True)

        yield share

    return line if console.is_terminal else lines


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what bad input raises into one line on stderr and exit status 2."""
    try:
        yield
    except BAD_INPUT as e:
        progress_console().print(f"error: {e}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(BAD) from None


def parse_dims(texts: Sequence[str] | None) -> dict[str, int]:
    """The values of ``--dim`` by name. Raises :class:`InputError`."""
    dims = {}
    for text in texts or ():
        name, equals, number = text.rpartition("=")
        if not (equals and name and number.isdecimal()):
            raise InputError(f"--dim {text}: must be NAME=NUMBER")
        dims[name] = int(number)
    return dims


def parse_numbers(option: str, text: str) -> tuple[float, ...]:
    """Comma-separated numbers, each a decimal or a fraction such as 1/255. Raises
    :class:`InputError` naming ``option``."""
    try:
        return tuple(float(Fraction(part.strip())) for part in text.split(","))
    except (ValueError, ZeroDivisionError):
        raise InputError(f"{option} {text}: must be numbers separated by commas") from None


def choose_config(rows: int | None, cols: int | None, file: Path | None) -> Config:
    """The configuration that ``--rows``, ``--cols`` and ``--config`` name. Raises
    :class:`ConfigError`."""
    if file is not None:
        if rows is not None or cols is not None:
            raise ConfigError("--config and --rows/--cols exclude each other")
        return Config.from_toml(file)
    if rows is not None and cols is not None:
        return Config.sized(rows, cols)
    side = rows if rows is not None else cols
    return Config() if side is None else Config.sized(side, side)


def check_choice(option: str, value: str, known: Sequence[str]) -> None:
    """Raises :class:`InputError` unless ``value`` is one of ``known``."""
    if value not in known:
        raise InputError(f"{option} {value}: must be one of {', '.join(known)}")


def check_outputs(*paths: Path | None) -> None:
    """Raises :class:`OutputError` unless files can be written to ``paths``; None is no file."""
    for path in paths:
        if path is not None:
            check_writable(path)


def write_json(content: object, path: Path | None) -> None:
    """Write ``--json``, if it was given."""
    if path is not None:
        write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def check_document(path: Path) -> None:
    """Raises :class:`InputError` unless the folder of a document is there; that of the project's
    own documents is in a checkout only."""
    if not path.parent.is_dir():
        raise InputError(f"{path}: its folder does not exist; the documents are in a checkout only")


def choose_inputs(
    file: Path | None, seed: int, graph: Graph, console: Console
) -> Mapping[str, np.ndarray]:
    """The model's inputs by name from ``--input``, or random ones, which is said. Raises
    :class:`InputError`."""
    if file is not None:
        return read_inputs(file, graph, lambda text: console.print(text, markup=False))
    console.print(f"no --input: seeded random input (seed {seed})")
    return random_inputs(graph, seed)
