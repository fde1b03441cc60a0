"""Prints the report of a run for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rich.console import Console

from systole.isa import Config
from systole.sw.cli.common import print_table
from systole.sw.report.clock import Clock
from systole.sw.report.layers import LayerReport, multiplier_use, table
from systole.sw.session.accuracy import Accuracy
from systole.sw.session.report import MOST_STEPS, RunReport
from systole.sw.session.run import DEVICELESS


def show(report: RunReport, console: Console, latency: int) -> None:
    """Print a report. ``latency``: the memory's, in cycles."""
    print_table(console, table(_rows(report), _title(report, latency)))
    for line in _lines(report):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def show_accuracy(result: Accuracy, console: Console) -> None:
    """Print the accuracy on labelled samples."""
    parts = [
        f"accelerator ({result.simulator}) {100 * result.accelerator:.2f} %",
        f"onnxruntime int8 {100 * result.onnxruntime:.2f} %",
    ]
    if result.float_model is not None:
        parts.append(f"float {100 * result.float_model:.2f} %")
    console.print(
        f"accuracy on {result.samples:,} samples: {', '.join(parts)}; accelerator and onnxruntime "
        f"agree on {100 * result.same_class:.2f} %",
        highlight=False,
        soft_wrap=True,
    )


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


def _lines(report: RunReport) -> Iterator[str]:
    for reason in report.host_reasons:
        yield f"on the host: {reason}"
    yield "; ".join(_work(report))
    yield _frame(report)
    yield _energy(report)
    yield _crossings(report)
    yield "; ".join(_times(report))
    yield from _comparisons(report)


def _work(report: RunReport) -> Iterator[str]:
    """What the accelerator did, measured or predicted."""
    share = ""
    if report.mac_share is not None:
        share = f", {_percent(report.mac_share)} of the model's {report.model_macs:,}"
    elif report.uncounted:
        others = len(report.uncounted) - 1
        more = f" and {others} more" if others else ""
        share = f", those of {report.uncounted[0]}{more} on the host are not known"
    yield f"MACs on the accelerator {report.macs:,}{share}"
    if report.timing == "measured":
        yield f"cycles {report.cycles:,} (predicted {report.predicted_cycles:,})"
    else:
        yield f"cycles {report.predicted_cycles:,} (predicted)"
    yield f"utilisation {100 * (report.utilisation or 0):.1f} %{_multiplier_use(report)}"
    yield f"DRAM read {report.dram_read_bytes:,} B, written {report.dram_write_bytes:,} B"


def _multiplier_use(report: RunReport) -> str:
    """What the fast inner product makes of its multipliers."""
    config = Config.from_dict(report.config)
    if not config.fast:
        return ""
    inside, whole = multiplier_use(report.utilisation or 0, config)
    return f" ({inside:.2f} MACs a multiplier and cycle, {whole:.2f} with those at the edges)"


def _percent(share: float) -> str:
    """A share that is only called 100 % if it is all, and 0 % if it is nothing."""
    if share in (0, 1):
        return f"{100 * share:.0f} %"
    return f"{100 * share:.2g} %" if share < 0.001 else f"{min(100 * share, 99.9):.1f} %"


def _frame(report: RunReport) -> str:
    """A frame's time, with the host and without."""
    clock = Clock(report.clock_mhz, report.clock_source)
    rate = f"{report.frames_per_second:,.1f} frames/s"
    if not report.host_seconds:
        time = _milliseconds(report.frame_seconds)
        return f"frame {time} at {clock}, none of it on the host; {rate}"
    return (
        f"frame {_milliseconds(report.frame_seconds)}: "
        f"{_milliseconds(report.accelerator_seconds)} on the accelerator at {clock}, "
        f"{_milliseconds(report.host_seconds)} on the host (measured on this machine); {rate}"
    )


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.4f} ms"


def _energy(report: RunReport) -> str:
    """What a frame costs, and where that goes, the largest part first."""
    parts = sorted(report.energy_parts_mj.items(), key=lambda part: -part[1])
    total = report.energy_mj or 0
    shares = ", ".join(f"{name} {100 * mj / total:.0f} %" for name, mj in parts if mj)
    return (
        f"energy {total:,.4f} mJ a frame by the model {report.energy_table} (memories, arithmetic "
        f"and DRAM; no leakage, clock or host): {shares}; {report.tops_per_watt:.2f} TOPS/W"
    )


def _crossings(report: RunReport) -> str:
    c = report.crossings
    assert c is not None, "every report has them"
    return (
        f"crossings {c.to_accelerator + c.to_host}: {c.to_accelerator} to the accelerator with "
        f"{c.to_accelerator_bytes:,} B, {c.to_host} to the host with {c.to_host_bytes:,} B"
    )


def _times(report: RunReport) -> Iterator[str]:
    yield f"compile {report.compile_seconds:.2f} s"
    if report.build_seconds is not None:
        yield f"simulator ready in {report.build_seconds:.2f} s"
    if report.sim_seconds is not None:
        yield f"simulation {report.sim_seconds:.2f} s"
    if report.sim_cycles_per_second:
        yield f"{report.sim_cycles_per_second:,.0f} cycles/s"


def _comparisons(report: RunReport) -> Iterator[str]:
    if report.golden_mismatches:
        yield f"MISMATCH: {report.golden_mismatches} elements differ from the golden model"
        yield f"first: {report.first_mismatch}"
    elif report.simulator not in DEVICELESS:
        yield "every layer's output equals the golden model"
    yield f"onnxruntime: {_equality(report.ort)}"
    yield from report.explanations
    if report.graph != report.ort:
        yield f"the graph as written, without fused kernels: {_equality(report.graph)}"
    steps = report.kernels_off_by or 0
    if steps > MOST_STEPS and report.reference == "graph":
        yield (
            f"onnxruntime's optimiser changes this model's outputs by up to {steps:,.0f} steps: "
            "the graph as written is taken for right"
        )
    elif steps > MOST_STEPS:
        yield (
            f"rounding to int8 in every layer adds up to {steps:,.0f} steps between onnxruntime's "
            "integer kernels and the graph as written: the integer kernels are taken for right"
        )


def _equality(compared: Mapping[str, float | None]) -> str:
    worst = compared["max_abs_diff"]
    return (
        f"{compared['equal']:,} of {compared['elements']:,} output elements equal, largest "
        f"difference {'not a number' if worst is None else worst}"
    )
