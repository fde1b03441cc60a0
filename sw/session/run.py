"""A whole model on a device: run, compared with the golden model and onnxruntime, and reported."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from systole.isa import Config
from systole.sw.compiler import READ_LATENCY, compile_graph
from systole.sw.compiler.partition import AcceleratorSegment, Partition
from systole.sw.frontend.dataflow import run_reference
from systole.sw.golden import model as golden
from systole.sw.golden import oracle
from systole.sw.golden.oracle import Comparison
from systole.sw.report.layers import LayerReport, layers, predicted_layers, utilisation
from systole.sw.report.timeline import write_timeline
from systole.sw.runtime.device import Device, DeviceError
from systole.sw.runtime.driver import Driver
from systole.sw.runtime.execute import (
    Divergence,
    Execution,
    compare,
    describe,
    execute,
    load,
    memory_needed,
)
from systole.sw.runtime.program import Layer, Program
from systole.sw.session import host
from systole.sw.session.backends import open_device
from systole.sw.session.host import HostOp
from systole.sw.session.segments import Trail, follow
from systole.sw.simulate.commands import CommandDevice
from systole.sw.simulate.cycles import Prediction, predict_layers

SIMULATORS = ("verilator", "icarus", "commands", "model", "golden")
"""What can execute a model: the RTL in two simulators, the command-level simulator, the golden
model with predicted cycles, the golden model alone."""
DEVICELESS = ("model", "golden")
"""Those that run no program: the golden model computes."""
MOST_STEPS = 2
"""Steps by which rounding may part the integer kernels from the graph as written."""
RTL = ("verilator", "icarus")
"""Those that simulate the hardware, and so measure its cycles."""

Progress = Callable[[str], AbstractContextManager[object]]
"""Called with what is being done; the context that it returns lasts as long as that."""


def silent(_: str) -> AbstractContextManager[object]:
    """The :data:`Progress` that shows nothing."""
    return nullcontext()


@dataclass
class RunReport:
    """What a run measured, and what ``--json`` writes; keys are stable. None: not measured by this
    simulator."""

    model: str
    """File name of the model."""
    config: dict[str, Any]
    """The fields of the configuration."""
    simulator: str
    cycles: int | None = None
    """From start to done, summed over the model's programs."""
    macs: int = 0
    """Useful multiply-accumulates on the accelerator."""
    utilisation: float | None = None
    """``macs / (rows * cols * cycles)``."""
    predicted_cycles: int | None = None
    """``cycles`` by the cycle model."""
    dram_read_bytes: int | None = None
    """All AXI read beats: activations, weights and commands."""
    dram_write_bytes: int | None = None
    golden_mismatches: int = 0
    """Elements that differ from the golden model, over all layers."""
    ort: dict[str, float | None] = field(default_factory=dict)
    """elements, equal, max_abs_diff of the final outputs: in quantised units where the accelerator
    made an output, else (made on the host) in the output's own. The difference is null when shapes
    that depend on values differ, or it is not finite."""
    graph: dict[str, float | None] = field(default_factory=dict)
    """The same, compared with the graph as it is written: every operator between DequantizeLinear
    and QuantizeLinear in float32. ``ort`` is compared with onnxruntime's integer kernels."""
    kernels_off_by: float | None = None
    """Largest difference between these two references, in steps of an int8 output. Beyond
    ``MOST_STEPS`` onnxruntime's optimiser has changed what the model means."""
    compile_seconds: float = 0.0
    build_seconds: float | None = None
    sim_seconds: float | None = None
    sim_cycles_per_second: float | None = None
    layers: list[LayerReport] = field(default_factory=list)
    """One row per operator on the accelerator, in program order."""
    host_ops: list[HostOp] = field(default_factory=list)
    """Operators run on the host, in the order in which they ran."""
    first_mismatch: str | None = None
    """Layer, element and command of the first difference from the golden model."""


class RunResult(NamedTuple):
    """A report, and the model's outputs by name in the model's own shapes and types."""

    report: RunReport
    outputs: dict[str, np.ndarray]


@dataclass(frozen=True)
class RunOptions:
    """How to run a partitioned model."""

    config: Config
    """The configuration that the model was partitioned for."""
    simulator: str = "verilator"
    """One of :data:`SIMULATORS`, or with ``device`` any name for the report."""
    read_latency: int = READ_LATENCY
    """Cycles, of the simulated memory."""
    trace_file: Path | None = None
    """Where to write a timeline for ui.perfetto.dev; RTL only."""
    waves: Path | None = None
    """Where to write waveforms (VCD); RTL only."""
    check_layers: bool = True
    """Whether a second run stores and compares every layer."""
    device: Device | None = None
    """An open device of ``config`` to run on, instead of opening ``simulator``; it stays open."""


def compiled_segments(plan: Partition) -> list[tuple[AcceleratorSegment, Program]]:
    """The accelerator's segments with their programs. Raises ``ValueError`` if the model was
    partitioned without a configuration."""
    pairs = []
    for segment in plan.segments:
        if isinstance(segment, AcceleratorSegment):
            if segment.program is None:
                raise ValueError("the model was partitioned without a configuration")
            pairs.append((segment, segment.program))
    return pairs


def programs_of(plan: Partition) -> list[Program]:
    """The programs of a model in the order in which they run."""
    return [program for _, program in compiled_segments(plan)]


def run_model(
    plan: Partition,
    arrays: Mapping[str, np.ndarray],
    options: RunOptions,
    progress: Progress = silent,
) -> RunResult:
    """Run a model partitioned for ``options.config`` and compare it. ``arrays``: the model's inputs
    by name, in its own shapes and types.

    Raises :class:`ModelError` if onnxruntime fails, :class:`DeviceError` if the device does."""
    report = RunReport(plan.path.name, options.config.to_dict(), options.simulator)
    report.compile_seconds = plan.compile_seconds
    with progress("onnxruntime"):
        reference = run_reference(plan.path, arrays)
        meaning = run_reference(plan.path, arrays, optimise=False)
    programs = programs_of(plan)
    predictions = [predict_layers(p, options.read_latency) for p in programs]
    report.predicted_cycles = sum(p.cycles for p in predictions)
    report.macs = sum(layer.macs for program in programs for layer in program.layers)
    with _Machine(plan, options, report, progress) as machine:
        trail = follow(plan, arrays, machine.run)
        machine.finish()
    report.host_ops = trail.host_ops
    if options.simulator == "model":
        report.layers = _predicted_rows(programs, predictions)
    report.ort, report.graph = _compared(trail, reference), _compared(trail, meaning)
    report.kernels_off_by = _steps_between(trail, reference, meaning)
    return RunResult(report, {name: trail.values[name] for name in reference})


def _compared(trail: Trail, wanted: Mapping[str, np.ndarray]) -> dict[str, float | None]:
    quantised = trail.handed_out()
    return _summary(
        oracle.compare(*quantised[name], array)
        if name in quantised
        else host.compare(trail.values[name], array)
        for name, array in wanted.items()
    )


def _steps_between(
    trail: Trail, a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]
) -> float | None:
    """See :attr:`RunReport.kernels_off_by`. A float output of the host has no scale: its steps are
    a 255th of its range."""
    quantised, worst = trail.handed_out(), 0.0
    for name in a:
        if a[name].shape != b[name].shape or a[name].dtype.kind not in "iuf":
            continue
        step = 1.0
        if a[name].dtype.kind == "f":
            values = b[name][np.isfinite(b[name])]
            step = float(np.ptp(values)) / 255 if values.size else 1.0
            step = float(quantised[name][1].scale) if name in quantised else step
        difference = np.abs(a[name].astype(np.float64) - b[name])
        difference = difference[np.isfinite(difference)]
        if difference.size and step > 0:
            worst = max(worst, float(difference.max()) / step)
    return worst


def _predicted_rows(programs: list[Program], predictions: list[Prediction]) -> list[LayerReport]:
    pairs = zip(programs, predictions, strict=True)
    return [row for program, prediction in pairs for row in predicted_layers(program, prediction)]


def _summary(comparisons: Iterable[Comparison]) -> dict[str, float | None]:
    """All outputs together, as :attr:`RunReport.ort` has it."""
    results = list(comparisons)
    known = [r.max_abs_diff for r in results if r.max_abs_diff is not None]
    return {
        "elements": sum(r.elements for r in results),
        "equal": sum(r.equal for r in results),
        "max_abs_diff": max(known) if len(known) == len(results) else None,
    }


@dataclass(frozen=True)
class ModelPrediction:
    """What the cycle model says of a compiled model, without running it."""

    cycles: int
    """From start to done, summed over the model's programs."""
    macs: int
    """Useful multiply-accumulates on the accelerator."""
    utilisation: float
    """``macs / (rows * cols * cycles)``."""
    dram_read_bytes: int
    """All AXI read beats: activations, weights and commands."""
    dram_write_bytes: int
    layers: list[LayerReport]
    """One row per operator on the accelerator, in program order."""

    def frames_per_second(self, clock_mhz: float) -> float:
        """Inferences per second at a clock in MHz, the host's share not counted."""
        return 1e6 * clock_mhz / self.cycles


def predict_model(plan: Partition, read_latency: int = READ_LATENCY) -> ModelPrediction:
    """The cycles and the DRAM traffic of a partitioned model, for a memory that takes
    ``read_latency`` cycles to answer."""
    programs = programs_of(plan)
    predictions = [predict_layers(p, read_latency) for p in programs]
    rows = _predicted_rows(programs, predictions)
    cycles, macs = sum(p.cycles for p in predictions), sum(row.macs for row in rows)
    return ModelPrediction(
        cycles=cycles,
        macs=macs,
        utilisation=utilisation(macs, cycles, programs[0].config),
        dram_read_bytes=sum(p.read_bytes for p in predictions),
        dram_write_bytes=sum(p.write_bytes for p in predictions),
        layers=rows,
    )


class _Machine:
    """The accelerator that runs all of a model's programs, one after the other, and what it
    measures. Without one (``golden``, ``model``) the golden model stands for it."""

    def __init__(self, plan: Partition, options: RunOptions, report: RunReport, progress: Progress):
        self.options, self.report, self.progress = options, report, progress
        self.device = options.device
        self.timed = options.simulator in RTL
        if self.device is not None:
            self.timed = not isinstance(self.device, CommandDevice)
        segments = compiled_segments(plan)
        self.programs = {id(segment): program for segment, program in segments}
        self.checked: dict[int, Program] = {}
        """By segment, the program that also stores every layer."""
        runs_program = self.device is not None or options.simulator not in DEVICELESS
        if options.check_layers and runs_program:
            for s, _ in segments:
                self.checked[id(s)] = compile_graph(
                    s.graph, options.config, dump=True, schedule=s.schedule
                )
        self.runs: list[Execution] = []

    def __enter__(self) -> _Machine:
        simulator = self.options.simulator
        if self.device is not None and self.device.config != self.options.config:
            raise DeviceError("the device is of another configuration than the model's programs")
        if self.device is not None or simulator in DEVICELESS:
            return self
        needed = [memory_needed(p) for p in (*self.programs.values(), *self.checked.values())]
        start = time.perf_counter()
        with self.progress(f"building the {simulator} simulator (once per configuration)"):
            self.device = _open(self.options, -(-max(needed) // 4096) * 4096)
        self.report.build_seconds = time.perf_counter() - start
        return self

    def __exit__(self, *_: object) -> None:
        if self.device is not None and self.options.device is None:
            self.device.close()

    def run(
        self, segment: AcceleratorSegment, inputs: dict[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Run one segment; ``inputs`` and the results are int8 (N, C, H, W) by tensor name. It is
        compared with the golden model on the same inputs; with ``check_layers`` a second run stores
        every layer for that."""
        program, report = self.programs[id(segment)], self.report
        with self.progress("golden model"):
            expected = golden.run(segment.graph, inputs)
        if self.device is None:
            report.layers += layers(program, None, None)
            return expected
        driver = Driver(self.device)
        load(driver, program)
        with self.progress(f"running on {self.options.simulator}"):
            measured = execute(driver, program, inputs, trace=self.timed)
        if id(segment) in self.checked:
            checked = self.checked[id(segment)]
            load(driver, checked)
            with self.progress("running again with every layer stored"):
                second = execute(driver, checked, inputs, trace=False)
            self._note_mismatches(checked, *compare(checked, second.tensors, expected))
        self._note_mismatches(program, *compare(program, measured.tensors, expected))
        report.layers += layers(program, measured.events, measured.cycles if self.timed else None)
        self.runs.append(measured)
        return measured.tensors

    def _note_mismatches(self, program: Program, count: int, first: Divergence | None) -> None:
        report = self.report
        report.golden_mismatches += count
        if first is not None and report.first_mismatch is None:
            report.first_mismatch = str(first)
            if first.command is not None:
                report.first_mismatch += f": {describe(program, first.command)}"

    def finish(self) -> None:
        """Fill in the totals of all programs, and write the timeline."""
        report, runs, config = self.report, self.runs, self.options.config
        if not runs:
            return
        report.sim_seconds = sum(run.seconds for run in runs)
        if not self.timed:
            return
        report.cycles = sum(run.cycles for run in runs)
        report.utilisation = utilisation(report.macs, report.cycles, config)
        report.dram_read_bytes = sum(run.counters["READ_BEATS"] for run in runs) * config.beat_bytes
        report.dram_write_bytes = (
            sum(run.counters["WRITE_BEATS"] for run in runs) * config.beat_bytes
        )
        report.sim_cycles_per_second = report.cycles / report.sim_seconds
        if self.options.trace_file is not None:
            whole, events = _concatenated(list(self.programs.values()), runs)
            write_timeline(self.options.trace_file, whole, events)


def _concatenated(programs: list[Program], runs: list[Execution]) -> tuple[Program, np.ndarray]:
    """Programs as if they were one, for the timeline; their events one after the other."""
    rows: list[Layer] = []
    command_layers: list[int] = []
    events: list[np.ndarray] = []
    cycles = 0
    for program, run in zip(programs, runs, strict=True):
        if run.events is not None:
            part = run.events.copy()
            part["index"] += len(command_layers)
            part["cycle"] += cycles
            events.append(part)
        command_layers += [layer + len(rows) for layer in program.command_layers]
        rows += program.layers
        cycles += run.cycles
    whole = replace(programs[0], layers=rows, command_layers=command_layers)
    return whole, np.concatenate(events) if events else np.zeros(0)


def _open(options: RunOptions, memory_bytes: int) -> Device:
    if options.simulator == "commands":
        return open_device("commands", options.config, memory_bytes=memory_bytes)
    from systole.sim.device import MemoryModel

    return open_device(
        options.simulator,
        options.config,
        memory_bytes=memory_bytes,
        memory=MemoryModel(read_latency=options.read_latency),
        waves=options.waves,
    )
