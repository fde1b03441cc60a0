"""Random single layers: compiled, run on the command-level simulator, equal to the golden model,
and the golden model equal to onnxruntime."""

import pytest

from systole.isa import Config
from systole.sw.session.backends import open_device
from tests.helpers.layer_checks import check_on, prepare, random_layer
from tests.helpers.marks import fewer_unless_long

LAYERS = 500
CHUNK = 25

SMALL = dict(scratchpad_bytes=32768, weight_bytes=8192, accumulator_bytes=4096)
CONFIGS = [
    Config(),
    Config.sized(4, 4),
    Config.sized(12, 20),
    Config.sized(16, 16, **SMALL),
    Config.sized(8, 16),
    Config.sized(16, 4),
    Config.sized(32, 32),
    Config.sized(16, 16, axi_data_bits=64, banks=8, queue_depth=4),
]
"""``SMALL`` forces tiling and weight streaming on layers of ordinary size."""


@pytest.mark.parametrize("first", fewer_unless_long(range(0, LAYERS, CHUNK), fast=10))
def test_random_layers_on_commands(first, tmp_path):
    for seed in range(first, first + CHUNK):
        config = CONFIGS[seed % len(CONFIGS)]
        graph, inputs, expected = prepare(random_layer(seed), tmp_path / "layer.onnx", seed)
        with open_device("commands", config, memory_bytes=256 << 20) as device:
            try:
                check_on(device, config, graph, inputs, expected)
            except Exception as e:
                e.add_note(f"seed {seed}, {config.rows}x{config.cols}")
                raise
