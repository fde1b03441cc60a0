"""The LOAD and STORE engines behind the AXI managers, against numpy and a cycle budget."""

import random

import numpy as np
import pytest
from amaranth.hdl import Module
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out, connect, flipped

from systole.hw.bus.axi import Axi4Read, Axi4Write, ReadManager, WriteManager
from systole.hw.bus.interfaces import CommandPort, ScratchpadRead, ScratchpadWrite, WeightWrite
from systole.hw.transfer.engines import LoadEngine, StoreEngine
from systole.isa import Config, Fault, LoadTarget, Opcode
from tests.helpers.axi_model import AxiMemory
from tests.helpers.simulation import simulation

BASE = 0x8_7654_3000
LATENCY = 30

CONFIGS = {
    "4x4": Config.sized(4, 4, axi_outstanding=3),
    "16x16": Config.sized(16, 16),
    "32x8": Config.sized(32, 8, axi_data_bits=64),
    "12x20": Config.sized(12, 20),
    "4x64": Config.sized(4, 64, axi_data_bits=512, axi_outstanding=1),
    "64x5": Config.sized(64, 5, axi_data_bits=32, axi_burst_beats=8),
}


class Transfer(wiring.Component):
    """A LOAD or STORE engine with the manager it needs; the ports are the engine's."""

    def __init__(self, config, opcode):
        load = opcode == Opcode.LOAD
        self.engine = (LoadEngine if load else StoreEngine)(config)
        self.manager = (ReadManager if load else WriteManager)(config, clients=2)
        # The bus, and what the engine has on the side of the local memories.
        local = {"scratchpad": Out(ScratchpadWrite(config)), "weights": Out(WeightWrite(config))}
        if not load:
            local = {"scratchpad": Out(ScratchpadRead(config))}
        bus = Out((Axi4Read if load else Axi4Write)(config))
        super().__init__({"command": In(CommandPort(opcode)), "bus": bus, **local})
        self.local = tuple(local)

    def elaborate(self, platform):
        m = Module()
        m.submodules.engine, m.submodules.manager = engine, manager = self.engine, self.manager
        connect(m, engine.memory, manager.clients[1])
        connect(m, flipped(self.command), engine.command)
        connect(m, manager.bus, flipped(self.bus))
        for name in self.local:
            connect(m, getattr(engine, name), flipped(getattr(self, name)))
        return m


class Bench:
    """Runs commands on a ``Transfer``. ``words``: the local memories by target, as byte rows.

    A run ends when every command has retired, or 300 cycles after a fault.
    """

    def __init__(
        self, opcode, config, *, size=1 << 15, limit=None, seed=3, local_stall=0.0, **memory
    ):
        self._simulation = simulation(Transfer, config, opcode)
        self.dut = self._simulation.dut
        self.opcode, self.config, self.local_stall = opcode, config, local_stall
        self.random = random.Random(seed)
        self.limit = size if limit is None else limit
        memory = {"latency": (LATENCY, LATENCY)} | memory
        self.memory = AxiMemory(config, size, base=BASE, seed=seed, **memory)
        self.memory.data[:] = self.random.randbytes(size)
        shapes = ((config.scratchpad_words, config.rows), (config.weight_words, config.cols))
        rng = np.random.default_rng(seed)
        self.words = [rng.integers(0, 256, shape, dtype=np.uint8) for shape in shapes]
        self.retired, self.fault, self.stalled = [], None, 0
        self.now = 0
        self.start = None
        """Cycle in which the first command was taken."""
        self.on_retire = lambda index: None

    def run(self, commands):
        if self.opcode == Opcode.LOAD:
            processes = (
                self.memory.reader(self.dut.bus),
                self.sink(self.dut.scratchpad, self.words[0]),
                self.sink(self.dut.weights, self.words[1]),
            )
        else:
            processes = (
                self.memory.writer(self.dut.bus),
                self.source(self.dut.scratchpad, self.words[0]),
            )

        async def issue(ctx):
            ctx.set(self.dut.manager.base, BASE)
            ctx.set(self.dut.manager.limit, self.limit)
            await ctx.tick().repeat(2)
            port = self.dut.command.cmd
            for command in commands:
                ctx.set(port.payload, command)
                ctx.set(port.valid, 1)
                ready = False
                while not (ready or self.fault):
                    *_, ready = await ctx.tick().sample(port.ready)
                self.start = self.now if self.start is None else self.start
            ctx.set(port.valid, 0)

        async def watch(ctx):
            port = self.dut.command
            quiet = 0
            while len(self.retired) < len(commands) and quiet < 300:
                _, _, retire, fault, code, address, stalled = await ctx.tick().sample(
                    port.retire, port.fault, port.fault_code, port.fault_address, port.stalled
                )
                self.now += 1
                assert self.now < 30_000, "hangs"
                assert not (retire and self.fault), "retires after a fault"
                assert not (fault and self.fault), "faults twice"
                self.stalled += stalled
                if retire:
                    self.on_retire(len(self.retired))
                    self.retired.append(self.now)
                if fault:
                    self.fault = (Fault(code), address)
                quiet += self.fault is not None

        self._simulation.run(issue, watch, processes=processes)
        return self

    @property
    def cycles(self):
        """From the first command taken to the last retired."""
        return self.retired[-1] - self.start

    def sink(self, port, words):
        async def process(ctx):
            ready = 0
            async for _, _, valid, addr, data in ctx.tick().sample(
                port.valid, port.addr, port.data
            ):
                if valid and ready:
                    words[addr] = np.frombuffer(data.to_bytes(words.shape[1], "little"), np.uint8)
                ready = self.random.random() >= self.local_stall
                ctx.set(port.ready, ready)

        return process

    def source(self, port, words):
        async def process(ctx):
            ready = 0
            async for _, _, valid, addr in ctx.tick().sample(port.valid, port.addr):
                # Only a word just asked for is there to see.
                data = words[addr].tobytes() if valid and ready else self.random.randbytes(4)
                ctx.set(port.data, int.from_bytes(data, "little"))
                ready = self.random.random() >= self.local_stall
                ctx.set(port.ready, ready)

        return process


def vectors_of(command, vector_bytes):
    """Every (DRAM offset, local word) of a command, in order."""
    for g in range(command["count2"]):
        for r in range(command["count1"]):
            dram = command["dram"] + g * command["dram2"] + r * command["dram1"]
            local = command["local"] + g * command["local2"] + r * command["local1"]
            for i in range(command["count0"]):
                yield dram + i * vector_bytes, local + i


def transfer(vector_bytes, count0, count1=1, count2=1, **fields):
    """A command's fields; runs and groups dense unless ``fields`` say otherwise."""
    dense = {
        "dram": 0,
        "local": 0,
        "dram1": count0 * vector_bytes,
        "dram2": count1 * count0 * vector_bytes,
        "local1": count0,
        "local2": count1 * count0,
    }
    return dense | fields | {"count0": count0, "count1": count1, "count2": count2}


def random_transfer(rng, vector_bytes, dram, local):
    """A random strided command in the ranges of vectors ``dram`` and of words ``local``; its
    vectors do not overlap on either side."""
    counts = [rng.randint(1, 12), rng.randint(1, 4), rng.randint(1, 3)]
    run = counts[0] + rng.randint(0, 5)
    group = counts[1] * run + rng.randint(0, 3)
    local_run = counts[0] + rng.randint(0, 2)
    local_group = counts[1] * local_run + rng.randint(0, 2)
    if rng.random() < 0.3:  # runs one vector wide, interleaved with the groups
        counts[0], run, group = 1, counts[2] + rng.randint(0, 3), 1
    first = rng.randrange(dram.start, dram.stop - 150)
    return transfer(
        vector_bytes,
        *counts,
        dram=first * vector_bytes,
        dram1=run * vector_bytes,
        dram2=group * vector_bytes,
        local=rng.randrange(local.start, local.stop - 200),
        local1=local_run,
        local2=local_group,
    )


def vector_bytes_of(config, target):
    return config.weight_vector_bytes if target else config.vector_bytes


@pytest.mark.parametrize("name", CONFIGS)
def test_random_loads(name):
    config = CONFIGS[name]
    rng = random.Random(11)
    bench = Bench(Opcode.LOAD, config, latency=(1, 20), stall=0.2, local_stall=0.2)
    commands = []
    for i in range(14):
        target = rng.choice(tuple(LoadTarget))
        vector = vector_bytes_of(config, target)
        # Words of a command's own, so that its retirement can be checked on its own.
        words = range(i * 200, i * 200 + 201) if i * 200 + 201 <= 1024 else range(0, 1024)
        command = random_transfer(rng, vector, range(0, (1 << 15) // vector), words)
        commands.append(command | {"target": target})
    expected = [words.copy() for words in bench.words]

    def check(index):
        command = commands[index]
        target = command["target"]
        width = expected[target].shape[1]
        for dram, local in vectors_of(command, vector_bytes_of(config, target)):
            data = bench.memory.data[dram : dram + width]
            expected[target][local] = np.frombuffer(data, np.uint8)
            assert (bench.words[target][local] == expected[target][local]).all()

    bench.on_retire = check
    bench.run(commands)
    assert bench.fault is None
    for target in LoadTarget:
        assert (bench.words[target] == expected[target]).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_random_stores(name):
    config = CONFIGS[name]
    rng = random.Random(12)
    vector = config.vector_bytes
    bench = Bench(Opcode.STORE, config, latency=(1, 20), stall=0.2, local_stall=0.2)
    space = range(0, (1 << 15) // vector)
    commands = [random_transfer(rng, vector, space, range(0, 1000)) for _ in range(14)]
    expected = bytearray(bench.memory.data)
    states = []
    for command in commands:
        for dram, local in vectors_of(command, vector):
            expected[dram : dram + vector] = bench.words[0][local].tobytes().ljust(vector, b"\0")
        states.append(bytes(expected))

    def check(index):
        later = {d for c in commands[index + 1 :] for d, _ in vectors_of(c, vector)}
        for dram, _ in vectors_of(commands[index], vector):
            if dram not in later:
                seen = bench.memory.data[dram : dram + vector]
                assert seen == states[index][dram : dram + vector]

    bench.on_retire = check
    bench.run(commands)
    assert bench.fault is None
    assert bench.memory.data == expected


def cost(config, vector, words):
    """Cycles that ``words`` words take: one each, or one a beat if a word is several."""
    return words * max(1, vector // config.beat_bytes)


OVERHEAD = 12
"""Cycles beyond the latency between a command and its first word, and after its last."""


@pytest.mark.parametrize("name", ["4x4", "16x16", "32x8", "12x20"])
@pytest.mark.parametrize("target", LoadTarget)
@pytest.mark.parametrize("shape", [(256,), (16, 20), (32, 4, 2)])
def test_load_throughput(name, target, shape):
    config = CONFIGS[name]
    vector = vector_bytes_of(config, target)
    bench = Bench(Opcode.LOAD, config)
    words = int(np.prod(shape))
    bench.run([transfer(vector, *shape, dram=64) | {"target": target}])
    assert bench.cycles <= cost(config, vector, words) + LATENCY + OVERHEAD
    assert bench.stalled <= LATENCY + OVERHEAD


@pytest.mark.parametrize("count0, count1", [(64, 1), (8, 8)])
def test_load_commands_overlap(count0, count1):
    """The latency of a command hides behind the one before."""
    config = CONFIGS["16x16"]
    commands = [
        transfer(16, count0, count1, dram=1024 * i, local=64 * i) | {"target": i % 2}
        for i in range(4)
    ]
    bench = Bench(Opcode.LOAD, config).run(commands)
    assert bench.cycles <= 4 * 64 + LATENCY + OVERHEAD


@pytest.mark.parametrize("name", ["4x4", "16x16", "32x8", "12x20"])
@pytest.mark.parametrize("shape", [(256,), (16, 20), (32, 4, 2)])
def test_store_throughput(name, shape):
    config = CONFIGS[name]
    bench = Bench(Opcode.STORE, config)
    words = int(np.prod(shape))
    bench.run([transfer(config.vector_bytes, *shape, dram=64)])
    assert bench.cycles <= cost(config, config.vector_bytes, words) + LATENCY + OVERHEAD
    assert bench.stalled <= LATENCY + OVERHEAD


def test_store_commands_overlap():
    config = CONFIGS["16x16"]
    commands = [transfer(16, 32, 2, dram=1024 * i, local=64 * i) for i in range(4)]
    bench = Bench(Opcode.STORE, config).run(commands)
    assert bench.cycles <= 4 * 64 + LATENCY + OVERHEAD


@pytest.mark.parametrize("name", ["4x4", "16x16", "32x8"])
@pytest.mark.parametrize("runs", [1, 3])
def test_store_error(name, runs):
    """The failing run's address is reported, after the commands before it have retired."""
    config = CONFIGS[name]
    vector = config.vector_bytes
    bench = Bench(Opcode.STORE, config)
    good = transfer(vector, 8, dram=0)
    bad = transfer(vector, 8, runs, dram=2048, dram1=512)
    bench.memory.errors = {2048 + 512 * (runs - 1)}
    bench.run([good, bad, good])
    assert len(bench.retired) == 1
    assert bench.fault == (Fault.AXI_WRITE, 2048 + 512 * (runs - 1))


@pytest.mark.parametrize("name", ["4x4", "16x16", "32x8"])
@pytest.mark.parametrize("runs", [1, 3])
@pytest.mark.parametrize("local_stall", [0.0, 0.9])
def test_load_error(name, runs, local_stall):
    """As for stores; words written before stay, none is written after."""
    config = CONFIGS[name]
    vector = config.vector_bytes
    bench = Bench(Opcode.LOAD, config, local_stall=local_stall)
    good = transfer(vector, 8, dram=0) | {"target": 0}
    bad = transfer(vector, 8, runs, dram=2048, dram1=512, local=64) | {"target": 0}
    bench.memory.errors = {2048 + 512 * (runs - 1)}
    before = bench.words[0].copy()
    for dram, local in [*vectors_of(good, vector), *vectors_of(bad, vector)][: 8 * runs]:
        row = bench.memory.data[dram : dram + config.rows]
        before[local] = np.frombuffer(row, np.uint8)
    bench.run([good, bad, good])
    assert len(bench.retired) == 1
    assert bench.fault == (Fault.AXI_READ, 2048 + 512 * (runs - 1))
    assert (bench.words[0] == before).all()


@pytest.mark.parametrize("opcode", [Opcode.LOAD, Opcode.STORE])
@pytest.mark.parametrize(
    "fields, address",
    [
        ({"dram": 8000}, 8000),
        ({"dram": 0xFFFF_FFF0}, 0xFFFF_FFF0),
        ({"dram": 256, "dram1": 0xFFFF_FF00, "count1": 2}, 0),
        ({"dram": 256, "dram2": 0xFFFF_FF10, "count2": 4}, 16),
        ({"dram": 0, "dram1": 0xC000_0000, "count1": 3}, 0xC000_0000),
        ({"dram": 7936 - 256, "dram1": 256, "count1": 4}, 7936),
    ],
)
def test_window(opcode, fields, address):
    """A run that leaves the window, or the 32 bits, faults after all before it are done."""
    config = CONFIGS["16x16"]
    bench = Bench(opcode, config, limit=8000)
    good = transfer(16, 8)
    bench.run([good, good, transfer(16, 8) | fields, good])
    assert len(bench.retired) == 2
    assert bench.fault == (Fault.DRAM_WINDOW, address)
