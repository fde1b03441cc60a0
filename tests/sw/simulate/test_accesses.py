"""The accesses counted from a program, against those at the ports of the RTL's memories."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from systole.hw.verilog import RAM
from systole.isa import Config
from systole.sim.build import generate
from systole.sim.device import RtlDevice
from systole.sw.compiler import compile_graph
from systole.sw.runtime.driver import Driver
from systole.sw.runtime.execute import execute, load
from systole.sw.runtime.program import Program
from systole.sw.simulate.accesses import fetch_accesses, layer_accesses
from tests.helpers.random_graphs import random_graph, random_windows
from tests.helpers.random_operators import Sketch, makers

COUNTERS = """
  longint reads = 0, parts = 0;
  always @(posedge clk) begin
    if (r_en) reads <= reads + 1;
    parts <= parts + $countones(w_en);
  end
  string counts;
  int file;
  final if ($value$plusargs("counts=%s", counts)) begin
    file = $fopen(counts, "a");
    $fdisplay(file, "%m %0d %0d", reads, parts);
    $fclose(file);
  end
endmodule
"""
"""Counts of reads and of parts written, added to the RTL's memory."""
MEMORIES = {
    "scratchpad.bank_": "scratchpad",
    "accumulators.column_": "accumulator",
    "weight_buffer": "weight",
    ".memory_": "table",
    "rows.table_": "row_table",
    "_numbers": "row_number",
    "reduce.lines": "line",
    "reduce.older_lines": "older_line",
    ".words.": "queue",
    "prefetch": "fetch",
}
"""Memories by what the paths of their instances contain."""


@pytest.fixture(scope="module")
def rtl(tmp_path_factory):
    """A function that gives the RTL of a configuration, with counters in its memories."""

    def counting(config: Config) -> Path:
        path = tmp_path_factory.mktemp("rtl") / "counting.sv"
        before, ram = generate(config).read_text().split(f"module {RAM} ")
        path.write_text(f"{before}module {RAM} {ram.replace('endmodule', COUNTERS, 1)}")
        return path

    return counting


def counted(config: Config, rtl: Path, program: Program, inputs, log: Path) -> Counter[str]:
    """What the ports of the memories count while a program runs."""
    with RtlDevice(config, rtl=rtl, memory_bytes=4 << 20, plusargs=[f"+counts={log}"]) as device:
        driver = Driver(device)
        load(driver, program)
        execute(driver, program, inputs, trace=False)
    counts: Counter[str] = Counter()
    for line in log.read_text().splitlines():
        path, reads, parts = line.split()
        if ".trace." in path:
            continue
        memory = next(name for part, name in MEMORIES.items() if part in path)
        counts[f"{memory}_reads"] += int(reads)
        counts[f"{memory}_writes"] += int(parts)
    return counts


def check(config: Config, rtl: Path, program: Program, inputs, log: Path) -> None:
    total = sum(layer_accesses(program), fetch_accesses(program))
    want = counted(config, rtl, program, inputs, log)
    # A word of the accumulators is one of every column.
    for name in ("accumulator_reads", "accumulator_writes"):
        want[name] //= config.cols
    # Each lane has a copy of the table.
    want["table_writes"] //= config.lanes
    if config.row_ops:
        want["row_table_writes"] //= config.reduced_lanes
    assert {name: getattr(total, name) for name in want} == want


def networks(config: Config):
    """Graphs and their inputs: every operator, and networks of several."""
    for seed in range(4):
        for graph, inputs, _ in (random_graph(seed, work=300_000), random_windows(seed)):
            yield graph, inputs
    for seed, make in enumerate(makers(config)):
        rng = np.random.default_rng(seed)
        sketch = Sketch(rng)
        make(sketch, rng)
        graph = sketch.graph()
        shapes = {p.tensor: graph.tensors[p.tensor].shape for p in graph.inputs}
        yield graph, {n: rng.integers(-128, 128, s).astype(np.int8) for n, s in shapes.items()}


@pytest.mark.parametrize("lanes", [0, pytest.param(3, marks=pytest.mark.long)])
def test_counts_are_those_of_the_ports(lanes, rtl, tmp_path):
    config = Config.sized(6, 4, window_lanes=lanes)
    path = rtl(config)
    for i, (graph, inputs) in enumerate(networks(config)):
        check(config, path, compile_graph(graph, config), inputs, tmp_path / f"{i}.txt")
