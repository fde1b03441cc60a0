"""The main job: compile a model, run it on the simulated RTL, compare, report.

    systole run MODEL.onnx --samples X.npz [--float FLOAT.onnx] [--sim golden]
    systole run MODEL.onnx [--input X.npz|.npy|.png|.jpg] [--rows R --cols C | --config F.toml]

What the accelerator cannot do runs on the host, in onnxruntime; the report says what and why. Exit
status: 0 all layers equal the golden model, 1 a mismatch, 2 bad input (one line on stderr).
"""

from __future__ import annotations

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
    LayoutOption,
    MeanOption,
    RowsOption,
    SeedOption,
    StdOption,
    check_choice,
    check_outputs,
    choose_config,
    choose_inputs,
    one_line_errors,
    output_console,
    parse_dims,
    parse_numbers,
    progress_console,
    shown_progress,
    write_json,
)
from systole.sw.cli.show_run import show, show_accuracy
from systole.sw.compiler import READ_LATENCY, Optimise
from systole.sw.files import arrays_file, write_atomically
from systole.sw.frontend.inputs import InputError
from systole.sw.frontend.load import PASS_NAMES
from systole.sw.ir.graph import Graph
from systole.sw.ir.text import render
from systole.sw.quantisation.samples import Preprocessing, read_labels
from systole.sw.report.energy import DEFAULT, EnergyTable, known_tables
from systole.sw.session.run import SIMULATORS

CHECKS = ("layers", "outputs")

ModelArgument = Annotated[Path, typer.Argument(help="ONNX model; quantised, or with --calibrate")]
SimulatorOption = Annotated[str, typer.Option(help=" | ".join(SIMULATORS))]
TraceOption = Annotated[Path | None, typer.Option(help="timeline for ui.perfetto.dev")]
WavesOption = Annotated[Path | None, typer.Option(help="waveforms (VCD)")]
LatencyOption = Annotated[int, typer.Option(min=1, help="memory read latency, cycles")]
ClockOption = Annotated[
    float | None,
    typer.Option(min=0.001, help="clock to assume; without it, what synthesis reached"),
]
EnergyOption = Annotated[
    str, typer.Option(help=f"costs of operations: {' | '.join(known_tables())} | a TOML file")
]
CheckOption = Annotated[
    str, typer.Option(help="layers: a second run stores and compares every layer | outputs")
]
ProgramOption = Annotated[
    Path | None,
    typer.Option("--program", help="also write the program file (of several: NAME.0.EXT ...)"),
]
OptimiseOption = Annotated[
    str, typer.Option(help="search for a schedule: fast (by estimate) | best (minutes)")
]
FallbackOption = Annotated[
    bool,
    typer.Option(
        "--fallback/--no-fallback", help="whether the host runs what the accelerator cannot"
    ),
]
OutputsOption = Annotated[
    Path | None, typer.Option(help="also write the outputs, by name, as .npz")
]
DumpOption = Annotated[
    str | None, typer.Option(help=f"print the graph after a pass: {' | '.join(PASS_NAMES)}")
]
SamplesOption = Annotated[
    Path | None,
    typer.Option(help="measure the accuracy on an .npz of samples (x) and labels (y) instead"),
]
LabelsOption = Annotated[
    Path | None, typer.Option(help="with --samples: .npy, .csv or .txt with a class per sample")
]
FloatOption = Annotated[
    Path | None, typer.Option("--float", help="with --samples: the float model to compare with")
]
CalibrateOption = Annotated[
    Path | None,
    typer.Option(help="quantise a float model first: .npz, .npy or folder of pictures"),
]


def _check_choices(sim: str, check: str, optimise: str, dump_after: str | None) -> None:
    """Raises :class:`InputError` for a value that its option does not have."""
    check_choice("--sim", sim, SIMULATORS)
    check_choice("--check", check, CHECKS)
    check_choice("--optimise", optimise, get_args(Optimise))
    check_choice("--dump-after", dump_after or PASS_NAMES[0], PASS_NAMES)


def _preprocessing(mean: str, std: str, layout: str | None) -> Preprocessing:
    means, deviations = parse_numbers("--mean", mean), parse_numbers("--std", std)
    return Preprocessing(mean=means, std=deviations, layout=layout)


ONE_RUN = (
    *("input", "trace", "waves", "program_file", "output"),
    *("seed", "check", "clock_mhz", "energy"),
)
"""Parameters of a run on one input, without a meaning for ``--samples``."""
WITH_SAMPLES = ("float_model", "labels")
"""Parameters that mean something with ``--samples`` only."""


def _check_samples(ctx: typer.Context) -> None:
    """Raises :class:`InputError` for given options that do not go with ``--samples``, or not
    without."""
    options = {p.name: p.opts[0] for p in ctx.command.params}

    def those(names: Iterable[str]) -> str:
        sources = {name: ctx.get_parameter_source(name) for name in names}
        given = (n for n, source in sources.items() if source and source.name == "COMMANDLINE")
        return ", ".join(options[n] for n in given)

    if ctx.params["samples"] is None:
        if wrong := those(WITH_SAMPLES):
            raise InputError(f"{wrong} goes with --samples only")
    elif wrong := those(ONE_RUN):
        raise InputError(f"{wrong}: of one run, and --samples makes many")


def _measure(
    compiled: api.CompiledModel,
    samples: Path,
    labels: Path | None,
    *,
    sim: str,
    float_model: Path | None,
    preprocessing: Preprocessing,
    json_file: Path | None,
) -> None:
    """Measure the accuracy on labelled samples, and show it."""
    result = api.accuracy(
        compiled,
        samples,
        None if labels is None else read_labels(labels),
        simulator=sim,
        float_model=float_model,
        preprocessing=preprocessing,
        progress=shown_progress(progress_console()),
    )
    write_json(asdict(result), json_file)
    show_accuracy(result, output_console())


def _write_outputs(outputs: Mapping[str, np.ndarray], path: Path | None) -> None:
    if path is not None:
        write_atomically(path, arrays_file(outputs))


def _show_graphs(graphs: Iterable[Graph], console: Console) -> None:
    for graph in graphs:
        console.print(render(graph), markup=False, highlight=False, soft_wrap=True, end="")


def main(
    ctx: typer.Context,
    model: ModelArgument,
    input: InputOption = None,
    rows: RowsOption = None,
    cols: ColsOption = None,
    config: ConfigOption = None,
    sim: SimulatorOption = "verilator",
    json_file: JsonOption = None,
    trace: TraceOption = None,
    waves: WavesOption = None,
    seed: SeedOption = 0,
    latency: LatencyOption = READ_LATENCY,
    clock_mhz: ClockOption = None,
    energy: EnergyOption = DEFAULT,
    check: CheckOption = "layers",
    program_file: ProgramOption = None,
    optimise: OptimiseOption = "fast",
    fallback: FallbackOption = True,
    dim: DimOption = None,
    output: OutputsOption = None,
    dump_after: DumpOption = None,
    calibrate: CalibrateOption = None,
    mean: MeanOption = "0",
    std: StdOption = "1",
    layout: LayoutOption = None,
    samples: SamplesOption = None,
    labels: LabelsOption = None,
    float_model: FloatOption = None,
) -> None:
    """Compile an ONNX model, run it on the simulated accelerator, compare and report."""
    console, progress = output_console(), progress_console()
    with one_line_errors():
        _check_choices(sim, check, optimise, dump_after)
        EnergyTable.load(energy)
        preprocessing = _preprocessing(mean, std, layout)
        _check_samples(ctx)
        check_outputs(json_file, trace, waves, program_file, output)
        compiled = api.compile(
            model,
            choose_config(rows, cols, config),
            dims=parse_dims(dim),
            calibration=calibrate,
            fallback=fallback,
            optimise=cast(Optimise, optimise),
            read_latency=latency,
            progress=shown_progress(progress),
        )
        _show_graphs(compiled.graphs_after(dump_after) if dump_after else (), console)
        if samples is not None:
            _measure(
                compiled,
                samples,
                labels,
                sim=sim,
                float_model=float_model,
                preprocessing=preprocessing,
                json_file=json_file,
            )
            return
        arrays = choose_inputs(input, seed, compiled.partition.inputs, console)
        report, outputs = api.run(
            compiled,
            arrays,
            preprocessing=preprocessing if input is not None else None,
            simulator=sim,
            check_layers=check == "layers",
            trace_file=trace,
            waves=waves,
            clock_mhz=clock_mhz,
            energy_table=energy,
            progress=shown_progress(progress),
        )
        if program_file is not None:
            compiled.save(program_file)
        _write_outputs(outputs, output)
        write_json(asdict(report), json_file)
    show(report, console, latency)
    if report.golden_mismatches:
        raise typer.Exit(MISMATCH)
