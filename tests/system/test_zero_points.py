"""Zero points at the edges of the array and the window engine: the RTL against the golden model."""

from __future__ import annotations

import random

import numpy as np
import pytest

from systole.isa import Config
from systole.sim.device import MemoryModel, RtlDevice
from systole.sw.golden import model as golden
from tests.helpers.layer_checks import check_on, prepare
from tests.helpers.product_models import attention_model, product_model, uint8_convolution
from tests.helpers.random_commands import check_on_both
from tests.helpers.random_operators import Sketch, makers

MEMORY = 16 << 20
CONFIGS = {
    "zeros-4x4": Config.sized(4, 4, zero_points=True),
    # And the window engine in passes.
    "zeros-fast": Config.sized(
        8, 8, zero_points=True, inner_product="fast", window_kernel=3, window_lanes=2
    ),
}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(n, marks=[pytest.mark.xdist_group(n), *marks])
        for n, marks in zip(CONFIGS, ([pytest.mark.long], []), strict=True)
    ],
)
def device(request):
    with RtlDevice(CONFIGS[request.param], memory_bytes=MEMORY) as device:
        yield device


def check(device: RtlDevice, model, path, seed: int) -> None:
    graph, inputs, expected = prepare(model, path, seed)
    device.set_memory_model(MemoryModel.hostile(seed) if seed % 2 else MemoryModel())
    check_on(device, device.config, graph, inputs, expected)


def test_convolutions_with_uint8_weights(device, tmp_path):
    """Depthwise and not, the window engine's ways, extreme weights and zero points."""
    for seed in range(12):
        rng = np.random.default_rng(seed)
        model = uint8_convolution(
            rng,
            [(0, 255), (255, 0), (7, 80)][seed % 3],
            channels=6 + seed,
            outputs=[None, None, None, 9][seed // 3],
            kernel=[(3, 3), (5, 5), (3, 3), (3, 1)][seed % 4],
            dilations=[1 + seed % 4 // 2] * 2,
            extreme=seed % 2 == 1,
        )
        check(device, model, tmp_path / "m.onnx", seed)


def test_products_of_activations(device, tmp_path):
    zeros = [(-128, 127), (127, -128), (-128, -128), (3, -5)]
    for seed, (za, zb) in enumerate(zeros):
        check(device, product_model((9, 21), (21, 13), (za, zb)), tmp_path / "m.onnx", seed)
    check(device, attention_model(np.uint8, 13, 3, 4), tmp_path / "m.onnx", 1)


def test_random_commands(device):
    """Any zero points, on both simulators."""
    rng = random.Random(1)
    for _ in range(8):
        check_on_both(rng, device, device.config, ["conv", "conv", "post", "DEPTHWISE"] * 5)


def test_random_operators(device):
    """Commands with zero points between commands without."""
    choice = makers(device.config)
    for seed in range(12):
        rng = np.random.default_rng(seed)
        sketch = Sketch(rng, uint8=seed % 2 == 0)
        for _ in range(3):
            choice[rng.integers(len(choice))](sketch, rng)
        graph = sketch.graph()
        inputs = {
            p.tensor: rng.integers(-128, 128, graph.tensors[p.tensor].shape).astype(np.int8)
            for p in graph.inputs
        }
        device.set_memory_model(MemoryModel())
        check_on(device, device.config, graph, inputs, golden.run(graph, inputs))
