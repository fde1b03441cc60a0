"""The main job: compile a model, run it on the simulated RTL, compare, report.

python -m sw.run MODEL.onnx [--input X.npz|.npy|.png|.jpg] [--rows R --cols C | --config F.toml]

What the accelerator cannot do runs on the host, in onnxruntime; the report says what and why. Exit
status: 0 all layers equal the golden model, 1 a mismatch, 2 bad input (one sentence on stderr).
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, get_args

import numpy as np
import typer
from rich.console import Console

from systole.isa import Config, ConfigError
from systole.sw.cli.quantize import SAMPLES, parse_dims
from systole.sw.compiler import READ_LATENCY, Optimise, compile_graph
from systole.sw.compiler.partition import AcceleratorSegment, HostSegment, Partition, partition
from systole.sw.files import write_atomically
from systole.sw.frontend.dataflow import run_reference
from systole.sw.frontend.inputs import InputError, random_inputs, read_inputs
from systole.sw.golden import model as golden
from systole.sw.golden import oracle
from systole.sw.ir.graph import ModelError, Port, Tensor
from systole.sw.quantisation.pipeline import QuantisationOptions as Quantisation
from systole.sw.quantisation.pipeline import quantise
from systole.sw.quantisation.prepare import input_shapes, input_types, prepare
from systole.sw.quantisation.samples import Chosen, Preprocessing, read_samples
from systole.sw.report.layers import LayerReport, layers, table, utilisation
from systole.sw.report.timeline import write_timeline
from systole.sw.runtime.device import Device, DeviceError
from systole.sw.runtime.driver import Driver
from systole.sw.runtime.execute import Execution, compare, describe, execute, load, memory_needed
from systole.sw.runtime.program import Program
from systole.sw.session import host
from systole.sw.session.backends import open_device
from systole.sw.session.host import HostOp
from systole.sw.simulate.cycles import predict_layers

SIMULATORS = ("verilator", "icarus", "commands", "model", "golden")
DEVICELESS = ("model", "golden")
"""Run no program: the golden model computes; ``model`` predicts the cycles of every layer."""
CLOCK_MHZ = 200.0


@dataclass
class RunReport:
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
    ort: dict[str, float | None] = field(default_factory=dict)
    """elements, equal, max_abs_diff of the final outputs: in quantised units where the accelerator
    made an output, else (made on the host) in the output's own. The difference is null when shapes
    that depend on values differ, or it is not finite."""
    compile_seconds: float = 0.0
    build_seconds: float | None = None
    sim_seconds: float | None = None
    sim_cycles_per_second: float | None = None
    layers: list[LayerReport] = field(default_factory=list)
    host_ops: list[HostOp] = field(default_factory=list)
    """Operators run on the host, in the order in which they ran."""
    first_mismatch: str | None = None


@dataclass(frozen=True)
class RunOptions:
    """How to run."""

    config: Config
    simulator: str = "verilator"
    read_latency: int = READ_LATENCY
    trace_file: Path | None = None
    waves: Path | None = None
    check_layers: bool = True


def run_model(
    plan: Partition, arrays: dict[str, np.ndarray], options: RunOptions, console: Console
) -> RunReport:
    """Run a model partitioned for ``options.config``, compare. ``arrays``: the model's inputs by
    name, in its own types.

    Raises :class:`ModelError`, :class:`DeviceError`."""
    report = RunReport(plan.path.name, options.config.to_dict(), options.simulator)
    report.compile_seconds = plan.compile_seconds
    with console.status("onnxruntime"):
        reference = run_reference(plan.path, arrays)
    programs = [s.program for s in plan.segments if isinstance(s, AcceleratorSegment)]
    predictions = [predict_layers(p, options.read_latency) for p in programs]
    report.predicted_cycles = sum(p.cycles for p in predictions)
    report.macs = sum(layer.macs for program in programs for layer in program.layers)
    values: dict[str, np.ndarray] = dict(arrays)
    quantised: dict[str, tuple[Port, Tensor, np.ndarray]] = {}
    with _Machine(plan, options, report, console) as machine:
        for segment in plan.segments:
            if isinstance(segment, HostSegment):
                made, ran = host.run(segment, values, len(report.layers))
                values.update(made)
                report.host_ops += ran
                continue
            tensors = machine.run(segment, values)
            for port in segment.graph.outputs:
                tensor, array = segment.graph.tensors[port.tensor], tensors[port.tensor]
                quantised[port.name] = port, tensor, array
                values[port.name] = golden.dequantise_output(port, tensor, array)
        machine.finish()
    if options.simulator == "model":
        predicted = [x for p in predictions for x in p.layers]
        for row, layer in zip(report.layers, predicted, strict=True):
            row.cycles = layer.cycles
            row.utilisation = utilisation(row.macs, layer.cycles, programs[0])
    results = [
        oracle.compare(*quantised[name], wanted)
        if name in quantised
        else host.compare(values[name], wanted)
        for name, wanted in reference.items()
    ]
    differences = [r.max_abs_diff for r in results]
    report.ort = {
        "elements": sum(r.elements for r in results),
        "equal": sum(r.equal for r in results),
        "max_abs_diff": None if None in differences else max(differences),
    }
    return report


class _Machine:
    """The accelerator that runs all of a model's programs, one after the other, and what it
    measures. Without one (``golden``, ``model``) the golden model stands for it."""

    def __init__(self, plan: Partition, options: RunOptions, report: RunReport, console: Console):
        self.options, self.report, self.console = options, report, console
        self.rtl = options.simulator in ("verilator", "icarus")
        segments = [s for s in plan.segments if isinstance(s, AcceleratorSegment)]
        self.checked = {
            id(s): compile_graph(s.graph, options.config, dump=True, schedule=s.schedule)
            for s in segments
            if options.check_layers and options.simulator not in DEVICELESS
        }
        self.programs = [s.program for s in segments]
        self.runs: list[Execution] = []
        self.device: Device | None = None

    def __enter__(self) -> _Machine:
        simulator = self.options.simulator
        if simulator in DEVICELESS:
            return self
        needed = [memory_needed(p) for p in (*self.programs, *self.checked.values())]
        start = time.perf_counter()
        with self.console.status(f"building the {simulator} simulator (once per configuration)"):
            self.device = _open(self.options, -(-max(needed) // 4096) * 4096)
        self.report.build_seconds = time.perf_counter() - start
        return self

    def __exit__(self, *_: object) -> None:
        if self.device is not None:
            self.device.close()

    def run(
        self, segment: AcceleratorSegment, values: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """One segment on arrays by value name: int8 (N, C, H, W) by tensor name. It is compared
        with the golden model on the same inputs; with ``check_layers`` a second run stores every
        layer for that."""
        graph, program, report = segment.graph, segment.program, self.report
        inputs = {
            p.tensor: golden.quantise_input(p, graph.tensors[p.tensor], values[p.name])
            for p in graph.inputs
        }
        with self.console.status("golden model"):
            expected = golden.run(graph, inputs)
        if self.device is None:
            report.layers += layers(program, None, None)
            return expected
        driver = Driver(self.device)
        load(driver, program)
        with self.console.status(f"running on {self.options.simulator}"):
            measured = execute(driver, program, inputs, trace=self.rtl)
        if id(segment) in self.checked:
            checked = self.checked[id(segment)]
            load(driver, checked)
            with self.console.status("running again with every layer stored"):
                second = execute(driver, checked, inputs, trace=False)
            _note_mismatches(report, checked, *compare(checked, second.tensors, expected))
        _note_mismatches(report, program, *compare(program, measured.tensors, expected))
        report.layers += layers(program, measured.events, measured.cycles if self.rtl else None)
        self.runs.append(measured)
        return measured.tensors

    def finish(self) -> None:
        """Totals of all programs, and the timeline."""
        report, runs = self.report, self.runs
        if not runs:
            return
        report.sim_seconds = sum(run.seconds for run in runs)
        if not self.rtl:
            return
        beat = self.options.config.beat_bytes
        report.cycles = sum(run.cycles for run in runs)
        report.utilisation = utilisation(report.macs, report.cycles, self.programs[0])
        report.dram_read_bytes = sum(run.counters["READ_BEATS"] for run in runs) * beat
        report.dram_write_bytes = sum(run.counters["WRITE_BEATS"] for run in runs) * beat
        report.sim_cycles_per_second = report.cycles / report.sim_seconds
        if self.options.trace_file is not None:
            write_timeline(self.options.trace_file, *_joined(self.programs, runs))


def _joined(programs: list[Program], runs: list[Execution]) -> tuple[Program, np.ndarray]:
    """Programs as if they were one, for the timeline; their events one after the other."""
    rows, command_layers, events, cycles = [], [], [], 0
    for program, run in zip(programs, runs, strict=True):
        if run.events is not None:
            part = run.events.copy()
            part["index"] += len(command_layers)
            part["cycle"] += cycles
            events.append(part)
        command_layers += [layer + len(rows) for layer in program.command_layers]
        rows += program.layers
        cycles += run.cycles
    joined = replace(programs[0], layers=rows, command_layers=command_layers)
    return joined, np.concatenate(events) if events else np.zeros(0)


def _open(options: RunOptions, memory_bytes: int) -> Device:
    if options.simulator == "commands":
        return open_device("command", options.config, memory_bytes=memory_bytes)
    from systole.sim.device import MemoryModel

    return open_device(
        options.simulator,
        options.config,
        memory_bytes=memory_bytes,
        memory=MemoryModel(read_latency=options.read_latency),
        waves=options.waves,
    )


def _note_mismatches(report: RunReport, program: Program, count: int, first) -> None:
    report.golden_mismatches += count
    if first is not None and report.first_mismatch is None:
        report.first_mismatch = str(first)
        if first.command is not None:
            report.first_mismatch += f": {describe(program, first.command)}"


def show(report: RunReport, console: Console, clock_mhz: float, latency: int) -> None:
    """Print a report for people."""
    config = report.config
    title = (
        f"{report.model} on {config['rows']}x{config['cols']}, {report.simulator}; memory: "
        f"{config['axi_data_bits']}-bit AXI, one beat a cycle, {latency} cycles read latency"
    )
    rows: list[LayerReport] = list(report.layers)
    for op in reversed(report.host_ops):
        took = {"host us": round(1e6 * op.seconds)}
        row = LayerReport(op.name, f"{op.op} on host", (), 0, stalls=took)
        rows.insert(op.after_layers, row)
    console.print(table(rows, title))
    for op in report.host_ops:
        console.print(f"on the host: {op.op} {op.name!r}: {op.reason}", markup=False)
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
    elif report.simulator not in DEVICELESS:
        console.print("every layer's output equals the golden model")
    ort = report.ort
    difference = "not a number" if ort["max_abs_diff"] is None else ort["max_abs_diff"]
    console.print(
        f"onnxruntime: {ort['equal']:,} of {ort['elements']:,} output elements equal, largest "
        f"difference {difference}"
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
    return Config.sized(cols if rows is None else rows, rows if cols is None else cols)


def check_writable(path: Path | None) -> None:
    """Raises :class:`InputError` unless a file can be made at ``path``."""
    if path is None:
        return
    if path.is_dir():
        raise InputError(f"output {path}: is a folder")
    if not path.absolute().parent.is_dir():
        raise InputError(f"output {path}: its folder does not exist")
    try:
        with tempfile.TemporaryFile(dir=path.absolute().parent):
            pass
    except OSError as e:
        raise InputError(f"output {path}: its folder cannot be written: {e.strerror}") from None


def calibrated(model: Path, samples: Path, dims: Mapping[str, int], folder: Path) -> Path:
    """A float model quantised as ``python -m sw.quantize`` does by default, in ``folder``."""
    prepared = prepare(model, dims)
    found, _ = read_samples(samples, input_shapes(prepared), Preprocessing(), input_types(prepared))
    _, quantised = quantise(prepared, Chosen(found, SAMPLES), Quantisation(dims=dims))
    path = folder / model.name
    path.write_bytes(quantised.SerializeToString())
    return path


def save_programs(plan: Partition, path: Path) -> None:
    """The program file; of a model in several segments NAME.0.EXT, NAME.1.EXT and so on."""
    programs = [s.program for s in plan.segments if isinstance(s, AcceleratorSegment)]
    for i, program in enumerate(programs):
        numbered = path.with_name(f"{path.stem}.{i}{path.suffix}")
        program.save(path if len(programs) == 1 else numbered)


def main(
    model: Annotated[Path, typer.Argument(help="ONNX model; quantised, or with --calibrate")],
    input: Annotated[
        Path | None, typer.Option(help=".npz, .npy, .png or .jpg; else seeded random")
    ] = None,
    rows: Annotated[int | None, typer.Option(help="rows of the array")] = None,
    cols: Annotated[int | None, typer.Option(help="columns of the array")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with a configuration")] = None,
    sim: Annotated[str, typer.Option(help=" | ".join(SIMULATORS))] = "verilator",
    json_file: Annotated[Path | None, typer.Option("--json", help="report as JSON")] = None,
    trace: Annotated[Path | None, typer.Option(help="timeline for ui.perfetto.dev")] = None,
    waves: Annotated[Path | None, typer.Option(help="waveforms (VCD)")] = None,
    seed: Annotated[int, typer.Option(help="of the random input")] = 0,
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
    dim: Annotated[
        list[str] | None, typer.Option(help="bind an open dimension: NAME=N or INPUT:AXIS=N")
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(help="quantise a float model first: .npz, .npy or folder of pictures"),
    ] = None,
) -> None:
    """Compile an ONNX model, run it on the simulated accelerator, compare and report."""
    console, progress = make_console(), Console(stderr=True)
    folder = tempfile.TemporaryDirectory()
    try:
        for name, value, known in (
            ("--sim", sim, SIMULATORS),
            ("--check", check, ("layers", "outputs")),
            ("--optimise", optimise, get_args(Optimise)),
        ):
            if value not in known:
                raise InputError(f"{name} {value}: must be one of {', '.join(known)}")
        for path in (json_file, trace, waves, program_file):
            check_writable(path)
        chosen = choose_config(rows, cols, config)
        dims = parse_dims(dim or [])
        if calibrate is not None:
            with progress.status("quantising the model"):
                model, dims = calibrated(model, calibrate, dims, Path(folder.name)), {}
        with progress.status("loading and compiling the model"):
            plan = partition(
                model, chosen, dims=dims, fallback=fallback, optimise=optimise, read_latency=latency
            )
        if input is None:
            console.print(f"no --input: seeded random input (seed {seed})")
            arrays = random_inputs(plan.inputs, seed)
        else:
            arrays = read_inputs(input, plan.inputs)
        options = RunOptions(chosen, sim, latency, trace, waves, check == "layers")
        report = run_model(plan, arrays, options, progress)
        if program_file is not None:
            save_programs(plan, program_file)
        if json_file is not None:
            write_atomically(json_file, (json.dumps(asdict(report), indent=1) + "\n").encode())
    except (ModelError, ConfigError, InputError, DeviceError) as e:
        progress.print(f"error: {e}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None
    finally:
        folder.cleanup()
    show(report, console, clock_mhz, latency)
    if report.golden_mismatches:
        raise typer.Exit(1)
