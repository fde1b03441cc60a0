"""The main job: compile a model, run it on the simulated RTL, compare, report.

python -m sw.run MODEL.onnx [--input X.npz|.npy|.png|.jpg] [--rows R --cols C | --config F.toml]
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from isa import Config, ConfigError
from sw import golden, oracle
from sw.compiler import compile_graph
from sw.cyclemodel import predict
from sw.device import DeviceError, open_device
from sw.driver import Driver
from sw.execute import Execution, compare, describe, execute, load, memory_needed
from sw.files import write_atomically
from sw.graph import Graph, ModelError
from sw.inputs import InputError, random_inputs, read_inputs
from sw.load import load as load_model
from sw.program import Program
from sw.report import LayerReport, layers, table, utilisation
from sw.timeline import write_timeline

SIMULATORS = ("verilator", "icarus", "commands", "golden")
READ_LATENCY = 64
CLOCK_MHZ = 200.0


@dataclass
class Report:
    """What ``--json`` writes; keys are stable. Null: not measured by this simulator."""

    model: str
    config: dict[str, Any]
    simulator: str
    cycles: int | None = None
    macs: int = 0
    utilisation: float | None = None
    predicted_cycles: int | None = None
    dram_read_bytes: int | None = None
    """All AXI read beats: activations, weights and commands."""
    dram_write_bytes: int | None = None
    golden_mismatches: int = 0
    """Elements, over all layers."""
    ort: dict[str, int] = field(default_factory=dict)
    """elements, equal, max_abs_diff of the final outputs, in quantised units."""
    compile_seconds: float = 0.0
    build_seconds: float | None = None
    sim_seconds: float | None = None
    sim_cycles_per_second: float | None = None
    layers: list[LayerReport] = field(default_factory=list)
    host_ops: list[dict[str, Any]] = field(default_factory=list)
    """Operators run on the host: always empty, the accelerator takes all or the model is
    refused."""
    first_mismatch: str | None = None


@dataclass(frozen=True)
class Options:
    """How to run."""

    config: Config
    simulator: str = "verilator"
    read_latency: int = READ_LATENCY
    trace_file: Path | None = None
    waves: Path | None = None
    check_layers: bool = True


def run_model(
    model: Path, graph: Graph, arrays: dict[str, np.ndarray], options: Options, console: Console
) -> Report:
    """Compile, run, compare. ``arrays``: the model's inputs by name, in its own types.

    Raises :class:`ModelError`, :class:`DeviceError`."""
    report = Report(model.name, options.config.to_dict(), options.simulator)
    inputs = {
        p.tensor: golden.quantise_input(p, graph.tensors[p.tensor], arrays[p.name])
        for p in graph.inputs
    }
    with console.status("golden model and onnxruntime"):
        expected = golden.run(graph, inputs)
        reference = oracle.run(model, arrays)
    with console.status("compiling"):
        start = time.perf_counter()
        program = compile_graph(graph, options.config)
        timings = predict(program, read_latency=options.read_latency)
        report.compile_seconds = time.perf_counter() - start
    report.predicted_cycles = timings[-1].end if timings else 0
    report.macs = sum(layer.macs for layer in program.layers)
    if options.simulator == "golden":
        tensors = expected
        report.layers = layers(program, None, None)
    else:
        tensors = _simulate(program, graph, inputs, expected, report, options, console)
    _compare_outputs(graph, tensors, reference, report)
    return report


def _open(options: Options, memory_bytes: int):
    if options.simulator == "commands":
        return open_device("command", options.config, memory_bytes=memory_bytes)
    from sim.device import MemoryModel

    return open_device(
        options.simulator,
        options.config,
        memory_bytes=memory_bytes,
        memory=MemoryModel(read_latency=options.read_latency),
        waves=options.waves,
    )


def _simulate(
    program: Program,
    graph: Graph,
    inputs: dict[str, np.ndarray],
    expected: dict[str, np.ndarray],
    report: Report,
    options: Options,
    console: Console,
) -> dict[str, np.ndarray]:
    """The measured run; then, with ``check_layers``, a second one that stores every layer."""
    rtl = options.simulator in ("verilator", "icarus")
    checked = compile_graph(graph, options.config, dump=True) if options.check_layers else program
    memory = -(-max(memory_needed(program), memory_needed(checked)) // 4096) * 4096
    start = time.perf_counter()
    with console.status(f"building the {options.simulator} simulator (once per configuration)"):
        device = _open(options, memory)
    report.build_seconds = time.perf_counter() - start
    with device:
        driver = Driver(device)
        load(driver, program)
        with console.status(f"running on {options.simulator}"):
            measured = execute(driver, program, inputs, trace=rtl)
        if options.check_layers:
            load(driver, checked)
            with console.status("running again with every layer stored"):
                second = execute(driver, checked, inputs, trace=False)
            count, first = compare(checked, second.tensors, expected)
            _note_mismatches(report, checked, count, first)
        count, first = compare(program, measured.tensors, expected)
        _note_mismatches(report, program, count, first)
    _note_measurements(report, program, measured, rtl)
    if options.trace_file is not None and measured.events is not None:
        write_timeline(options.trace_file, program, measured.events)
    return measured.tensors


def _note_mismatches(report: Report, program: Program, count: int, first) -> None:
    report.golden_mismatches += count
    if first is not None and report.first_mismatch is None:
        report.first_mismatch = str(first)
        if first.command is not None:
            report.first_mismatch += f": {describe(program, first.command)}"


def _note_measurements(report: Report, program: Program, run: Execution, rtl: bool) -> None:
    report.layers = layers(program, run.events, run.cycles if rtl else None)
    report.sim_seconds = run.seconds
    if not rtl:
        return
    beat = program.config.beat_bytes
    report.cycles = run.cycles
    report.utilisation = utilisation(report.macs, run.cycles, program)
    report.dram_read_bytes = run.counters["READ_BEATS"] * beat
    report.dram_write_bytes = run.counters["WRITE_BEATS"] * beat
    report.sim_cycles_per_second = run.cycles / run.seconds


def _compare_outputs(
    graph: Graph,
    tensors: dict[str, np.ndarray],
    reference: dict[str, np.ndarray],
    report: Report,
) -> None:
    results = [
        oracle.compare(p, graph.tensors[p.tensor], tensors[p.tensor], reference[p.name])
        for p in graph.outputs
    ]
    report.ort = {
        "elements": sum(r.elements for r in results),
        "equal": sum(r.equal for r in results),
        "max_abs_diff": max(r.max_abs_diff for r in results),
    }


def show(report: Report, console: Console, clock_mhz: float, latency: int) -> None:
    """Print a report for people."""
    config = report.config
    title = (
        f"{report.model} on {config['rows']}x{config['cols']}, {report.simulator}; memory: "
        f"{config['axi_data_bits']}-bit AXI, one beat a cycle, {latency} cycles read latency"
    )
    console.print(table(report.layers, title))
    parts = [f"MACs {report.macs:,}"]
    if report.cycles:
        parts += [
            f"cycles {report.cycles:,} (predicted {report.predicted_cycles:,})",
            f"utilisation {100 * report.utilisation:.1f} %",
            f"{1e6 * clock_mhz / report.cycles:,.1f} frames/s at {clock_mhz:g} MHz",
            f"DRAM read {report.dram_read_bytes:,} B, written {report.dram_write_bytes:,} B",
        ]
    else:
        parts.append(f"predicted cycles {report.predicted_cycles:,}")
    console.print("; ".join(parts))
    times = [f"compile {report.compile_seconds:.2f} s"]
    if report.build_seconds is not None:
        times.append(f"simulator ready in {report.build_seconds:.2f} s")
    if report.sim_seconds is not None:
        times.append(f"simulation {report.sim_seconds:.2f} s")
    if report.sim_cycles_per_second:
        times.append(f"{report.sim_cycles_per_second:,.0f} cycles/s")
    console.print("; ".join(times))
    if report.golden_mismatches:
        console.print(
            f"[red]MISMATCH[/red]: {report.golden_mismatches} elements differ from the golden model"
        )
        console.print(f"first: {report.first_mismatch}", markup=False)
    elif report.simulator != "golden":
        console.print("every layer's output equals the golden model")
    ort = report.ort
    console.print(
        f"onnxruntime: {ort['equal']:,} of {ort['elements']:,} output elements equal, largest "
        f"difference {ort['max_abs_diff']}"
    )


def make_console() -> Console:
    """Standard output, wide enough for the table when it is not a terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=150)


def choose_config(rows: int | None, cols: int | None, file: Path | None) -> Config:
    """From the command line's options. Raises :class:`ConfigError`."""
    if file is not None:
        if rows is not None or cols is not None:
            raise ConfigError("--config and --rows/--cols exclude each other")
        return Config.from_toml(file)
    if rows is None and cols is None:
        return Config()
    return Config.sized(rows or cols or 0, cols or rows or 0)


def main(
    model: Annotated[Path, typer.Argument(help="quantised ONNX model")],
    input: Annotated[
        Path | None, typer.Option(help=".npz, .npy, .png or .jpg; else seeded random")
    ] = None,
    rows: Annotated[int | None, typer.Option(help="rows of the array")] = None,
    cols: Annotated[int | None, typer.Option(help="columns of the array")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with a configuration")] = None,
    sim: Annotated[str, typer.Option(help=" | ".join(SIMULATORS))] = "verilator",
    json_file: Annotated[Path | None, typer.Option("--json", help="report as JSON")] = None,
    trace: Annotated[Path | None, typer.Option(help="timeline for ui.perfetto.dev")] = None,
    waves: Annotated[Path | None, typer.Option(help="waveforms (FST)")] = None,
    seed: Annotated[int, typer.Option(help="of the random input")] = 0,
    latency: Annotated[int, typer.Option(min=1, help="memory read latency, cycles")] = READ_LATENCY,
    clock_mhz: Annotated[float, typer.Option(min=0.001, help="clock for frames/s")] = CLOCK_MHZ,
    check: Annotated[
        str, typer.Option(help="layers: a second run stores and compares every layer | outputs")
    ] = "layers",
    program_file: Annotated[
        Path | None, typer.Option("--program", help="also write the program file")
    ] = None,
) -> None:
    """Compile a quantised ONNX model, run it on the simulated accelerator, compare and report."""
    console, progress = make_console(), Console(stderr=True)
    try:
        for name, value, known in (
            ("--sim", sim, SIMULATORS),
            ("--check", check, ("layers", "outputs")),
        ):
            if value not in known:
                raise InputError(f"{name} {value}: must be one of {', '.join(known)}")
        for path in (json_file, trace, waves, program_file):
            if path is not None and not path.absolute().parent.is_dir():
                raise InputError(f"output {path}: its folder does not exist")
        chosen = choose_config(rows, cols, config)
        with progress.status("loading the model"):
            graph = load_model(model)
        if input is None:
            progress.print(f"no --input: seeded random input (seed {seed})")
            arrays = random_inputs(graph, seed)
        else:
            arrays = read_inputs(input, graph)
        options = Options(chosen, sim, latency, trace, waves, check == "layers")
        report = run_model(model, graph, arrays, options, progress)
        if program_file is not None:
            compile_graph(graph, chosen).save(program_file)
    except (ModelError, ConfigError, InputError, DeviceError) as e:
        progress.print(f"error: {e}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None
    if json_file is not None:
        write_atomically(json_file, (json.dumps(asdict(report), indent=1) + "\n").encode())
    show(report, console, clock_mhz, latency)
    if report.golden_mismatches:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
