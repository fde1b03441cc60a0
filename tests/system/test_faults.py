"""Bad programs on both simulators: the same fault, at the same command."""

from __future__ import annotations

import numpy as np
import pytest

from systole.isa import Config, Engine, Fault
from systole.isa.timing import FETCH_REQUEST_WORDS
from systole.isa.tools import assembler
from systole.sim.device import MemoryModel, RtlDevice
from systole.sw.runtime.device import Device, DeviceError
from systole.sw.runtime.driver import DeviceFault, Driver
from systole.sw.simulate.commands import CommandDevice
from systole.sw.simulate.races import CommandError

pytestmark = pytest.mark.xdist_group("4x4")
SMALL = Config.sized(4, 4)
MEMORY = 1 << 20
WATCHDOG = 2000


@pytest.fixture(scope="module")
def rtl():
    with RtlDevice(SMALL, memory_bytes=MEMORY) as device:
        yield device


def start(device: Device, program: str | list[int], limit: int = 1 << 16, at: int = 0) -> None:
    """Run a program at byte ``at`` of a DRAM window of ``limit`` bytes; raises what it runs into.
    The device can be used again afterwards."""
    words = assembler.assemble(program) if isinstance(program, str) else program
    driver = Driver(device, base=4096)
    image = bytes(at) + np.array(words, "<u8").tobytes()
    driver.load(image[:limit], command_offset=at, command_words=len(words), memory_bytes=limit)
    try:
        driver.run(watchdog=WATCHDOG, timeout_cycles=100 * WATCHDOG)
    finally:
        driver.reset()


def faults_of(rtl: RtlDevice, *arguments) -> tuple[DeviceFault, DeviceError]:
    """What a program runs into on the RTL and on the command-level simulator."""
    with pytest.raises(DeviceFault) as on_rtl:
        start(rtl, *arguments)
    with pytest.raises(DeviceError) as on_commands:
        start(CommandDevice(SMALL, MEMORY), *arguments)
    return on_rtl.value, on_commands.value


ONE = "count0=1 count1=1 count2=1"
LOAD = f"LOAD dram=8192 {ONE}"
STORE = f"{LOAD} signal=STORE\nSTORE wait=LOAD"
HEAD, *REST = assembler.assemble(LOAD)


def on_engine(engine: int) -> list[int]:
    """A load on any engine."""
    return [HEAD & ~(7 << 3) | engine << 3, *REST, 1]


ILLEGAL = {
    "opcode 0": ([0], 0),
    "opcode 7": ([7], 0),
    "no words": ([], 0),
    "no END": (LOAD, 1),
    "cut off": (assembler.assemble(f"{LOAD}\n{LOAD} engine=WLOAD")[:-1], 1),
    "END with words": ([1 | 1 << 18, 0], 0),
    "more words than there are": ([HEAD | 1 << 23, *REST, 0, 1], 0),
    "first is incomplete": (f"{LOAD}\nCONV present=0\nEND", 1),
    **{f"load on engine {e}": (on_engine(e), 0) for e in (2, 3, 4, 5, 6, 7)},
}
OUTSIDE = {
    "one run of many": ("LOAD dram=65504 dram1=8 count0=2 count1=5 count2=1\nEND", 0, 0, 65536),
    "one group of many": (
        "LOAD dram=16384 dram1=64 dram2=8192 count0=4 count1=3 count2=99\nEND",
        *(0, 0, 65536),
    ),
    "a run in a group": (
        "LOAD dram=61440 dram1=64 dram2=2944 count0=4 count1=20 count2=9\nEND",
        *(0, 0, 65536),
    ),
    "long before it ends": (
        "LOAD dram=8192 dram1=4 count0=65535 count1=65535 count2=65535\nEND",
        *(0, 0, 8192),
    ),
    "end of addresses": (
        f"{LOAD}\nLOAD dram=0xFFFFFFFC count0=2 count1=1 count2=1\nEND",
        *(1, 0, 0xFFFFFFFC),
    ),
    "weights": (f"LOAD engine=WLOAD target=WEIGHTS dram=65536 {ONE}\nEND", 0, 1, 65536),
    "store": (f"{STORE} dram=65532 count0=2 count1=1 count2=1\nEND", 1, 5, 65532),
}
STUCK = {
    "a token": ("CONV wait=WLOAD", Engine.CONV, (Engine.WLOAD,)),
    "two tokens": ("STORE wait=CONV,POST", Engine.STORE, (Engine.CONV, Engine.POST)),
    "its own token": ("POST wait=POST", Engine.POST, (Engine.POST,)),
    "one of two": (
        "WINDOW wait=LOAD,STORE",
        *(Engine.WINDOW, (Engine.STORE,)),
    ),
}
ENDLESS = {
    # Nothing leaves a memory or repeats a word, were it but done.
    "LOAD": "LOAD dram=8192 count0=1 count1=65535 count2=65535",
    "CONV": "CONV blocks=4095 out_w=1 out_h=1 kernel_w=63 kernel_h=63 stride_x=1 stride_y=1 "
    "dilation_x=1 dilation_y=1",
    "POST": "POST source=1 groups=1 out_w=65535 out_h=65535 out_step=1",
    "WINDOW": "WINDOW op=MAX blocks=1 out_w=65535 out_h=65535 kernel_w=1 kernel_h=1 stride_x=1 "
    "stride_y=1 dilation_x=1 dilation_y=1",
}


@pytest.mark.parametrize("name", ILLEGAL)
def test_illegal_commands(rtl, name):
    program, index = ILLEGAL[name]
    for fault in faults_of(rtl, program):
        assert (fault.name, fault.index, fault.engine) == ("ILLEGAL_COMMAND", index, None)
        assert fault.address == 0


@pytest.mark.parametrize("name", OUTSIDE)
def test_transfers_outside_the_window(rtl, name):
    program, index, engine, address = OUTSIDE[name]
    for fault in faults_of(rtl, program):
        assert (fault.name, fault.index, fault.engine) == ("DRAM_WINDOW", index, engine)
        assert fault.address == address
        assert f"command {index}, engine {Engine(engine).name}, byte {address:#x}" in str(fault)


@pytest.mark.parametrize("over", (4, 64, 8 * FETCH_REQUEST_WORDS - 4, 8 * FETCH_REQUEST_WORDS))
@pytest.mark.parametrize("before", (0, 1, 2))
def test_programs_cut_off_by_the_window(rtl, before, over):
    """The fetch unit asks for so many words at a time; the window ends within what it asks for
    third, second or first."""
    program = assembler.assemble(f"LOAD dram=0 {ONE} present=7\n" * 30 + "END")
    at, piece = 8192, 8 * FETCH_REQUEST_WORDS
    limit = at + (before + 1) * piece - over
    for fault in faults_of(rtl, program, limit, at):
        assert (fault.name, fault.engine) == ("DRAM_WINDOW", None)
        assert (fault.index, fault.address) == (before * 8, at + before * piece)


def test_token_counters_that_overflow(rtl):
    """Nobody takes the tokens."""
    program = f"LOAD signal=STORE dram=8192 {ONE}\n" * 256 + "END"
    for fault in faults_of(rtl, program):
        assert (fault.name, fault.index) == ("TOKEN_OVERFLOW", 255)
        assert "TOKEN_OVERFLOW" in str(fault) and "command 255" in str(fault)
    start(rtl, f"LOAD signal=STORE dram=8192 {ONE}\n" * 255 + "END")
    start(CommandDevice(SMALL), f"LOAD signal=STORE dram=8192 {ONE}\n" * 255 + "END")


@pytest.mark.parametrize("name", STUCK)
def test_tokens_that_nobody_gives(rtl, name):
    """Both say who waits, before which command, and for whose tokens."""
    text, engine, missing = STUCK[name]
    on_rtl, on_commands = faults_of(rtl, f"LOAD signal=WINDOW dram=8192 {ONE}\n{text}\nEND")
    assert on_rtl.name == on_commands.name == "WATCHDOG"
    waits = ", ".join(e.name for e in missing)
    for fault in (on_rtl, on_commands):
        assert f"{engine.name} waits before command 1, missing token: {waits}" in str(fault)
    report = on_rtl.engines[engine]
    assert (report.head, report.missing) == (on_commands.index, missing) == (1, missing)


@pytest.mark.parametrize("name", ENDLESS)
def test_commands_that_take_for_ever(rtl, name):
    """And are not executed to find out."""
    on_rtl, on_commands = faults_of(rtl, f"{ENDLESS[name]}\nEND")
    assert on_rtl.name == on_commands.name == "WATCHDOG"
    assert f"{name} busy" in str(on_rtl) and str(on_commands).startswith(f"command 0 ({name} ")


def test_bus_errors_are_of_the_memory_alone(rtl):
    """The one kind of fault that the command-level simulator has no cause for."""
    seen = {Fault.NONE, Fault.ILLEGAL_COMMAND, Fault.DRAM_WINDOW, Fault.TOKEN_OVERFLOW}
    seen |= {Fault.WATCHDOG, Fault.ILLEGAL_FIELD}
    where = {"error_first": 4096 + 8192, "error_last": 4096 + 8192}
    for program, read in ((LOAD, True), (f"{STORE} dram=8192 {ONE}", False)):
        rtl.set_memory_model(MemoryModel(error_read=read, error_write=not read, **where))
        with pytest.raises(DeviceFault) as e:
            start(rtl, f"{program}\nEND")
        seen.add(Fault[e.value.name])
    rtl.set_memory_model(MemoryModel())
    assert seen == set(Fault)


def test_what_only_the_command_level_simulator_notices_has_a_name():
    kinds, found = [CommandError], set()
    for kind in kinds:
        kinds += kind.__subclasses__()
        found.add(kind.name)
    assert found == {
        *("", "WATCHDOG", "TOKEN_OVERFLOW"),
        *("RACE", "UNINITIALISED_READ", "OWN_RESULT", "OUTSIDE_MEMORY", "PROGRAM_WRITE"),
    }
