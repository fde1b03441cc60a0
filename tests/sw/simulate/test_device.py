"""The command-level simulator behind the device interface: CSRs, faults, recovery."""

from __future__ import annotations

import numpy as np
import pytest

from systole.isa import CSRS, Config, Control, Engine, Fault, Status
from systole.isa.timing import FETCH_REQUEST_WORDS
from systole.isa.tools import assembler
from systole.sw.runtime.device import DeviceError
from systole.sw.runtime.driver import DeviceFault, Driver
from systole.sw.session.backends import open_device
from systole.sw.simulate.commands import CommandDevice
from systole.sw.simulate.races import CommandError, Race, UninitialisedRead
from tests.helpers.command_reference import tiny


def driver(program: str | list[int], config: Config | None = None, **load) -> Driver:
    words = assembler.assemble(program) if isinstance(program, str) else program
    device = open_device("commands", config or tiny(4, 4), memory_bytes=1 << 17)
    out = Driver(device, base=4096)
    out.load(
        np.array(words, "<u8").tobytes(),
        **{"command_offset": 0, "command_words": len(words), "memory_bytes": 1 << 16} | load,
    )
    return out


COPY = (
    "LOAD signal=STORE dram=8192 count0=8 count1=1 count2=1\n"
    "STORE wait=LOAD dram=16384 count0=8 count1=1 count2=1\nEND"
)


def test_device_runs_a_program():
    d = driver(COPY)
    data = bytes(range(32))
    d.write_data(8192, data)
    for _ in range(2):
        assert d.run() == 0
        assert d.read_data(16384, 32) == data
        assert d.read("COMMANDS") == 2 and d.read("STATUS") == Status.DONE
        data = bytes(reversed(data))
        d.write_data(8192, data)


@pytest.mark.parametrize(
    ("program", "name", "index", "engine", "address"),
    [
        ([0], "ILLEGAL_COMMAND", 0, None, 0),
        (assembler.assemble("STORE")[:2], "ILLEGAL_COMMAND", 0, None, 0),
        ("LOAD dram=8192 count0=1 count1=1 count2=1", "ILLEGAL_COMMAND", 1, None, 0),
        ("CONV present=0\nEND", "ILLEGAL_COMMAND", 0, None, 0),
        (
            "LOAD dram=65504 dram1=8 count0=2 count1=5 count2=1\nEND",
            "DRAM_WINDOW",
            0,
            Engine.LOAD,
            65536,
        ),
        (
            COPY.replace("16384", "0xFFFF0000").replace("count1=1", "count1=2 dram1=0xFFFF0000"),
            "DRAM_WINDOW",
            0,
            Engine.LOAD,
            0xFFFF2000,
        ),
        (
            COPY.replace("dram=16384", "dram=4096 dram1=0xFFFFF000").replace(
                "count1=1 count2=1\nEND", "count1=2 count2=1\nEND"
            ),
            "DRAM_WINDOW",
            1,
            Engine.STORE,
            0xFFFFFFFF,
        ),
    ],
)
def test_device_reports_faults_and_recovers(program, name, index, engine, address):
    d = driver(program)
    with pytest.raises(DeviceFault) as e:
        d.run()
    assert (e.value.name, e.value.index, e.value.engine) == (name, index, engine)
    assert e.value.address == address
    assert d.read("STATUS") == 0 and d.read("FAULT_CODE") == Fault.NONE
    good = assembler.assemble(COPY)
    d.load(np.array(good, "<u8").tobytes(), command_offset=0, command_words=9, memory_bytes=1 << 16)
    assert d.run() == 0


def test_program_beyond_the_window_faults():
    """The first words that are asked for lie in the window, as a whole; the next do not."""
    device = CommandDevice(tiny(4, 4), memory_bytes=1 << 16)
    words = assembler.assemble("LOAD count0=1 count1=1 count2=1 present=7\n" * 9 + "END")
    start = 4096 - 8 * FETCH_REQUEST_WORDS
    device.write_memory(start, np.array(words, "<u8").tobytes())
    values = {"DRAM_LIMIT": 4096 + 8, "PROGRAM": start, "PROGRAM_WORDS": len(words)}
    for name, value in values.items():
        device.write_csr(CSRS[name].offset, value)
    device.write_csr(CSRS["CONTROL"].offset, Control.START)
    assert device.read_csr(CSRS["STATUS"].offset) == Status.BUSY
    assert not device.wait_interrupt(1)  # interrupts are not enabled
    assert device.read_csr(CSRS["FAULT_CODE"].offset) == Fault.DRAM_WINDOW
    assert device.read_csr(CSRS["FAULT_INDEX"].offset) == 8
    assert device.read_csr(CSRS["FAULT_ADDRESS"].offset) == 4096
    # START is ignored while FAULT is set; IRQ_ENABLE is not.
    device.write_csr(CSRS["CONTROL"].offset, Control.START | Control.IRQ_ENABLE)
    assert device.read_csr(CSRS["STATUS"].offset) == Status.FAULT
    assert device.wait_interrupt(1)
    device.write_csr(CSRS["IRQ"].offset, 3)
    assert not device.wait_interrupt(1)


def test_window_commands_need_the_window_engine():
    config = Config.sized(4, 4, window=False)
    with pytest.raises(DeviceFault, match="ILLEGAL_COMMAND"):
        driver("WINDOW\nEND", config).run()


def test_device_raises_what_hardware_cannot_see_and_stays_busy():
    d = driver(COPY.replace("wait=LOAD", ""))
    with pytest.raises(Race):
        d.run()
    assert d.read("STATUS") == Status.BUSY
    d.write("CONTROL", Control.START)
    assert not d.device.wait_interrupt(1)
    d.reset()
    assert d.read("STATUS") == 0


def test_memories_persist_but_count_as_unwritten():
    d = driver(COPY)
    d.write_data(8192, bytes(range(32)))
    d.run()
    assert d.device.memories.scratchpad[:8].tobytes() == bytes(range(32))
    words = assembler.assemble("STORE dram=16384 count0=8 count1=1 count2=1\nEND")
    d.load(
        np.array(words, "<u8").tobytes(), command_offset=0, command_words=5, memory_bytes=1 << 16
    )
    with pytest.raises(UninitialisedRead):
        d.run()
    assert issubclass(UninitialisedRead, CommandError) and issubclass(CommandError, DeviceError)


def test_device_checks_addresses():
    device = CommandDevice(tiny(4, 4), memory_bytes=4096)
    with pytest.raises(ValueError, match="outside"):
        device.write_memory(4090, bytes(8))
    with pytest.raises(DeviceError, match="no register"):
        device.read_csr(2)
    device.write_csr(CSRS["ID"].offset, 5)
    assert device.read_csr(CSRS["ID"].offset) != 5
    device.write_csr(CSRS["DRAM_LIMIT"].offset, 8192)
    device.write_csr(CSRS["CONTROL"].offset, Control.START)
    with pytest.raises(DeviceError, match="exceeds"):
        device.wait_interrupt(1)
