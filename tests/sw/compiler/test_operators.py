"""Every graph operator with random parameters, compiled for random memories: the command-level
simulator (races included) against the golden model."""

import numpy as np
import pytest

from systole.isa import Config
from systole.sw.golden import model as golden
from systole.sw.session.backends import open_device
from tests.helpers.layer_checks import (
    check_on,
    check_program,
    compile_by_chance,
    load_random_model,
)
from tests.helpers.random_operators import MAKERS, Sketch, makers

SMALL = dict(scratchpad_bytes=32768, weight_bytes=8192, accumulator_bytes=4096)
CONFIGS = [
    Config(),
    Config.sized(4, 4, scratchpad_bytes=8192),
    Config.sized(12, 20),
    Config.sized(16, 16, **SMALL),
    Config.sized(8, 16, window=False),
    Config.sized(4, 4, scratchpad_bytes=16384, row_ops=True),
    Config.sized(12, 20, row_ops=True),
]


SEEDS = [*range(301), 1000, 1129, 2005]
"""257: a concatenation of what is stored in another order. 1129: an interleaved output in several
regions; 2005: a Select that changes rows, between others."""


@pytest.mark.parametrize("seed", SEEDS)
def test_random_graph_on_commands(seed, tmp_path):
    """Models from their ONNX files, also by a random schedule."""
    graph, inputs, expected = load_random_model(seed, tmp_path / "model.onnx")
    config, rng = CONFIGS[seed % 3], np.random.default_rng(seed)
    with open_device("commands", config, memory_bytes=64 << 20) as device:
        check_on(device, config, graph, inputs, expected)
        program, _ = compile_by_chance(rng, graph, config, dump=True)
        check_program(device, program, inputs, expected)


@pytest.mark.parametrize("make", MAKERS, ids=lambda m: m.__name__)
def test_operator_on_commands(make):
    for seed in range(40):
        rng = np.random.default_rng(seed)
        config = CONFIGS[seed % len(CONFIGS)]
        if make not in makers(config):
            continue
        sketch = Sketch(rng, constants=seed % 4 == 3)
        make(sketch, rng)
        graph = sketch.graph()
        inputs = {
            p.tensor: rng.integers(-128, 128, graph.tensors[p.tensor].shape).astype(np.int8)
            for p in graph.inputs
        }
        expected = golden.run(graph, inputs)
        with open_device("commands", config, memory_bytes=64 << 20) as device:
            try:
                check_on(device, config, graph, inputs, expected)
            except BaseException as e:
                e.add_note(f"seed {seed}, {config.rows}x{config.cols}")
                raise
