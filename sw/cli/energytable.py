"""Writes ``docs/energy.md``: what the networks of the zoo take by the energy model.

python -m sw.cli.energytable [-o FILE]

Compiles the networks; nothing is simulated, for the counts follow from the programs. Exit status: 0
done, 2 bad input (one line on stderr).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from systole.isa import Config
from systole.isa.tools.page import table
from systole.sw.cli.bench import LONG, OUTPUT, SHORT, TINY, predicted, published
from systole.sw.cli.common import check_document, one_line_errors
from systole.sw.cli.start import start_command
from systole.sw.files import write_atomically
from systole.sw.report.energy import (
    DEFAULT,
    PARTS,
    EnergyReport,
    EnergyTable,
    known_tables,
    program_energy,
)
from systole.sw.report.results import Measurement

PAGE = OUTPUT.with_name("energy.md")
INTRODUCTION = """# Energy

Written by `python -m sw.cli.energytable`. **A model, not a measurement**: the accesses of every
memory and the arithmetic, times a table of costs. The counts follow from the program
(`sw/simulate/accesses.py`) and are exact: a test compares them with the ports of the memories in
the simulated RTL, for every operator. The costs are published figures. The model leaves out the
clock tree, wires, control logic, leakage and the host: use it to compare programs and
configurations.

`sw.run` prints the energy of a frame, of every layer (column *uJ*) and where it goes; `--json` has
it by layer and part; `--energy` chooses the table, one of these or a file like theirs in
`sw/report/energy/`.
"""
SHAPES = ((16, 16), (32, 8), (8, 32))
"""Arrays of as many processing elements."""
SHAPED = ("resnet18", "mobilenetv2", "yolov3-tiny")
"""Networks that are shown on each of them."""
SHAPE = """## The shape of the array

Every vector that streams through the array adds to one accumulator for each column. Twice the rows
and half the columns add up twice as many products in the array before, so accumulators take half
the energy. It does not pay for these networks: activations are read again for every 8 columns, and
rows stay unused where there are few input channels. Table of costs: the default.
"""
NETWORKS = """## Networks

Array 16x16, the programs of [performance](performance.md). *TOPS/W*: two operations for each useful
multiply-accumulate. Then the share of each part: *window* has its own arithmetic and line memory,
*control* is the memories in which commands wait.
"""


def rows(results: Iterable[Measurement], costs: EnergyTable) -> Iterator[tuple[str, ...]]:
    """The rows of a table of networks."""
    for r in results:
        energy = program_energy([r.program], costs)
        yield (r.name, f"{energy.total / 1e9:.4f}", f"{energy.tops_per_watt:.2f}", *_shares(energy))


def _shares(energy: EnergyReport) -> Iterator[str]:
    for part in PARTS:
        yield f"{100 * energy.picojoules[part] / energy.total:.1f} %"


def document(results: list[Measurement]) -> str:
    """The page."""
    lines = [INTRODUCTION]
    for name in known_tables():
        lines += _costs(EnergyTable.load(name))
    lines.append(NETWORKS)
    for name in known_tables():
        lines += [f"### {name}", ""]
        head = ("network", "mJ a frame", "TOPS/W", *PARTS)
        lines += table(head, rows(results, EnergyTable.load(name)))
    lines.append(SHAPE)
    lines += _shapes()
    return "\n".join(lines)


def _shapes() -> Iterator[str]:
    """The table of networks on arrays of several shapes."""
    costs = EnergyTable.load(DEFAULT)
    lines = []
    for name in SHAPED:
        graph = published(name)
        for shape in SHAPES:
            r = predicted(name, graph, Config.sized(*shape))
            energy = program_energy([r.program], costs)
            share = 100 * energy.picojoules["accumulators"] / energy.total
            cells = f"{energy.total / 1e9:.3f}", f"{share:.1f} %", f"{energy.tops_per_watt:.2f}"
            lines.append((name, "{}x{}".format(*shape), f"{r.predicted.cycles:,}", *cells))
    head = ("network", "rows x columns", "cycles", "mJ a frame", "accumulators", "TOPS/W")
    yield from table(head, lines)


def _costs(costs: EnergyTable) -> Iterator[str]:
    """A section on a table of costs."""
    star = " (the default)" if costs.name == DEFAULT else ""
    yield f"## Costs: {costs.name}{star}"
    yield ""
    yield f"{costs.description}. {costs.source}"
    yield ""
    operations = [
        ("product of two int8", costs.multiply),
        ("sum of two int8", costs.add_8),
        ("sum of two int32", costs.add_32),
        ("requantisation", costs.requantise),
        ("combination of two operands", costs.combine),
        *((f"64 bits of a memory of {size:,} bytes", cost) for size, cost in costs.sram),
        ("a bit of DRAM", costs.dram_bit),
    ]
    yield from table(("operation", "pJ"), ((name, f"{cost:g}") for name, cost in operations))


def main(
    output: Annotated[Path, typer.Option("--output", "-o", help="file to write")] = PAGE,
) -> None:
    """Write docs/energy.md."""
    with one_line_errors():
        check_document(output)
        results = [measurement(name) for name in (*SHORT, *LONG)]
        write_atomically(output, document(results).encode())


def measurement(name: str) -> Measurement:
    """A network as ``docs/performance.md`` has it, compiled."""
    return predicted(name, published(name), Config(), "best" if name in TINY else "fast")


if __name__ == "__main__":
    start_command("energytable")
