"""Random graphs of attention and norms, whole on the accelerator, every layer equal to the golden
model: on the command-level simulator and on the RTL."""

from __future__ import annotations

from pathlib import Path

import pytest

from systole.isa import Config
from systole.sim.device import RtlDevice
from systole.sw.session.run import RunOptions
from tests.helpers.marks import fewer_unless_long
from tests.helpers.random_attention import check_transformer

OPTIONS = {"row_ops": True, "zero_points": True}
SHAPES = ((8, 8), (8, 16), (12, 20), (16, 16), (32, 32))
CONFIGS = [
    *(Config.sized(*shape, **OPTIONS) for shape in SHAPES),
    Config.sized(16, 16, row_ops=True),
    Config.sized(16, 8, **OPTIONS, axi_data_bits=64, window_lanes=4, post_lanes=4),
]
GRAPHS, CHUNK = 210, 7
ON_RTL = {(8, 8): 4, (12, 20): 1}
"""Graphs on the RTL of each shape; ten times as many in the long run."""


@pytest.mark.parametrize("first", fewer_unless_long(range(0, GRAPHS, CHUNK), fast=3))
def test_random_transformers_on_commands(first: int, tmp_path: Path) -> None:
    for seed in range(first, first + CHUNK):
        config = CONFIGS[seed % len(CONFIGS)]
        check_transformer(seed, tmp_path / "graph.onnx", RunOptions(config, simulator="commands"))


@pytest.mark.parametrize(
    ("shape", "times"),
    [
        *((shape, 1) for shape in ON_RTL),
        *(pytest.param(shape, 10, marks=pytest.mark.long) for shape in ON_RTL),
    ],
)
def test_random_transformers_on_rtl(shape: tuple[int, int], times: int, tmp_path: Path) -> None:
    config = Config.sized(*shape, **OPTIONS)
    with RtlDevice(config, memory_bytes=64 << 20) as device:
        for seed in range(times * ON_RTL[shape]):
            options = RunOptions(config, simulator="verilator", device=device)
            check_transformer(1000 + seed, tmp_path / "graph.onnx", options, tokens=20)
