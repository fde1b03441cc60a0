"""The compiler's estimates against the cycle model."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from systole.isa import Config, Engine, Opcode
from systole.isa.timing import WindowShape
from systole.sw.compiler import Compiler, compile_graph
from systole.sw.compiler.costs import table_share, window_columns, work
from systole.sw.compiler.joins import _Joiner
from systole.sw.compiler.plan import PLAIN
from systole.sw.ir.graph import Graph
from systole.sw.simulate.commands import CommandDevice
from systole.sw.simulate.cycles import busy, predict_layers
from tests.helpers.layer_checks import check_program
from tests.helpers.networks import load_network
from tests.helpers.random_graphs import GraphBuilder

TOLERANCE = 0.15
LAYER = 1
"""Number of the layer that is measured: the one before keeps WINDOW busy until it begins, the one
behind leaves little to store, so that its cycles are WINDOW's."""


def depthwise(kernel: int, stride: int, dilation: int, *, channels: int, size: int) -> Graph:
    """A depthwise convolution of ``size`` x ``size`` outputs between two others on WINDOW."""
    b = GraphBuilder(np.random.default_rng(0))
    wide = (size - 1) * stride + (kernel - 1) * dilation + 1
    x = b.input((1, channels, wide, wide))
    x = b.conv(x, channels, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), group=channels)
    x = b.conv(
        x, channels, (kernel,) * 2, (stride,) * 2, (0, 0, 0, 0), (dilation,) * 2, group=channels
    )
    x = b.conv(x, channels, (2, 2), (size - 2,) * 2, (0, 0, 0, 0), (1, 1), group=channels)
    return b.graph([x])


GRID = list(itertools.product(range(2, 8), range(1, 4), range(1, 4)))


@pytest.mark.parametrize(
    ("channels", "size", "config"),
    [
        pytest.param(16, 16, Config(), id="one block"),
        pytest.param(40, 16, Config(), id="three blocks"),
        pytest.param(16, 40, Config(), id="several regions"),
        pytest.param(24, 20, Config.sized(8, 8), id="8x8"),
        pytest.param(16, 24, Config(window_kernel=3), id="3x3 fast path only"),
    ],
)
def test_estimates_of_depthwise_convolutions(channels: int, size: int, config: Config) -> None:
    # Everything stays on chip, as the cycles are to be WINDOW's.
    config = replace(config, scratchpad_bytes=config.rows << 18)
    for kernel, stride, dilation in GRID:
        case = f"{kernel=} {stride=} {dilation=}"
        graph = depthwise(kernel, stride, dilation, channels=channels, size=size)
        compiler = Compiler(graph, config)
        cycles = predict_layers(compiler.program(PLAIN), 64).layers[LAYER].cycles
        # The estimate of the search, which knows the regions.
        planner = compiler.planner()
        plan, stage = planner.plan(), planner.stages[LAYER]
        estimate = work(stage, plan.stages[LAYER], plan.resident, config)
        assert set(estimate) == {Engine.WINDOW}, case
        assert estimate[Engine.WINDOW] == pytest.approx(cycles, rel=TOLERANCE), case
        # That of joining, which does not.
        joiner = _Joiner(graph, config)
        rewrite = joiner._rewrite(set())
        estimate = joiner._cycles(rewrite, rewrite.items[LAYER])
        assert estimate == pytest.approx(cycles, rel=TOLERANCE), case


def test_columns_of_wide_images() -> None:
    """As many pieces as keep the line memory's rows, where that is a gain."""

    def columns(width: int, kernel: int = 3, stride: int = 1, dilation: int = 1):
        shape = WindowShape(
            kernel=(kernel,) * 2, stride=(stride,) * 2, dilation=(dilation,) * 2, out=(8, width)
        )
        return window_columns(shape, Config())

    assert columns(254) == [(0, 254)]
    assert columns(255) == [(0, 127), (127, 128)]
    assert columns(128, stride=2) == [(0, 64), (64, 64)]
    assert columns(600, kernel=5) == [(0, 200), (200, 200), (400, 200)]
    assert columns(255, kernel=9) == [(0, 255)]  # a cycle a tap, however narrow
    assert columns(300, kernel=1) == [(0, 300)]  # that is as quick
    assert columns(300, kernel=2, stride=3) == [(0, 300)]
    assert columns(252, dilation=2) == [(0, 252)]
    assert columns(253, dilation=2) == [(0, 126), (126, 127)]
    assert columns(251, dilation=3) == [(0, 125), (125, 126)]
    assert columns(300, dilation=4) == [(0, 300)]  # a cycle a tap, however narrow


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation"), [(3, 1, 1), (5, 2, 1), (7, 1, 1), (3, 1, 2)]
)
def test_wide_images_stay_on_the_fast_path(kernel: int, stride: int, dilation: int) -> None:
    config = Config.sized(4, 4, window_width=16)
    b, pad = GraphBuilder(np.random.default_rng(0)), kernel // 2 * dilation
    x = b.input((1, 9, 11, 50))
    y = b.conv(x, 9, (kernel,) * 2, (stride,) * 2, (pad,) * 4, (dilation,) * 2, group=9)
    graph = b.graph([y])
    program = compile_graph(graph, config)
    shapes = [WindowShape.of_command(c) for c in program.decoded() if c["opcode"] == Opcode.WINDOW]
    assert len(shapes) > 3 and all(shape.is_fast(config) for shape in shapes)
    with CommandDevice(config, memory_bytes=1 << 20) as device:
        check_program(device, program, {x: b.values[x]}, b.values)


@pytest.mark.parametrize("config", [Config(), Config.sized(8, 8), Config.sized(12, 20)])
@pytest.mark.parametrize("name", ["resnet8", "dscnn-kws", "mobilenetv1-0.25-vww"])
def test_estimates_of_networks(name: str, config: Config) -> None:
    """All stages together keep CONV and POST as busy as the commands do."""
    compiler = Compiler(load_network(name), config)
    planner = compiler.planner()
    plan = planner.plan()
    estimate: Counter[Engine] = Counter()
    for stage, stage_plan in zip(planner.stages, plan.stages, strict=True):
        estimate += work(stage, stage_plan, plan.resident, config)
    cycles = busy(compiler.program(PLAIN))
    for engine, unit in ((Engine.CONV, "array"), (Engine.POST, "POST")):
        assert estimate[engine] == pytest.approx(cycles[unit], rel=TOLERANCE), unit


def test_a_table_is_read_for_every_tile() -> None:
    assert table_share(Config()) == 1 / 16
    assert table_share(Config.sized(8, 8)) == 1 / 8
