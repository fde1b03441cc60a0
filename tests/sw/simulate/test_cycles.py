"""The cycle model against the RTL, on small networks."""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import replace

import pytest
from amaranth.hdl import Fragment

from systole.hw.arithmetic.requantise import Requantise
from systole.hw.conv.array import SystolicArray
from systole.hw.window.lines import WindowReduce
from systole.hw.window.row_lanes import RowLanes
from systole.isa import Config, Engine, WindowOp, timing
from systole.sw.cli import bench
from systole.sw.cli.bench import predicted
from systole.sw.compiler import compile_graph
from systole.sw.simulate.cycles import predict, predict_layers
from systole.sw.simulate.cycles.machine import MachineModel
from tests.helpers.networks import load_network, measured

TOTAL = 0.01
LAYER = 0.03
"""Of a layer's cycles: accesses that meet at a bank of the scratchpad are mostly estimated."""
LONG_LAYER = 1000


SMALL = ("resnet8", "dscnn-kws", "mobilenetv1-0.25-vww", "autoencoder-ad")


@pytest.mark.xdist_group("16x16")
@pytest.mark.parametrize("name", SMALL)
def test_prediction_is_what_the_rtl_does(name):
    result = measured(name)
    assert result.mismatches == 0
    assert result.predicted.cycles == pytest.approx(result.cycles, rel=TOTAL)
    assert result.predicted.read_bytes == result.read_bytes
    long = [
        (row, p)
        for row, p in zip(result.rows, result.predicted.layers, strict=True)
        if row.cycles > LONG_LAYER
    ]
    assert long
    for row, p in long:
        assert p.cycles == pytest.approx(row.cycles, rel=LAYER), row.name
        assert (p.read_bytes, p.write_bytes) == (row.dram_read_bytes, row.dram_write_bytes)


@pytest.mark.parametrize(
    ("config", "latency"),
    [
        pytest.param(Config(), 256, marks=pytest.mark.xdist_group("16x16"), id="latency 256"),
        pytest.param(Config.sized(8, 8), 64, marks=pytest.mark.long, id="8x8"),
        pytest.param(Config.sized(32, 32), 64, marks=pytest.mark.long, id="32x32"),
        pytest.param(Config(window_lanes=8), 64, marks=pytest.mark.long, id="8 window lanes"),
        pytest.param(Config(axi_data_bits=64), 64, marks=pytest.mark.long, id="64-bit bus"),
    ],
)
def test_prediction_holds_for_other_machines(config, latency):
    for name in SMALL:
        result = bench.measured(name, load_network(name), config, latency=latency)
        assert result.mismatches == 0
        assert result.predicted.cycles == pytest.approx(result.cycles, rel=TOTAL), name


@pytest.mark.parametrize(
    "config",
    [Config(), Config.sized(12, 20), Config.sized(4, 4), Config.sized(4, 4, zero_points=True)],
)
def test_model_has_the_hardwares_constants(config):
    array = SystolicArray(config)
    Fragment.get(array, None)  # Amaranth warns of components that are never elaborated.
    machine = MachineModel([], config, 64, 64)
    assert machine.conv_lead == max(timing.CONV_START + array.capture_lead, 5)
    lead = timing.array_lead(config)
    assert lead == array.SWAP_LEAD + config.zero_points
    assert machine.array == lead + array.latency(config.cols - 1)
    depth, reduction = timing.WINDOW_DEPTH, WindowReduce.LATENCY
    assert depth[WindowOp.MAX] == reduction + 6
    assert depth[WindowOp.SUM] == depth[WindowOp.DEPTHWISE] == reduction + Requantise.LATENCY + 6
    rows = RowLanes.LATENCY + Requantise.LATENCY + 6
    assert depth[WindowOp.SOFTMAX] == depth[WindowOp.NORMALISE] == rows


def test_layers_add_up_to_the_whole():
    program = compile_graph(load_network("resnet8"), Config())
    whole = predict_layers(program, 64)
    assert sum(layer.cycles for layer in whole.layers) == whole.cycles - 1
    layers = sum(layer.read_bytes for layer in whole.layers)
    commands = 8 * program.command_words
    assert layers + commands <= whole.read_bytes < layers + commands + Config().beat_bytes


def test_commands_start_only_when_their_tokens_are_given():
    program = compile_graph(load_network("dscnn-kws"), Config())
    timings = predict(program, read_latency=64)
    assert len(timings) == len(program.command_layers)
    given, taken = defaultdict(deque), 0
    for t, c in zip(timings, program.decoded(), strict=True):
        assert 0 < t.start < t.end
        for other in Engine:
            if c["wait"] >> other & 1:
                assert t.start > given[other, c["engine"]].popleft()
                taken += 1
            if c["signal"] >> other & 1:
                given[c["engine"], other].append(t.end)
    assert taken


@pytest.mark.parametrize("name", ["autoencoder-ad", "mobilenetv1-0.25-vww"])
def test_slower_memory_never_helps(name):
    graph = load_network(name)
    program = compile_graph(graph, Config())
    cycles = [predict_layers(program, latency).cycles for latency in (16, 64, 256)]
    assert cycles == sorted(cycles)
    narrow = predicted(name, graph, replace(Config(), axi_data_bits=64)).predicted.cycles
    assert narrow > cycles[1]


def test_weights_bound_a_network_of_products():
    """Every weight crosses the bus once; nothing can be faster."""
    result = predicted("autoencoder-ad", load_network("autoencoder-ad"), Config())
    beats = result.predicted.read_bytes / Config().beat_bytes
    assert beats < result.predicted.cycles < 1.1 * beats
