"""The benchmark's tables and plots, from predictions."""

from __future__ import annotations

from dataclasses import replace
from xml.etree import ElementTree

import pytest

from systole.isa import Config
from systole.sw.cli import bench
from systole.sw.report import plots
from systole.sw.report.layers import layers


@pytest.fixture(scope="module")
def results():
    """Two networks, the first as if it had been measured."""
    first, second = (
        bench.predicted(name, bench.load_network(name), Config())
        for name in ("dscnn-kws", "autoencoder-ad")
    )
    cycles = 2 * first.predicted.cycles
    rows = tuple(layers(first.program, None, None))
    for row in rows:
        row.cycles = cycles // len(rows)
    return [replace(first, cycles=cycles, rows=rows, read_bytes=99, write_bytes=1), second]


def test_measured_figures_go_before_predicted_ones(results):
    first, second = results
    head, _, measured, predicted, *_ = bench.main_table(results).splitlines()
    assert head.count("|") == measured.count("|")
    assert f"| {first.cycles:,} | {first.predicted.cycles:,} | -50.00 % |" in measured
    assert measured.split("|")[8].strip() == "99"
    assert "| not run |" in predicted and f"{second.predicted.read_bytes:,}" in predicted
    assert f"{100 * first.macs / 256 / first.cycles:.1f} %" in measured


def test_what_is_busiest(results):
    unit, share = bench.busiest(results[1].program, results[1].predicted.cycles)
    assert unit == "reads" and 0.9 < share <= 1


def test_plots_are_svg_that_depends_on_the_figures_alone(results):
    drawn = plots.draw(results)
    assert set(drawn) == {plots.NETWORKS, plots.LAYERS}
    for svg in drawn.values():
        assert ElementTree.fromstring(svg).tag.endswith("svg")
    assert drawn == plots.draw(results)
    other = [replace(results[0], cycles=results[0].cycles + 500), results[1]]
    assert plots.draw(other)[plots.NETWORKS] != drawn[plots.NETWORKS]
