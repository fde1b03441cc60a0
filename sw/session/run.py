"""A whole model on a device: run, compared with the golden model and onnxruntime, and reported."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from systole.isa import Config
from systole.sw.compiler import READ_LATENCY, compile_graph
from systole.sw.compiler.partition import AcceleratorSegment, Partition
from systole.sw.files import name_elsewhere
from systole.sw.frontend.dataflow import CONVERSIONS, run_reference
from systole.sw.frontend.inputs import InputError
from systole.sw.golden import model as golden
from systole.sw.progress import Progress, Share, silent, step
from systole.sw.report import energy
from systole.sw.report.clock import clock_of
from systole.sw.report.energy import EnergyReport, EnergyTable, program_energy
from systole.sw.report.layers import LayerReport, layers, predicted_layers, utilisation
from systole.sw.report.timeline import write_timeline
from systole.sw.runtime.device import Device, DeviceError
from systole.sw.runtime.driver import Driver, Waiting
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
from systole.sw.session.backends import open_device
from systole.sw.session.diff import compare_segments, explanations
from systole.sw.session.report import (
    Crossings,
    RunReport,
    RunResult,
    compiled_segments,
    crossings,
    programs_of,
)
from systole.sw.session.segments import follow
from systole.sw.simulate.commands import CommandDevice
from systole.sw.simulate.cycles import Prediction, predict_layers

SIMULATORS = ("verilator", "icarus", "commands", "model", "golden")
"""What can execute a model: the RTL in two simulators, the command-level simulator, the golden
model with predicted cycles, the golden model alone."""
DEVICELESS = ("model", "golden")
"""Those that run no program: the golden model computes."""
RTL = ("verilator", "icarus")
"""Those that simulate the hardware, and so measure its cycles."""
TOLD = 50
"""How often, in its predicted cycles, a simulation says how far it is."""


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
    clock_mhz: float | None = None
    """The clock that times are given for; None: what synthesis reached, or an assumed one."""
    energy_table: str = energy.DEFAULT
    """What operations cost: the name of a table, or a file."""


def run_model(
    plan: Partition,
    arrays: Mapping[str, np.ndarray],
    options: RunOptions,
    progress: Progress = silent,
) -> RunResult:
    """Run a model partitioned for ``options.config`` and compare it. ``arrays``: the model's inputs
    by name, in its own shapes and types.

    Raises :class:`EnergyError` for a table of costs that cannot be used, :class:`ModelError` if
    onnxruntime fails, :class:`DeviceError` if the device does."""
    report = RunReport(plan.path.name, options.config.to_dict(), options.simulator)
    clock = clock_of(options.config, options.clock_mhz)
    report.clock_mhz, report.clock_source = clock.mhz, clock.source
    report.describe(plan)
    prediction = predict_model(plan, options.read_latency, options.energy_table)
    with progress("onnxruntime"):
        reference = run_reference(plan.path, arrays)
        meaning = run_reference(plan.path, arrays, optimise=False)
    report.predicted_cycles = prediction.cycles
    with _Machine(plan, options, prediction, report, progress) as machine:
        trail = follow(plan, arrays, machine.run)
        report.host_ops, report.host_seconds = trail.host_ops, trail.host_seconds
        machine.finish()
    report.estimate_energy(prediction.energy)
    report.compare(trail, reference, meaning)
    if report.ort["equal"] != report.ort["elements"]:
        with progress("looking for the layers that differ"):
            rows, _ = compare_segments(plan, arrays, machine.expected)
            report.explanations = list(explanations(rows))
    return RunResult(report, {name: trail.values[name] for name in reference})


def _predicted_rows(programs: list[Program], predictions: list[Prediction]) -> list[LayerReport]:
    pairs = zip(programs, predictions, strict=True)
    return [row for program, prediction in pairs for row in predicted_layers(program, prediction)]


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
    program_cycles: list[int]
    """Cycles of each program, in the order in which they run."""
    layers: list[LayerReport]
    """One row per operator on the accelerator, in program order."""
    host_operators: int
    """Operators of the model that run on the host, conversions aside; their time is not
    predicted."""
    crossings: Crossings
    """What a frame moves between accelerator and host."""
    energy: EnergyReport
    """What a frame takes on the accelerator and its DRAM, by the energy model."""

    def frames_per_second(self, clock_mhz: float, host_seconds: float | None = None) -> float:
        """Inferences per second at a clock in MHz. ``host_seconds``: the host's time for a frame,
        such as :attr:`RunReport.host_seconds`; it may be missing only if nothing runs on the host.
        Raises :class:`InputError` otherwise."""
        if host_seconds is None and self.host_operators:
            raise InputError(
                f"frames per second: {self.host_operators} operators run on the host, so its "
                "seconds per frame are needed"
            )
        return 1 / (self.cycles / (1e6 * clock_mhz) + (host_seconds or 0))


def predict_model(
    plan: Partition, read_latency: int = READ_LATENCY, energy_table: str = energy.DEFAULT
) -> ModelPrediction:
    """The cycles, the DRAM traffic and the energy of a partitioned model, for a memory that takes
    ``read_latency`` cycles to answer. Raises :class:`EnergyError`."""
    costs = EnergyTable.load(energy_table)
    programs = programs_of(plan)
    predictions = [predict_layers(p, read_latency) for p in programs]
    rows = _predicted_rows(programs, predictions)
    taken = program_energy(programs, costs)
    for row, parts in zip(rows, taken.layers, strict=True):
        row.energy_pj = parts
    cycles, macs = sum(p.cycles for p in predictions), sum(row.macs for row in rows)
    return ModelPrediction(
        cycles=cycles,
        macs=macs,
        utilisation=utilisation(macs, cycles, programs[0].config),
        dram_read_bytes=sum(p.read_bytes for p in predictions),
        dram_write_bytes=sum(p.write_bytes for p in predictions),
        program_cycles=[p.cycles for p in predictions],
        layers=rows,
        host_operators=sum(p.host and p.op_type not in CONVERSIONS for p in plan.placements),
        crossings=crossings(plan),
        energy=taken,
    )


class _Machine:
    """The accelerator that runs all of a model's programs, one after the other, and what it
    measures. Without one (``golden``, ``model``) the golden model stands for it."""

    def __init__(
        self,
        plan: Partition,
        options: RunOptions,
        prediction: ModelPrediction,
        report: RunReport,
        progress: Progress,
    ):
        self.options, self.prediction = options, prediction
        self.report, self.progress = report, progress
        self.device = options.device
        self.timed = options.simulator in RTL
        if self.device is not None:
            self.timed = not isinstance(self.device, CommandDevice)
        segments = compiled_segments(plan)
        self.programs = {id(segment): program for segment, program in segments}
        self.cycles = {id(s): n for (s, _), n in zip(segments, prediction.program_cycles)}
        """Predicted cycles by segment."""
        self.checked: dict[int, Program] = {}
        """By segment, the program that also stores every layer."""
        runs_program = self.device is not None or options.simulator not in DEVICELESS
        if options.check_layers and runs_program:
            with step(progress, "compiling again with every layer stored") as share:
                for i, (s, _) in enumerate(segments):
                    share(i / len(segments))
                    self.checked[id(s)] = compile_graph(
                        s.graph, options.config, dump=True, schedule=s.schedule
                    )
        self.runs: list[Execution] = []
        self.expected: list[tuple[AcceleratorSegment, dict[str, np.ndarray]]] = []
        """The golden model's tensors of each segment that has run."""

    def __enter__(self) -> _Machine:
        simulator = self.options.simulator
        if self.device is not None and self.device.config != self.options.config:
            raise DeviceError("the device is of another configuration than the model's programs")
        if self.device is not None or simulator in DEVICELESS:
            return self
        needed = [memory_needed(p) for p in (*self.programs.values(), *self.checked.values())]
        start = time.perf_counter()
        with self.progress(f"building the {simulator} simulator (once per configuration)"):
            self.device = open_simulator(self.options, -(-max(needed) // 4096) * 4096)
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
        self.expected.append((segment, expected))
        if self.device is None:
            report.layers += layers(program, None, None)
            return expected
        driver = Driver(self.device)
        load(driver, program)
        with step(self.progress, f"running on {self.options.simulator}") as share:
            waiting = self._waiting(segment, share)
            measured = execute(driver, program, inputs, trace=self.timed, waiting=waiting)
        if id(segment) in self.checked:
            checked = self.checked[id(segment)]
            load(driver, checked)
            with step(self.progress, "running again with every layer stored") as share:
                waiting = self._waiting(segment, share)
                second = execute(driver, checked, inputs, trace=False, waiting=waiting)
            self._note_mismatches(checked, *compare(checked, second.tensors, expected))
        self._note_mismatches(program, *compare(program, measured.tensors, expected))
        report.layers += layers(program, measured.events, measured.cycles if self.timed else None)
        self.runs.append(measured)
        return measured.tensors

    def _waiting(self, segment: AcceleratorSegment, share: Share) -> Waiting | None:
        """What shows how far the RTL has got with a segment, by its predicted cycles."""
        if not self.timed:
            return None
        expected = self.cycles[id(segment)]
        return Waiting(expected // TOLD + 1, lambda cycles: share(min(cycles / expected, 1)))

    def _note_mismatches(self, program: Program, count: int, first: Divergence | None) -> None:
        report = self.report
        report.golden_mismatches += count
        if first is not None and report.first_mismatch is None:
            report.first_mismatch = str(first)
            if first.command is not None:
                report.first_mismatch += f": {describe(program, first.command)}"

    def finish(self) -> None:
        """Fill in the totals of all programs, predicted where they are not measured, and write the
        timeline."""
        report, runs, prediction = self.report, self.runs, self.prediction
        if runs:
            report.sim_seconds = sum(run.seconds for run in runs)
        if not (runs and self.timed):
            if self.options.simulator == "model":
                report.cycles, report.layers = prediction.cycles, prediction.layers
            totals = prediction.cycles, prediction.dram_read_bytes, prediction.dram_write_bytes
            report.time(*totals, measured=False)
            return
        report.cycles = sum(run.cycles for run in runs)
        beat = self.options.config.beat_bytes
        read, written = (
            sum(run.counters[counter] for run in runs) * beat
            for counter in ("READ_BEATS", "WRITE_BEATS")
        )
        report.time(report.cycles, read, written, measured=True)
        report.sim_cycles_per_second = report.cycles / (report.sim_seconds or 1)
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


def open_simulator(options: RunOptions, memory_bytes: int) -> Device:
    """The simulator that the options name, with so much memory."""
    if options.simulator == "commands":
        return open_device("commands", options.config, memory_bytes=memory_bytes)
    from systole.sim.device import MemoryModel

    return open_device(
        options.simulator,
        options.config,
        memory_bytes=memory_bytes,
        memory=MemoryModel(read_latency=options.read_latency),
        waves=None if options.waves is None else name_elsewhere(options.waves),
    )
