"""The main job: compile a model, run it on the simulated RTL, compare, report.

    systole run MODEL.onnx [--input X.npz|.npy|.png|.jpg] [--rows R --cols C | --config F.toml]

What the accelerator cannot do runs on the host, in onnxruntime; the report says what and why. Exit
status: 0 all layers equal the golden model, 1 a mismatch, 2 bad input (one line on stderr).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, cast, get_args

import numpy as np
import typer
from rich.console import Console

from systole import api
from systole.sw.cli.common import (
    MISMATCH,
    ColsOption,
    ConfigOption,
    DimOption,
    InputOption,
    JsonOption,
    RowsOption,
    SeedOption,
    check_choice,
    check_writable,
    choose_config,
    choose_inputs,
    one_line_errors,
    output_console,
    parse_dims,
    progress_console,
)
from systole.sw.compiler import READ_LATENCY, Optimise
from systole.sw.files import arrays_file, write_atomically
from systole.sw.frontend.load import PASS_NAMES
from systole.sw.ir.graph import Graph
from systole.sw.ir.text import render
from systole.sw.report.layers import LayerReport, table
from systole.sw.session.run import DEVICELESS, MOST_STEPS, SIMULATORS, RunReport

CLOCK_MHZ = 200.0
CHECKS = ("layers", "outputs")


def show(report: RunReport, console: Console, clock_mhz: float, latency: int) -> None:
    """Print a report for people."""
    console.print(table(_rows(report), _title(report, latency)))
    for op in report.host_ops:
        console.print(f"on the host: {op.op} {op.name!r}: {op.reason}", markup=False)
    console.print("; ".join(_totals(report, clock_mhz)))
    console.print("; ".join(_times(report)))
    if report.golden_mismatches:
        console.print(
            f"[red]MISMATCH[/red]: {report.golden_mismatches} elements differ from the golden model"
        )
        console.print(f"first: {report.first_mismatch}", markup=False)
    elif report.simulator not in DEVICELESS:
        console.print("every layer's output equals the golden model")
    console.print(f"onnxruntime: {_equality(report.ort)}")
    if report.graph != report.ort:
        console.print(f"the graph as written, without fused kernels: {_equality(report.graph)}")
    if (report.kernels_off_by or 0) > MOST_STEPS:
        console.print(
            f"onnxruntime's optimiser changes this model's outputs by up to "
            f"{report.kernels_off_by:,.0f} steps: the graph as written is right"
        )


def _equality(compared: Mapping[str, float | None]) -> str:
    worst = compared["max_abs_diff"]
    return (
        f"{compared['equal']:,} of {compared['elements']:,} output elements equal, largest "
        f"difference {'not a number' if worst is None else worst}"
    )


def _write_report(report: RunReport, path: Path | None) -> None:
    if path is not None:
        write_atomically(path, (json.dumps(asdict(report), indent=1) + "\n").encode())


def _write_outputs(outputs: Mapping[str, np.ndarray], path: Path | None) -> None:
    if path is not None:
        write_atomically(path, arrays_file(outputs))


def _show_graphs(graphs: Iterable[Graph], console: Console) -> None:
    for graph in graphs:
        console.print(render(graph), markup=False, highlight=False, soft_wrap=True, end="")


def _title(report: RunReport, latency: int) -> str:
    config = report.config
    return (
        f"{report.model} on {config['rows']}x{config['cols']}, {report.simulator}; memory: "
        f"{config['axi_data_bits']}-bit AXI, one beat a cycle, {latency} cycles read latency"
    )


def _rows(report: RunReport) -> list[LayerReport]:
    """The accelerator's layers, and between them the host's operators."""
    rows = list(report.layers)
    for op in reversed(report.host_ops):
        microseconds = {"host us": round(1e6 * op.seconds)}
        row = LayerReport(op.name, f"{op.op} on host", (), 0, stalls=microseconds)
        rows.insert(op.after_layers, row)
    return rows


def _totals(report: RunReport, clock_mhz: float) -> list[str]:
    parts = [f"MACs {report.macs:,}"]
    if not report.cycles:
        return [*parts, f"predicted cycles {report.predicted_cycles:,}"]
    return [
        *parts,
        f"cycles {report.cycles:,} (predicted {report.predicted_cycles:,})",
        f"utilisation {100 * (report.utilisation or 0):.1f} %",
        f"{1e6 * clock_mhz / report.cycles:,.1f} frames/s at {clock_mhz:g} MHz",
        f"DRAM read {report.dram_read_bytes:,} B, written {report.dram_write_bytes:,} B",
    ]


def _times(report: RunReport) -> list[str]:
    times = [f"compile {report.compile_seconds:.2f} s"]
    if report.build_seconds is not None:
        times.append(f"simulator ready in {report.build_seconds:.2f} s")
    if report.sim_seconds is not None:
        times.append(f"simulation {report.sim_seconds:.2f} s")
    if report.sim_cycles_per_second:
        times.append(f"{report.sim_cycles_per_second:,.0f} cycles/s")
    return times


def main(
    model: Annotated[Path, typer.Argument(help="ONNX model; quantised, or with --calibrate")],
    input: InputOption = None,
    rows: RowsOption = None,
    cols: ColsOption = None,
    config: ConfigOption = None,
    sim: Annotated[str, typer.Option(help=" | ".join(SIMULATORS))] = "verilator",
    json_file: JsonOption = None,
    trace: Annotated[Path | None, typer.Option(help="timeline for ui.perfetto.dev")] = None,
    waves: Annotated[Path | None, typer.Option(help="waveforms (VCD)")] = None,
    seed: SeedOption = 0,
    latency: Annotated[int, typer.Option(min=1, help="memory read latency, cycles")] = READ_LATENCY,
    clock_mhz: Annotated[float, typer.Option(min=0.001, help="clock for frames/s")] = CLOCK_MHZ,
    check: Annotated[
        str, typer.Option(help="layers: a second run stores and compares every layer | outputs")
    ] = "layers",
    program_file: Annotated[
        Path | None,
        typer.Option("--program", help="also write the program file (of several: NAME.0.EXT ...)"),
    ] = None,
    optimise: Annotated[
        str, typer.Option(help="search for a schedule: fast (by estimate) | best (minutes)")
    ] = "fast",
    fallback: Annotated[
        bool,
        typer.Option(
            "--fallback/--no-fallback", help="whether the host runs what the accelerator cannot"
        ),
    ] = True,
    dim: DimOption = None,
    output: Annotated[
        Path | None, typer.Option(help="also write the outputs, by name, as .npz")
    ] = None,
    dump_after: Annotated[
        str | None,
        typer.Option(help=f"print the graph after a pass: {' | '.join(PASS_NAMES)}"),
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(help="quantise a float model first: .npz, .npy or folder of pictures"),
    ] = None,
) -> None:
    """Compile an ONNX model, run it on the simulated accelerator, compare and report."""
    console, progress = output_console(), progress_console()
    with one_line_errors():
        check_choice("--sim", sim, SIMULATORS)
        check_choice("--check", check, CHECKS)
        check_choice("--optimise", optimise, get_args(Optimise))
        check_choice("--dump-after", dump_after or PASS_NAMES[0], PASS_NAMES)
        for path in (json_file, trace, waves, program_file, output):
            check_writable(path)
        compiled = api.compile(
            model,
            choose_config(rows, cols, config),
            dims=parse_dims(dim),
            calibration=calibrate,
            fallback=fallback,
            optimise=cast(Optimise, optimise),
            read_latency=latency,
            progress=progress.status,
        )
        _show_graphs(compiled.graphs_after(dump_after) if dump_after else (), console)
        report, outputs = api.run(
            compiled,
            choose_inputs(input, seed, compiled.partition.inputs, console),
            simulator=sim,
            check_layers=check == "layers",
            trace_file=trace,
            waves=waves,
            progress=progress.status,
        )
        if program_file is not None:
            compiled.save(program_file)
        _write_outputs(outputs, output)
        _write_report(report, json_file)
    show(report, console, clock_mhz, latency)
    if report.golden_mismatches:
        raise typer.Exit(MISMATCH)
