"""What a run of a whole model measured: the report, its totals, and the comparison with the
references."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from systole.isa import Config
from systole.sw.compiler.partition import AcceleratorSegment, Partition
from systole.sw.golden import oracle
from systole.sw.golden.oracle import Comparison
from systole.sw.report.clock import ASSUMED_MHZ
from systole.sw.report.energy import EnergyReport
from systole.sw.report.layers import LayerReport, utilisation
from systole.sw.report.reasons import HostReason, host_reasons
from systole.sw.runtime.program import Program
from systole.sw.session import host
from systole.sw.session.host import HostOp
from systole.sw.session.segments import Trail

MOST_STEPS = 2
"""Steps by which rounding may part the integer kernels from the graph as written."""


@dataclass(frozen=True)
class Crossings:
    """What a frame moves between accelerator and host, the model's own inputs and outputs
    included. Bytes are those in the accelerator's memory, alignment included."""

    to_accelerator: int
    """How often the accelerator gets inputs: once for each of its programs."""
    to_accelerator_bytes: int
    to_host: int
    """How often the host gets outputs."""
    to_host_bytes: int


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
    """From start to done, summed over the model's programs: measured on the RTL; with ``model``
    predicted; other simulators have none."""
    macs: int = 0
    """Useful multiply-accumulates on the accelerator."""
    model_macs: int = 0
    """Those of the model's convolutions and products wherever they run, as far as known."""
    host_macs: int = 0
    """Those of them that run on the host."""
    uncounted: list[str] = field(default_factory=list)
    """Operators on the host whose multiply-accumulates are not known: control flow and the like."""
    mac_share: float | None = None
    """Share of ``model_macs`` on the accelerator; None of a model without any, and where some on
    the host are not known."""
    timing: str = "predicted"
    """Where cycles, and all that follows from them, come from: ``measured`` on the RTL or
    ``predicted`` by the cycle model."""
    utilisation: float | None = None
    """``macs / (rows * cols * cycles)``."""
    predicted_cycles: int | None = None
    """``cycles`` by the cycle model."""
    dram_read_bytes: int | None = None
    """All AXI read beats: activations, weights and commands."""
    dram_write_bytes: int | None = None
    clock_mhz: float = ASSUMED_MHZ
    """The clock that times are for."""
    clock_source: str = "assumed"
    """Where the clock comes from: ``assumed``, or the device it was reached on."""
    accelerator_seconds: float = 0.0
    """A frame's cycles at that clock."""
    host_seconds: float = 0.0
    """A frame's time in onnxruntime on the machine that ran it, conversions included."""
    frame_seconds: float = 0.0
    """Both together: accelerator and host take turns."""
    frames_per_second: float = 0.0
    """Of frames of ``frame_seconds``."""
    energy_table: str = ""
    """The table of costs that energies are by: a model, not a measurement."""
    energy_mj: float | None = None
    """A frame's energy on the accelerator and its DRAM."""
    energy_parts_mj: dict[str, float] = field(default_factory=dict)
    """Where it goes."""
    tops_per_watt: float | None = None
    """Useful operations, two for each multiply-accumulate, by that energy."""
    crossings: Crossings | None = None
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
    """Largest difference between these two references, in steps of an int8 output."""
    reference: str = "kernels"
    """Which of the two the outputs are nearer to, ``kernels`` or ``graph``. If they differ by more
    than ``MOST_STEPS``, either int8 rounding has added up over the layers, of which each follows
    the kernels, or onnxruntime's optimiser has changed what the graph means."""
    explanations: list[str] = field(default_factory=list)
    """Where outputs differ from onnxruntime: for each layer that differs by itself, given
    onnxruntime's own operands, whether ties in float32 explain it."""
    compile_seconds: float = 0.0
    build_seconds: float | None = None
    sim_seconds: float | None = None
    sim_cycles_per_second: float | None = None
    layers: list[LayerReport] = field(default_factory=list)
    """One row per operator on the accelerator, in program order."""
    host_ops: list[HostOp] = field(default_factory=list)
    """Operators run on the host, in the order in which they ran."""
    host_reasons: list[HostReason] = field(default_factory=list)
    """Why: operators with equal reasons together, those of their own first."""
    first_mismatch: str | None = None
    """Layer, element and command of the first difference from the golden model."""

    def describe(self, plan: Partition) -> None:
        """Fill in what is known of a partitioned model without running it."""
        self.compile_seconds = plan.compile_seconds
        self.macs = sum(layer.macs for program in programs_of(plan) for layer in program.layers)
        on_host = [p for p in plan.placements if p.host]
        self.host_macs = sum(p.macs or 0 for p in on_host)
        self.model_macs = sum(p.macs or 0 for p in plan.placements)
        self.uncounted = [p.label for p in on_host if p.macs is None]
        if self.model_macs and not self.uncounted:
            self.mac_share = 1 - self.host_macs / self.model_macs
        self.host_reasons = host_reasons(plan.placements)
        self.crossings = crossings(plan)

    def time(self, cycles: int, read_bytes: int, write_bytes: int, *, measured: bool) -> None:
        """Fill in the totals that follow from the accelerator's cycles and bytes, measured or
        predicted, and from the time on the host."""
        self.timing = "measured" if measured else "predicted"
        self.utilisation = utilisation(self.macs, cycles, Config.from_dict(self.config))
        self.dram_read_bytes, self.dram_write_bytes = read_bytes, write_bytes
        self.accelerator_seconds = cycles / (1e6 * self.clock_mhz)
        self.frame_seconds = self.accelerator_seconds + self.host_seconds
        self.frames_per_second = 1 / self.frame_seconds

    def estimate_energy(self, energy: EnergyReport) -> None:
        """Fill in a frame's energy, and that of the layers there are."""
        self.energy_table = energy.table
        self.energy_mj = energy.total / 1e9
        self.energy_parts_mj = {part: pj / 1e9 for part, pj in energy.picojoules.items()}
        self.tops_per_watt = energy.tops_per_watt
        for row, parts in zip(self.layers, energy.layers, strict=True):
            row.energy_pj = parts

    def compare(
        self, trail: Trail, kernels: Mapping[str, np.ndarray], meaning: Mapping[str, np.ndarray]
    ) -> None:
        """Compare what a run left with onnxruntime's outputs by its integer ``kernels`` and by the
        graph as written."""
        self.ort, self.graph = _compared(trail, kernels), _compared(trail, meaning)
        self.kernels_off_by = _steps_between(trail, kernels, meaning)
        ours = {name: trail.values[name] for name in kernels}
        off = [_steps_between(trail, ours, other) for other in (kernels, meaning)]
        self.reference = "kernels" if off[0] <= off[1] else "graph"


class RunResult(NamedTuple):
    """A report, and the model's outputs by name in the model's own shapes and types."""

    report: RunReport
    outputs: dict[str, np.ndarray]


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


def crossings(plan: Partition) -> Crossings:
    """What a frame of a compiled model moves between accelerator and host."""
    programs = programs_of(plan)
    inputs, outputs = (
        [
            sum(program.tensors[t].bytes for t in {p.tensor for p in ports} & {*program.tensors})
            for program, ports in zip(programs, port_lists, strict=True)
        ]
        for port_lists in ([p.inputs for p in programs], [p.outputs for p in programs])
    )
    return Crossings(len(inputs), sum(inputs), len(outputs), sum(outputs))


def _compared(trail: Trail, wanted: Mapping[str, np.ndarray]) -> dict[str, float | None]:
    quantised = trail.handed_out()
    return _summary(
        oracle.compare(*quantised[name], array)
        if name in quantised
        else host.compare(trail.values[name], array)
        for name, array in wanted.items()
    )


def _steps_between(trail: Trail, a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> float:
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


def _summary(comparisons: Iterable[Comparison]) -> dict[str, float | None]:
    """All outputs together, as :attr:`RunReport.ort` has it."""
    results = list(comparisons)
    known = [r.max_abs_diff for r in results if r.max_abs_diff is not None]
    return {
        "elements": sum(r.elements for r in results),
        "equal": sum(r.equal for r in results),
        "max_abs_diff": max(known) if len(known) == len(results) else None,
    }
