"""The RTL against the golden model: random layers and graphs, whole networks, several
configurations, both simulators; cycle counts; what happens when something goes wrong.

One simulator process per configuration serves all its tests, so that tests also see what earlier
programs leave behind. Tests of one configuration stay in one worker (``xdist_group``): nothing is
built twice at a time."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import numpy as np
import onnx
import pytest

from systole.isa import Config, Engine
from systole.isa.csr import EngineState
from systole.isa.tools import assembler
from systole.sim.device import MemoryModel, RtlDevice
from systole.sw import zoo
from systole.sw.compiler import compile_graph
from systole.sw.frontend.inputs import random_inputs
from systole.sw.frontend.load import load as load_model
from systole.sw.golden import model as golden
from systole.sw.ir.graph import ModelError
from systole.sw.report.layers import layers, traffic
from systole.sw.runtime.device import DeviceError
from systole.sw.runtime.driver import DeviceFault, Driver
from systole.sw.runtime.execute import compare, execute, load, memory_needed
from systole.sw.zoo import digits
from tests.helpers.layer_checks import check_on, load_random_model, prepare, random_layer
from tests.helpers.marks import needs_icarus
from tests.helpers.operator_models import (
    OTHER_LAYOUTS,
    REPEATING,
    repeated_model,
    two_layouts_model,
)
from tests.helpers.product_models import attention_model
from tests.helpers.random_graphs import GraphBuilder, random_graph, random_joins, random_windows
from tests.helpers.random_operators import Sketch, makers

MEMORY = 64 << 20

CYCLES = {"resnet8": 51306, "gemm": 9421}
"""Cycles of the networks at 16x16 with the memory model's defaults, trace off. A change of hardware
or compiler that moves them is welcome or not; a test that fails says the new number to write here.
"""

DEFAULT, SMALL = Config(), Config.sized(4, 4)
FAST = Config.sized(4, 4, inner_product="fast")


def _tiny(rows: int, cols: int, words: int, tiles: int, acc: int, **fields) -> Config:
    return Config(
        rows=rows,
        cols=cols,
        scratchpad_bytes=rows * words,
        weight_bytes=rows * cols * tiles,
        accumulator_bytes=8 * cols * acc,
        **fields,
    )


OTHERS = {
    "8x8": Config.sized(8, 8),
    "8x16": Config.sized(8, 16),
    "12x20": Config.sized(12, 20),
    "32x32": Config.sized(32, 32),
    "6x4": Config.sized(6, 4),
    "5x7": Config.sized(5, 7),
    "classic": Config.sized(8, 8, cell=1, axi_data_bits=32, banks=2, post_lanes=4, window_lanes=4),
    "wide-bus": Config.sized(16, 4, axi_data_bits=512, banks=8),
    "bare": Config.sized(
        *(8, 8),
        window=False,
        trace=False,
        counters=False,
        queue_depth=2,
        axi_outstanding=1,
        axi_burst_beats=1,
    ),
    "tiny": _tiny(4, 8, 1024, 2, 16, queue_depth=2, axi_data_bits=64),
    "wide-cols": Config.sized(
        4, 16, axi_data_bits=64, banks=16, cell=8, window_width=16, window_kernel=3
    ),
    "fast-8x8": Config.sized(8, 8, inner_product="fast", cell=2),
    "fast-6x4": Config.sized(6, 4, inner_product="fast"),
    "long-bursts": Config.sized(
        20,
        12,
        axi_burst_beats=256,
        axi_data_bits=64,
        axi_outstanding=64,
        post_lanes=1,
        window_lanes=5,
    ),
}


@pytest.fixture(scope="module")
def devices():
    """A function that gives the one device of a configuration, opened again if it has ended."""
    opened: dict[Config, RtlDevice] = {}

    def device(config: Config) -> RtlDevice:
        if config in opened and opened[config].closed:
            del opened[config]
        if config not in opened:
            opened[config] = RtlDevice(config, memory_bytes=MEMORY)
        opened[config].set_memory_model(MemoryModel())
        return opened[config]

    yield device
    for each in opened.values():
        each.close()


def network(name: str, path: Path, **parameters: int):
    """The graph of a network of the zoo, random inputs by tensor, all tensors by the golden
    model."""
    return loaded(zoo.build(name, **parameters), path)


def loaded(model: onnx.ModelProto, path: Path, seed: int = 0):
    """The graph of a model, random inputs by tensor, all tensors by the golden model."""
    onnx.save(model, path)
    graph = load_model(path)
    arrays = random_inputs(graph, seed)
    inputs = {
        p.tensor: golden.quantise_input(p, graph.tensors[p.tensor], arrays[p.name])
        for p in graph.inputs
    }
    return graph, inputs, golden.run(graph, inputs)


def _memory_for(seed: int) -> MemoryModel:
    """Every other one with random backpressure."""
    return MemoryModel.hostile(seed) if seed % 2 else MemoryModel()


def check_layer(device: RtlDevice, config: Config, seed: int, path: Path) -> None:
    limits = {"channels": 70, "size": 20, "work": 1_000_000}
    graph, inputs, expected = prepare(random_layer(seed, **limits), path, seed)
    device.set_memory_model(_memory_for(seed))
    try:
        check_on(device, config, graph, inputs, expected, dump=seed % 3 == 0)
    except ModelError:
        # Large kernels' constants alone may be too much.
        assert config is OTHERS["tiny"]
    except Exception as e:
        e.add_note(f"layer {seed}, {config.rows}x{config.cols}")
        raise


def check_model(device: RtlDevice, model: onnx.ModelProto, path: Path, seed: int) -> None:
    graph, inputs, expected = loaded(model, path, seed)
    device.set_memory_model(_memory_for(seed))
    check_on(device, device.config, graph, inputs, expected, dump=seed % 3 == 0)


def check_graph(device: RtlDevice, config: Config, seed: int) -> None:
    graph, inputs, expected = random_graph(seed, window=config.window, work=300_000)
    device.set_memory_model(_memory_for(seed))
    try:
        check_on(device, config, graph, inputs, expected, dump=seed % 3 == 0)
    except Exception as e:
        e.add_note(f"graph {seed}, {config.rows}x{config.cols}")
        raise


def check_operators(device: RtlDevice, config: Config, seed: int) -> None:
    """Up to four operators of every kind the compiler takes, each with inputs of its own; of every
    third seed all but one are constants."""
    rng = np.random.default_rng(seed)
    sketch = Sketch(rng, constants=seed % 3 == 1)
    choice = makers(config)
    for _ in range(rng.integers(1, 5)):
        choice[rng.integers(len(choice))](sketch, rng)
    graph = sketch.graph()
    inputs = {
        p.tensor: rng.integers(-128, 128, graph.tensors[p.tensor].shape).astype(np.int8)
        for p in graph.inputs
    }
    device.set_memory_model(_memory_for(seed))
    try:
        check_on(device, config, graph, inputs, golden.run(graph, inputs), dump=seed % 3 == 0)
    except ModelError:
        assert config is OTHERS["tiny"]
    except Exception as e:
        e.add_note(f"operators {seed}, {config.rows}x{config.cols}")
        raise


def on(name: str):
    """Marks a test of the configuration ``name``."""
    return pytest.mark.xdist_group(name)


BOTH = [
    pytest.param(DEFAULT, marks=on("16x16"), id="16x16"),
    pytest.param(SMALL, marks=on("4x4"), id="4x4"),
]

# Against the golden model -------------------------------------------------------------------------


@pytest.mark.parametrize("first", range(0, 32, 8))
@pytest.mark.parametrize("config", BOTH)
def test_random_layers(devices, config, first, tmp_path):
    for seed in range(first, first + 8):
        check_layer(devices(config), config, seed, tmp_path / "layer.onnx")


@pytest.mark.parametrize("first", range(0, 24, 8))
@pytest.mark.parametrize("config", BOTH)
def test_random_graphs(devices, config, first):
    for seed in range(first, first + 8):
        check_graph(devices(config), config, seed)


@pytest.mark.parametrize(
    "make, seeds",
    [
        # Depthwise convolutions and pools of large, strided and dilated windows.
        pytest.param(random_windows, range(600, 616), id="windows"),
        # Concatenations and what reads them.
        pytest.param(random_joins, range(500, 512), id="joins"),
    ],
)
@pytest.mark.parametrize("config", BOTH)
def test_random_graphs_of_a_kind(devices, config, make, seeds):
    for seed in seeds:
        graph, inputs, expected = make(seed)
        device = devices(config)
        device.set_memory_model(_memory_for(seed))
        check_on(device, config, graph, inputs, expected, dump=seed % 3 == 0)


@pytest.mark.parametrize("first", (0, 10))
def test_random_models(devices, first, tmp_path):
    device = devices(SMALL)
    for seed in range(first, first + 10):
        graph, inputs, expected = load_random_model(seed, tmp_path / "model.onnx")
        device.set_memory_model(_memory_for(seed))
        check_on(device, SMALL, graph, inputs, expected, dump=seed % 3 == 0)


@pytest.mark.parametrize("config", BOTH)
def test_random_operators(devices, config):
    for seed in range(24):
        check_operators(devices(config), config, seed)


@pytest.mark.parametrize("config", BOTH)
def test_attention(devices, config, tmp_path):
    """Products of activations with heads that fill words, share them and straddle them."""
    for seed, (length, heads, size, batch) in enumerate(
        [(8, 2, 8, 1), (13, 3, 4, 1), (17, 3, 5, 2), (20, 2, 16, 1)]
    ):
        model = attention_model([np.int8, np.uint8][seed % 2], length, heads, size, batch)
        graph, inputs, expected = prepare(model, tmp_path / "model.onnx", seed)
        devices(config).set_memory_model(_memory_for(seed))
        check_on(devices(config), config, graph, inputs, expected)


@on("4x4")
@pytest.mark.parametrize("name", REPEATING)
def test_operands_repeated_by_an_operator(devices, name, tmp_path):
    """The mean of an image, brought to its size in front of arithmetic."""
    for seed, op_type in enumerate(("Add", "Sub", "Mul")):
        for swapped in (False, True):
            model = repeated_model(name, op_type, swapped=swapped)
            check_model(devices(SMALL), model, tmp_path / "model.onnx", seed)


@on("4x4")
@pytest.mark.parametrize("other", OTHER_LAYOUTS)
def test_operands_in_two_layouts(devices, other, tmp_path):
    for seed, op_type in enumerate(("Add", "Sub", "Mul")):
        model = two_layouts_model(other, op_type, swapped=seed == 1)
        check_model(devices(SMALL), model, tmp_path / "model.onnx", seed)


@on("4x4")
def test_memories_need_not_answer_collisions_or_start_at_zero(tmp_path):
    """Memories that hold noise at first, as registers do here, and that give a wrong word when one
    is read and written in the same cycle, as block RAM and SRAM macros may."""
    with RtlDevice(SMALL, memory_bytes=MEMORY, start_seed=1) as device:
        graph, inputs, expected = network("dscnn-kws", tmp_path / "model.onnx")
        check_on(device, SMALL, graph, inputs, expected, dump=True)
        for seed in range(12):
            check_layer(device, SMALL, seed, tmp_path / "layer.onnx")
            check_graph(device, SMALL, seed)
            check_operators(device, SMALL, seed)


@on("fast")
def test_fast_inner_product(devices, tmp_path):
    """Layers, graphs, operators and products of activations with half of the multipliers; commands
    and cycles, but for the array's latency, are those of the plain inner product."""
    device = devices(FAST)
    for seed in range(8):
        check_layer(device, FAST, seed, tmp_path / "layer.onnx")
        check_graph(device, FAST, seed)
        check_operators(device, FAST, seed)
    model = attention_model(np.uint8, 13, 3, 4, 1)
    graph, inputs, expected = prepare(model, tmp_path / "model.onnx", 1)
    device.set_memory_model(MemoryModel())
    fast = check_on(device, FAST, graph, inputs, expected)
    assert fast == pytest.approx(check_on(devices(SMALL), SMALL, graph, inputs, expected), rel=0.02)


@on("16x16")
def test_digits_model(devices):
    folder = Path(digits.__file__).parent
    graph = load_model(folder / "digits.onnx")
    port, out = graph.inputs[0], graph.outputs[0]
    program = compile_graph(graph, DEFAULT)
    driver = Driver(devices(DEFAULT))
    load(driver, program)
    with np.load(folder / "test.npz") as data:
        images = data["x"][:10]
    for image in images:
        x = golden.quantise_input(port, graph.tensors[port.tensor], image[None])
        result = execute(driver, program, {port.tensor: x}, trace=False)
        expected = golden.run(graph, {port.tensor: x})
        assert np.array_equal(result.tensors[out.tensor], expected[out.tensor])


@on("16x16")
@pytest.mark.parametrize(
    ("name", "parameters"), [("resnet8", {}), ("gemm", {"m": 128, "k": 128, "n": 128})]
)
def test_networks_are_exact_and_take_the_cycles_they_took(devices, name, parameters, tmp_path):
    graph, inputs, expected = network(name, tmp_path / "model.onnx", **parameters)
    device = devices(DEFAULT)
    check_on(device, DEFAULT, graph, inputs, expected, dump=True)
    cycles = check_on(device, DEFAULT, graph, inputs, expected, dump=False)
    assert cycles == CYCLES[name], f"{name} took {cycles} cycles, not {CYCLES[name]}"


# Time ---------------------------------------------------------------------------------------------


@on("16x16")
def test_runs_repeat_exactly(devices):
    """From the reset on, without loading the program again: same outputs, cycles, counters."""
    graph, inputs, expected = random_graph(7, ops=10, work=1_000_000)
    program = compile_graph(graph, DEFAULT)
    device = devices(DEFAULT)
    device.reset()
    driver = Driver(device)
    load(driver, program)
    runs = [execute(driver, program, inputs, trace=True) for _ in range(3)]
    for each in runs:
        assert compare(program, each.tensors, expected) == (0, None)
        assert each.cycles == runs[0].cycles and each.counters == runs[0].counters
        assert np.array_equal(each.events, runs[0].events)


@on("16x16")
def test_the_report_adds_up(devices, tmp_path):
    """Layers' cycles to the run's, their bytes and the commands' to the bus's."""
    graph, inputs, _ = network("resnet8", tmp_path / "model.onnx")
    program = compile_graph(graph, DEFAULT)
    driver = Driver(devices(DEFAULT))
    load(driver, program)
    result = execute(driver, program, inputs, trace=True)
    counters, beat = result.counters, DEFAULT.beat_bytes
    assert counters["TRACE_DROPPED"] == 0
    assert counters["COMMANDS"] == len(program.command_layers)
    assert counters["TRACE_COUNT"] == len(result.events) == 2 * len(program.command_layers)
    rows = layers(program, result.events, result.cycles)
    assert sum(row.cycles for row in rows) == result.cycles
    # A little of a layer's work may lie in the cycles of the one before.
    assert all(row.cycles > 0 and row.utilisation < 1.1 for row in rows)
    read, written = (sum(column) for column in zip(*traffic(program)))
    assert read == sum(row.dram_read_bytes for row in rows)
    assert written == sum(row.dram_write_bytes for row in rows)
    commands = -(-8 * program.command_words // beat) * beat
    assert counters["READ_BEATS"] * beat == read + commands
    assert counters["WRITE_BEATS"] * beat == written
    for engine in (Engine.CONV, Engine.POST, Engine.WINDOW):
        # A counter is of the lowest engine missing in each cycle, an event of the last cycle's.
        told = sum(row.stalls.get(f"{engine.name}<{e.name}", 0) for row in rows for e in Engine)
        counted = sum(counters[f"{engine.name}_WAIT_{e.name}"] for e in Engine)
        assert counted > 100 and abs(told - counted) <= counted // 50
    for engine in Engine:
        mine = [v for k, v in counters.items() if k.startswith(f"{engine.name}_")]
        assert len(mine) == 8 and sum(mine) <= result.cycles


@on("16x16")
def test_tracing_costs_no_cycles_without_traffic_to_share(devices, tmp_path):
    graph, inputs, _ = network("gemm", tmp_path / "model.onnx", m=16, k=64, n=64)
    program = compile_graph(graph, DEFAULT)
    driver = Driver(devices(DEFAULT))
    load(driver, program)
    plain, traced = (execute(driver, program, inputs, trace=t).cycles for t in (False, True))
    assert plain <= traced <= 1.02 * plain + 50


# Icarus -------------------------------------------------------------------------------------------


@on("4x4")
@needs_icarus
def test_icarus_agrees_to_the_cycle(devices):
    b = GraphBuilder(np.random.default_rng(1))
    x = b.conv(b.input((1, 3, 4, 4)), 5, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1))
    b.pool(x, "max", (2, 2), (2, 2), (0, 0, 0, 0))
    graph = b.graph(["t1"])
    inputs = {"in0": b.values["in0"]}
    expected = check_on(devices(SMALL), SMALL, graph, inputs, b.values)
    with RtlDevice(SMALL, simulator="icarus", memory_bytes=1 << 20) as icarus:
        assert check_on(icarus, SMALL, graph, inputs, b.values) == expected


# When something goes wrong ------------------------------------------------------------------------

STUCK = "LOAD dram=4096 count0=1 count1=1 count2=1\nCONV wait=WLOAD\nEND"
"""CONV waits for a token that never comes."""


def _load_text(driver: Driver, text: str, memory_bytes: int = 8192) -> None:
    words = assembler.assemble(text)
    driver.load(
        np.array(words, "<u8").tobytes(),
        command_offset=0,
        command_words=len(words),
        memory_bytes=memory_bytes,
    )


def _still_works(device: RtlDevice) -> None:
    graph, inputs, expected = random_graph(2, ops=3, work=100_000)
    check_on(device, device.config, graph, inputs, expected)


@pytest.mark.parametrize("config", BOTH)
def test_watchdog_names_what_every_engine_waits_for(devices, config):
    device = devices(config)
    driver = Driver(device)
    _load_text(driver, STUCK)
    with pytest.raises(DeviceFault) as e:
        driver.run(watchdog=2000)
    assert (e.value.name, e.value.engine, e.value.index) == ("WATCHDOG", None, 2)
    assert 2000 <= e.value.cycles <= 2500
    conv = e.value.engines[Engine.CONV]
    assert (conv.state, conv.missing, conv.head) == (EngineState.WAITING, (Engine.WLOAD,), 1)
    others = [x for x in e.value.engines if x.engine != Engine.CONV]
    assert all(x.state == EngineState.IDLE for x in others)
    assert "CONV waits before command 1, missing token: WLOAD" in str(e.value)
    _still_works(device)


@on("4x4")
def test_timeout_without_watchdog(devices):
    device = devices(SMALL)
    driver = Driver(device)
    _load_text(driver, STUCK)
    with pytest.raises(DeviceFault, match=r"^TIMEOUT after .* CONV waits before command 1"):
        driver.run(watchdog=0, timeout_cycles=3000)
    _still_works(device)


@pytest.mark.parametrize("config", BOTH)
def test_window_too_small(devices, config):
    """The window ends before what the program's last STORE writes."""
    graph, inputs, _ = random_graph(11, ops=4, work=300_000)
    program = compile_graph(graph, config)
    driver = Driver(devices(config))
    ends = [p.offset + p.bytes for p in program.tensors.values()]
    driver.load(
        program.image,
        command_offset=0,
        command_words=program.command_words,
        memory_bytes=max(ends) - config.vector_bytes,
    )
    for port in program.inputs:
        place = program.tensors[port.tensor]
        data = place.pack(inputs[port.tensor], config)[: driver.program_bytes - place.offset]
        driver.write_data(place.offset, data)
    with pytest.raises(DeviceFault) as e:
        driver.run()
    assert e.value.name == "DRAM_WINDOW" and e.value.engine in (Engine.LOAD, Engine.STORE)
    assert program.command_layers[e.value.index] >= 0
    _still_works(devices(config))


@on("4x4")
def test_bus_errors_are_faults(devices):
    device = devices(SMALL)
    graph, inputs, _ = random_graph(11, ops=4, work=300_000)
    program = compile_graph(graph, SMALL)
    driver = Driver(device)
    load(driver, program)
    out = program.tensors[program.outputs[-1].tensor]
    where = {"error_first": out.offset, "error_last": out.offset}
    device.set_memory_model(MemoryModel(error_write=True, **where))
    with pytest.raises(DeviceFault) as e:
        execute(driver, program, inputs, trace=False)
    assert (e.value.name, e.value.engine) == ("AXI_WRITE", Engine.STORE)
    source = program.tensors[program.inputs[0].tensor]
    where = {"error_first": source.offset, "error_last": source.offset}
    device.set_memory_model(MemoryModel(error_read=True, error_response=3, **where))
    with pytest.raises(DeviceFault) as e:
        execute(driver, program, inputs, trace=False)
    assert (e.value.name, e.value.engine) == ("AXI_READ", Engine.LOAD)
    device.set_memory_model(MemoryModel())
    _still_works(device)


@on("4x4")
def test_other_hardware_is_refused(devices):
    device = devices(SMALL)
    device.config = dataclasses.replace(SMALL, queue_depth=8)
    try:
        with pytest.raises(DeviceError, match="generated from another configuration"):
            Driver(device)
    finally:
        device.config = SMALL
    _still_works(device)


@on("4x4")
def test_a_simulator_that_dies_in_a_run():
    device = RtlDevice(SMALL, memory_bytes=1 << 20)
    driver = Driver(device)
    _load_text(driver, STUCK)
    killer = threading.Timer(1.0, device._process.kill)
    killer.start()
    with pytest.raises(DeviceError, match="died of SIGKILL"):
        driver.run(watchdog=0)
    killer.join()
    with pytest.raises(DeviceError, match="closed"):
        driver.run()
    device.close()


# Other configurations -----------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("name", [pytest.param(name, marks=on(name)) for name in OTHERS])
def test_other_configurations(devices, name, tmp_path):
    """The network, then random layers and graphs."""
    config = OTHERS[name]
    device = devices(config)
    if name not in ("bare", "5x7"):  # No pools; no gain.
        graph, inputs, expected = network("resnet8", tmp_path / "model.onnx")
        assert memory_needed(compile_graph(graph, config)) < MEMORY
        check_on(device, config, graph, inputs, expected)
    for seed in range(40):
        check_layer(device, config, seed, tmp_path / "layer.onnx")
    for seed in range(40):
        check_graph(device, config, seed)
        check_operators(device, config, seed)
