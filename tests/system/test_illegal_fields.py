"""Fields that break a limit, on both simulators: the same fault, and the machine lives on."""

from __future__ import annotations

import numpy as np
import pytest

from systole.isa import COMMANDS, Config, Encoder, Engine, Opcode
from systole.isa.limits import field_limits
from systole.sim.device import RtlDevice
from systole.sw.runtime.device import Device
from systole.sw.runtime.driver import DeviceFault, Driver
from systole.sw.simulate.commands import CommandDevice
from tests.helpers.layer_checks import check_program, digits_case
from tests.helpers.legal_commands import broken_fields, made_legal, random_fields

MEMORY = 1 << 20
WINDOW_BYTES = 1 << 16
CYCLES = 400
"""In which a fault must have come."""
SMALL = Config.sized(4, 4)
OTHERS = {
    # More groups than one in a scratchpad word; in an accumulator word.
    "rows": Config.sized(8, 4),
    "cols": Config.sized(4, 16, axi_data_bits=64, banks=16),
    # Any zero point is legal.
    "zeros": Config.sized(4, 8, zero_points=True),
    # Vectors of 16 bytes, of which 12 and 6 are used.
    "odd": Config.sized(12, 6, axi_data_bits=32),
}
ENGINES = [(command.opcode, engine) for command in COMMANDS.values() for engine in command.engines]


@pytest.fixture(scope="module")
def rtl():
    with RtlDevice(SMALL, memory_bytes=MEMORY) as device:
        yield device


def words_before(encoder: Encoder, config: Config) -> tuple[list[int], int]:
    """Two loads that end in order: what an illegal command may wait for. Their number, too."""
    words, everyone = [], (1 << len(Engine)) - 1
    for engine in (Engine.LOAD, Engine.WLOAD):
        one = made_legal(Opcode.LOAD, {"dram": 8192, "local": int(engine)}, config)
        words += encoder.encode(Opcode.LOAD, engine, signal=everyone, **one)
    return words, 2


def fault_of(device: Device, words: list[int]) -> tuple[str, int | None, Engine | None, int]:
    driver = Driver(device)
    image = np.array(words, "<u8").tobytes()
    driver.load(image, command_offset=0, command_words=len(words), memory_bytes=WINDOW_BYTES)
    with pytest.raises(DeviceFault) as e:
        driver.run(watchdog=10 * CYCLES)
    assert e.value.cycles < CYCLES, str(e.value)
    assert e.value.why, str(e.value)
    return e.value.name, e.value.index, e.value.engine, e.value.address


def check_fields(rtl: RtlDevice, opcode: Opcode, engine: Engine, seed: int) -> int:
    """Every limit of a command is broken in turn. Returns how often."""
    config, rng, count = rtl.config, np.random.default_rng((seed, engine)), 0
    commands = CommandDevice(config, MEMORY)
    values = random_fields(rng, opcode, config)
    for name, broken in broken_fields(rng, opcode, config, values):
        encoder = Encoder()
        words, index = words_before(encoder, config)
        wait = int(rng.integers(4))  # for the loads' tokens
        words += encoder.encode(opcode, engine, wait=wait, **broken)
        words += encoder.encode(Opcode.END)
        expected = ("ILLEGAL_FIELD", index, engine, 0)
        assert fault_of(commands, words) == expected, (seed, name, broken)
        assert fault_of(rtl, words) == expected, (seed, name, broken)
        count += 1
    return count


@pytest.mark.xdist_group("4x4")
@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(i, marks=pytest.mark.long) for i in range(1, 10))]
)
@pytest.mark.parametrize(("opcode", "engine"), ENGINES)
def test_both_simulators_name_the_same_fault(rtl, opcode, engine, seed):
    limits = len(field_limits(opcode, SMALL))
    assert check_fields(rtl, opcode, engine, seed) >= limits > 0
    check_program(rtl, *digits_case(SMALL))


@pytest.mark.long
@pytest.mark.parametrize("name", OTHERS)
def test_in_other_configurations(name):
    config = OTHERS[name]
    with RtlDevice(config, memory_bytes=MEMORY) as device:
        for opcode, engine in ENGINES:
            for seed in range(3):
                check_fields(device, opcode, engine, seed)
        check_program(device, *digits_case(config))
