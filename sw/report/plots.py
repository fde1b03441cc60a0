"""The plots of ``docs/performance.md``, as SVG that depends on the figures alone."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from systole.sw.report.results import Measurement

NETWORKS, LAYERS = "performance-networks.svg", "performance-layers.svg"
FILES = (NETWORKS, LAYERS)
"""File names, beside the document."""


def draw(results: list[Measurement]) -> dict[str, bytes]:
    """SVG by file name."""
    ran = [r for r in results if r.cycles is not None]
    return {NETWORKS: svg_of(_networks(results)), LAYERS: svg_of(_layers(ran))}


def svg_of(figure: Figure) -> bytes:
    """A figure as SVG without a date and with reproducible names."""
    import matplotlib

    out = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "systole"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def _figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, list]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _networks(results: list[Measurement]) -> Figure:
    figure, (use, roof, moved, error) = _figure(2, 2, (13, 9))
    names = [r.name for r in results]
    use.barh(names, [100 * r.utilisation for r in results])
    use.set(title="Utilisation, %", xlim=(0, 100))
    use.invert_yaxis()

    config = results[0].program.config
    peak = config.rows * config.cols
    slope = config.beat_bytes  # bytes a cycle
    edge = peak / slope
    roof.plot([1, edge, 1e4], [slope, peak, peak], color="black")
    for r in results:
        cycles, read, written = r.best
        x, y = r.macs / (read + written), r.macs / cycles
        roof.plot([x], [y], "o")
        roof.annotate(r.name, (x, y), textcoords="offset points", xytext=(4, -9), fontsize=7)
    roof.set(
        title=f"Roofline: {peak} MACs a cycle, {slope} bytes a cycle",
        xscale="log",
        yscale="log",
        xlabel="MACs per byte of DRAM traffic",
        ylabel="MACs per cycle",
    )

    moved.barh(names, [sum(r.best[1:]) / r.minimum for r in results])
    moved.set(title="DRAM bytes / compulsory minimum")
    moved.axvline(1, color="black")
    moved.invert_yaxis()

    errors = {r.name: 100 * (r.predicted.cycles / r.cycles - 1) for r in results if r.cycles}
    error.barh(list(errors), list(errors.values()))
    error.set(title="Predicted against measured cycles, %", xlim=(-1.5, 1.5))
    error.invert_yaxis()
    return figure


def _layers(ran: list[Measurement]) -> Figure:
    """Utilisation over cycles: a layer is as wide as its share of the cycles."""
    figure, axes = _figure(-(-len(ran) // 2), 2, (13, 1.6 * -(-len(ran) // 2)))
    for axis, r in zip(axes, ran, strict=False):
        left = 0
        for row in r.rows:
            axis.bar(
                left,
                min(100 * (row.utilisation or 0), 100),
                width=row.cycles or 0,
                align="edge",
                edgecolor="white",
                linewidth=0.2,
                color="tab:blue",
            )
            left += row.cycles or 0
        axis.set(title=r.name, xlim=(0, left), ylim=(0, 100))
        axis.set_xticks([])
    for axis in axes[len(ran) :]:
        axis.set_axis_off()
    figure.supxlabel("layers in order, as wide as their cycles")
    figure.supylabel("utilisation, %")
    return figure
