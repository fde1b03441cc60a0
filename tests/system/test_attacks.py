"""Attacks on the machine, replayable by seed: damaged programs, removed tokens, resets and bus
faults while everything is at work. Whatever happens, the next good program is right."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import numpy as np
import pytest

from systole.isa import Config, Engine, Opcode, TraceKind, WindowOp, command_at, encode
from systole.isa.tools import assembler
from systole.sim.device import MemoryModel, RtlDevice
from systole.sw.compiler import compile_graph
from systole.sw.runtime.device import Device, DeviceError
from systole.sw.runtime.driver import DeviceFault, Driver
from systole.sw.runtime.execute import compare, execute, load
from systole.sw.runtime.program import Program
from systole.sw.simulate.commands import CommandDevice
from systole.sw.simulate.races import CommandError, MissingToken
from tests.helpers.command_reference import Reference
from tests.helpers.damaged_programs import damaged, removed_waits
from tests.helpers.layer_checks import check_program
from tests.helpers.random_graphs import GraphBuilder, random_graph

SMALL = Config.sized(4, 4)
MEMORY = 1 << 20
WATCHDOG = 5000
GRAPHS = 8
BLOCK, SHORT, LONG = 50, 100, 2000
ON_RTL = pytest.mark.xdist_group("4x4")


@pytest.fixture(scope="module")
def rtl():
    with RtlDevice(SMALL, memory_bytes=MEMORY) as device:
        yield device


def blocks(short: int, long: int, size: int) -> list:
    """First seeds of blocks; those from ``short`` are for ``make test-long``."""
    marks = [pytest.mark.long]
    return [pytest.param(i, marks=marks if i >= short else []) for i in range(0, long, size)]


@functools.cache
def small_program(seed: int) -> tuple[Program, dict, dict]:
    """A program of some dozen commands, its inputs, all tensors by the golden model."""
    graph, inputs, expected = random_graph(seed, ops=4, size=8, channels=12, work=20_000)
    return compile_graph(graph, SMALL), inputs, expected


@functools.cache
def busy_program() -> tuple[Program, dict, dict]:
    """A program in which CONV, POST and WINDOW are at work at the same time."""
    b = GraphBuilder(np.random.default_rng(4))
    x = b.conv(b.input((1, 5, 10, 10)), 12, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1))
    # Dilated: a tap a cycle.
    y = b.conv(x, 12, (1, 3), (1, 1), (0, 2, 0, 2), (1, 2), group=12)
    x = b.conv(y, 12, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1))
    x = b.add(x, y)
    x = b.pool(x, "max", (3, 3), (2, 2), (0, 0, 1, 1))
    b.add(x, x)
    graph = b.graph(["t5"])
    # All results go to DRAM, so that there is traffic while the engines work.
    return compile_graph(graph, SMALL, dump=True), {"in0": b.values["in0"]}, b.values


# Damaged programs ---------------------------------------------------------------------------------


def outcome(device: Device, program: Program, inputs: dict) -> tuple[DeviceError | None, bytes]:
    """What a program runs into, and the DRAM window when it has ended without."""
    driver = Driver(device)
    device.write_memory(0, bytes(program.memory_bytes))
    load(driver, program)
    for port in program.inputs:
        place = program.tensors.get(port.tensor)
        if place is not None:
            driver.write_data(place.offset, place.pack(inputs[port.tensor], SMALL))
    try:
        driver.run(watchdog=WATCHDOG)
    except DeviceError as e:
        driver.reset()
        return e, b""
    return None, driver.read_data(0, program.memory_bytes)


def slow(program: Program) -> bool:
    """Whether a legal command may take longer than the watchdog allows here."""
    return any(
        c["opcode"] in (Opcode.LOAD, Opcode.STORE)
        and c["count0"] * c["count1"] * c["count2"] > WATCHDOG // 8
        for c in program.decoded()
    )


def check_damaged(rtl: RtlDevice, commands: Device, seed: int) -> str:
    """Both simulators make the same of a damaged program. Returns the fault's name."""
    rng = np.random.default_rng(seed)
    good, inputs, expected = small_program(int(rng.integers(GRAPHS)))
    program = damaged(rng, good)
    said, content = outcome(commands, program, inputs)
    found, written = outcome(rtl, program, inputs)
    assert found is None or isinstance(found, DeviceFault)
    if said is None:
        if found is not None:
            assert found.name == "WATCHDOG" and slow(program)
        else:
            assert content == written
    elif isinstance(said, DeviceFault):
        assert found is not None
        # Another engine, or the fetch unit, may be at a later command that it refuses.
        if found.engine == said.engine or found.index <= said.index:
            fields = ("name", "index", "engine", "address")
            for name in fields:
                assert getattr(found, name) == getattr(said, name), name
    else:
        # It depends on timing: whatever it does, it ends, or somebody says why not.
        assert isinstance(said, CommandError) and said.name
        assert found is None or found.name != "TIMEOUT"
    if found is not None:
        check_program(rtl, good, inputs, expected)
    return "" if said is None else said.name


@ON_RTL
@pytest.mark.parametrize("first", blocks(SHORT, LONG, BLOCK))
def test_damaged_programs(rtl, first):
    commands, names = CommandDevice(SMALL, MEMORY), set()
    for seed in range(first, first + BLOCK):
        try:
            names.add(check_damaged(rtl, commands, seed))
        except Exception as e:
            e.add_note(f"seed {seed}")
            raise
    assert names >= {"", "ILLEGAL_COMMAND", "WATCHDOG"}


# Tokens -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", blocks(5, 80, 5))
def test_removed_waits_are_noticed(first):
    """Every one, except where a command turns out to read padding alone: that waits for nothing."""
    count = harmless = 0
    device = CommandDevice(SMALL, MEMORY)
    for seed in range(first, first + 5):
        good, inputs, _ = small_program(seed)
        _, content = outcome(device, good, inputs)
        data = 8 * good.command_words
        for index, giver, program in removed_waits(good):
            error, other = outcome(device, program, inputs)
            where = (seed, index, giver.name, str(error))
            if error is None:
                assert other[data:] == content[data:], where
                harmless += 1
            else:
                assert isinstance(error, CommandError), where
            count += 1
    assert count > 50 and harmless <= count // 50


WINDOW = "kernel_w=1 kernel_h=1 stride_x=1 stride_y=1 dilation_x=1 dilation_y=1"
IMAGE = f"blocks=1 in_w=8 in_h=8 src_pitch=8 out_w=8 out_h=8 {WINDOW}"
WORK = {
    # 64 words each, in places of their own.
    Engine.LOAD: "LOAD dram=8192 local=64 count0=64 count1=1 count2=1",
    Engine.WLOAD: "LOAD engine=WLOAD dram=8192 local=128 count0=64 count1=1 count2=1",
    Engine.CONV: f"CONV {IMAGE}",
    Engine.POST: "POST source=1 groups=1 out_w=8 out_h=8 a_pitch=8 out_step=1 out=192 out_pitch=8",
    Engine.WINDOW: f"WINDOW op=MAX {IMAGE} out=256 out_pitch=8 low=-128 high=127",
    Engine.STORE: "STORE dram=16384 count0=64 count1=1 count2=1",
}


def pair_program(giver: Engine, taker: Engine, *, gives: bool, waits: bool) -> str:
    """Both work once, on words and weights that are there; then ``giver`` does, which may give a
    token, and ``taker``, which may wait for it."""
    both = {giver, taker}
    after_load = ",".join(
        e.name for e in (*sorted(both - {Engine.LOAD, Engine.WLOAD}), Engine.WLOAD)
    )
    lines = [f"LOAD dram=8192 count0=64 count1=1 count2=1 signal={after_load}"]
    after_weights = ",".join(e.name for e in sorted(both - {Engine.WLOAD}))
    weights = "LOAD engine=WLOAD target=WEIGHTS dram=4096 count0=4 count1=1 count2=1 wait=LOAD"
    lines.append(weights + (f" signal={after_weights}" if after_weights else ""))
    for engine in sorted(both - {Engine.WLOAD}):
        wait = "WLOAD" if engine is Engine.LOAD else "LOAD,WLOAD"
        lines.append(f"{WORK[engine]} wait={wait}")
    lines += [WORK[giver]] * 3  # longer than what the taker did before
    lines.append(WORK[giver] + (f" signal={taker.name}" if gives else ""))
    lines.append(WORK[taker] + (f" wait={giver.name}" if waits else ""))
    return "\n".join([*lines, "END"])


def run_pair(device: Device, text: str, *, trace: bool) -> Driver:
    words = assembler.assemble(text)
    driver = Driver(device)
    image = np.array(words, "<u8").tobytes()
    driver.load(image, command_offset=0, command_words=len(words), memory_bytes=1 << 16)
    driver.run(watchdog=WATCHDOG, trace_events=64 if trace else 0)
    return driver


@ON_RTL
@pytest.mark.parametrize("taker", Engine)
def test_every_pair_of_engines_has_a_token(rtl, taker):
    """The taker begins after the giver has ended with the token, before it without; where the token
    is not given, both simulators say who waits for whom."""
    for giver in Engine:
        ordered = pair_program(giver, taker, gives=True, waits=True)
        last = ordered.count("\n") - 1
        for waits in (True, False):
            text = pair_program(giver, taker, gives=True, waits=waits)
            run_pair(CommandDevice(SMALL, MEMORY), text, trace=False)
            events = run_pair(rtl, text, trace=True).trace()
            cycle = {(int(e["kind"]), int(e["index"])): int(e["cycle"]) for e in events}
            behind = cycle[TraceKind.START, last] > cycle[TraceKind.END, last - 1]
            if waits or giver != taker:
                assert behind == waits, (giver.name, waits)
        stuck = pair_program(giver, taker, gives=False, waits=True)
        sentence = f"{taker.name} waits before command {last}, missing token: {giver.name}"
        with pytest.raises(MissingToken, match=sentence):
            run_pair(CommandDevice(SMALL, MEMORY), stuck, trace=False)
        with pytest.raises(DeviceFault, match=sentence) as e:
            run_pair(rtl, stuck, trace=False)
        assert e.value.name == "WATCHDOG"
    check_program(rtl, *busy_program())


# Results that overlap -----------------------------------------------------------------------------

SOURCE, RESULTS, DATA_AT, STORED_AT = 256, 96, 4096, 16384
"""Words that are read; words behind them that are written; bytes of DRAM they come from; the bytes
where the written ones go."""


def overlapping(rng: np.random.Generator, kind: str) -> dict[str, int]:
    """A command that writes words of a row again in the next row, and reads none of them."""

    def draw(low: int, high: int) -> int:
        return int(rng.integers(low, high + 1))

    size = {"out_w": draw(2, 6), "out_h": draw(2, 5)}
    step = draw(1, 2) if kind == "POST" else 1
    pitch = step * draw(0, size["out_w"] - 1)
    out = {"out": SOURCE + draw(0, 8), "out_pitch": pitch, "out_block": draw(0, 3)}
    if kind == "POST":
        fields = {"source": 1, "groups": draw(1, 3), "out_step": step, "a": draw(0, 9)}
        return size | out | fields | {"a_pitch": draw(1, 9), "a_block": draw(0, 60)}
    window = {"x0": draw(-2, 1), "y0": draw(-2, 1), "in_h": 7, "pad": draw(-128, 127)}
    for axis in "xy":
        window |= {f"stride_{axis}": draw(1, 3), f"dilation_{axis}": draw(1, 2)}
    window |= {"kernel_w": draw(1, 3), "kernel_h": draw(1, 3), "src": draw(0, 9)}
    window |= {"low": -128, "high": 127, "op": int(WindowOp[kind])}
    if kind == "IM2COL":
        packed = {"in_w": 20, "src_pitch": 5, "blocks": 1, "run": draw(5, 9)}
        return size | out | window | packed
    return size | out | window | {"in_w": 8, "src_pitch": 8, "blocks": draw(1, 3), "src_block": 60}


@ON_RTL
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["IM2COL", "MAX", "POST"])
def test_the_last_of_overlapping_results_stays(rtl, kind, seed):
    """In the order of the command set's text, on both simulators."""
    rng = np.random.default_rng(seed)
    fields = overlapping(rng, kind)
    opcode = Opcode.POST if kind == "POST" else Opcode.WINDOW
    engine = Engine[opcode.name]
    data = rng.integers(-128, 128, (SOURCE + RESULTS, SMALL.rows)).astype(np.int8)
    loads = {"dram": DATA_AT, "count0": len(data), "count1": 1, "count2": 1}
    stores = {"dram": STORED_AT, "local": SOURCE, "count0": RESULTS, "count1": 1, "count2": 1}
    words = encode(Opcode.LOAD, signal=1 << engine, **loads)
    words += encode(opcode, wait=1 << Engine.LOAD, signal=1 << Engine.STORE, **fields)
    words += encode(Opcode.STORE, wait=1 << engine, **stores) + encode(Opcode.END)
    image = np.array(words, "<u8").tobytes().ljust(DATA_AT, b"\0") + data.tobytes()

    reference = Reference(SMALL, image.ljust(1 << 15, b"\0"))
    for index in range(3):
        reference.execute(SimpleNamespace(**command_at(words, index)))
    expected = bytes(v & 0xFF for v in reference.dram[STORED_AT:])
    written = reference.scratchpad[SOURCE : SOURCE + RESULTS]
    assert written != data[SOURCE:].tolist(), "the command hardly did anything"
    for device in (CommandDevice(SMALL, MEMORY), rtl):
        driver = Driver(device)
        place = dict(command_offset=0, command_words=len(words), memory_bytes=1 << 15)
        driver.load(image, **place)
        driver.run(watchdog=WATCHDOG)
        got = driver.read_data(STORED_AT, len(expected))
        assert got[: RESULTS * SMALL.rows] == expected[: RESULTS * SMALL.rows], fields


# Resets and bus faults ----------------------------------------------------------------------------


def at_work(events: np.ndarray, cycle: int) -> set[Engine]:
    """The engines with a command in flight in a cycle of a traced run."""
    spans: dict[int, dict[int, int]] = {}
    for event in events:
        spans.setdefault(int(event["index"]), {})[int(event["kind"])] = int(event["cycle"])
    engine = {int(e["index"]): Engine(int(e["engine"])) for e in events}
    return {
        engine[index]
        for index, span in spans.items()
        if span[TraceKind.START] <= cycle < span[TraceKind.END]
    }


def traced(rtl: RtlDevice) -> np.ndarray:
    """The events of the busy program."""
    program, inputs, expected = busy_program()
    driver = Driver(rtl)
    load(driver, program)
    run = execute(driver, program, inputs, trace=True)
    assert compare(program, run.tensors, expected) == (0, None) and run.events is not None
    return run.events


def interrupted(rtl: RtlDevice, driver: Driver, **options) -> DeviceFault | None:
    """The fault of a run of the busy program, if it does not end."""
    program, inputs, _ = busy_program()
    load(driver, program)
    (port,) = program.inputs
    place = program.tensors[port.tensor]
    driver.write_data(place.offset, place.pack(inputs[port.tensor], SMALL))
    try:
        driver.run(**options)
    except DeviceFault as e:
        return e
    return None


AT_WORK = {Engine.CONV, Engine.POST, Engine.WINDOW}


@ON_RTL
@pytest.mark.parametrize("first", blocks(20, 400, 20))
def test_soft_resets_at_any_time(rtl, first):
    """In a memory that stalls at random, every other time."""
    good, together = busy_program(), []
    events = traced(rtl)
    cycles = check_program(rtl, *good)
    for seed in range(first, first + 20):
        rng = np.random.default_rng(seed)
        rtl.set_memory_model(MemoryModel.hostile(seed) if seed % 2 else MemoryModel())
        fault = interrupted(rtl, Driver(rtl), timeout_cycles=int(rng.integers(1, 9 * cycles // 10)))
        assert fault is not None and fault.name == "TIMEOUT"
        if seed % 2 == 0:
            together.append(at_work(events, fault.cycles))
        rtl.set_memory_model(MemoryModel())
        check_program(rtl, *good)
    for engine in AT_WORK:
        assert any(engine in each for each in together), engine
    assert any(len(each & AT_WORK) > 1 for each in together)


@ON_RTL
@pytest.mark.parametrize("first", blocks(10, 200, 10))
def test_hard_resets_at_any_time(rtl, first):
    """The reset input, for one cycle or some, in the middle of bursts."""
    good, together = busy_program(), set()
    events = traced(rtl)
    cycles = check_program(rtl, *good)
    for seed in range(first, first + 10):
        rng = np.random.default_rng(seed)
        driver, reset = Driver(rtl), driver_reset(rtl, int(rng.integers(1, 20)))
        driver.reset = reset
        fault = interrupted(rtl, driver, timeout_cycles=int(rng.integers(1, 9 * cycles // 10)))
        assert fault is not None and fault.name == "TIMEOUT"
        together |= at_work(events, fault.cycles)
        check_program(rtl, *good)
    assert together >= AT_WORK


def driver_reset(rtl: RtlDevice, cycles: int):
    """A reset by wire, in place of a driver's."""
    return lambda: rtl.reset(cycles)


@ON_RTL
@pytest.mark.parametrize("first", blocks(32, 320, 32))
def test_bus_errors_anywhere(rtl, first):
    """One byte of the DRAM window answers in error, for reads or for writes."""
    good, together, names = busy_program(), set(), set()
    program = good[0]
    events = traced(rtl)
    inputs = {port.tensor for port in program.inputs}
    written = [p for name, p in program.tensors.items() if name not in inputs]
    for seed in range(first, first + 32):
        rng = np.random.default_rng(seed)
        read = bool(rng.integers(3))
        out = written[rng.integers(len(written))]
        at = int(rng.integers(written[0].offset) if read else out.offset + rng.integers(out.bytes))
        rtl.set_memory_model(
            MemoryModel(
                error_read=read,
                error_write=not read,
                error_first=at,
                error_last=at + int(rng.integers(256)),
                error_response=int(rng.integers(2, 4)),
            )
        )
        fault = interrupted(rtl, Driver(rtl))
        if fault is not None:
            names.add(fault.name)
            assert fault.name == ("AXI_READ" if read else "AXI_WRITE"), seed
            assert abs(fault.address - at) < 4096, seed
            together |= at_work(events, fault.cycles)
        rtl.set_memory_model(MemoryModel())
        check_program(rtl, *good)
    assert names == {"AXI_READ", "AXI_WRITE"} and together >= AT_WORK
