"""Checks of one model on a device, shared by the tests."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx

from systole.isa import Config
from systole.sw.compiler import Compiler, compile_graph
from systole.sw.compiler.plan import DoesNotFitError
from systole.sw.compiler.stripes import Chain, Schedule
from systole.sw.frontend.load import load as load_model
from systole.sw.golden import model as golden
from systole.sw.golden import oracle
from systole.sw.ir.graph import Graph
from systole.sw.runtime.device import Device
from systole.sw.runtime.driver import DEFAULT_TIMEOUT, Driver
from systole.sw.runtime.execute import compare, execute, load
from systole.sw.runtime.program import Program
from systole.sw.zoo import digits
from tests.helpers.random_models import (
    random_conv_model,
    random_gemm_model,
    random_graph_model,
    random_inputs,
)


def random_layer(seed: int, **limits: int) -> onnx.ModelProto:
    """A random convolution (every fifth: matrix product), QDQ or QLinear."""
    rng = np.random.default_rng(seed)
    form = ["qdq", "qlinear"][seed % 2]
    if seed % 5 == 4:
        return random_gemm_model(rng, form=form)
    group = ["one", "one", "one", "depthwise", "any"][seed // 5 % 5]
    return random_conv_model(rng, form=form, group=group, **limits)


def prepare(model: onnx.ModelProto, path, seed: int):
    """Load a model: the graph, random int8 inputs by tensor, and all tensors by the golden model,
    which must equal onnxruntime."""
    onnx.save(model, path)
    graph = load_model(path)
    arrays = random_inputs(np.random.default_rng(seed), model)
    inputs = {
        p.tensor: golden.quantise_input(p, graph.tensors[p.tensor], arrays[p.name])
        for p in graph.inputs
    }
    expected = golden.run(graph, inputs)
    reference = oracle.run(model, arrays)
    for p in graph.outputs:
        result = oracle.compare(p, graph.tensors[p.tensor], expected[p.tensor], reference[p.name])
        assert result.exact, f"golden against onnxruntime: {result}"
    return graph, inputs, expected


def load_random_model(seed: int, path):
    """Load a random model from a file: the graph, random inputs by tensor, and all tensors by the
    golden model."""
    onnx.save(random_graph_model(np.random.default_rng(seed)), path)
    graph, rng = load_model(path), np.random.default_rng(seed)
    shapes = {p.tensor: graph.tensors[p.tensor].shape for p in graph.inputs}
    inputs = {name: rng.integers(-128, 128, s).astype(np.int8) for name, s in shapes.items()}
    return graph, inputs, golden.run(graph, inputs)


Case = tuple[Program, dict[str, np.ndarray], dict[str, np.ndarray]]
"""A program, its inputs, all tensors by the golden model."""


@functools.cache
def digits_case(config: Config) -> Case:
    """The digits network on its first test image; all tensors go to DRAM."""
    folder = Path(digits.__file__).parent
    graph = load_model(folder / "digits.onnx")
    (port,) = graph.inputs
    with np.load(folder / "test.npz") as data:
        image = golden.quantise_input(port, graph.tensors[port.tensor], data["x"][:1])
    inputs = {port.tensor: image}
    return compile_graph(graph, config, dump=True), inputs, golden.run(graph, inputs)


def check_on(device: Device, config: Config, graph: Graph, inputs, expected, *, dump=True) -> int:
    """Compile and run a graph on a device, and compare each layer with ``expected``: the cycles."""
    return check_program(device, compile_graph(graph, config, dump=dump), inputs, expected)


def check_program(
    device: Device, program: Program, inputs, expected, *, limit: int = DEFAULT_TIMEOUT
) -> int:
    """Run a compiled program as :func:`check_on` does, for ``limit`` cycles at most; the cycles."""
    driver = Driver(device)
    load(driver, program)
    run = execute(driver, program, inputs, trace=False, timeout_cycles=limit)
    count, first = compare(program, run.tensors, expected)
    assert count == 0, str(first)
    return run.cycles


def _random_schedule(rng: np.random.Generator, count: int) -> Schedule:
    """Chains of a few stages here and there, and regions of any size between them."""
    chains, regions, i = [], [], 0
    while i < count:
        last = min(i + int(rng.integers(0, 5)), count - 1)
        if last > i:
            chains.append(Chain(i, last, int(rng.integers(2, 5))))
        elif rng.integers(2):
            regions.append((i, int(rng.integers(1, 200))))
        i = last + 1
    return Schedule(tuple(chains), tuple(regions))


def compile_by_chance(
    rng: np.random.Generator, graph: Graph, config: Config, *, dump: bool
) -> tuple[Program, Schedule]:
    """Compile by a random schedule, without those of its chains that do not fit: the program and
    the schedule."""
    compiler = Compiler(graph, config)
    schedule = _random_schedule(rng, len(compiler.stages))
    while True:
        try:
            return compiler.program(schedule, dump=dump), schedule
        except DoesNotFitError as e:
            assert e.chain.fused, e
            schedule = replace(schedule, chains=tuple(c for c in schedule.chains if c != e.chain))
