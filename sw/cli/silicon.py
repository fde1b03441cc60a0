"""Measures area and clock by synthesis, and writes ``docs/silicon.md``.

python -m sw.silicon            # measure what is stale, write the page
python -m sw.silicon --page     # only write the page from the results kept
python -m sw.silicon --check    # only compare the page with them; exit 1 if it differs
python -m sw.silicon --stale    # only say which results are of another RTL than today's
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import onnx
import typer

from systole.hw.synthesis.kept import BEFORE, PATH
from systole.hw.synthesis.results import LANE_MACHINES, Store, measure, plan
from systole.hw.synthesis.yosys import ToolError
from systole.hw.verilog import GenerateError
from systole.isa import Config
from systole.isa.tools.page import CheckOption, write_page
from systole.sw.cli.bench import OUTPUT as PERFORMANCE
from systole.sw.cli.common import MISMATCH, check_document
from systole.sw.compiler import READ_LATENCY, compile_graph
from systole.sw.files import write_atomically
from systole.sw.frontend.load import load
from systole.sw.ir.graph import ModelError
from systole.sw.report import silicon
from systole.sw.simulate.cycles import predict_layers
from systole.sw.zoo import build

OUTPUT = PERFORMANCE.with_name("silicon.md")
NETWORKS = ("resnet8", "dscnn-kws", "mobilenetv1-0.25-vww", "autoencoder-ad")
"""Those of MLPerf Tiny, by which options are compared."""
LARGER = ("mobilenetv2", "mobilenetv3-small", "resnet18")
"""Those that larger machines are compared by, too."""


def main(
    page: Annotated[bool, typer.Option("--page", help="only write the page")] = False,
    check: CheckOption = False,
    stale: Annotated[
        bool, typer.Option("--stale", help="only list results of another RTL; exit 1 if any")
    ] = False,
    only: Annotated[str, typer.Option(help="measure only what has this in its label")] = "",
) -> None:
    """Measure what has changed, and write docs/silicon.md."""
    check_document(OUTPUT)
    store = Store(PATH)
    if not (page or check) and _measure(store, only, only_check=stale) and stale:
        raise typer.Exit(MISMATCH)
    if not stale:
        before = Store(BEFORE)
        write_page(OUTPUT, silicon.document(before, store), silicon.MODULE, check=check)
        if not check:
            write_atomically(OUTPUT.with_name(silicon.AREA), silicon.draw(before, store))


def _measure(store: Store, only: str, *, only_check: bool) -> int:
    """Measure what is stale, or only say so; returns how many were."""
    count = 0
    for job in plan():
        if only not in job.label:
            continue
        try:
            changed = measure(job, store, only_check=only_check)
        except (GenerateError, ToolError) as e:
            typer.echo(f"{job.label}: not measured: {e}", err=True)
            continue
        # These change with compiler and cycle model, too, and take seconds.
        if not only_check and job.block == "chip" and job.target == "cells":
            store.extend(job, {"cycles": _predicted_cycles(job.config)})
        count += changed
        if changed:
            typer.echo(f"{job.label}: {'stale' if only_check else 'measured'}")
    for job in () if only_check else LANE_MACHINES:
        if only in job.label:
            cycles = _predicted_cycles(job.config, (*NETWORKS, *LARGER))
            store.add(job, key="", rtl="", figures={"cycles": cycles, "seconds": 0})
    return count


def _predicted_cycles(config: Config, networks: Iterable[str] = NETWORKS) -> dict[str, int]:
    """What the cycle model predicts for each of ``networks``; without those that need what the
    configuration does not have."""
    cycles = {}
    with tempfile.TemporaryDirectory() as directory:
        for name in networks:
            path = Path(directory) / f"{name}.onnx"
            onnx.save(build(name), path)
            try:
                program = compile_graph(load(path), config)
            except ModelError:
                continue
            cycles[name] = predict_layers(program, READ_LATENCY).cycles
    return cycles
