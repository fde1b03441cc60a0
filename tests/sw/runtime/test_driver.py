"""The driver against a scripted device: registers and memory, no accelerator."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest

from systole.isa import (
    CSRS,
    DEVICE_ID,
    TRACE_EVENT,
    VERSION,
    Config,
    Control,
    Engine,
    Fault,
    Irq,
    Status,
)
from systole.sw.runtime.device import Device, DeviceError
from systole.sw.runtime.driver import DeviceFault, Driver, decode_trace

CONFIG = Config.sized(4, 4)


class ScriptedDevice(Device):
    """START calls ``script(device)``, which sets registers by name and changes memory."""

    def __init__(self, script=lambda device: device.done(), memory_bytes=1 << 16):
        self.config = CONFIG
        self.memory_bytes = memory_bytes
        self.memory = bytearray(memory_bytes)
        self.script = script
        self.registers = dict.fromkeys(CSRS, 0)
        self.registers.update(ID=DEVICE_ID, VERSION=VERSION, CONFIG_HASH=CONFIG.hash)
        self.names = {csr.offset: name for name, csr in CSRS.items()}
        self.resets = 0
        self.reset_polls = 3

    def done(self, **registers):
        self.registers.update(STATUS=Status.DONE, IRQ=Irq.DONE, **registers)

    def fault(self, code, **registers):
        self.registers.update(STATUS=Status.FAULT, IRQ=Irq.FAULT, FAULT_CODE=code, **registers)

    def write_memory(self, addr, data):
        self.check_range(addr, len(data))
        self.memory[addr : addr + len(data)] = data

    def read_memory(self, addr, n):
        self.check_range(addr, n)
        return bytes(self.memory[addr : addr + n])

    def write_csr(self, offset, value):
        name = self.names[offset]
        assert 0 <= value < 1 << 32 and CSRS[name].access != "ro"
        if name == "IRQ":
            self.registers["IRQ"] &= ~value
            return
        self.registers[name] = value
        if name == "CONTROL" and value & Control.SOFT_RESET:
            self.resets += 1
            self.registers.update(STATUS=0, FAULT_CODE=0)
            self.polls_left = self.reset_polls
        elif name == "CONTROL" and value & Control.START and not self.registers["STATUS"] & 4:
            self.registers["STATUS"] = Status.BUSY
            self.script(self)

    def read_csr(self, offset):
        name = self.names[offset]
        if name == "CONTROL" and self.registers["CONTROL"] & Control.SOFT_RESET:
            self.polls_left -= 1
            if self.polls_left == 0:
                self.registers["CONTROL"] = 0
        return int(self.registers[name])

    def wait_interrupt(self, timeout_cycles):
        enabled = self.registers["CONTROL"] & Control.IRQ_ENABLE
        return bool(enabled and self.registers["IRQ"])


def load(driver, image=b"program!", memory_bytes=8192):
    driver.load(image, command_offset=0, command_words=1, memory_bytes=memory_bytes)


@pytest.mark.parametrize(
    ("register", "sentence"),
    [
        ("ID", "not a Systole device"),
        ("VERSION", "another version of the command set"),
        ("CONFIG_HASH", "another configuration"),
    ],
)
def test_foreign_hardware_is_refused(register, sentence):
    device = ScriptedDevice()
    device.registers[register] ^= 2
    with pytest.raises(DeviceError, match=f"{register} = .*{sentence}"):
        Driver(device)


def test_run_sets_registers_and_can_be_repeated():
    seen = []

    def script(device):
        seen.append(dict(device.registers))
        at = 8192 + 256
        device.memory[at] += 1
        device.done(CYCLES_LO=5, CYCLES_HI=2)

    device = ScriptedDevice(script)
    driver = Driver(device, base=8192)
    driver.load(b"abc", command_offset=192, command_words=7, memory_bytes=1000)
    driver.write_data(256, b"\x07")
    assert driver.run(watchdog=99) == (2 << 32) + 5
    assert driver.run(watchdog=99) == (2 << 32) + 5
    assert driver.read_data(256, 1) == b"\x09"
    assert device.memory[8192:8195] == b"abc"
    assert len(seen) == 2 and seen[0] == seen[1] | {"CYCLES_LO": 0, "CYCLES_HI": 0}
    expected = {"DRAM_BASE_LO": 8192, "DRAM_BASE_HI": 0, "DRAM_LIMIT": 1000, "PROGRAM": 192}
    expected |= {"PROGRAM_WORDS": 7, "WATCHDOG": 99, "TRACE_EVENTS": 0, "IRQ": 0}
    assert expected.items() <= seen[0].items()
    assert not seen[0]["CONTROL"] & Control.TRACE


def test_high_window():
    device = ScriptedDevice()
    device.memory_bytes = 6 << 32
    driver = Driver(device, base=(5 << 32) + 4096)
    driver.load(b"", command_offset=0, command_words=1, memory_bytes=64)
    driver.run()
    assert (device.registers["DRAM_BASE_HI"], device.registers["DRAM_BASE_LO"]) == (5, 4096)


def test_fault_names_everything_and_recovers():
    def script(device):
        device.fault(
            Fault.DRAM_WINDOW,
            FAULT_INDEX=12,
            FAULT_ENGINE=Engine.STORE,
            FAULT_ADDRESS=0x1240,
            CYCLES_LO=77,
            CONV_STATE=13 << 16 | 0b1010 << 8 | 2,
            LOAD_STATE=1,
        )

    device = ScriptedDevice(script)
    driver = Driver(device)
    load(driver)
    with pytest.raises(DeviceFault) as info:
        driver.run()
    fault = info.value
    assert (fault.name, fault.index, fault.engine) == ("DRAM_WINDOW", 12, Engine.STORE)
    assert (fault.address, fault.cycles) == (0x1240, 77)
    assert fault.engines[Engine.CONV].missing == (Engine.WLOAD, Engine.POST)
    text = str(fault)
    assert "DRAM_WINDOW after 77 cycles, command 12, engine STORE, byte 0x1240" in text
    assert "CONV waits before command 13, missing token: WLOAD, POST" in text
    assert "LOAD busy" in text and "WINDOW idle" in text
    assert device.resets == 1 and device.registers["STATUS"] == device.registers["IRQ"] == 0
    device.script = lambda device: device.done()
    driver.run()


def test_timeout_is_a_fault_without_a_command():
    device = ScriptedDevice(lambda device: None)
    driver = Driver(device)
    load(driver)
    with pytest.raises(DeviceFault, match=r"^TIMEOUT after 0 cycles: LOAD idle") as info:
        driver.run(timeout_cycles=10)
    assert info.value.index is None and device.resets == 1


def test_fetch_fault_has_no_engine():
    device = ScriptedDevice(lambda d: d.fault(Fault.ILLEGAL_COMMAND, FAULT_ENGINE=15))
    driver = Driver(device)
    load(driver)
    with pytest.raises(DeviceFault, match=r"^ILLEGAL_COMMAND .* command 0: LOAD idle") as info:
        driver.run()
    assert info.value.engine is None


def test_endless_reset_is_an_error():
    device = ScriptedDevice(lambda device: None)
    device.reset_polls = 1 << 30
    with pytest.raises(DeviceError, match="soft reset does not end"):
        Driver(device).reset()


def test_counters_cover_every_counter():
    device = ScriptedDevice()
    driver = Driver(device)
    for i, name in enumerate(CSRS):
        if name not in ("ID", "VERSION", "CONFIG_HASH"):
            device.registers[name] = 1000 + i
    counters = driver.counters()
    names = list(CSRS)
    assert (
        counters.pop("CYCLES")
        == device.registers["CYCLES_HI"] << 32 | (device.registers["CYCLES_LO"])
    )
    assert all(value == 1000 + names.index(name) for name, value in counters.items())
    first = names.index("LOAD_BUSY")
    assert set(names[first:]) <= set(counters)
    assert {"COMMANDS", "READ_BEATS", "WRITE_BEATS"} <= set(counters)


def test_counters_that_do_not_exist_are_not_told():
    device = ScriptedDevice()
    device.config = dataclasses.replace(device.config, counters=False)
    device.registers["CONFIG_HASH"] = device.config.hash
    counters = Driver(device).counters()
    assert set(counters) == {
        *("COMMANDS", "CYCLES", "READ_BEATS", "WRITE_BEATS", "TRACE_COUNT", "TRACE_DROPPED")
    }


def encode_events(events):
    data = b""
    for event in events:
        number, at = 0, 0
        for f in TRACE_EVENT:
            number |= event[f.name] << at
            at += f.bits
        data += number.to_bytes(16, "little")
    return data


def test_trace_is_decoded_from_behind_the_window():
    rng = random.Random(3)
    events = [{f.name: rng.getrandbits(f.bits) for f in TRACE_EVENT} for _ in range(50)]

    def script(device):
        at = device.registers["DRAM_BASE_LO"] + device.registers["TRACE_ADDR"]
        assert device.registers["TRACE_ADDR"] == 8256
        assert device.registers["DRAM_LIMIT"] == 8256 + 16 * 60
        assert device.registers["TRACE_EVENTS"] == 60
        assert device.registers["CONTROL"] & Control.TRACE
        data = encode_events(events)
        device.memory[at : at + len(data)] = data
        device.done(TRACE_COUNT=50)

    driver = Driver(ScriptedDevice(script), base=4096)
    load(driver, memory_bytes=8200)
    driver.run(trace_events=60)
    trace = driver.trace()
    assert [dict(zip(trace.dtype.names, map(int, e), strict=True)) for e in trace] == events
    assert decode_trace(b"").shape == (0,) and trace["cycle"].dtype == np.int64


def test_bounds():
    driver = Driver(ScriptedDevice())
    with pytest.raises(DeviceError, match="needs a DRAM window of 65537 bytes"):
        load(driver, memory_bytes=65537)
    load(driver, memory_bytes=65536)
    with pytest.raises(DeviceError, match="needs a DRAM window of 65552 bytes"):
        driver.run(trace_events=1)
    with pytest.raises(ValueError, match="outside the program's window"):
        driver.write_data(65535, b"12")
    with pytest.raises(ValueError, match="outside the program's window"):
        driver.read_data(-1, 1)
    with pytest.raises(ValueError, match="does not hold the image"):
        load(driver, image=b"12345", memory_bytes=4)
    with pytest.raises(ValueError, match=r"not a multiple of 64"):
        driver.load(b"", command_offset=8, command_words=1, memory_bytes=64)
    with pytest.raises(ValueError, match=r"not at a multiple of 4096"):
        Driver(ScriptedDevice(), base=64)
