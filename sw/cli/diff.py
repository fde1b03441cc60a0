"""Where the golden model and onnxruntime differ, layer by layer.

    systole diff MODEL.onnx [--input X.npz|.npy|.png|.jpg] [--seed N]

onnxruntime runs the same model with its quantised intermediate values as further outputs, which can
change what it fuses. The command therefore also runs the model as it is and says how many elements
of its outputs the exposure changed.

Exit status: 0 compared, 2 bad input (one line on stderr).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from systole.sw.cli.common import (
    DimOption,
    InputOption,
    SeedOption,
    choose_inputs,
    one_line_errors,
    output_console,
    parse_dims,
    print_table,
)
from systole.sw.compiler.partition import partition
from systole.sw.frontend.dataflow import run_reference
from systole.sw.session import host
from systole.sw.session.diff import (
    IN_WHOLE,
    Difference,
    TensorDiff,
    compare_layers,
    explanations,
    first_offender,
)

NAME_WIDTH = 32
"""Longest name in the table on a terminal."""


def show(rows: list[TensorDiff], console: Console) -> None:
    """Print the rows for people."""
    offender = first_offender(rows)
    title = "golden model against onnxruntime, in quantised units"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in ("layer", "operator", "tensor"):
        table.add_column(name, no_wrap=True)
    for name in ("elements", "equal %", "max", "mean", "alone: equal %", "max", "ties"):
        table.add_column(name, justify="right", no_wrap=True)
    for i, row in enumerate(rows):
        texts = [row.layer, row.op_type, row.tensor]
        if console.is_terminal:
            texts = [_short(text) for text in texts]
        table.add_row(
            "first ->" if i == offender else "",
            *(escape(text) for text in texts),
            *_columns(row.difference, full=True),
            *_columns(row.alone, full=False),
            f"{row.ties:,}" if row.differing else "-",
        )
    print_table(console, table)
    for line in _verdict(rows, offender):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _verdict(rows: list[TensorDiff], offender: int | None) -> Iterator[str]:
    """What the rows say, a sentence each."""
    hidden = sum(row.difference is None for row in rows)
    if hidden:
        yield f"{hidden} tensors have no counterpart in the model and are not compared"
    if offender is not None:
        row = rows[offender]
        yield f"first difference: layer {row.layer!r}, tensor {row.tensor!r}"
        yield from explanations(rows)
    elif all(row.difference is None or row.difference.largest == 0 for row in rows):
        yield f"all {len(rows) - hidden} compared tensors are equal"
    else:
        yield IN_WHOLE


def _short(name: str) -> str:
    """The end of a long name, which tells more than its beginning."""
    return name if len(name) <= NAME_WIDTH else f"\u2026{name[1 - NAME_WIDTH :]}"


def _columns(d: Difference | None, *, full: bool) -> list[str]:
    if d is None:
        return ["-"] * (4 if full else 2)
    share = f"{100 * d.equal / d.elements:.3f}"
    return (
        [f"{d.elements:,}", share, str(d.largest), f"{d.mean:.5f}"]
        if full
        else [share, str(d.largest)]
    )


def main(
    model: Annotated[Path, typer.Argument(help="quantised ONNX model")],
    input: InputOption = None,
    seed: SeedOption = 0,
    dim: DimOption = None,
) -> None:
    """Compare every quantised tensor of the golden model with onnxruntime's."""
    console = output_console()
    with one_line_errors():
        dims = parse_dims(dim)
        plan = partition(model, dims=dims)
        arrays = choose_inputs(input, seed, plan.inputs, console)
        rows, values = compare_layers(plan, arrays)
        plain = run_reference(model, arrays)
    show(rows, console)
    changes = [host.compare(values[name], wanted) for name, wanted in plain.items()]
    changed = sum(c.elements - c.equal for c in changes)
    console.print(
        f"exposing the intermediate values changed {changed:,} of "
        f"{sum(c.elements for c in changes):,} elements of onnxruntime's own outputs"
    )
