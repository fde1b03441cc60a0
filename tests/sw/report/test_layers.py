"""The rows of a report: cycles, stalls and traffic of hand-written events and of a real program."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console

from systole.isa import TRACE_EVENT, Config, Engine, TraceKind
from systole.sw.compiler import compile_graph
from systole.sw.frontend.load import load
from systole.sw.report.layers import (
    LayerReport,
    layers,
    multiplier_use,
    predicted_layers,
    table,
    utilisation,
)
from systole.sw.simulate.cycles import predict_layers
from systole.sw.zoo import digits


@pytest.fixture(scope="module")
def program():
    return compile_graph(load(digits.MODEL), Config())


def events_of(*rows: dict[str, int]) -> np.ndarray:
    """A trace; fields that are not given are 0."""
    out = np.zeros(len(rows), [(f.name, np.int64) for f in TRACE_EVENT])
    for event, row in zip(out, rows, strict=True):
        for name, value in row.items():
            event[name] = value
    return out


def start(engine: Engine, index: int, cycle: int, waited: int = 0, missing: int = 0) -> dict:
    kind = TraceKind.START
    return {
        **{"engine": engine, "index": index, "cycle": cycle, "kind": kind},
        **{"waited": waited, "missing": missing},
    }


def end(engine: Engine, index: int, cycle: int, stalled: int = 0) -> dict:
    kind = TraceKind.END
    return {"engine": engine, "index": index, "cycle": cycle, "kind": kind, "stalled": stalled}


def first_command(program, layer: int) -> int:
    """Index of a layer's first command."""
    return program.command_layers.index(layer)


def test_utilisation_is_the_share_of_useful_macs():
    config = Config.sized(8, 4)
    assert utilisation(8 * 4 * 100, 200, config) == 0.5
    assert utilisation(0, 0, config) == 0.0


def test_multiplier_use_counts_two_rows_for_each_multiplier_of_the_fast_inner_product():
    assert multiplier_use(0.5, Config.sized(8, 4)) == (0.5, 0.5)
    fast = Config.sized(16, 32, inner_product="fast")
    assert multiplier_use(0.5, fast) == (1.0, 0.5 * 512 / (256 + 8 + 32))


def test_without_events_there_are_no_cycles(program):
    rows = layers(program, None, None)
    assert [row.name for row in rows] == [layer.name for layer in program.layers]
    for row, layer in zip(rows, program.layers, strict=True):
        assert (row.op, row.shape, row.macs) == (layer.op, layer.shape, layer.macs)
        assert row.cycles is None and row.utilisation is None and row.stalls == {}
    assert rows[0].dram_read_bytes > 0
    assert rows[-1].dram_write_bytes == program.tensors[program.outputs[0].tensor].bytes


def test_a_cycle_counts_for_the_layer_that_ends_next(program):
    events = [
        event
        for layer in range(len(program.layers))
        for event in (
            start(Engine.CONV, first_command(program, layer), 100 * layer),
            end(Engine.CONV, first_command(program, layer), 100 * layer + 90),
        )
    ]
    rows = layers(program, events_of(*events), 1000)
    count = len(program.layers)
    assert sum(row.cycles for row in rows) == 1000
    assert [row.cycles for row in rows[1:-1]] == [100] * (count - 2)
    # What follows the last event counts for the last layer.
    assert rows[-1].cycles - 100 == 1000 - (100 * (count - 1) + 90)
    for row in rows:
        assert row.utilisation == utilisation(row.macs, row.cycles, program.config)


def test_stalls_are_waits_of_idle_engines(program):
    """A wait counts for its layer if the engine has nothing in flight, and from the end of its last
    command only; memory's stalls always count; those of other engines never."""
    one, two = first_command(program, 0), first_command(program, 1)
    wload = 1 << Engine.WLOAD
    rows = layers(
        program,
        events_of(
            start(Engine.CONV, one, 10, waited=10, missing=wload),
            start(Engine.CONV, one, 12, waited=5, missing=wload),  # behind one in flight
            end(Engine.CONV, one, 20, stalled=3),
            end(Engine.CONV, one, 30),
            start(Engine.CONV, two, 34, waited=20, missing=1 << Engine.POST),  # idle since 30
            end(Engine.CONV, two, 40),
            start(Engine.LOAD, one, 50, waited=9, missing=wload),
            end(Engine.LOAD, one, 60, stalled=7),
        ),
        100,
    )
    assert rows[0].stalls == {"CONV<WLOAD": 10, "CONV<memory": 3}
    assert list(rows[0].stalls) == ["CONV<WLOAD", "CONV<memory"]  # the largest first
    assert rows[1].stalls == {"CONV<POST": 4}


def test_predicted_rows_agree_with_the_program(program):
    prediction = predict_layers(program, 64)
    rows = predicted_layers(program, prediction)
    measured = layers(program, None, None)
    # In the last cycle the device only says that it is done.
    assert sum(row.cycles for row in rows) == prediction.cycles - 1
    for row, other in zip(rows, measured, strict=True):
        assert (row.name, row.op, row.shape, row.macs) == (
            *(other.name, other.op, other.shape, other.macs),
        )
        assert row.dram_read_bytes == other.dram_read_bytes
        assert row.dram_write_bytes == other.dram_write_bytes
        assert row.utilisation == utilisation(row.macs, row.cycles, program.config)


def test_table_shows_the_worst_stall_and_any_name():
    """Names may hold what rich takes for markup."""
    rows = [
        LayerReport("conv[/b][0]", "Conv", (1, 2, 3, 4), 1234),
        LayerReport("pool", "MaxPool", (1, 2, 3, 4), 0, 5678, 0.25, {"POST<CONV": 9, "x": 1}),
    ]
    console = Console(file=io.StringIO(), width=150)
    console.print(table(rows, "title"))
    text = console.file.getvalue()
    first, second = (next(x for x in text.splitlines() if n in x) for n in ("conv", "pool"))
    assert "conv[/b][0]" in first and "1,234" in first and first.count(" - ") == 4
    assert "5,678" in second and "25.0" in second and "POST<CONV 9" in second
    assert "x 1" not in second
