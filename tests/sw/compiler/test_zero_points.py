"""Zero points at the engines' edges: one pass where there were several, and the same results."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from systole.isa import Config, Opcode, WindowOp
from systole.sw.compiler import compile_graph
from systole.sw.compiler.zeros import fitting_zero
from systole.sw.golden import model as golden
from systole.sw.runtime.program import Program
from systole.sw.session.backends import open_device
from tests.helpers.layer_checks import check_on, check_program, prepare
from tests.helpers.product_models import attention_model, product_model, uint8_convolution
from tests.helpers.random_operators import (
    Sketch,
    make_conv,
    make_select,
    make_shortcut,
    make_transposed,
)

ZERO_POINTS = Config.sized(8, 8, zero_points=True)
PLAIN = Config.sized(8, 8)


def checked(model, path, config: Config, seed: int = 0) -> Program:
    """The model's program, once it has run on the command-level simulator."""
    graph, inputs, expected = prepare(model, path, seed)
    program = compile_graph(graph, config, dump=True)
    with open_device("commands", config, memory_bytes=1 << 20) as device:
        check_program(device, program, inputs, expected)
    return program


def work(program: Program) -> Counter[Opcode]:
    """Vectors and windows by kind of command."""
    done: Counter[Opcode] = Counter()
    for c in program.decoded():
        if c["opcode"] == Opcode.CONV:
            done[Opcode.CONV] += (
                c["blocks"] * c["kernel_h"] * c["kernel_w"] * c["out_h"] * c["out_w"]
            )
        if c["opcode"] == Opcode.WINDOW and c["op"] == WindowOp.DEPTHWISE:
            done[Opcode.WINDOW] += c["blocks"] * c["out_h"] * c["out_w"]
    return done


@pytest.mark.parametrize(
    ("low", "high", "zero"),
    [
        *((-128, 127, 0), (-255, 0, 127), (0, 255, -128), (-129, 126, 1), (-126, 129, -2)),
        *((-255, 1, None), (-129, 127, None), (-128, 128, None), (0, 256, None)),
    ],
)
def test_the_zero_point_that_makes_weights_int8(low, high, zero):
    weights = np.array([low, high, 0], np.int16)
    assert fitting_zero(weights, ZERO_POINTS) == zero
    assert fitting_zero(weights, PLAIN) == (0 if zero == 0 else None)
    assert zero is None or np.array_equal(weights + zero, (weights + zero).astype(np.int8))


KERNELS = {
    "3x3": ((3, 3), {}),
    "5x5": ((5, 5), {"strides": [2, 2]}),
    "7x7": ((7, 7), {}),
    "dilated": ((3, 3), {"dilations": [2, 2], "pads": [2, 2, 2, 2]}),
    "general": ((2, 9), {"pads": [0, 4, 1, 4]}),
}
ZEROS = [(0, 255), (255, 0), (7, 80)]
"""Of the input and of the weights."""


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("zeros", ZEROS)
@pytest.mark.parametrize("extreme", [False, True])
def test_depthwise_with_uint8_weights(name, zeros, extreme, tmp_path):
    """One pass of the window engine; on the array without."""
    kernel, attributes = KERNELS[name]
    rng = np.random.default_rng(list(map(ord, name)))
    model = uint8_convolution(rng, zeros, kernel=kernel, extreme=extreme, **attributes)
    program = checked(model, tmp_path / "m.onnx", ZERO_POINTS)
    h, w = (-(-n // attributes.get("strides", (1, 1))[0]) for n in (14, 12))
    assert work(program) == {Opcode.WINDOW: 3 * h * w}
    assert work(checked(model, tmp_path / "m.onnx", PLAIN)).keys() == {Opcode.CONV}


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)])
@pytest.mark.parametrize("zeros", ZEROS)
@pytest.mark.parametrize("extreme", [False, True])
def test_convolution_with_uint8_weights(kernel, zeros, extreme, tmp_path):
    """One pass of the array; without, two or three."""
    rng = np.random.default_rng(kernel)
    model = uint8_convolution(rng, zeros, kernel=kernel, channels=24, outputs=13, extreme=extreme)
    once = work(checked(model, tmp_path / "m.onnx", ZERO_POINTS))
    assert once == {Opcode.CONV: 2 * 3 * kernel[0] * kernel[1] * 14 * 12}
    assert work(checked(model, tmp_path / "m.onnx", PLAIN))[Opcode.CONV] >= 2 * once[Opcode.CONV]


@pytest.mark.parametrize("zeros", [(-128, 127), (127, -128), (-128, -128), (3, 0), (0, -5)])
@pytest.mark.parametrize("shape", [(16, 16, 16), (9, 21, 13)])
def test_product_of_activations(zeros, shape, tmp_path):
    """One pass whatever the zero points."""
    m, k, n = shape
    model = product_model((m, k), (k, n), zeros)
    blocks = -(-k // 8) * -(-n // 8)
    assert work(checked(model, tmp_path / "m.onnx", ZERO_POINTS)) == {Opcode.CONV: m * blocks}
    assert work(checked(model, tmp_path / "m.onnx", PLAIN))[Opcode.CONV] > m * blocks


@pytest.mark.parametrize(("length", "heads", "size"), [(8, 2, 8), (13, 3, 4), (17, 3, 5)])
def test_attention(length, heads, size, tmp_path):
    """Heads that fill words, share them and straddle them."""
    model = attention_model(np.uint8, length, heads, size)
    once = work(checked(model, tmp_path / "m.onnx", ZERO_POINTS))[Opcode.CONV]
    assert once < 0.8 * work(checked(model, tmp_path / "m.onnx", PLAIN))[Opcode.CONV]


def test_weights_of_other_operators(tmp_path):
    """Transposed convolutions, weighted selections and additions fused into convolutions."""
    for seed in range(24):
        rng = np.random.default_rng(seed)
        sketch = Sketch(rng, uint8=True)
        for make in (make_conv, make_transposed, make_select, make_shortcut):
            make(sketch, rng)
        graph = sketch.graph()
        inputs = {
            p.tensor: rng.integers(-128, 128, graph.tensors[p.tensor].shape).astype(np.int8)
            for p in graph.inputs
        }
        with open_device("commands", ZERO_POINTS, memory_bytes=8 << 20) as device:
            check_on(device, ZERO_POINTS, graph, inputs, golden.run(graph, inputs))


def test_without_the_option_no_command_names_a_zero_point(tmp_path):
    model = uint8_convolution(np.random.default_rng(0), (7, 200))
    for c in checked(model, tmp_path / "m.onnx", PLAIN).decoded():
        assert not c.get("weight_zero") and not c.get("input_zero")
