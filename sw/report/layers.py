"""What a run measured, per layer: from the program, the trace events and the counters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from rich.markup import escape
from rich.table import Table

from systole.isa import Config, Engine, TraceKind
from systole.sw.runtime.program import Program
from systole.sw.simulate.cycles import Prediction, layer_cycles, traffic


@dataclass
class LayerReport:
    """One row of a report: an operator. ``cycles`` None: not measured. Layers overlap: a cycle
    counts for the layer that ends next, so the rows add up to the whole run."""

    name: str
    op: str
    shape: tuple[int, ...]
    macs: int
    cycles: int | None = None
    utilisation: float | None = None
    stalls: dict[str, int] = field(default_factory=dict)
    """Cycles in which CONV, POST or WINDOW had nothing in flight and the layer's command at the
    head of its queue waited for a token (``CONV<WLOAD``: of WLOAD), or in which memory held up its
    command (``CONV<memory``)."""
    dram_read_bytes: int = 0
    dram_write_bytes: int = 0
    energy_pj: dict[str, float] = field(default_factory=dict)
    """By part, as the energy model has it; empty: not estimated."""


def utilisation(macs: int, cycles: int, config: Config) -> float:
    """Useful MACs / (rows x cols x cycles)."""
    return macs / (config.rows * config.cols * cycles) if cycles else 0.0


def multiplier_use(used: float, config: Config) -> tuple[float, float]:
    """MACs a multiplier of the array and cycle at a utilisation: beside those at its edges, which
    the fast inner product has, and with them."""
    inside = config.rows * config.cols // config.multiplier_rows
    edges = config.rows // 2 + config.cols if config.fast else 0
    return used * config.multiplier_rows, used * config.rows * config.cols / (inside + edges)


def _stalls(program: Program, events: Iterable[Mapping[str, int]]) -> list[Counter[str]]:
    """Each layer's stalls, as :attr:`LayerReport.stalls` has them."""
    out: list[Counter[str]] = [Counter() for _ in program.layers]
    flying: Counter[Engine] = Counter()
    ended: Counter[Engine] = Counter()
    for e in events:
        engine, cycle = Engine(int(e["engine"])), int(e["cycle"])
        if engine not in (Engine.CONV, Engine.POST, Engine.WINDOW):
            continue
        stalls = out[program.command_layers[int(e["index"])]]
        if e["kind"] == TraceKind.START:
            # A wait behind a command in flight costs nothing.
            idle = min(int(e["waited"]), cycle - ended[engine])
            if idle > 0 and not flying[engine]:
                missing = next(x for x in Engine if int(e["missing"]) >> x & 1)
                stalls[f"{engine.name}<{missing.name}"] += idle
            flying[engine] += 1
        else:
            flying[engine] -= 1
            ended[engine] = cycle
            if e["stalled"]:
                stalls[f"{engine.name}<memory"] += int(e["stalled"])
    return out


def layers(
    program: Program, events: Iterable[Mapping[str, int]] | None, total_cycles: int | None
) -> list[LayerReport]:
    """The rows of a program that ran; without ``events`` their cycles are None.

    ``events``: the trace, with the fields of ``isa.TRACE_EVENT``. ``total_cycles``: from start to
    done; cycles behind the last event count for the last layer."""
    rows = [LayerReport(x.name, x.op, x.shape, x.macs) for x in program.layers]
    for layer, (read, write) in zip(program.command_layers, traffic(program)):
        rows[layer].dram_read_bytes += read
        rows[layer].dram_write_bytes += write
    if events is None or not rows:
        return rows
    events = list(events)
    ends = [0] * len(program.command_layers)
    for e in events:
        if e["kind"] == TraceKind.END:
            ends[int(e["index"])] = int(e["cycle"])
    cycles = layer_cycles(program, ends)
    if total_cycles is not None:
        cycles[-1] += total_cycles - sum(cycles)
    for row, count, stalls in zip(rows, cycles, _stalls(program, events)):
        row.cycles = count
        row.utilisation = utilisation(row.macs, count, program.config)
        row.stalls = dict(stalls.most_common())
    return rows


def predicted_layers(program: Program, prediction: Prediction) -> list[LayerReport]:
    """The rows of a program as the cycle model predicts them; it predicts no stalls."""
    return [
        LayerReport(
            name=layer.name,
            op=layer.op,
            shape=layer.shape,
            macs=layer.macs,
            cycles=forecast.cycles,
            utilisation=utilisation(layer.macs, forecast.cycles, program.config),
            dram_read_bytes=forecast.read_bytes,
            dram_write_bytes=forecast.write_bytes,
        )
        for layer, forecast in zip(program.layers, prediction.layers, strict=True)
    ]


def table(rows: list[LayerReport], title: str) -> Table:
    """The rows for people to read."""
    out = Table(title=title, title_justify="left")
    out.add_column("layer", overflow="fold", max_width=28)
    for name in ("operator", "output"):
        out.add_column(name, no_wrap=True)
    for name in ("MACs", "cycles", "util %"):
        out.add_column(name, justify="right", no_wrap=True)
    out.add_column("stalled most by")
    for name in ("DRAM rd", "DRAM wr", "uJ"):
        out.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        worst = next(iter(row.stalls.items()), None)
        out.add_row(
            escape(row.name),
            row.op,
            "x".join(map(str, row.shape)),
            f"{row.macs:,}",
            "-" if row.cycles is None else f"{row.cycles:,}",
            "-" if row.utilisation is None else f"{100 * row.utilisation:.1f}",
            "-" if worst is None else f"{worst[0]} {worst[1]:,}",
            f"{row.dram_read_bytes:,}",
            f"{row.dram_write_bytes:,}",
            f"{sum(row.energy_pj.values()) / 1e6:,.2f}" if row.energy_pj else "-",
        )
    return out
